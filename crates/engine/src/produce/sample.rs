//! How many ids a batch should have, found by timing the function on a sample of the run's ids before any is published.
//!
//! The sample is computed where workers compute, in processes of their own, so an id that crashes or never ends costs
//! some of the time that is spent here, and nothing else. What is measured is ids done in a stretch of time by busy
//! cores, not the time of each: ids that never end, and the few that cost more than all others, count for what they
//! cost.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::names::PassId;
use millstream::{Id, MAX_BATCH_IDS};
use serde::Serialize;
use tokio::time::Instant;

use crate::compute::{BatchKey, Computed, Cores, Function, block, usable_cores};
use crate::error::{Error, full_cause};
use crate::fleet::times::WorkLoad;
use crate::model::record::Timing;
use crate::model::rows::MAX_INSERT_BYTES;
use crate::produce::input::Sample;
use crate::stop::Stop;
use crate::telemetry::metrics::Metrics;
use crate::work::WorkPlan;

/// How long one host should work on a batch: long against what a batch costs beside its ids, short against a run.
pub const TARGET: Duration = Duration::from_secs(2);
/// Batches that a run has at least, ids permitting: what a fleet can share.
const SHARED: u64 = 64;
/// The same where nothing is known of the ids, and the most ids of a batch then.
const SHARED_BLINDLY: u64 = 256;
const BLIND_IDS: u64 = 10_000;

/// How long ids are timed, from the first that is done, unless less is enough.
const LONGEST: Duration = Duration::from_secs(1);
/// Enough with [`MANY`] ids.
const USUAL: Duration = Duration::from_millis(500);
const MANY: u64 = 200;
/// Enough where the time that ids take would allow many times the ids that something else does.
const GLANCE: Duration = Duration::from_millis(50);
const BY_FAR: u64 = 4;
/// Below this many ids, the wait for the first is part of the measure.
const FEW: u64 = 16;
/// How long the first id is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the first ids of the process are waited for, before anything is timed: they may load what all others need.
const WARM_UP: Duration = Duration::from_secs(30);
/// Time of one core that a piece of the sample should take.
const PIECE: Duration = Duration::from_millis(20);
/// Ids of such a piece at most, and how much larger than the one before it may be.
const PIECE_IDS: usize = 1 << 16;
const GROWTH: usize = 4;

/// What keeps a batch from having more ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// One host is to work no longer on it.
    Time,
    /// A batch holds no more ids.
    Ids,
    /// A message holds no more bytes of ids.
    IdBytes,
    /// A message holds no more rows.
    RowBytes,
    /// An insert takes no more rows.
    InsertBytes,
    /// The run would have too few batches to be shared.
    Sharing,
}

/// A size of batches, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// Ids a batch.
    pub batch_ids: u32,
    /// Cores of the host that it is meant for.
    pub threads: usize,
    /// What keeps it from being more.
    pub bound: Bound,
    /// What was measured; `None` where nothing had to be, or could be.
    pub timing: Option<Timing>,
    /// Why nothing could be measured.
    pub untimed: Option<String>,
}

/// A run's ids for which a size is chosen.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many there are.
    pub ids: u64,
    /// Cores of a host that works on them.
    pub threads: usize,
    /// The broker's `max_payload`.
    pub max_payload: usize,
}

impl Limits {
    /// The size for ids that cost this much.
    pub fn choose(&self, timing: &Timing) -> Choice {
        let host_nanos = TARGET.as_nanos() as u64 * self.threads as u64;
        let time = (host_nanos / timing.id_nanos.max(1), Bound::Time);
        let others = self.beside_time(timing);
        let (most, bound) = if others.0 < time.0 { others } else { time };
        let batch_ids = rounded_down(most.max(1)) as u32;
        Choice { batch_ids, threads: self.threads, bound, timing: Some(*timing), untimed: None }
    }

    /// The least of what bounds a batch, whatever its ids cost.
    fn beside_time(&self, timing: &Timing) -> (u64, Bound) {
        let holds = |bytes: u64, each: u64| bytes / each.max(1);
        let payload = self.max_payload as u64;
        let bounds = [
            (u64::from(MAX_BATCH_IDS), Bound::Ids),
            (holds(max_ids_bytes(self.max_payload) as u64, timing.id_bytes), Bound::IdBytes),
            // Half of it: rows are of different sizes, and those of a sample smaller than others perhaps.
            (holds(payload / 2, timing.row_bytes), Bound::RowBytes),
            (holds(MAX_INSERT_BYTES / 2, timing.raw_bytes), Bound::InsertBytes),
            (self.ids / SHARED, Bound::Sharing),
        ];
        bounds.into_iter().min_by_key(|(most, _)| *most).expect("there are five")
    }

    /// The size for ids of which nothing is known.
    fn blindly(&self, untimed: Option<String>) -> Choice {
        let batch_ids = blind_size(self.ids);
        Choice { batch_ids, threads: self.threads, bound: Bound::Sharing, timing: None, untimed }
    }
}

/// Ids a batch where nothing is known of what they cost: enough of them to cost nothing beside, and few enough that a short
/// run of heavy ones is shared.
pub(crate) fn blind_size(ids: u64) -> u32 {
    (ids / SHARED_BLINDLY).clamp(1, BLIND_IDS) as u32
}

/// Chooses the size of a run's batches by timing its ids. What cannot be timed gets a size nevertheless.
///
/// # Errors
/// [`Error::Stopped`].
pub async fn choose<I: Id>(
    function: &Function<I>,
    plan: &WorkPlan,
    sample: Sample<I>,
    limits: &Limits,
    stop: &Stop,
) -> Result<Choice, Error> {
    if limits.ids / SHARED <= 1 {
        return Ok(limits.blindly(None));
    }
    // No more than this host has: what runs beside each other on one core would be timed together.
    let threads = plan.threads.min(usable_cores());
    let load = Arc::new(WorkLoad::new(threads));
    // What a sample does is no work of this process: it is counted apart.
    let metrics = Metrics::default();
    let cores = Cores::start(function.clone(), threads, plan.place.clone(), plan.limits, metrics, load)?;
    let timed = tokio::select! {
        timed = Timer::new(&cores, threads, sample).time(limits) => timed,
        () = stop.no_more_taking() => return Err(Error::Stopped),
    };
    Ok(match timed {
        Ok(Some(timing)) => limits.choose(&timing),
        Ok(None) => limits.blindly(Some("every id of the sample became a dead letter".to_owned())),
        Err(error) => limits.blindly(Some(full_cause(&error))),
    })
}

/// Keeps cores busy with a sample, and counts.
struct Timer<'a, I: Id> {
    cores: &'a Cores<I>,
    threads: usize,
    sample: Sample<I>,
    begun: Instant,
    /// When the first ids were done.
    first: Option<Instant>,
    /// Since when pieces are not much larger than before, and how many ids had been done by then: what small pieces cost beside
    /// their ids is not the ids' cost.
    steady: (Instant, u64),
    ids: u64,
    dead: u64,
    id_bytes: u64,
    row_bytes: u64,
    raw_bytes: u64,
}

impl<'a, I: Id> Timer<'a, I> {
    fn new(cores: &'a Cores<I>, threads: usize, sample: Sample<I>) -> Self {
        let begun = Instant::now();
        Self {
            cores,
            threads,
            sample,
            begun,
            first: None,
            steady: (begun, 0),
            ids: 0,
            dead: 0,
            id_bytes: 0,
            row_bytes: 0,
            raw_bytes: 0,
        }
    }

    /// What an id costs; `None` when all of them became dead letters.
    async fn time(mut self, limits: &Limits) -> Result<Option<Timing>, Error> {
        // A pipeline may take its time to start; that is no id's cost.
        self.cores.ready().await?;
        self.warm_up().await?;
        self.begun = Instant::now();
        let cores = self.cores;
        let mut piece = 1;
        let mut largest = 1;
        let mut flights = FuturesUnordered::new();
        loop {
            while flights.len() < self.threads * 2 {
                flights.push(compute(cores, self.sample.take(piece)));
            }
            let until = self.first.map_or(self.begun + PATIENCE, |first| first + LONGEST);
            match tokio::time::timeout_at(until, flights.next()).await {
                Ok(Some(done)) => self.count(done?),
                _ => break,
            }
            if self.is_enough(limits) {
                break;
            }
            piece = self.next_piece(piece);
            if piece >= largest * 2 {
                (largest, self.steady) = (piece, (Instant::now(), self.ids));
            }
        }
        Ok((self.ids == 0 || self.dead < self.ids).then(|| self.timing()))
    }

    /// Has each core compute an id that is not timed. One that takes too long goes on beside the others.
    async fn warm_up(&mut self) -> Result<(), Error> {
        let first = compute(self.cores, self.sample.take(self.threads));
        match tokio::time::timeout(WARM_UP, first).await {
            Ok(computed) => computed.map(drop),
            Err(_) => Ok(()),
        }
    }

    fn count(&mut self, (ids, computed): (Vec<I>, Computed<I>)) {
        self.ids += ids.len() as u64;
        self.id_bytes += ids.iter().map(|id| id.wire_size() as u64).sum::<u64>();
        let (row_bytes, raw_bytes) = block::sizes(self.cores.schema(), &computed.ids, &computed.rows);
        self.dead += computed.rows.dead.len() as u64;
        self.row_bytes += row_bytes;
        self.raw_bytes += raw_bytes;
        if self.first.is_none() {
            (self.first, self.steady) = (Some(Instant::now()), (Instant::now(), self.ids));
        }
    }

    /// Ids that were done in how long.
    fn done(&self) -> (u64, Duration) {
        let (since, before) = self.steady;
        match self.ids - before {
            ids if ids >= FEW => (ids, since.elapsed()),
            _ => (self.ids, self.begun.elapsed()),
        }
    }

    fn is_enough(&self, limits: &Limits) -> bool {
        let (ids, time) = self.done();
        if ids < FEW || time < GLANCE {
            return false;
        }
        let timing = self.timing();
        let by_time = TARGET.as_nanos() as u64 * limits.threads as u64 / timing.id_nanos.max(1);
        time >= USUAL && ids >= MANY || by_time >= limits.beside_time(&timing).0.saturating_mul(BY_FAR)
    }

    fn next_piece(&self, piece: usize) -> usize {
        let ids = PIECE.as_nanos() as u64 / self.timing().id_nanos.max(1);
        (ids as usize).clamp(1, PIECE_IDS).min(piece * GROWTH)
    }

    fn timing(&self) -> Timing {
        let (ids, time) = self.done();
        // Every core has had an id in hand all the time; where none was done, each has cost that much at least.
        let id_nanos = match ids {
            0 => time.as_nanos() as u64,
            ids => time.as_nanos() as u64 * self.threads as u64 / ids,
        };
        let each = |bytes: u64| bytes.div_ceil(self.ids.max(1));
        let [id_bytes, row_bytes, raw_bytes] = [self.id_bytes, self.row_bytes, self.raw_bytes].map(each);
        Timing { ids: self.ids, id_nanos: id_nanos.max(1), id_bytes, row_bytes, raw_bytes }
    }
}

/// Computes some ids of a sample as a worker does.
pub(crate) async fn compute<I: Id>(cores: &Cores<I>, ids: Vec<I>) -> Result<(Vec<I>, Computed<I>), Error> {
    let run = "sample".parse().expect("a legal name");
    let key = BatchKey { pass: PassId { run, pass: 1 }, batch: 0, ids: ids.len() as u32 };
    // For the last time: nothing here waits before it tries an id again.
    let computed = cores.compute(&key, ids.clone(), true, false).await?;
    Ok((ids, computed))
}

/// The largest number with two digits and zeros that is no more than this one: a size that a person can read.
fn rounded_down(number: u64) -> u64 {
    let unit = 10u64.pow(number.ilog10().saturating_sub(1));
    number / unit * unit
}

/// Ids of one batch take no more than this in a message, whatever the server allows: workers hold several.
const MAX_BATCH_BYTES: usize = 512 << 10;

/// Bytes of ids that one message takes where the server's `max_payload` is this.
pub(crate) fn max_ids_bytes(max_payload: usize) -> usize {
    MAX_BATCH_BYTES.min(max_payload / 2)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;

    use millstream::{Failure, Outcome, Pipeline};
    use serde::Deserialize;

    use super::*;
    use crate::compute::Place;
    use crate::produce::input::Input;

    const TIMING: Timing =
        Timing { ids: 1000, id_nanos: 1_000_000, id_bytes: 8, row_bytes: 40, raw_bytes: 60 };
    const LIMITS: Limits = Limits { ids: 1 << 30, threads: 2, max_payload: 8 << 20 };

    fn chosen(timing: Timing, limits: Limits) -> (u32, Bound) {
        let Choice { batch_ids, bound, .. } = limits.choose(&timing);
        (batch_ids, bound)
    }

    #[test]
    fn a_batch_is_two_seconds_of_a_host_within_every_bound() {
        let by_time = |id_nanos| chosen(Timing { id_nanos, ..TIMING }, LIMITS);
        assert_eq!(by_time(1_000_000), (4_000, Bound::Time));
        assert_eq!(by_time(950_000), (4_200, Bound::Time));
        assert_eq!(by_time(60_000_000_000), (1, Bound::Time));
        assert_eq!(by_time(1), (65_000, Bound::IdBytes));
        let quick = Timing { id_nanos: 1, ..TIMING };
        assert_eq!(chosen(Timing { id_bytes: 1, row_bytes: 1, ..quick }, LIMITS), (500_000, Bound::Ids));
        assert_eq!(chosen(Timing { row_bytes: 4_000, ..quick }, LIMITS), (1_000, Bound::RowBytes));
        assert_eq!(chosen(Timing { raw_bytes: 100_000, ..quick }, LIMITS), (670, Bound::InsertBytes));
        assert_eq!(chosen(quick, Limits { ids: 6_400, ..LIMITS }), (100, Bound::Sharing));
        assert_eq!(chosen(TIMING, Limits { threads: 64, ..LIMITS }), (65_000, Bound::IdBytes));
        assert_eq!(chosen(TIMING, Limits { threads: 16, ..LIMITS }), (32_000, Bound::Time));
    }

    #[test]
    fn nothing_known_is_a_size_too() {
        let blindly = |ids| Limits { ids, ..LIMITS }.blindly(None).batch_ids;
        assert_eq!([10, 2_560, 1 << 40].map(blindly), [1, 10, 10_000]);
    }

    /// Ids cost what their remainder of 1000 says, and every id is remembered.
    struct Costly {
        cost: fn(u64) -> Outcome<Duration>,
        seen: Mutex<HashSet<u64>>,
    }

    #[derive(Serialize, Deserialize)]
    struct Nothing {
        nothing: u64,
    }

    impl Pipeline for Costly {
        const NAME: &'static str = "costly";
        const COLUMNS: &'static [(&'static str, &'static str)] = &[("nothing", "UInt64")];
        type Id = u64;
        type Row = Nothing;

        fn compute(&self, id: &u64) -> Outcome<Nothing> {
            self.seen.lock().expect("no panic").insert(*id);
            // Asleep, so that what a busy machine does beside it is not counted.
            std::thread::sleep((self.cost)(*id)?);
            Ok(Nothing { nothing: 0 })
        }
    }

    async fn choose_for(cost: fn(u64) -> Outcome<Duration>, ids: u64) -> (Choice, HashSet<u64>) {
        let pipeline = Arc::new(Costly { cost, seen: Mutex::default() });
        let function = Function::of(pipeline.clone()).expect("sound");
        let (survey, sample) = Input::Range { first: 1, last: ids }.survey::<u64>().expect("sound");
        let place = Place::Here;
        let limits = millstream::Limits::DEFAULT;
        let plan = WorkPlan { threads: usable_cores(), place, limits, drain: Duration::ZERO };
        let limits = Limits { ids: survey.ids, threads: 2, max_payload: 8 << 20 };
        let choice = choose(&function, &plan, sample, &limits, &Stop::new()).await.expect("chosen");
        let seen = pipeline.seen.lock().expect("no panic").clone();
        (choice, seen)
    }

    #[tokio::test]
    async fn the_sample_is_of_the_whole_run() {
        let (choice, seen) = choose_for(|_| Ok(Duration::from_millis(1)), 1_000_000).await;
        let timing = choice.timing.expect("timed");
        // A thread sleeps no shorter than it was told to.
        assert!(timing.id_nanos >= 1_000_000 && choice.bound == Bound::Time, "{choice:?}");
        assert!(choice.batch_ids <= 4_000, "{choice:?}");
        for tenth in 0..10 {
            let here = |id: &&u64| (tenth * 100_000..(tenth + 1) * 100_000).contains(*id);
            assert!(seen.iter().any(|id| here(&id)), "none of tenth {tenth} in {seen:?}");
        }
    }

    #[tokio::test]
    async fn rare_ids_that_cost_most_count_for_what_they_cost() {
        let cost = |id| Ok(if id % 20 == 0 { Duration::from_millis(40) } else { Duration::ZERO });
        let (choice, _) = choose_for(cost, 1_000_000).await;
        // 2 ms on average, of which a sample that is not spread evenly might see nothing.
        let timing = choice.timing.expect("timed");
        assert!(timing.id_nanos >= 1_000_000, "{choice:?}");
    }

    #[tokio::test]
    async fn ids_that_never_end_make_small_batches() {
        let (choice, _) = choose_for(|_| Ok(Duration::from_secs(8)), 1_000_000).await;
        let timing = choice.timing.expect("timed");
        assert_eq!((timing.ids, choice.batch_ids, choice.bound), (0, 1, Bound::Time), "{choice:?}");
    }

    #[tokio::test]
    async fn a_run_of_dead_letters_is_cut_blindly() {
        let (choice, _) = choose_for(|_| Err(Failure::reject("no")), 25_600).await;
        assert_eq!((choice.batch_ids, choice.timing), (100, None));
        assert!(choice.untimed.as_deref().is_some_and(|why| why.contains("dead letter")), "{choice:?}");
    }

    #[tokio::test]
    async fn a_handful_of_ids_is_not_timed() {
        let (choice, seen) = choose_for(|_| Ok(Duration::ZERO), 10).await;
        assert_eq!((choice.batch_ids, choice.timing, choice.untimed), (1, None, None));
        assert!(seen.is_empty(), "{seen:?}");
    }
}
