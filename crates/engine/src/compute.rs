//! Computing ids: on a rayon pool, in a process of its own, or one id at a time in child processes.
//!
//! A batch is split over the cores in short pieces; each id is computed behind a panic guard; its row goes into typed
//! columns where it was computed. The worker puts the pieces of a batch together and packs them into one block (`block`).
//!
//! A thread cannot be killed, so the pool stands in a child process (`apart`): an id that crashes it or overruns its
//! limits costs that process, not the worker. What was in it is then computed by children that have one id at a time
//! (`alone`), and only the id that kills its child, or has to be killed, becomes a dead letter. `child` is the other end
//! of both pipes.

mod alone;
mod apart;
pub(crate) mod block;
mod child;
mod cores;
mod frames;
mod function;
mod order;
mod row;
mod watch;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use millstream::names::RunName;
use millstream::schema::Schema;
use millstream::{Failure, Id, Outcome};
use rayon::ThreadPool;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::error::Error;
use watch::Hand;

pub use block::Maker;
pub use child::child_main;
pub use cores::{Cores, Place};
pub use function::{AnyFunction, Function};
pub use row::Rows;

/// A batch is cut into this many pieces for each core at least, so that the last ones to finish are short.
const PIECES_PER_CORE: usize = 16;
/// A piece holds no more ids than this, whatever the batch: its encoded rows stay in the cache.
const MAX_PIECE: usize = 1024;
/// A piece whose rows come to more than this is ended early.
const PIECE_BYTES: usize = 4 << 20;

/// A core-sized pool with the function that it computes. Clones are the same.
#[derive(Clone)]
pub struct Pool<I> {
    threads: Arc<ThreadPool>,
    function: Function<I>,
    /// One for each thread.
    hands: Arc<[Hand]>,
}

/// Which batch the ids belong to: what every one of its rows begins with.
#[derive(Debug, Clone)]
pub struct BatchKey {
    /// The run.
    pub run: RunName,
    /// The pass.
    pub pass: u32,
    /// The batch.
    pub batch: u32,
    /// Ids that the batch has in all.
    pub ids: u32,
}

/// What computing some ids of a batch came to.
#[derive(Debug)]
pub struct Computed<I> {
    /// The ids that have a row, in the order of the rows.
    pub ids: Vec<I>,
    /// Their rows.
    pub rows: Rows,
    /// Ids that asked to be tried again, with their reasons. They have no row yet.
    pub again: Vec<(I, String)>,
    /// What they took of the cores.
    pub spent: Spent,
}

/// Time of cores, summed over them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// In the user's function.
    pub computing: Duration,
    /// In writing rows into columns, and packing them.
    pub encoding: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, more: Self) {
        self.computing += more.computing;
        self.encoding += more.encoding;
    }
}

impl<I> Computed<I> {
    /// No ids yet.
    pub fn none(schema: &Schema) -> Self {
        let rows = Rows::with_room(schema, 0);
        Self { ids: Vec::new(), rows, again: Vec::new(), spent: Spent::default() }
    }

    /// Appends other ids of the same batch.
    pub fn append(&mut self, mut more: Self) {
        self.ids.append(&mut more.ids);
        self.rows.append(more.rows);
        self.again.append(&mut more.again);
        self.spent += more.spent;
    }
}

impl<I: Id> Computed<I> {
    /// The pieces of an order over these ids, in the order of the ids.
    fn whole(schema: &Schema, ids: &[I], mut pieces: Vec<Piece>) -> Self {
        pieces.sort_unstable_by_key(|piece| piece.from);
        let mut whole = Self::none(schema);
        for Piece { from, count, rows, again, spent } in pieces {
            let (mut rest, mut next) = (&ids[from as usize..(from + count) as usize], from);
            for (place, reason) in again {
                let (before, from_it) = rest.split_at((place - next) as usize);
                whole.ids.extend_from_slice(before);
                whole.again.push((from_it[0].clone(), reason));
                (rest, next) = (&from_it[1..], place + 1);
            }
            whole.ids.extend_from_slice(rest);
            whole.rows.append(rows);
            whole.spent += spent;
        }
        whole
    }
}

/// Neighbouring ids that were computed together.
#[derive(Debug, Serialize, Deserialize)]
struct Piece {
    /// Place of the first among the ids of the order.
    from: u32,
    /// Ids that it covers, whether they have a row or not.
    count: u32,
    /// A row for each of them, but for those that are to be tried again.
    rows: Rows,
    /// Places within the order of ids that asked to be tried again, in order, and why.
    again: Vec<(u32, String)>,
    /// What they took of the cores.
    spent: Spent,
}

impl Piece {
    /// Whether a piece that another process sent is of an order of so many ids, with rows of these columns.
    fn is_sound(&self, schema: &Schema, ids: usize) -> bool {
        let places = self.from..self.from.saturating_add(self.count);
        let again = self.again.iter().map(|(at, _)| *at);
        let rows = (self.count as usize).checked_sub(self.again.len());
        places.end as usize <= ids
            && again.clone().is_sorted_by(|a, b| a < b)
            && again.clone().all(|at| places.contains(&at))
            && rows.is_some_and(|rows| self.rows.is_sound(schema, rows))
    }
}

/// Ids to be computed together.
struct Order<I> {
    /// Tells it from others in the same pool.
    number: u64,
    ids: Vec<I>,
    last: bool,
    off: Arc<AtomicBool>,
}

impl<I> Order<I> {
    /// Whether nobody waits for it any more.
    fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }
}

/// Calls an order off when it is dropped. One that is done does not mind.
#[derive(Default)]
struct Off(Arc<AtomicBool>);

impl Drop for Off {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Cores that this process may use: its affinity and its cgroup's quota are honoured.
pub fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl<I: Id> Pool<I> {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// [`Error::Pool`] when the system gives none.
    pub fn start(function: Function<I>, threads: usize) -> Result<Self, Error> {
        install_panic_hook();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|source| Error::Pool { threads, source })?;
        let hands = (0..threads).map(|_| Hand::default()).collect();
        Ok(Self { threads: Arc::new(pool), function, hands })
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Computes and encodes `ids` on the pool. With `last`, ids that would be tried again become dead letters.
    ///
    /// Dropping the future forgets the result, and leaves out the ids that are not begun.
    pub async fn compute(&self, ids: Vec<I>, last: bool) -> Computed<I> {
        let (sender, receiver) = oneshot::channel();
        let (this, off) = (self.clone(), Off::default());
        let switch = off.0.clone();
        self.threads.spawn(move || {
            let pieces = Mutex::new(Vec::new());
            let order = Order { number: 0, ids, last, off: switch };
            this.grind(&order, &|piece| pieces.lock().unwrap_or_else(PoisonError::into_inner).push(piece));
            let pieces = pieces.into_inner().unwrap_or_else(PoisonError::into_inner);
            // The receiver is gone when work was given up: then the result has no use.
            let _forgotten = sender.send(Computed::whole(&this.function.spec().schema, &order.ids, pieces));
        });
        let computed = receiver.await.expect("pieces catch panics, so a result is always sent");
        drop(off);
        computed
    }

    /// Has `work` run on the pool's threads.
    fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        self.threads.spawn(work);
    }

    /// Computes an order on all threads, and hands over each piece as it is done, in any order.
    fn grind(&self, order: &Order<I>, done: &(impl Fn(Piece) + Sync)) {
        let pieces = self.threads() * PIECES_PER_CORE;
        let size = order.ids.len().div_ceil(pieces).clamp(1, MAX_PIECE);
        order.ids.par_chunks(size).enumerate().for_each(|(number, piece)| {
            self.grind_piece(order, (number * size) as u32, piece, done);
        });
    }

    fn grind_piece(&self, order: &Order<I>, mut from: u32, mut ids: &[I], done: &impl Fn(Piece)) {
        let hand = &self.hands[rayon::current_thread_index().unwrap_or(0)];
        let before = hand.take(order.number);
        while !ids.is_empty() && !order.is_off() {
            let piece = self.function.typed.grind_some(hand, order, from, ids);
            (from, ids) = (from + piece.count, &ids[piece.count as usize..]);
            done(piece);
        }
        hand.put_back(before);
    }
}

thread_local! {
    /// Whether the user's function runs on this thread.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    /// Where it panicked last.
    static PANICKED_AT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs the user's function; a panic becomes a rejection with its message and place. Inlined, as it is called for every
/// id: a call and a value with a destructor cost 6 % of the lightest function.
#[inline]
fn guarded<R>(compute: impl FnOnce() -> Outcome<R>) -> Outcome<R> {
    // A thread that waits inside the user's function may have been given another piece.
    let outer = GUARDED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(compute));
    GUARDED.set(outer);
    outcome.unwrap_or_else(|payload| Err(Failure::Reject(panicked(payload))))
}

#[cold]
fn panicked(payload: Box<dyn Any + Send>) -> String {
    let place = PANICKED_AT.take();
    let message = panic_message(payload.as_ref()).to_owned();
    // Dropping a payload can panic too.
    drop(catch_unwind(AssertUnwindSafe(|| drop(payload))));
    format!("panicked at {place}: {message}")
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Panics of the user's function are dead letters, not reports on stderr: one bad id in a thousand would drown the log.
fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if !GUARDED.try_with(Cell::get).unwrap_or(false) {
                return usual(info);
            }
            let place = info.location().map_or_else(String::new, ToString::to_string);
            // A thread that ends has no place for it, and nobody asks.
            let _ending = PANICKED_AT.try_with(|at| at.replace(place));
        }));
    });
}

#[cfg(test)]
mod tests {
    use millstream::Pipeline;
    use serde::ser::SerializeStruct;
    use serde::{Deserialize, Serialize};

    use super::*;

    struct Picky;

    #[derive(Serialize, Deserialize)]
    struct Doubled {
        doubled: u64,
    }

    impl Pipeline for Picky {
        const NAME: &'static str = "picky";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("doubled", "UInt64")];
        type Id = u64;
        type Row = Doubled;

        fn compute(&self, id: &u64) -> Outcome<Doubled> {
            match id % 1000 {
                1 => panic!("odd one: {id}"),
                2 => Err(Failure::reject("never")),
                3 => Err(Failure::retry("not yet")),
                _ => Ok(Doubled { doubled: id * 2 }),
            }
        }
    }

    /// Rows that take their time to be written.
    struct Slow;

    #[derive(Deserialize)]
    struct Late {
        number: u64,
    }

    impl Serialize for Late {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let mut row = serializer.serialize_struct("Late", 1)?;
            row.serialize_field("number", &self.number)?;
            row.end()
        }
    }

    impl Pipeline for Slow {
        const NAME: &'static str = "slow";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("number", "UInt64")];
        type Id = u64;
        type Row = Late;

        fn compute(&self, id: &u64) -> Outcome<Late> {
            Ok(Late { number: *id })
        }
    }

    #[tokio::test]
    async fn writing_rows_counts_as_encoding() {
        let pool = pool_of(Slow);
        let Computed { rows, spent, .. } = pool.compute((0..100).collect(), true).await;
        // A thread sleeps no shorter than it was told to, and the rows that are not timed count like those that are.
        assert_eq!(rows.count(), 100);
        assert!(spent.encoding >= std::time::Duration::from_millis(200), "{spent:?}");
    }

    fn pool_of<P: Pipeline>(pipeline: P) -> Pool<P::Id> {
        let function = Function::of(Arc::new(pipeline)).expect("sound");
        Pool::start(function, 2).expect("two threads")
    }

    #[tokio::test]
    async fn every_id_yields_one_row() {
        let ids: Vec<u64> = (0..5000).collect();
        let computed = pool_of(Picky).compute(ids.clone(), true).await;
        assert_eq!((computed.ids, computed.rows.count()), (ids, 5000));
        let dead: Vec<u32> = computed.rows.dead.iter().map(|(at, _)| *at).collect();
        let wanted: Vec<u32> = (0..5000).filter(|id| (1..=3).contains(&(id % 1000))).collect();
        assert_eq!(dead, wanted);
        let [panicked, rejected, gave_up] = [3, 4, 5].map(|dead| computed.rows.dead[dead].1.as_str());
        assert!(panicked.starts_with("panicked at ") && panicked.ends_with(": odd one: 1001"), "{panicked}");
        assert_eq!((rejected, gave_up), ("never", "gave up after every attempt: not yet"));
    }

    /// Rows of which some panic while they are written.
    struct Shaky;

    #[derive(Deserialize)]
    struct Loose {
        number: u64,
    }

    impl Serialize for Loose {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut row = serializer.serialize_struct("Loose", 1)?;
            row.serialize_field("number", &self.number)?;
            assert!(self.number % 10 != 7, "a row that ends in 7");
            row.end()
        }
    }

    impl Pipeline for Shaky {
        const NAME: &'static str = "shaky";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("number", "UInt64")];
        type Id = u64;
        type Row = Loose;

        fn compute(&self, id: &u64) -> Outcome<Loose> {
            Ok(Loose { number: *id })
        }
    }

    #[tokio::test]
    async fn a_panic_while_a_row_is_written_costs_one_id() {
        let computed = pool_of(Shaky).compute((0..100).collect(), true).await;
        assert_eq!((computed.ids.len(), computed.rows.count(), computed.rows.dead.len()), (100, 100, 10));
        let (at, reason) = &computed.rows.dead[0];
        assert!(*at == 7 && reason.ends_with(": a row that ends in 7"), "{at}: {reason}");
    }

    #[tokio::test]
    async fn ids_that_ask_for_another_attempt_have_no_row_yet() {
        let computed = pool_of(Picky).compute((0..10).collect(), false).await;
        assert_eq!(computed.again, [(3, "not yet".to_owned())]);
        assert_eq!(computed.ids, [0, 1, 2, 4, 5, 6, 7, 8, 9]);
        assert_eq!(computed.rows.count(), 9);
    }

    /// A thread that waits inside the user's function may be given another piece.
    #[test]
    fn an_id_within_an_id_leaves_the_outer_one_guarded() {
        install_panic_hook();
        let outcome = guarded::<()>(|| {
            let inner = guarded::<()>(|| panic!("inner"));
            assert!(matches!(inner, Err(Failure::Reject(why)) if why.ends_with(": inner")));
            panic!("outer")
        });
        let Err(Failure::Reject(why)) = outcome else { panic!("{outcome:?}") };
        assert!(why.starts_with("panicked at crates/") && why.ends_with(": outer"), "{why}");
    }

    #[tokio::test]
    async fn panics_do_not_shrink_the_pool() {
        let pool = pool_of(Picky);
        for _ in 0..100 {
            assert_eq!(pool.compute(vec![1], false).await.rows.dead.len(), 1);
        }
        assert_eq!(pool.compute(vec![4, 5, 6, 7], false).await.rows.dead.len(), 0);
    }
}
