//! A host whose ids fail far more often than those of other hosts: a file is missing there, or its CPU lacks an
//! instruction. Failing is fast, so such a host would pull most of a run and produce dead letters.
//!
//! Once more than half of its ids have failed, a host pulls nothing. It resumes if other hosts are no better, or give no
//! results in time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use millstream::names::PassId;
use tokio::sync::{Notify, watch};

use crate::error::Code;
use crate::fleet::heartbeat;
use crate::model::host::HostReport;
use crate::model::record::Open;
use crate::nats::bucket::Records;
use crate::stop::Stop;
use crate::work::able::Able;

/// Ids of a pass that suffice to judge a host.
const ENOUGH: u64 = 20;
/// Share of dead letters from which a host is doubtful.
const DOUBT: f64 = 0.5;
/// Factor by which a host's share of dead letters must exceed that of other hosts.
const FAR_MORE: f64 = 5.0;
/// How long a doubtful host waits for results of other hosts.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a doubtful host reads the others' reports.
const ASK: Duration = Duration::from_secs(1);

/// Ids of a pass, and how many of them became dead letters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fate {
    ids: u64,
    dead: u64,
}

impl Fate {
    fn share(self) -> f64 {
        self.dead as f64 / self.ids.max(1) as f64
    }

    fn is_doubtful(self) -> bool {
        self.ids >= ENOUGH && self.share() > DOUBT
    }

    /// Whether this host's share of dead letters far exceeds the others'; `None` if the others have too few ids.
    fn is_far_more_than(self, others: Self) -> Option<bool> {
        (others.ids >= ENOUGH).then(|| self.share() > others.share() * FAR_MORE)
    }
}

/// Results of this host's ids, and the verdict on this host. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Outlier {
    passes: Arc<Mutex<BTreeMap<PassId, Own>>>,
    doubt: Arc<Notify>,
    able: Able,
}

#[derive(Debug, Default)]
struct Own {
    fate: Fate,
    /// Since when this host has waited for other hosts' results.
    doubtful: Option<Instant>,
    /// Whether the verdict was logged.
    logged: bool,
    /// The host is cleared: other hosts are no better, or gave no results in time.
    cleared: bool,
}

impl Outlier {
    pub fn new(able: Able) -> Self {
        Self { passes: Arc::default(), doubt: Arc::default(), able }
    }

    fn passes(&self) -> MutexGuard<'_, BTreeMap<PassId, Own>> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the result of a batch of a pass.
    pub fn note(&self, key: &PassId, ids: u64, dead: u64) {
        let mut passes = self.passes();
        let own = passes.entry(key.clone()).or_default();
        own.fate = Fate { ids: own.fate.ids + ids, dead: own.fate.dead + dead };
        if own.fate.is_doubtful() && !own.cleared && own.doubtful.is_none() {
            own.doubtful = Some(Instant::now());
            drop(passes);
            self.able.bar(Some("most of its ids fail; it waits for the results of other hosts".to_owned()));
            self.doubt.notify_one();
        }
    }

    /// Judges this host by the results of others, until the worker stops pulling.
    pub async fn judge(&self, records: &Records, open: &watch::Receiver<Open>, stop: &Stop) {
        loop {
            tokio::select! {
                () = self.doubt.notified() => {}
                () = stop.no_more_taking() => return,
            }
            while !self.is_decided(records, open).await {
                if !stop.rest(ASK).await {
                    return;
                }
            }
        }
    }

    /// Checks every doubtful pass; `true` if none is left.
    async fn is_decided(&self, records: &Records, open: &watch::Receiver<Open>) -> bool {
        self.passes().retain(|key, _| open.borrow().contains_key(key));
        let Ok(reports) = heartbeat::alive(records).await else { return false };
        let mut why = None;
        let mut waiting = false;
        for (key, own) in self.passes().iter_mut() {
            let Some(since) = own.doubtful else { continue };
            let (others, there) = fate_elsewhere(&reports, key);
            match own.fate.is_far_more_than(others) {
                Some(true) => {
                    let blame = blame(key, own.fate, others);
                    if !std::mem::replace(&mut own.logged, true) {
                        tracing::error!(why = blame, hint = HINT, code = %Code::HostOutlier, "this host draws no batches");
                    }
                    why = Some(blame);
                }
                None if there && since.elapsed() < PATIENCE => waiting = true,
                _ => (own.doubtful, own.cleared) = (None, true),
            }
        }
        match (why, waiting) {
            (Some(why), _) => {
                self.able.bar(Some(why));
                false
            }
            (None, true) => false,
            (None, false) => {
                self.able.bar(None);
                true
            }
        }
    }
}

const HINT: &str = "find out what differs on this host, then restart its worker; `dead RUN --host NAME` lists its dead letters, \
                    `replay RUN --dead --host NAME` computes them again";

fn blame(PassId { run, .. }: &PassId, own: Fate, others: Fate) -> String {
    format!(
        "its ids fail far more often than those of others: {} of {} here, {} of {} elsewhere, in run `{run}`",
        own.dead, own.ids, others.dead, others.ids
    )
}

/// Results of a pass's ids on other workers, and whether such workers exist.
fn fate_elsewhere(reports: &[HostReport], pass: &PassId) -> (Fate, bool) {
    let mut fate = Fate::default();
    let mut there = false;
    for report in reports.iter().filter(|report| report.computes() && !report.is_own()) {
        there = true;
        if let Some(share) = report.share_of(pass) {
            fate = Fate { ids: fate.ids + share.ids, dead: fate.dead + share.dead };
        }
    }
    (fate, there)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::model::host::host_name;
    use crate::model::host::{Doing, instance};
    use crate::model::times::{CoreTimes, RunShare};

    use super::*;

    /// A worker's report about run `a`.
    fn worker(instance: u32, ids: u64, dead: u64) -> HostReport {
        let share = RunShare {
            run: "a".to_owned(),
            pass: 1,
            ids,
            dead,
            asking: 0,
            why: None,
            ids_per_second: 0.0,
            held: 0,
            oldest_seconds: 0.0,
        };
        let doing = Doing::Work {
            cores: 1,
            recent: CoreTimes::default(),
            total: CoreTimes::default(),
            runs: vec![share],
            unable: None,
            returned: BTreeMap::new(),
        };
        let host = host_name();
        let pid = std::process::id();
        HostReport { host, pid, instance, started_ms: 0, build: String::new(), doing }
    }

    /// Regression: two containers with one host name both had process id 1, and each took the other for itself.
    #[test]
    fn another_container_with_the_same_host_name_and_process_id_is_another_worker() {
        let key = PassId { run: "a".parse().expect("a name"), pass: 1 };
        let reports = [worker(instance(), 30, 30), worker(instance().wrapping_add(1), 100, 1)];
        assert_eq!(fate_elsewhere(&reports, &key), (Fate { ids: 100, dead: 1 }, true));
        assert_eq!(fate_elsewhere(&reports[..1], &key), (Fate::default(), false));
    }

    #[test]
    fn a_host_is_judged_by_what_becomes_of_ids_elsewhere() {
        let fate = |ids, dead| Fate { ids, dead };
        assert!(!fate(19, 19).is_doubtful() && !fate(100, 50).is_doubtful() && fate(20, 20).is_doubtful());
        assert_eq!(fate(20, 20).is_far_more_than(fate(19, 0)), None, "too few to say");
        assert_eq!(fate(20, 20).is_far_more_than(fate(100, 1)), Some(true));
        assert_eq!(fate(20, 20).is_far_more_than(fate(100, 40)), Some(false), "the run is like that");
    }
}
