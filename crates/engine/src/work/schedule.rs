//! The scheduler: which pass a host pulls from next. Each pass gets its share of the cores' time, and a small run
//! behind a large one begins at once.
//!
//! Every pass has an account of the core time that it has used on this host, divided by its weight; the host pulls from
//! the pass with the smallest account (stride scheduling: Waldspurger and Weihl, 1995). When a batch is pulled, its
//! account is charged with the estimated cost, if that is known; when the batch ends, with the real cost. An idle pass
//! gains no credit: its account is raised to the smallest one of the busy passes.
//!
//! Hosts schedule independently. Since all of them pull from the same consumers, the whole fleet's time is shared
//! fairly.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millstream::names::PassId;

use crate::model::record::{Open, PassRecord, PassState};
use crate::model::times::Spent;
use crate::retry::Backoff;

/// How soon the host polls an idle pass again.
const IDLE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// A consumer that is missing for this long is logged, and again after each such time.
const ABSENT: Duration = Duration::from_secs(2);
/// Weight of the latest batch in the estimated cost of an id; the rest comes from earlier batches.
const LATEST: f64 = 0.25;
/// Batches longer than [`LONG`] are pulled ahead of free cores only while more than this many wait: otherwise one host
/// would hold work that other hosts have cores for.
pub(crate) const TAIL: u64 = 64;
/// Share of recent ids that asked for another attempt, from which a pass is in trouble.
const TROUBLE: f64 = 0.3;
/// Weight of the latest attempt in that share.
const LATEST_ATTEMPT: f64 = 0.2;
/// Batches of a pass in trouble that a host holds at a time.
const IN_TROUBLE: usize = 2;
/// A batch that takes a host's cores so long is not pulled ahead near the end of a pass.
pub(crate) const LONG: Duration = Duration::from_millis(500);

/// The accounts of one host's scheduler. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shares(Arc<Mutex<BTreeMap<PassId, Account>>>);

#[derive(Debug)]
struct Account {
    record: PassRecord,
    /// Core seconds, divided by the weight.
    used: f64,
    /// Core seconds for an id; `None` before the first batch is finished.
    per_id: Option<f64>,
    /// Batches of the pass that this host holds.
    held: usize,
    /// Batches that no worker has pulled yet, as of the last pull.
    pending: u64,
    /// Whether the last pull returned nothing.
    empty: bool,
    ask_again: Instant,
    pause: Backoff,
    /// Share of recent ids that asked for another attempt.
    trouble: f64,
    /// Since when the pass has had no consumer, or since the last log line about it.
    absent: Option<Instant>,
}

/// Which pass to pull from, and how.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    pub key: PassId,
    pub record: PassRecord,
    /// Most batches to pull, until the next pass's turn.
    pub most: usize,
    /// Whether a batch may be pulled before a core is free for it.
    pub ahead: bool,
}

/// Cost charged for a pulled batch. If dropped without [`Self::settle`], the cost is refunded.
#[derive(Debug)]
pub(crate) struct Charge {
    shares: Shares,
    key: PassId,
    seconds: f64,
    /// The refunded part of the cost.
    given_back: Mutex<f64>,
}

impl Account {
    fn new(record: PassRecord, used: f64) -> Self {
        let pause = Backoff::new(IDLE.0, IDLE.1);
        let ask_again = Instant::now();
        Self {
            record,
            used,
            per_id: None,
            held: 0,
            pending: u64::MAX,
            empty: false,
            ask_again,
            pause,
            trouble: 0.0,
            absent: None,
        }
    }

    /// The pass's weight: 1 at priority 0, doubled by each step.
    fn weight(&self) -> f64 {
        f64::from(self.record.priority).exp2()
    }

    /// Core seconds that a batch takes, as far as that is known.
    fn cost(&self) -> f64 {
        self.per_id.unwrap_or(0.0) * f64::from(self.record.batch_ids)
    }

    /// Whether the host may pull from the pass now. A host holds one batch of a rate-limited pass, and two of a pass in
    /// trouble: what its ids need is unavailable, and more ids would only use up their attempts.
    fn is_due(&self, now: Instant) -> bool {
        let most = match (self.record.rate, self.is_in_trouble()) {
            (Some(_), _) => 1,
            (None, true) => IN_TROUBLE,
            (None, false) => usize::MAX,
        };
        self.ask_again <= now && self.held < most
    }

    fn is_in_trouble(&self) -> bool {
        self.trouble > TROUBLE
    }
}

impl Shares {
    fn open(&self) -> MutexGuard<'_, BTreeMap<PassId, Account>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Updates the running passes. A new pass begins level with the one that is furthest behind.
    pub fn follow(&self, passes: &Open) {
        let mut accounts = self.open();
        let running = |key: &PassId| passes.get(key).filter(|record| record.state == PassState::Running);
        accounts.retain(|key, _| running(key).is_some());
        let level = least_used(&accounts);
        for (key, record) in passes.iter().filter(|(_, record)| record.state == PassState::Running) {
            let account = accounts.entry(key.clone());
            let account = account.or_insert_with(|| Account::new(record.clone(), level.unwrap_or(0.0)));
            account.record = record.clone();
        }
    }

    /// The pass whose turn it is, among those that may have batches.
    pub fn next(&self, cores: usize) -> Option<Turn> {
        let accounts = self.open();
        let now = Instant::now();
        let mut due: Vec<(&PassId, &Account)> =
            accounts.iter().filter(|(_, account)| account.is_due(now)).collect();
        due.sort_by(|(_, a), (_, b)| a.used.total_cmp(&b.used));
        let (key, account) = due.first()?;
        let cost = account.cost();
        let until_next = due.get(1).map(|(_, next)| (next.used - account.used) * account.weight());
        let most = match until_next {
            _ if account.record.rate.is_some() || account.is_in_trouble() => 1,
            // No other pass wants cores, or the cost is not known yet.
            None => usize::MAX,
            Some(_) if cost == 0.0 => 1,
            Some(seconds) => (seconds / cost) as usize + 1,
        };
        let long = cost / cores as f64 > LONG.as_secs_f64();
        let ahead = !long || account.pending > TAIL;
        Some(Turn { key: (*key).clone(), record: account.record.clone(), most, ahead })
    }

    /// How long until an idle pass may be polled again.
    pub fn idle_for(&self) -> Duration {
        let now = Instant::now();
        let waits =
            self.open().values().map(|account| account.ask_again.saturating_duration_since(now)).min();
        waits.unwrap_or(IDLE.1).clamp(Duration::from_millis(1), IDLE.1)
    }

    /// Notes the result of a pull: how many batches it returned, and how many are still pending.
    pub fn drawn(&self, key: &PassId, brought: usize, pending: Option<u64>) {
        let mut accounts = self.open();
        let level = least_used(&accounts);
        let Some(account) = accounts.get_mut(key) else { return };
        account.absent = None;
        if brought == 0 {
            account.empty = true;
            account.ask_again = Instant::now() + account.pause.wait();
            return;
        }
        if account.empty
            && let Some(level) = level
        {
            account.used = account.used.max(level);
        }
        account.empty = false;
        account.pause.reset();
        account.pending = pending.unwrap_or(u64::MAX);
    }

    /// Notes that a pass has no consumer; `true` if that should be logged now. A pass that has just begun gets its
    /// consumer a moment after its record.
    pub fn absent(&self, key: &PassId) -> bool {
        let mut accounts = self.open();
        let now = Instant::now();
        let Some(account) = accounts.get_mut(key) else { return false };
        account.ask_again = now + account.pause.wait();
        let since = *account.absent.get_or_insert(now);
        let is_due = now - since >= ABSENT;
        if is_due {
            account.absent = Some(now);
        }
        is_due
    }

    /// Skips a pass for a while, because a pull got no answer.
    pub fn put_off(&self, key: &PassId) {
        if let Some(account) = self.open().get_mut(key) {
            account.ask_again = Instant::now() + account.pause.wait();
        }
    }

    /// Charges a pass with a batch that was pulled from it.
    pub fn charge(&self, key: &PassId) -> Charge {
        let mut seconds = 0.0;
        if let Some(account) = self.open().get_mut(key) {
            seconds = account.cost();
            account.used += seconds / account.weight();
            account.held += 1;
        }
        Charge { shares: self.clone(), key: key.clone(), seconds, given_back: Mutex::default() }
    }
}

/// The smallest account of the passes that had batches.
fn least_used(accounts: &BTreeMap<PassId, Account>) -> Option<f64> {
    accounts.values().filter(|account| !account.empty).map(|account| account.used).min_by(f64::total_cmp)
}

impl Charge {
    /// Notes that `asked` of a batch's `ids` asked for another attempt. Returns whether the pass is in trouble now, if
    /// that changed.
    pub fn attempted(&self, asked: u64, ids: u32) -> Option<bool> {
        let mut accounts = self.shares.open();
        let account = accounts.get_mut(&self.key)?;
        let before = account.is_in_trouble();
        let share = asked as f64 / f64::from(ids.max(1));
        account.trouble += (share - account.trouble) * LATEST_ATTEMPT;
        let now = account.is_in_trouble();
        (before != now).then_some(now)
    }

    /// Replaces the estimated cost of `ids` ids, out of `all` ids of the batch, with the real cost.
    pub fn settle(&self, spent: Spent, ids: u32, all: u32) {
        let took = (spent.computing + spent.encoding).as_secs_f64();
        let part = f64::from(ids) / f64::from(all.max(1));
        if let Some(account) = self.shares.open().get_mut(&self.key) {
            account.used += took / account.weight();
            let per_id = took / f64::from(ids.max(1));
            account.per_id = match account.per_id {
                known if ids == 0 => known,
                Some(before) => Some(before + (per_id - before) * LATEST * part),
                None => Some(per_id),
            };
        }
        self.give_back(part);
    }

    fn give_back(&self, part: f64) {
        let mut given_back = self.given_back.lock().unwrap_or_else(PoisonError::into_inner);
        let part = part.min(1.0 - *given_back);
        *given_back += part;
        if let Some(account) = self.shares.open().get_mut(&self.key) {
            account.used -= self.seconds * part / account.weight();
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.give_back(1.0);
        if let Some(account) = self.shares.open().get_mut(&self.key) {
            account.held = account.held.saturating_sub(1);
            if account.record.rate.is_some() {
                account.ask_again = Instant::now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millstream::names::RunName;

    fn pass(run: &str, priority: i8) -> (PassId, PassRecord) {
        let name: RunName = run.parse().expect("legal");
        let pass = name.pass(1);
        let record = PassRecord { priority, ..PassRecord::begin(&pass, 100, 0) };
        (pass, record)
    }

    fn seconds(number: f64) -> Spent {
        Spent { computing: Duration::from_secs_f64(number), encoding: Duration::ZERO }
    }

    /// Pulls batches one after the other, each of which costs `cost`; returns how many each run got.
    fn play(shares: &Shares, batches: usize, cost: impl Fn(&str) -> f64) -> BTreeMap<String, f64> {
        let mut got = BTreeMap::new();
        for _ in 0..batches {
            let turn = shares.next(2).expect("something to draw");
            shares.drawn(&turn.key, 1, Some(1000));
            let charge = shares.charge(&turn.key);
            let took = cost(turn.record.run.as_str());
            charge.settle(seconds(took), 100, 100);
            *got.entry(turn.record.run.to_string()).or_default() += took;
        }
        got
    }

    #[test]
    fn equal_runs_share_the_time_whatever_their_batches_take() {
        let shares = Shares::default();
        shares.follow(&[pass("heavy", 0), pass("light", 0)].into());
        let got = play(&shares, 1000, |run| if run == "heavy" { 3.0 } else { 0.1 });
        let ratio = got["heavy"] / got["light"];
        assert!((0.9..1.1).contains(&ratio), "{got:?}");
    }

    #[test]
    fn each_step_of_priority_doubles_the_share() {
        let shares = Shares::default();
        shares.follow(&[pass("low", -1), pass("middle", 0), pass("high", 1)].into());
        let got = play(&shares, 7000, |_| 0.5);
        let of = |run: &str| got[run] / got["low"];
        assert!((1.9..2.1).contains(&of("middle")) && (3.9..4.1).contains(&of("high")), "{got:?}");
    }

    #[test]
    fn a_run_that_comes_later_begins_level() {
        let shares = Shares::default();
        shares.follow(&[pass("old", 0)].into());
        play(&shares, 1000, |_| 1.0);
        shares.follow(&[pass("old", 0), pass("new", 0)].into());
        let got = play(&shares, 100, |_| 1.0);
        assert!((49.0..=51.0).contains(&got["new"]), "{got:?}");
    }

    #[test]
    fn a_run_that_had_nothing_gains_nothing_by_it() {
        let shares = Shares::default();
        shares.follow(&[pass("busy", 0), pass("empty", 0)].into());
        let empty = pass("empty", 0).0;
        shares.drawn(&empty, 0, None);
        play(&shares, 1000, |_| 1.0);
        std::thread::sleep(IDLE.1);
        shares.drawn(&empty, 1, Some(1000));
        let got = play(&shares, 100, |_| 1.0);
        assert!((49.0..=51.0).contains(&got["empty"]), "{got:?}");
    }

    #[test]
    fn a_run_without_its_consumer_keeps_no_other_waiting() {
        let shares = Shares::default();
        shares.follow(&[pass("a", 0), pass("b", 0)].into());
        let first = shares.next(2).expect("one").key;
        assert!(!shares.absent(&first), "its record is a moment older than its consumer");
        assert_ne!(shares.next(2).expect("the other").key, first);
        shares.open().get_mut(&first).expect("it runs").absent = Instant::now().checked_sub(ABSENT);
        assert!(shares.absent(&first) && !shares.absent(&first), "logged once in that time");
    }

    #[test]
    fn what_was_given_back_is_not_paid_for() {
        let shares = Shares::default();
        shares.follow(&[pass("a", 0), pass("b", 0)].into());
        play(&shares, 10, |_| 1.0);
        let before = shares.next(2).expect("one").key;
        drop(shares.charge(&before));
        assert_eq!(shares.next(2).expect("one").key, before);
    }

    #[test]
    fn long_batches_are_not_drawn_ahead_near_the_end() {
        let shares = Shares::default();
        let (key, record) = pass("a", 0);
        shares.follow(&[(key.clone(), record)].into());
        assert!(shares.next(2).expect("one").ahead, "nothing is known of its cost");
        shares.charge(&key).settle(seconds(4.0), 100, 100);
        shares.drawn(&key, 1, Some(TAIL));
        assert!(!shares.next(2).expect("one").ahead);
        shares.drawn(&key, 1, Some(TAIL + 1));
        assert!(shares.next(2).expect("one").ahead);
    }

    #[test]
    fn of_a_run_with_a_rate_one_batch_is_held() {
        let shares = Shares::default();
        let (key, record) = pass("a", 0);
        shares.follow(&[(key.clone(), PassRecord { rate: Some(10), ..record })].into());
        assert_eq!(shares.next(2).expect("one").most, 1);
        let charge = shares.charge(&key);
        assert!(shares.next(2).is_none());
        drop(charge);
        assert!(shares.next(2).is_some());
    }
}
