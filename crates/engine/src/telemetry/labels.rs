//! What metrics are told apart by. Every label is a closed enum, so the number of series is fixed: runs, ids, hosts and subjects
//! are for logs and spans.

use std::fmt;
use std::fmt::Debug;
use std::hash::Hash;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::error::Class;

/// A label and all of its values.
pub trait Label: Copy + Eq + Hash + Debug + Send + Sync + 'static {
    /// The label's name.
    const KEY: &'static str;
    /// Its values.
    const ALL: &'static [Self];

    /// A value as it is written.
    fn word(self) -> &'static str;
}

/// One label of a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct By<L>(pub L);

impl<L: Label> EncodeLabelSet for By<L> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabel::encode(&(L::KEY, self.0.word()), encoder.encode_label())
    }
}

/// All labels of a series.
pub trait Labels: EncodeLabelSet + Clone + Eq + Hash + Debug + Send + Sync + 'static {
    /// Every series that there can be.
    fn all() -> Vec<Self>;
}

impl<L: Label> Labels for By<L> {
    fn all() -> Vec<Self> {
        L::ALL.iter().copied().map(By).collect()
    }
}

impl<A: Label, B: Label> Labels for (By<A>, By<B>) {
    fn all() -> Vec<Self> {
        A::ALL.iter().flat_map(|a| B::ALL.iter().map(|b| (By(*a), By(*b)))).collect()
    }
}

/// Which stage holds a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// A worker, which holds batches of ids.
    Worker,
    /// A sink, which holds messages of rows.
    Sink,
}

impl Label for Stage {
    const KEY: &'static str = "stage";
    const ALL: &'static [Self] = &[Self::Worker, Self::Sink];

    fn word(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Sink => "sink",
        }
    }
}

/// Which stream a message goes into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// The stream of ids.
    Ids,
    /// The stream of rows.
    Rows,
}

impl Label for Stream {
    const KEY: &'static str = "stream";
    const ALL: &'static [Self] = &[Self::Ids, Self::Rows];

    fn word(self) -> &'static str {
        match self {
            Self::Ids => "ids",
            Self::Rows => "rows",
        }
    }
}

/// Why a publish was not confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unconfirmed {
    /// The stream is full.
    Full,
    /// The broker gave no answer in time.
    NoAnswer,
    /// The broker answered with another error.
    Refused,
}

impl Label for Unconfirmed {
    const KEY: &'static str = "reason";
    const ALL: &'static [Self] = &[Self::Full, Self::NoAnswer, Self::Refused];

    fn word(self) -> &'static str {
        match self {
            Self::Full => "stream_full",
            Self::NoAnswer => "no_answer",
            Self::Refused => "refused",
        }
    }
}

/// Which arrival of a message a delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arrival {
    /// The first.
    First,
    /// A later one: a redelivery.
    Again,
}

impl Label for Arrival {
    const KEY: &'static str = "arrival";
    const ALL: &'static [Self] = &[Self::First, Self::Again];

    fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Again => "redelivery",
        }
    }
}

/// How a delivery ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Acked: what it asked for is done.
    Acked,
    /// Handed back, to be delivered again.
    HandedBack,
    /// Left to an earlier delivery of the same message, which this process holds still.
    Left,
    /// Dropped without an ack or a nak, which is a fault.
    Dropped,
}

impl Label for End {
    const KEY: &'static str = "end";
    const ALL: &'static [Self] = &[Self::Acked, Self::HandedBack, Self::Left, Self::Dropped];

    fn word(self) -> &'static str {
        match self {
            Self::Acked => "acked",
            Self::HandedBack => "handed_back",
            Self::Left => "left",
            Self::Dropped => "dropped",
        }
    }
}

/// How a batch of a producer came to be in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// This producer stored it.
    Published,
    /// It was there already, from an earlier start or another producer.
    Found,
}

impl Label for Origin {
    const KEY: &'static str = "origin";
    const ALL: &'static [Self] = &[Self::Published, Self::Found];

    fn word(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::Found => "found",
        }
    }
}

/// What became of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It has its row.
    Ok,
    /// It is a dead letter.
    Dead,
}

impl Label for Fate {
    const KEY: &'static str = "status";
    const ALL: &'static [Self] = &[Self::Ok, Self::Dead];

    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Dead => "dead",
        }
    }
}

/// What a worker's core does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activity {
    /// It computes the user's function.
    Computing,
    /// It encodes and compresses rows.
    Encoding,
}

impl Label for Activity {
    const KEY: &'static str = "activity";
    const ALL: &'static [Self] = &[Self::Computing, Self::Encoding];

    fn word(self) -> &'static str {
        match self {
            Self::Computing => "computing",
            Self::Encoding => "encoding",
        }
    }
}

/// What an idle core of a worker waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WaitsFor {
    /// Ids to compute.
    Ids,
    /// Room in the rows stream.
    Room,
    /// The next turn of a run with a rate limit.
    Rate,
}

impl Label for WaitsFor {
    const KEY: &'static str = "waits_for";
    const ALL: &'static [Self] = &[Self::Ids, Self::Room, Self::Rate];

    fn word(self) -> &'static str {
        match self {
            Self::Ids => "ids",
            Self::Room => "room",
            Self::Rate => "rate",
        }
    }
}

/// Why a worker did not finish a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unfinished {
    /// The pass is paused or cancelled, or the process ends.
    Stopped,
    /// The message cannot be read.
    Unreadable,
    /// This host cannot compute.
    Host,
    /// Anything else: the batch comes again after a while.
    Failed,
}

impl Label for Unfinished {
    const KEY: &'static str = "reason";
    const ALL: &'static [Self] = &[Self::Stopped, Self::Unreadable, Self::Host, Self::Failed];

    fn word(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Unreadable => "unreadable",
            Self::Host => "host_cannot_compute",
            Self::Failed => "failed",
        }
    }
}

/// What ClickHouse answered to an insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It says that the insert is done.
    Accepted,
    /// The server has a fault: the sink tries again.
    Fault,
    /// There was no clear answer: the sink kills the insert, asks, and tries again.
    Unclear,
    /// The rows are refused.
    Refused,
}

impl From<Class> for Outcome {
    fn from(class: Class) -> Self {
        match class {
            Class::Retry => Self::Fault,
            Class::Unclear => Self::Unclear,
            Class::Reject => Self::Refused,
        }
    }
}

impl Label for Outcome {
    const KEY: &'static str = "outcome";
    const ALL: &'static [Self] = &[Self::Accepted, Self::Fault, Self::Unclear, Self::Refused];

    fn word(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Fault => "server_fault",
            Self::Unclear => "unclear",
            Self::Refused => "refused",
        }
    }
}

/// Why a sink hands rows back without trying again soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotTaken {
    /// The table does not have their columns.
    Columns,
    /// ClickHouse refuses them.
    Refused,
}

impl Label for NotTaken {
    const KEY: &'static str = "cause";
    const ALL: &'static [Self] = &[Self::Columns, Self::Refused];

    fn word(self) -> &'static str {
        match self {
            Self::Columns => "columns",
            Self::Refused => "refused",
        }
    }
}

/// A step of the sealer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SealStep {
    /// Reads the records.
    Read,
    /// Asks the broker where workers and sinks stand.
    Ask,
    /// Counts the pass's rows.
    Count,
    /// Asks whether rows are on their way.
    Landing,
    /// Asks whether another sealer comes first.
    Turn,
    /// Copies rows from another pass.
    TakeOver,
    /// Proves ids and values.
    Prove,
    /// Merges raw duplicates away.
    Merge,
    /// Repairs what is lost.
    Repair,
    /// Shows the pass to readers.
    Show,
    /// Says in the record that the pass is sealed.
    Mark,
    /// Announces the seal and tidies up.
    Finish,
    /// Removes what is left of a cancelled pass.
    Free,
}

impl Label for SealStep {
    const KEY: &'static str = "step";
    const ALL: &'static [Self] = &[
        Self::Read,
        Self::Ask,
        Self::Count,
        Self::Landing,
        Self::Turn,
        Self::TakeOver,
        Self::Prove,
        Self::Merge,
        Self::Repair,
        Self::Show,
        Self::Mark,
        Self::Finish,
        Self::Free,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Ask => "ask",
            Self::Count => "count",
            Self::Landing => "landing",
            Self::Turn => "turn",
            Self::TakeOver => "take_over",
            Self::Prove => "prove",
            Self::Merge => "merge",
            Self::Repair => "repair",
            Self::Show => "show",
            Self::Mark => "mark",
            Self::Finish => "finish",
            Self::Free => "free",
        }
    }
}
