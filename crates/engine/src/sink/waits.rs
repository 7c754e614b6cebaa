//! Passes that this process's sealer cannot seal, and why; reported to the fleet with the sink's heartbeat.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream::names::PassId;

use crate::model::host::WaitingPass;

/// Most passes in a report, and most characters for each.
const REPORTED: (usize, usize) = (50, 1000);

/// Why passes are not sealed.
#[derive(Debug, Default)]
pub struct Waits(Mutex<BTreeMap<PassId, String>>);

impl Waits {
    /// Notes that a pass waits for an operator; `true` if the reason is new.
    pub(crate) fn note(&self, pass: &PassId, why: &str) -> bool {
        let why: String = why.chars().take(REPORTED.1).collect();
        let before = self.waits().insert(pass.clone(), why.clone());
        before.as_ref() != Some(&why)
    }

    /// Notes that the pass no longer waits.
    pub(crate) fn clear(&self, pass: &PassId) {
        self.waits().remove(pass);
    }

    /// How many passes wait.
    pub(crate) fn count(&self) -> usize {
        self.waits().len()
    }

    /// The first waiting passes.
    pub fn told(&self) -> Vec<WaitingPass> {
        let waits = self.waits();
        let reported = waits.iter().take(REPORTED.0);
        reported
            .map(|(PassId { run, pass }, why)| WaitingPass {
                run: run.to_string(),
                pass: *pass,
                why: why.clone(),
            })
            .collect()
    }

    fn waits(&self) -> MutexGuard<'_, BTreeMap<PassId, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use millstream::names::RunName;

    use super::*;

    #[test]
    fn a_wait_is_reported_until_it_is_over() {
        let waits = Waits::default();
        let run: RunName = "a".parse().expect("a name");
        assert!(waits.note(&run.pass(1), "merges are stopped"));
        assert!(!waits.note(&run.pass(1), "merges are stopped"));
        assert!(waits.note(&run.pass(1), &"x".repeat(5000)));
        assert_eq!(waits.told().iter().map(|wait| wait.why.len()).collect::<Vec<_>>(), [REPORTED.1]);
        waits.clear(&run.pass(1));
        assert!(waits.told().is_empty());
    }
}
