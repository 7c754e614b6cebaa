//! A worker host: takes batches, has them computed, publishes their rows, acks.
//!
//! A batch whose pass is cancelled meanwhile is given up at once, one whose pass is paused a little later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millstream::envelope::{EnvelopeFault, IdBatch, decode_ids, is_end};
use millstream::names::batch_of;
use millstream::schema::Schema;
use millstream::{Id, Limits};

use tokio::sync::{Semaphore, watch};

use crate::able::Able;
use crate::aside::set_aside;
use crate::board::{self, Open};
use crate::broker::{Broker, host_name};
use crate::build;
use crate::compute::group::reap_strays;
use crate::compute::{BatchKey, Computed, Cores, Function, Maker, Place, Spent};
use crate::consume::{Drawn, Slots, consume};
use crate::delivery::{Delivery, Held};
use crate::error::{Error, full_cause};
use crate::failpoint;
use crate::hosts::{self, Doing};
use crate::load::{CoreTimes, Recent, SAMPLE, WorkLoad};
use crate::outlier::Outlier;
use crate::parts;
use crate::rate::Rates;
use crate::records::{PassRecord, PassState, Records};
use crate::retry::Backoff;
use crate::share::{Charge, PassKey};
use crate::stop::Stop;

/// From this delivery of a batch on its ids are computed alone: whoever had it before may have died of one.
const SUSPECT: i64 = 3;
/// Batches that may wait at once to try ids again: each keeps its computed rows.
const WAITING: usize = 16;
/// What is computed of a pass when it is paused may be finished within this, which most batches are.
const PAUSE_GRACE: Duration = Duration::from_secs(2);
/// A batch that this host cannot compute is handed back for this long: others may draw it soon.
const NOT_HERE: Duration = Duration::from_secs(1);
/// How often processes are looked for that ended and are this one's to be waited for.
const REAP: Duration = Duration::from_secs(2);
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
    let open = board::follow(&records, stop).await?;
    let WorkPlan { threads, place, limits, .. } = plan.clone();
    let (load, rates) = (Arc::new(WorkLoad::new(threads)), Arc::<Rates>::default());
    let schema = function.spec().schema.clone();
    let maker = Arc::new(Maker { host: host_name(), build: build::of_this_program(function.spec().version) });
    let cores = Arc::new(Cores::start(function, threads, place, limits, counts.clone(), load.clone())?);
    let able = Able::new();
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
        stop.spawn(async move { worker.handle(drawn).await });
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
        hosts::report(&records, &maker.build, &stopping, look).await;
    });
}

impl<I: Id> Worker<I> {
    /// Ends the delivery: with an ack once the rows are stored, else with a nak that says when to come again.
    async fn handle(&self, drawn: Drawn) {
        let Drawn { pass, mut delivery, charge } = drawn;
        if delivery.deliveries() > 1 {
            self.counts.redelivered.fetch_add(1, Ordering::Relaxed);
        }
        let outcome = match self.read(&pass, &delivery) {
            Ok(None) => Ok(()),
            Ok(Some((key, ids))) => {
                let in_hand = self.load.take(&(key.run.clone(), key.pass));
                let outcome = self.process(&pass, &key, ids, &mut delivery, &charge).await;
                outcome.map(|(spent, dead)| {
                    charge.settle(spent, key.ids);
                    in_hand.done(key.ids, dead);
                    self.outlier.note(&(key.run, key.pass), u64::from(key.ids), u64::from(dead));
                })
            }
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

    /// What it took of the cores, and how many dead letters came of it.
    async fn process(
        &self,
        pass: &PassRecord,
        key: &BatchKey,
        ids: Vec<I>,
        delivery: &mut Delivery,
        charge: &Charge,
    ) -> Result<(Spent, u32), Error> {
        failpoint::pass("work-before-compute");
        let computed = tokio::select! {
            computed = self.compute(pass, key, ids, delivery, charge) => computed?,
            () = self.stop.given_up() => return Err(Error::Stopped),
            () = self.unwanted(key) => return Err(Error::Stopped),
        };
        failpoint::pass("work-before-publish");
        let mut spent = computed.spent;
        let (dead, packing) = self.publish(key, computed).await?;
        spent.encoding += packing;
        Ok((spent, dead))
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

    /// Computes all ids; those that ask for another attempt get it after a pause.
    async fn compute(
        &self,
        pass: &PassRecord,
        key: &BatchKey,
        ids: Vec<I>,
        delivery: &mut Delivery,
        charge: &Charge,
    ) -> Result<Computed<I>, Error> {
        let mut whole = Computed::none(&self.schema);
        let mut pause = Backoff::new(self.limits.first_pause, self.limits.longest_pause);
        let suspect = self.is_suspect(delivery).await;
        let (mut left, mut begun) = (ids, None);
        for attempt in 1.. {
            let last = self.is_last(attempt, begun);
            match pass.rate {
                None => whole.append(self.grind(key, left, last, suspect).await?),
                Some(_) => self.grind_slowly(key, left, (last, suspect), &mut whole, delivery).await?,
            }
            let why = whole.again.last().map(|(_, why)| why.clone()).unwrap_or_default();
            left = std::mem::take(&mut whole.again).into_iter().map(|(id, _)| id).collect();
            self.say_trouble(key, charge.attempted(left.len() as u64, key.ids), &why);
            // Those of a pool that died come before those that were computed alone.
            left.sort_unstable();
            if left.is_empty() {
                break;
            }
            tracing::debug!(run = %key.run, batch = key.batch, ids = left.len(), attempt, why, "ids to be tried again");
            let begun = *begun.get_or_insert_with(Instant::now);
            let _asking = self.load.asking(&(key.run.clone(), key.pass), left.len() as u64, &why);
            self.wait(self.pause(&mut pause, attempt, begun), left.len() as u32, delivery).await?;
        }
        Ok(whole)
    }

    /// Whether ids that ask for another attempt after this one get none. `begun` is when they first asked.
    fn is_last(&self, attempt: u32, begun: Option<Instant>) -> bool {
        let Limits { attempts, retry_for, .. } = self.limits;
        let asked = begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        attempt >= attempts && (attempts == 1 || asked >= retry_for)
    }

    /// How long until the next attempt: once their number is used up, the last is at the end of their time.
    fn pause(&self, pause: &mut Backoff, attempt: u32, begun: Instant) -> Duration {
        let Limits { attempts, retry_for, first_pause, .. } = self.limits;
        let (pause, rest) = (pause.wait(), retry_for.saturating_sub(begun.elapsed()));
        if attempt + 1 < attempts { pause } else { pause.min(rest.max(first_pause)) }
    }

    /// Tells of a pass whose ids ask for another attempt.
    fn say_trouble(&self, BatchKey { run, pass, .. }: &BatchKey, news: Option<bool>, why: &str) {
        match news {
            Some(true) => {
                tracing::warn!(%run, pass, why, "many ids ask for another attempt: fewer batches of the run are drawn");
            }
            Some(false) => tracing::info!(%run, pass, "few ids ask for another attempt any more"),
            None => {}
        }
    }

    /// Whether the batch may be why it was given up so often: hosts that could not compute it do not count.
    async fn is_suspect(&self, delivery: &Delivery) -> bool {
        if delivery.deliveries() < SUSPECT {
            return false;
        }
        let subject = delivery.subject();
        let others = hosts::returned(&self.records, subject).await;
        let own = self.able.returns().get(subject).copied().unwrap_or(0);
        delivery.deliveries() - own.max(others) >= SUSPECT
    }

    async fn grind(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        last: bool,
        suspect: bool,
    ) -> Result<Computed<I>, Error> {
        let _computing = self.load.computing(ids.len() as u32);
        self.cores.compute(key, ids, last, suspect).await
    }

    /// Computes ids as their run's rate allows, and holds no core in between. The rate may change meanwhile.
    async fn grind_slowly(
        &self,
        key: &BatchKey,
        mut ids: Vec<I>,
        (last, suspect): (bool, bool),
        whole: &mut Computed<I>,
        delivery: &mut Delivery,
    ) -> Result<(), Error> {
        let pass = (key.run.clone(), key.pass);
        while !ids.is_empty() {
            let rate = || self.open.borrow().get(&pass).and_then(|pass| pass.rate);
            let some = if rate().is_some() {
                let _paced = self.load.paced();
                delivery.hold(None);
                self.rates.admit(&pass, rate, ids.len(), &self.stop).await?
            } else {
                ids.len()
            };
            delivery.hold(Some(self.slots.one(some as u32).await));
            let rest = ids.split_off(some);
            whole.append(self.grind(key, ids, last, suspect).await?);
            ids = rest;
        }
        Ok(())
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

    /// Stores the rows; how many of them are dead letters, and how long they were packed.
    async fn publish(&self, key: &BatchKey, computed: Computed<I>) -> Result<(u32, Duration), Error> {
        let Self { broker, schema, maker, load, stop, .. } = self;
        let parts::Published { dead, packing } =
            parts::publish(broker, schema, maker, key, computed, load, stop).await?;
        self.counts.batches.fetch_add(1, Ordering::Relaxed);
        self.counts.ids.fetch_add(u64::from(key.ids), Ordering::Relaxed);
        self.counts.dead.fetch_add(u64::from(dead), Ordering::Relaxed);
        Ok((dead, packing))
    }
}
