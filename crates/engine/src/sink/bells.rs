//! Signals between the sink and the sealer of one process, so that the last rows of a pass wait for no timer.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use millstream::names::RunName;
use tokio::sync::Notify;

/// Two signals: one for the sink, one for the sealer. A signal that arrives while its receiver is busy is received
/// later, once.
#[derive(Debug, Default)]
pub(crate) struct Bells {
    computed: Notify,
    landed: Notify,
    runs: Mutex<BTreeSet<RunName>>,
}

impl Bells {
    /// The sealer signals that all batches of a pass are computed: the sink need not wait for more rows.
    pub(crate) fn ring_computed(&self) {
        self.computed.notify_one();
    }

    /// Returns once the sealer has sent that signal.
    pub(crate) async fn computed(&self) {
        self.computed.notified().await;
    }

    /// The sink signals that rows of this run are stored: the sealer may check whether they were the last.
    pub(crate) fn ring_landed(&self, run: &RunName) {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).insert(run.clone());
        self.landed.notify_one();
    }

    /// Waits for stored rows, and returns the runs that have them since the last call.
    pub(crate) async fn landed(&self) -> BTreeSet<RunName> {
        self.landed.notified().await;
        std::mem::take(&mut *self.runs.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_rings_before_it_is_listened_to_is_heard() {
        let bells = Bells::default();
        let (a, b): (RunName, RunName) = ("a".parse().expect("a name"), "b".parse().expect("a name"));
        bells.ring_landed(&b);
        bells.ring_landed(&a);
        bells.ring_landed(&b);
        assert_eq!(bells.landed().await.into_iter().collect::<Vec<_>>(), [a, b]);
        let again = tokio::time::timeout(std::time::Duration::from_millis(1), bells.landed()).await;
        assert!(again.is_err(), "{again:?}");
    }
}
