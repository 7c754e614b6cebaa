//! Choosing the batch size, by timing the function on a sample of the run's ids before any is published.
//!
//! The sample runs where workers compute, in processes of their own. So an id that crashes or never ends costs only
//! some of the time spent here. The measure is ids finished by busy cores in a period, not the time of each id. So ids
//! that never finish, and the few most expensive ids, still count toward the measured cost.

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

/// How long one host should work on a batch: long compared with a batch's fixed cost, short compared with a run.
pub const TARGET: Duration = Duration::from_secs(2);
/// Minimum number of batches of a run with enough ids, so that a fleet can share it.
const SHARED: u64 = 64;
/// Minimum number of batches when the ids could not be timed.
const SHARED_BLINDLY: u64 = 256;
/// Maximum ids of a batch when the ids could not be timed.
const BLIND_IDS: u64 = 10_000;

/// Longest timing, counted from the first finished id.
const LONGEST: Duration = Duration::from_secs(1);
/// Timing that is enough with [`MANY`] ids.
const USUAL: Duration = Duration::from_millis(500);
/// Ids that are enough after [`USUAL`].
const MANY: u64 = 200;
/// Timing that is enough if the time of ids is clearly not the bound: it allows [`BY_FAR`] times the ids of another bound.
const GLANCE: Duration = Duration::from_millis(50);
/// See [`GLANCE`].
const BY_FAR: u64 = 4;
/// Below this many ids, the time until the first one is part of the measure.
const FEW: u64 = 16;
/// How long to wait for the first id.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for the first ids of the process before timing: they may load what all others need.
const WARM_UP: Duration = Duration::from_secs(30);
/// Core time that a piece of the sample should take.
const PIECE: Duration = Duration::from_millis(20);
/// Most ids of a piece of the sample.
const PIECE_IDS: usize = 1 << 16;
/// How many times larger than the previous piece a piece may be.
const GROWTH: usize = 4;

/// Which bound limits the ids of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// One host should work no longer on a batch.
    Time,
    /// A batch may hold no more ids.
    Ids,
    /// A message holds no more bytes of ids.
    IdBytes,
    /// A message holds no more rows.
    RowBytes,
    /// An insert takes no more rows.
    InsertBytes,
    /// The fleet could not share the run, because it would have too few batches.
    Sharing,
}

/// A batch size, and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// Ids of a batch.
    pub batch_ids: u32,
    /// Cores of the host that the size is meant for.
    pub threads: usize,
    /// The bound that limits the size.
    pub bound: Bound,
    /// The measurement; `None` if none was needed, or possible.
    pub timing: Option<Timing>,
    /// Why no measurement was possible.
    pub untimed: Option<String>,
}

/// What limits the batch size of a run.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many ids the run has.
    pub ids: u64,
    /// Cores of a host that will compute them.
    pub threads: usize,
    /// The NATS server's `max_payload`, in bytes.
    pub max_payload: usize,
}

impl Limits {
    /// The size for ids with this measured cost.
    pub fn choose(&self, timing: &Timing) -> Choice {
        let host_nanos = TARGET.as_nanos() as u64 * self.threads as u64;
        let time = (host_nanos / timing.id_nanos.max(1), Bound::Time);
        let others = self.beside_time(timing);
        let (most, bound) = if others.0 < time.0 { others } else { time };
        let batch_ids = rounded_down(most.max(1)) as u32;
        Choice { batch_ids, threads: self.threads, bound, timing: Some(*timing), untimed: None }
    }

    /// The smallest bound of a batch, apart from the ids' time.
    fn beside_time(&self, timing: &Timing) -> (u64, Bound) {
        let holds = |bytes: u64, each: u64| bytes / each.max(1);
        let payload = self.max_payload as u64;
        let bounds = [
            (u64::from(MAX_BATCH_IDS), Bound::Ids),
            (holds(max_ids_bytes(self.max_payload) as u64, timing.id_bytes), Bound::IdBytes),
            // Half of the payload, because rows differ in size, and the sample's rows may be smaller than others.
            (holds(payload / 2, timing.row_bytes), Bound::RowBytes),
            (holds(MAX_INSERT_BYTES / 2, timing.raw_bytes), Bound::InsertBytes),
            (self.ids / SHARED, Bound::Sharing),
        ];
        bounds.into_iter().min_by_key(|(most, _)| *most).expect("there are five")
    }

    /// The size for ids without a measurement.
    fn blindly(&self, untimed: Option<String>) -> Choice {
        let batch_ids = blind_size(self.ids);
        Choice { batch_ids, threads: self.threads, bound: Bound::Sharing, timing: None, untimed }
    }
}

/// Ids of a batch when their cost is unknown: enough to make the fixed cost small, few enough to share a short run of
/// expensive ids.
pub(crate) fn blind_size(ids: u64) -> u32 {
    (ids / SHARED_BLINDLY).clamp(1, BLIND_IDS) as u32
}

/// Chooses the batch size of a run by timing its ids; chooses one without timing if that fails.
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
    // No more threads than this host has cores: threads that share a core would be timed together.
    let threads = plan.threads.min(usable_cores());
    let load = Arc::new(WorkLoad::new(threads));
    // The sample is no work of this process, so it has its own metrics.
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

/// Keeps cores busy with a sample, and counts finished ids.
struct Timer<'a, I: Id> {
    cores: &'a Cores<I>,
    threads: usize,
    sample: Sample<I>,
    begun: Instant,
    /// When the first ids finished.
    first: Option<Instant>,
    /// Since when pieces have not grown much, and how many ids were finished by then: the fixed cost of small pieces is
    /// not the ids' cost.
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

    /// The measured cost of an id; `None` when all ids became dead letters.
    async fn time(mut self, limits: &Limits) -> Result<Option<Timing>, Error> {
        // A pipeline may be slow to start; that is no id's cost.
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

    /// Has each core compute an id that is not timed. One that takes too long runs on beside the others.
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

    /// How many ids were finished in which time.
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
        // Every core has had an id all the time; if none finished, each costs at least that long.
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
    // As the last attempt, because the sample does not pause and try an id again.
    let computed = cores.compute(&key, ids.clone(), true, false).await?;
    Ok((ids, computed))
}

/// The number rounded down to two digits and zeros, so that an operator can read it easily.
fn rounded_down(number: u64) -> u64 {
    let unit = 10u64.pow(number.ilog10().saturating_sub(1));
    number / unit * unit
}

/// Most bytes that the ids of a batch take in a message, whatever the server allows: workers hold several batches.
const MAX_BATCH_BYTES: usize = 512 << 10;

/// Most bytes of ids in one message for this `max_payload` of the server.
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

    /// Ids cost what their remainder of 1000 says; the function records every id.
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
            // A sleep, so that other load on the machine does not count.
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
        // A thread sleeps at least as long as asked.
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
        // 2 ms on average, which a sample that is not spread evenly might miss.
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
