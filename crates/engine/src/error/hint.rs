//! What an operator can do about an error: the `hint:` line below it.

use std::io::ErrorKind;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{CreateStreamError, CreateStreamErrorKind};
use millstream::envelope::EnvelopeFault;

use super::{Error, Source, StoreFault, connect};
use crate::model::input_fault::{ColumnFault, ReadFault};
use crate::model::record::{PassState, SOURCE};
use crate::model::selection::Selection;

/// What is being done while a query of the user's runs, whose tables are not ours to create.
pub(crate) const USERS_QUERY: &str = "run the query";

impl Error {
    /// What an operator can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Connect { source, shown, .. } => connect::hint(source, shown.as_deref()),
            Self::Certificates { .. } => {
                "name a PEM file: certificates of the server's authority with --nats-ca, this process's own with --nats-cert and \
                 its key with --nats-key"
                    .into()
            }
            Self::MixedLogins { .. } => {
                "give all of them the same user and password: the client shows the same to every server".into()
            }
            Self::Broker { source, .. } if lacks_storage(source) => {
                "free some space on the disk of NATS, or make streams.ids_bytes and streams.rows_bytes in millstream.toml \
                 smaller"
                    .into()
            }
            Self::BrokerSilent { .. } => {
                "see that nats-server runs with JetStream on, and that its disk is not full (its log says so)".into()
            }
            Self::StreamSettings { stream, .. } => {
                format!("change it with `nats stream edit {stream}`, or remove the stream when nothing in it is needed")
            }
            Self::AtWork { .. } => {
                "stop them first; one that was killed is forgotten by itself within half a minute".into()
            }
            Self::Unmarked { .. } => {
                "nothing was removed: streams and tables of this program say in their metadata or comment that they are \
                 Millstream's; remove or rename these by hand first"
                    .into()
            }
            Self::OtherEnvironment { .. } => {
                "give the --namespace and --database that it belongs to; or another --namespace, whose streams and tables are \
                 its own"
                    .into()
            }
            Self::TooLarge { .. } => {
                "make batches smaller with --batch N, or raise max_payload of nats-server (8MB is sound)".into()
            }
            Self::Message { source: EnvelopeFault::NewerVersion { .. }, .. } => {
                "run a build of this pipeline that is as new as the one that wrote it".into()
            }
            Self::NoSuchRun { known, .. } if known.is_empty() => "there are no runs yet: `produce` makes one".into(),
            Self::NoSuchRun { known, .. } => format!("there are {}", known.join(", ")),
            Self::ForgottenRun { made_of, .. } if made_of == SOURCE => {
                "its ids came once: those that are stored are in ClickHouse, the others are lost".into()
            }
            Self::ForgottenRun { run, made_of } => {
                format!("`produce` with the same input ({made_of}) and --run {run} brings it back")
            }
            Self::OtherIds { goes_on, .. } => {
                format!("name a new run with --run for what was given now; {goes_on} goes on with this one")
            }
            Self::OtherBatch { run, .. } => {
                format!(
                    "give them in the order of the first start, and what is lost comes back; or `cancel {run}` and `forget {run}` \
                     make the name free (ids that are sorted, and those of a --query, have one order)"
                )
            }
            Self::Overlap { run, .. } => format!("`cancel {run}` and `forget {run}` give it up and make the name free"),
            Self::InputChanged { run, .. } => {
                format!(
                    "the input as it was, with --run {run}, publishes the rest; `cancel {run}` and `forget {run}` give it up and \
                     make the name free"
                )
            }
            Self::RunClosed { .. } | Self::ForgottenFeed { .. } | Self::ClosedElsewhere { .. } => {
                "name a new run with --run".into()
            }
            Self::PassedOver { .. } => "all other lines are published; mend these and give them to a run".into(),
            Self::BatchGone { .. } => {
                "it was removed, or is older than [streams] keep_ids: give what is still to come to a new run with \
                 --run"
                    .into()
            }
            Self::NoIds { .. } => {
                "give it one id a line; where there may be nothing to do, --allow-empty makes that a success".into()
            }
            Self::TooManyBatches { .. } => "make batches larger with --batch N, or cut the ids into several runs".into(),
            Self::Input { source, .. } => return input_hint(source),
            Self::ListBad { .. } => "name a file that can be written: --skip-bad=FILE".into(),
            Self::BadLines { of: "line", first, .. } if first.first().is_some_and(|(line, _)| *line == 1) => {
                "nothing was published; one id a line is wanted, or the column of a CSV file with --column NAME; --skip-bad \
                 passes bad lines over"
                    .into()
            }
            Self::BadLines { of, .. } => {
                format!("nothing was published; mend these {of}s and try again, or pass them over with --skip-bad")
            }
            Self::QueryColumns { found, .. } if found.contains("Nullable(") => {
                "a NULL is no id: select what is there, SELECT assumeNotNull(id) … WHERE id IS NOT NULL".into()
            }
            // Not `toUInt64`, which makes 18446744073709551615 of -1.
            Self::QueryColumns { expected, .. } if *expected == "UInt64" => {
                "select one column, converted where it must be: SELECT accurateCast(id, 'UInt64') …".into()
            }
            Self::QueryColumns { .. } => {
                "select one column, converted where it must be: SELECT toString(id) …".into()
            }
            Self::Credentials { .. } => {
                "name a credentials file, or one with an nkey's seed, with --nats-creds or NATS_CREDS".into()
            },
            Self::NoColumn { fault, .. } => column_hint(fault),
            Self::TableColumns { mendable: true, .. } => {
                "`setup` shows what it would change, `setup --yes` does it; processes of the version before go on beside it"
                    .into()
            }
            Self::TableColumns { .. } => {
                "change the pipeline's columns, alter the table, or use another database with --database".into()
            }
            Self::ColumnTypes { .. } => {
                "nothing was created; change the types in COLUMNS to ones that this server lets a table have".into()
            }
            Self::Detached { names } => {
                let statements: Vec<String> = names.iter().map(|name| format!("`{}`", attach(name))).collect();
                let them = if names.len() == 1 { "it back, with all that it holds" } else { "them back, with all that they hold" };
                format!("{} in ClickHouse {} {them}", statements.join(" and "), if names.len() == 1 { "brings" } else { "bring" })
            }
            Self::NotMade { names } => {
                let statements: Vec<String> = names.iter().map(|name| format!("`{}`", attach(name))).collect();
                format!("what is detached is not created anew: {} in ClickHouse, then the same command", statements.join(", "))
            }
            Self::TablesMissing { .. } => {
                "`setup` creates them; if they are in another database, name it with --database or CLICKHOUSE_DATABASE".into()
            }
            Self::PassOpen { run } => {
                format!(
                    "`status {run} --watch` shows when it is; `resume {run}` lets a paused one go on, `cancel {run}` ends it, \
                     `verify {run} --repair` helps one that does not move"
                )
            }
            Self::PassEnded { state: PassState::Sealed, run, .. } => {
                format!("`replay {run}` computes it again; `forget {run}` removes it")
            }
            Self::PassEnded { run, .. } => format!("`replay {run}` begins another; `forget {run}` removes all of it"),
            Self::NoPass { .. } => "try again once its first batch is published".into(),
            Self::Cancelled { run } | Self::IdsGone { run, cancelled: true, .. } => format!("`forget {run}` makes the name free; or give the run another with --run"),
            Self::NeverSealed { run } => format!("`replay {run}` computes all of it, `status {run}` shows its newest pass"),
            Self::NotPublished { run } | Self::IdsGone { run, .. } => {
                format!("`produce` with the same input and --run {run} publishes the rest")
            }
            Self::NothingSelected { run, selection: Selection::Letters(_) } => {
                format!("`dead {run}` lists those that there are")
            }
            Self::NothingSelected { .. } => "ask for others; `sql` shows what rows there are".into(),
            Self::NoSuchBatches { .. } => "name batches among those".into(),
            Self::Scattered { .. } => "name batches with --batches, or ids with --where".into(),
            Self::Condition { .. } => {
                "write it as after WHERE, over the columns of the view that ends in `_live`: --where \"status = 'dead'\"".into()
            }
            Self::BaseValues { run, pass, .. } | Self::BaseGone { run, pass, .. } => format!(
                "`replay {run}` computes every id of the run once more; where pass {pass} is not sealed, `cancel {run}` comes first"
            ),
            Self::NotMerged { table, .. } => format!(
                "`SYSTEM START MERGES {table}` lets ClickHouse merge again where merges were stopped; `doctor` names mutations that \
                 stand in the way"
            ),
            Self::NoEffect { .. } => "run the same command again; `nats stream report` and the log of nats-server say how its peers are".into(),
            Self::Mutation { .. } => "then the same command goes on".into(),
            Self::NotRemoved { .. } => {
                "rows may have landed meanwhile: the same command goes on; `doctor` says what stands in the way".into()
            }
            Self::Summary { source: StoreFault::Exception { .. } } => {
                "mend the SQL in the pipeline's `SUMMARY`, in which {rows} stands for the rows of a pass".into()
            }
            Self::Summary { source } => return source.hint(),
            Self::Unstable { .. } => {
                "use a condition on what the rows hold: no now(), no rand(), no table that changes; a pass that was begun with \
                 it can only be cancelled"
                    .into()
            }
            Self::RowsGone { run, .. } => {
                format!(
                    "`verify {run} --repair` has what is missing of the newest pass computed again; [streams] keep_rows \
                     keeps rows for the next time"
                )
            }
            Self::RowsLeft { run, .. } => {
                format!(
                    "`setup` of the build that computed them shows which columns the table lacks, `setup --yes` adds them; a \
                     constraint that refuses rows goes with ALTER TABLE … DROP CONSTRAINT; then `rebuild {run}` goes on"
                )
            }
            Self::NotSealed { run, .. } => format!("sinks insert its rows by themselves; `status {run}` shows how far it is"),
            Self::NoSuchPass { .. } => "`runs` lists runs, `status` shows a run's newest pass".into(),
            Self::PassSeen { run, .. } => {
                format!("`forget {run}` forgets the whole run; once a newer pass is sealed, this one alone can go")
            }
            Self::Repaired { run, .. } => format!("`status {run}` shows when it is sealed again"),
            Self::StillOpen { run, .. } => format!("`cancel {run}` ends it; then it can be forgotten"),
            Self::BegunMeanwhile { run } => format!("`runs` shows its state; `forget {run}` again goes on"),
            Self::Child { .. } | Self::Start { .. } => {
                "`main` of the pipeline runs in it up to `millstream_cli::main`, then its `start`: what they need must be there, and \
                 neither may end the process"
                    .into()
            }
            Self::Store { doing, source: StoreFault::Exception { code: 60, .. }, .. } if doing == USERS_QUERY => {
                "`sql \"SHOW TABLES\"` lists the tables that there are".into()
            }
            Self::Store { source, .. } => return source.hint(),
            Self::Broker { .. }
            | Self::Message { .. }
            | Self::Record { .. }
            | Self::Name(_)
            | Self::Pool { .. }
            | Self::StoredId { .. }
            | Self::Stopped => return None,
        })
    }
}

impl StoreFault {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Exception { code: 516 | 192 | 193 | 194, .. } => {
                "give the right ones with CLICKHOUSE_USER and CLICKHOUSE_PASSWORD".into()
            }
            Self::Exception { code: 497 | 164, .. } => "the user lacks a right that this command needs".into(),
            Self::Exception { code: 243, .. } => "free some disk space for ClickHouse".into(),
            Self::Exception { code: 81, .. } => {
                "the database does not exist: create it, or let `setup` with enough rights do it".into()
            }
            Self::Exception { code: 60, .. } => {
                "`sql 'SHOW TABLES'` lists the tables there are; one of the pipeline's own is made by `setup`".into()
            }
            Self::Exception { .. } => return None,
            Self::Unclear(text) if let Some((_, hint)) = CAUSES.iter().find(|(words, _)| text.contains(words)) => {
                (*hint).into()
            }
            Self::Unclear(_) | Self::Silent(_) => {
                "start ClickHouse there, name another with --clickhouse URL or CLICKHOUSE_URL, or name none to use \
                 the local stack"
                    .into()
            }
        })
    }
}

/// Causes by the words of the libraries that met them (hyper, rustls, the resolver): the client hands on no more than texts.
/// `tests/tests/refusals.rs` has those happen that need no certificates.
const CAUSES: [(&str, &str); 7] = [
    ("dns error", "the host's name is not known: see that it is spelled as it should be"),
    (
        "Port 9000 is for clickhouse-client",
        "that is ClickHouse's port for its own client: the one for HTTP is 8123, or 8443 for https",
    ),
    (
        "InvalidContentType",
        "what listens there does not speak TLS: write http:// instead of https://, or name the port for https (8443)",
    ),
    (
        "unexpected message from connection",
        "what listens there does not speak HTTP: ClickHouse's port for it is 8123, or 8443 with https:// before it",
    ),
    (
        "invalid HTTP version",
        "what listens there does not speak HTTP: ClickHouse's port for it is 8123, or 8443 with https:// before it",
    ),
    (
        "invalid peer certificate",
        "the server's certificate is not of an authority that this system knows: add it to the system's, or name its file in \
         SSL_CERT_FILE",
    ),
    (
        "failed to parse header value",
        "a user or password cannot have a line end or another control character in it",
    ),
];

/// The statement that brings a table or view back, which is in quotes with its database.
pub fn attach(name: &str) -> String {
    format!("ATTACH TABLE {name}")
}

fn lacks_storage(source: &Source) -> bool {
    // A bucket is a stream, whose refusal is the cause of the bucket's.
    let mut causes = std::iter::successors(Some(&**source as &dyn std::error::Error), |error| error.source());
    causes.any(|error| {
        let kind = error.downcast_ref().map(CreateStreamError::kind);
        matches!(kind, Some(CreateStreamErrorKind::JetStream(refusal))
            if refusal.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED)
    })
}

fn column_hint(fault: &ColumnFault) -> String {
    const NUMBER: &str = "where the first line is no header, --no-header takes columns by number: --column 1";
    match fault {
        ColumnFault::Missing { found } => {
            let delimited = |delimiter: &&str| found.iter().any(|name| name.contains(*delimiter));
            match [";", "\\t", "|"].into_iter().find(delimited) {
                Some(delimiter) if found.len() == 1 => {
                    format!("its delimiter looks like `{delimiter}`: --delimiter '{delimiter}'")
                }
                _ => format!("choose one of them with --column; {NUMBER}"),
            }
        }
        ColumnFault::Twice { .. } => "rename all but one of them".into(),
        ColumnFault::LikeIds { .. } => NUMBER.into(),
        ColumnFault::TooFew { .. } => "choose one of them, counted from 1; or another --delimiter".into(),
    }
}

fn input_hint(error: &std::io::Error) -> Option<String> {
    if let Some(fault) = ReadFault::of(error) {
        return Some(fault.hint());
    }
    Some(match error.kind() {
        ErrorKind::NotFound => {
            "name a file that is there; a relative path begins at the working directory".into()
        }
        ErrorKind::IsADirectory => "name a file in it".into(),
        ErrorKind::PermissionDenied => "let this user read it".into(),
        _ => return None,
    })
}
