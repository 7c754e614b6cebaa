//! Landing one group: ask, insert what is not there, ask, ack what landed, again with the rest.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millstream::names::RunName;

use super::{Item, SET_BACK, Sink};
use crate::error::{Class, StoreFault};
use crate::failpoint;
use crate::retry::Backoff;

/// Pauses between attempts while ClickHouse is away: bounded so that its return is noticed soon.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

impl Sink {
    /// Returns when every item is ended: acked after ClickHouse said that all of its ids are there, or handed back.
    pub(super) async fn land(&self, run: &RunName, pass: u32, mut items: Vec<Item>) {
        // Batches come as workers finish them; in order, ClickHouse has nothing to sort.
        items.sort_unstable_by_key(|item| item.portion.batch);
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            let asked = tokio::select! {
                asked = self.settle(run, pass, &mut items) => asked,
                () = self.stop.given_up() => return hand_back(items, Duration::ZERO).await,
            };
            if items.is_empty() {
                return;
            }
            let fault = match asked {
                Err(fault) => fault,
                // An insert under way is never dropped: what became of it would not be known.
                Ok(()) => match self.insert(&items).await {
                    Ok(()) => {
                        forget_certainty(&mut items);
                        match self.settle(run, pass, &mut items).await {
                            Ok(()) if items.is_empty() => return,
                            Ok(()) => StoreFault::Unclear(
                                "the insert is done, and not all of its rows are there".into(),
                            ),
                            Err(fault) => fault,
                        }
                    }
                    Err((fault, query_id)) => match fault.class() {
                        Class::Reject if items.len() > 1 => return self.land_apart(run, pass, items).await,
                        Class::Reject => return reject(items, &fault).await,
                        Class::Unclear => {
                            forget_certainty(&mut items);
                            self.end_insert(&query_id).await;
                            fault
                        }
                        Class::Retry => {
                            forget_certainty(&mut items);
                            fault
                        }
                    },
                },
            };
            let wait = pause.wait();
            let rows: u64 = items.iter().map(|item| item.ids).sum();
            tracing::warn!(%run, pass, batches = items.len(), rows, %fault, retry_ms = wait.as_millis() as u64,
                "rows are not stored yet, trying again");
            if !self.stop.pause(wait).await {
                return hand_back(items, Duration::ZERO).await;
            }
        }
    }

    /// Where any item may have been inserted by somebody, asks, acks what is there, and is sure of the rest.
    async fn settle(&self, run: &RunName, pass: u32, items: &mut Vec<Item>) -> Result<(), StoreFault> {
        let doubtful = |item: &Item| item.sure_since.is_none_or(|since| self.held.woke_since(since));
        if !items.iter().any(doubtful) {
            return Ok(());
        }
        failpoint::pass("sink-before-ask");
        let asked_at = Instant::now();
        let portions = items.iter().map(|item| &item.portion);
        let mut stored = self.store.ask(run.as_str(), pass, portions).await?.into_iter();
        failpoint::pass("sink-after-ask");
        // More than there should be are for `verify` to name: inserting once more would not make them fewer.
        let mut landed = |item: &Item| stored.next().is_some_and(|ids| ids >= item.ids);
        for item in items.extract_if(.., |item| landed(item)) {
            self.counts.rows.fetch_add(item.ids, Ordering::Relaxed);
            self.counts.batches.fetch_add(1, Ordering::Relaxed);
            item.delivery.ack().await;
            failpoint::pass("sink-after-ack");
        }
        for item in items {
            item.sure_since = Some(asked_at);
        }
        Ok(())
    }

    async fn insert(&self, items: &[Item]) -> Result<(), (StoreFault, String)> {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let query_id = format!("{}-{attempt}", self.name);
        let bodies: Vec<_> = items.iter().map(|item| item.body.clone()).collect();
        self.counts.inserts.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        failpoint::pass("sink-before-insert");
        let inserted = self.store.insert_rows(&query_id, &bodies).await;
        failpoint::pass("sink-after-insert");
        let took_ms = begun.elapsed().as_millis() as u64;
        tracing::debug!(query_id, batches = items.len(), took_ms, done = inserted.is_ok(), "insert");
        inserted.map_err(|fault| {
            self.counts.failed_inserts.fetch_add(1, Ordering::Relaxed);
            (fault, query_id)
        })
    }

    /// Returns when an insert of unknown outcome is over, or when work is given up.
    async fn end_insert(&self, query_id: &str) {
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            match self.store.kill(query_id).await {
                Ok(()) => return,
                // Not allowed to: it ends by its own time limit, and is asked about again and again until then.
                Err(StoreFault::Exception { code: 497, text }) => {
                    tracing::warn!(query_id, text, "no right to kill an insert of our own");
                    return;
                }
                Err(fault) => {
                    tracing::warn!(query_id, %fault, "an insert of unknown outcome cannot be ended yet")
                }
            }
            if !self.stop.pause(pause.wait()).await {
                return;
            }
        }
    }

    /// One of these bodies is refused: alone, the others land.
    async fn land_apart(&self, run: &RunName, pass: u32, items: Vec<Item>) {
        for item in items {
            Box::pin(self.land(run, pass, vec![item])).await;
        }
    }
}

fn forget_certainty(items: &mut [Item]) {
    for item in items {
        item.sure_since = None;
    }
}

async fn hand_back(items: Vec<Item>, delay: Duration) {
    for item in items {
        item.delivery.nak(delay).await;
    }
}

async fn reject(items: Vec<Item>, fault: &StoreFault) {
    for item in &items {
        tracing::error!(
            subject = item.delivery.subject(),
            %fault,
            hint = "compare the table's columns with the pipeline's: `doctor` does",
            "ClickHouse refuses this batch's rows; they are kept and tried again in 60 s"
        );
    }
    hand_back(items, SET_BACK).await;
}
