//! The piece of an order that a pool thread works on.
//!
//! An id may take hours, and no thread knows that beforehand. So the slot keeps the piece's results where the watch can
//! take them. Other threads can get the ids that are not begun. That costs a lock, which is a good part of a light id.
//! So only short pieces, and ids behind a long one, take the lock for each id; otherwise one lock serves a few ids.

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

/// Ids that a thread takes at once. A long id can delay this many others minus one, finished or not begun.
pub(super) const AT_ONCE: usize = 4;
/// In a piece of at most so many ids a thread takes them one by one.
const SHORT: u32 = 64;
/// A thread also takes ids one by one once the watch has polled its piece so often.
const LASTS: u32 = 2;

/// The slot for one thread's piece.
pub(super) struct PieceSlot<I> {
    open: Mutex<Option<Open<I>>>,
    /// Polls of the watch since the piece was begun.
    looks: AtomicU32,
}

/// A piece in progress.
pub(super) struct Open<I> {
    shares: Arc<Shares<I>>,
    /// Results that were not passed on yet.
    done: Piece,
    /// Places within the order that the thread has not taken yet.
    left: Range<u32>,
    /// Ids that the thread takes at once.
    at_once: u32,
    /// When the thread began the first id of `done`.
    begun: Instant,
    schema: Arc<Schema>,
    /// The id of this process, because the function may fork.
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

    /// Begins a piece: the ids at `places` of an order.
    pub fn begin(&self, shares: Arc<Shares<I>>, places: Range<u32>, schema: Arc<Schema>, process: u32) {
        self.looks.store(0, Ordering::Relaxed);
        let at_once = if places.len() as u32 > SHORT { AT_ONCE as u32 } else { 1 };
        let done = none(&schema, &places);
        let begun = Instant::now();
        *self.open() = Some(Open { shares, done, left: places, at_once, begun, schema, process });
    }

    /// Lets `write` append the results of the ids taken before, and takes the next places; none at the end of the
    /// piece.
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

    /// Ends the piece. If its order was called off, the remaining ids stay undone.
    pub fn end(&self) {
        if let Some(mut open) = self.open().take() {
            open.hand_over();
        }
    }

    /// Notes a poll of the watch. If the thread's id `stands` still, passes on the results so far, and returns the ids
    /// that are not begun, for other threads.
    pub fn look(&self, stands: bool) -> Option<(Arc<Shares<I>>, Range<u32>)> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        // A thread that writes a row holds the lock for as long as the user's code takes.
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
        // Before the thread's own piece can finish.
        open.shares.one_more();
        Some((open.shares.clone(), left))
    }
}

impl<I> Open<I> {
    /// Where the next row goes, or the id that asked for another attempt.
    pub fn done(&mut self) -> &mut Piece {
        &mut self.done
    }

    /// Counts one more finished id. Passes results on once they are many bytes.
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
        // Timed by the piece, not by the id: reading a clock costs as much as a light id.
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
