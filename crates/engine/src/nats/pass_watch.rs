//! The passes that something is to be done about, as every process sees them: a watch on the bucket, kept up for as long
//! as it takes. What a person says of a pass (`steer`) is known on every host as soon as the bucket has it.

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

/// A watch is opened anew after this long, in case the old one died without a word, as it does with a server that comes
/// back with an empty volume.
const REOPEN: Duration = Duration::from_secs(15);
/// What a watch begins with follows at once; after this long without a word there is nothing.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(5);

/// Which passes are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// Those that workers may draw from, or hold batches of.
    Workers,
    /// Those that a sealer has something to do for.
    Sealers,
}

/// Follows the bucket until taking stops. The first value is there before this returns.
///
/// # Errors
/// When the bucket cannot be read at the start; later failures are waited out.
pub async fn follow(records: &Records, stop: &Stop) -> Result<watch::Receiver<Open>, Error> {
    follow_of(Of::Workers, records, stop).await
}

/// The same with sealed passes of which something is left to be done.
///
/// # Errors
/// As [`follow`].
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
                    Err(error) => tracing::warn!(%error, "the watch on run records broke, opening it again"),
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
    // What there is comes first, and replaces what was known: a bucket that was made anew forgets without a word.
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
            // Of an empty bucket a watch says nothing, and of a server that stalls neither: what is there is asked for.
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

/// Whether anything changed.
fn note(of: Of, open: &mut Open, update: &Entry) -> bool {
    if update.operation != Operation::Put {
        return key_of(&update.key).is_some_and(|key| open.remove(&key).is_some());
    }
    match serde_json::from_slice::<PassRecord>(&update.value) {
        Ok(record) => apply(of, open, record),
        Err(error) => {
            tracing::error!(key = update.key, %error, "a pass's record is malformed and is left alone");
            false
        }
    }
}

/// Whether anything changed.
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

/// `pass.<run>.<n>`.
fn key_of(key: &str) -> Option<PassId> {
    let (run, pass) = key.strip_prefix("pass.")?.rsplit_once('.')?;
    Some(PassId { run: run.parse().ok()?, pass: pass.parse().ok()? })
}
