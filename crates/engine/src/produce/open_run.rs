//! Open runs: ids are published as they arrive, in batches that are full or have waited long enough; the run is closed
//! when its input ends.
//!
//! Batches get consecutive numbers without gaps: a producer tries a number only once the batch before it is stored. If
//! several producers try one number, the first to store it wins; the others count that batch with theirs and take the
//! next number. So each producer knows the run's totals at any time, and the one whose input ends closes the run for
//! all.
//!
//! The end marker is stored like a batch, under the first free number, so the stream decides which ids came in time: a
//! producer that finds the marker publishes no more. Then the run's record gets the totals. Any producer that finds the
//! marker without them may write them.

mod append;

use std::pin::Pin;
use std::time::Duration;

use millstream::names::RunName;
use millstream::{Id, MAX_BATCH_IDS};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::fleet::times::Phases;
use crate::model::moment::now_ms;
use crate::model::record::{PassRecord, Published, RunRecord, SOURCE};
use crate::nats::bucket::{Change, Records};
use crate::produce::batch_size::Pace;
use crate::produce::input::{Cutter, Line, Lines, Sample};
use crate::produce::publish::{cancelled, is_cancelled, keep, open_pass, same_ids, tell};
use crate::produce::sample::max_ids_bytes;
use crate::session::Session;
use crate::stop::Stop;
use crate::telemetry::metrics::Metrics;

/// Most ids of a batch while the first ids are timed.
const FIRST_SIZE: u32 = 256;
/// Bad lines that are logged.
const NAMED: usize = 10;

/// The feed to follow.
#[derive(Debug, Clone)]
pub struct Feed {
    /// The run's name.
    pub run: RunName,
    /// Most ids of a batch; `None` chooses by the cost of the first ids, and then by the speed of workers.
    pub batch_ids: Option<u32>,
    /// How long an id may wait for others.
    pub linger: Duration,
    /// Priority of the run's pass; an existing run keeps its own.
    pub priority: i8,
    /// The pass is paused beyond so many dead letters.
    pub max_dead: Option<u64>,
    /// Rate limit: most ids that the whole fleet begins in a second.
    pub rate: Option<u32>,
    /// The metrics that count published batches.
    pub metrics: Metrics,
}

/// In which state a producer leaves an open run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The run is closed.
    Closed(Published),
    /// The run is open, with the totals so far: the user stopped this producer, or its input failed.
    Open(Published),
    /// Another producer closed the run meanwhile: these ids, and later ones, are not in it.
    ClosedElsewhere {
        /// Totals of the run.
        published: Published,
        /// Ids that were read and are not in the run.
        not_taken: u64,
    },
}

/// The result of following a feed.
#[derive(Debug)]
pub struct Followed {
    /// The state of the run.
    pub end: End,
    /// Batches that this process stored.
    pub written: u64,
    /// Lines without an id.
    pub bad: u64,
    /// The first bad lines.
    pub first_bad: Vec<(u64, String)>,
    /// The error that ended the input early.
    pub broken: Option<std::io::Error>,
}

struct Producer<'a, I> {
    session: &'a Session,
    feed: &'a Feed,
    stop: &'a Stop,
    phases: &'a Phases<2>,
    cutter: Cutter<I>,
    /// When the oldest held id arrived.
    held_since: Option<Instant>,
    /// Totals of all batches of the run, from all producers; `batches` is also the next number.
    all: Published,
    /// The largest batch size that the pass's record announces.
    admitted: u32,
    pace: Pace,
    written: u64,
    /// Whether the stream holds the end marker after these batches.
    ended: bool,
    /// Ids that came after the end marker.
    not_taken: u64,
    bad: u64,
    first_bad: Vec<(u64, String)>,
}

/// Publishes ids as they arrive until the input ends, then closes the run; begins the run, or continues an open one. If
/// the user chose no batch size, the result of `time` on the first ids sets it; publishing does not wait for that.
///
/// # Errors
/// [`Error::OtherIds`] when the name belongs to a run of another kind, [`Error::RunClosed`] when there are ids for a
/// closed run, [`Error::NoIds`] when no id ever came; errors of NATS.
pub async fn follow<I: Id, F: Future<Output = Option<u32>>>(
    session: &Session,
    feed: &Feed,
    mut lines: mpsc::Receiver<Lines<I>>,
    time: impl FnOnce(Sample<I>) -> F,
    stop: &Stop,
) -> Result<Followed, Error> {
    let Session { broker, records, store } = session;
    let record = open(records, store, feed).await?;
    if is_cancelled(records, &feed.run).await? {
        return Err(Error::Cancelled { run: feed.run.to_string() });
    }
    if let Some(published) = record.published {
        return nothing_more(feed, published, &mut lines).await;
    }
    let begun = PassRecord {
        priority: feed.priority,
        rate: feed.rate,
        max_dead: feed.max_dead,
        ..PassRecord::begin(&feed.run.pass(1), 1, records.server_ms().await?)
    };
    open_pass(broker, records, &begun).await?;
    let phases = Phases::new();
    let reporting = stop.child();
    let producer = Producer::new(session, feed, stop, &phases, &record);
    let producing = async {
        let produced = tokio::select! {
            produced = producer.produce(&mut lines, time) => produced,
            () = cancelled(records, &feed.run) => Err(Error::Cancelled { run: feed.run.to_string() }),
        };
        reporting.stop_taking();
        produced
    };
    let (produced, ()) = tokio::join!(producing, tell(records, &feed.run, &phases, &reporting));
    if matches!(produced, Err(Error::Cancelled { .. })) {
        broker.purge_ids(broker.names().run_ids(&feed.run)).await?;
    }
    produced
}

/// Why the producer takes no more lines.
enum Rest {
    /// The input has ended.
    Ended,
    /// The user stopped this producer, or another producer closed the run.
    Left,
    /// The input cannot be read.
    Broken(std::io::Error),
}

/// Creates the record, or finds one of an open run.
async fn open(records: &Records, store: &Store, feed: &Feed) -> Result<RunRecord, Error> {
    let fresh = RunRecord {
        run: feed.run.clone(),
        source: SOURCE.to_owned(),
        fingerprint: String::new(),
        batch_ids: feed.batch_ids.unwrap_or(FIRST_SIZE).clamp(1, MAX_BATCH_IDS),
        expected_ids: None,
        may_repeat: true,
        created_ms: now_ms(),
        published: None,
        timing: None,
        so_far: None,
    };
    if records.run(&feed.run).await?.is_none() {
        // The run's numbers began at 0 in a stream that is lost, and their rows may exist.
        if let Some(kept) = store.run_record(&feed.run).await? {
            same_ids(&kept, &fresh, None)?;
            return Err(Error::ForgottenFeed { run: kept.run.to_string() });
        }
        if records.create_run(&fresh).await? == Change::Made {
            keep(store, &fresh).await;
            return Ok(fresh);
        }
    }
    let existing = records.known_run(&feed.run).await?.record;
    same_ids(&existing, &fresh, None)?;
    keep(store, &existing).await;
    if existing.published.is_none() {
        tracing::info!(run = %feed.run, "the run exists: new ids are added to it");
    }
    Ok(existing)
}

/// A closed run accepts an input without ids, as if that closed it again, but no more ids.
async fn nothing_more<I>(
    feed: &Feed,
    published: Published,
    lines: &mut mpsc::Receiver<Lines<I>>,
) -> Result<Followed, Error> {
    while let Some(Ok(together)) = lines.recv().await {
        if !together.is_empty() {
            return Err(Error::RunClosed { run: feed.run.to_string(), ids: published.ids });
        }
    }
    Ok(Followed { end: End::Closed(published), written: 0, bad: 0, first_bad: Vec::new(), broken: None })
}

impl<'a, I: Id> Producer<'a, I> {
    fn new(
        session: &'a Session,
        feed: &'a Feed,
        stop: &'a Stop,
        phases: &'a Phases<2>,
        record: &RunRecord,
    ) -> Self {
        let batch_ids = feed.batch_ids.unwrap_or(record.batch_ids);
        let nothing = Published { batches: 0, ids: 0, digest: 0, dropped_repeats: 0, at_ms: 0 };
        Self {
            session,
            feed,
            stop,
            phases,
            cutter: Cutter::new(batch_ids, max_ids_bytes(session.broker.max_payload())),
            held_since: None,
            all: record.so_far.clone().unwrap_or(nothing),
            admitted: 0,
            pace: Pace::new(batch_ids),
            written: 0,
            ended: false,
            not_taken: 0,
            bad: 0,
            first_bad: Vec::new(),
        }
    }

    /// Publishes waiting and arriving ids, and closes the run when the input ends.
    async fn produce<F: Future<Output = Option<u32>>>(
        mut self,
        lines: &mut mpsc::Receiver<Lines<I>>,
        time: impl FnOnce(Sample<I>) -> F,
    ) -> Result<Followed, Error> {
        self.catch_up().await?;
        if self.ended {
            let published = self.close().await?;
            return nothing_more(self.feed, published, lines).await;
        }
        let rest = self.take_all(lines, time).await?;
        let end = self.finish(matches!(rest, Rest::Ended)).await?;
        let Self { written, bad, first_bad, .. } = self;
        let broken = if let Rest::Broken(error) = rest { Some(error) } else { None };
        Ok(Followed { end, written, bad, first_bad, broken })
    }

    /// Takes lines until the input ends, the user stops this producer, or another producer closes the run; publishes
    /// held ids before it returns.
    async fn take_all<F: Future<Output = Option<u32>>>(
        &mut self,
        lines: &mut mpsc::Receiver<Lines<I>>,
        time: impl FnOnce(Sample<I>) -> F,
    ) -> Result<Rest, Error> {
        let mut rest = Rest::Left;
        let mut time = self.feed.batch_ids.is_none().then_some(time);
        let mut timing: Option<Pin<Box<F>>> = None;
        while self.not_taken == 0 {
            let due = self.held_since.map(|since| since + self.feed.linger);
            let lingered = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Ids that have waited long enough go out even while more arrive.
                biased;
                () = self.stop.no_more_taking() => break,
                () = lingered => self.flush().await?,
                size = async { timing.as_mut().expect("ids are timed").await }, if timing.is_some() => {
                    timing = None;
                    size.into_iter().for_each(|size| self.resize(size));
                }
                together = lines.recv() => match together {
                    Some(Ok(together)) => {
                        if let Some(sample) = sample_of(&together)
                            && let Some(time) = time.take()
                        {
                            timing = Some(Box::pin(time(sample)));
                        }
                        self.take(together).await?;
                    }
                    Some(Err(error)) => {
                        rest = Rest::Broken(error);
                        break;
                    }
                    None => {
                        rest = Rest::Ended;
                        break;
                    }
                },
            }
        }
        self.flush().await?;
        Ok(rest)
    }

    async fn take(&mut self, together: Vec<Line<I>>) -> Result<(), Error> {
        for line in together {
            match line {
                Line::Bad { number, fault } => self.refuse(number, fault),
                Line::Id(id) => {
                    let full = self.cutter.push(id);
                    if let Some(cut) = full {
                        self.append(cut).await?;
                    }
                    if self.held_since.is_none() && !self.cutter.is_empty() {
                        self.held_since = Some(Instant::now());
                    }
                }
            }
        }
        Ok(())
    }

    fn resize(&mut self, size: u32) {
        self.cutter.resize(size);
        self.pace.resize(size);
    }

    fn refuse(&mut self, number: u64, fault: String) {
        self.bad += 1;
        self.feed.metrics.bad_line();
        if self.first_bad.len() < NAMED {
            tracing::warn!(run = %self.feed.run, line = number, fault, "line skipped: it holds no id");
            self.first_bad.push((number, fault));
        }
    }

    /// Publishes held ids.
    async fn flush(&mut self) -> Result<(), Error> {
        match self.cutter.cut() {
            Some(cut) => self.append(cut).await,
            None => Ok(()),
        }
    }

    /// Closes the run, or reports it as open.
    async fn finish(&mut self, ended: bool) -> Result<End, Error> {
        if self.not_taken > 0 {
            let published = self.close().await?;
            let not_taken = self.not_taken;
            return Ok(End::ClosedElsewhere { published, not_taken });
        }
        if ended {
            Ok(End::Closed(self.close().await?))
        } else {
            self.note().await?;
            Ok(End::Open(self.all.clone()))
        }
    }
}

/// A sample of the ids among some lines.
fn sample_of<I: Id>(together: &[Line<I>]) -> Option<Sample<I>> {
    let sample = Sample::of(together.iter().filter_map(|line| match line {
        Line::Id(id) => Some(id.clone()),
        Line::Bad { .. } => None,
    }));
    (!sample.is_empty()).then_some(sample)
}
