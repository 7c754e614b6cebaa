//! Batch size control: whether batches still have the right size while their run is computed, measured from the
//! producer.
//!
//! A host holds the batch that it works on and as much again, unless few long batches are left. So a fully busy host
//! works on a batch for half or all of the time that it holds it. That time follows from how many batches are held and
//! how many are finished (Little's law, <https://doi.org/10.1287/opre.9.3.383>). The number of hosts does not matter.

use std::time::{Duration, Instant};

use millstream::MAX_BATCH_IDS;
use millstream::names::RunName;

use crate::error::full_cause;
use crate::model::record::Published;
use crate::nats::broker::Broker;
use crate::produce::sample::TARGET;
use crate::work::schedule::{LONG, TAIL};

/// How often the producer measures the workers.
const EVERY: Duration = Duration::from_secs(5);
/// Batches finished between two measurements that suffice for a verdict.
const ENOUGH: u64 = 8;
/// A size changes only when it is this many times too large or too small.
const WORTHWHILE: f64 = 2.0;
const AT_ONCE: f64 = 8.0;

/// Measurement: workers of a pass at one moment, and what was published by then.
#[derive(Debug, Clone, Copy)]
struct Measurement {
    at: Instant,
    /// Batches that no worker has pulled.
    pending: u64,
    /// Batches that workers hold.
    held: u64,
    /// Batches published.
    batches: u64,
    /// Ids published.
    ids: u64,
}

impl Measurement {
    fn done(&self) -> u64 {
        self.batches.saturating_sub(self.pending + self.held)
    }

    /// Whether every host is fully busy.
    fn is_busy(&self) -> bool {
        self.pending > 0 && self.held > 0
    }
}

/// Controls the batch size.
#[derive(Debug)]
pub(crate) struct Pace {
    size: u32,
    last: Option<Measurement>,
    next: Instant,
}

impl Pace {
    /// Begins with this size.
    pub fn new(size: u32) -> Self {
        Self { size, last: None, next: Instant::now() }
    }

    /// Measures the workers from time to time; returns a new batch size if it should change.
    pub async fn look(&mut self, broker: &Broker, run: &RunName, published: &Published) -> Option<u32> {
        let at = Instant::now();
        if at < self.next {
            return None;
        }
        self.next = at + EVERY;
        let info = match broker.work_progress(&run.pass(1)).await {
            Ok(info) => info?,
            Err(error) => {
                tracing::debug!(%run, error = full_cause(&error), "workers not measured: batches keep their size for now");
                return None;
            }
        };
        let pending = info.num_pending;
        let held = info.num_ack_pending as u64;
        let batches = u64::from(published.batches);
        let ids = published.ids;
        let now = Measurement { at, pending, held, batches, ids };
        let size = self.judge(&now)?;
        tracing::info!(%run, ids = size, "batch size changed: the measured cost per id changed");
        Some(size)
    }

    /// Sets the size, and forgets earlier measurements.
    pub fn resize(&mut self, size: u32) {
        (self.size, self.last) = (size, None);
    }

    fn judge(&mut self, now: &Measurement) -> Option<u32> {
        let before = match self.last {
            Some(before) if before.is_busy() && now.is_busy() => before,
            _ => {
                self.last = Some(*now);
                return None;
            }
        };
        // Slow batches need several measurements.
        let seconds = seconds_of_host(&before, now)?;
        self.last = Some(*now);
        let size = better(self.size, seconds, &before, now)?;
        self.resize(size);
        Some(size)
    }
}

/// Seconds that one host works on a batch, from two measurements at which all hosts were busy; `None` while too few
/// batches are finished.
fn seconds_of_host(before: &Measurement, now: &Measurement) -> Option<f64> {
    let done = now.done().saturating_sub(before.done());
    if done < ENOUGH {
        return None;
    }
    let held = (before.held + now.held) as f64 / 2.0;
    let seconds_held = (now.at - before.at).as_secs_f64() * held / done as f64;
    let ahead = before.pending.max(now.pending) > TAIL || seconds_held / 2.0 <= LONG.as_secs_f64();
    Some(if ahead { seconds_held / 2.0 } else { seconds_held })
}

/// The size at which a host works for [`TARGET`] on a batch, if it differs enough from `size`.
fn better(size: u32, seconds: f64, before: &Measurement, now: &Measurement) -> Option<u32> {
    // Batches that lingered are smaller than allowed.
    let ids = (now.ids - before.ids) as f64 / (now.batches - before.batches).max(1) as f64;
    let size = f64::from(size);
    let better = ids / seconds * TARGET.as_secs_f64();
    let better = better.clamp(size / AT_ONCE, size * AT_ONCE).clamp(1.0, f64::from(MAX_BATCH_IDS)).round();
    (better >= size * WORTHWHILE || better <= size / WORTHWHILE).then_some(better as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two measurements ten seconds apart, with `done` batches of 100 ids finished between them.
    fn measurements(held: u64, pending: u64, done: u64) -> (Measurement, Measurement) {
        let at = Instant::now();
        let before = Measurement { at, pending, held, batches: 1000 + pending + held, ids: 0 };
        let batches = before.batches + done;
        (before, Measurement { at: at + Duration::from_secs(10), batches, ids: done * 100, ..before })
    }

    #[test]
    fn the_time_of_a_host_does_not_depend_on_how_many_there_are() {
        // A host that works for 1 s on a batch finishes ten in ten seconds, and holds two.
        for hosts in [2, 10, 400] {
            let (before, now) = measurements(hosts * 2, 100, hosts * 10);
            assert_eq!(seconds_of_host(&before, &now), Some(1.0), "{hosts} hosts");
            // Near the end a host holds only what it works on: five batches, for 2 s each.
            let (before, now) = measurements(hosts, TAIL, hosts * 5);
            assert_eq!(seconds_of_host(&before, &now), Some(2.0), "{hosts} hosts");
        }
    }

    fn judged(size: u32, (before, now): (Measurement, Measurement)) -> Option<u32> {
        let mut pace = Pace::new(size);
        assert_eq!(pace.judge(&before), None);
        pace.judge(&now)
    }

    #[test]
    fn sizes_follow_the_costs() {
        // 2 s, 1 s, 0.1 s and a moment.
        let sizes = [20, 40, 400, 400_000].map(|done| judged(100, measurements(8, 100, done)));
        assert_eq!(sizes, [None, Some(200), Some(800), Some(800)]);
        assert_eq!(judged(100, measurements(80, 100, 50)), Some(25));
        // Batches of a tenth of their size lingered.
        assert_eq!(judged(1000, measurements(8, 100, 20)), Some(125));
        assert_eq!(judged(1, measurements(8, 100, 20)), Some(8));
    }

    #[test]
    fn idle_hosts_and_few_batches_say_nothing() {
        for (held, pending, done) in [(8, 0, 1000), (0, 100, 1000), (8, 100, 7)] {
            assert_eq!(judged(100, measurements(held, pending, done)), None, "{held} {pending} {done}");
        }
    }

    #[test]
    fn slow_batches_are_judged_over_several_measurements() {
        let (before, now) = measurements(80, 100, 5);
        let mut pace = Pace::new(100);
        assert_eq!([before, now].map(|look| pace.judge(&look)), [None, None]);
        let later = Measurement {
            at: now.at + Duration::from_secs(10),
            batches: now.batches + 5,
            ids: now.ids + 500,
            ..now
        };
        // 40 s, of which one change corrects at most a factor of eight.
        assert_eq!(pace.judge(&later), Some(13));
    }
}
