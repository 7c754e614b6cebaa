//! Cutting ids into batches.

use millstream::{Id, MAX_BATCH_IDS};

use crate::model::id_digest::IdDigest;

/// Ids of one batch, sorted and without repeats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut<I> {
    /// The ids.
    pub ids: Vec<I>,
    /// Repeats that were dropped.
    pub repeats: IdDigest,
}

/// Cuts a stream of ids into batches, by number of ids and by size.
#[derive(Debug)]
pub struct Cutter<I> {
    ids: Vec<I>,
    bytes: usize,
    batch_ids: usize,
    max_bytes: usize,
}

impl<I: Id> Cutter<I> {
    /// A cutter for batches of `batch_ids` ids, fewer if they would not fit in `max_bytes`.
    pub fn new(batch_ids: u32, max_bytes: usize) -> Self {
        let batch_ids = batch_ids.clamp(1, MAX_BATCH_IDS) as usize;
        Self { ids: Vec::with_capacity(batch_ids), bytes: 0, batch_ids, max_bytes }
    }

    /// Whether the cutter holds no id.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Changes the batch size from now on.
    pub fn resize(&mut self, batch_ids: u32) {
        self.batch_ids = batch_ids.clamp(1, MAX_BATCH_IDS) as usize;
    }

    /// Takes an id; returns a batch if the id completes one.
    pub fn push(&mut self, id: I) -> Option<Cut<I>> {
        let size = id.wire_size();
        let full = if !self.ids.is_empty() && self.bytes + size > self.max_bytes { self.cut() } else { None };
        self.bytes += size;
        self.ids.push(id);
        // One id never completes two batches: a batch cut by size leaves this id alone, unless a batch has one id.
        if full.is_none() && self.ids.len() >= self.batch_ids { self.cut() } else { full }
    }

    /// Cuts the remaining ids.
    pub fn cut(&mut self) -> Option<Cut<I>> {
        if self.ids.is_empty() {
            return None;
        }
        self.bytes = 0;
        let mut ids = std::mem::replace(&mut self.ids, Vec::with_capacity(self.batch_ids));
        let mut repeats = IdDigest::default();
        if !ids.is_sorted_by(|a, b| a < b) {
            ids.sort_unstable();
            ids.dedup_by(|id, before| {
                let again = id == before;
                if again {
                    repeats.add(id);
                }
                again
            });
        }
        Some(Cut { ids, repeats })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_batch_is_cut_by_size_too() {
        let mut cutter = Cutter::new(100, 20);
        let mut cuts: Vec<Cut<u64>> = (0..5).filter_map(|id| cutter.push(id)).collect();
        cuts.extend(cutter.cut());
        assert_eq!(cuts.iter().map(|cut| cut.ids.len()).collect::<Vec<_>>(), [2, 2, 1]);
    }

    proptest! {
        #[test]
        fn each_id_is_in_one_batch(ids in vec(0u64..500, 0..300), batch in 1u32..50, bytes in 8usize..500) {
            let mut cutter = Cutter::new(batch, bytes);
            let mut cuts: Vec<Cut<u64>> = ids.iter().filter_map(|id| cutter.push(*id)).collect();
            cuts.extend(cutter.cut());
            let mut all = IdDigest::default();
            for cut in &cuts {
                all += IdDigest::of(&cut.ids);
                all += cut.repeats;
            }
            prop_assert_eq!(all, IdDigest::of(&ids));
            for cut in &cuts {
                prop_assert!(cut.ids.is_sorted_by(|a, b| a < b));
                prop_assert!(!cut.ids.is_empty() && cut.ids.len() <= batch as usize);
            }
            let mut all: Vec<u64> = cuts.into_iter().flat_map(|cut| cut.ids).collect();
            let mut given = ids;
            all.sort_unstable();
            all.dedup();
            given.sort_unstable();
            given.dedup();
            prop_assert_eq!(all, given);
        }
    }
}
