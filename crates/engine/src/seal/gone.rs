//! Ids that the stream no longer holds: how many, since when, and why.

use std::time::Duration;

use crate::error::Error;
use crate::model::moment::{length, shown};
use crate::model::record::{PassState, Published, RunRecord};
use crate::nats::broker::{Broker, Kept};
use crate::nats::bucket::Records;

/// Refuses a run if the stream lacks any of its batches.
pub(crate) async fn refuse(
    broker: &Broker,
    records: &Records,
    record: &RunRecord,
    published: &Published,
) -> Result<(), Error> {
    let run = &record.run;
    // The end marker of an open run is a message but not a batch. A repair of rows beyond the end removes it.
    let end = broker.names().ids_subject(run, published.batches);
    let has_end = record.is_open() && broker.ids_message(&end).await?.is_some();
    let messages = u64::from(published.batches) + u64::from(has_end);
    let missing = messages.saturating_sub(broker.count_ids(run).await?);
    if missing == 0 {
        return Ok(());
    }
    let stream = broker.names().ids_stream();
    let first = records.pass(&run.pass(1)).await?;
    let cancelled = first.is_some_and(|entry| entry.record.state == PassState::Cancelled);
    let why = match broker.kept(&stream).await? {
        _ if cancelled => "its first pass was cancelled, which removes them".to_owned(),
        Some(kept) => why(&kept, record.created_ms, published.at_ms, records.server_ms().await?),
        None => "the stream no longer exists".to_owned(),
    };
    let run = run.to_string();
    let batches = published.batches;
    Err(Error::IdsGone { run, stream, missing, batches, why, cancelled })
}

fn why(kept: &Kept, begun_ms: u64, published_ms: u64, now_ms: u64) -> String {
    let aged_out = begun_ms.saturating_add(kept.max_age.as_millis() as u64);
    if kept.created_ms > published_ms {
        return format!(
            "the run was published {}, and the stream was created again {}",
            shown(published_ms),
            shown(kept.created_ms)
        );
    }
    if kept.max_age > Duration::ZERO && aged_out <= now_ms {
        return format!(
            "it keeps ids for {}, so those published {} went from {} on",
            length(kept.max_age),
            shown(begun_ms),
            shown(aged_out)
        );
    }
    let oldest = kept.oldest_ms.map_or_else(
        || "it is empty".to_owned(),
        |oldest| format!("the oldest message that it holds is of {}", shown(oldest)),
    );
    format!("they were removed from it after {}; {oldest}", shown(published_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_follows_from_the_stream_state() {
        const HOUR: u64 = 3_600_000;
        let kept = |created_ms, oldest_ms, hours: u64| Kept {
            created_ms,
            oldest_ms,
            max_age: Duration::from_secs(hours * 3600),
            messages: 0,
            bytes: 0,
            max_bytes: 0,
        };
        let table = [
            (
                kept(0, Some(3 * HOUR), 2),
                "it keeps ids for 2h, so those published 1970-01-01T01:00:00Z went from 1970-01-01T03:00:00Z on",
            ),
            (
                kept(2 * HOUR, None, 9),
                "the run was published 1970-01-01T01:00:00Z, and the stream was created again 1970-01-01T02:00:00Z",
            ),
            (kept(0, None, 9), "they were removed from it after 1970-01-01T01:00:00Z; it is empty"),
            (
                kept(0, Some(2 * HOUR), 0),
                "they were removed from it after 1970-01-01T01:00:00Z; the oldest message that it holds is of 1970-01-01T02:00:00Z",
            ),
        ];
        for (kept, text) in table {
            assert_eq!(why(&kept, HOUR, HOUR, 4 * HOUR), text);
        }
    }
}
