//! A batch in hand: what of it is computed, what is stored, and what is left.
//!
//! Rows are stored together once all are done. Those that are done do not wait longer than a limit for the rest of their
//! batch, though: an id may take hours, or ask for another attempt again and again. They are stored in parts then, and
//! the worker that draws the batch after a restart computes what is left.

use std::sync::Arc;

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::decode_ids;
use tokio::sync::Mutex;

use crate::compute::{Computed, FULL, Results};
use crate::error::Error;
use crate::model::times::Spent;
use crate::work::rows_message::{Encoded, Known, Stored, Target};

/// A batch that is being computed.
pub(crate) struct Batch<I> {
    target: Target,
    /// Where ids are put down as they are done.
    pub results: Arc<Results<I>>,
    /// The message that brought the ids.
    ids: Bytes,
    kept: Mutex<Kept<I>>,
}

/// What is not stored yet.
struct Kept<I> {
    known: Known,
    /// Rows that are done.
    rows: Computed<I>,
}

/// What became of some more ids of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct News {
    /// How many have rows that are stored.
    pub ids: u32,
    /// Dead letters among them.
    pub dead: u32,
    /// What they took of the cores.
    pub spent: Spent,
}

impl<I: Id> Batch<I> {
    /// A batch of which nothing is known to be stored, whose ids came in this message.
    pub fn new(target: Target, results: Arc<Results<I>>, ids: Bytes) -> Self {
        let known = Known::nothing(target.key.ids);
        let rows = Computed::none(&target.schema);
        Self { target, results, ids, kept: Mutex::new(Kept { known, rows }) }
    }

    /// Which of the batch's ids have no row in the stream. Asked when the batch was delivered before: the worker that
    /// had it may have stored some of it.
    ///
    /// # Errors
    /// [`Error::Stopped`] when work is given up, [`Error::Message`] when what is stored cannot be read.
    pub async fn left_of(&self, ids: Vec<I>) -> Result<Vec<I>, Error> {
        let known = self.target.look().await?;
        let left = known.open.iter().flat_map(|places| &ids[places.start as usize..places.end as usize]);
        let left: Vec<I> = left.cloned().collect();
        if left.len() < ids.len() {
            let key = &self.target.key;
            let left = left.len();
            tracing::debug!(run = %key.pass.run, batch = key.batch, left, "rows of the batch are stored already");
        }
        self.kept.lock().await.known = known;
        Ok(left)
    }

    /// Stores what is done and not stored.
    ///
    /// # Errors
    /// [`Error::Stopped`] when work is given up, [`Error::Message`] when what another worker stored cannot be read.
    pub async fn store(&self) -> Result<News, Error> {
        let schema = &self.target.schema;
        let mut kept = self.kept.lock().await;
        self.target.keep_cuts(&kept.known).await?;
        let mut rows = std::mem::replace(&mut kept.rows, Computed::none(schema));
        rows.append(self.results.take(schema));
        let mut news = News { spent: rows.spent, ..News::default() };
        // Each round cuts so many parts off; rows that are left wait for their neighbours, as long as they are not too many.
        while !rows.ids.is_empty() {
            let done = rows.ids.len();
            let encoded = self.encode(rows)?;
            let Stored { dead, packing, rest } = self.target.store(encoded, &mut kept.known).await?;
            news.ids += (done - rest.ids.len()) as u32;
            news.dead += dead;
            news.spent.encoding += packing;
            rows = rest;
            if (rows.rows.bytes() as u64) < FULL {
                break;
            }
        }
        kept.rows = rows;
        Ok(news)
    }

    /// Rows of the batch, whole or some of them, as messages are made of them.
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
