//! The records themselves: what is kept of a run and of a pass of it.

use std::collections::BTreeMap;
use std::fmt;

use millstream::names::{PassId, RunName};
use serde::{Deserialize, Serialize};

use super::id_digest::IdDigest;
use super::selection::Selection;

/// What an open run is made of, in words.
pub(crate) const SOURCE: &str = "lines as they come";

/// Passes that are not at their end, by name and number: running, paused, and cancelled ones whose messages are still
/// there; for a sealer also sealed ones that are not announced, or have messages still. It does not grow with the runs there
/// ever were.
pub type Open = BTreeMap<PassId, PassRecord>;

/// What an id costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Ids that were timed; 0 when none was done in the time that there was: the figure is then the least it can be.
    pub ids: u64,
    /// Nanoseconds that one core works on an id, on average.
    pub id_nanos: u64,
    /// Bytes of an id in a message at most.
    pub id_bytes: u64,
    /// Bytes of a row as it travels.
    pub row_bytes: u64,
    /// Bytes of a row before compression.
    pub raw_bytes: u64,
}

/// What a run is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run's name.
    pub run: RunName,
    /// The ids in words: `ids 1..=1000`, `file ids.txt`.
    pub source: String,
    /// The same, so that equal means the same ids: a digest where the words do not say it. Empty for an open run.
    pub fingerprint: String,
    /// Ids that were put into a batch at most.
    pub batch_ids: u32,
    /// Ids that the input announced, where it could say so before it was read.
    pub expected_ids: Option<u64>,
    /// Whether the input can hold one id twice; a range cannot.
    pub may_repeat: bool,
    /// Milliseconds since 1970 when it was begun.
    pub created_ms: u64,
    /// What was published; `None` while it is being published.
    pub published: Option<Published>,
    /// What an id cost before anything was published, where that chose the size of the batches.
    #[serde(default)]
    pub timing: Option<Timing>,
    /// Of an open run, what the first batches of it came to: those are not counted again when it is closed.
    #[serde(default)]
    pub so_far: Option<Published>,
}

impl RunRecord {
    /// Whether its ids were not known when it was begun, but published as they came.
    pub fn is_open(&self) -> bool {
        self.fingerprint.is_empty()
    }
}

/// What a run came to once all of it was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Number of batches, numbered from 0.
    pub batches: u32,
    /// Number of ids, counted once within a batch.
    pub ids: u64,
    /// Wrapping sum of `sipHash64(id)` over those ids, in decimal: JSON numbers of other languages lose digits.
    #[serde(with = "decimal")]
    pub digest: u64,
    /// Ids that the input had twice within a batch, dropped.
    pub dropped_repeats: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
}

impl Published {
    /// The ids that the run has.
    pub fn id_digest(&self) -> IdDigest {
        IdDigest { ids: self.ids, digest: self.digest }
    }
}

/// Where a pass stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PassState {
    /// Being computed, or waiting to be.
    Running,
    /// Held back by a person: nothing of it is computed until it is resumed.
    Paused,
    /// Ended by a person: never computed further, never sealed. Rows that are stored stay.
    Cancelled,
    /// Proven and visible.
    Sealed,
}

impl fmt::Display for PassState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        RunState::from(*self).fmt(f)
    }
}

/// Where a run stands: as its newest pass does, or not published yet. Its words are those that commands print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Its producer has not published all of its ids; workers compute those that are there.
    Publishing,
    /// All ids are published; workers compute them, or will.
    Running,
    /// An operator, or a limit that an operator set, holds it back.
    Paused,
    /// An operator has ended it.
    Cancelled,
    /// A sealer has proven it, and readers see it.
    Sealed,
}

impl RunState {
    /// The state of a run with this newest pass; before its first batch it has none.
    pub fn of(run: &RunRecord, pass: Option<&PassRecord>) -> Self {
        match (&run.published, pass.map_or(PassState::Running, |pass| pass.state)) {
            (None, PassState::Running) => Self::Publishing,
            (_, state) => state.into(),
        }
    }

    /// Whether neither a worker, a sink nor a sealer will change it.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Sealed | Self::Cancelled)
    }
}

impl From<PassState> for RunState {
    fn from(state: PassState) -> Self {
        match state {
            PassState::Running => Self::Running,
            PassState::Paused => Self::Paused,
            PassState::Cancelled => Self::Cancelled,
            PassState::Sealed => Self::Sealed,
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Publishing => "publishing",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Cancelled => "cancelled",
            Self::Sealed => "sealed",
        })
    }
}

/// One computation of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassRecord {
    /// The run's name.
    pub run: RunName,
    /// The pass, from 1.
    pub pass: u32,
    /// Where it stands.
    pub state: PassState,
    /// The largest batch, so that a worker knows how many cores one can occupy before it pulls it.
    pub batch_ids: u32,
    /// Milliseconds since 1970 when it was begun.
    pub started_ms: u64,
    /// What was proven; `None` until sealed.
    pub sealed: Option<Sealed>,
    /// Which ids it computes, where those are not all of the run's; the rows of the others it takes over.
    #[serde(default)]
    pub covers: Option<Covers>,
    /// Each step up doubles its share of the cores, each step down halves it.
    #[serde(default)]
    pub priority: i8,
    /// Ids a second that the whole fleet begins at most.
    #[serde(default)]
    pub rate: Option<u32>,
    /// It is paused once it has more dead letters than this.
    #[serde(default)]
    pub max_dead: Option<u64>,
    /// Why it is paused, where no person did it.
    #[serde(default)]
    pub paused_for: Option<String>,
    /// Which repair has claimed it and is not done, if there is one.
    #[serde(default)]
    pub repair: Option<u64>,
    /// Whether the messages of a pass that is over are gone; where it is sealed, also whether it was announced and its consumer
    /// is gone. Until then the next sealer finishes what the last one left.
    #[serde(default)]
    pub freed: bool,
    /// Whether the seal was announced, where the rest had to wait.
    #[serde(default)]
    pub announced: bool,
    /// Whether it is being forgotten: readers see it no more, and some of it may be gone.
    #[serde(default)]
    pub forgetting: bool,
    /// Whether it was sealed once and a repair has opened it again: readers see it meanwhile.
    #[serde(default)]
    pub unsealed: bool,
}

impl PassRecord {
    /// Which pass of which run it is.
    pub fn id(&self) -> PassId {
        self.run.pass(self.pass)
    }

    /// A pass that begins at this moment by the server's clock, in milliseconds since 1970.
    pub fn begin(pass: &PassId, batch_ids: u32, started_ms: u64) -> Self {
        Self {
            run: pass.run.clone(),
            pass: pass.pass,
            state: PassState::Running,
            batch_ids,
            started_ms,
            sealed: None,
            covers: None,
            priority: 0,
            rate: None,
            max_dead: None,
            paused_for: None,
            repair: None,
            freed: false,
            announced: false,
            forgetting: false,
            unsealed: false,
        }
    }
}

/// The ids that a pass computes again, where those are not all of the run's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Covers {
    /// The sealed pass whose ids they are, and whose other rows it takes over.
    pub base: u32,
    /// What was asked for.
    #[serde(flatten)]
    pub selection: Selection,
    /// The batches that it came to, where it is of batches: from the first to below the second of each pair.
    #[serde(default)]
    pub ranges: Vec<[u32; 2]>,
    /// What it came to when the pass was begun. It must come to the same until the seal; early records do not say.
    #[serde(default)]
    pub selected: Option<IdDigest>,
    /// How many ids are published; `None` while they are being published.
    pub ids: Option<u64>,
}

impl Covers {
    /// The sealed pass of this run whose ids they are.
    pub fn base_of(&self, run: &RunName) -> PassId {
        run.pass(self.base)
    }
}

/// What was proven of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Rows, one for each id.
    pub rows: u64,
    /// How many of them are dead letters.
    pub dead: u64,
    /// Ids that the user gave more than once, in different batches.
    pub repeated_ids: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// What the pipeline's summary query answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Vec<serde_json::Value>>,
    /// Why it answered nothing, where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary_fault: Option<String>,
    /// The builds that computed it.
    #[serde(default)]
    pub builds: Vec<String>,
}

pub(super) mod decimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(run: &str) -> Result<PassRecord, serde_json::Error> {
        serde_json::from_value(serde_json::json!({
            "run": run, "pass": 1, "state": "running", "batch_ids": 1, "started_ms": 0, "sealed": null
        }))
    }

    #[test]
    fn a_record_names_its_run_within_the_grammar() {
        assert_eq!(pass("green").expect("legal").run.as_str(), "green");
        for name in ["", "a' OR 1", "a.b", "*", "a\u{1b}[2J", &"x".repeat(65)] {
            let fault = pass(name).expect_err("hostile").to_string();
            assert!(fault.contains("is not 1 to 64 of"), "{fault}");
        }
    }
}
