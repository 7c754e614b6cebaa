//! What to do next with rows on their way into ClickHouse: only the decision. `land.rs` takes the steps on real
//! servers, `simulation.rs` against simulated failures.

use crate::error::Class;

/// The next action for a group of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask which rows are stored, ack those, keep the others.
    Ask,
    /// Insert the rows that were missing a moment ago.
    Insert,
    /// Ask after an insert that ClickHouse reported as successful (**ask-before-ack**: a 200 is no proof).
    Confirm,
    /// End an insert of unknown outcome: it could commit after the next ask.
    End,
    /// Wait a while, then begin again.
    Wait,
    /// Insert each body alone, because ClickHouse refused one of them.
    Apart,
    /// Return the remaining rows to the stream.
    HandBack,
    /// Return the remaining rows, with a delay after which no insert of them can run.
    SetBack,
    /// No rows are left.
    Done,
}

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// All remaining rows are stored, and acked.
    AllStored,
    /// Some rows are not stored.
    Missing,
    /// The process was suspended since the ask: another sink may have inserted the missing rows.
    Overslept,
    /// ClickHouse did not answer the ask.
    NoAnswer,
    /// ClickHouse reported the insert as successful.
    Accepted,
    /// The insert failed.
    Failed(Class),
    /// No insert of ours runs any more.
    Ended,
    /// The wait is over.
    Waited,
    /// The sink gives up, because its deadline has passed.
    GivenUp,
}

impl Step {
    /// The step after this one, whose result is `seen`. An insert follows only an answer that rows are missing.
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

/// True when at least the expected number of ids is stored. Surplus ids are reported by `verify`; re-inserting cannot
/// remove them.
pub(crate) fn is_landed(ids: u64, stored: u64) -> bool {
    stored >= ids
}
