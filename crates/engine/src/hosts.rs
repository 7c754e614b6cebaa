//! What every process says of itself: a small record in the bucket, every few seconds while it runs.
//!
//! `status` reads them, and so do workers, to know how many share a run's rate limit. A process that ends takes its record
//! away; that of one which was killed is stale soon and removed by a sealer.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use millstream::names::RunName;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;

use crate::broker::host_name;
use crate::error::{Error, full_cause};
use crate::load::{CoreTimes, ProduceTimes, RunShare, SinkTimes};
use crate::records::{Entry, Records, now_ms};
use crate::sink::{LeftPass, WaitingPass};
use crate::stop::Stop;

/// How often a process says what it does.
pub(crate) const REPORT: Duration = Duration::from_secs(3);
/// Time until the first report. A process that ends earlier leaves no record.
const FIRST_REPORT: Duration = Duration::from_millis(200);
/// A record older than this is that of a process which is gone.
const STALE: Duration = Duration::from_secs(12);
/// A sealer purges records older than this.
const GONE: Duration = Duration::from_secs(600);

/// What helps rows that the table does not take.
pub const LEFT_HINT: &str = "`setup` of the build that computed them shows what the table lacks, `setup --yes` changes it; the rows \
                             come again by themselves, within ten minutes";

/// One process at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// Its host.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// What tells it from another process with the same host name and process id, as two containers may have.
    #[serde(default)]
    pub instance: u32,
    /// Milliseconds since 1970 when it began.
    pub started_ms: u64,
    /// The build that it runs.
    #[serde(default)]
    pub build: String,
    /// What it does.
    #[serde(flatten)]
    pub doing: Doing,
}

/// What a process does. Times are of the last seconds (`recent`) and since its start (`total`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Doing {
    /// It computes.
    Work {
        /// Its compute threads.
        cores: usize,
        /// Where their time goes.
        recent: CoreTimes,
        /// Where their time went.
        total: CoreTimes,
        /// What it does for each pass.
        runs: Vec<RunShare>,
        /// Why it draws no batches. `null` where it does.
        #[serde(default)]
        unable: Option<String>,
        /// Subjects of batches that it handed back for its own sake, and how often.
        #[serde(default)]
        returned: BTreeMap<String, i64>,
    },
    /// It stores rows.
    Sink {
        /// Where its time goes.
        recent: SinkTimes,
        /// Where its time went.
        total: SinkTimes,
        /// Rows stored a second.
        rows_per_second: f64,
        /// What stands against rows that the table does not take: builds and columns. `null` where no rows wait for that.
        #[serde(default)]
        left: Option<String>,
        /// The passes whose rows those are, the first of them.
        #[serde(default)]
        left_passes: Vec<LeftPass>,
        /// The passes of the rows that it has in hand.
        #[serde(default)]
        holds: Vec<(String, u32)>,
        /// Passes that its sealer cannot seal, the first of them, and why.
        #[serde(default)]
        waits: Vec<WaitingPass>,
    },
    /// It publishes a run.
    Produce {
        /// The run.
        run: String,
        /// Where its time goes.
        recent: ProduceTimes,
        /// Where its time went.
        total: ProduceTimes,
    },
}

impl HostReport {
    /// Whether both are of one process in one role.
    fn is_of_same(&self, other: &Self) -> bool {
        let process = |report: &Self| (report.pid, report.instance, report.started_ms, report.doing.role());
        self.host == other.host && process(self) == process(other)
    }

    /// Whether this process wrote it, in whichever role.
    pub(crate) fn is_own(&self) -> bool {
        self.instance == instance() && self.pid == std::process::id() && self.host == host_name()
    }

    /// What it does for a pass, if it computes it.
    pub fn share_of(&self, run: &str, pass: u32) -> Option<&RunShare> {
        match &self.doing {
            Doing::Work { runs, .. } => runs.iter().find(|share| share.run == run && share.pass == pass),
            Doing::Sink { .. } | Doing::Produce { .. } => None,
        }
    }

    /// Whether it has rows of a pass in hand.
    pub fn holds(&self, run: &str, pass: u32) -> bool {
        match &self.doing {
            Doing::Sink { holds, .. } => holds.iter().any(|held| (held.0.as_str(), held.1) == (run, pass)),
            Doing::Work { .. } | Doing::Produce { .. } => false,
        }
    }

    /// What stands against rows of a pass that it has handed back.
    pub fn left_of(&self, run: &str, pass: u32) -> Option<&LeftPass> {
        match &self.doing {
            Doing::Sink { left_passes, .. } => {
                left_passes.iter().find(|left| (left.run.as_str(), left.pass) == (run, pass))
            }
            Doing::Work { .. } | Doing::Produce { .. } => None,
        }
    }

    /// Whether it is a worker.
    pub(crate) fn computes(&self) -> bool {
        matches!(self.doing, Doing::Work { .. })
    }

    /// Why it draws no batches, if it should and does not.
    pub fn unable(&self) -> Option<&str> {
        match &self.doing {
            Doing::Work { unable, .. } => unable.as_deref(),
            Doing::Sink { .. } | Doing::Produce { .. } => None,
        }
    }

    /// How often it handed the batch with this subject back for its own sake.
    pub(crate) fn returned(&self, subject: &str) -> i64 {
        match &self.doing {
            Doing::Work { returned, .. } => returned.get(subject).copied().unwrap_or(0),
            Doing::Sink { .. } | Doing::Produce { .. } => 0,
        }
    }

    /// What keeps passes from their seal, as this process found it.
    pub fn waits(&self) -> &[WaitingPass] {
        match &self.doing {
            Doing::Sink { waits, .. } => waits,
            Doing::Work { .. } | Doing::Produce { .. } => &[],
        }
    }

    /// What stands against rows that it has and the table does not take.
    pub fn left(&self) -> Option<&str> {
        match &self.doing {
            Doing::Sink { left, .. } => left.as_deref(),
            Doing::Work { .. } | Doing::Produce { .. } => None,
        }
    }
}

/// The reports with their totals counted from earlier ones, which is what happened in between: services live longer than a
/// run. Processes that said nothing new are left out.
pub fn since(now: &[HostReport], before: &[HostReport]) -> Vec<HostReport> {
    let reports = now.iter().map(|report| {
        let mut report = report.clone();
        if let Some(before) = before.iter().find(|before| before.is_of_same(&report)) {
            report.doing.take_off(&before.doing);
        }
        report
    });
    reports.filter(|report| report.doing.seconds() > 0.0).collect()
}

impl Doing {
    /// Counts its total from an earlier one.
    fn take_off(&mut self, before: &Self) {
        match (self, before) {
            (Self::Work { total, .. }, Self::Work { total: before, .. }) => *total = total.since(*before),
            (Self::Sink { total, .. }, Self::Sink { total: before, .. }) => *total = total.since(*before),
            (Self::Produce { total, .. }, Self::Produce { total: before, .. }) => {
                *total = total.since(*before)
            }
            _ => {}
        }
    }

    /// All that its total comes to.
    fn seconds(&self) -> f64 {
        match self {
            Self::Work { total, .. } => total.all,
            Self::Sink { total, .. } => total.all,
            Self::Produce { total, .. } => total.all,
        }
    }

    pub(crate) fn role(&self) -> &'static str {
        match self {
            Self::Work { .. } => "work",
            Self::Sink { .. } => "sink",
            Self::Produce { .. } => "produce",
        }
    }
}

/// A number that tells this process from others whose hosts have one name and which have one process id, as in containers.
pub(crate) fn instance() -> u32 {
    static INSTANCE: LazyLock<u32> = LazyLock::new(|| RandomState::new().hash_one(now_ms()) as u32);
    *INSTANCE
}

/// Reports what `look` says until taking stops, then takes the record away.
pub(crate) async fn report(records: &Records, build: &str, stop: &Stop, mut look: impl FnMut() -> Doing) {
    let (host, pid, started_ms) = (host_name(), std::process::id(), now_ms());
    let (mut key, mut pause) = (None, FIRST_REPORT);
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = REPORT,
            () = stop.no_more_taking() => break,
        }
        let (host, build, doing) = (host.clone(), build.to_owned(), look());
        let report = HostReport { host, pid, instance: instance(), started_ms, build, doing };
        let key = key.get_or_insert_with(|| records.host_key(report.doing.role(), &report.host, pid));
        if let Err(error) = records.put_host(key, &report).await {
            tracing::debug!(error = full_cause(&error), "what this process does could not be reported");
        }
    }
    if let Some(key) = key
        && let Err(error) = records.remove_host(&key).await
    {
        tracing::debug!(error = full_cause(&error), "this process's record is left to be removed");
    }
}

/// Processes that are alive, in order of their role and host.
///
/// # Errors
/// The broker's.
pub async fn alive(records: &Records) -> Result<Vec<HostReport>, Error> {
    let mut alive: Vec<HostReport> = fresh(records).await?.map(|(_, entry)| entry.record).collect();
    alive.sort_by(|a, b| (a.doing.role(), &a.host, a.pid).cmp(&(b.doing.role(), &b.host, b.pid)));
    Ok(alive)
}

/// How many other sinks that are alive come before this process to a pass, whose rows each of them could prove. The order is
/// another for each pass.
///
/// # Errors
/// The broker's.
pub(crate) async fn sinks_before(records: &Records, run: &RunName, pass: u32) -> Result<u64, Error> {
    let place = |host: &str, pid: u32, instance: u32| {
        let process = format!("{host}/{pid}/{instance}");
        (XxHash64::oneshot(u64::from(pass), format!("{run} {process}").as_bytes()), process)
    };
    let own = place(&host_name(), std::process::id(), instance());
    let alive = fresh(records).await?.map(|(_, entry)| entry.record);
    let sinks = alive.filter(|report| matches!(report.doing, Doing::Sink { .. }));
    Ok(sinks.filter(|sink| place(&sink.host, sink.pid, sink.instance) < own).count() as u64)
}

/// What processes that are alive said, by key. When they said it, and what the time is, is by the server's clock.
async fn fresh(records: &Records) -> Result<impl Iterator<Item = (String, Entry<HostReport>)>, Error> {
    let (reports, now_ms) = (records.hosts().await?, records.server_ms().await?);
    Ok(reports.into_iter().filter(move |(_, entry)| is_fresh(entry.written_ms, now_ms)))
}

/// The same of sinks alone.
async fn fresh_sinks(records: &Records) -> Result<impl Iterator<Item = (String, Entry<HostReport>)>, Error> {
    Ok(fresh(records).await?.filter(|(_, entry)| matches!(entry.record.doing, Doing::Sink { .. })))
}

/// Whether a process that wrote its record then counts as alive now, by one clock.
fn is_fresh(written_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(written_ms) < STALE.as_millis() as u64
}

/// Whether no sink that is alive has rows of a pass in hand, by reports that were all written after this moment: what a sink has
/// drawn since its report is in none.
///
/// # Errors
/// The broker's.
pub(crate) async fn none_holds(
    records: &Records,
    (run, pass): (&str, u32),
    since_ms: u64,
) -> Result<bool, Error> {
    let mut sinks = fresh_sinks(records).await?;
    Ok(sinks.all(|(_, entry)| entry.written_ms > since_ms && !entry.record.holds(run, pass)))
}

/// Whether a sink has rows of a pass in hand by the report that it makes next. One that makes none for as long as that counts is
/// gone.
///
/// # Errors
/// The broker's.
pub(crate) async fn holds_soon(records: &Records, (run, pass): (&str, u32)) -> Result<bool, Error> {
    let sinks = async || Ok::<HashMap<_, _>, Error>(fresh_sinks(records).await?.collect());
    let (first, begun) = (sinks().await?, Instant::now());
    loop {
        let now = sinks().await?;
        if now.values().any(|entry| entry.record.holds(run, pass)) {
            return Ok(true);
        }
        let is_old = |(key, entry): (&String, &Entry<HostReport>)| {
            now.get(key).is_some_and(|now| now.revision == entry.revision)
        };
        if !first.iter().any(is_old) || begun.elapsed() >= STALE {
            return Ok(false);
        }
        tokio::time::sleep(REPORT / 6).await;
    }
}

/// How often processes of this fleet handed the batch with this subject back for their own sake, as far as they said so.
pub(crate) async fn returned(records: &Records, subject: &str) -> i64 {
    match records.hosts().await {
        Ok(entries) => entries.iter().map(|(_, entry)| entry.record.returned(subject)).sum(),
        // A batch that is computed one id at a time takes longer, and comes to the same.
        Err(_) => 0,
    }
}

/// Purges the records of processes that are gone.
///
/// # Errors
/// The broker's.
pub(crate) async fn sweep(records: &Records) -> Result<(), Error> {
    let now_ms = records.server_ms().await?;
    records.sweep_hosts(now_ms.saturating_sub(GONE.as_millis() as u64)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sink(pid: u32, total: [f64; 3]) -> HostReport {
        let doing = Doing::Sink {
            recent: SinkTimes::default(),
            total: total.into(),
            rows_per_second: 0.0,
            left: None,
            left_passes: Vec::new(),
            holds: Vec::new(),
            waits: Vec::new(),
        };
        HostReport { host: "a".into(), pid, instance: 7, started_ms: 5, build: String::new(), doing }
    }

    #[test]
    fn a_process_is_alive_until_it_has_been_silent_for_long() {
        let now = 1_795_621_875_015;
        for (written_ms, fresh) in
            [(now, true), (now - 11_999, true), (now - 12_000, false), (now + 500, true)]
        {
            assert_eq!(is_fresh(written_ms, now), fresh, "{written_ms}");
        }
    }

    #[test]
    fn what_happened_in_between_is_told_from_what_was_before() {
        let before = [sink(1, [100.0, 1.0, 2.0]), sink(2, [50.0, 0.0, 0.0])];
        let now = [sink(1, [100.5, 1.0, 6.0]), sink(2, [50.0, 0.0, 0.0]), sink(3, [1.0, 0.0, 0.0])];
        assert_eq!(since(&now, &before), [sink(1, [0.5, 0.0, 4.0]), sink(3, [1.0, 0.0, 0.0])]);
        assert_eq!(since(&now, &[]), now);
        let twin = HostReport { instance: 8, ..sink(1, [100.0, 1.0, 2.0]) };
        assert_eq!(
            since(std::slice::from_ref(&twin), &before),
            std::slice::from_ref(&twin),
            "process 1 of another container"
        );
    }
}
