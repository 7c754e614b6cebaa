//! Whether batches still have the right size while their run is computed, seen from outside.
//!
//! A host holds what it works on and as much again, unless few long batches are left. So a batch that all hosts' hands are
//! full of is worked on for half of the time that it is held, or all of it, and how long it is held follows from how many
//! are held and how many are done (Little's law, <https://doi.org/10.1287/opre.9.3.383>), however many hosts there are.

use std::time::{Duration, Instant};

use millstream::MAX_BATCH_IDS;
use millstream::names::RunName;

use crate::error::full_cause;
use crate::model::record::Published;
use crate::nats::broker::Broker;
use crate::produce::sample::TARGET;
use crate::work::schedule::{LONG, TAIL};

/// How often workers are looked at.
const EVERY: Duration = Duration::from_secs(5);
/// Batches between two looks that say something.
const ENOUGH: u64 = 8;
/// A size is changed when it is this many times too large or too small, and by no more at once.
const WORTHWHILE: f64 = 2.0;
const AT_ONCE: f64 = 8.0;

/// Workers of a pass at one moment, and what was published by then.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    /// Batches that nobody has taken.
    pending: u64,
    /// Batches that workers hold.
    held: u64,
    /// Batches and ids published.
    batches: u64,
    ids: u64,
}

impl Look {
    fn done(&self) -> u64 {
        self.batches.saturating_sub(self.pending + self.held)
    }

    /// Whether every host has its hands full.
    fn is_busy(&self) -> bool {
        self.pending > 0 && self.held > 0
    }
}

/// Keeps the size of batches.
#[derive(Debug)]
pub(crate) struct Pace {
    size: u32,
    last: Option<Look>,
    next: Instant,
}

impl Pace {
    /// Begins with this size.
    pub fn new(size: u32) -> Self {
        Self { size, last: None, next: Instant::now() }
    }

    /// Looks at the workers once in a while; the size of batches from now on, when it is to be another.
    pub async fn look(&mut self, broker: &Broker, run: &RunName, published: &Published) -> Option<u32> {
        let at = Instant::now();
        if at < self.next {
            return None;
        }
        self.next = at + EVERY;
        let info = match broker.work_progress(&run.pass(1)).await {
            Ok(info) => info?,
            Err(error) => {
                tracing::debug!(%run, error = full_cause(&error), "batches keep their size for now");
                return None;
            }
        };
        let pending = info.num_pending;
        let held = info.num_ack_pending as u64;
        let batches = u64::from(published.batches);
        let ids = published.ids;
        let now = Look { at, pending, held, batches, ids };
        let size = self.judge(&now)?;
        tracing::info!(%run, ids = size, "batches are of another size from now on: ids cost more or less than before");
        Some(size)
    }

    /// Batches are of this size from now on, whatever was seen before.
    pub fn resize(&mut self, size: u32) {
        (self.size, self.last) = (size, None);
    }

    fn judge(&mut self, now: &Look) -> Option<u32> {
        let before = match self.last {
            Some(before) if before.is_busy() && now.is_busy() => before,
            _ => {
                self.last = Some(*now);
                return None;
            }
        };
        // Slow ones take several looks.
        let seconds = seconds_of_host(&before, now)?;
        self.last = Some(*now);
        let size = better(self.size, seconds, &before, now)?;
        self.resize(size);
        Some(size)
    }
}

/// Seconds that one host works on a batch, as seen between two moments at which all were busy; `None` while too little is
/// done.
fn seconds_of_host(before: &Look, now: &Look) -> Option<f64> {
    let done = now.done().saturating_sub(before.done());
    if done < ENOUGH {
        return None;
    }
    let held = (before.held + now.held) as f64 / 2.0;
    let seconds_held = (now.at - before.at).as_secs_f64() * held / done as f64;
    let ahead = before.pending.max(now.pending) > TAIL || seconds_held / 2.0 <= LONG.as_secs_f64();
    Some(if ahead { seconds_held / 2.0 } else { seconds_held })
}

/// The size at which a host works [`TARGET`] on a batch, when it is far enough from this one.
fn better(size: u32, seconds: f64, before: &Look, now: &Look) -> Option<u32> {
    // Batches that lingered are smaller than they may be.
    let ids = (now.ids - before.ids) as f64 / (now.batches - before.batches).max(1) as f64;
    let size = f64::from(size);
    let better = ids / seconds * TARGET.as_secs_f64();
    let better = better.clamp(size / AT_ONCE, size * AT_ONCE).clamp(1.0, f64::from(MAX_BATCH_IDS)).round();
    (better >= size * WORTHWHILE || better <= size / WORTHWHILE).then_some(better as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two looks ten seconds apart, with so many batches of 100 ids done between them.
    fn looks(held: u64, pending: u64, done: u64) -> (Look, Look) {
        let at = Instant::now();
        let before = Look { at, pending, held, batches: 1000 + pending + held, ids: 0 };
        let batches = before.batches + done;
        (before, Look { at: at + Duration::from_secs(10), batches, ids: done * 100, ..before })
    }

    #[test]
    fn the_time_of_a_host_does_not_depend_on_how_many_there_are() {
        // A host that works for 1 s on a batch does ten in ten seconds, and holds two.
        for hosts in [2, 10, 400] {
            let (before, now) = looks(hosts * 2, 100, hosts * 10);
            assert_eq!(seconds_of_host(&before, &now), Some(1.0), "{hosts} hosts");
            // Near the end it holds what it works on alone: five, for 2 s each.
            let (before, now) = looks(hosts, TAIL, hosts * 5);
            assert_eq!(seconds_of_host(&before, &now), Some(2.0), "{hosts} hosts");
        }
    }

    fn judged(size: u32, (before, now): (Look, Look)) -> Option<u32> {
        let mut pace = Pace::new(size);
        assert_eq!(pace.judge(&before), None);
        pace.judge(&now)
    }

    #[test]
    fn sizes_follow_the_costs() {
        // 2 s, 1 s, 0.1 s and a moment.
        let sizes = [20, 40, 400, 400_000].map(|done| judged(100, looks(8, 100, done)));
        assert_eq!(sizes, [None, Some(200), Some(800), Some(800)]);
        assert_eq!(judged(100, looks(80, 100, 50)), Some(25));
        // Batches of a tenth of their size lingered.
        assert_eq!(judged(1000, looks(8, 100, 20)), Some(125));
        assert_eq!(judged(1, looks(8, 100, 20)), Some(8));
    }

    #[test]
    fn free_hands_and_few_batches_say_nothing() {
        for (held, pending, done) in [(8, 0, 1000), (0, 100, 1000), (8, 100, 7)] {
            assert_eq!(judged(100, looks(held, pending, done)), None, "{held} {pending} {done}");
        }
    }

    #[test]
    fn what_takes_long_is_seen_over_several_looks() {
        let (before, now) = looks(80, 100, 5);
        let mut pace = Pace::new(100);
        assert_eq!([before, now].map(|look| pace.judge(&look)), [None, None]);
        let later = Look {
            at: now.at + Duration::from_secs(10),
            batches: now.batches + 5,
            ids: now.ids + 500,
            ..now
        };
        // 40 s, of which an eighth is as much as is changed at once.
        assert_eq!(pace.judge(&later), Some(13));
    }
}
