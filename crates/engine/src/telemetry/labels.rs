//! The labels of metrics. Every label is a closed enum, so the number of series is fixed. Runs, ids, hosts and
//! subjects belong in logs and spans.

use std::fmt;
use std::fmt::Debug;
use std::hash::Hash;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::error::Class;
use crate::model::host::Cause;
use crate::model::seal_step::Step;

/// Makes each label an enum from one list: its name, its values, and the word of each.
macro_rules! labels {
    ($($(#[$about:meta])* $label:ident $key:literal { $($(#[$meaning:meta])* $value:ident = $word:literal,)* })*) => {$(
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $label {
            $($(#[$meaning])* $value,)*
        }

        impl Label for $label {
            const KEY: &'static str = $key;
            const ALL: &'static [Self] = &[$(Self::$value),*];

            fn word(self) -> &'static str {
                match self {
                    $(Self::$value => $word,)*
                }
            }
        }
    )*};
}

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

labels! {
    /// The stage that holds a delivery.
    Stage "stage" {
        /// A worker, which holds batches of ids.
        Worker = "worker",
        /// A sink, which holds messages of rows.
        Sink = "sink",
    }

    /// The stream of a message.
    Stream "stream" {
        /// The stream of ids.
        Ids = "ids",
        /// The stream of rows.
        Rows = "rows",
    }

    /// The reason why a publish was not confirmed.
    Unconfirmed "reason" {
        /// The stream is full.
        Full = "stream_full",
        /// NATS did not answer in time.
        NoAnswer = "no_answer",
        /// NATS answered with another error.
        Refused = "refused",
    }

    /// Whether a delivery is the first of its message.
    Arrival "arrival" {
        /// The first delivery.
        First = "first",
        /// A redelivery.
        Again = "redelivery",
    }

    /// The end of a delivery.
    End "end" {
        /// Acked: the work of the delivery is done.
        Acked = "acked",
        /// Ended with a nak, to be redelivered.
        HandedBack = "handed_back",
        /// Left to an earlier delivery of the same message, which this process still holds.
        Left = "left",
        /// Dropped without an ack or nak, which is a fault of Millstream.
        Dropped = "dropped",
    }

    /// How a batch of a producer came into the stream.
    Origin "origin" {
        /// This producer stored it.
        Published = "published",
        /// An earlier start, or another producer, had stored it.
        Found = "found",
    }

    /// The outcome of an id.
    Fate "status" {
        /// The id has an ok row.
        Ok = "ok",
        /// The id is a dead letter.
        Dead = "dead",
    }

    /// The activity of a worker's core.
    Activity "activity" {
        /// The core computes the user's function.
        Computing = "computing",
        /// The core encodes and compresses rows.
        Encoding = "encoding",
    }

    /// What an idle core of a worker waits for.
    WaitsFor "waits_for" {
        /// Ids to compute.
        Ids = "ids",
        /// Capacity in the rows stream.
        Room = "room",
        /// The next slot of a run with a rate limit.
        Rate = "rate",
    }

    /// The reason why a worker did not finish a batch.
    Unfinished "reason" {
        /// The pass is paused or cancelled, or the process ends.
        Stopped = "stopped",
        /// The message cannot be decoded.
        Unreadable = "unreadable",
        /// This host cannot compute.
        Host = "host_cannot_compute",
        /// Anything else: the batch is redelivered after a while.
        Failed = "failed",
    }

    /// The outcome of an insert.
    Outcome "outcome" {
        /// ClickHouse reported success.
        Accepted = "accepted",
        /// The server has a fault: the sink tries again.
        Fault = "server_fault",
        /// There was no clear answer: the sink kills the insert, asks for the rows, and tries again.
        Unclear = "unclear",
        /// ClickHouse refused the rows.
        Refused = "refused",
    }
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

impl Label for Cause {
    const KEY: &'static str = "cause";
    const ALL: &'static [Self] = &[Self::Columns, Self::Refused];

    fn word(self) -> &'static str {
        match self {
            Self::Columns => "columns",
            Self::Refused => "refused",
        }
    }
}

/// A sealer takes every step but [`Step::Rest`], which has no series.
impl Label for Step {
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
            Self::Rest => "rest",
        }
    }
}
