//! Taking batches from the broker: permits first, then a pull of no more than they cover (**permits-before-pull**).
//!
//! The stop is looked at here and nowhere later: what has been taken is finished.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt;
use millstream::names::RunName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::board::Running;
use crate::broker::{ANSWER_WITHIN, Broker};
use crate::delivery::{Delivery, Held};
use crate::error::Source;
use crate::records::PassRecord;
use crate::retry::Backoff;
use crate::stop::Stop;

/// The most batches of one pull: beyond this a round trip costs nothing against the work.
const MAX_PULL: usize = 64;
/// How soon an idle host looks again.
const IDLE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// Room for batches, counted in cores: what every core can start, and as much again one ahead.
#[derive(Debug, Clone)]
pub struct Slots {
    room: Arc<Semaphore>,
    cores: u32,
}

impl Slots {
    /// Room for a pool of `cores` threads.
    pub fn new(cores: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(cores * 2)), cores: cores as u32 }
    }

    /// Cores that a batch of at most `batch_ids` ids can occupy: a large one all of them, a small one few.
    fn cost(&self, batch_ids: u32) -> u32 {
        batch_ids.clamp(1, self.cores)
    }

    /// How many batches of at most `batch_ids` ids there is room for in all.
    pub fn batches(&self, batch_ids: u32) -> usize {
        (self.cores * 2 / self.cost(batch_ids)) as usize
    }

    /// Waits for room for one batch.
    pub async fn one(&self, batch_ids: u32) -> OwnedSemaphorePermit {
        let room = self.room.clone().acquire_many_owned(self.cost(batch_ids));
        room.await.expect("the semaphore is never closed")
    }

    /// Waits for room for one batch, and takes room for more where it is free.
    async fn several(&self, batch_ids: u32) -> Vec<OwnedSemaphorePermit> {
        let mut permits = vec![self.one(batch_ids).await];
        while permits.len() < MAX_PULL
            && let Ok(another) = self.room.clone().try_acquire_many_owned(self.cost(batch_ids))
        {
            permits.push(another);
        }
        permits
    }
}

/// Pulls batches of the running passes in turn until taking stops, and hands each to `deliver`.
pub async fn consume(
    broker: &Broker,
    mut running: watch::Receiver<Running>,
    slots: &Slots,
    held: &Held,
    stop: &Stop,
    mut deliver: impl FnMut(PassRecord, Delivery),
) {
    let mut consumers: HashMap<(RunName, u32), PullConsumer> = HashMap::new();
    let mut idle = Backoff::new(IDLE.0, IDLE.1);
    while !stop.taking_stopped() {
        let passes: Vec<((RunName, u32), PassRecord)> =
            running.borrow_and_update().iter().map(|(key, pass)| (key.clone(), pass.clone())).collect();
        consumers.retain(|key, _| passes.iter().any(|(running, _)| running == key));
        let mut found = 0;
        for (key, pass) in passes {
            let permits = tokio::select! {
                permits = slots.several(pass.batch_ids) => permits,
                () = stop.no_more_taking() => return,
            };
            let pulled = pull_pass(broker, &mut consumers, &key, permits.len()).await;
            found += pulled.len();
            for (message, permit) in pulled.into_iter().zip(permits) {
                deliver(pass.clone(), held.take(message, permit));
            }
        }
        if found > 0 {
            idle.reset();
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(idle.wait()) => {}
            changed = running.changed() => if changed.is_err() { return },
            () = stop.no_more_taking() => return,
        }
    }
}

/// What the pass has for us now. A failure is told, and leaves the pass for the next turn.
async fn pull_pass(
    broker: &Broker,
    consumers: &mut HashMap<(RunName, u32), PullConsumer>,
    key: &(RunName, u32),
    most: usize,
) -> Vec<Message> {
    let (run, pass) = key;
    if !consumers.contains_key(key) {
        match broker.work_consumer(run, *pass).await {
            Ok(Some(consumer)) => drop(consumers.insert(key.clone(), consumer)),
            Ok(None) => {
                tracing::warn!(%run, pass, "the pass has no consumer: a sink makes it again, or `verify {run} --repair`");
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Vec::new();
            }
            Err(error) => {
                tracing::warn!(%run, pass, %error, "the pass cannot be pulled from, trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Vec::new();
            }
        }
    }
    let mut messages = Vec::new();
    if let Some(consumer) = consumers.get(key)
        && let Err(error) = pull(consumer, most, &mut messages).await
    {
        tracing::warn!(%run, pass, %error, "a pull failed, trying again");
        consumers.remove(key);
    }
    messages
}

/// Asks for what is there now, and does not wait for more.
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

    #[tokio::test]
    async fn permits_before_pull() {
        let slots = Slots::new(4);
        // A large batch occupies every core: one runs, one is ahead, and no third is asked for.
        let large = slots.several(10_000).await;
        assert_eq!(large.len(), 2);
        assert!(tokio::time::timeout(Duration::from_millis(20), slots.several(10_000)).await.is_err());
        drop(large);
        // Batches of one id: one a core and one ahead of each.
        assert_eq!(slots.several(1).await.len(), 8);
    }
}
