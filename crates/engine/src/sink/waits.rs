//! What keeps passes from their seal, as the sealer of this process found it: told to the fleet with what the sink does.

use crate::model::host::WaitingPass;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream::names::RunName;

/// A report is a small record: so many passes are named in it, and of each so many symbols.
const TOLD: (usize, usize) = (50, 1000);

/// What keeps passes from their seal.
#[derive(Debug, Default)]
pub struct Waits(Mutex<BTreeMap<(RunName, u32), String>>);

impl Waits {
    /// A pass waits for something that a person has to see to; whether that is another reason than before.
    pub(crate) fn note(&self, run: &RunName, pass: u32, why: &str) -> bool {
        let why: String = why.chars().take(TOLD.1).collect();
        let before = self.waits().insert((run.clone(), pass), why.clone());
        before.as_ref() != Some(&why)
    }

    /// It waits no longer.
    pub(crate) fn clear(&self, run: &RunName, pass: u32) {
        self.waits().remove(&(run.clone(), pass));
    }

    /// How many passes wait.
    pub(crate) fn count(&self) -> usize {
        self.waits().len()
    }

    /// The first of the passes that wait.
    pub fn told(&self) -> Vec<WaitingPass> {
        let waits = self.waits();
        let told = waits.iter().take(TOLD.0);
        told.map(|((run, pass), why)| WaitingPass { run: run.to_string(), pass: *pass, why: why.clone() })
            .collect()
    }

    fn waits(&self) -> MutexGuard<'_, BTreeMap<(RunName, u32), String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_told_until_it_is_over() {
        let (waits, run) = (Waits::default(), "a".parse().expect("a name"));
        assert!(waits.note(&run, 1, "merges are stopped"));
        assert!(!waits.note(&run, 1, "merges are stopped"));
        assert!(waits.note(&run, 1, &"x".repeat(5000)));
        assert_eq!(waits.told().iter().map(|wait| wait.why.len()).collect::<Vec<_>>(), [TOLD.1]);
        waits.clear(&run, 1);
        assert!(waits.told().is_empty());
    }
}
