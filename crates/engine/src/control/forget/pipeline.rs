//! Removes a whole pipeline: its tables, views, streams and bucket, and the storage reserved for them.
//!
//! It needs only the name, so any pipeline's program can remove one that was renamed or mistyped.

use serde::Serialize;

use crate::clickhouse::store::{Store, Thing};
use crate::error::Error;
use crate::fleet::heartbeat;
use crate::nats::broker::{Broker, Reserved};

/// The tables and streams of a pipeline.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Belongings {
    /// The tables and views in ClickHouse, quoted, in the order of removal: views first.
    pub tables: Vec<String>,
    /// The number of rows in the largest table, which is the rows table.
    pub rows: u64,
    /// The bytes of all tables.
    pub row_bytes: u64,
    /// The streams in NATS with the bucket's, in the order of removal.
    pub streams: Vec<String>,
    /// The bytes that NATS reserves for the streams.
    pub reserved_bytes: u64,
    /// The processes that work for the pipeline now.
    pub processes: Vec<String>,
    /// Tables and streams that match the pipeline's names but have no mark of Millstream.
    pub unmarked: Vec<String>,
}

impl Belongings {
    /// Whether nothing of the pipeline exists.
    pub fn is_nothing(&self) -> bool {
        self.tables.is_empty() && self.streams.is_empty() && self.unmarked.is_empty()
    }
}

/// Lists what exists of `broker`'s pipeline; `store` may belong to another pipeline.
///
/// # Errors
/// [`Error::OtherEnvironment`]; errors of NATS and ClickHouse.
pub async fn belongings(broker: &Broker, store: &Store) -> Result<Belongings, Error> {
    let (things, mut unmarked) = store.things_of(broker.names().pipeline()).await?;
    let (streams, others) = broker.own_streams().await?;
    unmarked.extend(others);
    // Without the bucket there are no heartbeats, and no process can work.
    let bucket = broker.bucket_stream();
    let processes = if streams.iter().any(|stream| stream.holder == bucket) {
        heartbeat::alive(&broker.records().await?).await?
    } else {
        Vec::new()
    };
    Ok(Belongings {
        rows: things.iter().map(|thing| thing.rows).max().unwrap_or(0),
        row_bytes: things.iter().map(|thing| thing.bytes).sum(),
        tables: things.into_iter().map(|Thing { name, .. }| name).collect(),
        reserved_bytes: streams.iter().map(|stream| stream.reserved).sum(),
        streams: streams.into_iter().map(|Reserved { holder, .. }| holder).collect(),
        processes: processes
            .iter()
            .map(|host| format!("{} on {}, process {}", host.doing.role(), host.host, host.pid))
            .collect(),
        unmarked,
    })
}

/// Removes all of it, the readers' views first. After a kill the call can be repeated.
///
/// # Errors
/// [`Error::AtWork`] while processes work for the pipeline; [`Error::Unmarked`] when something with a matching
/// name may not be Millstream's; errors of NATS and ClickHouse.
pub async fn forget_pipeline(broker: &Broker, store: &Store, all: &Belongings) -> Result<(), Error> {
    let pipeline = broker.names().pipeline().to_owned();
    if !all.unmarked.is_empty() {
        return Err(Error::Unmarked { pipeline, what: all.unmarked.clone() });
    }
    if !all.processes.is_empty() {
        return Err(Error::AtWork { pipeline, processes: all.processes.clone() });
    }
    for name in &all.tables {
        store.drop_thing(name).await?;
    }
    for stream in &all.streams {
        broker.delete_stream(stream).await?;
    }
    Ok(())
}
