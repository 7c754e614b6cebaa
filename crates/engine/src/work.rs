//! A worker: pulls batches, has their ids computed, publishes the rows, acks.
//!
//! The worker gives up a batch at once when its pass is cancelled. When its pass is paused, the batch gets a short
//! grace time.

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
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use millstream::envelope::{EnvelopeFault, IdBatch, decode_ids, is_end};
use millstream::names::{RunName, batch_of};
use millstream::schema::Schema;
use millstream::{Id, Limits};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

pub use able::prove;
pub use plan::WorkPlan;

use crate::compute::group::{end_orphans, reap_strays};
use crate::compute::{BatchKey, Cores, Function, Maker, Results};
use crate::error::{Code, Error, full_cause};
use crate::failpoint;
use crate::fleet::heartbeat;
use crate::fleet::times::{InHand, Recent, SAMPLE, WorkLoad};
use crate::model::build;
use crate::model::host::{Doing, host_name};
use crate::model::record::{Open, PassRecord, PassState};
use crate::model::times::CoreTimes;
use crate::nats::broker::Broker;
use crate::nats::bucket::Records;
use crate::nats::delivery::{Delivery, Held, REDELIVER_AFTER};
use crate::nats::pass_watch;
use crate::nats::quarantine::set_aside;
use crate::stop::Stop;
use crate::telemetry::labels::{Stage, Unfinished};
use crate::telemetry::metrics::Metrics;
use crate::work::able::Able;
use crate::work::batch::{Batch, News};
use crate::work::outlier::Outlier;
use crate::work::pull::{Drawn, Slots, consume};
use crate::work::rate_limit::Rates;
use crate::work::rows_message::Target;
use crate::work::schedule::Charge;

/// Batches that may wait for another attempt at once, because each keeps its computed rows in memory.
const WAITING: usize = 16;
/// Grace time for a paused pass, in which most batches under computation finish.
const PAUSE_GRACE: Duration = Duration::from_secs(2);
/// How often a worker that drains stores finished rows.
const WHILE_ENDING: Duration = Duration::from_secs(5);
/// Redelivery delay of a batch that this host cannot compute: other hosts may pull it soon.
const NOT_HERE: Duration = Duration::from_secs(1);
/// How often the worker reaps ended orphans that came to this process.
const REAP: Duration = Duration::from_secs(2);

/// A batch that the worker holds.
struct Taken<'a> {
    key: &'a BatchKey,
    /// Ids to compute.
    ids: u32,
    charge: Charge,
    in_hand: InHand<'a>,
}

struct Worker<I> {
    cores: Arc<Cores<I>>,
    able: Able,
    outlier: Outlier,
    records: Records,
    /// The columns of the rows.
    schema: Arc<Schema>,
    /// The host and build that rows record.
    maker: Arc<Maker>,
    limits: Limits,
    slots: Slots,
    /// Permits for batches that wait for another attempt and hold no core meanwhile.
    waiting: Semaphore,
    broker: Broker,
    metrics: Metrics,
    load: Arc<WorkLoad>,
    rates: Arc<Rates>,
    open: watch::Receiver<Open>,
    stop: Stop,
}

/// Works until the stop token says stop, then finishes held batches within the plan's deadline and returns the rest to
/// the stream.
///
/// # Errors
/// When the bucket cannot be read at the start. Later failures are retried.
pub async fn work<I: Id>(
    function: Function<I>,
    broker: &Broker,
    plan: &WorkPlan,
    metrics: Metrics,
    stop: &Stop,
) -> Result<(), Error> {
    let records = broker.records().await?;
    let open = pass_watch::follow(&records, stop).await?;
    let WorkPlan { threads, place, limits, .. } = plan.clone();
    let load = Arc::new(WorkLoad::new(threads));
    let rates = Arc::<Rates>::default();
    let schema = function.spec().schema.clone();
    let maker = Arc::new(Maker { host: host_name(), build: build::of_this_program(function.spec().version) });
    let cores = Arc::new(Cores::start(function, threads, place, limits, metrics.clone(), load.clone())?);
    let able = Able::new();
    // In a blocking thread, because it reads a file of every process of this host.
    drop(tokio::task::spawn_blocking(end_orphans));
    reap(stop);
    let slots = Slots::new(plan.threads);
    let waiting = Semaphore::new(WAITING);
    metrics.working(threads);
    sample_idle(load.clone(), slots.clone(), metrics.clone(), stop);
    let reported = (load.clone(), able.clone());
    report(records.clone(), maker.clone(), open.clone(), reported, rates.clone(), stop);
    let proving = cores.clone();
    let proven = able.clone();
    let stopping = stop.clone();
    stop.spawn(async move { proven.keep(&proving, &stopping).await });
    let outlier = Outlier::new(able.clone());
    let judged = outlier.clone();
    let others = records.clone();
    let passes = open.clone();
    let stopping = stop.clone();
    stop.spawn(async move {
        judged.judge(&others, &passes, &stopping).await;
    });
    let held = Held::start(broker.clone(), Stage::Worker, metrics.clone(), stop);
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
        metrics,
        load,
        rates,
        open: open.clone(),
        stop: stop.clone(),
    });
    tracing::info!(threads = plan.threads, "working");
    consume(broker, &able, open, &slots, &held, stop, |drawn| {
        let (worker, span) = (worker.clone(), span_of(&drawn));
        stop.spawn(async move { Box::pin(worker.handle(drawn)).await }.instrument(span));
    })
    .await;
    tracing::info!(held = held.count(), "draining: pulling no more batches, finishing those held");
    stop.finished(plan.drain).await;
    broker.flush().await;
    Ok(())
}

/// The span of a delivery, which contains all its log lines.
fn span_of(Drawn { pass, delivery, .. }: &Drawn) -> tracing::Span {
    tracing::info_span!(
        "delivery",
        run = %pass.run,
        pass = pass.pass,
        batch = batch_of(delivery.subject()),
        delivery = delivery.deliveries(),
        trace_id = %delivery.trace().trace_id()
    )
}

/// Reaps orphans, where this process is the first of its container and so inherits them.
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

/// Samples regularly what cores without ids wait for, until the worker stops pulling.
fn sample_idle(load: Arc<WorkLoad>, slots: Slots, metrics: Metrics, stop: &Stop) {
    let stopping = stop.clone();
    stop.spawn(async move {
        let mut last = Instant::now();
        while stopping.rest(SAMPLE).await {
            let since = last.elapsed();
            last = Instant::now();
            for (waits_for, cores) in load.sample(slots.free()) {
                metrics.idled(waits_for, since * cores as u32);
            }
        }
    });
}

/// Reports this host's work to the fleet, and follows which hosts share a rate limit.
fn report(
    records: Records,
    maker: Arc<Maker>,
    open: watch::Receiver<Open>,
    (load, able): (Arc<WorkLoad>, Able),
    rates: Arc<Rates>,
    stop: &Stop,
) {
    let own = (records.host_key("work", &host_name(), std::process::id()), load.cores());
    let followed = records.clone();
    let passes = open.clone();
    let stopping = stop.clone();
    stop.spawn(async move {
        let limited = || {
            let passes = passes.borrow();
            rates.retain(|key| passes.contains_key(key));
            passes.values().any(|pass| pass.rate.is_some())
        };
        rates.follow(&followed, own, limited, &stopping).await;
    });
    let begun = Instant::now();
    let stopping = stop.clone();
    stop.spawn(async move {
        let mut recent = Recent::new();
        let look = || {
            let sums = load.sums(begun.elapsed());
            let runs = load.shares(&open.borrow());
            let total = CoreTimes::from(sums);
            let recent = CoreTimes::from(recent.note(sums).0);
            let unable = able.why();
            let returned = able.returns();
            Doing::Work { cores: load.cores(), recent, total, runs, unable, returned }
        };
        heartbeat::report(&records, &maker.build, &stopping, look).await;
    });
}

impl<I: Id> Worker<I> {
    /// Ends the delivery: with an ack once the rows are stored, otherwise with a nak that sets the redelivery delay.
    async fn handle(&self, drawn: Drawn) {
        let Drawn { pass, delivery, charge } = drawn;
        let outcome = match self.read(&pass, &delivery) {
            Ok(None) => Ok(()),
            Ok(Some((key, ids))) => Box::pin(self.process(&pass, &key, ids, &delivery, charge)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &outcome {
            self.metrics.unfinished(reason(error));
        }
        match outcome {
            Ok(()) => {
                failpoint::pass("work-before-ack");
                delivery.ack().await;
                failpoint::pass("work-after-ack");
            }
            Err(Error::Stopped) => delivery.nak(Duration::ZERO).await,
            Err(Error::Message { subject, source }) if subject == delivery.subject() => {
                set_aside(&self.broker, delivery, &source).await;
            }
            // The ids are valid, but the stored rows are not. A sink moves those rows into quarantine; the batch is
            // then repaired, which waits until no delivery of the pass is open.
            Err(Error::Message { subject, source })
                if !matches!(source, EnvelopeFault::NewerVersion { .. }) =>
            {
                tracing::warn!(subject, fault = %source, "the batch's stored rows cannot be read: a sink will quarantine them");
                delivery.ack().await;
            }
            Err(error) if error.is_the_hosts() => {
                let why = full_cause(&error);
                tracing::warn!(
                    subject = delivery.subject(),
                    why,
                    code = %Code::HostUnable,
                    "the batch is returned to the stream: this host cannot compute it"
                );
                self.able.failed(delivery.subject(), why);
                delivery.nak(NOT_HERE).await;
            }
            Err(error) => {
                let hint = error.hint().unwrap_or_default();
                let error = full_cause(&error);
                tracing::error!(
                    subject = delivery.subject(),
                    error,
                    hint,
                    "the batch is not finished: it is redelivered after 60 s"
                );
                delivery.nak(REDELIVER_AFTER).await;
            }
        }
    }

    /// Computes and stores a batch. If some ids take long, finished rows are stored before them.
    async fn process(
        &self,
        pass: &PassRecord,
        key: &BatchKey,
        mut ids: Vec<I>,
        delivery: &Delivery,
        charge: Charge,
    ) -> Result<(), Error> {
        let results = self.cores.results();
        let batch = Batch::new(self.target(key, delivery), results.clone(), delivery.payload().clone());
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
            let mut left = taken.ids;
            let mut _kept = None;
            while self.early_is_due(&computed, &results).await {
                let News { ids, .. } = self.store(&batch, &taken).await?;
                left -= ids;
                if ids > 0 {
                    tracing::info!(run = %key.pass.run, batch = key.batch, ids, left, "finished rows stored before the rest of their batch");
                }
                // Other batches may use the cores that the remaining ids cannot fill.
                delivery.need_no_more(left.max(1));
                if left < key.ids {
                    _kept = Some(self.slots.keep(left.max(1)));
                }
            }
            Ok::<_, Error>(())
        }
        .fuse();
        let mut storing = std::pin::pin!(storing);
        let begun = Instant::now();
        let outcome = tokio::select! {
            outcome = self.compute(pass, key, ids, &results, delivery, &taken.charge) => Some(outcome),
            stored = storing.as_mut() => return stored,
            () = self.stop.given_up() => return Err(Error::Stopped),
            () = self.unwanted(key) => None,
        };
        computed.cancel();
        let computing = begun.elapsed();
        // A store under way is awaited, because no other place has the rows that it carries.
        tokio::select! {
            stored = storing.as_mut() => stored?,
            () = self.stop.given_up() => return Err(Error::Stopped),
        }
        failpoint::pass("work-before-publish");
        match outcome {
            Some(Ok(())) => self.metrics.computed(computing),
            Some(Err(error)) => {
                // Finished rows are stored even if this host cannot compute the rest.
                self.store(&batch, &taken).await?;
                return Err(error);
            }
            None => return Err(self.leave(&batch, &taken).await),
        }
        self.store(&batch, &taken).await?;
        self.metrics.finished();
        Ok(())
    }

    fn target(&self, key: &BatchKey, delivery: &Delivery) -> Target {
        let Self { broker, schema, maker, load, metrics, stop, .. } = self;
        Target {
            broker: broker.clone(),
            key: key.clone(),
            schema: schema.clone(),
            maker: maker.clone(),
            load: load.clone(),
            metrics: metrics.clone(),
            trace: delivery.trace(),
            stop: stop.clone(),
        }
    }

    fn in_hand(&self, key: &BatchKey) -> InHand<'_> {
        self.load.take(&key.pass)
    }

    /// Waits until finished rows should be stored early: they have waited long enough, are too large to keep, or this
    /// process ends. `false` once all ids are finished.
    async fn early_is_due(&self, computed: &CancellationToken, results: &Results<I>) -> bool {
        let ending = async {
            // Most batches finish within the grace time.
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

    /// Stores finished rows of a batch, and counts them.
    async fn store(&self, batch: &Batch<I>, taken: &Taken<'_>) -> Result<News, Error> {
        let news = batch.store().await?;
        let News { ids, dead, spent } = news;
        taken.charge.settle(spent, ids, taken.ids);
        taken.in_hand.stored(ids, dead);
        self.outlier.note(&taken.key.pass, u64::from(ids), u64::from(dead));
        self.metrics.stored(ids, dead, spent);
        Ok(news)
    }

    /// Stores finished rows of a batch whose pass is paused, because that pass will be resumed. Returns the error that
    /// ends the delivery.
    async fn leave(&self, batch: &Batch<I>, taken: &Taken<'_>) -> Error {
        let state = self.open.borrow().get(&taken.key.pass).map(|pass| pass.state);
        if state == Some(PassState::Paused)
            && let Err(error) = self.store(batch, taken).await
        {
            return error;
        }
        Error::Stopped
    }

    /// Resolves when the worker should stop computing the pass.
    async fn unwanted(&self, key: &BatchKey) {
        let mut open = self.open.clone();
        let state = |open: &Open| open.get(&key.pass).map(|pass| pass.state);
        loop {
            let known = state(&open.borrow_and_update());
            match known {
                // The pass was sealed, or its record was lost with the bucket: held batches are finished.
                None | Some(PassState::Running | PassState::Sealed) => {}
                Some(PassState::Paused) => {
                    let resumed = async {
                        open.wait_for(|open| state(open) != Some(PassState::Paused)).await.map(drop)
                    };
                    match tokio::time::timeout(PAUSE_GRACE, resumed).await {
                        Ok(Ok(_)) => continue,
                        // After the stop no more states arrive, and the worker finishes what it holds.
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

    /// The ids of a batch; `None` for the end marker of an open run.
    fn read(&self, pass: &PassRecord, delivery: &Delivery) -> Result<Option<(BatchKey, Vec<I>)>, Error> {
        let subject = delivery.subject();
        let payload = delivery.payload();
        if batch_of(subject).is_some_and(|batch| is_end(payload, pass.run.as_str(), batch)) {
            return Ok(None);
        }
        let malformed = |source| Error::Message { subject: subject.to_owned(), source };
        let IdBatch { run, batch, ids } = decode_ids(payload).map_err(malformed)?;
        let foreign = |_| malformed(EnvelopeFault::Foreign { length: payload.len() });
        let run: RunName = run.parse().map_err(foreign)?;
        let key = BatchKey { pass: run.pass(pass.pass), batch, ids: ids.len() as u32 };
        let names = self.broker.names();
        if names.ids_subject(&run, key.batch) != subject
            && names.replay_subject(&key.pass, key.batch) != subject
        {
            return Err(malformed(EnvelopeFault::Foreign { length: payload.len() }));
        }
        Ok(Some((key, ids)))
    }
}

/// Why a batch is not finished, as a label for metrics.
fn reason(error: &Error) -> Unfinished {
    match error {
        Error::Stopped => Unfinished::Stopped,
        Error::Message { .. } => Unfinished::Unreadable,
        error if error.is_the_hosts() => Unfinished::Host,
        _ => Unfinished::Failed,
    }
}
