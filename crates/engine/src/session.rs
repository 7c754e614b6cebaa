//! The connections to both servers, for one pipeline.

use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::nats::broker::Broker;
use crate::nats::bucket::Records;

/// Connections to both servers. Clones share them.
#[derive(Clone)]
pub struct Session {
    /// The connection to NATS: streams and consumers.
    pub broker: Broker,
    /// The records of runs and passes in NATS.
    pub records: Records,
    /// The connection to ClickHouse: the tables.
    pub store: Store,
}

impl Session {
    /// Joins the connections to both servers.
    ///
    /// # Errors
    /// When the bucket of records does not exist: [`Broker::setup`] creates it.
    pub async fn open(broker: Broker, store: Store) -> Result<Self, Error> {
        let records = broker.records().await?;
        Ok(Self { broker, records, store })
    }
}
