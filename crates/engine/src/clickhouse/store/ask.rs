//! What is stored of batches: asked before each insert, and before each ack.

use std::collections::HashMap;

use millstream::names::PassId;

use super::Store;
use crate::clickhouse::sql::Count;
use crate::error::StoreFault;
use crate::model::rows::Portion;

/// Split messages per query. It names two ids of each, and a server reads at most 256 KiB of SQL.
const PARTS_ASKED: usize = 10;

/// The stored ids of a portion.
struct Counted<'a> {
    of: &'a Portion,
    count: u64,
    /// Whether all found ids are distinct.
    each_is_another: bool,
}

impl Store {
    /// Counts the distinct ids of each portion that are stored, in the order of the portions. An ack may follow
    /// only this answer (**ask-before-ack**).
    ///
    /// # Errors
    /// The fault; then nothing is known of the rows.
    pub async fn ask(
        &self,
        pass: &PassId,
        portions: impl Iterator<Item = &Portion>,
    ) -> Result<Vec<u64>, StoreFault> {
        let portions: Vec<&Portion> = portions.collect();
        let counted = self.count(pass, &portions, Count::Rows).await?;
        let (mut ids, rows): (Vec<_>, Vec<_>) = counted.into_iter().partition(|found| found.each_is_another);
        let doubtful: Vec<&Portion> = rows.into_iter().map(|found| found.of).collect();
        ids.extend(self.count(pass, &doubtful, Count::Ids).await?);
        let stored: HashMap<&Portion, u64> = ids.into_iter().map(|found| (found.of, found.count)).collect();
        Ok(portions.into_iter().map(|portion| stored.get(portion).copied().unwrap_or(0)).collect())
    }

    /// Counts each of these portions; portions without a stored row are left out.
    async fn count<'a>(
        &self,
        pass: &PassId,
        portions: &[&'a Portion],
        by: Count,
    ) -> Result<Vec<Counted<'a>>, StoreFault> {
        let (batches, parts): (Vec<&Portion>, Vec<&Portion>) =
            portions.iter().partition(|portion| portion.ids.is_none());
        let mut counted = Vec::new();
        if !batches.is_empty() {
            let known: HashMap<(u32, u32), &Portion> =
                batches.iter().map(|portion| ((portion.batch, portion.of), *portion)).collect();
            let batches: Vec<u32> = batches.iter().map(|portion| portion.batch).collect();
            let question = self.tables.ask(pass, &batches, by);
            for (batch, of, count, each) in self.answer::<(u32, u32, u64, u8)>(&question).await? {
                let of = known.get(&(batch, of));
                counted.extend(of.map(|of| Counted { of, count, each_is_another: each == 1 }));
            }
        }
        for parts in parts.chunks(PARTS_ASKED) {
            let question = self.tables.ask_parts(pass, parts, by);
            for (place, count, each) in self.answer::<(u32, u64, u8)>(&question).await? {
                let of = parts.get(place as usize);
                counted.extend(of.map(|of| Counted { of, count, each_is_another: each == 1 }));
            }
        }
        Ok(counted)
    }
}
