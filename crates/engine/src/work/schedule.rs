//! Which pass a host draws from next: each gets its share of the cores' time, and a small run behind a large one begins
//! at once.
//!
//! Every pass has an account of the core time that it has taken here, divided by its weight; the pass with the smallest
//! account is drawn from (stride scheduling: Waldspurger and Weihl, 1995). A batch is charged with what it will take, as
//! far as that is known, when it is drawn, and with what it took when it is done. A pass that had nothing to draw gains
//! nothing by that: its account is raised to the smallest of those that had.
//!
//! Hosts do this each for themselves. Since all of them draw from the same consumers, the fleet's time is shared alike.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millstream::names::PassId;

use crate::model::record::{Open, PassRecord, PassState};
use crate::model::times::Spent;
use crate::retry::Backoff;

/// How soon a pass that had nothing is asked again.
const IDLE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// A consumer that is missing for longer is told of, as often.
const ABSENT: Duration = Duration::from_secs(2);
/// How much of the cost of an id the latest batch says; the rest is what those before it said.
const LATEST: f64 = 0.25;
/// Batches that are drawn ahead of free cores only while more of them wait, if they take longer than [`LONG`]: otherwise
/// one host would sit on work that others have cores for.
pub(crate) const TAIL: u64 = 64;
/// A pass is in trouble once this share of its ids has asked for another attempt lately.
const TROUBLE: f64 = 0.3;
/// How much of that share the latest attempt at a batch says.
const LATEST_ATTEMPT: f64 = 0.2;
/// Batches of such a pass that a host has at a time.
const IN_TROUBLE: usize = 2;
/// A batch that takes a host's cores this long is not drawn ahead near the end of a pass.
pub(crate) const LONG: Duration = Duration::from_millis(500);

/// The accounts of one host. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shares(Arc<Mutex<BTreeMap<PassId, Account>>>);

#[derive(Debug)]
struct Account {
    record: PassRecord,
    /// Seconds of cores, divided by the weight.
    used: f64,
    /// Seconds of cores that an id takes; `None` before the first batch is done.
    per_id: Option<f64>,
    /// Batches of it in hand here.
    held: usize,
    /// Batches that nobody has drawn yet, as of the last draw.
    pending: u64,
    /// Whether the last draw brought nothing.
    empty: bool,
    ask_again: Instant,
    pause: Backoff,
    /// The share of its ids that asked for another attempt lately.
    trouble: f64,
    /// Since when it has had no consumer, or since that was last told.
    absent: Option<Instant>,
}

/// Which pass to draw from, and how.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    pub key: PassId,
    pub record: PassRecord,
    /// Batches to draw at most, until the next pass's turn.
    pub most: usize,
    /// Whether a batch may be drawn before there is a free core for it.
    pub ahead: bool,
}

/// What a batch was charged with when it was drawn. Dropped without [`Self::settle`], it is given back.
#[derive(Debug)]
pub(crate) struct Charge {
    shares: Shares,
    key: PassId,
    seconds: f64,
    /// What part of that is given back.
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

    /// Its share against that of a pass of priority 0: each step doubles it.
    fn weight(&self) -> f64 {
        f64::from(self.record.priority).exp2()
    }

    /// Seconds of cores that a batch takes, as far as that is known.
    fn cost(&self) -> f64 {
        self.per_id.unwrap_or(0.0) * f64::from(self.record.batch_ids)
    }

    /// Whether it may be drawn from now. A host has one batch at a time of a pass with a rate, and two of a pass whose
    /// ids ask for another attempt: what they need is away, and further ids would only use up their attempts.
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

    /// Takes note of the passes that run now. A new one begins level with the one that is furthest behind.
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

    /// The pass whose turn it is, of those that may have something.
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
            // Nobody else wants anything, or the cost is not known yet.
            None => usize::MAX,
            Some(_) if cost == 0.0 => 1,
            Some(seconds) => (seconds / cost) as usize + 1,
        };
        let long = cost / cores as f64 > LONG.as_secs_f64();
        let ahead = !long || account.pending > TAIL;
        Some(Turn { key: (*key).clone(), record: account.record.clone(), most, ahead })
    }

    /// How long until a pass that had nothing may be asked again.
    pub fn idle_for(&self) -> Duration {
        let now = Instant::now();
        let waits =
            self.open().values().map(|account| account.ask_again.saturating_duration_since(now)).min();
        waits.unwrap_or(IDLE.1).clamp(Duration::from_millis(1), IDLE.1)
    }

    /// Takes note of a draw: how many batches it brought, and how many there are still.
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

    /// Takes note that a pass has no consumer to draw from; whether it is time to say so. A pass that has just begun gets
    /// its consumer a moment after its record.
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

    /// Leaves a pass alone for a while, which gave no answer.
    pub fn put_off(&self, key: &PassId) {
        if let Some(account) = self.open().get_mut(key) {
            account.ask_again = Instant::now() + account.pause.wait();
        }
    }

    /// Charges a pass with a batch that was drawn from it.
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

/// The smallest account of those that had something.
fn least_used(accounts: &BTreeMap<PassId, Account>) -> Option<f64> {
    accounts.values().filter(|account| !account.empty).map(|account| account.used).min_by(f64::total_cmp)
}

impl Charge {
    /// So many of a batch's ids asked for another attempt; the pass is in trouble now, or is no longer, if that is news.
    pub fn attempted(&self, asked: u64, ids: u32) -> Option<bool> {
        let mut accounts = self.shares.open();
        let account = accounts.get_mut(&self.key)?;
        let before = account.is_in_trouble();
        let share = asked as f64 / f64::from(ids.max(1));
        account.trouble += (share - account.trouble) * LATEST_ATTEMPT;
        let now = account.is_in_trouble();
        (before != now).then_some(now)
    }

    /// Replaces what was expected of so many of the batch's ids, of which there are `all`, by what they took.
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

    /// Draws batches one after the other, each of which takes what `cost` says; how much each run got.
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
        assert!(shares.absent(&first) && !shares.absent(&first), "told once in so long");
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
