//! What most of the engine asks: both servers, as one pipeline sees them.

use crate::clickhouse::store::Store;
use crate::error::Error;
use crate::nats::broker::Broker;
use crate::nats::bucket::Records;

/// Connections to both servers. A copy shares them.
#[derive(Clone)]
pub struct Session {
    /// NATS: streams and consumers.
    pub broker: Broker,
    /// NATS: the records of runs and passes.
    pub records: Records,
    /// ClickHouse: the tables.
    pub store: Store,
}

impl Session {
    /// Joins the connections to both.
    ///
    /// # Errors
    /// When the bucket of records does not exist: [`Broker::setup`] makes it.
    pub async fn open(broker: Broker, store: Store) -> Result<Self, Error> {
        let records = broker.records().await?;
        Ok(Self { broker, records, store })
    }
}
