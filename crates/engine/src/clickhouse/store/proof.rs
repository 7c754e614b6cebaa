//! What ClickHouse stores of a pass: counted, and proven value by value.

use millstream::names::PassId;

use super::{PROOF_WITHIN, Store, store_fault, within};
use crate::clickhouse::sql::{Digested, RowsRead};
use crate::error::Error;
use crate::model::id_digest::IdDigest;
use crate::model::record::Published;

/// What ClickHouse stores of a pass, for the proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// The number of batches with a row.
    pub batches: u64,
    /// The number of distinct `(batch, id)`.
    pub ids: u64,
    /// Wrapping sum of `sipHash64(id)` over the distinct ids.
    pub digest: u64,
    /// The number of distinct ids that are dead letters.
    pub dead: u64,
    /// The number of raw duplicates.
    pub raw_duplicates: u64,
    /// Whether rows were inserted or merged during the count; then the figures are of two moments.
    pub is_moving: bool,
    /// The result of the values check; `None` if values were not checked.
    pub values: Option<StoredValues>,
}

impl Stored {
    /// The digest of the stored ids.
    pub fn id_digest(&self) -> IdDigest {
        IdDigest { ids: self.ids, digest: self.digest }
    }

    /// Whether every id of every batch is stored, with the computed values as far as they were checked.
    pub fn is_all_of(&self, published: &Published) -> bool {
        published.is(self.batches, self.id_digest()) && self.values.is_none_or(|values| values.at_fault == 0)
    }
}

/// Stored values compared with what workers computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredValues {
    /// The number of batches with wrong values.
    pub at_fault: u64,
    /// The number of batches whose values cannot be proven: their schema is unknown, or the table has lost its
    /// columns.
    pub unproven: u64,
}

/// One batch as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBatch {
    /// The number of the batch.
    pub batch: u32,
    /// The number of distinct ids stored.
    pub ids: u64,
    /// The number of ids that the batch should have.
    pub expected: u64,
    /// Wrapping sum of `sipHash64(id)` over the distinct ids stored.
    pub digest: u64,
    /// Whether the batch has wrong values, if values were checked.
    pub values_at_fault: bool,
}

/// The answer to one query of a proof.
struct Proven {
    batches: u64,
    ids: u64,
    digest: u64,
    dead: u64,
    values: StoredValues,
}

impl Proven {
    /// Whether the stored rows match what was published, value by value.
    fn is_all_of(&self, published: &Published) -> bool {
        published.is(self.batches, IdDigest { ids: self.ids, digest: self.digest })
            && self.values == StoredValues { at_fault: 0, unproven: 0 }
    }
}

impl Store {
    /// Counts the rows of a pass with raw duplicates. Cheap at any size.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn raw_rows(&self, pass: &PassId) -> Result<u64, Error> {
        self.one("count rows", &self.tables.raw_count(pass)).await
    }

    /// The first batches of a pass that lack rows, at most `most`.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub(crate) async fn lacking_batches(
        &self,
        pass: &PassId,
        batches: u32,
        most: usize,
    ) -> Result<Vec<u32>, Error> {
        self.all("find batches that lack rows", &self.tables.lacking_batches(pass, batches, most)).await
    }

    /// Counts what is stored of a pass from its rows, in bounded memory. With `values`, values are compared
    /// with what workers computed.
    ///
    /// If there are as many raw rows as `published` ids, and no id is repeated, the rows are counted as the
    /// parts hold them, without merging. If every message's digest matches its rows, and the total matches the
    /// run, no row is stored twice.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn stored(
        &self,
        pass: &PassId,
        values: bool,
        published: Option<&Published>,
    ) -> Result<Stored, Error> {
        let mut digested = self.digested_if(values, pass).await?;
        let before = self.raw_rows(pass).await?;
        let mut found = None;
        if let Some(published) = published.filter(|published| values && published.ids == before) {
            let raw = self.prove(pass, digested.as_deref(), RowsRead::All).await?;
            if raw.is_all_of(published) {
                found = Some(raw);
            } else {
                // Rows of a second build may have been inserted since the schemas were asked for.
                digested = self.digested_if(values, pass).await?;
            }
        }
        let found = match found {
            Some(found) => found,
            None => self.prove(pass, digested.as_deref(), RowsRead::Once).await?,
        };
        let after = self.raw_rows(pass).await?;
        let Proven { batches, ids, digest, dead, values: found_values } = found;
        let raw_duplicates = duplicates(before, ids, after);
        let is_moving = before != after;
        let values = values.then_some(found_values);
        Ok(Stored { batches, ids, digest, dead, raw_duplicates, is_moving, values })
    }

    /// The schemas of a pass's rows, if values are checked.
    async fn digested_if(&self, values: bool, pass: &PassId) -> Result<Option<Vec<Digested>>, Error> {
        Ok(if values { Some(self.digested(pass, &self.look().await?).await?) } else { None })
    }

    async fn prove(
        &self,
        pass: &PassId,
        digested: Option<&[Digested]>,
        rows: RowsRead,
    ) -> Result<Proven, Error> {
        let question = self.tables.proof(pass, digested, rows);
        let proof = self.client.query_raw(&question).fetch_one::<(u64, u64, u64, u64, u64, u64)>();
        let (batches, ids, digest, dead, at_fault, unproven) =
            within(PROOF_WITHIN, proof).await.map_err(|fault| self.failed("prove a pass", fault))?;
        Ok(Proven { batches, ids, digest, dead, values: StoredValues { at_fault, unproven } })
    }

    /// The number of ids that a pass has in more than one batch.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn repeated_ids(&self, pass: &PassId) -> Result<u64, Error> {
        let query = self.client.query_raw(&self.tables.repeated(pass)).fetch_one::<u64>();
        within(PROOF_WITHIN, query).await.map_err(|fault| self.failed("count repeated ids", fault))
    }

    /// Calls `each` for every batch of a pass, in order. With `values`, values are checked.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn each_batch(
        &self,
        pass: &PassId,
        values: bool,
        mut each: impl FnMut(StoredBatch),
    ) -> Result<(), Error> {
        let doing = "list the batches of a pass";
        let failed = |fault| self.failed(doing, fault);
        let digested = self.digested_if(values, pass).await?;
        let question = self.tables.batches(pass, digested.as_deref());
        let cursor = self.client.query_raw(&question).fetch::<(u32, u64, u32, u64, u8)>();
        let mut cursor = cursor.map_err(|error| failed(store_fault(error, PROOF_WITHIN)))?;
        while let Some((batch, ids, expected, digest, fault)) =
            within(PROOF_WITHIN, cursor.next()).await.map_err(failed)?
        {
            let expected = u64::from(expected);
            each(StoredBatch { batch, ids, expected, digest, values_at_fault: fault != 0 });
        }
        Ok(())
    }
}

/// The number of raw duplicates, from the raw rows before and after the distinct ids were counted. A row
/// inserted in between is no duplicate: at 10^9 ids, 46 million false duplicates were reported.
fn duplicates(before: u64, ids: u64, after: u64) -> u64 {
    before.min(after).saturating_sub(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_land_while_they_are_counted_are_no_duplicates() {
        // 10 ids whose rows are being inserted: 6 before, 8 while ids are read, 10 after.
        assert_eq!(duplicates(6, 8, 10), 0);
        assert_eq!(duplicates(12, 10, 12), 2);
        // Merged during the count.
        assert_eq!(duplicates(12, 10, 10), 0);
    }
}
