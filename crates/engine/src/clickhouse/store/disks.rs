//! The disks of the rows table.

use clickhouse::Row;
use serde::Deserialize;

use super::Store;
use crate::error::{Error, StoreFault};

/// A disk of the ClickHouse server.
#[derive(Debug, Clone, PartialEq, Eq, Row, Deserialize)]
pub struct Disk {
    /// The name of the disk in ClickHouse's configuration.
    pub name: String,
    /// The path of the disk.
    pub path: String,
    /// Bytes that can still be written to the disk.
    pub free: u64,
}

impl Store {
    /// The disks of the rows table, or those that it would use. Empty if the server does not list them, or not
    /// to this user.
    ///
    /// # Errors
    /// [`Error::Store`] when the server does not answer.
    pub async fn disks(&self) -> Result<Vec<Disk>, Error> {
        match self.answer(&self.tables.disks()).await {
            Err(StoreFault::Exception { .. }) => Ok(Vec::new()),
            disks => disks.map_err(|fault| self.failed("list its disks", fault)),
        }
    }
}
