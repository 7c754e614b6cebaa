//! The disks that the rows table lies on.

use clickhouse::Row;
use serde::Deserialize;

use super::Store;
use crate::error::{Error, StoreFault};

/// A disk of ClickHouse's.
#[derive(Debug, Clone, PartialEq, Eq, Row, Deserialize)]
pub struct Disk {
    /// Its name in ClickHouse's configuration.
    pub name: String,
    /// Where it is.
    pub path: String,
    /// Bytes that can still be written to it.
    pub free: u64,
}

impl Store {
    /// The disks that the rows table lies on, or would. None where the server does not say, or not to this user.
    ///
    /// # Errors
    /// [`Error::Store`] when the server does not answer.
    pub async fn disks(&self) -> Result<Vec<Disk>, Error> {
        match self.answer(&self.tables.disks()).await {
            Err(StoreFault::Exception { .. }) => Ok(Vec::new()),
            disks => disks.map_err(|fault| self.failed("look at its disks", fault)),
        }
    }
}
