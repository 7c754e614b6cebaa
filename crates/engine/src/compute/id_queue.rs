//! The ids of a batch in queue, for children that have one id at a time: each of their lanes takes the chunk that is next, and
//! gives back what is behind an id that lasts.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::computed::Computed;
use super::results::Results;

/// Ids that one child takes at a time, while others take theirs.
const LOT: usize = 64;
/// Each child gets so many queue at least, where there are ids enough.
const LOTS_PER_CHILD: usize = 4;

pub(super) struct IdQueue<'a, I> {
    /// The ids of all queue.
    pub ids: &'a [I],
    results: &'a Results<I>,
    /// Places of the queue that no lane has taken, the last of them first.
    waiting: Mutex<Vec<Range<usize>>>,
    /// Ids that are not done.
    left: AtomicUsize,
    /// Lanes that have a seat.
    busy: AtomicUsize,
    /// A chunk is given back.
    pub given_back: Notify,
}

/// A lane that has a seat, until it is dropped.
pub(super) struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<'a, I> IdQueue<'a, I> {
    /// Cuts the ids for so many children.
    pub fn new(ids: &'a [I], results: &'a Results<I>, children: usize) -> Self {
        let size = ids.len().div_ceil(children * LOTS_PER_CHILD).clamp(1, LOT);
        let queue = (0..ids.len()).step_by(size).map(|start| start..ids.len().min(start + size));
        let waiting = Mutex::new(queue.rev().collect());
        let left = AtomicUsize::new(ids.len());
        Self { ids, results, waiting, left, busy: AtomicUsize::new(0), given_back: Notify::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        self.waiting().len()
    }

    /// Whether any id is not done, or any lane not at its end.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Relaxed) > 0 || self.busy.load(Ordering::Relaxed) > 0
    }

    /// A lane has a seat.
    pub fn busy(&self) -> Busy<'_> {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(&self.busy)
    }

    /// The places of the next chunk.
    pub fn next(&self) -> Option<Range<usize>> {
        self.waiting().pop()
    }

    /// Gives back all but the first id of a chunk.
    pub fn give_back(&self, chunk: &mut Range<usize>) {
        let rest = chunk.start + 1..chunk.end;
        if !rest.is_empty() {
            chunk.end = rest.start;
            self.waiting().push(rest);
            self.given_back.notify_one();
        }
    }

    /// Puts down what is done.
    pub fn put(&self, done: Computed<I>) {
        let ids = done.ids.len() + done.again.len();
        self.results.put_alone(done);
        self.left.fetch_sub(ids, Ordering::Relaxed);
    }
}
