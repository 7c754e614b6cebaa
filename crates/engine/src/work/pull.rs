//! Pulling batches from NATS: permits first, then a pull of no more than they cover (**permits-before-pull**).
//!
//! The worker checks the stop token here and nowhere later: it finishes every batch that it has pulled.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt;
use millstream::names::PassId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::error::{Code, Source};
use crate::model::record::{Open, PassRecord};
use crate::nats::answer::ANSWER_WITHIN;
use crate::nats::broker::Broker;
use crate::nats::delivery::{Delivery, Held};
use crate::stop::Stop;
use crate::work::able::Able;
use crate::work::schedule::{Charge, Shares, Turn};

/// How often the worker checks whether all cores are free, near the end of a pass.
const POLL_PERMITS: Duration = Duration::from_millis(5);
/// How long a running pull may take after the stop; the drain returns its batches to the stream at once.
const LAST_PULL: Duration = Duration::from_secs(2);
/// Most batches of one pull: beyond this number a round trip costs little compared with the work.
const MAX_PULL: usize = 64;

/// Permits for batches, counted in cores: one batch for every core, and as much again one ahead.
#[derive(Debug, Clone)]
pub struct Slots {
    permits: Arc<Semaphore>,
    cores: u32,
    /// Permits held by nearly finished batches, until these end.
    kept: Arc<AtomicU32>,
}

/// Permits that the rest of a batch holds; dropping the value returns them.
pub(crate) struct Kept {
    kept: Arc<AtomicU32>,
    permits: u32,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.kept.fetch_sub(self.permits, Ordering::Relaxed);
    }
}

impl Slots {
    /// Permits for a pool of `cores` threads.
    pub fn new(cores: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(cores * 2)), cores: cores as u32, kept: Arc::default() }
    }

    /// Permits that a batch of at most `batch_ids` ids needs: a large batch all cores, a small one few.
    fn cost(&self, batch_ids: u32) -> u32 {
        batch_ids.clamp(1, self.cores)
    }

    /// How many batches of at most `batch_ids` ids the permits cover in total.
    pub fn batches(&self, batch_ids: u32) -> usize {
        (self.cores * 2 / self.cost(batch_ids)) as usize
    }

    /// Cores for which the worker could pull batches now.
    pub fn free(&self) -> usize {
        self.permits.available_permits()
    }

    /// Notes that only `ids` ids of a batch are left. The permits that they keep must not stop the worker from pulling.
    pub(crate) fn keep(&self, ids: u32) -> Kept {
        let permits = self.cost(ids);
        self.kept.fetch_add(permits, Ordering::Relaxed);
        Kept { kept: self.kept.clone(), permits }
    }

    /// Permits that are free while no batch is ahead, even if a few long ids keep theirs.
    fn beside(&self) -> u32 {
        self.cores.saturating_sub(self.kept.load(Ordering::Relaxed))
    }

    /// Waits for permits for one batch.
    pub async fn one(&self, batch_ids: u32) -> OwnedSemaphorePermit {
        let permit = self.permits.clone().acquire_many_owned(self.cost(batch_ids));
        permit.await.expect("the semaphore is never closed")
    }

    /// Waits until one batch can start now.
    async fn one_now(&self, batch_ids: u32) -> OwnedSemaphorePermit {
        // Require the prefetch permits to be free as well, then release them: this batch must start now, not wait in
        // line. This polls instead of queuing, because the semaphore is fair: small requests, such as another attempt
        // of an id, would wait behind this one.
        loop {
            let beside = self.beside();
            if let Ok(mut permit) = self.permits.clone().try_acquire_many_owned(beside + self.cost(batch_ids))
            {
                drop(permit.split(beside as usize));
                return permit;
            }
            tokio::time::sleep(POLL_PERMITS).await;
        }
    }

    /// Takes permits for more batches as long as they are free.
    fn more(&self, batch_ids: u32, ahead: bool, most: usize, permits: &mut Vec<OwnedSemaphorePermit>) {
        let cost = self.cost(batch_ids);
        let beside = if ahead { 0 } else { self.beside() };
        while permits.len() < most.min(MAX_PULL)
            && self.permits.available_permits() as u32 >= cost + beside
            && let Ok(another) = self.permits.clone().try_acquire_many_owned(cost)
        {
            permits.push(another);
        }
    }
}

/// A batch that the worker pulled.
pub(crate) struct Drawn {
    pub pass: PassRecord,
    pub delivery: Delivery,
    pub charge: Charge,
}

/// Pulls batches of the running passes in turn, until the stop, and passes each to `deliver`. Pulls none while this
/// host cannot compute.
pub(crate) async fn consume(
    broker: &Broker,
    able: &Able,
    mut open: watch::Receiver<Open>,
    slots: &Slots,
    held: &Held,
    stop: &Stop,
    mut deliver: impl FnMut(Drawn),
) {
    let mut consumers: HashMap<PassId, PullConsumer> = HashMap::new();
    let shares = Shares::default();
    while !stop.taking_stopped() {
        tokio::select! {
            () = able.once_able() => {}
            () = stop.no_more_taking() => return,
        }
        {
            let passes = open.borrow_and_update();
            shares.follow(&passes);
            consumers.retain(|key, _| passes.contains_key(key));
        }
        let turn = tokio::select! {
            turn = next_turn(&shares, slots) => turn,
            changed = open.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            () = able.once_unable() => continue,
            () = stop.no_more_taking() => return,
        };
        let (choice, permits) = turn;
        let stopped = async {
            stop.no_more_taking().await;
            tokio::time::sleep(LAST_PULL).await;
        };
        let pulled = tokio::select! {
            pulled = pull_pass(broker, &mut consumers, &shares, &choice.key, permits.len()) => pulled,
            // A server that does not answer would delay the end far too long.
            () = stopped => return,
        };
        let Some(pulled) = pulled else { continue };
        let pending = pulled.last().and_then(|message| Some(message.info().ok()?.pending));
        shares.drawn(&choice.key, pulled.len(), pending);
        for (message, permit) in pulled.into_iter().zip(permits) {
            let delivery = held.take(message, permit);
            let charge = shares.charge(&choice.key);
            deliver(Drawn { pass: choice.record.clone(), delivery, charge });
        }
    }
}

/// Waits for permits, and for a pass that may have batches.
async fn next_turn(shares: &Shares, slots: &Slots) -> (Turn, Vec<OwnedSemaphorePermit>) {
    loop {
        let Some(choice) = shares.next(slots.cores as usize) else {
            tokio::time::sleep(shares.idle_for()).await;
            continue;
        };
        let batch_ids = choice.record.batch_ids;
        let permit = if choice.ahead { slots.one(batch_ids).await } else { slots.one_now(batch_ids).await };
        // Other passes may have ended meanwhile, and the turn may have changed.
        let Some(now) = shares.next(slots.cores as usize) else { continue };
        if now.key == choice.key && now.ahead == choice.ahead {
            let mut permits = vec![permit];
            slots.more(batch_ids, now.ahead, now.most, &mut permits);
            return (now, permits);
        }
    }
}

/// Pulls the pass's waiting batches. Logs a failure and leaves the pass until its next turn; `None` without a consumer.
async fn pull_pass(
    broker: &Broker,
    consumers: &mut HashMap<PassId, PullConsumer>,
    shares: &Shares,
    key: &PassId,
    most: usize,
) -> Option<Vec<Message>> {
    let PassId { run, pass } = key;
    if !consumers.contains_key(key) {
        match broker.work_consumer(key).await {
            Ok(Some(consumer)) => drop(consumers.insert(key.clone(), consumer)),
            Ok(None) => {
                if shares.absent(key) {
                    tracing::warn!(%run, pass, "the pass has no consumer: a sink creates it again, or `verify {run} --repair` does");
                }
                return None;
            }
            Err(error) => {
                tracing::warn!(%run, pass, %error, code = %Code::NatsAway, "pulling from the pass failed, trying again");
                shares.put_off(key);
                return None;
            }
        }
    }
    let mut messages = Vec::new();
    if let Some(consumer) = consumers.get(key)
        && let Err(error) = pull(consumer, most, &mut messages).await
    {
        tracing::warn!(%run, pass, %error, code = %Code::NatsAway, "a pull failed, trying again");
        consumers.remove(key);
    }
    Some(messages)
}

/// Requests the waiting messages, without waiting for more.
async fn pull(consumer: &PullConsumer, most: usize, messages: &mut Vec<Message>) -> Result<(), Source> {
    // No heartbeat: with one, 0.51 stalls (`Poll::Pending` without a waker).
    let mut batch =
        tokio::time::timeout(ANSWER_WITHIN, consumer.fetch().max_messages(most).messages()).await??;
    while let Some(message) = tokio::time::timeout(ANSWER_WITHIN, batch.next()).await? {
        messages.push(message?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn waits(permit: impl Future<Output = OwnedSemaphorePermit>) -> bool {
        tokio::time::timeout(Duration::from_millis(20), permit).await.is_err()
    }

    #[tokio::test]
    async fn permits_before_pull() {
        let slots = Slots::new(4);
        // A large batch occupies every core: one runs, one is ahead, and the worker asks for no third.
        let mut large = vec![slots.one(10_000).await];
        slots.more(10_000, true, usize::MAX, &mut large);
        assert_eq!(large.len(), 2);
        assert!(waits(slots.one(10_000)).await);
        drop(large);
        // Batches of one id: one a core and one ahead of each.
        let mut small = vec![slots.one(1).await];
        slots.more(1, true, usize::MAX, &mut small);
        assert_eq!(small.len(), 8);
    }

    #[tokio::test]
    async fn near_the_end_nothing_is_drawn_ahead() {
        let slots = Slots::new(4);
        let mut small = vec![slots.one_now(1).await];
        slots.more(1, false, usize::MAX, &mut small);
        assert_eq!(small.len(), 4, "one a core");
        assert!(waits(slots.one_now(1)).await);
        drop(small);
        let _running = slots.one_now(10_000).await;
        assert!(waits(slots.one_now(10_000)).await);
        assert!(!waits(slots.one(10_000)).await, "another pass may be ahead");
        let looking = slots.one_now(10_000);
        let other = slots.one(1);
        tokio::pin!(looking);
        assert!(futures_util::poll!(looking.as_mut()).is_pending());
        assert!(!waits(other).await, "another attempt of an id does not need all permits");
    }

    /// Regression: the last 64 batches of a pass, and all other passes, waited for an id that took hours.
    #[tokio::test]
    async fn an_id_that_lasts_keeps_no_batch_from_being_drawn() {
        let slots = Slots::new(4);
        let mut lasting = slots.one_now(10_000).await;
        drop(lasting.split(3));
        let kept = slots.keep(1);
        let large = slots.one_now(10_000).await;
        assert!(waits(slots.one_now(10_000)).await, "the cores have a batch");
        drop(large);
        drop(kept);
        assert!(waits(slots.one_now(10_000)).await, "a batch that is whole is waited for");
    }
}
