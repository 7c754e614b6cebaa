//! Dead letters, and the pass that computes them again.

use std::time::Duration;

use super::Store;
use crate::error::Error;
use crate::tables::Letters;

/// How long it may take to copy half a million rows inside ClickHouse.
const COPY_WITHIN: Duration = Duration::from_secs(600);

impl Store {
    /// Dead letters of a pass, raw duplicates counted.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_rows(&self, run: &str, pass: u32, letters: &Letters) -> Result<u64, Error> {
        self.one("count dead letters", &self.tables.count_dead(run, pass, letters)).await
    }

    /// Dead letters of a pass: `(batch, id, error)`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead(
        &self,
        run: &str,
        pass: u32,
        letters: &Letters,
        limit: u64,
    ) -> Result<Vec<(u32, String, String)>, Error> {
        self.all("list dead letters", &self.tables.dead(run, pass, letters, limit)).await
    }

    /// Dead letters of a pass by error: `(error, ids)`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_by_error(
        &self,
        run: &str,
        pass: u32,
        letters: &Letters,
        limit: u64,
    ) -> Result<Vec<(String, u64)>, Error> {
        self.all("count dead letters", &self.tables.dead_by_error(run, pass, letters, limit)).await
    }

    /// Batches of a pass that have dead letters, in order.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_batches(&self, run: &str, pass: u32, letters: &Letters) -> Result<Vec<u32>, Error> {
        self.all("list batches with dead letters", &self.tables.dead_batches(run, pass, letters)).await
    }

    /// Ids of these batches that are dead letters: `(batch, id)`, in order.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dead_ids(
        &self,
        run: &str,
        pass: u32,
        letters: &Letters,
        batches: &[u32],
    ) -> Result<Vec<(u32, String)>, Error> {
        self.all("list dead letters", &self.tables.dead_ids(run, pass, letters, batches)).await
    }

    /// How many of the base pass's dead letters have a row in `pass`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn computed_again(
        &self,
        run: &str,
        pass: u32,
        base: u32,
        letters: &Letters,
    ) -> Result<u64, Error> {
        self.one("count ids computed again", &self.tables.computed_again(run, pass, base, letters)).await
    }

    /// Copies what `pass` lacks of some batches from the base pass.
    ///
    /// # Errors
    /// [`Error::Store`]; that the same is being done for another process is one too.
    pub async fn take_over(
        &self,
        run: &str,
        pass: u32,
        base: u32,
        letters: &Letters,
        range: [u32; 2],
    ) -> Result<(), Error> {
        let statement = self.tables.take_over(run, pass, base, letters, range);
        // Of two that copy the same at once, the server refuses the second: code 216.
        let id = format!("millstream-copy-{}-{run}-{pass}-{}", self.tables.view(), range[0]);
        let mut query = self.client.query_raw(&statement).with_setting("query_id", id);
        for (name, value) in self.insert_settings.iter().filter(|(name, _)| *name != "max_execution_time") {
            query = query.with_setting(*name, *value);
        }
        super::within(COPY_WITHIN, query.execute())
            .await
            .map_err(|fault| self.failed("take over rows of the pass before", fault))
    }
}
