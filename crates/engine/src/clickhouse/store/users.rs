//! Queries that are not ours: those of the user, and those of the pipeline's author.

use std::time::Duration;

use bytes::Bytes;
use clickhouse::Client;
use clickhouse::query::Query;

use super::{PROOF_WITHIN, Store, store_fault, within};
use crate::clickhouse::sql;
use crate::error::{Error, StoreFault, USERS_QUERY};

impl Store {
    /// Runs a user's query, and passes its answer to `each` piece by piece, in `format` unless the query names
    /// its own.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sql(&self, query: &str, format: &str, mut each: impl FnMut(Bytes)) -> Result<(), Error> {
        let client = self.in_database().await?;
        let asked = answered(client.query_raw(query), PROOF_WITHIN, format, &mut each).await;
        asked.map_err(|fault| self.failed(USERS_QUERY, fault))
    }

    /// A client that finds our tables without a database name.
    pub(super) async fn in_database(&self) -> Result<Client, Error> {
        // Before `setup` the database does not exist, and `SELECT version()` must still work.
        let databases = sql::databases(self.tables.database());
        let client = self.client.clone();
        Ok(match self.one::<u64>("look up the database", &databases).await? {
            0 => client,
            _ => client.with_database(self.tables.database()),
        })
    }

    /// The columns of a user's query: `(name, type)`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn describe_query(&self, query: &str) -> Result<Vec<(String, String)>, Error> {
        let mut text = Vec::new();
        self.sql(&sql::describe_query(query), "TSVRaw", |piece| text.extend_from_slice(&piece)).await?;
        let columns = String::from_utf8_lossy(&text);
        Ok(columns
            .lines()
            .filter_map(|line| {
                let mut fields = line.split('\t');
                Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
            })
            .collect())
    }
}

/// Passes the answer of a query to `each`, piece by piece. The wait for each piece is at most `limit`.
pub(super) async fn answered(
    query: Query,
    limit: Duration,
    format: &str,
    each: &mut impl FnMut(Bytes),
) -> Result<(), StoreFault> {
    let mut cursor = query.fetch_bytes(format).map_err(|error| store_fault(error, limit))?;
    while let Some(piece) = within(limit, cursor.next()).await? {
        each(piece);
    }
    Ok(())
}
