//! The rayon pool: the only code that runs on it, and the only bridge to it.
//!
//! A batch is split over the cores in short pieces; each id is computed behind a panic guard; each piece is encoded and
//! compressed where it was computed. What comes back is bytes that ClickHouse takes as they are.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Arc, Once};

use millstream::frame::FrameWriter;
use millstream::names::RunName;
use millstream::rowbinary::{write_row, write_string};
use millstream::schema::ColumnType;
use millstream::{Failure, Id, Outcome, Pipeline};
use rayon::ThreadPool;
use rayon::prelude::*;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::tables::{STATUS_DEAD, STATUS_OK};

/// A batch is cut into this many pieces for each core at least, so that the last ones to finish are short.
const PIECES_PER_CORE: usize = 16;
/// A piece holds no more ids than this, whatever the batch: its encoded rows stay in the cache.
const MAX_PIECE: usize = 1024;
/// A dead letter's reason is cut to this many bytes.
const MAX_REASON: usize = 4096;
/// A row has at most this many bytes before compression: what no server takes in one message, and what a frame holds
/// with room to spare.
const MAX_ROW: usize = 64 << 20;

/// A core-sized pool with the pipeline that it computes. Clones are the same.
pub struct Pool<P: Pipeline> {
    threads: Arc<ThreadPool>,
    pipeline: Arc<P>,
    /// What a dead letter holds in the pipeline's own columns.
    blank: Arc<[u8]>,
}

impl<P: Pipeline> Clone for Pool<P> {
    fn clone(&self) -> Self {
        Self { threads: self.threads.clone(), pipeline: self.pipeline.clone(), blank: self.blank.clone() }
    }
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
}

impl<I> Default for Computed<I> {
    fn default() -> Self {
        Self { frames: Vec::new(), lengths: Vec::new(), raw_bytes: 0, dead: 0, again: Vec::new() }
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
    }
}

/// Cores that this process may use: its affinity and its cgroup's quota are honoured.
pub fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl<P: Pipeline> Pool<P> {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// [`Error::Pool`] when the system gives none.
    pub fn start(pipeline: Arc<P>, columns: &[ColumnType], threads: usize) -> Result<Self, Error> {
        install_panic_hook();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|source| Error::Pool { threads, source })?;
        let mut blank = Vec::new();
        columns.iter().for_each(|column| column.write_blank(&mut blank));
        Ok(Self { threads: Arc::new(pool), pipeline, blank: blank.into() })
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Computes and encodes `ids` on the pool. With `last`, ids that would be tried again become dead letters.
    ///
    /// Not cancellable: once on the pool, ids are computed. Dropping the future only forgets the result.
    pub async fn compute(&self, key: BatchKey, ids: Vec<P::Id>, last: bool) -> Computed<P::Id> {
        let (sender, receiver) = oneshot::channel();
        let this = self.clone();
        self.threads.spawn(move || {
            // The receiver is gone when work was given up: the result is then of no use to anybody.
            let _forgotten = sender.send(this.compute_here(&key, &ids, last));
        });
        receiver.await.expect("pieces catch panics, so a result is always sent")
    }

    fn compute_here(&self, key: &BatchKey, ids: &[P::Id], last: bool) -> Computed<P::Id> {
        let prefix = row_prefix(key);
        let pieces = self.threads() * PIECES_PER_CORE;
        let piece = ids.len().div_ceil(pieces).clamp(1, MAX_PIECE);
        let parts: Vec<Computed<P::Id>> =
            ids.par_chunks(piece).map(|piece| self.compute_piece(&prefix, piece, last)).collect();
        parts.into_iter().fold(Computed::default(), |mut whole, part| {
            whole.append(part);
            whole
        })
    }

    fn compute_piece(&self, prefix: &[u8], ids: &[P::Id], last: bool) -> Computed<P::Id> {
        let mut rows = FrameWriter::default();
        rows.raw.reserve(ids.len() * (prefix.len() + 64));
        let mut part = Computed::default();
        for id in ids {
            let outcome = match guarded(|| self.pipeline.compute(id)) {
                Err(Failure::Retry(reason)) if !last => {
                    part.again.push((id.clone(), reason));
                    continue;
                }
                outcome => outcome,
            };
            let begin = rows.raw.len();
            part.dead += u32::from(!self.write(prefix, id, outcome, &mut rows.raw));
            part.lengths.push((rows.raw.len() - begin) as u32);
            rows.end_row();
        }
        (part.frames, part.raw_bytes) = rows.finish();
        part
    }

    /// Appends the id's one row; whether it is an ok one: **every-id-yields-one-row**.
    fn write(&self, prefix: &[u8], id: &P::Id, outcome: Outcome<P::Row>, raw: &mut Vec<u8>) -> bool {
        raw.extend_from_slice(prefix);
        id.write_rowbinary(raw);
        let reason = match outcome {
            Ok(row) => {
                let body = raw.len();
                raw.push(STATUS_OK);
                write_string(raw, "");
                let reason = match write_row(&row, raw) {
                    Ok(()) if raw.len() - body <= MAX_ROW => return true,
                    Ok(()) => {
                        format!(
                            "row of {} bytes is larger than a row may be ({MAX_ROW} bytes)",
                            raw.len() - body
                        )
                    }
                    Err(fault) => format!("row cannot be encoded: {fault}"),
                };
                raw.truncate(body);
                reason
            }
            Err(Failure::Reject(reason)) => reason,
            Err(Failure::Retry(reason)) => format!("gave up after every attempt: {reason}"),
        };
        write_dead(&reason, &self.blank, raw);
        false
    }

    /// Does what takes a while on the pool, between the pieces of batches.
    pub(crate) async fn run<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let (sender, receiver) = oneshot::channel();
        self.threads.spawn(move || {
            let _forgotten = sender.send(work());
        });
        receiver.await.expect("work of our own does not panic")
    }

    /// What a dead letter holds in the pipeline's own columns.
    pub(crate) fn blank(&self) -> Arc<[u8]> {
        self.blank.clone()
    }
}

/// Appends all that follows the id in the row of a dead letter.
pub(crate) fn write_dead(reason: &str, blank: &[u8], raw: &mut Vec<u8>) {
    raw.push(STATUS_DEAD);
    write_string(raw, shortened(reason));
    raw.extend_from_slice(blank);
}

/// The columns before `id`, alike in all rows of a batch.
pub(crate) fn row_prefix(key: &BatchKey) -> Vec<u8> {
    let mut prefix = Vec::new();
    write_string(&mut prefix, key.run.as_str());
    for number in [key.pass, key.batch, key.ids] {
        prefix.extend_from_slice(&number.to_le_bytes());
    }
    prefix
}

fn shortened(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(MAX_REASON)]
}

thread_local! {
    /// Some while the user's function runs on this thread: where it panicked, if it did.
    static PANICKED_AT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs the user's function; a panic becomes a rejection with its message and place.
fn guarded<R>(compute: impl FnOnce() -> Outcome<R>) -> Outcome<R> {
    PANICKED_AT.set(Some(String::new()));
    let outcome = catch_unwind(AssertUnwindSafe(compute));
    let place = PANICKED_AT.take().unwrap_or_default();
    outcome.unwrap_or_else(|payload| {
        let message = panic_message(payload.as_ref()).to_owned();
        // Dropping a payload can panic too.
        drop(catch_unwind(AssertUnwindSafe(|| drop(payload))));
        Err(Failure::Reject(format!("panicked at {place}: {message}")))
    })
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
            let guarded = PANICKED_AT.try_with(|place| {
                place.try_borrow_mut().is_ok_and(|mut place| match place.as_mut() {
                    Some(place) => {
                        *place = info.location().map_or_else(String::new, ToString::to_string);
                        true
                    }
                    None => false,
                })
            });
            if !guarded.unwrap_or(false) {
                usual(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use millstream::frame;
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

    fn pool() -> Pool<Picky> {
        let columns = millstream::check::<Picky>().expect("sound");
        Pool::start(Arc::new(Picky), &columns, 2).expect("two threads")
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
        let computed = pool().compute(key(ids.len()), ids.clone(), true).await;
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
        let computed = pool().compute(key(10), (0..10).collect(), false).await;
        assert_eq!(computed.again, [(3, "not yet".to_owned())]);
        assert_eq!(rows(&computed).len(), 9);
    }

    #[tokio::test]
    async fn panics_do_not_shrink_the_pool() {
        let pool = pool();
        for _ in 0..100 {
            assert_eq!(pool.compute(key(1), vec![1], false).await.dead, 1);
        }
        assert_eq!(pool.compute(key(4), vec![4, 5, 6, 7], false).await.dead, 0);
    }

    #[test]
    fn reasons_are_cut_between_characters() {
        assert_eq!(shortened(&"ü".repeat(4000)).len(), MAX_REASON);
    }
}
