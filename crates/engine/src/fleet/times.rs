//! How a process spends its time: counted where the work is done, summed up every few seconds.
//!
//! Nothing here looks at a clock for every id. The pool's own watch counts the hands that have an id, ten times a second;
//! what idle cores wait for is sampled as often from what the worker holds.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millstream::names::PassId;

use crate::model::times::{RunShare, Spent, difference};

use crate::model::record::Open;
use crate::telemetry::labels::WaitsFor;

/// How often it is sampled what idle cores wait for.
pub(crate) const SAMPLE: Duration = Duration::from_millis(100);
/// What idle cores wait for: places in [`WorkLoad::idle`].
const IDS: usize = 0;
const ROOM: usize = 1;
const RATE: usize = 2;
/// No idle core: one that has ids in a process which gives no sign.
const SILENT: usize = 3;
/// "Now" is this many reports long.
pub(crate) const RECENT: usize = 4;

/// Sums as they were at the last few reports.
#[derive(Debug)]
pub(crate) struct Recent<const N: usize>(VecDeque<(Instant, [f64; N])>);

impl<const N: usize> Recent<N> {
    pub fn new() -> Self {
        Self([(Instant::now(), [0.0; N])].into())
    }

    /// What was added since the oldest of them, and in how many seconds.
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

/// What a process does at each moment, and how long it did what: of several things at once, the highest counts.
#[derive(Debug)]
pub(crate) struct Phases<const N: usize>(Mutex<PhaseState<N>>);

#[derive(Debug)]
struct PhaseState<const N: usize> {
    /// How many of each are under way.
    open: [usize; N],
    seconds: [f64; N],
    since: Instant,
}

/// Ends when it is dropped.
pub(crate) struct Phase<'a, const N: usize> {
    phases: &'a Phases<N>,
    which: usize,
}

impl<const N: usize> Phases<N> {
    /// Nothing is under way, which is phase 0.
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

    /// Begins something.
    pub fn begin(&self, which: usize) -> Phase<'_, N> {
        self.state().open[which] += 1;
        Phase { phases: self, which }
    }

    /// Seconds of each so far.
    pub fn seconds(&self) -> [f64; N] {
        self.state().seconds
    }
}

impl<const N: usize> Drop for Phase<'_, N> {
    fn drop(&mut self) {
        self.phases.state().open[self.which] -= 1;
    }
}

/// What a worker has in hand, and what it did.
#[derive(Debug)]
pub struct WorkLoad {
    cores: usize,
    /// Whether the pool's hands are watched, and nanoseconds for which they had an id.
    watched: AtomicBool,
    busy: AtomicU64,
    computing: AtomicU64,
    encoding: AtomicU64,
    /// The time computing and encoding that the pool's hands do not show.
    alone: AtomicU64,
    /// Cores that the batches which are being computed can occupy.
    occupied: AtomicUsize,
    /// Batches that wait for the broker to take their rows, for a rate limit.
    publishing: AtomicUsize,
    paced: AtomicUsize,
    /// Whether the pool's process has ids and gives no sign.
    silent: AtomicBool,
    /// Cores without an id, by what was the matter, summed over the samples.
    idle: [AtomicU64; 4],
    runs: Mutex<BTreeMap<PassId, RunLoad>>,
}

#[derive(Debug, Default)]
struct RunLoad {
    ids: u64,
    dead: u64,
    /// Ids that wait for another attempt, and why the last of them does.
    asking: u64,
    why: Option<String>,
    /// When each batch in hand arrived.
    held: Vec<Instant>,
    /// Ids at the last reports.
    recent: VecDeque<(Instant, u64)>,
}

/// A batch in hand.
pub(crate) struct InHand<'a> {
    load: &'a WorkLoad,
    key: PassId,
    since: Instant,
}

/// Something that goes on until it is dropped.
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
    /// Of a host with so many compute threads.
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

    /// The pool's hands had an id for so long, summed over them, since this was last said.
    pub(crate) fn busy(&self, time: Duration) {
        self.watched.store(true, Ordering::Relaxed);
        self.busy.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Whether the pool's process has ids and gives no sign.
    pub(crate) fn is_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    /// Cores were used.
    pub(crate) fn spent(&self, spent: Spent) {
        self.computing.fetch_add(spent.computing.as_nanos() as u64, Ordering::Relaxed);
        self.encoding.fetch_add(spent.encoding.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Cores were used by children that have one id at a time, or for packing rows.
    pub(crate) fn alone(&self, spent: Duration) {
        self.alone.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }

    /// A batch of a pass has arrived.
    pub(crate) fn take(&self, key: &PassId) -> InHand<'_> {
        let since = Instant::now();
        self.runs().entry(key.clone()).or_default().held.push(since);
        InHand { load: self, key: key.clone(), since }
    }

    /// So many ids of a pass ask for another attempt, one of them for this reason.
    pub(crate) fn asking(&self, key: &PassId, ids: u64, why: &str) -> Asking<'_> {
        let mut runs = self.runs();
        let run = runs.entry(key.clone()).or_default();
        run.asking += ids;
        run.why = Some(millstream::shortened(why));
        Asking { load: self, key: key.clone(), ids }
    }

    /// So many ids are being computed.
    pub(crate) fn computing(&self, ids: u32) -> Under<'_> {
        Under::begin(&self.occupied, (ids as usize).min(self.cores))
    }

    /// Rows of a batch are being packed, which takes a core that the pool does not show.
    pub(crate) fn packing(&self) -> Under<'_> {
        Under::begin(&self.occupied, 1)
    }

    /// Rows were packed for so long.
    pub(crate) fn packed(&self, took: Duration) {
        self.spent(Spent { computing: Duration::ZERO, encoding: took });
        self.alone(took);
    }

    /// Rows are on their way to the broker.
    pub(crate) fn publishing(&self) -> Under<'_> {
        Under::begin(&self.publishing, 1)
    }

    /// A batch waits because of its run's rate.
    pub(crate) fn paced(&self) -> Under<'_> {
        Under::begin(&self.paced, 1)
    }

    /// Notes what cores without ids wait for at this moment, when batches could be drawn for `free` cores: rows on
    /// their way keep nobody waiting who has room for another batch. Returns how many cores wait for what.
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

    /// Where the cores' time went in `elapsed`: the parts of [`CoreTimes`].
    pub(crate) fn sums(&self, elapsed: Duration) -> [f64; 6] {
        let number = |count: &AtomicU64| count.load(Ordering::Relaxed) as f64;
        let all = elapsed.as_secs_f64() * self.cores as f64;
        let seconds = |nanos: &AtomicU64| number(nanos) / 1e9;
        let computing = seconds(&self.computing);
        let encoding = seconds(&self.encoding);
        // Without a watch (a pool in this very process) what was measured piece by piece has to do.
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

    /// What is done for each pass that is open.
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
    /// Rows of it are stored, so many of them dead letters.
    pub fn stored(&self, ids: u32, dead: u32) {
        let mut runs = self.load.runs();
        let run = runs.entry(self.key.clone()).or_default();
        (run.ids, run.dead) = (run.ids + u64::from(ids), run.dead + u64::from(dead));
        drop(runs);
    }
}

/// Ids that wait for another attempt, until it is dropped.
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

/// What is shared with whoever counts.
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

    /// The pool's process, and its watch with it, begins with the first batch.
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
    fn rows_on_their_way_keep_only_those_waiting_who_have_no_room() {
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

    /// It read as a wait for the broker, whose answers were all there.
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
    fn a_process_that_never_looked_has_only_waited() {
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
