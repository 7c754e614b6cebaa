//! Rows that the table does not take: what stands against them, told to the fleet and to a rebuild.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much later than announced rows may come again before it is taken that another sink has stored them.
const LATER: Duration = Duration::from_secs(30);
/// A report is a small record: so many symbols of it are about rows that wait.
const TOLD: usize = 1000;

/// Why rows were handed back, by the fingerprint of their schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// The table lacks columns of theirs, or has them with other types.
    Columns(u64),
    /// ClickHouse refuses rows of columns that fit.
    Refused(u64),
}

/// What stands against rows that were handed back and have not come again since.
#[derive(Debug, Default)]
pub struct Left(Mutex<BTreeMap<Cause, Waiting>>);

#[derive(Debug)]
struct Waiting {
    until: Instant,
    why: String,
}

impl Left {
    /// Rows were handed back for this long.
    pub(super) fn note(&self, cause: Cause, why: String, delay: Duration) {
        let until = Instant::now() + delay + LATER;
        let mut waiting = self.waiting();
        let before = waiting.get(&cause).map_or(until, |before| before.until);
        waiting.insert(cause, Waiting { until: until.max(before), why });
    }

    /// The table takes rows of this schema.
    pub(super) fn fits(&self, schema: u64) {
        self.waiting().remove(&Cause::Columns(schema));
    }

    /// What stands against rows that wait: one text for each build and cause.
    pub fn faults(&self) -> Vec<String> {
        let mut waiting = self.waiting();
        let now = Instant::now();
        waiting.retain(|_, waiting| waiting.until > now);
        waiting.values().map(|waiting| waiting.why.clone()).collect()
    }

    /// The same in one text, shortened; `None` where no rows wait.
    pub(super) fn told(&self) -> Option<String> {
        let told = self.faults().join("; ");
        match told.char_indices().nth(TOLD) {
            _ if told.is_empty() => None,
            Some((end, _)) => Some(format!("{}…", &told[..end])),
            None => Some(told),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<Cause, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_told_until_the_table_takes_it() {
        let left = Left::default();
        assert_eq!(left.told(), None);
        left.note(Cause::Columns(1), "no column `a`".into(), Duration::from_secs(600));
        left.note(Cause::Columns(1), "no column `b`".into(), Duration::from_secs(60));
        left.note(Cause::Refused(1), "code 469".into(), Duration::from_secs(60));
        assert_eq!(left.told().as_deref(), Some("no column `b`; code 469"));
        left.fits(1);
        assert_eq!(left.faults(), ["code 469"]);
        left.note(Cause::Columns(2), "ö".repeat(5000), Duration::ZERO);
        assert_eq!(left.told().map(|told| told.chars().count()), Some(TOLD + 1));
    }
}
