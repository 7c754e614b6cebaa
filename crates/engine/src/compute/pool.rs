//! A rayon pool with one computing thread a core; these threads take ids from a queue of their own.
//!
//! The user's function may use rayon itself, and a thread that waits inside rayon takes any job. If ids were jobs, such
//! a thread could begin another id in the middle of one that holds locks. So as many threads as there are cores each
//! run one endless job, which takes ids from the queue. As many more threads serve what the function gives to rayon;
//! without such work they sleep.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use millstream::Id;
use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

use super::computed::{Computed, Piece};
use super::function::Function;
use super::guard::install_panic_hook;
use super::order::{Finished, Off, Order, Shares};
use super::piece_slot::PieceSlot;
use super::results::Results;
use super::watch::{Hand, Watch};
use crate::error::Error;

/// Pieces of a batch for each core, at least, so that the last ones to finish are short.
const PIECES_PER_CORE: usize = 16;
/// Most ids of a piece, whatever the batch, so that its encoded rows stay in the cache.
const MAX_PIECE: usize = 1024;
/// Stack size of a thread: that of a usual main thread, so that a deeply recursive function works here too.
const STACK: usize = 8 << 20;

/// A pool of one thread a core, with the function that it computes. Clones share it.
#[derive(Clone)]
pub struct Pool<I> {
    shared: Arc<Shared<I>>,
    /// Ends the threads with the last clone.
    _threads: Arc<Threads<I>>,
}

type Work<I> = Box<dyn FnOnce(&Shared<I>) + Send>;

enum Entry<I> {
    /// Work other than ids.
    Work(Work<I>),
    /// The pieces of an order, from this one on.
    Pieces(Arc<Shares<I>>, usize),
    /// The rest of a piece whose thread has a long id.
    Rest(Arc<Shares<I>>, Range<u32>),
}

struct Queue<I> {
    entries: VecDeque<Entry<I>>,
    /// Threads that have begun.
    up: usize,
    closed: bool,
}

pub(super) struct Shared<I> {
    function: Function<I>,
    /// One thread slot for each thread that takes ids.
    hands: Box<[Hand]>,
    slots: Box<[PieceSlot<I>]>,
    queue: Mutex<Queue<I>>,
    changed: Condvar,
}

struct Threads<I> {
    shared: Arc<Shared<I>>,
    _pool: ThreadPool,
}

impl<I> Drop for Threads<I> {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.changed.notify_all();
    }
}

impl<I: Id> Pool<I> {
    /// Starts a pool that computes `threads` ids at once, and waits until all threads run.
    ///
    /// # Errors
    /// [`Error::Pool`] when the system does not give so many threads.
    pub fn start(function: Function<I>, threads: usize) -> Result<Self, Error> {
        install_panic_hook();
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads * 2)
            .stack_size(STACK)
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|source| Error::Pool { threads, source })?;
        let queue = Queue { entries: VecDeque::new(), up: 0, closed: false };
        let hands = (0..threads).map(|_| Hand::default()).collect();
        let slots = (0..threads).map(|_| PieceSlot::default()).collect();
        let queue = Mutex::new(queue);
        let changed = Condvar::new();
        let shared = Arc::new(Shared { function, hands, slots, queue, changed });
        let looping = shared.clone();
        pool.spawn_broadcast(move |thread| {
            if thread.index() < looping.hands.len() {
                looping.take_all(thread.index());
            }
        });
        let up = shared.changed.wait_while(shared.queue(), |queue| queue.up < threads);
        drop(up.unwrap_or_else(PoisonError::into_inner));
        let threads = Arc::new(Threads { shared: shared.clone(), _pool: pool });
        Ok(Self { shared, _threads: threads })
    }

    /// How many ids the pool computes at once.
    pub fn threads(&self) -> usize {
        self.shared.hands.len()
    }

    /// The state that the threads share. It does not keep the threads alive.
    pub(super) fn shared(&self) -> Arc<Shared<I>> {
        self.shared.clone()
    }

    /// Computes and encodes `ids` on the pool. With `last`, ids that ask for another attempt become dead letters.
    ///
    /// Dropping the future discards the result, and skips the ids that are not begun.
    pub async fn compute(&self, ids: Vec<I>, last: bool) -> Computed<I> {
        let results = Arc::<Results<I>>::default();
        self.compute_onto(ids, last, &results).await;
        results.take_all(&self.shared.function.spec().schema)
    }

    /// Computes like [`Self::compute`], and adds each piece to `results` as it arrives.
    pub(super) async fn compute_onto(&self, ids: Vec<I>, last: bool, results: &Arc<Results<I>>) {
        let (sender, receiver) = oneshot::channel();
        let off = Off::default();
        let order = Order { number: 1, ids, last, off: off.0.clone() };
        let results = results.clone();
        let done = move |order: &Order<I>, piece| results.put(Computed::of(&order.ids, piece));
        self.shared.begin(order, done, move || {
            // The receiver is gone if the caller gave up: then the result has no use.
            let _forgotten = sender.send(());
        });
        receiver.await.expect("pieces catch panics, so the end is always reported");
        drop(off);
    }

    /// Runs the pipeline's `start` in this very process.
    ///
    /// # Errors
    /// [`Error::Start`] when the pipeline's `start` fails.
    pub(super) async fn started(&self) -> Result<(), Error> {
        let (sender, receiver) = oneshot::channel();
        self.spawn(move |shared| {
            let _forgotten = sender.send(shared.function.typed.start());
        });
        let started = receiver.await.unwrap_or_else(|_| Err("its thread ended".to_owned()));
        started.map_err(|reason| Error::Start { source: reason.into() })
    }

    /// Runs `work` on a thread of the pool.
    pub(super) fn spawn(&self, work: impl FnOnce(&Shared<I>) + Send + 'static) {
        self.shared.push(Entry::Work(Box::new(work)));
    }
}

impl<I> Shared<I> {
    fn queue(&self) -> MutexGuard<'_, Queue<I>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, entry: Entry<I>) {
        self.queue().entries.push_back(entry);
        self.changed.notify_all();
    }

    /// The next entry, when there is one; `None` at the end.
    fn next(&self) -> Option<Entry<I>> {
        let mut queue = self.queue();
        loop {
            if queue.closed {
                return None;
            }
            match queue.entries.pop_front() {
                Some(entry) => {
                    // The next thread takes the pieces after this one.
                    if let Entry::Pieces(shares, number) = &entry
                        && (number + 1) * shares.size < shares.order.ids.len()
                    {
                        queue.entries.push_front(Entry::Pieces(shares.clone(), number + 1));
                    }
                    return Some(entry);
                }
                None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl<I: Id> Shared<I> {
    /// Begins an order, after those already begun. Passes each finished piece to `done`, in any order.
    pub fn begin(
        &self,
        order: Order<I>,
        done: impl Fn(&Order<I>, Piece) + Send + Sync + 'static,
        finished: impl FnOnce() + Send + 'static,
    ) {
        let pieces = self.hands.len() * PIECES_PER_CORE;
        let size = order.ids.len().div_ceil(pieces).clamp(1, MAX_PIECE);
        let left = AtomicUsize::new(order.ids.len().div_ceil(size));
        if order.ids.is_empty() {
            return finished();
        }
        let finished = Mutex::new(Some(Box::new(finished) as Finished));
        self.push(Entry::Pieces(Arc::new(Shares { order, size, left, done: Box::new(done), finished }), 0));
    }

    /// The thread slots.
    pub fn hands(&self) -> &[Hand] {
        &self.hands
    }

    /// Where the watch sees a long id, passes on the results before it, and gives the ids behind it to other threads.
    pub fn relieve(&self, watch: &Watch) {
        for (at, (hand, slot)) in self.hands.iter().zip(&self.slots).enumerate() {
            if !hand.is_busy() {
                continue;
            }
            if let Some((shares, rest)) = slot.look(watch.stands(at)) {
                self.queue().entries.push_front(Entry::Rest(shares, rest));
                self.changed.notify_all();
            }
        }
    }

    /// Works until the pool is closed.
    fn take_all(&self, thread: usize) {
        // Read before any function can fork.
        let process = std::process::id();
        self.queue().up += 1;
        self.changed.notify_all();
        while let Some(entry) = self.next() {
            match entry {
                Entry::Work(work) => work(self),
                Entry::Pieces(shares, number) => {
                    let places = shares.places(number);
                    self.compute_piece(process, thread, shares, places);
                }
                Entry::Rest(shares, places) => self.compute_piece(process, thread, shares, places),
            }
        }
    }

    /// Computes these ids of an order.
    fn compute_piece(&self, process: u32, thread: usize, shares: Arc<Shares<I>>, places: Range<u32>) {
        let hand = &self.hands[thread];
        let slot = &self.slots[thread];
        let order = &shares.order;
        hand.take(order.number);
        slot.begin(shares.clone(), places, self.function.spec().schema.clone(), process);
        self.function.typed.grind(hand, slot, order);
        super::group::end_a_copy(process);
        slot.end();
        hand.put_down();
        if shares.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let finished = shares.finished.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(finished) = finished {
                finished();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    use millstream::{Outcome, Pipeline};
    use serde::{Deserialize, Serialize};

    use super::super::piece_slot::AT_ONCE;
    use super::*;

    /// Id 7 runs until the test ends it.
    struct Lasting(Mutex<Receiver<()>>);

    #[derive(Serialize, Deserialize)]
    struct Number {
        number: u64,
    }

    impl Pipeline for Lasting {
        const NAME: &'static str = "lasting";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("number", "UInt64")];
        type Id = u64;
        type Row = Number;

        fn compute(&self, id: &u64) -> Outcome<Number> {
            if *id == 7 {
                self.0.lock().expect("no panic").recv().expect("a sender");
            }
            Ok(Number { number: *id })
        }
    }

    /// Computes ids; id 7 ends once at most `waiting` results are missing.
    async fn all_but(waiting: usize, ids: usize, threads: usize) {
        let (sender, receiver) = channel();
        let function = Function::of(Arc::new(Lasting(Mutex::new(receiver)))).expect("sound");
        let pool = Pool::start(function.clone(), threads).expect("threads");
        let results = Arc::<Results<u64>>::default();
        let shared = pool.shared();
        let watching = async {
            let mut watch = Watch::new(threads, None, None);
            while results.answered() < ids - waiting {
                tokio::time::sleep(Duration::from_millis(1)).await;
                watch.look(shared.hands(), Duration::from_millis(100));
                shared.relieve(&watch);
            }
            assert!(results.answered() < ids, "id 7 did not last");
            sender.send(()).expect("it is waited for");
        };
        tokio::join!(pool.compute_onto((0..ids as u64).collect(), true, &results), watching);
        let computed = results.take(&function.spec().schema);
        assert_eq!(computed.ids, (0..ids as u64).collect::<Vec<_>>());
        assert_eq!(computed.rows.count(), ids);
    }

    #[tokio::test]
    async fn an_id_that_lasts_holds_up_no_other() {
        all_but(1, 200, 2).await;
        all_but(1, 64 * 32, 2).await;
    }

    /// Light ids are taken a few at a time.
    #[tokio::test]
    async fn in_long_pieces_it_holds_up_few() {
        all_but(AT_ONCE, 20_000, 2).await;
    }
}
