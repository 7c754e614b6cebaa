//! A process of the fleet: its identity, and what it reports about itself.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::sync::LazyLock;

use millstream::names::PassId;
use serde::{Deserialize, Serialize};

use super::moment::now_ms;
use super::times::{CoreTimes, ProduceTimes, RunShare, SinkTimes};
/// Hint for rows whose columns the table does not have.
const COLUMNS_HINT: &str = "run `setup` with the build that computed the rows: it shows the missing columns, `setup --yes` adds them; \
                            the rows are redelivered within ten minutes";
/// Hint for rows that ClickHouse refuses although their columns fit.
pub(crate) const REFUSED_HINT: &str = "once the table accepts the rows, a sink stores them at their next redelivery; if the build that \
                                       computed them is at fault, deploy a corrected build to the workers, \
                                       then `verify RUN --repair --recompute` has these ids computed again";

/// The report of one process at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// The name of its host.
    pub host: String,
    /// Its process id on that host.
    pub pid: u32,
    /// Separates processes with equal host name and process id: two containers may have both in common.
    #[serde(default)]
    pub instance: u32,
    /// When the process began, in milliseconds since 1970.
    pub started_ms: u64,
    /// The build that the process runs.
    #[serde(default)]
    pub build: String,
    /// What the process does.
    #[serde(flatten)]
    pub doing: Doing,
}

/// What a process does. `recent` times cover the last seconds, `total` times cover the process since its start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Doing {
    /// A worker.
    Work {
        /// Its compute threads.
        cores: usize,
        /// Where the cores' time goes.
        recent: CoreTimes,
        /// Where the cores' time went.
        total: CoreTimes,
        /// What the worker does for each pass.
        runs: Vec<RunShare>,
        /// Why the worker pulls no batches; `null` where it pulls them.
        #[serde(default)]
        unable: Option<String>,
        /// Subjects of batches that the worker returned because of its own fault, and how often.
        #[serde(default)]
        returned: BTreeMap<String, i64>,
    },
    /// A sink.
    Sink {
        /// Where its time goes.
        recent: SinkTimes,
        /// Where its time went.
        total: SinkTimes,
        /// Rows stored a second.
        rows_per_second: f64,
        /// Why the table does not take rows: builds and columns. `null` where no rows wait for that reason.
        #[serde(default)]
        left: Option<String>,
        /// The first passes whose rows the table does not take.
        #[serde(default)]
        left_passes: Vec<LeftPass>,
        /// The passes whose rows the sink holds.
        #[serde(default)]
        holds: Vec<(String, u32)>,
        /// The first passes that its sealer cannot seal, and why.
        #[serde(default)]
        waits: Vec<WaitingPass>,
    },
    /// A producer of a run.
    Produce {
        /// The run.
        run: String,
        /// Where its time goes.
        recent: ProduceTimes,
        /// Where its time went.
        total: ProduceTimes,
    },
}

/// Why a sink returned rows to the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// The table lacks columns that the rows have, or has these columns with other types.
    Columns,
    /// ClickHouse refuses the rows although their columns fit.
    Refused,
}

/// A pass whose rows wait, and for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftPass {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// Why the rows wait.
    pub cause: Cause,
    /// The build that computed the rows, and the columns or ClickHouse's error; shortened.
    pub why: String,
}

/// A pass that is not sealed, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingPass {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// What prevents the seal, and what helps; shortened.
    pub why: String,
}

impl HostReport {
    /// Whether both reports are of one process in one role.
    fn is_of_same(&self, other: &Self) -> bool {
        let process = |report: &Self| (report.pid, report.instance, report.started_ms, report.doing.role());
        self.host == other.host && process(self) == process(other)
    }

    /// Whether this process wrote the report, in whichever role.
    pub(crate) fn is_own(&self) -> bool {
        self.instance == instance() && self.pid == std::process::id() && self.host == host_name()
    }

    /// What the process does for a pass, if it computes that pass.
    pub fn share_of(&self, pass: &PassId) -> Option<&RunShare> {
        match &self.doing {
            Doing::Work { runs, .. } => {
                runs.iter().find(|share| share.run == pass.run.as_str() && share.pass == pass.pass)
            }
            Doing::Sink { .. } | Doing::Produce { .. } => None,
        }
    }

    /// Whether the process holds rows of a pass.
    pub fn holds(&self, pass: &PassId) -> bool {
        match &self.doing {
            Doing::Sink { holds, .. } => {
                holds.iter().any(|held| held.0 == pass.run.as_str() && held.1 == pass.pass)
            }
            Doing::Work { .. } | Doing::Produce { .. } => false,
        }
    }

    /// Why the sink returned rows of a pass.
    pub fn left_of(&self, pass: &PassId) -> Option<&LeftPass> {
        self.left_passes().iter().find(|left| left.run == pass.run.as_str() && left.pass == pass.pass)
    }

    /// Passes of which rows wait, and for what.
    pub fn left_passes(&self) -> &[LeftPass] {
        match &self.doing {
            Doing::Sink { left_passes, .. } => left_passes,
            Doing::Work { .. } | Doing::Produce { .. } => &[],
        }
    }

    /// Whether the process is a worker.
    pub(crate) fn computes(&self) -> bool {
        matches!(self.doing, Doing::Work { .. })
    }

    /// Why the worker pulls no batches, if it should.
    pub fn unable(&self) -> Option<&str> {
        match &self.doing {
            Doing::Work { unable, .. } => unable.as_deref(),
            Doing::Sink { .. } | Doing::Produce { .. } => None,
        }
    }

    /// How often the worker returned the batch with this subject because of its own fault.
    pub(crate) fn returned(&self, subject: &str) -> i64 {
        match &self.doing {
            Doing::Work { returned, .. } => returned.get(subject).copied().unwrap_or(0),
            Doing::Sink { .. } | Doing::Produce { .. } => 0,
        }
    }

    /// What keeps passes from their seal, as this process's sealer found.
    pub fn waits(&self) -> &[WaitingPass] {
        match &self.doing {
            Doing::Sink { waits, .. } => waits,
            Doing::Work { .. } | Doing::Produce { .. } => &[],
        }
    }

    /// Why the table does not take rows that this sink has.
    pub fn left(&self) -> Option<&str> {
        match &self.doing {
            Doing::Sink { left, .. } => left.as_deref(),
            Doing::Work { .. } | Doing::Produce { .. } => None,
        }
    }
}

/// Hints for rows that sinks have and the table does not take, each text once.
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
    let hints = refused.into_iter().chain(lacks_columns.then(|| COLUMNS_HINT.to_owned()));
    hints.collect::<Vec<_>>().join("; ")
}

/// The reports with earlier totals subtracted, so that they cover only the time in between: services live longer than a
/// run. Processes without a new report are left out.
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
    /// Subtracts an earlier total from this one.
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

    /// The sum of all totals.
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

/// A number that separates this process from others with equal host name and process id, as in containers.
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
    fn earlier_totals_are_subtracted() {
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
