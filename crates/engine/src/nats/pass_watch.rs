//! The open passes as every process sees them: a watch on the bucket, which is reopened whenever it breaks. A
//! run control command (pause, cancel) reaches every host as soon as it is in the bucket.

use std::time::Duration;

use async_nats::jetstream::kv::{Entry, Operation};
use futures_util::StreamExt;
use millstream::names::PassId;
use tokio::sync::watch;

use crate::error::Error;
use crate::model::record::{Open, PassRecord, PassState};
use crate::nats::bucket::Records;
use crate::retry::Backoff;
use crate::stop::Stop;

/// Age at which a watch is reopened, because it may have died silently, as it does when a server comes back
/// with an empty volume.
const REOPEN: Duration = Duration::from_secs(15);
/// How long to wait for the first value of a watch; after that the bucket counts as empty.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(5);

/// The kind of passes to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// The passes that workers may pull from, or hold batches of.
    Workers,
    /// The passes that a sealer has work for.
    Sealers,
}

/// Follows the bucket until taking stops. The first value is there when this returns.
///
/// # Errors
/// When the bucket cannot be read at the start; later failures are retried.
pub async fn follow(records: &Records, stop: &Stop) -> Result<watch::Receiver<Open>, Error> {
    follow_of(Of::Workers, records, stop).await
}

/// Follows the bucket like [`follow`], and includes sealed passes that still need a sealer's work.
///
/// # Errors
/// The errors of [`follow`].
pub(crate) async fn follow_to_seal(records: &Records, stop: &Stop) -> Result<watch::Receiver<Open>, Error> {
    follow_of(Of::Sealers, records, stop).await
}

async fn follow_of(of: Of, records: &Records, stop: &Stop) -> Result<watch::Receiver<Open>, Error> {
    let mut open = Open::new();
    for record in records.passes().await? {
        apply(of, &mut open, record);
    }
    let (sender, receiver) = watch::channel(open);
    let records = records.clone();
    let stopping = stop.clone();
    stop.spawn(async move {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        while !stopping.taking_stopped() {
            tokio::select! {
                () = stopping.no_more_taking() => break,
                outcome = watch_once(of, &records, &sender) => match outcome {
                    Ok(()) => backoff.reset(),
                    Err(error) => tracing::warn!(%error, "the watch on run records broke, reopening it"),
                },
            }
            stopping.pause(backoff.wait()).await;
        }
    });
    Ok(receiver)
}

async fn watch_once(
    of: Of,
    records: &Records,
    sender: &watch::Sender<Open>,
) -> Result<(), crate::error::Source> {
    let until = tokio::time::Instant::now() + REOPEN;
    let mut updates = tokio::time::timeout_at(until, records.bucket().watch_with_history("pass.>")).await??;
    // The first values replace what was known, because a bucket that was created again has dropped records
    // silently.
    let mut known = Open::new();
    loop {
        match tokio::time::timeout(SNAPSHOT_WITHIN, updates.next()).await {
            Ok(Some(update)) => {
                let update = update?;
                note(of, &mut known, &update);
                if update.seen_current {
                    break;
                }
            }
            Ok(None) => return Ok(()),
            // A watch sends nothing for an empty bucket or a stalled server, so the records are listed.
            Err(_) => {
                for record in records.passes().await? {
                    apply(of, &mut known, record);
                }
                break;
            }
        }
    }
    sender.send_if_modified(|open| {
        let changed = *open != known;
        *open = known;
        changed
    });
    while let Ok(Some(update)) = tokio::time::timeout_at(until, updates.next()).await {
        let update = update?;
        sender.send_if_modified(|open| note(of, open, &update));
    }
    Ok(())
}

/// Applies an update of the bucket, and returns whether anything changed.
fn note(of: Of, open: &mut Open, update: &Entry) -> bool {
    if update.operation != Operation::Put {
        return key_of(&update.key).is_some_and(|key| open.remove(&key).is_some());
    }
    match serde_json::from_slice::<PassRecord>(&update.value) {
        Ok(record) => apply(of, open, record),
        Err(error) => {
            tracing::error!(key = update.key, %error, "a pass's record is malformed: the pass is ignored");
            false
        }
    }
}

/// Applies a record, and returns whether anything changed.
fn apply(of: Of, open: &mut Open, record: PassRecord) -> bool {
    let key = record.id();
    let is_over = match record.state {
        PassState::Running | PassState::Paused => false,
        PassState::Cancelled => record.freed,
        PassState::Sealed => record.freed || of == Of::Workers,
    };
    if is_over {
        return open.remove(&key).is_some();
    }
    open.insert(key, record.clone()).as_ref() != Some(&record)
}

/// Parses the key `pass.<run>.<n>`.
fn key_of(key: &str) -> Option<PassId> {
    let (run, pass) = key.strip_prefix("pass.")?.rsplit_once('.')?;
    Some(PassId { run: run.parse().ok()?, pass: pass.parse().ok()? })
}
