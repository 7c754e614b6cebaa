//! The ids that a partial replay computes again, and the unchanged rows that it copies.

use std::time::Duration;

use clickhouse::{RowOwned, RowRead};
use millstream::names::{PassId, RunName};

use super::{Found, PROOF_WITHIN, Store};
use crate::clickhouse::sql::{Column, Digested};
use crate::error::{Error, StoreFault};
use crate::model::id_digest::IdDigest;
use crate::model::record::Covers;
use crate::model::rows::MAX_INSERT_BYTES;

/// The time limit to copy half a million rows inside ClickHouse.
const COPY_WITHIN: Duration = Duration::from_secs(600);

impl Store {
    /// Checks that ClickHouse accepts this text as a condition on the rows of this pipeline.
    ///
    /// # Errors
    /// [`Error::Condition`] with ClickHouse's message; [`Error::Store`].
    pub async fn check_condition(&self, condition: &str) -> Result<(), Error> {
        for statement in self.tables.check_condition(condition) {
            let asked = self.client.query_raw(&statement).fetch_one::<u64>();
            match super::within(super::ANSWER_WITHIN, asked).await {
                Ok(_) => {}
                Err(source @ StoreFault::Exception { .. }) => {
                    return Err(Error::Condition { condition: condition.to_owned(), source });
                }
                Err(fault) => return Err(self.failed("check the condition", fault)),
            }
        }
        Ok(())
    }

    /// The newest pass of a run that has rows; 0 if there is none.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn newest_rows(&self, run: &RunName) -> Result<u32, Error> {
        let found: Vec<u32> = self.all("look for rows of passes", &self.tables.newest_rows(run)).await?;
        Ok(found.first().copied().unwrap_or_default())
    }

    /// The number of selected ids of the base pass, and their digest.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn selected(&self, run: &RunName, covers: &Covers) -> Result<IdDigest, Error> {
        let question = self.tables.selected(run, covers);
        let found: Vec<(u64, u64)> = self.long("count the selected ids", &question).await?;
        let (ids, digest) = found.first().copied().unwrap_or_default();
        Ok(IdDigest { ids, digest })
    }

    /// Batches of the base pass that have selected ids, in order.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn selected_batches(&self, run: &RunName, covers: &Covers) -> Result<Vec<u32>, Error> {
        self.long("list batches with selected ids", &self.tables.selected_batches(run, covers)).await
    }

    /// The selected ids of these batches: `(batch, id)`, in order.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn selected_ids(
        &self,
        run: &RunName,
        covers: &Covers,
        batches: &[u32],
    ) -> Result<Vec<(u32, String)>, Error> {
        self.long("list selected ids", &self.tables.selected_ids(run, covers, batches)).await
    }

    /// The number of selected ids of batches `first..end` that have no row in `pass`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn not_computed(&self, pass: &PassId, covers: &Covers, range: [u32; 2]) -> Result<u64, Error> {
        let question = self.tables.not_computed(pass, covers, range);
        let found: Vec<u64> = self.long("count ids that are not computed yet", &question).await?;
        Ok(found.first().copied().unwrap_or_default())
    }

    /// Copies the rows that `pass` lacks in batches `first..end` from the base pass, except the selected ids.
    /// It copies in pieces of at most one block; a larger batch is a piece by itself.
    ///
    /// # Errors
    /// [`Error::BaseValues`] when the base has wrong values; [`Error::Store`], also when another process is
    /// copying the same rows.
    pub async fn take_over(&self, pass: &PassId, covers: &Covers, range: [u32; 2]) -> Result<(), Error> {
        let found = self.look().await?;
        let digested = self.digested(&covers.base_of(&pass.run), &found).await?;
        let mut left = vec![range];
        while let Some([first, end]) = left.pop() {
            let bytes = self.prove_base((pass, covers), [first, end], &found, &digested).await?;
            match pieces([first, end], bytes) {
                pieces if pieces.len() > 1 => left.extend(pieces.into_iter().rev()),
                _ => self.copy(pass, covers, [first, end], found.rows(), &digested).await?,
            }
        }
        Ok(())
    }

    /// Proves all the rows that `pass` would copy from the base pass.
    ///
    /// # Errors
    /// [`Error::BaseValues`] when the base has wrong values; [`Error::Store`].
    pub async fn check_base(&self, pass: &PassId, covers: &Covers, batches: u32) -> Result<(), Error> {
        let found = self.look().await?;
        let digested = self.digested(&covers.base_of(&pass.run), &found).await?;
        self.prove_base((pass, covers), [0, batches], &found, &digested).await.map(drop)
    }

    /// Proves the values of the base pass in a half-open range of batches, and returns the bytes of its rows.
    async fn prove_base(
        &self,
        (pass, covers): (&PassId, &Covers),
        range: [u32; 2],
        found: &Found,
        digested: &[Digested],
    ) -> Result<u64, Error> {
        let question = self.tables.base_at_fault(&pass.run, covers, range, found.rows(), digested);
        let proven: Vec<(u64, u64)> = self.long("prove the values of the rows to copy", &question).await?;
        match proven.first().copied().unwrap_or_default() {
            (0, bytes) => Ok(bytes),
            (batches, _) => {
                let PassId { run, pass } = pass;
                Err(Error::BaseValues { run: run.to_string(), pass: *pass, base: covers.base, batches })
            }
        }
    }

    async fn copy(
        &self,
        pass: &PassId,
        covers: &Covers,
        range: [u32; 2],
        table: &[Column],
        digested: &[Digested],
    ) -> Result<(), Error> {
        let statement = self.tables.take_over(pass, covers, range, table, digested);
        // When two processes copy the same rows at once, the server refuses the second: code 216.
        let PassId { run, pass: number } = pass;
        let id = format!("millstream-copy-{}-{run}-{number}-{}", self.tables.view(), range[0]);
        let mut query = self.client.query_raw(&statement).with_setting("query_id", id);
        for (name, value) in self.insert_settings.iter() {
            query = query.with_setting(*name, *value);
        }
        let copied = super::within(COPY_WITHIN, query.execute()).await;
        if let Err(fault) = &copied
            && (fault.view().is_some() || !matches!(fault, StoreFault::Exception { .. }))
        {
            // The rows may be stored by now. A second copy would add nothing, and would not fill the view
            // either.
            self.note_view_fault(pass, &[range], fault).await?;
        }
        copied.map_err(|fault| self.failed("copy unchanged rows from the base pass", fault))
    }

    /// Sends a query that reads a whole pass.
    pub(super) async fn long<T: RowOwned + RowRead>(
        &self,
        doing: &str,
        question: &str,
    ) -> Result<Vec<T>, Error> {
        let query = self.client.query_raw(question).fetch_all::<T>();
        super::within(PROOF_WITHIN, query).await.map_err(|fault| self.failed(doing, fault))
    }
}

/// Cuts a half-open range of batches into pieces of about equal bytes, each at most one block.
fn pieces([first, end]: [u32; 2], bytes: u64) -> Vec<[u32; 2]> {
    let batches = end.saturating_sub(first);
    let wanted = u32::try_from(bytes.div_ceil(MAX_INSERT_BYTES)).unwrap_or(u32::MAX);
    let step = (batches / wanted.clamp(1, batches.max(1))).max(1);
    let firsts = (first..end).step_by(step as usize);
    firsts.map(|first| [first, first.saturating_add(step).min(end)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_many_as_the_bytes_need() {
        assert_eq!(pieces([3, 9], 0), [[3, 9]]);
        assert_eq!(pieces([3, 9], MAX_INSERT_BYTES), [[3, 9]]);
        assert_eq!(pieces([3, 9], MAX_INSERT_BYTES + 1), [[3, 6], [6, 9]]);
        assert_eq!(pieces([0, 5], 2 * MAX_INSERT_BYTES), [[0, 2], [2, 4], [4, 5]]);
        assert_eq!(pieces([0, 2], u64::MAX), [[0, 1], [1, 2]]);
        assert_eq!(pieces([7, 8], u64::MAX), [[7, 8]]);
    }
}
