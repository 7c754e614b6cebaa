//! Whether this host can compute, and so may draw batches: proven before the first, and again after each failure of its own.
//!
//! What keeps a host from computing (no threads, a model that is missing) is never a batch's fault. The batch is handed back
//! for others, and that delivery does not count when it is judged how often a batch was given up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millstream::Id;
use tokio::sync::watch;

use crate::compute::{Cores, Function};
use crate::error::{Code, Error, full_cause};
use crate::fleet::times::WorkLoad;
use crate::model::counts::WorkCounts;
use crate::retry::Backoff;
use crate::stop::Stop;
use crate::work::plan::WorkPlan;

/// Waits between two proofs.
const PROVE_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The batches remembered that were handed back for this host's sake.
const REMEMBERED: usize = 256;

/// Proves that this host can compute as a worker does before it draws, and leaves nothing behind.
///
/// # Errors
/// Why it cannot: [`Error::Child`], [`Error::Start`], [`Error::Pool`].
pub async fn prove<I: Id>(function: &Function<I>, plan: &WorkPlan) -> Result<(), Error> {
    let WorkPlan { threads, place, limits, .. } = plan.clone();
    let (counts, load) = (Arc::<WorkCounts>::default(), Arc::new(WorkLoad::new(threads)));
    Cores::start(function.clone(), threads, place, limits, counts, load)?.ready().await
}

/// Whether this host can compute. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Able {
    /// Why it cannot.
    why: Arc<watch::Sender<Option<String>>>,
    /// Why it should not, though it can.
    barred: Arc<watch::Sender<Option<String>>>,
    /// Subjects of batches that were handed back because of it, and how often.
    returned: Arc<Mutex<BTreeMap<String, i64>>>,
}

impl Able {
    /// Nothing is proven yet.
    pub fn new() -> Self {
        let (why, _) = watch::channel(Some("it is getting ready".to_owned()));
        let (barred, _) = watch::channel(None);
        Self { why: Arc::new(why), barred: Arc::new(barred), returned: Arc::default() }
    }

    /// Why it draws nothing; `None` where it does.
    pub fn why(&self) -> Option<String> {
        self.why.borrow().clone().or_else(|| self.barred.borrow().clone())
    }

    /// Waits until it can compute, and should.
    pub async fn once_able(&self) {
        while self.why().is_some() {
            until(&self.why, Option::is_none).await;
            until(&self.barred, Option::is_none).await;
        }
    }

    /// Waits until it cannot, or should not.
    pub async fn once_unable(&self) {
        tokio::select! {
            () = until(&self.why, Option::is_some) => {}
            () = until(&self.barred, Option::is_some) => {}
        }
    }

    /// It should draw nothing, for this reason; or may again.
    pub fn bar(&self, why: Option<String>) {
        self.barred.send_replace(why);
    }

    /// Waits until it is not known whether it can compute.
    async fn once_unproven(&self) {
        until(&self.why, Option::is_some).await;
    }

    /// A batch could not be computed because of this host, and is handed back.
    pub fn failed(&self, subject: &str, why: String) {
        let mut returned = self.returned();
        *returned.entry(subject.to_owned()).or_default() += 1;
        if returned.len() > REMEMBERED {
            returned.pop_first();
        }
        drop(returned);
        self.why.send_replace(Some(why));
    }

    /// How often batches were handed back because of this host.
    pub fn returns(&self) -> BTreeMap<String, i64> {
        self.returned().clone()
    }

    fn returned(&self) -> MutexGuard<'_, BTreeMap<String, i64>> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proves that `cores` can compute, now and whenever that is in doubt, until taking stops.
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
                    tracing::info!("this host can compute again, and draws batches");
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
        let (hint, error, again_in) =
            (error.hint().unwrap_or_default(), full_cause(error), wait.as_secs_f32());
        tracing::error!(
            error,
            hint,
            again_in,
            code = %Code::HostUnable,
            "this host cannot compute: it draws no batches, and tries again"
        );
    }
}

/// Waits until a reason is as wanted. Its sender is never closed while it is waited for.
async fn until(reason: &watch::Sender<Option<String>>, wanted: fn(&Option<String>) -> bool) {
    let mut reason = reason.subscribe();
    drop(reason.wait_for(wanted).await);
}
