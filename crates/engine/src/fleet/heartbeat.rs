//! What every process says of itself: a small record in the bucket, every few seconds while it runs.
//!
//! `status` reads them, and so do workers, to know how many share a run's rate limit. A process that ends takes its record
//! away; that of one which was killed is stale soon and removed by a sealer.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use millstream::names::PassId;
use twox_hash::XxHash64;

use crate::error::{Error, full_cause};
use crate::model::host::{Doing, HostReport, host_name, instance};
use crate::model::moment::now_ms;
use crate::nats::bucket::{Entry, Records};
use crate::stop::Stop;

/// How often a process says what it does.
pub(crate) const REPORT: Duration = Duration::from_secs(3);
/// Time until the first report. A process that ends earlier leaves no record.
const FIRST_REPORT: Duration = Duration::from_millis(200);
/// A record older than this is that of a process which is gone.
const STALE: Duration = Duration::from_secs(12);
/// A sealer purges records older than this.
const GONE: Duration = Duration::from_secs(600);

/// Reports what `look` says until taking stops, then takes the record away.
pub(crate) async fn report(records: &Records, build: &str, stop: &Stop, mut look: impl FnMut() -> Doing) {
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
        let doing = look();
        let report = HostReport { host, pid, instance: instance(), started_ms, build, doing };
        let key = key.get_or_insert_with(|| records.host_key(report.doing.role(), &report.host, pid));
        if let Err(error) = records.put_host(key, &report).await {
            tracing::debug!(error = full_cause(&error), "what this process does could not be reported");
        }
    }
    if let Some(key) = key
        && let Err(error) = records.remove_host(&key).await
    {
        tracing::debug!(error = full_cause(&error), "this process's record is left to be removed");
    }
}

/// Processes that are alive, in order of their role and host.
///
/// # Errors
/// The broker's.
pub async fn alive(records: &Records) -> Result<Vec<HostReport>, Error> {
    let mut alive: Vec<HostReport> = fresh(records).await?.map(|(_, entry)| entry.record).collect();
    alive.sort_by(|a, b| (a.doing.role(), &a.host, a.pid).cmp(&(b.doing.role(), &b.host, b.pid)));
    Ok(alive)
}

/// How many other sinks that are alive come before this process to a pass, whose rows each of them could prove. The order is
/// another for each pass.
///
/// # Errors
/// The broker's.
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

/// What processes that are alive said, by key. When they said it, and what the time is, is by the server's clock.
async fn fresh(records: &Records) -> Result<impl Iterator<Item = (String, Entry<HostReport>)>, Error> {
    // The time first: a server that is away between the two questions makes no report older.
    let now_ms = records.server_ms().await?;
    let reports = records.hosts().await?;
    Ok(reports.into_iter().filter(move |(_, entry)| is_fresh(entry.written_ms, now_ms)))
}

fn is_sink(report: &HostReport) -> bool {
    matches!(report.doing, Doing::Sink { .. })
}

/// Whether a process that wrote its record then counts as alive now, by one clock.
fn is_fresh(written_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(written_ms) < STALE.as_millis() as u64
}

/// Whether no sink that is alive has rows of a pass in hand, by reports that were all written after this moment: what a sink has
/// drawn since its report is in none.
///
/// # Errors
/// The broker's.
pub(crate) async fn none_holds(records: &Records, pass: &PassId, since_ms: u64) -> Result<bool, Error> {
    let mut sinks = fresh(records).await?.filter(|(_, entry)| is_sink(&entry.record));
    Ok(sinks.all(|(_, entry)| entry.written_ms > since_ms && !entry.record.holds(pass)))
}

/// Whether a sink has rows of a pass in hand by the report that it makes next. One that makes none for as long as that counts is
/// gone.
///
/// # Errors
/// The broker's.
pub(crate) async fn holds_soon(records: &Records, pass: &PassId) -> Result<bool, Error> {
    // By the newest report: while the server was away none was written.
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

/// How often processes of this fleet handed the batch with this subject back for their own sake, as far as they said so.
pub(crate) async fn returned(records: &Records, subject: &str) -> i64 {
    match records.hosts().await {
        Ok(entries) => entries.iter().map(|(_, entry)| entry.record.returned(subject)).sum(),
        // A batch that is computed one id at a time takes longer, and comes to the same.
        Err(_) => 0,
    }
}

/// Purges the records of processes that are gone.
///
/// # Errors
/// The broker's.
pub(crate) async fn sweep(records: &Records) -> Result<(), Error> {
    let now_ms = records.server_ms().await?;
    records.sweep_hosts(now_ms.saturating_sub(GONE.as_millis() as u64)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_until_it_has_been_silent_for_long() {
        let now = 1_795_621_875_015;
        for (written_ms, fresh) in
            [(now, true), (now - 11_999, true), (now - 12_000, false), (now + 500, true)]
        {
            assert_eq!(is_fresh(written_ms, now), fresh, "{written_ms}");
        }
    }
}
