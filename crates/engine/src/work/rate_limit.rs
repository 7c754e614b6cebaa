//! A run's rate limit, kept by the whole fleet without messages between hosts: each host takes a part of the rate, by
//! its share of all working cores.
//!
//! A new host takes no part of a limited run until every other host has had time to notice it and to reduce its own.
//! The others notice a dead host only after a few seconds. So the fleet may fall below the limit, but does not exceed
//! it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream::names::PassId;

use crate::error::{Error, full_cause};
use crate::fleet::heartbeat::REPORT;
use crate::model::host::Doing;
use crate::nats::bucket::Records;
use crate::stop::Stop;

/// A process without a new heartbeat for so long no longer counts.
const SILENT: Duration = Duration::from_secs(12);
/// Seconds of work in a portion of a limited run's ids.
const PORTION: f64 = 0.25;
/// How often a waiting host checks its part of the rate again.
const POLL: Duration = Duration::from_millis(250);
/// Parts are stored as whole numbers of this many.
const WHOLE: f64 = 1e9;

/// This host's parts of rate limits.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    part: AtomicU64,
    /// When the next id of each pass may begin.
    next: Mutex<HashMap<PassId, Instant>>,
}

/// Workers seen in the bucket.
#[derive(Debug, Default)]
struct Fleet(HashMap<String, Seen>);

#[derive(Debug)]
struct Seen {
    revision: u64,
    cores: usize,
    since: Instant,
}

impl Fleet {
    /// Notes a worker's current record.
    fn note(&mut self, key: String, revision: u64, cores: usize) {
        let seen = Seen { revision, cores, since: Instant::now() };
        match self.0.get_mut(&key) {
            // A new revision is the sign of life, not a time stamp: other hosts' clocks may be wrong.
            Some(known) if known.revision == revision => {}
            Some(known) => *known = seen,
            None => drop(self.0.insert(key, seen)),
        }
    }

    /// Cores of all live workers except `own`.
    fn others(&mut self, own: &str) -> usize {
        self.0.retain(|_, seen| seen.since.elapsed() < SILENT);
        self.0.iter().filter(|(key, _)| *key != own).map(|(_, seen)| seen.cores).sum()
    }
}

impl Rates {
    /// Updates this host's part while `limited` says that a rate limit applies, until the worker stops pulling.
    pub async fn follow(
        &self,
        records: &Records,
        own: (String, usize),
        limited: impl Fn() -> bool,
        stop: &Stop,
    ) {
        let ((own, cores), begun, mut fleet) = (own, Instant::now(), Fleet::default());
        loop {
            if limited() {
                match records.hosts().await {
                    Ok(hosts) => {
                        for (key, entry) in hosts {
                            if let Doing::Work { cores, .. } = entry.record.doing {
                                fleet.note(key, entry.revision, cores);
                            }
                        }
                        let known = begun.elapsed() > REPORT * 2;
                        let part = cores as f64 / (cores + fleet.others(&own)) as f64;
                        let part = if known { part } else { 0.0 };
                        self.part.store((part * WHOLE) as u64, Ordering::Relaxed);
                    }
                    Err(error) => {
                        tracing::warn!(
                            error = full_cause(&error),
                            "heartbeats of other workers not read: this host keeps its part of the rate limit"
                        );
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(REPORT / 2) => {}
                () = stop.no_more_taking() => return,
            }
        }
    }

    /// Ids a second that this host may begin of a run with limit `rate`.
    fn own(&self, rate: u32) -> f64 {
        self.part.load(Ordering::Relaxed) as f64 / WHOLE * f64::from(rate)
    }

    /// Waits until some of `left` ids may begin by the current `rate`; returns how many. Without a limit, all of them
    /// may.
    ///
    /// # Errors
    /// [`Error::Stopped`] once the worker stops pulling.
    pub async fn admit(
        &self,
        key: &PassId,
        rate: impl Fn() -> Option<u32>,
        left: usize,
        stop: &Stop,
    ) -> Result<usize, Error> {
        loop {
            let Some(rate) = rate() else { return Ok(left) };
            let own = self.own(rate);
            let wait =
                if own > 0.0 { self.next_of(key).saturating_duration_since(Instant::now()) } else { POLL };
            if wait.is_zero() {
                let portion = ((own * PORTION) as usize).clamp(1, left.max(1));
                let pause = Duration::from_secs_f64(portion as f64 / own);
                self.next().insert(key.clone(), Instant::now() + pause);
                return Ok(portion);
            }
            tokio::select! {
                // In steps, because the limit or this host's part may change.
                () = tokio::time::sleep(wait.min(POLL)) => {}
                () = stop.no_more_taking() => return Err(Error::Stopped),
            }
        }
    }

    fn next(&self) -> std::sync::MutexGuard<'_, HashMap<PassId, Instant>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_of(&self, key: &PassId) -> Instant {
        self.next().get(key).copied().unwrap_or_else(Instant::now)
    }

    /// Forgets finished passes.
    pub fn retain(&self, is_open: impl Fn(&PassId) -> bool) {
        self.next().retain(|key, _| is_open(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PassId {
        PassId { run: "a".parse().expect("legal"), pass: 1 }
    }

    fn whole() -> Rates {
        let rates = Rates::default();
        rates.part.store(WHOLE as u64, Ordering::Relaxed);
        rates
    }

    #[tokio::test]
    async fn portions_come_at_the_rate() {
        let rates = whole();
        let stop = Stop::new();
        let admit = async |rate, left| rates.admit(&key(), || rate, left, &stop).await.expect("goes on");
        assert_eq!(admit(Some(100), 1000).await, 25);
        assert_eq!(admit(Some(100), 10).await, 10, "no more than are left");
        assert_eq!(admit(Some(1), 1000).await, 1);
    }

    #[tokio::test]
    async fn removing_the_limit_wakes_waiting_workers() {
        let rates = Rates::default();
        let stop = Stop::new();
        let limit = Mutex::new(Some(1));
        let rate = || *limit.lock().expect("no panic");
        let key = key();
        let lift = async {
            tokio::time::sleep(POLL / 2).await;
            *limit.lock().expect("no panic") = None;
        };
        let (admitted, ()) = tokio::join!(rates.admit(&key, rate, 1000, &stop), lift);
        assert_eq!(admitted.expect("goes on"), 1000);
    }

    #[tokio::test]
    async fn without_a_part_nothing_is_admitted() {
        let rates = Rates::default();
        let stop = Stop::new();
        let key = key();
        let waiting = rates.admit(&key, || Some(1000), 10, &stop);
        assert!(tokio::time::timeout(POLL * 2, waiting).await.is_err());
        stop.stop_taking();
        assert!(matches!(rates.admit(&key, || Some(1000), 10, &stop).await, Err(Error::Stopped)));
    }

    #[test]
    fn a_worker_without_a_new_heartbeat_stops_counting() {
        let mut fleet = Fleet::default();
        fleet.note("own".into(), 1, 4);
        fleet.note("other".into(), 2, 12);
        assert_eq!(fleet.others("own"), 12);
        fleet.0.get_mut("other").expect("known").since = Instant::now() - SILENT;
        fleet.note("other".into(), 2, 12);
        assert_eq!(fleet.others("own"), 0, "the same revision is no sign of life");
        fleet.note("other".into(), 3, 12);
        assert_eq!(fleet.others("own"), 12);
    }
}
