//! Rows that the table does not take, and why: reported to the fleet and to a rebuild.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::group::GroupKey;
use crate::model::host::{Cause, LeftPass};

/// Extra time after the announced redelivery; then another sink has presumably stored the rows.
const LATER: Duration = Duration::from_secs(30);
/// A report is a small record: most characters of it about waiting rows.
const REPORT_CHARS: usize = 1000;
/// Most passes in a report, and most characters for each.
const REPORT_PASSES: (usize, usize) = (100, 500);

/// Why rows were returned: the key of waiting rows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    cause: Cause,
    /// The fingerprint of the rows' schema.
    schema: u64,
    run: String,
    pass: u32,
}

/// Reasons for rows that were returned and have not been redelivered since.
#[derive(Debug, Default)]
pub struct Left(Mutex<BTreeMap<Kind, Waiting>>);

#[derive(Debug)]
struct Waiting {
    until: Instant,
    why: String,
}

impl Left {
    /// Notes that rows were returned for this delay.
    pub(super) fn note(&self, key: &GroupKey, cause: Cause, why: String, delay: Duration) {
        let until = Instant::now() + delay + LATER;
        let kind = Kind { cause, schema: key.schema, run: key.pass.run.to_string(), pass: key.pass.pass };
        let mut waiting = self.waiting();
        let before = waiting.get(&kind).map_or(until, |before| before.until);
        waiting.insert(kind, Waiting { until: until.max(before), why });
    }

    /// Notes that the table takes rows of this schema.
    pub(super) fn fits(&self, schema: u64) {
        self.waiting().retain(|kind, _| kind.cause != Cause::Columns || kind.schema != schema);
    }

    /// Why rows wait: each text once.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.current(|_, waiting| waiting.why.clone());
        faults.sort_unstable();
        faults.dedup();
        faults
    }

    /// The passes whose rows wait.
    pub(super) fn passes(&self) -> Vec<LeftPass> {
        let mut passes = self.current(|kind, waiting| {
            let why = waiting.why.chars().take(REPORT_PASSES.1).collect();
            LeftPass { run: kind.run.clone(), pass: kind.pass, cause: kind.cause, why }
        });
        passes.truncate(REPORT_PASSES.0);
        passes
    }

    /// The results of `each` for rows whose redelivery is still expected.
    fn current<T>(&self, each: impl Fn(&Kind, &Waiting) -> T) -> Vec<T> {
        let mut waiting = self.waiting();
        let now = Instant::now();
        waiting.retain(|_, waiting| waiting.until > now);
        waiting.iter().map(|(kind, waiting)| each(kind, waiting)).collect()
    }

    /// The reasons in one text, shortened; `None` if no rows wait.
    pub(super) fn told(&self) -> Option<String> {
        let text = self.faults().join("; ");
        match text.char_indices().nth(REPORT_CHARS) {
            _ if text.is_empty() => None,
            Some((end, _)) => Some(format!("{}…", &text[..end])),
            None => Some(text),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<Kind, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use millstream::names::PassId;

    use super::*;

    #[test]
    fn what_waits_is_reported_until_the_table_takes_it() {
        let left = Left::default();
        let key =
            |pass, schema| GroupKey { pass: PassId { run: "a".parse().expect("a name"), pass }, schema };
        assert_eq!(left.told(), None);
        left.note(&key(1, 1), Cause::Columns, "no column `a`".into(), Duration::from_secs(600));
        left.note(&key(1, 1), Cause::Columns, "no column `b`".into(), Duration::from_secs(60));
        left.note(&key(1, 1), Cause::Refused, "code 469".into(), Duration::from_secs(60));
        left.note(&key(2, 1), Cause::Refused, "code 469".into(), Duration::from_secs(60));
        assert_eq!(left.told().as_deref(), Some("code 469; no column `b`"));
        left.fits(1);
        assert_eq!(left.faults(), ["code 469"]);
        let passes = left.passes();
        assert_eq!(
            passes.iter().map(|left| (left.pass, left.cause)).collect::<Vec<_>>(),
            [(1, Cause::Refused), (2, Cause::Refused)]
        );
        left.note(&key(1, 2), Cause::Columns, "ö".repeat(5000), Duration::ZERO);
        assert_eq!(left.told().map(|text| text.chars().count()), Some(REPORT_CHARS + 1));
    }
}
