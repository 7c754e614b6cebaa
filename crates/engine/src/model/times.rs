//! Where the time of processes goes, as they report it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Time of cores, summed over them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// In the user's function.
    pub computing: Duration,
    /// In writing rows into columns, and packing them.
    pub encoding: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, more: Self) {
        self.computing += more.computing;
        self.encoding += more.encoding;
    }
}

/// Where the time of a host's cores went, in seconds of cores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CoreTimes {
    /// All of it.
    pub all: f64,
    /// In the user's function.
    pub computing: f64,
    /// Writing and compressing rows.
    pub encoding: f64,
    /// Without ids.
    pub waiting_for_ids: f64,
    /// Without room for another batch, because of rows that the broker did not take yet.
    pub waiting_for_room: f64,
    /// Held back by a run's rate limit.
    pub held_by_rate: f64,
    /// With ids in a process that gave no sign: nothing is known of it.
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
    /// What came after an earlier look.
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

/// Where a sink's time went, in seconds. An insert under way counts before a question, a question before a wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SinkTimes {
    /// All of it.
    pub all: f64,
    /// At least one insert was under way.
    pub inserting: f64,
    /// ClickHouse was asked what landed.
    pub asking: f64,
    /// There was nothing to insert, or not enough of it yet.
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
    /// What came after an earlier look.
    pub(crate) fn since(self, before: Self) -> Self {
        let of = |Self { waiting_for_rows, asking, inserting, .. }| [waiting_for_rows, asking, inserting];
        difference(of(self), of(before)).into()
    }
}

/// Where a producer's time went, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ProduceTimes {
    /// All of it.
    pub all: f64,
    /// The input was slower than the broker.
    pub reading: f64,
    /// The broker was slower than the input: as many batches were on their way as may be.
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
    /// What came after an earlier look.
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
    /// Dead letters among them.
    #[serde(default)]
    pub dead: u64,
    /// Ids that wait for another attempt.
    #[serde(default)]
    pub asking: u64,
    /// Why one of them does.
    #[serde(default)]
    pub why: Option<String>,
    /// Ids a second now.
    pub ids_per_second: f64,
    /// Batches in hand.
    pub held: usize,
    /// Seconds since the oldest of them arrived.
    pub oldest_seconds: f64,
}

pub(crate) fn difference<const N: usize>(now: [f64; N], before: [f64; N]) -> [f64; N] {
    std::array::from_fn(|part| now[part] - before[part])
}

/// Seconds to the millisecond. What is estimated from samples may be a little less than it was a moment ago.
fn in_millis(seconds: f64) -> f64 {
    (seconds.max(0.0) * 1000.0).round() / 1000.0
}
