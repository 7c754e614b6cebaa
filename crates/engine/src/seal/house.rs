//! What a sealer does beside its passes: purges acked rows from the stream, removes stale heartbeats, updates
//! views.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use millstream::names::RunName;
use tokio::sync::{mpsc, watch};

use super::sealer::Sealer;
use crate::error::{Source, full_cause};
use crate::fleet::heartbeat;
use crate::model::record::Open;
use crate::nats::broker::Standing;
use crate::stop::Stop;

/// Interval between checks whether acked rows can be purged from the rows stream.
const PURGE_EVERY: Duration = Duration::from_secs(2);
/// Interval between checks for stale heartbeats, and for views that differ from their table.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Interval between requests for the state of worker consumers.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// The interval is at least this many times the duration of one request.
const ASK_SHARE: u32 = 10;
/// The pause after a request without an answer.
const AFTER_ERROR: Duration = Duration::from_secs(2);
/// Age at which a watch is reopened, because it may have died silently.
const REOPEN: Duration = Duration::from_secs(60);

/// Purges acked rows from the rows stream, until taking stops.
pub(super) async fn make_room(sealer: Sealer, stop: Stop) {
    let keep = async {
        loop {
            if let Err(error) = sealer.session.broker.make_room().await {
                tracing::warn!(
                    error = full_cause(&error),
                    "acked rows could not be purged from the rows stream"
                );
            }
            tokio::time::sleep(PURGE_EVERY).await;
        }
    };
    until_stop(keep, &stop).await;
}

/// Removes stale heartbeats and updates views, until taking stops.
pub(super) async fn sweep(sealer: Sealer, stop: Stop) {
    let keep = async {
        loop {
            if let Err(error) = heartbeat::sweep(&sealer.session.records).await {
                tracing::debug!(error = full_cause(&error), "stale heartbeat records could not be removed");
            }
            sealer.session.store.try_follow_views().await;
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    };
    until_stop(keep, &stop).await;
}

/// Asks for the state of all worker consumers in one request, as long as there are passes.
pub(super) async fn survey(
    sealer: Sealer,
    mut open: watch::Receiver<Open>,
    standings: watch::Sender<HashMap<String, Standing>>,
    stop: Stop,
) {
    let keep = async {
        loop {
            if open.wait_for(|open| !open.is_empty()).await.is_err() {
                return;
            }
            let begun = Instant::now();
            let pause = match sealer.session.broker.work_standings().await {
                Ok(found) => {
                    standings.send_if_modified(|known| {
                        let changed = *known != found;
                        *known = found;
                        changed
                    });
                    ASK_EVERY.max(begun.elapsed() * ASK_SHARE)
                }
                Err(error) => {
                    tracing::debug!(error = full_cause(&error), "the worker consumers could not be listed");
                    AFTER_ERROR
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    until_stop(keep, &stop).await;
}

/// Reports runs whose records change, because a closed run no longer waits for its ids.
pub(super) async fn watch_runs(sealer: Sealer, runs: mpsc::Sender<RunName>, stop: Stop) {
    let keep = async {
        loop {
            let watched = tokio::time::timeout(REOPEN, watch_once(&sealer, &runs)).await;
            if let Ok(Err(error)) = watched {
                tracing::debug!(%error, "the watch on runs broke, reopening it");
                tokio::time::sleep(AFTER_ERROR).await;
            }
        }
    };
    until_stop(keep, &stop).await;
}

async fn watch_once(sealer: &Sealer, runs: &mpsc::Sender<RunName>) -> Result<(), Source> {
    let mut updates = sealer.session.records.bucket().watch("run.*").await?;
    while let Some(update) = updates.next().await {
        let run = update?.key.strip_prefix("run.").and_then(|run| run.parse().ok());
        // If the channel is full, the pass's own timer checks the run a little later.
        if let Some(Err(error)) = run.map(|run| runs.try_send(run)) {
            tracing::debug!(%error, "too many changes of runs at once: this one is checked later");
        }
    }
    Ok(())
}

async fn until_stop(work: impl Future<Output = ()>, stop: &Stop) {
    tokio::select! {
        () = work => {}
        () = stop.no_more_taking() => {}
    }
}
