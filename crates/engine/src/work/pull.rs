//! Taking batches from the broker: permits first, then a pull of no more than they cover (**permits-before-pull**).
//!
//! The stop is looked at here and nowhere later: what has been taken is finished.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::error::{Code, Source};
use crate::model::record::{Open, PassKey, PassRecord};
use crate::nats::answer::ANSWER_WITHIN;
use crate::nats::broker::Broker;
use crate::nats::delivery::{Delivery, Held};
use crate::stop::Stop;
use crate::work::able::Able;
use crate::work::schedule::{Charge, Shares, Turn};

/// How often it is looked whether all cores are free, near the end of a pass.
const LOOK_FOR_ROOM: Duration = Duration::from_millis(5);
/// How long a pull that is under way may take once taking stops: what it brings is handed back at once by the drain.
const LAST_PULL: Duration = Duration::from_secs(2);
/// The most batches of one pull: beyond this a round trip costs nothing against the work.
const MAX_PULL: usize = 64;

/// Room for batches, counted in cores: what every core can start, and as much again one ahead.
#[derive(Debug, Clone)]
pub struct Slots {
    room: Arc<Semaphore>,
    cores: u32,
    /// Room that batches keep of which little is left, for as long as that lasts.
    kept: Arc<AtomicU32>,
}

/// Room that the rest of a batch keeps, until it is dropped.
pub(crate) struct Kept {
    kept: Arc<AtomicU32>,
    room: u32,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.kept.fetch_sub(self.room, Ordering::Relaxed);
    }
}

impl Slots {
    /// Room for a pool of `cores` threads.
    pub fn new(cores: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(cores * 2)), cores: cores as u32, kept: Arc::default() }
    }

    /// Cores that a batch of at most `batch_ids` ids can occupy: a large one all of them, a small one few.
    fn cost(&self, batch_ids: u32) -> u32 {
        batch_ids.clamp(1, self.cores)
    }

    /// How many batches of at most `batch_ids` ids there is room for in all.
    pub fn batches(&self, batch_ids: u32) -> usize {
        (self.cores * 2 / self.cost(batch_ids)) as usize
    }

    /// Cores for which batches could be drawn now.
    pub fn free(&self) -> usize {
        self.room.available_permits()
    }

    /// So many ids are left of a batch, whose others are stored: what they keep is no reason to draw nothing.
    pub(crate) fn keep(&self, ids: u32) -> Kept {
        let room = self.cost(ids);
        self.kept.fetch_add(room, Ordering::Relaxed);
        Kept { kept: self.kept.clone(), room }
    }

    /// Room that is free while nothing lies ahead, though a few ids may last.
    fn beside(&self) -> u32 {
        self.cores.saturating_sub(self.kept.load(Ordering::Relaxed))
    }

    /// Waits for room for one batch.
    pub async fn one(&self, batch_ids: u32) -> OwnedSemaphorePermit {
        let room = self.room.clone().acquire_many_owned(self.cost(batch_ids));
        room.await.expect("the semaphore is never closed")
    }

    /// Waits for cores that can start one batch now.
    async fn one_now(&self, batch_ids: u32) -> OwnedSemaphorePermit {
        // As much room as lies ahead has to be free beside it. That is looked for, not queued for: the semaphore serves in turn,
        // and what needs little room, as another attempt of an id does, would wait behind until all of it is free.
        loop {
            let beside = self.beside();
            if let Ok(mut room) = self.room.clone().try_acquire_many_owned(beside + self.cost(batch_ids)) {
                drop(room.split(beside as usize));
                return room;
            }
            tokio::time::sleep(LOOK_FOR_ROOM).await;
        }
    }

    /// Takes room for more batches where it is free.
    fn more(&self, batch_ids: u32, ahead: bool, most: usize, permits: &mut Vec<OwnedSemaphorePermit>) {
        let (cost, beside) = (self.cost(batch_ids), if ahead { 0 } else { self.beside() });
        while permits.len() < most.min(MAX_PULL)
            && self.room.available_permits() as u32 >= cost + beside
            && let Ok(another) = self.room.clone().try_acquire_many_owned(cost)
        {
            permits.push(another);
        }
    }
}

/// A batch that was drawn.
pub(crate) struct Drawn {
    pub pass: PassRecord,
    pub delivery: Delivery,
    pub charge: Charge,
}

/// Draws batches of the running passes, each in its turn, until taking stops, and hands each to `deliver`. Draws none while
/// this host cannot compute.
pub(crate) async fn consume(
    broker: &Broker,
    able: &Able,
    mut open: watch::Receiver<Open>,
    slots: &Slots,
    held: &Held,
    stop: &Stop,
    mut deliver: impl FnMut(Drawn),
) {
    let mut consumers: HashMap<PassKey, PullConsumer> = HashMap::new();
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
            // A server that does not answer now would be waited for until long after.
            () = stopped => return,
        };
        let Some(pulled) = pulled else { continue };
        let pending = pulled.last().and_then(|message| Some(message.info().ok()?.pending));
        shares.drawn(&choice.key, pulled.len(), pending);
        for (message, permit) in pulled.into_iter().zip(permits) {
            let (delivery, charge) = (held.take(message, permit), shares.charge(&choice.key));
            deliver(Drawn { pass: choice.record.clone(), delivery, charge });
        }
    }
}

/// Waits for room, and for a pass that may have something for it.
async fn next_turn(shares: &Shares, slots: &Slots) -> (Turn, Vec<OwnedSemaphorePermit>) {
    loop {
        let Some(choice) = shares.next(slots.cores as usize) else {
            tokio::time::sleep(shares.idle_for()).await;
            continue;
        };
        let batch_ids = choice.record.batch_ids;
        let permit = match choice.ahead {
            true => slots.one(batch_ids).await,
            false => slots.one_now(batch_ids).await,
        };
        // Others may have been done meanwhile, and it may be another's turn.
        let Some(now) = shares.next(slots.cores as usize) else { continue };
        if now.key == choice.key && now.ahead == choice.ahead {
            let mut permits = vec![permit];
            slots.more(batch_ids, now.ahead, now.most, &mut permits);
            return (now, permits);
        }
    }
}

/// What the pass has for us now. A failure is told, and leaves the pass for its next turn; `None` without a consumer.
async fn pull_pass(
    broker: &Broker,
    consumers: &mut HashMap<PassKey, PullConsumer>,
    shares: &Shares,
    key: &PassKey,
    most: usize,
) -> Option<Vec<Message>> {
    let (run, pass) = key;
    if !consumers.contains_key(key) {
        match broker.work_consumer(run, *pass).await {
            Ok(Some(consumer)) => drop(consumers.insert(key.clone(), consumer)),
            Ok(None) => {
                if shares.absent(key) {
                    tracing::warn!(%run, pass, "the pass has no consumer: a sink makes it again, or `verify {run} --repair`");
                }
                return None;
            }
            Err(error) => {
                tracing::warn!(%run, pass, %error, code = %Code::NatsAway, "the pass cannot be pulled from, trying again");
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

    async fn waits(room: impl Future<Output = OwnedSemaphorePermit>) -> bool {
        tokio::time::timeout(Duration::from_millis(20), room).await.is_err()
    }

    #[tokio::test]
    async fn permits_before_pull() {
        let slots = Slots::new(4);
        // A large batch occupies every core: one runs, one is ahead, and no third is asked for.
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
        let (looking, other) = (slots.one_now(10_000), slots.one(1));
        tokio::pin!(looking);
        assert!(futures_util::poll!(looking.as_mut()).is_pending());
        assert!(!waits(other).await, "another attempt of an id needs not all of the room");
    }

    /// The last 64 batches of a pass waited for an id that lasted hours, and all other passes with them.
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
