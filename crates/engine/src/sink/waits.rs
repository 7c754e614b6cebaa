//! What keeps passes from their seal, as the sealer of this process found it: told to the fleet with what the sink does.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream::names::PassId;

use crate::model::host::WaitingPass;

/// A report is a small record: so many passes are named in it, and of each so many symbols.
const TOLD: (usize, usize) = (50, 1000);

/// What keeps passes from their seal.
#[derive(Debug, Default)]
pub struct Waits(Mutex<BTreeMap<PassId, String>>);

impl Waits {
    /// A pass waits for something that a person has to see to; whether that is another reason than before.
    pub(crate) fn note(&self, pass: &PassId, why: &str) -> bool {
        let why: String = why.chars().take(TOLD.1).collect();
        let before = self.waits().insert(pass.clone(), why.clone());
        before.as_ref() != Some(&why)
    }

    /// It waits no longer.
    pub(crate) fn clear(&self, pass: &PassId) {
        self.waits().remove(pass);
    }

    /// How many passes wait.
    pub(crate) fn count(&self) -> usize {
        self.waits().len()
    }

    /// The first of the passes that wait.
    pub fn told(&self) -> Vec<WaitingPass> {
        let waits = self.waits();
        let told = waits.iter().take(TOLD.0);
        told.map(|(PassId { run, pass }, why)| WaitingPass {
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
    fn a_wait_is_told_until_it_is_over() {
        let waits = Waits::default();
        let run: RunName = "a".parse().expect("a name");
        assert!(waits.note(&run.pass(1), "merges are stopped"));
        assert!(!waits.note(&run.pass(1), "merges are stopped"));
        assert!(waits.note(&run.pass(1), &"x".repeat(5000)));
        assert_eq!(waits.told().iter().map(|wait| wait.why.len()).collect::<Vec<_>>(), [TOLD.1]);
        waits.clear(&run.pass(1));
        assert!(waits.told().is_empty());
    }
}
