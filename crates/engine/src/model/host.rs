//! A process of the fleet: who it is, and what it says of itself.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::moment::now_ms;
use super::times::{CoreTimes, ProduceTimes, RunShare, SinkTimes};
/// What helps rows whose columns the table does not have.
const COLUMNS_HINT: &str = "`setup` of the build that computed them shows what the table lacks, `setup --yes` changes it; the rows \
                            come again by themselves, within ten minutes";
/// What helps rows that ClickHouse refuses though their columns fit.
pub(crate) const REFUSED_HINT: &str = "once the table takes them, the rows come again by themselves; where the build that computed \
                                       them is at fault: give the workers a mended one, then `verify RUN --repair --recompute` has \
                                       these ids computed again";

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

/// Why rows were handed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// The table lacks columns of theirs, or has them with other types.
    Columns,
    /// ClickHouse refuses rows of columns that fit.
    Refused,
}

/// A pass of which rows wait, and for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftPass {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// Why.
    pub cause: Cause,
    /// The build that computed them, and the columns or ClickHouse's words; shortened.
    pub why: String,
}

/// A pass that is not sealed, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingPass {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// What stands in the way, and what helps; shortened.
    pub why: String,
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
        self.left_passes().iter().find(|left| (left.run.as_str(), left.pass) == (run, pass))
    }

    /// Passes of which rows wait, and for what.
    pub fn left_passes(&self) -> &[LeftPass] {
        match &self.doing {
            Doing::Sink { left_passes, .. } => left_passes,
            Doing::Work { .. } | Doing::Produce { .. } => &[],
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

/// What helps rows that sinks have and the table does not take, each text once.
pub fn left_hint<'a>(hosts: impl IntoIterator<Item = &'a HostReport>) -> String {
    let mut refused = BTreeSet::new();
    let mut lacks_columns = false;
    for left in hosts.into_iter().flat_map(HostReport::left_passes) {
        match left.cause {
            Cause::Columns => lacks_columns = true,
            Cause::Refused => drop(refused.insert(left.run.as_str())),
        }
    }
    let run = match refused.iter().next() {
        Some(only) if refused.len() == 1 => only,
        _ => "RUN",
    };
    let refused = (!refused.is_empty()).then(|| REFUSED_HINT.replace("RUN", run));
    let told = refused.into_iter().chain(lacks_columns.then(|| COLUMNS_HINT.to_owned()));
    told.collect::<Vec<_>>().join("; ")
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

/// The name of this host.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
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
