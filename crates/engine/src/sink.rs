//! The sink: collects the rows of one pass, inserts them, asks ClickHouse which rows are stored, and acks only those.
//!
//! The sink keeps rows until ClickHouse confirms them (**own-the-bytes**): an insert that failed, or whose outcome is
//! unknown, is repeated from the same bytes.

mod bells;
mod group;
mod land;
mod left;
mod schemas;
mod state;
pub(crate) mod step;
mod waits;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clickhouse::store::{Store, insert_prefix};
use crate::error::{Code, Error, Source};
use crate::fleet::heartbeat;
use crate::fleet::times::{Phases, Recent};
use crate::model::host::{Doing, instance};
use crate::model::rows::Drawn;
use crate::nats::answer::ANSWER_WITHIN;
use crate::nats::broker::Broker;
use crate::nats::bucket::Records;
use crate::nats::delivery::Held;
use crate::nats::quarantine::set_aside;
use crate::retry::Backoff;
use crate::stop::Stop;
use crate::telemetry::labels::Stage;
use group::{Group, GroupKey, Item, read_rows};
pub use left::Left;
use schemas::Schemas;
pub use state::SinkState;
pub use waits::Waits;

/// Bytes of a message's subject, reply and headers.
const MESSAGE_OVERHEAD: usize = 4 << 10;
/// Most bytes that one pull requests.
const MAX_PULL_BYTES: usize = 16 << 20;
/// Most messages that one pull requests.
const MAX_PULL: usize = 1000;
/// How long a pull waits for more messages. Short, because groups age meanwhile.
const PULL_FOR: Duration = Duration::from_millis(500);
/// How often a sink that cannot end yet logs what it waits for.
const LOG_WAITS_EVERY: Duration = Duration::from_secs(15);

/// A sink's settings.
#[derive(Debug, Clone)]
pub struct SinkPlan {
    /// Which rows the sink pulls.
    pub drawn: Drawn,
    /// Rows after which a group is inserted.
    pub group_rows: u64,
    /// Age after which a group is inserted.
    pub group_age: Duration,
    /// Bytes of messages held at once, which bounds the sink's memory.
    pub held_bytes: usize,
    /// Inserts that may run at once.
    pub inserts: usize,
    /// How long held rows may take to be stored after a stop.
    pub drain: Duration,
}

impl Default for SinkPlan {
    fn default() -> Self {
        Self {
            drawn: Drawn::Shared,
            group_rows: 900_000,
            group_age: Duration::from_secs(2),
            held_bytes: 32 << 20,
            inserts: 2,
            drain: Duration::from_secs(60),
        }
    }
}

struct Sink {
    broker: Broker,
    store: Store,
    plan: SinkPlan,
    held: Held,
    state: Arc<SinkState>,
    stop: Stop,
    inserts: Semaphore,
    /// Which columns the table takes.
    schemas: Schemas,
    /// Subjects of messages that the sink holds, so that a redelivered message is not inserted twice.
    open: Mutex<HashSet<String>>,
    /// Separates this process's inserts from those of other sinks and earlier starts.
    name: String,
    attempts: AtomicU64,
    phases: Phases<3>,
}

/// Phases of a sink, as indexes; phase 0 is waiting for rows.
const ASKING: usize = 1;
const INSERTING: usize = 2;

/// Sinks rows until the stop, then stores held rows within the plan's deadline and returns the rest to the stream. Does
/// not wait for a group to fill once the sealer reports that all batches are computed.
///
/// # Errors
/// When the consumer does not exist. Later failures are retried.
pub async fn sink(
    broker: &Broker,
    store: &Store,
    plan: SinkPlan,
    state: Arc<SinkState>,
    stop: &Stop,
) -> Result<(), Error> {
    let missing = || Error::Broker {
        doing: format!("find consumer `{}`", broker.drawn_consumer_name(&plan.drawn)),
        source: "it does not exist: `setup` creates it".into(),
    };
    let consumer = broker.drawn_consumer(&plan.drawn).await?.ok_or_else(missing)?;
    let sink = Arc::new(Sink {
        broker: broker.clone(),
        store: store.clone(),
        held: Held::start(broker.clone(), Stage::Sink, state.metrics.clone(), stop),
        state,
        stop: stop.clone(),
        inserts: Semaphore::new(plan.inserts),
        schemas: Schemas::default(),
        open: Mutex::default(),
        name: format!(
            "{}{}-{:08x}-{}",
            insert_prefix(store.tables().database(), broker.names().pipeline()),
            std::process::id(),
            instance(),
            crate::model::moment::now_ms()
        ),
        attempts: AtomicU64::new(0),
        phases: Phases::new(),
        plan,
    });
    sink.report(broker.records().await?);
    tracing::info!("sinking");
    sink.gather(consumer).await;
    tracing::info!(held = sink.held.count(), "draining: pulling no more rows, inserting those held");
    tokio::select! {
        () = stop.finished(sink.plan.drain) => {}
        () = sink.log_waits() => {}
    }
    broker.flush().await;
    Ok(())
}

impl Sink {
    /// Reports this sink's work to the fleet.
    fn report(self: &Arc<Self>, records: Records) {
        let this = self.clone();
        let stop = self.stop.clone();
        self.stop.spawn(async move {
            let mut recent = Recent::new();
            let mut rows = Recent::new();
            let look = || {
                let seconds = this.phases.seconds();
                let stored = this.state.metrics.sink_counts().rows as f64;
                let ([more], within) = rows.note([stored]);
                let total = seconds.into();
                let recent = recent.note(seconds).0.into();
                let left = this.state.left.told();
                let left_passes = this.state.left.passes();
                let holds = passes_of(this.open().iter());
                let rows_per_second = more / within;
                let waits = this.state.waits.told();
                Doing::Sink { recent, total, rows_per_second, left, left_passes, holds, waits }
            };
            heartbeat::report(&records, this.store.tables().build(), &stop, look).await;
        });
    }

    /// After the drain's deadline, logs what the sink still waits for. Never returns.
    async fn log_waits(&self) {
        self.stop.given_up().await;
        loop {
            tokio::time::sleep(LOG_WAITS_EVERY).await;
            tracing::warn!(
                batches = self.held.count(),
                at_most_s = self.store.insert_over().as_secs(),
                hint = "slow materialized views prolong it; a second signal ends the sink at once, and no row is lost",
                "waiting for running inserts: if the sink left one, its outcome would be unknown"
            );
        }
    }

    async fn gather(self: &Arc<Self>, mut consumer: PullConsumer) {
        let held = held_at_most(self.plan.held_bytes, self.broker.max_payload());
        let budget = Arc::new(Semaphore::new(held));
        let mut groups: HashMap<GroupKey, Group> = HashMap::new();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        while !self.stop.taking_stopped() {
            let Some(permits) = self.acquire_permits(&budget, held, &mut groups).await else { break };
            match self.pull(&consumer, permits, &mut groups).await {
                Ok(taken) => {
                    backoff.reset();
                    self.flush(&mut groups, |group| taken == 0 || group.is_old(self.plan.group_age));
                }
                Err(error) => {
                    tracing::warn!(%error, code = %Code::NatsAway, "rows cannot be pulled, trying again");
                    self.flush(&mut groups, |_| true);
                    tokio::select! {
                        () = tokio::time::sleep(backoff.wait()) => {}
                        () = self.stop.no_more_taking() => break,
                    }
                    if let Ok(Some(found)) = self.broker.drawn_consumer(&self.plan.drawn).await {
                        consumer = found;
                    }
                }
            }
        }
        self.flush(&mut groups, |_| true);
    }

    /// Waits for permits for at least one message of the largest size. If none are free, groups are inserted at once.
    async fn acquire_permits(
        self: &Arc<Self>,
        budget: &Arc<Semaphore>,
        held: usize,
        groups: &mut HashMap<GroupKey, Group>,
    ) -> Option<OwnedSemaphorePermit> {
        let least = (self.broker.max_payload() + MESSAGE_OVERHEAD).min(held) as u32;
        let mut permits = match budget.clone().try_acquire_many_owned(least) {
            Ok(permits) => permits,
            Err(_) => {
                self.flush(groups, |_| true);
                tokio::select! {
                    permits = budget.clone().acquire_many_owned(least) => permits.ok()?,
                    () = self.stop.no_more_taking() => return None,
                }
            }
        };
        let more = budget.available_permits().min(MAX_PULL_BYTES.saturating_sub(least as usize)) as u32;
        if let Ok(more) = budget.clone().try_acquire_many_owned(more) {
            permits.merge(more);
        }
        Some(permits)
    }

    /// Pulls messages that `permits` covers into the groups; returns how many came.
    async fn pull(
        self: &Arc<Self>,
        consumer: &PullConsumer,
        mut permits: OwnedSemaphorePermit,
        groups: &mut HashMap<GroupKey, Group>,
    ) -> Result<usize, Source> {
        // No heartbeat: with one, 0.51 stalls (`Poll::Pending` without a waker).
        let request = consumer
            .batch()
            .max_messages(MAX_PULL)
            .max_bytes(permits.num_permits())
            .expires(PULL_FOR)
            .messages();
        let mut messages = tokio::time::timeout(ANSWER_WITHIN, request).await??;
        let mut taken = 0;
        loop {
            let message = tokio::select! {
                message = tokio::time::timeout(ANSWER_WITHIN, messages.next()) => message?,
                () = self.state.bells.computed() => {
                    self.flush(groups, |_| true);
                    continue;
                }
            };
            match message {
                Some(Ok(message)) => {
                    taken += 1;
                    let size = (message.payload.len() + MESSAGE_OVERHEAD).min(permits.num_permits());
                    let permit = permits.split(size).ok_or("a pull brought more than was asked for")?;
                    self.take(message, permit, groups).await;
                }
                // The server ends a pull whose next message would exceed the requested bytes: the next pull has permits
                // for it.
                Some(Err(error)) if taken > 0 => {
                    tracing::debug!(%error, taken, "a pull ended early: the rest comes with the next pull");
                    break;
                }
                Some(Err(error)) => return Err(error),
                None => break,
            }
        }
        Ok(taken)
    }

    async fn take(
        self: &Arc<Self>,
        message: Message,
        permit: OwnedSemaphorePermit,
        groups: &mut HashMap<GroupKey, Group>,
    ) {
        let delivery = self.held.take(message, permit);
        let read = read_rows(self.broker.names(), delivery.subject(), delivery.payload());
        let (key, rows) = match read {
            Ok(Some(read)) => read,
            // A manifest holds no rows: its split messages carry them.
            Ok(None) => return delivery.ack().await,
            Err(fault) => return set_aside(&self.broker, delivery, &fault).await,
        };
        if !self.open().insert(delivery.subject().to_owned()) {
            return delivery.leave();
        }
        let group = groups.entry(key.clone()).or_default();
        if !group.has_room_for(&rows) {
            self.start(key.clone(), std::mem::take(group));
        }
        group.add(Item { delivery, rows });
        if group.rows >= self.plan.group_rows {
            self.start(key, std::mem::take(group));
        }
    }

    /// Starts inserts of the groups that are ready.
    fn flush(self: &Arc<Self>, groups: &mut HashMap<GroupKey, Group>, ready: impl Fn(&Group) -> bool) {
        for (key, group) in groups.extract_if(|_, group| ready(group)) {
            self.start(key, group);
        }
    }

    fn start(self: &Arc<Self>, key: GroupKey, group: Group) {
        if group.items.is_empty() {
            return;
        }
        let this = self.clone();
        this.state.metrics.group_waits();
        self.stop.spawn(async move {
            let subjects: Vec<String> =
                group.items.iter().map(|item| item.delivery.subject().to_owned()).collect();
            let slot = this.inserts.acquire().await;
            this.state.metrics.group_begins();
            this.land(&key, group.items).await;
            drop(slot);
            let mut open = this.open();
            for subject in subjects {
                open.remove(&subject);
            }
        });
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Most bytes of messages that a sink holds: the plan's limit, but at least one message of the largest size. The server
/// would refuse a pull for fewer bytes than the next message has, from every sink and for ever.
fn held_at_most(planned: usize, max_payload: usize) -> usize {
    planned.max(max_payload + MESSAGE_OVERHEAD)
}

/// The passes of messages, each once.
fn passes_of<'a>(subjects: impl Iterator<Item = &'a String>) -> Vec<(String, u32)> {
    let pass = |subject: &'a String| {
        // The pass follows the name of the pipeline and the word for rows.
        let mut words = subject.split('.').skip(2);
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    let mut passes: Vec<(String, u32)> = subjects.filter_map(pass).collect();
    passes.sort_unstable();
    passes.dedup();
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: with `max_payload` above `held_bytes`, as README advises for large rows, one large message stopped
    /// all sinks.
    #[test]
    fn a_sink_has_room_for_the_largest_message() {
        let usual = SinkPlan::default().held_bytes;
        let large = 64 << 20;
        assert_eq!(held_at_most(usual, 8 << 20), usual);
        assert_eq!(held_at_most(usual, large), large + MESSAGE_OVERHEAD);
    }
}
