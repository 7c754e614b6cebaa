//! The heartbeat: every process writes a small record into the bucket, every few seconds while it runs.
//!
//! `status` reads these records. Workers read them to know how many share a run's rate limit. A process that ends
//! deletes its record; the record of a killed process soon counts as stale, and a sealer purges it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use millstream::names::PassId;
use twox_hash::XxHash64;

use crate::error::{Error, full_cause};
use crate::model::host::{Doing, HostReport, host_name, instance};
use crate::model::moment::now_ms;
use crate::nats::bucket::{Entry, Records};
use crate::stop::Stop;

/// How often a process writes its heartbeat.
pub(crate) const REPORT: Duration = Duration::from_secs(3);
/// Time until the first report. A process that ends earlier leaves no record.
const FIRST_REPORT: Duration = Duration::from_millis(200);
/// Age beyond which a record means that its process is gone.
const STALE: Duration = Duration::from_secs(12);
/// A sealer purges records older than this.
const GONE: Duration = Duration::from_secs(600);

/// Reports what `current` returns until the process stops pulling, then deletes the record.
pub(crate) async fn report(records: &Records, build: &str, stop: &Stop, mut current: impl FnMut() -> Doing) {
    let host = host_name();
    let pid = std::process::id();
    let started_ms = now_ms();
    let mut key = None;
    let mut pause = FIRST_REPORT;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = REPORT,
            () = stop.no_more_taking() => break,
        }
        let host = host.clone();
        let build = build.to_owned();
        let doing = current();
        let report = HostReport { host, pid, instance: instance(), started_ms, build, doing };
        let key = key.get_or_insert_with(|| records.host_key(report.doing.role(), &report.host, pid));
        if let Err(error) = records.put_host(key, &report).await {
            tracing::debug!(
                error = full_cause(&error),
                "heartbeat not written: `status` may miss this process until the next one"
            );
        }
    }
    if let Some(key) = key
        && let Err(error) = records.remove_host(&key).await
    {
        tracing::debug!(error = full_cause(&error), "heartbeat record not deleted: a sealer will purge it");
    }
}

/// Processes that are alive, in order of their role and host.
///
/// # Errors
/// When NATS does not answer.
pub async fn alive(records: &Records) -> Result<Vec<HostReport>, Error> {
    let mut alive: Vec<HostReport> = fresh(records).await?.map(|(_, entry)| entry.record).collect();
    alive.sort_by(|a, b| (a.doing.role(), &a.host, a.pid).cmp(&(b.doing.role(), &b.host, b.pid)));
    Ok(alive)
}

/// How many other live sinks have precedence over this one for sealing a pass. The order differs from pass to pass, so
/// that sinks share the work.
///
/// # Errors
/// When NATS does not answer.
pub(crate) async fn sinks_before(records: &Records, pass: &PassId) -> Result<u64, Error> {
    let place = |host: &str, pid: u32, instance: u32| {
        let process = format!("{host}/{pid}/{instance}");
        (XxHash64::oneshot(u64::from(pass.pass), format!("{} {process}", pass.run).as_bytes()), process)
    };
    let own = place(&host_name(), std::process::id(), instance());
    let alive = fresh(records).await?.map(|(_, entry)| entry.record);
    let sinks = alive.filter(is_sink);
    Ok(sinks.filter(|sink| place(&sink.host, sink.pid, sink.instance) < own).count() as u64)
}

/// Reports of live processes, by key. Age is measured by the server's clock alone.
async fn fresh(records: &Records) -> Result<impl Iterator<Item = (String, Entry<HostReport>)>, Error> {
    // The time first: if the server is away between the two requests, no report looks older for it.
    let now_ms = records.server_ms().await?;
    let reports = records.hosts().await?;
    Ok(reports.into_iter().filter(move |(_, entry)| is_fresh(entry.written_ms, now_ms)))
}

fn is_sink(report: &HostReport) -> bool {
    matches!(report.doing, Doing::Sink { .. })
}

/// Whether a process that wrote its record at `written_ms` counts as alive at `now_ms`, by one clock.
fn is_fresh(written_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(written_ms) < STALE.as_millis() as u64
}

/// Whether no live sink holds rows of a pass, by reports that all were written after `since_ms`. A report does not
/// cover rows that the sink pulled after it.
///
/// # Errors
/// When NATS does not answer.
pub(crate) async fn none_holds(records: &Records, pass: &PassId, since_ms: u64) -> Result<bool, Error> {
    let mut sinks = fresh(records).await?.filter(|(_, entry)| is_sink(&entry.record));
    Ok(sinks.all(|(_, entry)| entry.written_ms > since_ms && !entry.record.holds(pass)))
}

/// Whether a sink holds rows of a pass by its next report. A sink that writes no report for as long as a record counts
/// as fresh is gone.
///
/// # Errors
/// When NATS does not answer.
pub(crate) async fn holds_soon(records: &Records, pass: &PassId) -> Result<bool, Error> {
    // By the newest report, because no sink could write one while the server was away.
    let sinks = async || {
        let reports = records.hosts().await?;
        let newest_ms = reports.iter().map(|(_, entry)| entry.written_ms).max().unwrap_or(0);
        let is_alive = |entry: &Entry<HostReport>| is_fresh(entry.written_ms, newest_ms);
        let sinks = reports.into_iter().filter(|(_, entry)| is_sink(&entry.record) && is_alive(entry));
        Ok::<HashMap<_, _>, Error>(sinks.collect())
    };
    let first = sinks().await?;
    let begun = Instant::now();
    loop {
        let now = sinks().await?;
        if now.values().any(|entry| entry.record.holds(pass)) {
            return Ok(true);
        }
        let is_old = |(key, entry): (&String, &Entry<HostReport>)| {
            now.get(key).is_some_and(|now| now.revision == entry.revision)
        };
        if !first.iter().any(is_old) || begun.elapsed() >= STALE {
            return Ok(false);
        }
        tokio::time::sleep(REPORT / 6).await;
    }
}

/// How often workers of this fleet returned the batch with this subject because of their own fault, by their reports.
pub(crate) async fn returned(records: &Records, subject: &str) -> i64 {
    match records.hosts().await {
        Ok(entries) => entries.iter().map(|(_, entry)| entry.record.returned(subject)).sum(),
        // Then the batch is computed one id at a time: slower, with an equal result.
        Err(_) => 0,
    }
}

/// Purges the records of dead processes.
///
/// # Errors
/// When NATS does not answer.
pub(crate) async fn sweep(records: &Records) -> Result<(), Error> {
    let now_ms = records.server_ms().await?;
    records.sweep_hosts(now_ms.saturating_sub(GONE.as_millis() as u64)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_until_its_heartbeat_is_old() {
        let now = 1_795_621_875_015;
        for (written_ms, fresh) in
            [(now, true), (now - 11_999, true), (now - 12_000, false), (now + 500, true)]
        {
            assert_eq!(is_fresh(written_ms, now), fresh, "{written_ms}");
        }
    }
}
