//! A worker host: takes batches, has them computed, publishes their rows, acks.
//!
//! A batch whose pass is cancelled meanwhile is given up at once, one whose pass is paused a little later.

mod able;
mod attempts;
mod batch;
mod outlier;
mod plan;
pub(crate) mod pull;
mod rate_limit;
pub mod rows_message;
pub(crate) mod schedule;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use millstream::envelope::{EnvelopeFault, IdBatch, decode_ids, is_end};
use millstream::names::batch_of;
use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

pub use able::prove;
pub use plan::WorkPlan;

use crate::compute::group::{end_orphans, reap_strays};
use crate::compute::{BatchKey, Cores, Function, Maker, Results};
use crate::error::{Code, Error, full_cause};
use crate::failpoint;
use crate::fleet::heartbeat;
use crate::fleet::times::{InHand, Recent, SAMPLE, WorkLoad};
use crate::model::build;
use crate::model::counts::WorkCounts;
use crate::model::host::{Doing, host_name};
use crate::model::record::{Open, PassKey, PassRecord, PassState};
use crate::model::times::CoreTimes;
use crate::nats::broker::Broker;
use crate::nats::bucket::Records;
use crate::nats::delivery::{Delivery, Held};
use crate::nats::pass_watch;
use crate::nats::quarantine::set_aside;
use crate::stop::Stop;
use crate::work::able::Able;
use crate::work::batch::{Batch, News};
use crate::work::outlier::Outlier;
use crate::work::pull::{Drawn, Slots, consume};
use crate::work::rate_limit::Rates;
use crate::work::rows_message::Target;
use crate::work::schedule::Charge;

/// Batches that may wait at once to try ids again: each keeps its computed rows.
const WAITING: usize = 16;
/// What is computed of a pass when it is paused may be finished within this, which most batches are.
const PAUSE_GRACE: Duration = Duration::from_secs(2);
/// How often rows that are done are stored while this process ends.
const WHILE_ENDING: Duration = Duration::from_secs(5);
/// A batch that this host cannot compute is handed back for this long: others may draw it soon.
const NOT_HERE: Duration = Duration::from_secs(1);
/// How often processes are looked for that ended and are this one's to be waited for.
const REAP: Duration = Duration::from_secs(2);
/// A batch that cannot be computed now is handed back for this long.
const SET_BACK: Duration = Duration::from_secs(60);

/// A batch that was taken in hand.
struct Taken<'a> {
    key: &'a BatchKey,
    /// Ids that are to be computed.
    ids: u32,
    charge: Charge,
    in_hand: InHand<'a>,
}

struct Worker<I> {
    cores: Arc<Cores<I>>,
    able: Able,
    outlier: Outlier,
    records: Records,
    /// The columns that rows go into.
    schema: Arc<Schema>,
    /// What rows say of who computed them.
    maker: Arc<Maker>,
    limits: Limits,
    slots: Slots,
    /// Seats for batches that wait to try some of their ids again, and hold no core meanwhile.
    waiting: Semaphore,
    broker: Broker,
    counts: Arc<WorkCounts>,
    load: Arc<WorkLoad>,
    rates: Arc<Rates>,
    open: watch::Receiver<Open>,
    stop: Stop,
}

/// Works until told to stop, then finishes what it holds within the plan's deadline and hands back the rest.
///
/// # Errors
/// When the bucket cannot be read at the start; afterwards failures are waited out.
pub async fn work<I: Id>(
    function: Function<I>,
    broker: &Broker,
    plan: &WorkPlan,
    counts: Arc<WorkCounts>,
    stop: &Stop,
) -> Result<(), Error> {
    let records = broker.records().await?;
    let open = pass_watch::follow(&records, stop).await?;
    let WorkPlan { threads, place, limits, .. } = plan.clone();
    let (load, rates) = (Arc::new(WorkLoad::new(threads)), Arc::<Rates>::default());
    let schema = function.spec().schema.clone();
    let maker = Arc::new(Maker { host: host_name(), build: build::of_this_program(function.spec().version) });
    let cores = Arc::new(Cores::start(function, threads, place, limits, counts.clone(), load.clone())?);
    let able = Able::new();
    // It reads a file of every process of this host.
    drop(tokio::task::spawn_blocking(end_orphans));
    reap(stop);
    let (slots, waiting) = (Slots::new(plan.threads), Semaphore::new(WAITING));
    let told = (load.clone(), able.clone());
    tell(records.clone(), maker.clone(), open.clone(), told, slots.clone(), rates.clone(), stop);
    let (proving, proven, stopping) = (cores.clone(), able.clone(), stop.clone());
    stop.spawn(async move { proven.keep(&proving, &stopping).await });
    let outlier = Outlier::new(able.clone());
    let (judged, others, passes, stopping) = (outlier.clone(), records.clone(), open.clone(), stop.clone());
    stop.spawn(async move {
        judged.judge(&others, &passes, &stopping).await;
    });
    let held = Held::start(broker.clone(), stop);
    let worker = Arc::new(Worker {
        cores,
        able: able.clone(),
        outlier,
        records,
        schema: schema.clone(),
        maker,
        limits,
        slots: slots.clone(),
        waiting,
        broker: broker.clone(),
        counts,
        load,
        rates,
        open: open.clone(),
        stop: stop.clone(),
    });
    tracing::info!(threads = plan.threads, "working");
    consume(broker, &able, open, &slots, &held, stop, |drawn| {
        let worker = worker.clone();
        stop.spawn(async move { Box::pin(worker.handle(drawn)).await });
    })
    .await;
    tracing::info!(held = held.count(), "taking no more batches, finishing what is held");
    stop.finished(plan.drain).await;
    broker.flush().await;
    Ok(())
}

/// Waits for processes whose parents are gone, where this one is the first of its container and they come to it.
fn reap(stop: &Stop) {
    if std::process::id() != 1 {
        return;
    }
    let stopping = stop.clone();
    stop.spawn(async move {
        let mut before = Vec::new();
        loop {
            reap_strays(&mut before);
            if !stopping.rest(REAP).await {
                return;
            }
        }
    });
}

/// Keeps the fleet told of what this host does, and this host of who shares a rate limit.
fn tell(
    records: Records,
    maker: Arc<Maker>,
    open: watch::Receiver<Open>,
    (load, able): (Arc<WorkLoad>, Able),
    slots: Slots,
    rates: Arc<Rates>,
    stop: &Stop,
) {
    let (sampling, stopping) = (load.clone(), stop.clone());
    stop.spawn(async move {
        while !stopping.taking_stopped() {
            sampling.sample(slots.free());
            tokio::select! {
                () = tokio::time::sleep(SAMPLE) => {}
                () = stopping.no_more_taking() => {}
            }
        }
    });
    let own = (records.host_key("work", &host_name(), std::process::id()), load.cores());
    let (followed, passes, stopping) = (records.clone(), open.clone(), stop.clone());
    stop.spawn(async move {
        let limited = || {
            let passes = passes.borrow();
            rates.retain(|key| passes.contains_key(key));
            passes.values().any(|pass| pass.rate.is_some())
        };
        rates.follow(&followed, own, limited, &stopping).await;
    });
    let (begun, stopping) = (Instant::now(), stop.clone());
    stop.spawn(async move {
        let mut recent = Recent::new();
        let look = || {
            let sums = load.sums(begun.elapsed());
            let runs = load.shares(&open.borrow());
            let (total, recent) = (CoreTimes::from(sums), CoreTimes::from(recent.note(sums).0));
            let (unable, returned) = (able.why(), able.returns());
            Doing::Work { cores: load.cores(), recent, total, runs, unable, returned }
        };
        heartbeat::report(&records, &maker.build, &stopping, look).await;
    });
}

impl<I: Id> Worker<I> {
    /// Ends the delivery: with an ack once the rows are stored, else with a nak that says when to come again.
    async fn handle(&self, drawn: Drawn) {
        let Drawn { pass, delivery, charge } = drawn;
        if delivery.deliveries() > 1 {
            self.counts.redelivered.fetch_add(1, Ordering::Relaxed);
        }
        let outcome = match self.read(&pass, &delivery) {
            Ok(None) => Ok(()),
            Ok(Some((key, ids))) => Box::pin(self.process(&pass, &key, ids, &delivery, charge)).await,
            Err(error) => Err(error),
        };
        match outcome {
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
            Err(error) if error.is_the_hosts() => {
                let why = full_cause(&error);
                tracing::warn!(
                    subject = delivery.subject(),
                    why,
                    code = %Code::HostUnable,
                    "the batch is handed back: this host cannot compute"
                );
                self.able.failed(delivery.subject(), why);
                delivery.nak(NOT_HERE).await;
            }
            Err(error) => {
                let (hint, error) = (error.hint().unwrap_or_default(), full_cause(&error));
                tracing::error!(subject = delivery.subject(), error, hint, "the batch is set back for 60 s");
                delivery.nak(SET_BACK).await;
            }
        }
    }

    /// Computes and stores a batch. What is done of it is stored by the way, if the rest takes long.
    async fn process(
        &self,
        pass: &PassRecord,
        key: &BatchKey,
        mut ids: Vec<I>,
        delivery: &Delivery,
        charge: Charge,
    ) -> Result<(), Error> {
        let results = self.cores.results();
        let batch = Batch::new(self.target(key), results.clone(), delivery.payload().clone());
        let mut taken = Taken { key, ids: ids.len() as u32, charge, in_hand: self.in_hand(key) };
        failpoint::pass("work-before-compute");
        if delivery.deliveries() > 1 {
            ids = batch.left_of(ids).await?;
            taken.ids = ids.len() as u32;
            if ids.is_empty() {
                return Ok(());
            }
        }
        let computed = CancellationToken::new();
        let storing = async {
            let (mut left, mut _kept) = (taken.ids, None);
            while self.early_is_due(&computed, &results).await {
                let News { ids, .. } = self.store(&batch, &taken).await?;
                left -= ids;
                if ids > 0 {
                    tracing::info!(run = %key.run, batch = key.batch, ids, left, "rows are stored that are done before others of their batch");
                }
                // Other batches may have the cores that these ids cannot fill.
                delivery.need_no_more(left.max(1));
                if left < key.ids {
                    _kept = Some(self.slots.keep(left.max(1)));
                }
            }
            Ok::<_, Error>(())
        }
        .fuse();
        let mut storing = std::pin::pin!(storing);
        let outcome = tokio::select! {
            outcome = self.compute(pass, key, ids, &results, delivery, &taken.charge) => Some(outcome),
            stored = storing.as_mut() => return stored,
            () = self.stop.given_up() => return Err(Error::Stopped),
            () = self.unwanted(key) => None,
        };
        computed.cancel();
        // A store under way is finished: nothing else has the rows that it carries.
        tokio::select! {
            stored = storing.as_mut() => stored?,
            () = self.stop.given_up() => return Err(Error::Stopped),
        }
        failpoint::pass("work-before-publish");
        match outcome {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                // What is done stays done, whatever keeps this host from the rest.
                self.store(&batch, &taken).await?;
                return Err(error);
            }
            None => return Err(self.leave(&batch, &taken).await),
        }
        self.store(&batch, &taken).await?;
        self.counts.batches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn target(&self, key: &BatchKey) -> Target {
        let Self { broker, schema, maker, load, stop, .. } = self;
        Target {
            broker: broker.clone(),
            key: key.clone(),
            schema: schema.clone(),
            maker: maker.clone(),
            load: load.clone(),
            stop: stop.clone(),
        }
    }

    fn in_hand(&self, key: &BatchKey) -> InHand<'_> {
        self.load.take(&(key.run.clone(), key.pass))
    }

    /// Waits until rows that are done have waited long enough for the rest of their batch, or are too many to be kept, or this
    /// process is to end; `false` once all are done.
    async fn early_is_due(&self, computed: &CancellationToken, results: &Results<I>) -> bool {
        let ending = async {
            // Most batches are finished at the first time.
            if self.stop.taking_stopped() {
                return tokio::time::sleep(WHILE_ENDING).await;
            }
            self.stop.no_more_taking().await;
            tokio::time::sleep(PAUSE_GRACE).await;
        };
        tokio::select! {
            () = computed.cancelled() => false,
            () = tokio::time::sleep(self.limits.rows_wait) => true,
            () = results.full() => true,
            () = ending => true,
        }
    }

    /// Stores what is done of a batch, and counts it.
    async fn store(&self, batch: &Batch<I>, taken: &Taken<'_>) -> Result<News, Error> {
        let news = batch.store().await?;
        let News { ids, dead, spent } = news;
        taken.charge.settle(spent, ids, taken.ids);
        taken.in_hand.stored(ids, dead);
        let pass = (taken.key.run.clone(), taken.key.pass);
        self.outlier.note(&pass, u64::from(ids), u64::from(dead));
        self.counts.ids.fetch_add(u64::from(ids), Ordering::Relaxed);
        self.counts.dead.fetch_add(u64::from(dead), Ordering::Relaxed);
        Ok(news)
    }

    /// Stores what is done of a batch that is not wanted for now: a pass that is paused goes on some time.
    async fn leave(&self, batch: &Batch<I>, taken: &Taken<'_>) -> Error {
        let pass = (taken.key.run.clone(), taken.key.pass);
        let state = self.open.borrow().get(&pass).map(|pass| pass.state);
        if state == Some(PassState::Paused)
            && let Err(error) = self.store(batch, taken).await
        {
            return error;
        }
        Error::Stopped
    }

    /// Resolves when the pass is not to be computed any further.
    async fn unwanted(&self, key: &BatchKey) {
        let (mut open, pass): (_, PassKey) = (self.open.clone(), (key.run.clone(), key.pass));
        let state = |open: &Open| open.get(&pass).map(|pass| pass.state);
        loop {
            let known = state(&open.borrow_and_update());
            match known {
                // Sealed meanwhile, or forgotten by a bucket that was lost: what is in hand is finished as ever.
                None | Some(PassState::Running | PassState::Sealed) => {}
                Some(PassState::Paused) => {
                    let resumed = async {
                        open.wait_for(|open| state(open) != Some(PassState::Paused)).await.map(drop)
                    };
                    match tokio::time::timeout(PAUSE_GRACE, resumed).await {
                        Ok(Ok(_)) => continue,
                        // Nothing is said any more once taking stops: what is held is finished then.
                        Ok(Err(_)) => return std::future::pending().await,
                        Err(_) => return,
                    }
                }
                Some(PassState::Cancelled) => return,
            }
            if open.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// The ids of a batch; `None` where an open run ends.
    fn read(&self, pass: &PassRecord, delivery: &Delivery) -> Result<Option<(BatchKey, Vec<I>)>, Error> {
        let (subject, payload) = (delivery.subject(), delivery.payload());
        if batch_of(subject).is_some_and(|batch| is_end(payload, &pass.run, batch)) {
            return Ok(None);
        }
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
        Ok(Some((key, ids)))
    }
}
