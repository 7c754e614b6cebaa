//! A held batch: which of its ids are computed, stored, or left.
//!
//! Rows are stored together once all ids are finished. But finished rows wait only for a limited time, because an id
//! may take hours, or ask for another attempt again and again. After that time the worker stores them in split rows
//! messages, and after a restart the next worker computes only the remaining ids.

use std::sync::Arc;

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::decode_ids;
use tokio::sync::Mutex;

use crate::compute::{Computed, FULL, Results};
use crate::error::Error;
use crate::model::times::Spent;
use crate::work::rows_message::{Encoded, Known, Stored, Target};

/// A batch under computation.
pub(crate) struct Batch<I> {
    target: Target,
    /// The store for computed ids.
    pub results: Arc<Results<I>>,
    /// The message that carried the ids.
    ids: Bytes,
    unstored: Mutex<Unstored<I>>,
}

/// Rows that are not in the stream yet.
struct Unstored<I> {
    known: Known,
    /// Finished rows.
    rows: Computed<I>,
}

/// Outcome of storing some ids of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct News {
    /// Ids whose rows were stored.
    pub ids: u32,
    /// Dead letters among these ids.
    pub dead: u32,
    /// Core time that the ids took.
    pub spent: Spent,
}

impl<I: Id> Batch<I> {
    /// A batch with no known stored rows, whose ids came in the message `ids`.
    pub fn new(target: Target, results: Arc<Results<I>>, ids: Bytes) -> Self {
        let known = Known::nothing(target.key.ids);
        let rows = Computed::none(&target.schema);
        Self { target, results, ids, unstored: Mutex::new(Unstored { known, rows }) }
    }

    /// Which of the batch's ids have no row in the stream. Ask for a redelivered batch, because an earlier worker may
    /// have stored some rows.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker gives up, [`Error::Message`] when stored messages cannot be read.
    pub async fn left_of(&self, ids: Vec<I>) -> Result<Vec<I>, Error> {
        let known = self.target.look().await?;
        let left = known.open.iter().flat_map(|places| &ids[places.start as usize..places.end as usize]);
        let left: Vec<I> = left.cloned().collect();
        if left.len() < ids.len() {
            let key = &self.target.key;
            let left = left.len();
            tracing::debug!(run = %key.pass.run, batch = key.batch, left, "rows of the batch are stored already: computing only the rest");
        }
        self.unstored.lock().await.known = known;
        Ok(left)
    }

    /// Stores finished rows that are not stored yet.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the worker gives up, [`Error::Message`] when another worker's messages cannot be read.
    pub async fn store(&self) -> Result<News, Error> {
        let schema = &self.target.schema;
        let mut unstored = self.unstored.lock().await;
        self.target.keep_cuts(&unstored.known).await?;
        let mut rows = std::mem::replace(&mut unstored.rows, Computed::none(schema));
        rows.append(self.results.take(schema));
        let mut news = News { spent: rows.spent, ..News::default() };
        // Each round splits off a limited number of messages. The remaining rows wait for their neighbours, unless they
        // are too large.
        while !rows.ids.is_empty() {
            let done = rows.ids.len();
            let encoded = self.encode(rows)?;
            let Stored { dead, packing, rest } = self.target.store(encoded, &mut unstored.known).await?;
            news.ids += (done - rest.ids.len()) as u32;
            news.dead += dead;
            news.spent.encoding += packing;
            rows = rest;
            if (rows.rows.bytes() as u64) < FULL {
                break;
            }
        }
        unstored.rows = rows;
        Ok(news)
    }

    /// All or some rows of the batch, ready to be made into messages.
    fn encode(&self, rows: Computed<I>) -> Result<Encoded<I>, Error> {
        let Target { key, schema, maker, broker, .. } = &self.target;
        let schema = schema.clone();
        let maker = maker.clone();
        let limit = broker.max_payload();
        if rows.ids.len() == key.ids as usize {
            return Ok(Encoded::new(key, rows, schema, maker, limit));
        }
        let all = decode_ids::<I>(&self.ids).map_err(|source| Error::Message {
            subject: broker.names().ids_subject(&key.pass.run, key.batch),
            source,
        })?;
        Ok(Encoded::some(key, &all.ids, rows, schema, maker, limit))
    }
}
