//! The codes by which README's table of troubles names what the program says: `MS0001` and so on.

use std::fmt;

use millstream::envelope::EnvelopeFault;
use serde::{Serialize, Serializer};

use super::Error;
use crate::model::input_fault::ReadFault;

/// Makes the enum and the list of its values from one list.
macro_rules! codes {
    ($(#[$about:meta])* $code:ident { $($(#[$meaning:meta])* $value:ident = $number:literal,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum $code {
            $($(#[$meaning])* $value = $number,)*
        }

        impl $code {
            /// All of them, by their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$value),*];
        }
    };
}

codes! {
    /// A row of README's table "When something fails". Numbers are stable: one that is given up is not given again.
    Code {
        /// A message is damaged on NATS's disk.
        MessageDamaged = 1,
        /// NATS is away or slow.
        NatsAway = 2,
        /// A stream is full.
        StreamFull = 3,
        /// NATS does not confirm what is published.
        NatsSilent = 4,
        /// ClickHouse does not store rows now.
        RowsNotStored = 5,
        /// The outcome of an insert is not known.
        InsertUnknown = 6,
        /// The table lacks columns, or has narrower ones.
        ColumnsMissing = 7,
        /// The table has columns that cannot be changed without loss.
        ColumnsDiffer = 8,
        /// ClickHouse refuses a column's type.
        TypesRefused = 9,
        /// Tables are missing.
        TablesMissing = 10,
        /// Tables are detached.
        TablesDetached = 11,
        /// NATS has forgotten a run that ClickHouse knows.
        RunForgotten = 12,
        /// A disk is full or nearly so.
        DiskFull = 13,
        /// A command waits for others on a stack that only it has started.
        StackNotUp = 14,
        /// Readers do not see a sealed pass.
        ReadersBlind = 15,
        /// The row by which readers see a pass is not right.
        PassRowWrong = 16,
        /// A view lags behind its table.
        ViewLags = 17,
        /// A materialized view may lack rows.
        ViewLacksRows = 18,
        /// The pipeline's `SUMMARY` failed.
        SummaryFailed = 19,
        /// The table does not take the rows of a rebuild.
        RebuildRefused = 20,
        /// ClickHouse refuses rows.
        RowsRefused = 21,
        /// The table does not take rows of another schema.
        RowsOfOtherSchema = 22,
        /// A row does not fit its columns.
        ValueUnfit = 23,
        /// A pass cannot be sealed, and waits for an operator.
        PassWaits = 24,
        /// There are other dead letters than the seal counted.
        DeadChanged = 25,
        /// Stored values are not those that were computed.
        ValuesChanged = 26,
        /// Rows are stored twice.
        RawDuplicates = 27,
        /// A message is no batch.
        MessageForeign = 28,
        /// A newer build wrote a message.
        BuildTooOld = 29,
        /// An id ended the process that computed it.
        IdEndedProcess = 30,
        /// A process that computes gave no sign.
        PoolReplaced = 31,
        /// A host cannot compute.
        HostUnable = 32,
        /// A host's ids fail far more often than others'.
        HostOutlier = 33,
        /// Many ids ask for another attempt.
        ManyRetries = 34,
        /// A run has more dead letters than it may have.
        TooManyDead = 35,
        /// The first id of a process ended it.
        FirstId = 36,
        /// An id takes longer than its soft limit.
        IdSlow = 37,
        /// A process that computes cannot start.
        StartFailed = 38,
        /// An id crashed, or reached a limit.
        IdEnded = 39,
        /// One row is larger than a message may be.
        RowTooLarge = 40,
        /// A pass lacks rows.
        PassIncomplete = 41,
        /// Repairs did not make a pass complete.
        RepairsSpent = 42,
        /// Batches are missing whose ids are not in the stream.
        IdsNotInStream = 43,
        /// The ids for a replay are gone.
        IdsGone = 44,
        /// The rows for a rebuild are gone.
        RowsGone = 45,
        /// A condition selects other ids each time.
        SelectionUnstable = 46,
        /// The run was made of other ids.
        RunOfOtherIds = 47,
        /// The input changed while it was published.
        InputChanged = 48,
        /// The input has another order than at first.
        OrderChanged = 49,
        /// A quote of CSV is never closed.
        QuoteOpen = 50,
        /// Standard output cannot be written.
        OutputLost = 51,
        /// A server of the local stack ended, or cannot work.
        ServerEnded = 52,
    }
}

impl Code {
    /// A text for people, with the code behind it.
    pub fn mark(self, text: &str) -> String {
        format!("{text} [{self}]")
    }

    /// The code of a dead letter's reason that the worker gave. A function that rejects an id in the same words gets it too.
    pub fn of_reason(reason: &str) -> Option<Self> {
        if reason.contains("it was the first id of its process") {
            return Some(Self::FirstId);
        }
        if reason.starts_with("row of ") && reason.contains(" is larger than a message may be") {
            return Some(Self::RowTooLarge);
        }
        let known = [
            ("the row does not fit its columns: ", Self::ValueUnfit),
            ("crashed: ", Self::IdEnded),
            ("timed out after ", Self::IdEnded),
            ("out of memory: limit ", Self::IdEnded),
        ];
        known.into_iter().find(|(begin, _)| reason.starts_with(begin)).map(|(_, code)| code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "MS{:04}", *self as u16)
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Error {
    /// The row of README's table that says more about it; none where the error and its hint say all.
    pub fn code(&self) -> Option<Code> {
        Some(match self {
            Self::TableColumns { mendable: true, .. } => Code::ColumnsMissing,
            Self::TableColumns { mendable: false, .. } => Code::ColumnsDiffer,
            Self::ColumnTypes { .. } => Code::TypesRefused,
            Self::TablesMissing { .. } => Code::TablesMissing,
            Self::Detached { .. } | Self::NotMade { .. } => Code::TablesDetached,
            Self::ForgottenRun { .. } => Code::RunForgotten,
            Self::Summary { .. } => Code::SummaryFailed,
            Self::RowsLeft { .. } => Code::RebuildRefused,
            Self::Message { source: EnvelopeFault::NewerVersion { .. }, .. } => Code::BuildTooOld,
            Self::Child { .. } | Self::Start { .. } => Code::StartFailed,
            Self::IdsGone { .. } => Code::IdsGone,
            Self::RowsGone { .. } => Code::RowsGone,
            Self::Unstable { .. } => Code::SelectionUnstable,
            Self::OtherIds { .. } => Code::RunOfOtherIds,
            Self::InputChanged { .. } => Code::InputChanged,
            Self::OtherBatch { .. } => Code::OrderChanged,
            Self::Input { source, .. }
                if matches!(ReadFault::of(source), Some(ReadFault::OpenQuote { .. })) =>
            {
                Code::QuoteOpen
            }
            Self::BaseValues { .. }
            | Self::BaseGone { .. }
            | Self::NotMerged { .. }
            | Self::Mutation { .. }
            | Self::NotRemoved { .. }
            | Self::NoEffect { .. }
            | Self::Connect { .. }
            | Self::MixedLogins { .. }
            | Self::Credentials { .. }
            | Self::Certificates { .. }
            | Self::Broker { .. }
            | Self::BrokerSilent { .. }
            | Self::StreamSettings { .. }
            | Self::AtWork { .. }
            | Self::Unmarked { .. }
            | Self::OtherEnvironment { .. }
            | Self::TooLarge { .. }
            | Self::Message { .. }
            | Self::Record { .. }
            | Self::NoSuchRun { .. }
            | Self::RunClosed { .. }
            | Self::ForgottenFeed { .. }
            | Self::Overlap { .. }
            | Self::ClosedElsewhere { .. }
            | Self::BatchGone { .. }
            | Self::NoIds { .. }
            | Self::TooManyBatches { .. }
            | Self::Input { .. }
            | Self::BadLines { .. }
            | Self::ListBad { .. }
            | Self::PassedOver { .. }
            | Self::NoColumn { .. }
            | Self::QueryColumns { .. }
            | Self::Store { .. }
            | Self::Name(_)
            | Self::Pool { .. }
            | Self::PassOpen { .. }
            | Self::PassEnded { .. }
            | Self::NoPass { .. }
            | Self::Cancelled { .. }
            | Self::NeverSealed { .. }
            | Self::NotPublished { .. }
            | Self::NothingSelected { .. }
            | Self::NoSuchBatches { .. }
            | Self::Scattered { .. }
            | Self::Condition { .. }
            | Self::NotSealed { .. }
            | Self::NoSuchPass { .. }
            | Self::PassSeen { .. }
            | Self::Repaired { .. }
            | Self::StillOpen { .. }
            | Self::BegunMeanwhile { .. }
            | Self::StoredId { .. }
            | Self::Stopped => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_codes_are_listed_by_their_numbers() {
        for (index, code) in Code::ALL.iter().enumerate() {
            assert_eq!(code.to_string(), format!("MS{:04}", index + 1));
        }
        assert_eq!(serde_json::to_string(&Code::OutputLost).expect("JSON"), "\"MS0051\"");
    }

    #[test]
    fn reasons_of_dead_letters_have_codes() {
        let table = [
            ("crashed: signal 11", Some(Code::IdEnded)),
            ("timed out after 30 s", Some(Code::IdEnded)),
            ("out of memory: limit 512 MB", Some(Code::IdEnded)),
            (
                "row of 9 bytes is larger than a message may be (8 bytes): return less",
                Some(Code::RowTooLarge),
            ),
            ("the row does not fit its columns: column `a`", Some(Code::ValueUnfit)),
            ("crashed: signal 6; it was the first id of its process, and no process", Some(Code::FirstId)),
            ("zero has no digits", None),
        ];
        for (reason, code) in table {
            assert_eq!(Code::of_reason(reason), code, "{reason}");
        }
    }
}
