//! Whether rows of a pass are on their way into ClickHouse: what the broker and the sinks say of this pass alone.
//!
//! All sinks share one consumer, and all that it says by pass is what it has not delivered yet. Beyond that it knows
//! the first message that is not acked; that may be one of another pass, which ClickHouse refuses and which comes back
//! for ever. So the sinks are asked, whose reports name the passes of the rows that they have in hand or have handed back; and
//! ClickHouse, where an INSERT of a sink that is gone may still run. What none of them has is either stored or lost.

use async_nats::jetstream::consumer::Info;
use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::names::PassId;

use super::LOOKS;
use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::fleet::heartbeat;
use crate::model::host::Cause;
use crate::model::moment::since_1970_ms;
use crate::nats::broker::{Broker, RowsMessage};
use crate::nats::bucket::Records;
use crate::session::Session;

/// A message that is older than this has been drawn by a sink whose report says so; or that sink is gone, and its report no
/// longer counts.
const REPORTED_MS: u64 = 15_000;
/// A sink whose report no longer counts ended longer ago than this, in seconds, and began no INSERT since.
const ENDED: u64 = 5;

/// Where the rows of a pass are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Landing {
    /// Each is stored, or lost.
    Over,
    /// Nothing is under way, and not all need have been acked: what is not stored can be handed out once more.
    Settled {
        /// All messages up to this one are acked.
        acked: u64,
    },
    /// Some are on their way.
    UnderWay(String),
    /// Some come back again and again: why.
    Left(String),
}

/// Asks where the rows of a pass are.
///
/// # Errors
/// The broker's and ClickHouse's.
pub(crate) async fn landing(session: &Session, pass: &PassId) -> Result<Landing, Error> {
    let Session { broker, records, .. } = session;
    broker.ensure_sink_consumer().await?;
    let landing = landing_now(session, pass).await?;
    // One that has drawn rows since its last report says so in the next.
    if matches!(landing, Landing::Settled { .. }) && heartbeat::holds_soon(records, pass).await? {
        return Ok(Landing::UnderWay("a sink has drawn rows of it".into()));
    }
    Ok(landing)
}

/// The same for a command that changes nothing.
pub(crate) async fn landing_now(session: &Session, pass: &PassId) -> Result<Landing, Error> {
    let Session { broker, records, store } = session;
    let Some(sinks) = broker.sink_progress().await? else { return Ok(Landing::Over) };
    let open = open(&sinks);
    if open == 0 {
        return Ok(Landing::Over);
    }
    let Some(last) = broker.last_rows(pass).await? else { return Ok(Landing::Over) };
    if last.sequence <= sinks.ack_floor.stream_sequence {
        return Ok(Landing::Over);
    }
    let hosts = heartbeat::alive(records).await?;
    if let Some(left) = hosts.iter().find_map(|host| host.left_of(pass)) {
        let what = match left.cause {
            Cause::Refused => "ClickHouse refuses rows of it",
            Cause::Columns => "the table does not take rows of it",
        };
        return Ok(Landing::Left(format!("{what}: {}", left.why)));
    }
    let is_held = hosts.iter().any(|host| host.holds(pass));
    if is_held
        || last.sequence > sinks.delivered.stream_sequence
        || may_be_inserted(records, store, &last).await?
    {
        return Ok(Landing::UnderWay(format!("{open} computed batches of all runs are still to be stored")));
    }
    Ok(Landing::Settled { acked: sinks.ack_floor.stream_sequence })
}

/// Whether it is known that no sink has rows of a pass, whose rows are settled: each sink has said what it holds since the last
/// message was delivered to any of them. A message that waited for long in the stream may have been drawn just now.
///
/// # Errors
/// When NATS refuses or does not answer.
pub(crate) async fn is_held_by_none(
    broker: &Broker,
    records: &Records,
    pass: &PassId,
) -> Result<bool, Error> {
    let Some(sinks) = broker.sink_progress().await? else { return Ok(true) };
    let drawn_ms = sinks.delivered.last_active.map_or(0, since_1970_ms);
    heartbeat::none_holds(records, pass, drawn_ms).await
}

/// Whether rows that the table lacks come again: the stream has them, and they need not have been acked, as where the sink that
/// drew them was killed. The first of them are looked at. A pass over some ids lacks those of others, too, and is not asked about.
///
/// # Errors
/// The broker's and ClickHouse's.
pub(crate) async fn come_again(
    broker: &Broker,
    store: &Store,
    pass: &PassId,
    batches: u32,
    acked: u64,
) -> Result<bool, Error> {
    let lacking = store.lacking_batches(pass, batches, LOOKS).await?;
    Ok(!not_acked(broker, pass, lacking, acked).await?.is_empty())
}

/// Those of some batches whose messages the stream holds, and which need not have been acked.
pub(super) async fn not_acked(
    broker: &Broker,
    pass: &PassId,
    batches: Vec<u32>,
    acked: u64,
) -> Result<Vec<(u32, Vec<RowsMessage>)>, Error> {
    let looks = batches.into_iter().map(|batch| async move {
        let messages = broker.rows_of_batch(pass, batch).await?;
        Ok::<_, Error>((batch, messages))
    });
    let looks: Vec<_> = looks.collect();
    let found: Vec<_> = stream::iter(looks).buffered(LOOKS).try_collect().await?;
    let is_open = |messages: &[RowsMessage]| messages.iter().any(|message| message.sequence > acked);
    Ok(found.into_iter().filter(|(_, messages)| is_open(messages)).collect())
}

/// What is not acked, of all passes.
pub(crate) fn open(info: &Info) -> u64 {
    info.num_pending + info.num_ack_pending as u64
}

/// Whether an INSERT may carry the message that no living sink has in hand.
async fn may_be_inserted(records: &Records, store: &Store, last: &RowsMessage) -> Result<bool, Error> {
    let age_ms = records.server_ms().await?.saturating_sub(last.at_ms);
    if age_ms < REPORTED_MS {
        return Ok(true);
    }
    Ok(match store.has_long_inserts(ENDED).await? {
        Some(is_inserting) => is_inserting,
        // It ends by its own limit.
        None => age_ms < store.insert_over().as_millis() as u64,
    })
}
