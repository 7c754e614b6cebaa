//! Removing a pipeline as a whole: its tables and views, its streams and its bucket, and with them all that they reserve.
//!
//! It goes by the name alone, so that one whose program was renamed, or a mistyped one, can be removed by any other.

use serde::Serialize;

use crate::clickhouse::store::{Store, Thing};
use crate::error::Error;
use crate::fleet::heartbeat;
use crate::nats::broker::{Broker, Reserved};

/// What there is of a pipeline.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Belongings {
    /// Its tables and views in ClickHouse, in quotes, views first, as they are removed.
    pub tables: Vec<String>,
    /// Rows in its largest table, which is that of the rows.
    pub rows: u64,
    /// Bytes that all tables take.
    pub row_bytes: u64,
    /// Its streams in NATS, with the bucket's, as they are removed.
    pub streams: Vec<String>,
    /// Bytes that NATS keeps free for them.
    pub reserved_bytes: u64,
    /// Processes that work for it now.
    pub processes: Vec<String>,
    /// Tables and streams under its names that do not say that Millstream made them.
    pub unmarked: Vec<String>,
}

impl Belongings {
    /// Whether there is nothing at all.
    pub fn is_nothing(&self) -> bool {
        self.tables.is_empty() && self.streams.is_empty() && self.unmarked.is_empty()
    }
}

/// What there is of the pipeline that `broker` is of; `store` may be another's.
///
/// # Errors
/// [`Error::OtherEnvironment`]; the broker's and ClickHouse's.
pub async fn belongings(broker: &Broker, store: &Store) -> Result<Belongings, Error> {
    let (things, mut unmarked) = store.things_of(broker.names().pipeline()).await?;
    let (streams, others) = broker.own_streams().await?;
    unmarked.extend(others);
    // Without the bucket there is no word of processes, and they cannot work.
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

/// Removes them, readers' views first. Killed, it can be called again.
///
/// # Errors
/// [`Error::AtWork`] while processes work for the pipeline; [`Error::Unmarked`] where something under its names may be another's;
/// the broker's and ClickHouse's.
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
