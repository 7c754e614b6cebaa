//! Computing ids: on a rayon pool, in a process of its own, or one id at a time in child processes.
//!
//! A batch is split over the cores in short pieces; each id is computed behind a panic guard; each piece is encoded and
//! compressed where it was computed. What comes back is bytes that ClickHouse takes as they are.
//!
//! A thread cannot be killed, so the pool stands in a child process (`apart`): an id that crashes it or overruns its
//! limits costs that process, not the worker. What was in it is then computed by children that have one id at a time
//! (`alone`), and only the id that kills its child, or has to be killed, becomes a dead letter. `child` is the other end
//! of both pipes.

mod alone;
mod apart;
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
use millstream::{Failure, Id, Outcome};
use rayon::ThreadPool;
use rayon::prelude::*;
use tokio::sync::oneshot;

use crate::error::Error;
use row::{RowWriter, Rows};
use watch::Hand;

pub use child::child_main;
pub use cores::{Cores, Place};
pub use function::{AnyFunction, Function};
pub(crate) use row::{row_prefix, write_dead};

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
    /// Rows as compressed frames, in the order of the ids. A row lies in one of them.
    pub frames: Vec<u8>,
    /// Size of every row before compression, in the same order.
    pub lengths: Vec<u32>,
    /// Size of the rows before compression.
    pub raw_bytes: u64,
    /// Rows among them that are dead letters.
    pub dead: u32,
    /// Ids that asked to be tried again, with their reasons. They have no row yet.
    pub again: Vec<(I, String)>,
    /// What they took of the cores.
    pub spent: Spent,
}

/// Time of cores, summed over them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// In the user's function.
    pub computing: Duration,
    /// In writing and compressing rows.
    pub encoding: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, more: Self) {
        self.computing += more.computing;
        self.encoding += more.encoding;
    }
}

impl<I> Default for Computed<I> {
    fn default() -> Self {
        let (frames, lengths, again) = (Vec::new(), Vec::new(), Vec::new());
        Self { frames, lengths, raw_bytes: 0, dead: 0, again, spent: Spent::default() }
    }
}

impl<I> Computed<I> {
    /// Appends another part of the same batch.
    pub fn append(&mut self, mut part: Self) {
        self.frames.append(&mut part.frames);
        self.lengths.append(&mut part.lengths);
        self.raw_bytes += part.raw_bytes;
        self.dead += part.dead;
        self.again.append(&mut part.again);
        self.spent += part.spent;
    }

    /// Takes the rows that were written.
    fn take_rows(&mut self, rows: Rows) {
        let (mut frames, raw_bytes) = rows.frames.finish();
        self.frames.append(&mut frames);
        self.raw_bytes += raw_bytes;
        self.lengths.extend(rows.lengths);
        self.dead += rows.dead;
    }
}

/// Neighbouring ids that were computed together.
#[derive(Debug)]
struct Piece<I> {
    /// Place of the first among the ids that were to be computed.
    from: u32,
    /// Ids that it covers, whether they have a row or not.
    count: u32,
    computed: Computed<I>,
    /// Places of the ids in `computed.again`.
    again_at: Vec<u32>,
}

/// Ids to be computed together.
struct Order<I> {
    /// Tells it from others in the same pool.
    number: u64,
    key: BatchKey,
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
    pub async fn compute(&self, key: BatchKey, ids: Vec<I>, last: bool) -> Computed<I> {
        let (sender, receiver) = oneshot::channel();
        let (this, off) = (self.clone(), Off::default());
        let switch = off.0.clone();
        self.threads.spawn(move || {
            let pieces = Mutex::new(Vec::new());
            let order = Order { number: 0, key, ids, last, off: switch };
            this.grind(&order, &|piece| pieces.lock().unwrap_or_else(PoisonError::into_inner).push(piece));
            // The receiver is gone when work was given up: the result is then of no use to anybody.
            let _forgotten = sender.send(whole(pieces.into_inner().unwrap_or_else(PoisonError::into_inner)));
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
    fn grind(&self, order: &Order<I>, done: &(impl Fn(Piece<I>) + Sync)) {
        let rows = RowWriter::new(&order.key, &self.function.blank);
        let pieces = self.threads() * PIECES_PER_CORE;
        let size = order.ids.len().div_ceil(pieces).clamp(1, MAX_PIECE);
        order.ids.par_chunks(size).enumerate().for_each(|(number, piece)| {
            self.grind_piece(order, &rows, (number * size) as u32, piece, done);
        });
    }

    fn grind_piece(
        &self,
        order: &Order<I>,
        rows: &RowWriter<'_>,
        mut from: u32,
        mut ids: &[I],
        done: &impl Fn(Piece<I>),
    ) {
        let hand = &self.hands[rayon::current_thread_index().unwrap_or(0)];
        let before = hand.take(order.number);
        while !ids.is_empty() && !order.is_off() {
            let piece = self.function.typed.grind_some(hand, order, rows, from, ids);
            (from, ids) = (from + piece.count, &ids[piece.count as usize..]);
            done(piece);
        }
        hand.put_back(before);
    }
}

/// All pieces as one, in the order of their ids.
fn whole<I>(mut pieces: Vec<Piece<I>>) -> Computed<I> {
    pieces.sort_unstable_by_key(|piece| piece.from);
    pieces.into_iter().fold(Computed::default(), |mut whole, piece| {
        whole.append(piece.computed);
        whole
    })
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
    use millstream::{Pipeline, frame};
    use serde::ser::SerializeStruct;
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::tables::{STATUS_DEAD, STATUS_OK};

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
        let Computed { lengths, spent, .. } = pool.compute(key(100), (0..100).collect(), true).await;
        // A thread sleeps no shorter than it was told to, and the rows that are not timed count like those that are.
        assert_eq!(lengths.len(), 100);
        assert!(spent.encoding >= std::time::Duration::from_millis(200), "{spent:?}");
    }

    fn pool_of<P: Pipeline>(pipeline: P) -> Pool<P::Id> {
        let function = Function::of(Arc::new(pipeline)).expect("sound");
        Pool::start(function, 2).expect("two threads")
    }

    fn key(ids: usize) -> BatchKey {
        BatchKey { run: "r".parse().expect("legal"), pass: 1, batch: 7, ids: ids as u32 }
    }

    /// `(id, status, error)` of every row.
    fn rows(computed: &Computed<u64>) -> Vec<(u64, u8, String)> {
        let mut raw = Vec::new();
        let mut frames = &computed.frames[..];
        while let Some(length) = frame::frame_len(frames).expect("frames") {
            frame::decompress(&frames[..length], &mut raw).expect("sound frame");
            frames = &frames[length..];
        }
        assert_eq!(raw.len() as u64, computed.raw_bytes);
        let (mut rows, mut rest) = (Vec::new(), &raw[..]);
        while !rest.is_empty() {
            assert_eq!(&rest[..6], [1, b'r', 1, 0, 0, 0]);
            let id = u64::from_le_bytes(rest[14..22].try_into().expect("eight"));
            let (status, length) = (rest[22], usize::from(rest[23]));
            let error = String::from_utf8(rest[24..24 + length].to_vec()).expect("text");
            rows.push((id, status, error));
            rest = &rest[24 + length + 8..];
        }
        rows
    }

    #[tokio::test]
    async fn every_id_yields_one_row() {
        let ids: Vec<u64> = (0..5000).collect();
        let computed = pool_of(Picky).compute(key(ids.len()), ids.clone(), true).await;
        let rows = rows(&computed);
        assert_eq!(rows.iter().map(|row| row.0).collect::<Vec<_>>(), ids);
        assert_eq!(computed.dead, 15);
        assert_eq!((rows[0].1, rows[1].1, rows[2].1), (STATUS_OK, STATUS_DEAD, STATUS_DEAD));
        assert!(rows[1001].2.starts_with("panicked at "), "{}", rows[1001].2);
        assert!(rows[1001].2.ends_with(": odd one: 1001"), "{}", rows[1001].2);
        assert_eq!(rows[2].2, "never");
        assert_eq!(rows[3].2, "gave up after every attempt: not yet");
    }

    #[tokio::test]
    async fn ids_that_ask_for_another_attempt_have_no_row_yet() {
        let computed = pool_of(Picky).compute(key(10), (0..10).collect(), false).await;
        assert_eq!(computed.again, [(3, "not yet".to_owned())]);
        assert_eq!(rows(&computed).len(), 9);
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
            assert_eq!(pool.compute(key(1), vec![1], false).await.dead, 1);
        }
        assert_eq!(pool.compute(key(4), vec![4, 5, 6, 7], false).await.dead, 0);
    }
}
