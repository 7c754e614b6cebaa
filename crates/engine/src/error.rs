//! What can fail, and whether trying again may help.

mod code;
mod connect;
mod hint;
mod store;
mod told;

pub use code::Code;
pub(crate) use hint::USERS_QUERY;
pub use hint::attach;
pub(crate) use store::PUSHING;
pub use store::{Class, StoreFault};
pub(crate) use told::{full_cause, full_hint};

use std::time::Duration;

use millstream::envelope::EnvelopeFault;
use millstream::names::NameFault;

use crate::model::input_fault::ColumnFault;
use crate::model::record::PassState;
use crate::model::selection::Selection;
use told::{are, held, listed, passes, refused_types, run_named};

/// Any failure of another party.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// An operation that failed. `Display` fits after "error: failed to" and leaves the cause to `source()`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pass whose rows are to be taken over does not hold what was computed.
    #[error(
        "take over rows for pass {pass} of run `{run}`: {batches} batches of pass {base} hold other values than those computed"
    )]
    BaseValues {
        /// The run.
        run: String,
        /// The pass that takes them over.
        pass: u32,
        /// The pass that has them.
        base: u32,
        /// Batches at fault.
        batches: u64,
    },
    /// The pass whose rows are to be taken over has lost some of them.
    #[error(
        "complete pass {pass} of run `{run}`: {rows} rows of pass {base}, from which it takes over those that it does not \
         compute, are gone from the table"
    )]
    BaseGone {
        /// The run.
        run: String,
        /// The pass that takes them over.
        pass: u32,
        /// The pass that had them.
        base: u32,
        /// Rows that it lacks.
        rows: u64,
    },
    /// ClickHouse was asked to merge raw duplicates away, and they are there still.
    #[error("merge raw duplicates away: {rows} rows of {table} are stored a second time still")]
    NotMerged {
        /// The table.
        table: String,
        /// Rows that are too many.
        rows: u64,
        /// What ClickHouse says about it; nothing where it said that it was done.
        #[source]
        source: Option<StoreFault>,
    },
    /// A mutation cannot end.
    #[error("{doing}: {why}")]
    Mutation {
        /// What it was for.
        doing: String,
        /// What stands in the way, and what helps.
        why: String,
    },
    /// A mutation has ended, and rows that it was to remove are there still.
    #[error("{doing}: {rows} rows are there still, though ClickHouse says that it was done")]
    NotRemoved {
        /// What it was for.
        doing: String,
        /// Rows that are there.
        rows: u64,
    },
    /// NATS has said that something is done, and it is not.
    #[error("{doing}: NATS says that it was done, but {seen}")]
    NoEffect {
        /// What was to be done.
        doing: String,
        /// What was seen instead.
        seen: String,
    },
    /// The pipeline's own SQL about a pass is refused, or has no answer.
    #[error("use the pipeline's SUMMARY")]
    Summary {
        /// What ClickHouse says about it.
        #[source]
        source: StoreFault,
    },
    /// No connection to NATS.
    #[error("connect to NATS at `{server}` ({origin})")]
    Connect {
        /// The address tried, without a password.
        server: String,
        /// Where the address came from.
        origin: String,
        /// The login that was shown, in words and without its secret; none where nothing was.
        shown: Option<String>,
        /// Why.
        #[source]
        source: async_nats::ConnectError,
    },
    /// Servers of one address are given different users.
    #[error("log in to NATS at `{server}` ({origin}): its addresses name different users or tokens")]
    MixedLogins {
        /// The address, without passwords.
        server: String,
        /// Where it came from.
        origin: String,
    },
    /// The credentials file cannot be used.
    #[error("read NATS credentials from `{path}`")]
    Credentials {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of certificates or of a key for NATS cannot be used.
    #[error("read the {what} for NATS from `{path}`")]
    Certificates {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The broker refused or did not answer.
    #[error("{doing}")]
    Broker {
        /// The operation, with the names in it.
        doing: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The broker did not answer in time.
    #[error("{doing}: no answer within {} s", after.as_secs())]
    BrokerSilent {
        /// The operation.
        doing: String,
        /// How long was waited.
        after: Duration,
    },
    /// A stream exists with settings that break the protocol.
    #[error("use stream `{stream}`: its {setting} is {found}, it must be {expected}")]
    StreamSettings {
        /// The stream.
        stream: String,
        /// The setting.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        expected: String,
    },
    /// Processes work for the pipeline that is to be removed.
    #[error("remove pipeline `{pipeline}`, for which processes work: {}", .processes.join("; "))]
    AtWork {
        /// The pipeline.
        pipeline: String,
        /// What they are.
        processes: Vec<String>,
    },
    /// Something has a name of the pipeline's that is to be removed, and does not say that Millstream made it.
    #[error("remove pipeline `{pipeline}`: {} may be another's", .what.join(", "))]
    Unmarked {
        /// The pipeline.
        pipeline: String,
        /// Its tables and streams.
        what: Vec<String>,
    },
    /// What a server has under our names is another environment's.
    #[error("use {what}: it belongs to {theirs}, and this process to {ours}")]
    OtherEnvironment {
        /// The stream or table.
        what: String,
        /// The environment that it says it is of.
        theirs: String,
        /// The environment of this process.
        ours: String,
    },
    /// A message is larger than the server takes.
    #[error("publish `{subject}`: {bytes} bytes are more than the server's limit of {limit}")]
    TooLarge {
        /// Its subject.
        subject: String,
        /// Its size.
        bytes: usize,
        /// The server's `max_payload`.
        limit: usize,
    },
    /// A message cannot be used.
    #[error("read message `{subject}`")]
    Message {
        /// Its subject.
        subject: String,
        /// Why.
        #[source]
        source: EnvelopeFault,
    },
    /// A record in the bucket cannot be read.
    #[error("read record `{key}`")]
    Record {
        /// Its key.
        key: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// There is no such run.
    #[error("find {}", run_named(.run))]
    NoSuchRun {
        /// The name asked for.
        run: String,
        /// Names there are, the newest first, a few.
        known: Vec<String>,
    },
    /// NATS has lost the run; ClickHouse knows it.
    #[error("find run `{run}` in NATS, which has forgotten it: ClickHouse has its record")]
    ForgottenRun {
        /// The run.
        run: String,
        /// What it was made of.
        made_of: String,
    },
    /// The run exists and was made of something else.
    #[error("add to run `{run}`: it was made of {existing}, not of {given}")]
    OtherIds {
        /// The run.
        run: String,
        /// What it was made of.
        existing: String,
        /// What was given now.
        given: String,
        /// The words that go on with the run.
        goes_on: String,
    },
    /// A batch of the run exists with other ids, though all of them are the same by count and digest.
    #[error(
        "publish batch {batch} of run `{run}`: the ids are those that the run was begun with, in another order, and the \
         stream holds others of them under that number"
    )]
    OtherBatch {
        /// The run.
        run: String,
        /// The batch.
        batch: u32,
    },
    /// An open run that was closed takes no more ids.
    #[error("add to run `{run}`: it is closed, with {ids} ids")]
    RunClosed {
        /// The run.
        run: String,
        /// Ids that it has.
        ids: u64,
    },
    /// An open run was closed while this process still had ids for it.
    #[error("add {ids} ids and what follows to run `{run}`: another producer has closed it")]
    ClosedElsewhere {
        /// The run.
        run: String,
        /// Ids that were read and are not in it.
        ids: u64,
    },
    /// An open run whose record is in ClickHouse alone.
    #[error("add to run `{run}`: NATS has forgotten it, and the numbers of its batches with it")]
    ForgottenFeed {
        /// The run.
        run: String,
    },
    /// A batch of an open run cannot be counted.
    #[error("count the ids of batch {batch} of run `{run}`: the stream holds it no more")]
    BatchGone {
        /// The run.
        run: String,
        /// The batch.
        batch: u32,
    },
    /// Two producers have published a run in different orders.
    #[error(
        "publish run `{run}`: the stream holds {ids} ids of it more often than the input does, because two producers have \
         published it in different orders; the run is not closed"
    )]
    Overlap {
        /// The run.
        run: String,
        /// How many.
        ids: u64,
    },
    /// The input changed between the two readings, so that what is published is not what was checked.
    #[error(
        "publish run `{run}`: {input} changed after it was checked: it had {surveyed}, now {now}; the run is not closed"
    )]
    InputChanged {
        /// The run.
        run: String,
        /// The input, as the user named it.
        input: String,
        /// Count and digest of what was checked.
        surveyed: String,
        /// What there is now: count and digest, or why they are not known.
        now: String,
    },
    /// Input without an id.
    #[error("make a run of {input}: there are no ids in it")]
    NoIds {
        /// The input, as the user named it.
        input: String,
    },
    /// A run of more batches than can be numbered.
    #[error("make a run of {input}: it has more than {} batches", u32::MAX)]
    TooManyBatches {
        /// The input, as the user named it.
        input: String,
    },
    /// The input cannot be read.
    #[error("read {input}")]
    Input {
        /// The input, as the user named it.
        input: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Lines or fields of the input are not ids.
    #[error("read {input}: {} no id{}", held(of, *.count), listed(of, *.count, .first))]
    BadLines {
        /// The input, as the user named it.
        input: String,
        /// What they are called: `line`, or `row` of a query's answer.
        of: &'static str,
        /// How many.
        count: u64,
        /// The first few: line number and what is wrong.
        first: Vec<(u64, String)>,
    },
    /// Bad lines that are passed over cannot be listed.
    #[error("list {input}")]
    ListBad {
        /// What was to be listed where.
        input: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Lines that hold no id, where those alone are not published.
    #[error("publish all of {input}: {} no id{}", held("line", *.count), listed("line", *.count, .first))]
    PassedOver {
        /// The input, as the user named it.
        input: String,
        /// How many.
        count: u64,
        /// The first few: line number and what is wrong.
        first: Vec<(u64, String)>,
    },
    /// A CSV input has no such column.
    #[error("read {input}: {fault}")]
    NoColumn {
        /// The input with its column, as the user named it.
        input: String,
        /// Why not.
        fault: ColumnFault,
    },
    /// A query's answer is no column of ids.
    #[error("take ids from the query: its columns are {found}, one of type {expected} is needed")]
    QueryColumns {
        /// Columns and types found.
        found: String,
        /// The id's type.
        expected: &'static str,
    },
    /// Rows of the pipeline cannot be inserted into the rows table.
    #[error("use table {table}, which does not take the pipeline's rows:\n  {}", faults.join("\n  "))]
    TableColumns {
        /// The table, in ClickHouse's quotes.
        table: String,
        /// One entry a column: what was found, what was expected, what to do.
        faults: Vec<String>,
        /// Whether `setup --yes` mends all of them.
        mendable: bool,
    },
    /// The server has no such types, or lets no table have them.
    #[error("create a table with the pipeline's columns:\n  {}", refused_types(.faults))]
    ColumnTypes {
        /// The columns: name, type as declared, the server's words.
        faults: Vec<(String, String, String)>,
    },
    /// Tables or views of the pipeline are detached: ClickHouse keeps their names and data, and serves neither.
    #[error("use {}, which {} detached in ClickHouse", .names.join(", "), if .names.len() == 1 { "is" } else { "are" })]
    Detached {
        /// Their names in quotes, with the database.
        names: Vec<String>,
    },
    /// ClickHouse has said that tables or views were created, and they are not there.
    #[error("create {}: ClickHouse says that it was done, and {} not there", .names.join(", "), if .names.len() == 1 { "it is" } else { "they are" })]
    NotMade {
        /// Their names in quotes, with the database.
        names: Vec<String>,
    },
    /// Tables of the pipeline are not where they should be.
    #[error("find the tables of pipeline `{pipeline}` in database `{database}`: {} missing", are(.missing))]
    TablesMissing {
        /// The pipeline.
        pipeline: String,
        /// The database.
        database: String,
        /// Names of tables and views that are not there.
        missing: Vec<String>,
    },
    /// ClickHouse refused, failed or did not answer.
    #[error("{doing} {} ClickHouse at `{server}` ({origin})", if doing == "connect" { "to" } else { "in" })]
    Store {
        /// The operation.
        doing: String,
        /// The address, without a password.
        server: String,
        /// Where the address came from.
        origin: String,
        /// Why.
        #[source]
        source: StoreFault,
    },
    /// A name outside its grammar.
    #[error("use the name given")]
    Name(#[from] NameFault),
    /// The CPU pool could not be made.
    #[error("start {threads} compute threads")]
    Pool {
        /// Threads asked for.
        threads: usize,
        /// Why.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
    /// A replay of a run whose newest pass is not sealed.
    #[error("replay run `{run}`: its newest pass is not sealed yet")]
    PassOpen {
        /// The run.
        run: String,
    },
    /// Something to be done with a pass that is at its end.
    #[error("{doing} run `{run}`: its newest pass, {pass}, is {state}")]
    PassEnded {
        /// What was to be done.
        doing: &'static str,
        /// The run.
        run: String,
        /// Its newest pass.
        pass: u32,
        /// Where that stands.
        state: PassState,
    },
    /// A run of which nothing is computed yet.
    #[error("find a pass of run `{run}`: it has none yet")]
    NoPass {
        /// The run.
        run: String,
    },
    /// More ids for a run that was cancelled.
    #[error("publish run `{run}`: it was cancelled")]
    Cancelled {
        /// The run.
        run: String,
    },
    /// A replay of a part of a run that has no sealed pass to take the rest from.
    #[error(
        "replay a part of run `{run}`: no pass of it is sealed, so there is nothing to take the other rows from"
    )]
    NeverSealed {
        /// The run.
        run: String,
    },
    /// A replay of a run that is not published to its end.
    #[error("replay run `{run}`: it is not published to its end")]
    NotPublished {
        /// The run.
        run: String,
    },
    /// A replay of ids that are none.
    #[error("replay {selection} of run `{run}`: there are none like that")]
    NothingSelected {
        /// The run.
        run: String,
        /// What was asked for.
        selection: Selection,
    },
    /// A replay of batches that the run does not have.
    #[error("replay {selection} of run `{run}`: its batches are 0..{batches}")]
    NoSuchBatches {
        /// The run.
        run: String,
        /// What was asked for.
        selection: Selection,
        /// How many it has.
        batches: u32,
    },
    /// Batches that lie too much apart to be named.
    #[error("replay {selection} of run `{run}`: they are in {ranges} places, more than can be kept")]
    Scattered {
        /// The run.
        run: String,
        /// What was asked for.
        selection: Selection,
        /// Groups of batches with others between.
        ranges: usize,
    },
    /// A condition in SQL that is none.
    #[error("select ids where `{condition}`")]
    Condition {
        /// The condition.
        condition: String,
        /// What ClickHouse says about it.
        #[source]
        source: StoreFault,
    },
    /// A condition that selects other ids each time.
    #[error(
        "select {selection} of run `{run}`: they are not the same each time: {before} ids, then {after} ids"
    )]
    Unstable {
        /// The run.
        run: String,
        /// What was asked for.
        selection: Selection,
        /// How many at first.
        before: u64,
        /// How many later.
        after: u64,
    },
    /// Ids that the stream holds no more.
    #[error(
        "replay run `{run}`: the ids of {missing} of its {batches} batches are no longer in stream `{stream}`: {why}"
    )]
    IdsGone {
        /// The run.
        run: String,
        /// The stream.
        stream: String,
        /// Batches that are missing there.
        missing: u64,
        /// Batches of the run.
        batches: u32,
        /// Since when and why, as far as it can be known.
        why: String,
        /// Whether because the run was cancelled: then the name takes no ids any more.
        cancelled: bool,
    },
    /// Rows that neither the table nor the stream has.
    #[error(
        "rebuild pass {pass} of run `{run}`: {missing} of its {batches} batches lack rows that stream `{stream}` does not hold: {why}"
    )]
    RowsGone {
        /// The run.
        run: String,
        /// The pass.
        pass: u32,
        /// The stream.
        stream: String,
        /// Batches that lack rows.
        missing: u64,
        /// Batches of the run.
        batches: u32,
        /// Why, as far as it can be known.
        why: String,
    },
    /// Rows that the table does not take.
    #[error("rebuild pass {pass} of run `{run}`, whose rows the table does not take:\n  {}", faults.join("\n  "))]
    RowsLeft {
        /// The run.
        run: String,
        /// The pass.
        pass: u32,
        /// One entry for each build and cause: the columns, or what ClickHouse says.
        faults: Vec<String>,
    },
    /// A rebuild of a pass that was never whole.
    #[error("rebuild pass {pass} of run `{run}`: it is {state}, not sealed")]
    NotSealed {
        /// The run.
        run: String,
        /// The pass.
        pass: u32,
        /// What it is.
        state: PassState,
    },
    /// There is no such pass.
    #[error("find pass {pass} of run `{run}`: {}", passes(.known))]
    NoSuchPass {
        /// The run.
        run: String,
        /// The pass asked for.
        pass: u32,
        /// The passes that there are.
        known: Vec<u32>,
    },
    /// A pass that readers see.
    #[error("forget pass {pass} of run `{run}`: it is the one that readers see")]
    PassSeen {
        /// The run.
        run: String,
        /// The pass.
        pass: u32,
    },
    /// A pass that readers see, and of which something is computed again.
    #[error("cancel pass {pass} of run `{run}`: readers see it, and it is only being repaired")]
    Repaired {
        /// The run.
        run: String,
        /// The pass.
        pass: u32,
    },
    /// A pass that may still be computed.
    #[error("forget pass {pass} of run `{run}`: it is {state}")]
    StillOpen {
        /// The run.
        run: String,
        /// The pass.
        pass: u32,
        /// `running` or `paused`.
        state: PassState,
    },
    /// Another process began a pass of the run while it was forgotten.
    #[error("forget run `{run}` to its end: another process began a pass of it meanwhile")]
    BegunMeanwhile {
        /// The run.
        run: String,
    },
    /// ClickHouse holds an id that is none of the pipeline's.
    #[error("read the ids of batch {batch} of run `{run}` back from ClickHouse")]
    StoredId {
        /// The run.
        run: String,
        /// The batch.
        batch: u32,
        /// What is wrong with it.
        #[source]
        source: millstream::id::IdFault,
    },
    /// A process that computes could not be started.
    #[error("start `{program}` as a process that computes")]
    Child {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The pipeline could not get ready in this process.
    #[error("get ready to compute")]
    Start {
        /// Why.
        #[source]
        source: Source,
    },
    /// Asked to stop before it was done.
    #[error("finish: it was told to stop")]
    Stopped,
}

impl Error {
    /// Whether this host is at fault, and not what it was asked to compute.
    pub(crate) fn is_the_hosts(&self) -> bool {
        matches!(self, Self::Child { .. } | Self::Pool { .. } | Self::Start { .. })
    }

    /// Whether no server was there to answer: it starts, or an election is not over.
    pub(crate) fn is_nobody(&self) -> bool {
        match self {
            Self::BrokerSilent { .. } => true,
            Self::Broker { source, .. } => {
                let cause = full_cause(&**source);
                ["no responders", "no stream found"].iter().any(|text| cause.contains(text))
            }
            _ => false,
        }
    }
}

/// Wraps a failure of the broker with what was being done.
pub(crate) fn broker<E: Into<Source>>(doing: impl Into<String>) -> impl FnOnce(E) -> Error {
    let doing = doing.into();
    move |source| Error::Broker { doing, source: source.into() }
}
