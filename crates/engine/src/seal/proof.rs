//! The proof that a pass is complete: what was published, compared with what is stored.

use millstream::names::PassId;

use crate::clickhouse::store::{Store, Stored};
use crate::error::Error;
use crate::model::record::Published;

/// What was published of a run, and what ClickHouse stores.
#[derive(Debug, Clone)]
pub struct Proof {
    /// What was published.
    pub published: Published,
    /// What is stored.
    pub stored: Stored,
}

impl Proof {
    /// Reads the stored figures from ClickHouse.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn take(
        store: &Store,
        pass: &PassId,
        published: &Published,
        may_repeat: bool,
    ) -> Result<Self, Error> {
        // If an id may be in two batches, a surplus id could hide a missing one, so the short proof is not
        // used.
        let stored = store.stored(pass, true, Some(published).filter(|_| !may_repeat)).await?;
        Ok(Self { published: published.clone(), stored })
    }

    /// Whether every id of every batch is stored, with the computed values.
    pub fn is_complete(&self) -> bool {
        self.stored.is_all_of(&self.published)
    }

    /// The number of batches whose values cannot be proven, if there are any.
    pub fn unproven(&self) -> Option<u64> {
        self.stored.values.map(|values| values.unproven).filter(|batches| *batches > 0)
    }

    /// Whether the pass is complete without raw duplicates, by figures of one moment.
    pub fn is_clean(&self) -> bool {
        self.is_complete() && self.stored.raw_duplicates == 0 && !self.stored.is_moving
    }
}
