//! An order: ids that the pool computes together, and the pieces in which threads take them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::computed::Piece;

/// Ids to compute together.
pub(super) struct Order<I> {
    /// Identifies the order among all orders of the pool.
    pub number: u64,
    pub ids: Vec<I>,
    pub last: bool,
    pub off: Arc<AtomicBool>,
}

impl<I> Order<I> {
    /// Whether the worker no longer needs the result.
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }
}

/// Calls an order off when it is dropped. A finished order ignores that.
#[derive(Default)]
pub(super) struct Off(pub Arc<AtomicBool>);

impl Drop for Off {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An order that threads take in pieces.
pub(super) struct Shares<I> {
    pub order: Order<I>,
    /// Ids in a piece.
    pub size: usize,
    /// Pieces that are not finished.
    pub left: AtomicUsize,
    pub done: Box<Done<I>>,
    pub finished: Mutex<Option<Finished>>,
}

impl<I> Shares<I> {
    /// Passes on the rows of a finished piece.
    pub fn done(&self, piece: Piece) {
        (self.done)(&self.order, piece);
    }

    /// Counts one more piece, because one was split in two.
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
