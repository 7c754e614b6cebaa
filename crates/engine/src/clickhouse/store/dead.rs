//! Dead letters.

use millstream::names::PassId;
use serde::{Deserialize, Serialize};

use super::Store;
use crate::error::Error;
use crate::model::selection::Letters;

/// A dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// The batch of the id.
    pub batch: u32,
    /// The id, as text.
    pub id: String,
    /// The reason.
    pub error: String,
    /// The host that computed it.
    pub host: String,
    /// The build that computed it.
    pub build: String,
}

impl Store {
    /// Counts the dead letters of a pass, with raw duplicates.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_rows(&self, pass: &PassId, letters: &Letters) -> Result<u64, Error> {
        self.one("count dead letters", &self.tables.count_dead(pass, letters)).await
    }

    /// Counts the dead letters of a pass, each id once. If there are as many rows as the seal counted, the
    /// index answers. Otherwise there may be raw duplicates, and the query deduplicates them.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_ids(&self, pass: &PassId, sealed: u64) -> Result<u64, Error> {
        match self.dead_rows(pass, &Letters::default()).await? {
            rows if rows == sealed => Ok(rows),
            _ => self.dead_distinct(pass).await,
        }
    }

    /// Counts the dead letters of a pass, each id once. Always deduplicates, whatever that costs.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_distinct(&self, pass: &PassId) -> Result<u64, Error> {
        self.one("count dead letters", &self.tables.dead_ids(pass)).await
    }

    /// Dead letters of a pass, in order.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead(&self, pass: &PassId, letters: &Letters, limit: u64) -> Result<Vec<DeadLetter>, Error> {
        // Tuples, because a struct of the crate would name its columns like those of the sort order.
        let found: Vec<(u32, String, String, String, String)> =
            self.all("list dead letters", &self.tables.dead(pass, letters, limit)).await?;
        let letter = |(batch, id, error, host, build)| DeadLetter { batch, id, error, host, build };
        Ok(found.into_iter().map(letter).collect())
    }

    /// Dead letters of a pass by error: `(error, ids)`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_by_error(
        &self,
        pass: &PassId,
        letters: &Letters,
        limit: u64,
    ) -> Result<Vec<(String, u64)>, Error> {
        self.all("count dead letters", &self.tables.dead_by_error(pass, letters, limit)).await
    }
}
