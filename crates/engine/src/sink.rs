//! The sink: gathers the rows of one pass, inserts them, asks ClickHouse what landed, and acks just that.
//!
//! Rows are kept until the answer confirms them (**own-the-bytes**): an insert that failed, or whose outcome nobody
//! knows, is made again from the same bytes.

mod bells;
mod group;
mod land;
mod left;
mod schemas;
pub(crate) mod step;
mod waits;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
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
use bells::Bells;
use group::{Group, GroupKey, Item, read_rows};
pub use left::Left;
use schemas::Schemas;
pub use waits::Waits;

/// A message's subject, reply and headers beside its payload.
const MESSAGE_OVERHEAD: usize = 4 << 10;
/// Bytes asked for in one pull at most.
const MAX_PULL_BYTES: usize = 16 << 20;
/// Messages asked for in one pull at most.
const MAX_PULL: usize = 1000;
/// How long a pull waits for more. Short, because groups age meanwhile.
const PULL_FOR: Duration = Duration::from_millis(500);
/// How often a sink that is to end says what it waits for.
const TELL: Duration = Duration::from_secs(15);
/// A message that cannot be inserted now is handed back for this long.
const SET_BACK: Duration = Duration::from_secs(60);

/// How a sink works.
#[derive(Debug, Clone)]
pub struct SinkPlan {
    /// Which rows it draws.
    pub drawn: Drawn,
    /// Rows after which a group is inserted.
    pub group_rows: u64,
    /// Age after which a group is inserted.
    pub group_age: Duration,
    /// Bytes of messages held at once: what bounds the sink's memory.
    pub held_bytes: usize,
    /// Inserts under way at once.
    pub inserts: usize,
    /// How long held rows may take to land after a stop.
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

/// What a sink did, counted since its start.
#[derive(Debug, Default)]
pub struct SinkCounts {
    /// Rows confirmed by ClickHouse.
    pub rows: AtomicU64,
    /// Batches acked.
    pub batches: AtomicU64,
    /// Inserts made.
    pub inserts: AtomicU64,
    /// Inserts that failed or whose outcome was unknown.
    pub failed_inserts: AtomicU64,
    /// Arrivals after the first.
    pub redelivered: AtomicU64,
    /// Messages that are no batch of ours, kept apart.
    pub set_aside: AtomicU64,
    /// Rows that the table does not take, and why.
    pub left: Left,
    /// Passes that the sealer beside the sink cannot seal, and why.
    pub waits: Waits,
    /// What it and that sealer tell each other.
    pub(crate) bells: Bells,
}

struct Sink {
    broker: Broker,
    store: Store,
    plan: SinkPlan,
    held: Held,
    counts: Arc<SinkCounts>,
    stop: Stop,
    inserts: Semaphore,
    /// What the table says of the columns that rows came with.
    schemas: Schemas,
    /// Subjects of messages in our hands: one that arrives again meanwhile is not inserted twice.
    open: Mutex<HashSet<String>>,
    /// Tells this process's inserts from those of other sinks and earlier starts.
    name: String,
    attempts: AtomicU64,
    phases: Phases<3>,
}

/// What a sink does at a moment, by the place among its phases; 0 is to wait for rows.
const ASKING: usize = 1;
const INSERTING: usize = 2;

/// Sinks until told to stop, and without waiting for a group to fill once the sealer says that no more is coming, then lands what it holds within the plan's deadline and hands back the rest.
///
/// # Errors
/// When the consumer of the rows that it draws does not exist; afterwards failures are waited out.
pub async fn sink(
    broker: &Broker,
    store: &Store,
    plan: SinkPlan,
    counts: Arc<SinkCounts>,
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
        held: Held::start(broker.clone(), stop),
        counts,
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
    sink.tell(broker.records().await?);
    tracing::info!("sinking");
    sink.gather(consumer).await;
    tracing::info!(held = sink.held.count(), "taking no more rows, landing what is held");
    tokio::select! {
        () = stop.finished(sink.plan.drain) => {}
        () = sink.tell_what_lasts() => {}
    }
    broker.flush().await;
    Ok(())
}

impl Sink {
    /// Keeps the fleet told of what this process does.
    fn tell(self: &Arc<Self>, records: Records) {
        let (this, stop) = (self.clone(), self.stop.clone());
        self.stop.spawn(async move {
            let (mut recent, mut rows) = (Recent::new(), Recent::new());
            let look = || {
                let seconds = this.phases.seconds();
                let stored = this.counts.rows.load(Ordering::Relaxed) as f64;
                let ([more], within) = rows.note([stored]);
                let (total, recent) = (seconds.into(), recent.note(seconds).0.into());
                let (left, left_passes) = (this.counts.left.told(), this.counts.left.passes());
                let holds = passes_of(this.open().iter());
                let (rows_per_second, waits) = (more / within, this.counts.waits.told());
                Doing::Sink { recent, total, rows_per_second, left, left_passes, holds, waits }
            };
            heartbeat::report(&records, this.store.tables().build(), &stop, look).await;
        });
    }

    /// Says, once work is given up and not over, what is waited for. Does not return.
    async fn tell_what_lasts(&self) {
        self.stop.given_up().await;
        loop {
            tokio::time::sleep(TELL).await;
            tracing::warn!(
                batches = self.held.count(),
                at_most_s = self.store.insert_over().as_secs(),
                hint = "materialized views that are slow make it long; a second signal leaves at once, and loses nothing",
                "waiting for inserts under way: the outcome of one that is left is not known"
            );
        }
    }

    async fn gather(self: &Arc<Self>, mut consumer: PullConsumer) {
        let held = held_at_most(self.plan.held_bytes, self.broker.max_payload());
        let budget = Arc::new(Semaphore::new(held));
        let mut groups: HashMap<GroupKey, Group> = HashMap::new();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        while !self.stop.taking_stopped() {
            let Some(room) = self.make_room(&budget, held, &mut groups).await else { break };
            match self.pull(&consumer, room, &mut groups).await {
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

    /// Room for at least one message of the largest size. When there is none, groups wait no longer.
    async fn make_room(
        self: &Arc<Self>,
        budget: &Arc<Semaphore>,
        held: usize,
        groups: &mut HashMap<GroupKey, Group>,
    ) -> Option<OwnedSemaphorePermit> {
        let least = (self.broker.max_payload() + MESSAGE_OVERHEAD).min(held) as u32;
        let mut room = match budget.clone().try_acquire_many_owned(least) {
            Ok(room) => room,
            Err(_) => {
                self.flush(groups, |_| true);
                tokio::select! {
                    room = budget.clone().acquire_many_owned(least) => room.ok()?,
                    () = self.stop.no_more_taking() => return None,
                }
            }
        };
        let more = budget.available_permits().min(MAX_PULL_BYTES.saturating_sub(least as usize)) as u32;
        if let Ok(more) = budget.clone().try_acquire_many_owned(more) {
            room.merge(more);
        }
        Some(room)
    }

    /// Pulls what `room` has room for, into the groups; how many messages came.
    async fn pull(
        self: &Arc<Self>,
        consumer: &PullConsumer,
        mut room: OwnedSemaphorePermit,
        groups: &mut HashMap<GroupKey, Group>,
    ) -> Result<usize, Source> {
        // No heartbeat: with one, 0.51 stalls (`Poll::Pending` without a waker).
        let request = consumer
            .batch()
            .max_messages(MAX_PULL)
            .max_bytes(room.num_permits())
            .expires(PULL_FOR)
            .messages();
        let mut messages = tokio::time::timeout(ANSWER_WITHIN, request).await??;
        let mut taken = 0;
        loop {
            let message = tokio::select! {
                message = tokio::time::timeout(ANSWER_WITHIN, messages.next()) => message?,
                () = self.counts.bells.computed() => {
                    self.flush(groups, |_| true);
                    continue;
                }
            };
            match message {
                Some(Ok(message)) => {
                    taken += 1;
                    let size = (message.payload.len() + MESSAGE_OVERHEAD).min(room.num_permits());
                    let permit = room.split(size).ok_or("a pull brought more than was asked for")?;
                    self.take(message, permit, groups).await;
                }
                // The server ends a pull whose next message would go beyond its bytes: room for it is made first.
                Some(Err(error)) if taken > 0 => {
                    tracing::debug!(%error, taken, "a pull ended early");
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
            // There are no rows in it: its parts are messages of their own.
            Ok(None) => return delivery.ack().await,
            Err(fault) => return set_aside(&self.broker, delivery, &fault, &self.counts.set_aside).await,
        };
        if delivery.deliveries() > 1 {
            self.counts.redelivered.fetch_add(1, Ordering::Relaxed);
        }
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

    /// Has the groups inserted that are ready.
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
        self.stop.spawn(async move {
            let subjects: Vec<String> =
                group.items.iter().map(|item| item.delivery.subject().to_owned()).collect();
            let slot = this.inserts.acquire().await;
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

/// Bytes of messages that a sink holds at most: what its plan says, but one message of the largest size in any case. A pull for
/// fewer bytes than the next message has would be refused, by every sink and for ever.
fn held_at_most(planned: usize, max_payload: usize) -> usize {
    planned.max(max_payload + MESSAGE_OVERHEAD)
}

/// The passes of messages, each once.
fn passes_of<'a>(subjects: impl Iterator<Item = &'a String>) -> Vec<(String, u32)> {
    let pass = |subject: &'a String| {
        // Behind the name of the pipeline and the word for rows.
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

    /// With `max_payload` above `held_bytes`, as README advises for large rows, one large message stopped all sinks.
    #[test]
    fn a_sink_has_room_for_the_largest_message() {
        let (usual, large) = (SinkPlan::default().held_bytes, 64 << 20);
        assert_eq!(held_at_most(usual, 8 << 20), usual);
        assert_eq!(held_at_most(usual, large), large + MESSAGE_OVERHEAD);
    }
}
