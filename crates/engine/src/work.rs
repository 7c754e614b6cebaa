//! A worker host: takes batches, has them computed, publishes their rows, acks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use millstream::envelope::{EnvelopeFault, IdBatch, RowBatch, decode_ids, encode_rows};
use millstream::names::RunName;
use millstream::schema::ColumnType;
use millstream::Pipeline;

use crate::board;
use crate::broker::{Broker, Written};
use crate::compute::{BatchKey, Computed, Pool};
use crate::consume::{Slots, consume};
use crate::delivery::{Delivery, Held};
use crate::error::Error;
use crate::records::PassRecord;
use crate::retry::Backoff;
use crate::stop::Stop;

/// How often an id is tried that asks for it.
const ATTEMPTS: u32 = 5;
/// The first and the longest pause before another attempt.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// A batch that cannot be computed now is handed back for this long.
const SET_BACK: Duration = Duration::from_secs(60);

/// How a worker works.
#[derive(Debug, Clone)]
pub struct WorkPlan {
    /// Compute threads.
    pub threads: usize,
    /// How long held batches may take to finish after a stop.
    pub drain: Duration,
}

/// What a worker did, counted since its start.
#[derive(Debug, Default)]
pub struct WorkCounts {
    /// Batches whose rows are stored in the stream.
    pub batches: AtomicU64,
    /// Ids in them.
    pub ids: AtomicU64,
    /// Dead letters among their rows.
    pub dead: AtomicU64,
    /// Arrivals after the first.
    pub redelivered: AtomicU64,
}

struct Worker<P: Pipeline> {
    pool: Pool<P>,
    broker: Broker,
    counts: Arc<WorkCounts>,
    stop: Stop,
}

/// Works until told to stop, then finishes what it holds within the plan's deadline and hands back the rest.
///
/// # Errors
/// When the bucket cannot be read at the start; afterwards failures are waited out.
pub async fn work<P: Pipeline>(
    pipeline: Arc<P>,
    columns: &[ColumnType],
    broker: &Broker,
    plan: &WorkPlan,
    counts: Arc<WorkCounts>,
    stop: &Stop,
) -> Result<(), Error> {
    let running = board::follow(&broker.records().await?, stop).await?;
    let pool = Pool::start(pipeline, columns, plan.threads)?;
    let held = Held::start(broker.clone(), stop);
    let worker = Arc::new(Worker { pool, broker: broker.clone(), counts, stop: stop.clone() });
    tracing::info!(threads = plan.threads, "working");
    consume(broker, running, &Slots::new(plan.threads), &held, stop, |pass, delivery| {
        let worker = worker.clone();
        stop.spawn(async move { worker.handle(&pass, delivery).await });
    })
    .await;
    tracing::info!(held = held.count(), "taking no more batches, finishing what is held");
    stop.finished(plan.drain).await;
    broker.flush().await;
    Ok(())
}

impl<P: Pipeline> Worker<P> {
    /// Ends the delivery: with an ack once the rows are stored, else with a nak that says when to come again.
    async fn handle(&self, pass: &PassRecord, delivery: Delivery) {
        if delivery.deliveries() > 1 {
            self.counts.redelivered.fetch_add(1, Ordering::Relaxed);
        }
        match self.process(pass, &delivery).await {
            Ok(()) => delivery.ack().await,
            Err(Error::Stopped) => delivery.nak(Duration::ZERO).await,
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                let hint = error.hint().unwrap_or_default();
                tracing::error!(subject = delivery.subject(), %error, cause, hint, "the batch is set back for 60 s");
                delivery.nak(SET_BACK).await;
            }
        }
    }

    async fn process(&self, pass: &PassRecord, delivery: &Delivery) -> Result<(), Error> {
        let malformed = |source: EnvelopeFault| Error::Message { subject: delivery.subject().to_owned(), source };
        let batch: IdBatch<P::Id> = decode_ids(delivery.payload()).map_err(malformed)?;
        let run: RunName = batch.run.parse()?;
        let key = BatchKey { run, pass: pass.pass, batch: batch.batch, ids: batch.ids.len() as u32 };
        if self.broker.names().ids_subject(&key.run, key.batch) != delivery.subject() {
            return Err(malformed(EnvelopeFault::Foreign { length: delivery.payload().len() }));
        }
        let computed = tokio::select! {
            computed = self.compute(&key, batch.ids) => computed?,
            () = self.stop.given_up() => return Err(Error::Stopped),
        };
        self.publish(&key, &computed).await
    }

    /// Computes all ids; those that ask for another attempt get it after a pause in which they hold no core.
    async fn compute(&self, key: &BatchKey, ids: Vec<P::Id>) -> Result<Computed<P::Id>, Error> {
        let mut whole = Computed::default();
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        let mut left = ids;
        for attempt in 1.. {
            whole.append(self.pool.compute(key.clone(), left, attempt == ATTEMPTS).await);
            left = std::mem::take(&mut whole.again).into_iter().map(|(id, _)| id).collect();
            if left.is_empty() {
                break;
            }
            tracing::debug!(run = %key.run, batch = key.batch, ids = left.len(), attempt, "ids to be tried again");
            if !self.stop.pause(pause.wait()).await {
                return Err(Error::Stopped);
            }
        }
        Ok(whole)
    }

    async fn publish(&self, key: &BatchKey, computed: &Computed<P::Id>) -> Result<(), Error> {
        let rows = RowBatch {
            run: key.run.as_str(),
            pass: key.pass,
            batch: key.batch,
            ids: key.ids,
            dead: computed.dead,
            raw_bytes: computed.raw_bytes,
            rows: &computed.frames,
        };
        let message = Bytes::from(encode_rows(&rows));
        let subject = self.broker.names().rows_subject(&key.run, key.pass, key.batch);
        let written = self.broker.write_once(&subject, message, &self.stop).await?;
        if written == Written::Already {
            tracing::debug!(subject, "another worker's rows are stored already");
        }
        self.counts.batches.fetch_add(1, Ordering::Relaxed);
        self.counts.ids.fetch_add(u64::from(key.ids), Ordering::Relaxed);
        self.counts.dead.fetch_add(u64::from(computed.dead), Ordering::Relaxed);
        Ok(())
    }
}
