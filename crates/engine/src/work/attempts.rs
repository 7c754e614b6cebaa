//! Computing the ids of a batch: attempt after attempt, as fast as their run's rate allows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::{Id, Limits};
use tokio::sync::mpsc;

use super::Worker;
use crate::compute::{BatchKey, Results};
use crate::error::{Code, Error};
use crate::fleet::heartbeat;
use crate::model::record::PassRecord;
use crate::nats::delivery::Delivery;
use crate::retry::Backoff;
use crate::work::schedule::Charge;

/// From this delivery of a batch on its ids are computed alone: the worker that had it before may have died of one.
const SUSPECT: i64 = 3;
/// How often it is looked whether a portion of a limited run is as good as done.
const LOOK: Duration = Duration::from_millis(20);

impl<I: Id> Worker<I> {
    /// Computes all ids; those that ask for another attempt get it after a pause.
    pub(super) async fn compute(
        &self,
        pass: &PassRecord,
        key: &BatchKey,
        ids: Vec<I>,
        results: &Arc<Results<I>>,
        delivery: &Delivery,
        charge: &Charge,
    ) -> Result<(), Error> {
        let mut pause = Backoff::new(self.limits.first_pause, self.limits.longest_pause);
        let suspect = self.is_suspect(delivery).await;
        let (mut left, mut begun) = (ids, None);
        for attempt in 1.. {
            let last = self.is_last(attempt, begun);
            match pass.rate {
                None => self.grind(key, left, (last, suspect), results).await?,
                Some(_) => self.grind_slowly(key, left, (last, suspect), results, delivery).await?,
            }
            let again = results.take_again();
            let why = again.last().map(|(_, why)| why.clone()).unwrap_or_default();
            left = again.into_iter().map(|(id, _)| id).collect();
            self.say_trouble(key, charge.attempted(left.len() as u64, key.ids), &why);
            // They come as they are done.
            left.sort_unstable();
            if left.is_empty() {
                break;
            }
            tracing::debug!(run = %key.run, batch = key.batch, ids = left.len(), attempt, why, "ids to be tried again");
            let begun = *begun.get_or_insert_with(Instant::now);
            let _asking = self.load.asking(&(key.run.clone(), key.pass), left.len() as u64, &why);
            self.wait(self.pause(&mut pause, attempt, begun), left.len() as u32, delivery).await?;
        }
        Ok(())
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
                tracing::warn!(%run, pass, why, code = %Code::ManyRetries, "many ids ask for another attempt: fewer batches of the run are drawn");
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
        let others = heartbeat::returned(&self.records, subject).await;
        let own = self.able.returns().get(subject).copied().unwrap_or(0);
        delivery.deliveries() - own.max(others) >= SUSPECT
    }

    async fn grind(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        (last, suspect): (bool, bool),
        results: &Arc<Results<I>>,
    ) -> Result<(), Error> {
        let _computing = self.load.computing(ids.len() as u32);
        self.cores.compute_onto(key, ids, (last, suspect), results).await
    }

    /// Computes ids as their run's rate allows, and holds no core in between. The rate may change meanwhile. An id that
    /// lasts holds up no other while there is a core without one.
    async fn grind_slowly(
        &self,
        key: &BatchKey,
        mut ids: Vec<I>,
        flags: (bool, bool),
        results: &Arc<Results<I>>,
        delivery: &Delivery,
    ) -> Result<(), Error> {
        let end = results.answered() + ids.len();
        let (sender, mut admitted) = mpsc::unbounded_channel();
        let admitting = async move {
            while !ids.is_empty() {
                while end - results.answered() - ids.len() >= self.load.cores() {
                    tokio::time::sleep(LOOK).await;
                }
                let some = self.admit(key, ids.len(), delivery).await?;
                let rest = ids.split_off(some);
                // The task that takes them ends with this one.
                let _taken = sender.send(ids);
                ids = rest;
            }
            Ok(())
        };
        let grinding = async {
            let mut portions = FuturesUnordered::new();
            loop {
                tokio::select! {
                    Some(ids) = admitted.recv() => portions.push(self.grind(key, ids, flags, results)),
                    Some(computed) = portions.next() => computed?,
                    else => return Ok(()),
                }
            }
        };
        tokio::try_join!(admitting, grinding).map(drop)
    }

    /// Waits until some of `left` ids may begin; how many.
    async fn admit(&self, key: &BatchKey, left: usize, delivery: &Delivery) -> Result<usize, Error> {
        let pass = (key.run.clone(), key.pass);
        let rate = || self.open.borrow().get(&pass).and_then(|pass| pass.rate);
        // Two batches that waited for room with room in their hands would wait for each other.
        delivery.hold(None);
        let some = if rate().is_some() {
            let _paced = self.load.paced();
            self.rates.admit(&pass, rate, left, &self.stop).await?
        } else {
            left
        };
        delivery.hold(Some(self.slots.one(some as u32).await));
        Ok(some)
    }

    /// Waits without holding a core, where there is a seat; the room is taken again before it goes on.
    async fn wait(&self, pause: Duration, ids: u32, delivery: &Delivery) -> Result<(), Error> {
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
}
