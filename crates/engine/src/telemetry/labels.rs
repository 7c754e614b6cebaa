//! The labels of metrics. Every label is a closed enum, so the number of series is fixed. Runs, ids, hosts and
//! subjects belong in logs and spans.

use std::fmt;
use std::fmt::Debug;
use std::hash::Hash;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::error::Class;

/// A label and all of its values.
pub trait Label: Copy + Eq + Hash + Debug + Send + Sync + 'static {
    /// The name of the label.
    const KEY: &'static str;
    /// All values of the label.
    const ALL: &'static [Self];

    /// The text of a value.
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
    /// Every possible series.
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

/// The stage that holds a delivery.
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

/// The stream of a message.
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

/// The reason why a publish was not confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unconfirmed {
    /// The stream is full.
    Full,
    /// NATS did not answer in time.
    NoAnswer,
    /// NATS answered with another error.
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

/// Whether a delivery is the first of its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arrival {
    /// The first delivery.
    First,
    /// A redelivery.
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

/// The end of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Acked: the work of the delivery is done.
    Acked,
    /// Ended with a nak, to be redelivered.
    HandedBack,
    /// Left to an earlier delivery of the same message, which this process still holds.
    Left,
    /// Dropped without an ack or nak, which is a fault of Millstream.
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

/// How a batch of a producer came into the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// This producer stored it.
    Published,
    /// An earlier start, or another producer, had stored it.
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

/// The outcome of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// The id has an ok row.
    Ok,
    /// The id is a dead letter.
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

/// The activity of a worker's core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activity {
    /// The core computes the user's function.
    Computing,
    /// The core encodes and compresses rows.
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
    /// Capacity in the rows stream.
    Room,
    /// The next slot of a run with a rate limit.
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

/// The reason why a worker did not finish a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unfinished {
    /// The pass is paused or cancelled, or the process ends.
    Stopped,
    /// The message cannot be decoded.
    Unreadable,
    /// This host cannot compute.
    Host,
    /// Anything else: the batch is redelivered after a while.
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

/// The outcome of an insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// ClickHouse reported success.
    Accepted,
    /// The server has a fault: the sink tries again.
    Fault,
    /// There was no clear answer: the sink kills the insert, asks for the rows, and tries again.
    Unclear,
    /// ClickHouse refused the rows.
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

/// The reason why a sink naks rows and does not retry soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotTaken {
    /// The table lacks columns of the rows.
    Columns,
    /// ClickHouse refuses the rows.
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
    /// Asks NATS for the state of workers and sinks.
    Ask,
    /// Counts the pass's rows.
    Count,
    /// Asks whether rows are on their way to ClickHouse.
    Landing,
    /// Asks whether another sealer comes first.
    Turn,
    /// Copies unchanged rows from another pass.
    TakeOver,
    /// Proves ids and values.
    Prove,
    /// Removes raw duplicates.
    Merge,
    /// Repairs lost rows.
    Repair,
    /// Shows the pass to readers.
    Show,
    /// Marks the pass sealed in its record.
    Mark,
    /// Announces the seal and removes the pass from NATS.
    Finish,
    /// Removes the rest of a cancelled pass from NATS.
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
