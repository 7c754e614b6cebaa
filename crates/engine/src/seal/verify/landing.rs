//! Whether rows of a pass are on their way into ClickHouse, by what NATS and the sinks report of this pass
//! alone.
//!
//! All sinks share one consumer. Per pass, the consumer only reports the undelivered messages. It also reports
//! the first unacked message, but that may belong to another pass whose rows ClickHouse refuses and which is
//! redelivered for ever. So the sinks' heartbeats are read: they list the passes whose rows a sink holds or has
//! nakked. ClickHouse is asked too, because an INSERT of a dead sink may still run. Rows that none of them has
//! are stored or lost.

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

/// A sink that holds a message older than this has reported it in a heartbeat, or is dead and its heartbeat no
/// longer counts.
const REPORTED_MS: u64 = 15_000;
/// A sink without a valid heartbeat ended longer ago than this, in seconds, and has begun no INSERT since.
const ENDED: u64 = 5;

/// The whereabouts of a pass's rows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Landing {
    /// Each row is stored or lost.
    Over,
    /// Nothing is on its way, but some messages may be unacked: rows that are not stored can be delivered
    /// again.
    Settled {
        /// All messages up to this one are acked.
        acked: u64,
    },
    /// Some rows are on their way; says where.
    UnderWay(String),
    /// Some rows are redelivered again and again; says why.
    Left(String),
}

/// Finds out where the rows of a pass are.
///
/// # Errors
/// Errors of NATS and ClickHouse.
pub(crate) async fn landing(session: &Session, pass: &PassId) -> Result<Landing, Error> {
    let Session { broker, records, .. } = session;
    broker.ensure_sink_consumer().await?;
    let landing = landing_now(session, pass).await?;
    // A sink that has received rows since its last heartbeat reports them in the next one.
    if matches!(landing, Landing::Settled { .. }) && heartbeat::holds_soon(records, pass).await? {
        return Ok(Landing::UnderWay("a sink holds rows of the pass".into()));
    }
    Ok(landing)
}

/// Finds out where the rows of a pass are, without waiting for heartbeats, for a command that changes nothing.
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
            Cause::Refused => "ClickHouse refuses rows of the pass",
            Cause::Columns => "the table does not accept rows of the pass",
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

/// Whether it is certain that no sink holds rows of a settled pass: each sink has sent a heartbeat since the
/// last delivery to any sink. A message that waited long in the stream may have been delivered just now.
///
/// # Errors
/// When NATS refuses or does not answer.
pub(crate) async fn is_held_by_none(
    broker: &Broker,
    records: &Records,
    pass: &PassId,
) -> Result<bool, Error> {
    let Some(sinks) = broker.sink_progress().await? else { return Ok(true) };
    let delivered_ms = sinks.delivered.last_active.map_or(0, since_1970_ms);
    heartbeat::none_holds(records, pass, delivered_ms).await
}

/// Whether some missing rows will be redelivered: the stream holds them unacked, for example after the sink
/// that held them was killed. Checks the first of them. A partial replay also lacks other rows, so it is not
/// checked.
///
/// # Errors
/// Errors of NATS and ClickHouse.
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

/// The batches whose messages the stream holds and which may be unacked.
pub(super) async fn not_acked(
    broker: &Broker,
    pass: &PassId,
    batches: Vec<u32>,
    acked: u64,
) -> Result<Vec<(u32, Vec<RowsMessage>)>, Error> {
    let reads = batches.into_iter().map(|batch| async move {
        let messages = broker.rows_of_batch(pass, batch).await?;
        Ok::<_, Error>((batch, messages))
    });
    let reads: Vec<_> = reads.collect();
    let found: Vec<_> = stream::iter(reads).buffered(LOOKS).try_collect().await?;
    let is_open = |messages: &[RowsMessage]| messages.iter().any(|message| message.sequence > acked);
    Ok(found.into_iter().filter(|(_, messages)| is_open(messages)).collect())
}

/// The number of undelivered and unacked messages of all passes.
pub(crate) fn open(info: &Info) -> u64 {
    info.num_pending + info.num_ack_pending as u64
}

/// Whether an INSERT may still carry the message although no living sink holds it.
async fn may_be_inserted(records: &Records, store: &Store, last: &RowsMessage) -> Result<bool, Error> {
    let age_ms = records.server_ms().await?.saturating_sub(last.at_ms);
    if age_ms < REPORTED_MS {
        return Ok(true);
    }
    Ok(match store.has_long_inserts(ENDED).await? {
        Some(is_inserting) => is_inserting,
        // The INSERT ends by its own time limit.
        None => age_ms < store.insert_over().as_millis() as u64,
    })
}
