//! What is stored of a pass: counted, and proven value by value.

use millstream::names::PassId;

use super::{PROOF_WITHIN, Store, store_fault, within};
use crate::clickhouse::sql::{Digested, RowsRead};
use crate::error::Error;
use crate::model::id_digest::IdDigest;
use crate::model::record::Published;

/// A proof's view of a pass: what ClickHouse holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Batches of which there is a row.
    pub batches: u64,
    /// Distinct `(batch, id)`.
    pub ids: u64,
    /// Wrapping sum of `sipHash64(id)` over them.
    pub digest: u64,
    /// How many of them are dead letters.
    pub dead: u64,
    /// Rows that are there a second time.
    pub raw_duplicates: u64,
    /// Whether rows landed, or were merged, while they were counted: the figures are of two moments then.
    pub is_moving: bool,
    /// What was found of values; `None` when they were not looked at.
    pub values: Option<StoredValues>,
}

impl Stored {
    /// The ids that are stored.
    pub fn id_digest(&self) -> IdDigest {
        IdDigest { ids: self.ids, digest: self.digest }
    }
}

/// Values as they are stored, against what workers computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredValues {
    /// Batches that hold other values than those computed.
    pub at_fault: u64,
    /// Batches whose values cannot be proven: the schema of their rows is not known, or the table has lost its columns.
    pub unproven: u64,
}

/// One batch as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBatch {
    /// Its number.
    pub batch: u32,
    /// Distinct ids stored.
    pub ids: u64,
    /// Ids that it should have.
    pub expected: u64,
    /// Wrapping sum of `sipHash64(id)` over the distinct ids stored.
    pub digest: u64,
    /// Whether it holds other values than those computed, as far as that was looked at.
    pub values_at_fault: bool,
}

/// What one question of a proof answers.
struct Proven {
    batches: u64,
    ids: u64,
    digest: u64,
    dead: u64,
    values: StoredValues,
}

impl Proven {
    /// Whether it is what was published, value by value.
    fn is_all_of(&self, published: &Published) -> bool {
        self.batches == u64::from(published.batches)
            && IdDigest { ids: self.ids, digest: self.digest } == published.id_digest()
            && self.values == StoredValues { at_fault: 0, unproven: 0 }
    }
}

impl Store {
    /// Rows of a pass, raw duplicates counted. Cheap, however many there are.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn raw_rows(&self, pass: &PassId) -> Result<u64, Error> {
        self.one("count rows", &self.tables.raw_count(pass)).await
    }

    /// The first of so many batches of a pass that lack rows.
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

    /// What is stored of a pass, counted from the rows themselves in bounded memory; with `values`, their values are
    /// compared with what workers computed.
    ///
    /// Where there are as many raw rows as ids were `published`, each of them once, the rows are counted as they lie, without
    /// merging them first: if every message's digest is that of its rows, and the whole that of the run, no row is there twice.
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
                // Rows of a second build may have landed since it was asked which there are.
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

    /// The schemas of a pass's rows, where values are looked at.
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

    /// How many ids a pass has more than once, in different batches.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn repeated_ids(&self, pass: &PassId) -> Result<u64, Error> {
        let query = self.client.query_raw(&self.tables.repeated(pass)).fetch_one::<u64>();
        within(PROOF_WITHIN, query).await.map_err(|fault| self.failed("count repeated ids", fault))
    }

    /// Calls `each` for every batch of a pass, in order; with `values`, their values are looked at.
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

/// Rows that are there a second time, of the raw rows counted before and after the distinct ids were. What landed in between
/// is no duplicate: at 10^9 ids 46 million were reported that did not exist.
fn duplicates(before: u64, ids: u64, after: u64) -> u64 {
    before.min(after).saturating_sub(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_land_while_they_are_counted_are_no_duplicates() {
        // 10 ids, of which rows land: 6 before, 8 while ids are read, 10 after.
        assert_eq!(duplicates(6, 8, 10), 0);
        assert_eq!(duplicates(12, 10, 12), 2);
        // Merged away meanwhile.
        assert_eq!(duplicates(12, 10, 10), 0);
    }
}
