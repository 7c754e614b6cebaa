//! Where a run stands.

use millstream::names::RunName;
use serde::Serialize;

use crate::broker::Broker;
use crate::error::Error;
use crate::records::{PassRecord, PassState, Records, RunRecord, now_ms};
use crate::store::Store;
use crate::tables::Letters;

/// A run and its newest pass at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The run.
    pub run: String,
    /// Its newest pass.
    pub pass: u32,
    /// `publishing`, `running` or `sealed`.
    pub state: &'static str,
    /// What it is made of.
    pub source: String,
    /// Batches: once published as they are, before as the number of ids lets expect.
    pub batches: u64,
    /// Ids: all of them once published, else those that the input announced.
    pub ids: u64,
    /// Ids whose row is stored.
    pub done: u64,
    /// How many of those are dead letters.
    pub dead: u64,
    /// Batches that workers hold.
    pub in_flight: u64,
    /// Batches that nobody has taken yet.
    pub pending: u64,
    /// Batches, of those in flight, that were delivered more than once.
    pub redelivered: u64,
    /// Computed batches, of all runs, that sinks have not stored yet.
    pub to_store: u64,
    /// Rows stored a second on average since the pass began.
    pub ids_per_second: f64,
    /// Seconds that the rest takes at that rate; `null` while nothing is done.
    pub eta_seconds: Option<f64>,
    /// Seconds since the pass began, or that it took.
    pub seconds: f64,
}

/// Reads a run's status. Costs a few requests, however large the run.
///
/// # Errors
/// [`Error::NoSuchRun`]; the broker's and ClickHouse's.
pub async fn status(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
) -> Result<Status, Error> {
    let record = records.known_run(run).await?.record;
    let pass = records.newest_pass(run).await?.map(|entry| entry.record);
    let number = pass.as_ref().map_or(1, |pass| pass.pass);
    let workers = broker.work_progress(run, number).await?;
    let sinks = broker.sink_progress().await?;
    let mut status = begin(&record, pass.as_ref());
    if let Some(info) = workers {
        status.in_flight = info.num_ack_pending as u64;
        status.pending = info.num_pending;
        status.redelivered = info.num_redelivered as u64;
    }
    status.to_store = sinks.map_or(0, |info| info.num_pending + info.num_ack_pending as u64);
    if pass.as_ref().is_none_or(|pass| pass.sealed.is_none()) {
        // Raw duplicates, which only FINAL would fold, must not show as more than all.
        let rows = store.raw_rows(run.as_str(), number).await?;
        if record.is_open() && record.published.is_none() {
            // What there will be nobody knows.
            status.ids = rows;
        }
        status.done = rows.min(status.ids);
        status.dead = store.dead_rows(run.as_str(), number, &Letters::default()).await?;
    }
    status.rate();
    if record.is_open() && record.published.is_none() {
        status.eta_seconds = None;
    }
    Ok(status)
}

fn begin(record: &RunRecord, pass: Option<&PassRecord>) -> Status {
    let published = record.published.as_ref();
    let sealed = pass.and_then(|pass| pass.sealed.as_ref());
    let started = pass.map_or(record.created_ms, |pass| pass.started_ms);
    let expected = record.expected_ids.unwrap_or(0);
    let ended = sealed.map_or_else(now_ms, |sealed| sealed.at_ms);
    Status {
        run: record.run.clone(),
        pass: pass.map_or(1, |pass| pass.pass),
        state: match (published, pass.map(|pass| pass.state)) {
            (_, Some(PassState::Sealed)) => "sealed",
            (None, _) => "publishing",
            (Some(_), _) => "running",
        },
        source: record.source.clone(),
        batches: published
            .map_or(expected.div_ceil(u64::from(record.batch_ids)), |published| u64::from(published.batches)),
        ids: published.map_or(expected, |published| published.ids),
        done: sealed.map_or(0, |sealed| sealed.rows),
        dead: sealed.map_or(0, |sealed| sealed.dead),
        in_flight: 0,
        pending: 0,
        redelivered: 0,
        to_store: 0,
        ids_per_second: 0.0,
        eta_seconds: None,
        seconds: ended.saturating_sub(started) as f64 / 1000.0,
    }
}

impl Status {
    fn rate(&mut self) {
        if self.done > 0 && self.seconds > 0.0 {
            self.ids_per_second = self.done as f64 / self.seconds;
            let left = self.ids.saturating_sub(self.done) as f64;
            self.eta_seconds = Some(if self.state == "sealed" { 0.0 } else { left / self.ids_per_second });
        }
    }
}
