//! A worker host: takes batches, has them computed, publishes their rows, acks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millstream::envelope::{EnvelopeFault, IdBatch, decode_ids};
use millstream::schema::ColumnType;
use millstream::{Limits, Pipeline};

use crate::aside::set_aside;
use crate::board;
use crate::broker::Broker;
use crate::compute::{BatchKey, Computed, Cores, Place, blank_of};
use crate::consume::{Slots, consume};
use crate::delivery::{Delivery, Held};
use crate::error::{Error, full_cause};
use crate::failpoint;
use crate::parts;
use crate::records::PassRecord;
use crate::retry::Backoff;
use crate::stop::Stop;
use tokio::sync::Semaphore;

/// From this delivery of a batch on its ids are computed alone: whoever had it before may have died of one.
const SUSPECT: i64 = 3;
/// Batches that may wait at once to try ids again: each keeps its computed rows.
const WAITING: usize = 16;
/// A batch that cannot be computed now is handed back for this long.
const SET_BACK: Duration = Duration::from_secs(60);

/// How a worker works.
#[derive(Debug, Clone)]
pub struct WorkPlan {
    /// Compute threads.
    pub threads: usize,
    /// Which process computes.
    pub place: Place,
    /// What each id may take.
    pub limits: Limits,
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
    /// Ids that took longer than their soft limit.
    pub slow: AtomicU64,
    /// Batches, or parts of them, that were computed one id at a time.
    pub alone: AtomicU64,
    /// Ids that ended their process, or had to be ended with it.
    pub ended: AtomicU64,
    /// Messages that are no batch of ours, kept apart.
    pub set_aside: AtomicU64,
}

struct Worker<P: Pipeline> {
    cores: Cores<P>,
    /// What a dead letter holds in the pipeline's own columns.
    blank: Arc<[u8]>,
    limits: Limits,
    slots: Slots,
    /// Seats for batches that wait to try some of their ids again, and hold no core meanwhile.
    waiting: Semaphore,
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
    let WorkPlan { threads, place, limits, .. } = plan.clone();
    let cores = Cores::start(pipeline, columns, threads, place, limits, counts.clone())?;
    let held = Held::start(broker.clone(), stop);
    let (slots, waiting) = (Slots::new(plan.threads), Semaphore::new(WAITING));
    let worker = Arc::new(Worker {
        cores,
        blank: blank_of(columns),
        limits,
        slots: slots.clone(),
        waiting,
        broker: broker.clone(),
        counts,
        stop: stop.clone(),
    });
    tracing::info!(threads = plan.threads, "working");
    consume(broker, running, &slots, &held, stop, |pass, delivery| {
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
    async fn handle(&self, pass: &PassRecord, mut delivery: Delivery) {
        if delivery.deliveries() > 1 {
            self.counts.redelivered.fetch_add(1, Ordering::Relaxed);
        }
        match self.process(pass, &mut delivery).await {
            Ok(()) => {
                failpoint::pass("work-before-ack");
                delivery.ack().await;
                failpoint::pass("work-after-ack");
            }
            Err(Error::Stopped) => delivery.nak(Duration::ZERO).await,
            Err(Error::Message { subject, source }) if subject == delivery.subject() => {
                set_aside(&self.broker, delivery, &source, &self.counts.set_aside).await;
            }
            // These ids are sound. What is stored for them is for a sink to set aside; the batch is repaired then, which
            // waits until no delivery of the pass is open.
            Err(Error::Message { subject, source })
                if !matches!(source, EnvelopeFault::NewerVersion { .. }) =>
            {
                tracing::warn!(subject, fault = %source, "the rows that are stored already cannot be read");
                delivery.ack().await;
            }
            Err(error) => {
                let (hint, error) = (error.hint().unwrap_or_default(), full_cause(&error));
                tracing::error!(subject = delivery.subject(), error, hint, "the batch is set back for 60 s");
                delivery.nak(SET_BACK).await;
            }
        }
    }

    async fn process(&self, pass: &PassRecord, delivery: &mut Delivery) -> Result<(), Error> {
        let (key, ids) = self.read(pass, delivery)?;
        failpoint::pass("work-before-compute");
        let computed = tokio::select! {
            computed = self.compute(&key, ids, delivery) => computed?,
            () = self.stop.given_up() => return Err(Error::Stopped),
        };
        failpoint::pass("work-before-publish");
        self.publish(&key, computed).await
    }

    fn read(&self, pass: &PassRecord, delivery: &Delivery) -> Result<(BatchKey, Vec<P::Id>), Error> {
        let (subject, payload) = (delivery.subject(), delivery.payload());
        let malformed = |source| Error::Message { subject: subject.to_owned(), source };
        let IdBatch { run, batch, ids } = decode_ids(payload).map_err(malformed)?;
        let foreign = |_| malformed(EnvelopeFault::Foreign { length: payload.len() });
        let key =
            BatchKey { run: run.parse().map_err(foreign)?, pass: pass.pass, batch, ids: ids.len() as u32 };
        let names = self.broker.names();
        if names.ids_subject(&key.run, key.batch) != subject
            && names.replay_subject(&key.run, key.pass, key.batch) != subject
        {
            return Err(malformed(EnvelopeFault::Foreign { length: payload.len() }));
        }
        Ok((key, ids))
    }

    /// Computes all ids; those that ask for another attempt get it after a pause.
    async fn compute(
        &self,
        key: &BatchKey,
        ids: Vec<P::Id>,
        delivery: &mut Delivery,
    ) -> Result<Computed<P::Id>, Error> {
        let mut whole = Computed::default();
        let mut pause = Backoff::new(self.limits.first_pause, self.limits.longest_pause);
        let suspect = delivery.deliveries() >= SUSPECT;
        let mut left = ids;
        for attempt in 1.. {
            let last = attempt == self.limits.attempts;
            whole.append(self.cores.compute(key, left, last, suspect).await?);
            left = std::mem::take(&mut whole.again).into_iter().map(|(id, _)| id).collect();
            // Those of a pool that died come before those that were computed alone.
            left.sort_unstable();
            if left.is_empty() {
                break;
            }
            tracing::debug!(run = %key.run, batch = key.batch, ids = left.len(), attempt, "ids to be tried again");
            self.wait(pause.wait(), left.len() as u32, delivery).await?;
        }
        Ok(whole)
    }

    /// Waits without holding a core, where there is a seat; the room is taken again before it goes on.
    async fn wait(&self, pause: Duration, ids: u32, delivery: &mut Delivery) -> Result<(), Error> {
        let seat = self.waiting.try_acquire().ok();
        if seat.is_some() {
            delivery.hold(None);
        }
        if !self.stop.pause(pause).await {
            return Err(Error::Stopped);
        }
        if seat.is_some() {
            delivery.hold(Some(self.slots.one(ids).await));
        }
        Ok(())
    }

    async fn publish(&self, key: &BatchKey, computed: Computed<P::Id>) -> Result<(), Error> {
        let dead = parts::publish(&self.broker, self.blank.clone(), key, computed, &self.stop).await?;
        self.counts.batches.fetch_add(1, Ordering::Relaxed);
        self.counts.ids.fetch_add(u64::from(key.ids), Ordering::Relaxed);
        self.counts.dead.fetch_add(u64::from(dead), Ordering::Relaxed);
        Ok(())
    }
}
