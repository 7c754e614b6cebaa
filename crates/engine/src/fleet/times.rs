//! Time accounting: counted where the work is done, summed every few seconds.
//!
//! No code here reads a clock for every id. The pool's watch counts busy thread slots ten times a second; the worker
//! samples at that interval what idle cores wait for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millstream::names::PassId;

use crate::model::times::{RunShare, Spent, difference};

use crate::model::record::Open;
use crate::telemetry::labels::WaitsFor;

/// How often the worker samples what idle cores wait for.
pub(crate) const SAMPLE: Duration = Duration::from_millis(100);
/// Places in [`WorkLoad::idle`]: what idle cores wait for.
const IDS: usize = 0;
const ROOM: usize = 1;
const RATE: usize = 2;
/// Not idle: a core with ids in a process that sends no sign of life.
const SILENT: usize = 3;
/// How many reports the "recent" figures cover.
pub(crate) const RECENT: usize = 4;

/// Sums as they were at the last few reports.
#[derive(Debug)]
pub(crate) struct Recent<const N: usize>(VecDeque<(Instant, [f64; N])>);

impl<const N: usize> Recent<N> {
    pub fn new() -> Self {
        Self([(Instant::now(), [0.0; N])].into())
    }

    /// What was added since the oldest kept report, and in how many seconds.
    pub fn note(&mut self, sums: [f64; N]) -> ([f64; N], f64) {
        let now = Instant::now();
        self.0.push_back((now, sums));
        if self.0.len() > RECENT + 1 {
            self.0.pop_front();
        }
        let (then, before) = self.0[0];
        (difference(sums, before), (now - then).as_secs_f64().max(f64::EPSILON))
    }
}

/// Which phases a process is in, and for how long. Of several phases at one moment, the highest counts.
#[derive(Debug)]
pub(crate) struct Phases<const N: usize>(Mutex<PhaseState<N>>);

#[derive(Debug)]
struct PhaseState<const N: usize> {
    /// How often each phase is open now.
    open: [usize; N],
    seconds: [f64; N],
    since: Instant,
}

/// One phase that is under way; dropping the value ends it.
pub(crate) struct Phase<'a, const N: usize> {
    phases: &'a Phases<N>,
    which: usize,
}

impl<const N: usize> Phases<N> {
    /// No phase is open, which is phase 0.
    pub fn new() -> Self {
        Self(Mutex::new(PhaseState { open: [0; N], seconds: [0.0; N], since: Instant::now() }))
    }

    fn state(&self) -> MutexGuard<'_, PhaseState<N>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let which = (0..N).rev().find(|which| state.open[*which] > 0).unwrap_or(0);
        state.seconds[which] += (now - state.since).as_secs_f64();
        state.since = now;
        state
    }

    /// Begins a phase.
    pub fn begin(&self, which: usize) -> Phase<'_, N> {
        self.state().open[which] += 1;
        Phase { phases: self, which }
    }

    /// Seconds of each phase so far.
    pub fn seconds(&self) -> [f64; N] {
        self.state().seconds
    }
}

impl<const N: usize> Drop for Phase<'_, N> {
    fn drop(&mut self) {
        self.phases.state().open[self.which] -= 1;
    }
}

/// What a worker holds, and what it did.
#[derive(Debug)]
pub struct WorkLoad {
    cores: usize,
    /// Whether the pool's thread slots are watched.
    watched: AtomicBool,
    /// Nanoseconds for which the pool's thread slots had an id.
    busy: AtomicU64,
    computing: AtomicU64,
    encoding: AtomicU64,
    /// Nanoseconds of computing and encoding that the pool's thread slots do not show.
    alone: AtomicU64,
    /// Cores that the batches under computation can occupy.
    occupied: AtomicUsize,
    /// Batches whose rows are on their way to NATS.
    publishing: AtomicUsize,
    /// Batches that wait for a rate limit.
    paced: AtomicUsize,
    /// Whether the pool process has ids and sends no sign of life.
    silent: AtomicBool,
    /// Cores without an id, by what they wait for, summed over the samples.
    idle: [AtomicU64; 4],
    runs: Mutex<BTreeMap<PassId, RunLoad>>,
}

#[derive(Debug, Default)]
struct RunLoad {
    ids: u64,
    dead: u64,
    /// Ids that wait for another attempt.
    asking: u64,
    /// Why the last of these ids waits.
    why: Option<String>,
    /// When each batch that the worker holds arrived.
    held: Vec<Instant>,
    /// Id counts at the last reports.
    recent: VecDeque<(Instant, u64)>,
}

/// A batch that the worker holds; dropping the value ends that.
pub(crate) struct InHand<'a> {
    load: &'a WorkLoad,
    key: PassId,
    since: Instant,
}

/// Counts something that is under way; dropping the value takes it off the count.
pub(crate) struct Under<'a>(&'a AtomicUsize, usize);

impl<'a> Under<'a> {
    fn begin(count: &'a AtomicUsize, by: usize) -> Self {
        count.fetch_add(by, Ordering::Relaxed);
        Self(count, by)
    }
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl WorkLoad {
    /// Time accounting of a host with `cores` compute threads.
    pub fn new(cores: usize) -> Self {
        Self {
            cores,
            watched: AtomicBool::new(false),
            busy: AtomicU64::new(0),
            computing: AtomicU64::new(0),
            encoding: AtomicU64::new(0),
            alone: AtomicU64::new(0),
            occupied: AtomicUsize::new(0),
            publishing: AtomicUsize::new(0),
            paced: AtomicUsize::new(0),
            silent: AtomicBool::new(false),
            idle: Default::default(),
            runs: Mutex::default(),
        }
    }

    pub(crate) fn cores(&self) -> usize {
        self.cores
    }

    /// Adds the time for which the pool's thread slots had an id since the last call, summed over the slots.
    pub(crate) fn busy(&self, time: Duration) {
        self.watched.store(true, Ordering::Relaxed);
        self.busy.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Notes whether the pool process has ids and sends no sign of life.
    pub(crate) fn is_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    /// Adds used core time.
    pub(crate) fn spent(&self, spent: Spent) {
        self.computing.fetch_add(spent.computing.as_nanos() as u64, Ordering::Relaxed);
        self.encoding.fetch_add(spent.encoding.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Adds core time of isolated processes, or of packing rows.
    pub(crate) fn alone(&self, spent: Duration) {
        self.alone.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Notes that a batch of a pass has arrived.
    pub(crate) fn take(&self, key: &PassId) -> InHand<'_> {
        let since = Instant::now();
        self.runs().entry(key.clone()).or_default().held.push(since);
        InHand { load: self, key: key.clone(), since }
    }

    /// Notes that `ids` ids of a pass ask for another attempt, one of them because of `why`.
    pub(crate) fn asking(&self, key: &PassId, ids: u64, why: &str) -> Asking<'_> {
        let mut runs = self.runs();
        let run = runs.entry(key.clone()).or_default();
        run.asking += ids;
        run.why = Some(millstream::shortened(why));
        Asking { load: self, key: key.clone(), ids }
    }

    /// Notes that `ids` ids are under computation.
    pub(crate) fn computing(&self, ids: u32) -> Under<'_> {
        Under::begin(&self.occupied, (ids as usize).min(self.cores))
    }

    /// Notes that a batch's rows are being packed on a core that the pool does not show.
    pub(crate) fn packing(&self) -> Under<'_> {
        Under::begin(&self.occupied, 1)
    }

    /// Adds time for which rows were packed.
    pub(crate) fn packed(&self, took: Duration) {
        self.spent(Spent { computing: Duration::ZERO, encoding: took });
        self.alone(took);
    }

    /// Notes that rows are on their way to NATS.
    pub(crate) fn publishing(&self) -> Under<'_> {
        Under::begin(&self.publishing, 1)
    }

    /// Notes that a batch waits for its run's rate limit.
    pub(crate) fn paced(&self) -> Under<'_> {
        Under::begin(&self.paced, 1)
    }

    /// Samples what cores without ids wait for, when the worker has permits to pull batches for `free` cores. Rows on
    /// their way delay only a worker that lacks permits for another batch. Returns how many cores wait for what.
    pub(crate) fn sample(&self, free: usize) -> [(WaitsFor, usize); 3] {
        let occupied = self.occupied.load(Ordering::Relaxed).min(self.cores);
        let idle = self.cores - occupied;
        if self.silent.load(Ordering::Relaxed) {
            self.idle[SILENT].fetch_add(occupied as u64, Ordering::Relaxed);
        }
        let for_room = match self.publishing.load(Ordering::Relaxed) {
            0 => 0,
            _ => idle.saturating_sub(free),
        };
        let is_paced = self.paced.load(Ordering::Relaxed) > 0;
        let for_rate = if is_paced { idle - for_room } else { 0 };
        let for_ids = idle - for_room - for_rate;
        for (which, cores) in [(IDS, for_ids), (ROOM, for_room), (RATE, for_rate)] {
            self.idle[which].fetch_add(cores as u64, Ordering::Relaxed);
        }
        [(WaitsFor::Ids, for_ids), (WaitsFor::Room, for_room), (WaitsFor::Rate, for_rate)]
    }

    /// How the cores spent `elapsed`: the parts of [`CoreTimes`].
    pub(crate) fn sums(&self, elapsed: Duration) -> [f64; 6] {
        let number = |count: &AtomicU64| count.load(Ordering::Relaxed) as f64;
        let all = elapsed.as_secs_f64() * self.cores as f64;
        let seconds = |nanos: &AtomicU64| number(nanos) / 1e9;
        let computing = seconds(&self.computing);
        let encoding = seconds(&self.encoding);
        // Without a watch (a pool in this very process) the times measured for each piece must do.
        let busy = if self.watched.load(Ordering::Relaxed) {
            seconds(&self.busy) + seconds(&self.alone)
        } else {
            computing + encoding
        };
        let busy = busy.min(all);
        let encoding = busy * encoding / (computing + encoding).max(f64::MIN_POSITIVE);
        let idle = self.idle.each_ref().map(number);
        let samples: f64 = idle.iter().sum();
        let part = |which: usize| if samples > 0.0 { (all - busy) * idle[which] / samples } else { 0.0 };
        let ids = all - busy - part(ROOM) - part(RATE) - part(SILENT);
        [busy - encoding, encoding, ids, part(ROOM), part(RATE), part(SILENT)]
    }

    /// What the worker does for each open pass.
    pub(crate) fn shares(&self, open: &Open) -> Vec<RunShare> {
        let mut runs = self.runs();
        runs.retain(|key, load| open.contains_key(key) || !load.held.is_empty());
        runs.iter_mut().map(|(key, load)| load.share(key)).collect()
    }

    fn runs(&self) -> MutexGuard<'_, BTreeMap<PassId, RunLoad>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunLoad {
    fn share(&mut self, PassId { run, pass }: &PassId) -> RunShare {
        let now = Instant::now();
        self.recent.push_back((now, self.ids));
        if self.recent.len() > RECENT + 1 {
            self.recent.pop_front();
        }
        let (then, before) = self.recent[0];
        let seconds = (now - then).as_secs_f64();
        let oldest = self.held.iter().map(|since| now - *since).max();
        RunShare {
            run: run.to_string(),
            pass: *pass,
            ids: self.ids,
            dead: self.dead,
            asking: self.asking,
            why: self.why.clone().filter(|_| self.asking > 0),
            ids_per_second: if seconds > 0.0 { (self.ids - before) as f64 / seconds } else { 0.0 },
            held: self.held.len(),
            oldest_seconds: oldest.map_or(0.0, |age| age.as_secs_f64()),
        }
    }
}

impl InHand<'_> {
    /// Notes that rows of the batch are stored, and how many of them are dead letters.
    pub fn stored(&self, ids: u32, dead: u32) {
        let mut runs = self.load.runs();
        let run = runs.entry(self.key.clone()).or_default();
        (run.ids, run.dead) = (run.ids + u64::from(ids), run.dead + u64::from(dead));
        drop(runs);
    }
}

/// Ids that wait for another attempt; dropping the value ends that.
pub(crate) struct Asking<'a> {
    load: &'a WorkLoad,
    key: PassId,
    ids: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.load.runs().get_mut(&self.key) {
            run.asking = run.asking.saturating_sub(self.ids);
        }
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.load.runs().get_mut(&self.key)
            && let Some(at) = run.held.iter().position(|since| *since == self.since)
        {
            run.held.swap_remove(at);
        }
    }
}

/// The time accounting, shared with the code that counts.
pub type Load = Arc<WorkLoad>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::times::CoreTimes;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_cores_did_adds_up() {
        let load = WorkLoad::new(2);
        load.busy(Duration::from_millis(1500));
        load.spent(Spent { computing: Duration::from_millis(1200), encoding: Duration::from_millis(300) });
        {
            let _rows = load.publishing();
            load.sample(0);
        }
        load.sample(0);
        let times = CoreTimes::from(load.sums(SECOND));
        assert!((times.all - 2.0).abs() < 1e-9, "{times:?}");
        let parts = [times.computing, times.encoding, times.waiting_for_ids, times.waiting_for_room];
        for (part, expected) in parts.into_iter().zip([1.2, 0.3, 0.25, 0.25]) {
            assert!((part - expected).abs() < 1e-9, "{times:?}");
        }
    }

    /// The pool process and its watch begin with the first batch.
    #[test]
    fn time_before_the_first_batch_was_idle() {
        let load = WorkLoad::new(2);
        load.sample(4);
        load.busy(SECOND * 2);
        load.spent(Spent { computing: SECOND * 2, encoding: Duration::ZERO });
        let times = CoreTimes::from(load.sums(SECOND * 100));
        assert_eq!((times.computing, times.waiting_for_ids), (2.0, 198.0));
    }

    #[test]
    fn rows_on_their_way_delay_only_a_worker_without_permits() {
        let waited = |free, publishing: bool| {
            let load = WorkLoad::new(4);
            let _one = load.computing(1);
            let _rows = publishing.then(|| load.publishing());
            load.sample(free);
            load.idle.each_ref().map(|waiting| waiting.load(Ordering::Relaxed))
        };
        assert_eq!(waited(0, true), [0, 3, 0, 0]);
        assert_eq!(waited(1, true), [1, 2, 0, 0]);
        assert_eq!(waited(6, true), [3, 0, 0, 0]);
        assert_eq!(waited(0, false), [3, 0, 0, 0]);
    }

    /// Regression: this time read as a wait for NATS although all its answers had arrived.
    #[test]
    fn cores_of_a_process_that_gives_no_sign_wait_for_nothing() {
        let load = WorkLoad::new(4);
        load.busy(Duration::ZERO);
        let _three = load.computing(3);
        let _rows = load.publishing();
        load.is_silent(true);
        load.sample(4);
        let times = CoreTimes::from(load.sums(SECOND));
        assert_eq!((times.silent, times.waiting_for_ids, times.waiting_for_room), (3.0, 1.0, 0.0));
    }

    #[test]
    fn a_process_that_never_sampled_has_only_waited() {
        let times = CoreTimes::from(WorkLoad::new(4).sums(SECOND));
        assert_eq!((times.all, times.waiting_for_ids), (4.0, 4.0));
    }

    #[test]
    fn of_several_things_at_once_the_highest_counts() {
        let phases = Phases::<3>::new();
        let insert = phases.begin(2);
        let ask = phases.begin(1);
        std::thread::sleep(Duration::from_millis(20));
        drop(insert);
        drop(ask);
        let seconds = phases.seconds();
        assert!(seconds[2] >= 0.02 && seconds[1] < 0.02, "{seconds:?}");
    }

    #[test]
    fn a_batch_is_held_until_it_is_dropped() {
        let load = WorkLoad::new(1);
        let key = PassId { run: "a".parse().expect("legal"), pass: 1 };
        let held = |load: &WorkLoad| load.shares(&Open::new()).first().map(|share| (share.held, share.ids));
        let first = load.take(&key);
        let second = load.take(&key);
        assert_eq!(held(&load), Some((2, 0)));
        first.stored(7, 0);
        drop(first);
        assert_eq!(held(&load), Some((1, 7)));
        drop(second);
        assert_eq!(held(&load), None, "a pass that is over is forgotten");
    }
}
