//! The stored records of a run and of its passes.

use std::collections::BTreeMap;
use std::fmt;

use millstream::names::{PassId, RunName};
use serde::{Deserialize, Serialize};

use super::id_digest::{IdDigest, decimal};
use super::selection::Selection;

/// `source` of an open run.
pub(crate) const SOURCE: &str = "lines as they come";

/// Passes that are not finished, by name and number: running and paused passes, and cancelled ones that still have
/// messages. A sealer also sees sealed passes that are not announced or still have messages. The map does not grow with
/// the number of past runs.
pub type Open = BTreeMap<PassId, PassRecord>;

/// The measured cost of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Ids that were timed. 0 if none finished in the available time: then the figure is a lower bound.
    pub ids: u64,
    /// Nanoseconds of one core for an id, on average.
    pub id_nanos: u64,
    /// Most bytes of an id in a message.
    pub id_bytes: u64,
    /// Bytes of a row in a message.
    pub row_bytes: u64,
    /// Bytes of a row before compression.
    pub raw_bytes: u64,
}

/// What a run consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run's name.
    pub run: RunName,
    /// The ids in words: `ids 1..=1000`, `file ids.txt`.
    pub source: String,
    /// Identity of the id set: the range itself, or a digest for files and queries. Empty for an open run.
    pub fingerprint: String,
    /// Most ids of a batch.
    pub batch_ids: u32,
    /// Ids that the input announced, if it could announce them before it was read.
    pub expected_ids: Option<u64>,
    /// Whether the input can hold an id twice; a range cannot.
    pub may_repeat: bool,
    /// When the run was begun, in milliseconds since 1970.
    pub created_ms: u64,
    /// What was published; `None` while the producer publishes.
    pub published: Option<Published>,
    /// Cost of an id, measured before publishing, if that measurement chose the batch size.
    #[serde(default)]
    pub timing: Option<Timing>,
    /// Totals of the first batches of an open run, so that closing the run does not count them again.
    #[serde(default)]
    pub so_far: Option<Published>,
}

impl RunRecord {
    /// Whether the producer publishes the ids as they arrive, without knowing them at the start.
    pub fn is_open(&self) -> bool {
        self.fingerprint.is_empty()
    }
}

/// Totals of a run that is completely published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Number of batches, numbered from 0.
    pub batches: u32,
    /// Number of ids, counted once within a batch.
    pub ids: u64,
    /// Wrapping sum of `sipHash64(id)` over those ids, in decimal: JSON numbers of other languages lose digits.
    #[serde(with = "decimal")]
    pub digest: u64,
    /// Ids that the producer dropped because their batch had them already.
    pub dropped_repeats: u64,
    /// When publishing ended, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Published {
    /// Whether it came to so many batches with these ids.
    pub fn is(&self, batches: u64, ids: IdDigest) -> bool {
        u64::from(self.batches) == batches && self.id_digest() == ids
    }

    /// The digest of the run's ids.
    pub fn id_digest(&self) -> IdDigest {
        IdDigest { ids: self.ids, digest: self.digest }
    }
}

/// The state of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PassState {
    /// Workers compute it, or will.
    Running,
    /// Paused by an operator or a limit: workers compute none of it until it is resumed.
    Paused,
    /// Cancelled by an operator: never computed further, never sealed. Stored rows stay.
    Cancelled,
    /// Proven by a sealer, and visible to readers.
    Sealed,
}

impl fmt::Display for PassState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        RunState::from(*self).fmt(f)
    }
}

/// The state of a run: that of its newest pass, or `publishing`. Commands print these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Its producer has not published all of its ids; workers compute those that are there.
    Publishing,
    /// All ids are published; workers compute them, or will.
    Running,
    /// An operator, or a limit that an operator set, holds it back.
    Paused,
    /// An operator has cancelled it.
    Cancelled,
    /// A sealer has proven it, and readers see it.
    Sealed,
}

impl RunState {
    /// The state of a run whose newest pass is `pass`; `None` before the first batch.
    pub fn of(run: &RunRecord, pass: Option<&PassRecord>) -> Self {
        match (&run.published, pass.map_or(PassState::Running, |pass| pass.state)) {
            (None, PassState::Running) => Self::Publishing,
            (_, state) => state.into(),
        }
    }

    /// Whether the state is final for workers, sinks and sealers.
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
    /// The state of the pass.
    pub state: PassState,
    /// Ids of the largest batch: a worker knows from it how many cores a batch can occupy before it pulls one.
    pub batch_ids: u32,
    /// When the pass was begun, in milliseconds since 1970.
    pub started_ms: u64,
    /// What the sealer proved; `None` until the seal.
    pub sealed: Option<Sealed>,
    /// Which ids a partial replay computes. A full pass has `None`. The other ids' rows are copied.
    #[serde(default)]
    pub covers: Option<Covers>,
    /// Each step up doubles the pass's share of the cores, each step down halves it.
    #[serde(default)]
    pub priority: i8,
    /// Rate limit: most ids that the whole fleet begins in a second.
    #[serde(default)]
    pub rate: Option<u32>,
    /// The pass is paused once it has more dead letters than this.
    #[serde(default)]
    pub max_dead: Option<u64>,
    /// Why the pass is paused, if no operator paused it.
    #[serde(default)]
    pub paused_for: Option<String>,
    /// The repair that has claimed the pass and is not finished, if there is one.
    #[serde(default)]
    pub repair: Option<u64>,
    /// Whether the messages of a finished pass are deleted. For a sealed pass also whether the seal was announced and
    /// the consumer is deleted. Until then the next sealer continues the cleanup.
    #[serde(default)]
    pub freed: bool,
    /// Whether the seal was announced, if the rest of the cleanup had to wait.
    #[serde(default)]
    pub announced: bool,
    /// Whether the pass is being forgotten: readers no longer see it, and some of it may be deleted.
    #[serde(default)]
    pub forgetting: bool,
    /// Whether a repair has reopened a sealed pass: readers still see it meanwhile.
    #[serde(default)]
    pub unsealed: bool,
}

impl PassRecord {
    /// The id of the pass.
    pub fn id(&self) -> PassId {
        self.run.pass(self.pass)
    }

    /// A pass that begins at this moment of the server's clock, in milliseconds since 1970.
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

/// The ids that a partial replay computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Covers {
    /// The sealed pass that the ids come from, and whose other rows the partial replay copies.
    pub base: u32,
    /// What the operator asked for.
    #[serde(flatten)]
    pub selection: Selection,
    /// The selected batches, if the selection is by batch: each pair is first and end (exclusive).
    #[serde(default)]
    pub ranges: Vec<[u32; 2]>,
    /// The digest of the selected ids when the pass was begun. It must be equal at the seal; early records lack it.
    #[serde(default)]
    pub selected: Option<IdDigest>,
    /// How many ids are published; `None` while the producer publishes.
    pub ids: Option<u64>,
}

impl Covers {
    /// The sealed pass of `run` that the ids come from.
    pub fn base_of(&self, run: &RunName) -> PassId {
        run.pass(self.base)
    }
}

/// What the sealer proved of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Rows, one for each id.
    pub rows: u64,
    /// How many of these rows are dead letters.
    pub dead: u64,
    /// Ids that the user gave more than once, in different batches.
    pub repeated_ids: u64,
    /// When the pass was sealed, in milliseconds since 1970.
    pub at_ms: u64,
    /// The answer of the pipeline's summary query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Vec<serde_json::Value>>,
    /// Why the summary query failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary_fault: Option<String>,
    /// The builds that computed the pass.
    #[serde(default)]
    pub builds: Vec<String>,
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
