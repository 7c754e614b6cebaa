//! Appending batches, and the end marker, to an open run in the stream.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::envelope::{decode_ids, encode_end, is_end};
use millstream::names::RunName;
use millstream::{Id, MAX_BATCH_IDS};
use tracing::Instrument;

use super::Producer;
use crate::error::Error;
use crate::failpoint;
use crate::model::id_digest::IdDigest;
use crate::model::moment::now_ms;
use crate::model::record::{Published, RunRecord, SOURCE};
use crate::nats::broker::{Broker, Writing, Written};
use crate::nats::bucket::{Change, Entry};
use crate::produce::input::Cut;
use crate::produce::publish::{Batch, Stored, WAITING_FOR_BROKER, keep, look_up, publish_span};
use crate::retry::patiently;
use crate::telemetry::labels::Origin;
use crate::telemetry::trace::TraceContext;

/// Batches after which the run's record gets new totals, so that a later start has little to read back.
const NOTED_EVERY: u32 = 256;
/// Batches that are read back concurrently.
const READ_AT_ONCE: usize = 32;

impl<I: Id> Producer<'_, I> {
    /// Publishes a batch under the first free number, unless the run is closed.
    pub(super) async fn append(&mut self, cut: Cut<I>) -> Result<(), Error> {
        self.held_since = None;
        let _waiting = self.phases.begin(WAITING_FOR_BROKER);
        self.admit(cut.ids.len() as u32).await?;
        loop {
            if self.ended {
                self.not_taken += cut.ids.len() as u64;
                return Ok(());
            }
            let batch = Batch::new(&self.feed.run, self.all.batches, &cut);
            let trace = TraceContext::begin();
            let metrics = &self.feed.metrics;
            let span = publish_span(&self.feed.run, batch.number, trace);
            metrics.publishing(1);
            let stored = self.store(batch.bytes, Some(trace)).instrument(span).await;
            let metrics = &self.feed.metrics;
            metrics.publishing(0);
            if stored? {
                metrics.published(Origin::Published, batch.ids.ids, batch.repeats.ids);
                self.count(batch.ids, batch.repeats.ids)?;
                break;
            }
        }
        self.written += 1;
        failpoint::pass("follow-after-publish");
        if self.all.batches.is_multiple_of(NOTED_EVERY) {
            self.note().await?;
        }
        if self.feed.batch_ids.is_none()
            && let Some(size) = self.pace.look(&self.session.broker, &self.feed.run, &self.all).await
        {
            self.cutter.resize(size);
        }
        Ok(())
    }

    /// Stores a message under the next number. `false` when another producer's message is there: then that batch is
    /// counted, or the run has ended.
    async fn store(&mut self, message: Bytes, trace: Option<TraceContext>) -> Result<bool, Error> {
        let run = &self.feed.run;
        let number = self.all.batches;
        let subject = self.session.broker.names().ids_subject(run, number);
        let writing = Writing { trace, metrics: &self.feed.metrics, stop: self.stop };
        loop {
            failpoint::pass("follow-before-publish");
            let written = self.session.broker.write_once(&subject, message.clone(), writing).await?;
            if written == Written::First {
                return Ok(true);
            }
            let found = self
                .patiently(|| look_up::<I>(&self.session.broker, run, &subject, number, &message))
                .await?;
            match found {
                // An earlier attempt with a lost reply stored it, or another producer stored an identical batch.
                Stored::Same => return Ok(true),
                Stored::Other(bytes) => {
                    match ids_of::<I>(run, number, &bytes)? {
                        Some(ids) => {
                            self.feed.metrics.published(Origin::Found, ids.len() as u64, 0);
                            self.count(IdDigest::of(&ids), 0)?;
                        }
                        None => self.ended = true,
                    }
                    return Ok(false);
                }
                Stored::Nothing => {}
            }
        }
    }

    fn count(&mut self, more: IdDigest, repeats: u64) -> Result<(), Error> {
        let all = &mut self.all;
        all.batches =
            all.batches.checked_add(1).ok_or_else(|| Error::TooManyBatches { input: SOURCE.to_owned() })?;
        let mut ids = all.id_digest();
        ids += more;
        (all.ids, all.digest) = (ids.ids, ids.digest);
        all.dropped_repeats += repeats;
        Ok(())
    }

    /// Announces a larger batch size in the pass's record before such a batch goes out, because workers take permits by
    /// it.
    async fn admit(&mut self, ids: u32) -> Result<(), Error> {
        if ids <= self.admitted {
            return Ok(());
        }
        // Doubles the size each time, so that the record changes only a few times.
        let most = ids.next_power_of_two().min(MAX_BATCH_IDS);
        let records = &self.session.records;
        let first = self.feed.run.pass(1);
        while let Some(mut entry) = self.patiently(|| records.pass(&first)).await? {
            if entry.record.batch_ids >= most {
                break;
            }
            entry.record.batch_ids = most;
            if self.patiently(|| records.update_pass(&entry)).await? == Change::Made {
                break;
            }
        }
        self.admitted = most;
        Ok(())
    }

    /// Counts the batches that the stream holds beyond the record's totals.
    pub(super) async fn catch_up(&mut self) -> Result<(), Error> {
        let run = &self.feed.run;
        let end = self.session.broker.last_batch(run).await?.map_or(0, |last| last.saturating_add(1));
        let mut read = stream::iter(self.all.batches..end)
            .map(|batch| read_back::<I>(&self.session.broker, run, batch))
            .buffered(READ_AT_ONCE);
        while let Some(found) = read.try_next().await? {
            match found {
                Some(ids) => {
                    self.feed.metrics.published(Origin::Found, ids.ids, 0);
                    self.count(ids, 0)?;
                }
                None => self.ended = true,
            }
        }
        Ok(())
    }

    /// Writes the current totals into the record.
    pub(super) async fn note(&mut self) -> Result<(), Error> {
        let all = self.all.clone();
        let more = |known: &Option<Published>| known.as_ref().is_none_or(|known| known.batches < all.batches);
        self.change(|record| {
            let news = record.published.is_none() && more(&record.so_far);
            if news {
                record.so_far = Some(Published { at_ms: now_ms(), ..all.clone() });
            }
            news
        })
        .await
        .map(drop)
    }

    /// Stores the end marker behind all stored batches, and writes the totals into the record; returns the record's
    /// totals if another producer was faster.
    pub(super) async fn close(&mut self) -> Result<Published, Error> {
        let run = &self.feed.run;
        if self.all.batches == 0 && self.patiently(|| self.session.broker.last_batch(run)).await?.is_none() {
            return Err(Error::NoIds { input: SOURCE.to_owned() });
        }
        while !self.ended {
            let end = encode_end(self.feed.run.as_str(), self.all.batches);
            self.ended |= self.store(end.into(), None).await?;
        }
        failpoint::pass("follow-ended");
        let all = Published { at_ms: now_ms(), ..self.all.clone() };
        let record = self
            .change(|record| {
                let news = record.published.is_none();
                if news {
                    record.published = Some(all.clone());
                }
                news
            })
            .await?;
        failpoint::pass("follow-closed");
        keep(&self.session.store, &record).await;
        Ok(record.published.unwrap_or(all))
    }

    /// Changes the run's record until `change` has nothing to change, and returns it.
    async fn change(&self, mut change: impl FnMut(&mut RunRecord) -> bool) -> Result<RunRecord, Error> {
        let records = &self.session.records;
        let run = &self.feed.run;
        loop {
            let mut entry: Entry<RunRecord> = self.patiently(|| records.known_run(run)).await?;
            if !change(&mut entry.record)
                || self.patiently(|| records.update_run(&entry)).await? == Change::Made
            {
                return Ok(entry.record);
            }
        }
    }

    /// Retries a request to NATS until it succeeds or this producer is stopped.
    async fn patiently<T, F>(&self, ask: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        patiently(&self.feed.run, self.stop, ask).await
    }
}

/// The ids of a stored batch; `None` for the end marker.
async fn read_back<I: Id>(broker: &Broker, run: &RunName, batch: u32) -> Result<Option<IdDigest>, Error> {
    let found = broker.ids_message(&broker.names().ids_subject(run, batch)).await?;
    let (_, bytes) = found.ok_or_else(|| Error::BatchGone { run: run.to_string(), batch })?;
    Ok(ids_of::<I>(run, batch, &bytes)?.map(|ids| IdDigest::of(&ids)))
}

/// The ids of a batch; `None` for the end marker.
fn ids_of<I: Id>(run: &RunName, batch: u32, bytes: &[u8]) -> Result<Option<Vec<I>>, Error> {
    if is_end(bytes, run.as_str(), batch) {
        return Ok(None);
    }
    decode_ids::<I>(bytes)
        .map(|read| Some(read.ids))
        .map_err(|source| Error::Message { subject: format!("batch {batch} of run {run}"), source })
}
