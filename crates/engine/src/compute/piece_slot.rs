//! The piece of an order that a thread of the pool has under way.
//!
//! An id may last for hours, and no thread knows that beforehand. So what is done of its piece lies where it can be taken
//! meanwhile, and what is not begun can be given to other threads. That costs a lock: for each id of a short piece, or of
//! one that lasts; else for a few ids at a time, as a lock costs a good part of a light id.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use millstream::schema::Schema;

use super::computed::{PIECE_BYTES, Piece};
use super::group::end_a_copy;
use super::order::Shares;
use super::row::Rows;
use crate::model::times::Spent;

/// Ids that a thread takes at once: an id that lasts keeps so many less one waiting, done or not begun.
pub(super) const AT_ONCE: usize = 4;
/// In a piece of no more ids, they are taken one by one.
const SHORT: u32 = 64;
/// So is it once the watch has looked at a piece so often.
const LASTS: u32 = 2;

/// Where one thread's piece lies.
pub(super) struct PieceSlot<I> {
    open: Mutex<Option<Open<I>>>,
    /// Looks of the watch since the piece was begun.
    looks: AtomicU32,
}

/// A piece under way.
pub(super) struct Open<I> {
    shares: Arc<Shares<I>>,
    /// What is done of it, and not handed over.
    done: Piece,
    /// Places within the order that the thread has not taken yet.
    left: Range<u32>,
    /// Ids that the thread takes at once.
    at_once: u32,
    /// When the first of what is done was begun.
    begun: Instant,
    schema: Arc<Schema>,
    /// This process: the function may have forked.
    process: u32,
}

impl<I> Default for PieceSlot<I> {
    fn default() -> Self {
        Self { open: Mutex::new(None), looks: AtomicU32::new(0) }
    }
}

impl<I> PieceSlot<I> {
    fn open(&self) -> MutexGuard<'_, Option<Open<I>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a piece: these places within an order.
    pub fn begin(&self, shares: Arc<Shares<I>>, places: Range<u32>, schema: Arc<Schema>, process: u32) {
        self.looks.store(0, Ordering::Relaxed);
        let at_once = if places.len() as u32 > SHORT { AT_ONCE as u32 } else { 1 };
        let done = none(&schema, &places);
        let begun = Instant::now();
        *self.open() = Some(Open { shares, done, left: places, at_once, begun, schema, process });
    }

    /// Has `write` append what was taken before, and takes the places that come next: none at the end of the piece.
    pub fn next(&self, write: impl FnOnce(&mut Open<I>)) -> Range<u32> {
        let lasts = self.looks.load(Ordering::Relaxed) >= LASTS;
        let mut open = self.open();
        let Some(open) = &mut *open else { return 0..0 };
        write(open);
        let start = open.left.start;
        let many = if lasts { 1 } else { open.at_once };
        open.left.start = open.left.end.min(start + many);
        start..open.left.start
    }

    /// Ends the piece; what is left of it, if it was called off, stays undone.
    pub fn end(&self) {
        if let Some(mut open) = self.open().take() {
            open.hand_over();
        }
    }

    /// Takes note of a look of the watch. Where the id in hand `stands` still, hands over what is done, and returns what is
    /// not begun, for other threads.
    pub fn look(&self, stands: bool) -> Option<(Arc<Shares<I>>, Range<u32>)> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        // A thread that writes a row has the lock, for as long as the user's code takes for that.
        let mut open = match self.open.try_lock() {
            Ok(open) if stands => open,
            Err(TryLockError::Poisoned(open)) if stands => open.into_inner(),
            _ => return None,
        };
        let open = open.as_mut()?;
        open.hand_over();
        let left = std::mem::replace(&mut open.left, 0..0);
        if left.is_empty() {
            return None;
        }
        // Before its own piece can be done.
        open.shares.one_more();
        Some((open.shares.clone(), left))
    }
}

impl<I> Open<I> {
    /// Where the next row goes, or the id that is to be tried again.
    pub fn done(&mut self) -> &mut Piece {
        &mut self.done
    }

    /// One more id is done. Many bytes of rows are not kept.
    pub fn count(&mut self) {
        self.done.count += 1;
        if self.done.rows.bytes() >= PIECE_BYTES {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        if self.done.count == 0 {
            return;
        }
        end_a_copy(self.process);
        let next = self.done.from + self.done.count;
        let now = Instant::now();
        let mut done =
            std::mem::replace(&mut self.done, none(&self.schema, &(next..self.left.end.max(next))));
        // By the piece, not by the id: a look at the clock costs as much as a light id.
        let all = now - self.begun;
        let encoding = done.rows.encoding().min(all);
        done.spent = Spent { computing: all - encoding, encoding };
        self.begun = now;
        self.shares.done(done);
    }
}

fn none(schema: &Schema, places: &Range<u32>) -> Piece {
    let rows = Rows::with_room(schema, places.len());
    Piece { from: places.start, count: 0, rows, again: Vec::new(), spent: Spent::default() }
}
