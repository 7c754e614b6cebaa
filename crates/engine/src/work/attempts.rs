//! Computing the ids of a batch: attempt after attempt, within their run's rate limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::names::PassId;
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

/// From this delivery on each id is computed in an isolated process: an id may have killed the earlier workers.
const SUSPECT: i64 = 3;
/// How often the worker checks whether a portion of a rate-limited run is nearly finished.
const POLL: Duration = Duration::from_millis(20);

impl<I: Id> Worker<I> {
    /// Computes all ids; ids that ask for another attempt get it after a pause.
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
        let mut left = ids;
        let mut begun = None;
        for attempt in 1.. {
            let last = self.is_last(attempt, begun);
            match pass.rate {
                None => self.compute_attempt(key, left, (last, suspect), results).await?,
                Some(_) => self.compute_limited(key, left, (last, suspect), results, delivery).await?,
            }
            let again = results.take_again();
            let why = again.last().map(|(_, why)| why.clone()).unwrap_or_default();
            left = again.into_iter().map(|(id, _)| id).collect();
            self.log_trouble(key, charge.attempted(left.len() as u64, key.ids), &why);
            // Ids arrive in the order in which they finish.
            left.sort_unstable();
            if left.is_empty() {
                break;
            }
            tracing::debug!(run = %key.pass.run, batch = key.batch, ids = left.len(), attempt, why, "ids asked for another attempt");
            self.metrics.asked_again(left.len() as u64);
            let begun = *begun.get_or_insert_with(Instant::now);
            let _asking = self.load.asking(&key.pass, left.len() as u64, &why);
            self.wait(self.pause(&mut pause, attempt, begun), left.len() as u32, delivery).await?;
        }
        Ok(())
    }

    /// Whether this is the last attempt. `begun` is when ids first asked for another one.
    fn is_last(&self, attempt: u32, begun: Option<Instant>) -> bool {
        let Limits { attempts, retry_for, .. } = self.limits;
        let asked = begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        attempt >= attempts && (attempts == 1 || asked >= retry_for)
    }

    /// Pause before the next attempt. Once the attempts are used up, the last one comes at the end of the allowed time.
    fn pause(&self, pause: &mut Backoff, attempt: u32, begun: Instant) -> Duration {
        let Limits { attempts, retry_for, first_pause, .. } = self.limits;
        let pause = pause.wait();
        let rest = retry_for.saturating_sub(begun.elapsed());
        if attempt + 1 < attempts { pause } else { pause.min(rest.max(first_pause)) }
    }

    /// Logs when a pass gets into, or out of, trouble with repeated attempts.
    fn log_trouble(
        &self,
        BatchKey { pass: PassId { run, pass }, .. }: &BatchKey,
        news: Option<bool>,
        why: &str,
    ) {
        match news {
            Some(true) => {
                tracing::warn!(%run, pass, why, code = %Code::ManyRetries, "many ids ask for another attempt: this host pulls fewer batches of the run");
            }
            Some(false) => {
                tracing::info!(%run, pass, "few ids ask for another attempt now: this host pulls as many batches as before")
            }
            None => {}
        }
    }

    /// Whether the batch may be the reason for its redeliveries. Deliveries that hosts returned because they could not
    /// compute do not count.
    async fn is_suspect(&self, delivery: &Delivery) -> bool {
        if delivery.deliveries() < SUSPECT {
            return false;
        }
        let subject = delivery.subject();
        let others = heartbeat::returned(&self.records, subject).await;
        let own = self.able.returns().get(subject).copied().unwrap_or(0);
        delivery.deliveries() - own.max(others) >= SUSPECT
    }

    async fn compute_attempt(
        &self,
        key: &BatchKey,
        ids: Vec<I>,
        (last, suspect): (bool, bool),
        results: &Arc<Results<I>>,
    ) -> Result<(), Error> {
        let _computing = self.load.computing(ids.len() as u32);
        self.cores.compute_onto(key, ids, (last, suspect), results).await
    }

    /// Computes ids within their run's rate limit, and holds no core in between. The rate may change meanwhile. A long
    /// id delays no other while a core is free.
    async fn compute_limited(
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
                    tokio::time::sleep(POLL).await;
                }
                let some = self.admit(key, ids.len(), delivery).await?;
                let rest = ids.split_off(some);
                // The receiving task ends together with this one.
                let _taken = sender.send(ids);
                ids = rest;
            }
            Ok(())
        };
        let computing = async {
            let mut portions = FuturesUnordered::new();
            loop {
                tokio::select! {
                    Some(ids) = admitted.recv() => portions.push(self.compute_attempt(key, ids, flags, results)),
                    Some(computed) = portions.next() => computed?,
                    else => return Ok(()),
                }
            }
        };
        tokio::try_join!(admitting, computing).map(drop)
    }

    /// Waits until some of `left` ids may begin; returns how many.
    async fn admit(&self, key: &BatchKey, left: usize, delivery: &Delivery) -> Result<usize, Error> {
        let rate = || self.open.borrow().get(&key.pass).and_then(|pass| pass.rate);
        // Two batches that kept permits while they wait for permits would deadlock.
        delivery.hold(None);
        let some = if rate().is_some() {
            let _paced = self.load.paced();
            self.rates.admit(&key.pass, rate, left, &self.stop).await?
        } else {
            left
        };
        delivery.hold(Some(self.slots.one(some as u32).await));
        Ok(some)
    }

    /// Waits, without holding a core if the number of waiting batches allows it, and takes the permits again before it
    /// returns.
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
