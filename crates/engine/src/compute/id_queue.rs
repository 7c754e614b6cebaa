//! The ids of a batch in chunks, for isolated processes: each lane takes the next chunk, and returns the ids behind one
//! that takes long.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::computed::Computed;
use super::results::Results;

/// Most ids of a chunk, so that other lanes get ids too.
const CHUNK: usize = 64;
/// Chunks for each process, at least, if there are enough ids.
const CHUNKS_PER_CHILD: usize = 4;

pub(super) struct IdQueue<'a, I> {
    /// All ids of the batch.
    pub ids: &'a [I],
    results: &'a Results<I>,
    /// Places of chunks that no lane has taken, in reverse order.
    waiting: Mutex<Vec<Range<usize>>>,
    /// Ids that have no result yet.
    left: AtomicUsize,
    /// Lanes that have a thread slot.
    busy: AtomicUsize,
    /// Notifies that a lane returned a chunk.
    pub given_back: Notify,
}

/// A lane with a thread slot; dropping the value ends that.
pub(super) struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<'a, I> IdQueue<'a, I> {
    /// Divides the ids into chunks for `children` processes.
    pub fn new(ids: &'a [I], results: &'a Results<I>, children: usize) -> Self {
        let size = ids.len().div_ceil(children * CHUNKS_PER_CHILD).clamp(1, CHUNK);
        let queue = (0..ids.len()).step_by(size).map(|start| start..ids.len().min(start + size));
        let waiting = Mutex::new(queue.rev().collect());
        let left = AtomicUsize::new(ids.len());
        Self { ids, results, waiting, left, busy: AtomicUsize::new(0), given_back: Notify::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many chunks wait.
    pub fn count(&self) -> usize {
        self.waiting().len()
    }

    /// Whether an id has no result yet, or a lane still works.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Relaxed) > 0 || self.busy.load(Ordering::Relaxed) > 0
    }

    /// Notes that a lane has a thread slot.
    pub fn busy(&self) -> Busy<'_> {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Busy(&self.busy)
    }

    /// The places of the next chunk.
    pub fn next(&self) -> Option<Range<usize>> {
        self.waiting().pop()
    }

    /// Returns all ids of a chunk but the first.
    pub fn give_back(&self, chunk: &mut Range<usize>) {
        let rest = chunk.start + 1..chunk.end;
        if !rest.is_empty() {
            chunk.end = rest.start;
            self.waiting().push(rest);
            self.given_back.notify_one();
        }
    }

    /// Stores results.
    pub fn put(&self, done: Computed<I>) {
        let ids = done.ids.len() + done.again.len();
        self.results.put_alone(done);
        self.left.fetch_sub(ids, Ordering::Relaxed);
    }
}
