//! Where processes spend their time, as they report it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Time of cores, summed over the cores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// In the user's function.
    pub computing: Duration,
    /// In writing rows into columns, and in packing these.
    pub encoding: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, more: Self) {
        self.computing += more.computing;
        self.encoding += more.encoding;
    }
}

/// Where the cores of a host spent their time, in core seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CoreTimes {
    /// The sum of all fields.
    pub all: f64,
    /// In the user's function.
    pub computing: f64,
    /// Writing and compressing rows.
    pub encoding: f64,
    /// Idle, without ids.
    pub waiting_for_ids: f64,
    /// Idle, because the worker lacks permits for another batch: NATS has not stored its rows yet.
    pub waiting_for_room: f64,
    /// Idle, because of a run's rate limit.
    pub held_by_rate: f64,
    /// With ids in a process that sends no sign of life: whether these cores compute is unknown.
    #[serde(default)]
    pub silent: f64,
}

impl From<[f64; 6]> for CoreTimes {
    fn from(parts: [f64; 6]) -> Self {
        let parts = parts.map(in_millis);
        let [computing, encoding, waiting_for_ids, waiting_for_room, held_by_rate, silent] = parts;
        let all = parts.iter().sum();
        Self { all, computing, encoding, waiting_for_ids, waiting_for_room, held_by_rate, silent }
    }
}

impl CoreTimes {
    /// The times since an earlier reading.
    pub(crate) fn since(self, before: Self) -> Self {
        let of =
            |Self {
                 computing, encoding, waiting_for_ids, waiting_for_room, held_by_rate, silent, ..
             }| {
                [computing, encoding, waiting_for_ids, waiting_for_room, held_by_rate, silent]
            };
        difference(of(self), of(before)).into()
    }
}

/// Where a sink's time went, in seconds. An insert under way counts before a query, a query before a wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SinkTimes {
    /// The sum of all fields.
    pub all: f64,
    /// At least one insert was under way.
    pub inserting: f64,
    /// The sink asked ClickHouse which rows are stored.
    pub asking: f64,
    /// The sink had no rows to insert, or not enough of them yet.
    pub waiting_for_rows: f64,
}

impl From<[f64; 3]> for SinkTimes {
    fn from(parts: [f64; 3]) -> Self {
        let parts = parts.map(in_millis);
        let [waiting_for_rows, asking, inserting] = parts;
        Self { all: parts.iter().sum(), inserting, asking, waiting_for_rows }
    }
}

impl SinkTimes {
    /// The times since an earlier reading.
    pub(crate) fn since(self, before: Self) -> Self {
        let of = |Self { waiting_for_rows, asking, inserting, .. }| [waiting_for_rows, asking, inserting];
        difference(of(self), of(before)).into()
    }
}

/// Where a producer's time went, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ProduceTimes {
    /// The sum of all fields.
    pub all: f64,
    /// The producer waited for its input.
    pub reading: f64,
    /// The producer waited for NATS: it had as many batches in flight as it may have.
    pub waiting_for_broker: f64,
}

impl From<[f64; 2]> for ProduceTimes {
    fn from(parts: [f64; 2]) -> Self {
        let parts = parts.map(in_millis);
        let [reading, waiting_for_broker] = parts;
        Self { all: parts.iter().sum(), reading, waiting_for_broker }
    }
}

impl ProduceTimes {
    /// The times since an earlier reading.
    pub(crate) fn since(self, before: Self) -> Self {
        let of = |Self { reading, waiting_for_broker, .. }| [reading, waiting_for_broker];
        difference(of(self), of(before)).into()
    }
}

/// What a host does for one pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunShare {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// Ids computed since the process began.
    pub ids: u64,
    /// Dead letters among these ids.
    #[serde(default)]
    pub dead: u64,
    /// Ids that wait for another attempt.
    #[serde(default)]
    pub asking: u64,
    /// Why one of these ids waits.
    #[serde(default)]
    pub why: Option<String>,
    /// Ids a second now.
    pub ids_per_second: f64,
    /// Batches that the host holds.
    pub held: usize,
    /// Seconds since the oldest of these batches arrived.
    pub oldest_seconds: f64,
}

pub(crate) fn difference<const N: usize>(now: [f64; N], before: [f64; N]) -> [f64; N] {
    std::array::from_fn(|part| now[part] - before[part])
}

/// Seconds, rounded to a millisecond. An estimate from samples may fall a little between two readings.
fn in_millis(seconds: f64) -> f64 {
    (seconds.max(0.0) * 1000.0).round() / 1000.0
}
