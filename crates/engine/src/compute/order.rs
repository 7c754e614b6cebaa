//! An order: ids that the pool computes together, and the pieces in which threads take them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::computed::Piece;

/// Ids to be computed together.
pub(super) struct Order<I> {
    /// Tells it from others in the same pool.
    pub number: u64,
    pub ids: Vec<I>,
    pub last: bool,
    pub off: Arc<AtomicBool>,
}

impl<I> Order<I> {
    /// Whether its result has no use any more.
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }
}

/// Calls an order off when it is dropped. One that is done does not mind.
#[derive(Default)]
pub(super) struct Off(pub Arc<AtomicBool>);

impl Drop for Off {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An order that is handed out in pieces.
pub(super) struct Shares<I> {
    pub order: Order<I>,
    /// Ids of a piece.
    pub size: usize,
    /// Pieces that are not done.
    pub left: AtomicUsize,
    pub done: Box<Done<I>>,
    pub finished: Mutex<Option<Finished>>,
}

impl<I> Shares<I> {
    /// Some ids are done.
    pub fn done(&self, piece: Piece) {
        (self.done)(&self.order, piece);
    }

    /// A piece becomes two.
    pub fn one_more(&self) {
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    /// The places of the ids of a piece.
    pub fn places(&self, number: usize) -> Range<u32> {
        let start = number * self.size;
        start as u32..self.order.ids.len().min(start + self.size) as u32
    }
}

pub(super) type Done<I> = dyn Fn(&Order<I>, Piece) + Send + Sync;

pub(super) type Finished = Box<dyn FnOnce() + Send>;
