//! Whether this host can compute, and so may pull batches: proven before the first pull, and again after each failure
//! of its own.
//!
//! No batch is to blame if a host cannot compute (no threads, a missing model). The worker returns such a batch to the
//! stream, and that delivery does not count as a failure of the batch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream::Id;
use tokio::sync::watch;

use crate::compute::{Cores, Function};
use crate::error::{Code, Error, full_cause};
use crate::fleet::times::WorkLoad;
use crate::retry::Backoff;
use crate::stop::Stop;
use crate::telemetry::metrics::Metrics;
use crate::work::plan::WorkPlan;

/// Waits between two proofs.
const PROVE_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How many returned batches are remembered.
const REMEMBERED: usize = 256;

/// Proves that this host can compute, as a worker does before it pulls, and leaves nothing behind.
///
/// # Errors
/// Why the host cannot compute: [`Error::Child`], [`Error::Start`], [`Error::Pool`].
pub async fn prove<I: Id>(function: &Function<I>, plan: &WorkPlan) -> Result<(), Error> {
    let WorkPlan { threads, place, limits, .. } = plan.clone();
    let load = Arc::new(WorkLoad::new(threads));
    Cores::start(function.clone(), threads, place, limits, Metrics::default(), load)?.ready().await
}

/// Whether this host can compute. Clones share the state.
#[derive(Debug, Clone)]
pub(crate) struct Able {
    /// Why the host cannot compute.
    why: Arc<watch::Sender<Option<String>>>,
    /// Why the host should not compute, although it can.
    barred: Arc<watch::Sender<Option<String>>>,
    /// Subjects of batches that were returned because of this host, and how often.
    returned: Arc<Mutex<BTreeMap<String, i64>>>,
}

impl Able {
    /// The initial state: nothing is proven yet.
    pub fn new() -> Self {
        let (why, _) = watch::channel(Some("it is getting ready".to_owned()));
        let (barred, _) = watch::channel(None);
        Self { why: Arc::new(why), barred: Arc::new(barred), returned: Arc::default() }
    }

    /// Why this host pulls no batches; `None` if it pulls them.
    pub fn why(&self) -> Option<String> {
        self.why.borrow().clone().or_else(|| self.barred.borrow().clone())
    }

    /// Waits until the host can compute, and should.
    pub async fn once_able(&self) {
        while self.why().is_some() {
            until(&self.why, Option::is_none).await;
            until(&self.barred, Option::is_none).await;
        }
    }

    /// Waits until the host cannot compute, or should not.
    pub async fn once_unable(&self) {
        tokio::select! {
            () = until(&self.why, Option::is_some) => {}
            () = until(&self.barred, Option::is_some) => {}
        }
    }

    /// Bars the host from pulling, for this reason; `None` allows it again.
    pub fn bar(&self, why: Option<String>) {
        self.barred.send_replace(why);
    }

    /// Waits until the host's ability is in doubt.
    async fn once_unproven(&self) {
        until(&self.why, Option::is_some).await;
    }

    /// Notes that a batch was returned because this host could not compute it.
    pub fn failed(&self, subject: &str, why: String) {
        let mut returned = self.returned();
        *returned.entry(subject.to_owned()).or_default() += 1;
        if returned.len() > REMEMBERED {
            returned.pop_first();
        }
        drop(returned);
        self.why.send_replace(Some(why));
    }

    /// How often batches were returned because of this host.
    pub fn returns(&self) -> BTreeMap<String, i64> {
        self.returned().clone()
    }

    fn returned(&self) -> MutexGuard<'_, BTreeMap<String, i64>> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proves that `cores` can compute, now and whenever that is in doubt, until the worker stops pulling.
    pub async fn keep<I: Id>(&self, cores: &Cores<I>, stop: &Stop) {
        let mut pause = Backoff::new(PROVE_AGAIN.0, PROVE_AGAIN.1);
        let mut failed = false;
        loop {
            tokio::select! {
                () = self.once_unproven() => {}
                () = stop.no_more_taking() => return,
            }
            let proof = tokio::select! {
                proof = cores.ready() => proof,
                () = stop.no_more_taking() => return,
            };
            let Err(error) = proof else {
                if std::mem::take(&mut failed) {
                    tracing::info!("this host can compute again: it pulls batches");
                }
                pause.reset();
                self.why.send_replace(None);
                continue;
            };
            failed = true;
            let wait = pause.wait();
            self.say(&error, wait);
            self.why.send_replace(Some(full_cause(&error)));
            if !stop.rest(wait).await {
                return;
            }
        }
    }

    fn say(&self, error: &Error, wait: Duration) {
        let hint = error.hint().unwrap_or_default();
        let error = full_cause(error);
        let again_in = wait.as_secs_f32();
        tracing::error!(
            error,
            hint,
            again_in,
            code = %Code::HostUnable,
            "this host cannot compute: it draws no batches until a new attempt succeeds"
        );
    }
}

/// Waits until a reason is as wanted. The caller keeps the sender open meanwhile.
async fn until(reason: &watch::Sender<Option<String>>, wanted: fn(&Option<String>) -> bool) {
    let mut reason = reason.subscribe();
    drop(reason.wait_for(wanted).await);
}
