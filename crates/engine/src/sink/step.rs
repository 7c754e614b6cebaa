//! What to do next with rows on their way into ClickHouse: the decision alone. `land.rs` takes the steps on real servers,
//! `simulation.rs` on the worst that there could be.

use crate::error::Class;

/// Something to be done with a group of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask which of them are stored, ack those, keep the others.
    Ask,
    /// Insert those that were not stored a moment ago.
    Insert,
    /// Ask after an insert that is said to be done (**ask-before-ack**: a 200 is no proof).
    Confirm,
    /// Make sure that an insert of unknown outcome is over: it could commit after the next question.
    End,
    /// Wait a while, then begin again.
    Wait,
    /// Land each alone, as one of them is refused.
    Apart,
    /// Hand back what is left.
    HandBack,
    /// Hand back what is left for a time after which no insert of it can be under way.
    SetBack,
    /// Nothing is left.
    Done,
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// All that was left is stored, and acked.
    AllStored,
    /// Some of it is not stored.
    Missing,
    /// The process was paused since it asked: somebody else may have inserted what was missing.
    Overslept,
    /// The question was not answered.
    NoAnswer,
    /// The insert is said to be done.
    Accepted,
    /// The insert failed.
    Failed(Class),
    /// No insert of ours runs any more.
    Ended,
    /// The wait is over.
    Waited,
    /// Work is given up.
    GivenUp,
}

impl Step {
    /// The step after this one, which came to `seen`. Nothing is inserted but after an answer that says that it is missing.
    pub(crate) fn next(self, seen: Seen) -> Self {
        match seen {
            Seen::AllStored => Self::Done,
            Seen::Missing if self == Self::Confirm => Self::Wait,
            Seen::Missing => Self::Insert,
            Seen::Accepted => Self::Confirm,
            Seen::Failed(Class::Unclear) => Self::End,
            Seen::Failed(Class::Reject) => Self::Apart,
            Seen::NoAnswer | Seen::Failed(Class::Retry) | Seen::Ended => Self::Wait,
            Seen::Overslept | Seen::Waited => Self::Ask,
            Seen::GivenUp if self == Self::End => Self::SetBack,
            Seen::GivenUp => Self::HandBack,
        }
    }
}

/// Whether so many ids of a batch or part are all that it has. More than that are for `verify` to name: inserting once
/// more would not make them fewer.
pub(crate) fn is_landed(ids: u64, stored: u64) -> bool {
    stored >= ids
}
