//! What a sealer keeps in order beside the passes: room in the rows stream, records of processes that are gone, views.

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

/// How often the rows stream is looked at for what may go.
const ROOM_EVERY: Duration = Duration::from_secs(2);
/// How often records of processes that are gone are looked for, and views that lag behind their table.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// How often it is asked where workers stand.
const LOOK: Duration = Duration::from_millis(200);
/// The question may take this part of the time.
const LOOK_SHARE: u32 = 10;
/// The pause after a question without an answer.
const AFTER_ERROR: Duration = Duration::from_secs(2);
/// A watch is opened anew after this long, in case the old one died without a word.
const REOPEN: Duration = Duration::from_secs(60);

/// Makes room in the rows stream, until taking stops.
pub(super) async fn make_room(sealer: Sealer, stop: Stop) {
    let keep = async {
        loop {
            if let Err(error) = sealer.session.broker.make_room().await {
                tracing::warn!(error = full_cause(&error), "no room could be made in the rows stream");
            }
            tokio::time::sleep(ROOM_EVERY).await;
        }
    };
    until_stop(keep, &stop).await;
}

/// Sweeps records and follows views, until taking stops.
pub(super) async fn sweep(sealer: Sealer, stop: Stop) {
    let keep = async {
        loop {
            if let Err(error) = heartbeat::sweep(&sealer.session.records).await {
                tracing::debug!(error = full_cause(&error), "records of processes that are gone stay");
            }
            sealer.session.store.try_follow_views().await;
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    };
    until_stop(keep, &stop).await;
}

/// Asks where the workers of all passes stand, in one question, for as long as there are passes.
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
                    LOOK.max(begun.elapsed() * LOOK_SHARE)
                }
                Err(error) => {
                    tracing::debug!(error = full_cause(&error), "consumers cannot be listed");
                    AFTER_ERROR
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    until_stop(keep, &stop).await;
}

/// Names the runs whose records change: one that is closed waits no longer for its ids.
pub(super) async fn watch_runs(sealer: Sealer, runs: mpsc::Sender<RunName>, stop: Stop) {
    let keep = async {
        loop {
            let watched = tokio::time::timeout(REOPEN, watch_once(&sealer, &runs)).await;
            if let Ok(Err(error)) = watched {
                tracing::debug!(%error, "the watch on runs broke, opening it again");
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
        // Where there are too many at once, a run is looked at a little later by itself.
        if let Some(Err(error)) = run.map(|run| runs.try_send(run)) {
            tracing::debug!(%error, "a change of a run is looked at later");
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
