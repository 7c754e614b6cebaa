//! Whether what is to be computed can be, and whether NATS and ClickHouse know the same runs.

use std::collections::HashSet;

use millstream::Id;
use millstream::names::RunName;
use millstream_engine::compute::Function;
use millstream_engine::error::Code;
use millstream_engine::fleet::heartbeat;
use millstream_engine::model::host::{Cause, Doing, HostReport, left_hint};
use millstream_engine::work::prove;
use millstream_engine::{Broker, Error, Store};

use super::super::Context;
use super::{Check, Verdict, check, failed};
use crate::show;

/// Runs that are named.
const SHOWN: usize = 8;

/// What a worker proves before it draws: its process, its threads, the pipeline's `start`.
pub(super) async fn check_host<I: Id>(context: &Context, function: &Function<I>) -> Check {
    match prove(function, &context.config.work).await {
        Ok(()) => check(
            "computing",
            Verdict::Ok,
            "this host can compute: a process of the pipeline got ready",
            None,
        ),
        Err(error) => failed("computing", &error.into()),
    }
}

/// What the processes of the fleet say of themselves; nothing where no bucket is set up yet.
pub(super) async fn check_processes(broker: &Broker) -> Vec<Check> {
    let Ok(records) = broker.records().await else { return Vec::new() };
    match heartbeat::alive(&records).await {
        Ok(hosts) => vec![workers(&hosts), rows_waiting(&hosts), seals_waiting(&hosts)],
        Err(error) => vec![failed("workers", &error.into())],
    }
}

/// Workers that cannot compute.
fn workers(hosts: &[HostReport]) -> Check {
    let workers = hosts.iter().filter(|host| matches!(host.doing, Doing::Work { .. })).count() as u64;
    let unable = |host: &HostReport| {
        let why = host.unable()?;
        Some(format!("{} (process {}) draws no batches: {why}", host.host, host.pid))
    };
    let told: Vec<String> = hosts.iter().filter_map(unable).collect();
    let at_work = match workers {
        0 => "none at work".to_owned(),
        _ => format!("{} at work, and able to compute", show::grouped(workers)),
    };
    match told[..] {
        [] => check("workers", Verdict::Ok, at_work, None),
        _ => check(
            "workers",
            Verdict::Warn,
            told.join("; "),
            Some("mend those hosts: they try again by themselves, and others compute meanwhile"),
        )
        .coded(Code::HostUnable),
    }
}

/// Rows that sinks have and the table does not take.
fn rows_waiting(hosts: &[HostReport]) -> Check {
    let left =
        |host: &HostReport| Some(format!("{} (sink on {}, process {})", host.left()?, host.host, host.pid));
    let told: Vec<String> = hosts.iter().filter_map(left).collect();
    match told[..] {
        [] => check("rows waiting", Verdict::Ok, "none that the table does not take", None),
        _ => {
            let refused =
                hosts.iter().flat_map(HostReport::left_passes).any(|left| left.cause == Cause::Refused);
            let code = if refused { Code::RowsRefused } else { Code::RowsOfOtherSchema };
            check("rows waiting", Verdict::Warn, told.join("; "), Some(&left_hint(hosts))).coded(code)
        }
    }
}

/// What keeps passes from their seal, as running sinks found it.
fn seals_waiting(hosts: &[HostReport]) -> Check {
    let waits = hosts.iter().flat_map(HostReport::waits);
    let mut told: Vec<String> =
        waits.map(|wait| format!("run `{}` (pass {}): {}", wait.run, wait.pass, wait.why)).collect();
    told.sort_unstable();
    told.dedup();
    match told[..] {
        [] => check("seals waiting", Verdict::Ok, "none", None),
        _ => check("seals waiting", Verdict::Warn, told.join("; "), None).coded(Code::PassWaits),
    }
}

/// Runs that ClickHouse keeps the records of and NATS has none of: its volume was lost, or this is another NATS.
pub(super) async fn check_runs(broker: &Broker, store: &Store) -> Check {
    match forgotten(broker, store).await {
        Ok(runs) if runs.is_empty() => {
            check("runs", Verdict::Ok, "NATS knows those that ClickHouse keeps", None)
        }
        Ok(runs) => told_forgotten(store, &runs).await,
        Err(error) => failed("runs", &error.into()),
    }
}

async fn forgotten(broker: &Broker, store: &Store) -> Result<Vec<RunName>, Error> {
    // ClickHouse first: a run is recorded in NATS before it is there.
    let kept = store.kept_runs().await?;
    let known: HashSet<RunName> = if !kept.is_empty() && broker.is_set_up().await? {
        broker.records().await?.runs().await?.into_iter().map(|run| run.run).collect()
    } else {
        HashSet::new()
    };
    Ok(kept.into_iter().filter(|run| !known.contains(run)).collect())
}

async fn told_forgotten(store: &Store, runs: &[RunName]) -> Check {
    let mut named = Vec::new();
    let mut hint = None;
    for run in runs.iter().take(SHOWN) {
        let made_of = match store.run_record(run).await {
            Ok(Some(record)) => record.source,
            Ok(None) => continue,
            Err(error) => return failed("runs", &error.into()),
        };
        named.push(format!("`{run}` ({made_of})"));
        hint = Error::ForgottenRun { run: run.to_string(), made_of }.hint();
    }
    if runs.len() > 1 {
        hint = Some("`produce` with the same input and --run NAME brings a run back".to_owned());
    }
    let more = if runs.len() > SHOWN { ", …" } else { "" };
    let count = show::counted(runs.len() as u64, "run");
    let found = format!(
        "NATS has forgotten {count}, of which ClickHouse has the records: {}{more}; this is another NATS, or it has lost its volume",
        named.join(", ")
    );
    check("runs", Verdict::Warn, found, hint.as_deref()).coded(Code::RunForgotten)
}
