//! Removes a run, or one pass of a run.

use millstream::names::RunName;

use super::Store;
use crate::clickhouse::sql::SeenPass;
use crate::error::Error;

impl Store {
    /// Counts the rows of a run, or of one pass, with raw duplicates.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn rows_of(&self, run: &RunName, pass: Option<u32>) -> Result<u64, Error> {
        self.one("count rows", &self.tables.rows_of(run, pass)).await
    }

    /// Bytes on disk of the partition that holds this run's rows.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn bytes_beside(&self, run: &RunName) -> Result<u64, Error> {
        self.one("read the size of the rows", &self.tables.bytes_beside(run)).await
    }

    /// Removes every row of a run, or of one pass, and returns when they are gone.
    ///
    /// # Errors
    /// [`Error::Mutation`], [`Error::NotRemoved`]; [`Error::Store`].
    pub async fn remove_rows(&self, run: &RunName, pass: Option<u32>) -> Result<(), Error> {
        let statement = self.tables.remove_rows(run, pass);
        let left = self.tables.rows_of(run, pass);
        self.remove("remove rows", &statement, &left).await
    }

    /// Hides a pass, or all of a run's passes, from readers. The newest pass is hidden last, so that readers
    /// never see an older one instead.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn hide(&self, run: &RunName, pass: Option<u32>) -> Result<(), Error> {
        let passes = self.sealed_passes(run).await?;
        for SeenPass { pass: sealed, .. } in
            passes.iter().filter(|seen| pass.is_none_or(|pass| pass == seen.pass))
        {
            let sealed = run.pass(*sealed);
            let statement = self.tables.hide(&sealed);
            let left = self.tables.count_sealed(&sealed);
            self.remove("hide a pass from readers", &statement, &left).await?;
        }
        Ok(())
    }

    /// Removes one row from the table of sealed passes.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn remove_seen(&self, run: &RunName, seen: &SeenPass) -> Result<(), Error> {
        let [statement, left] = self.tables.remove_seen(run, seen);
        self.remove("remove a wrong row of a sealed pass", &statement, &left).await
    }

    /// Removes a run's record.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn forget_run(&self, run: &RunName) -> Result<(), Error> {
        let statement = self.tables.forget_run(run);
        let left = self.tables.count_runs(run);
        self.remove("remove the run's record", &statement, &left).await
    }
}
