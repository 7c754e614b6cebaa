//! A new pass over a run: over all of its ids, or over some of them (a partial replay). A partial replay copies
//! the rows of the other ids from the newest sealed pass, so that readers always see a complete pass.
//!
//! In a full replay, workers pull the run's own batches again. In a partial replay, ClickHouse selects the ids.
//! They are published like a run's ids, under subjects of the pass, so workers and sinks treat both alike. Once
//! those ids are computed, the sealer copies the other rows inside ClickHouse (`seal/copied.rs`). It proves the
//! pass against the run's record like any other, and then readers see it. After a kill at any point the same
//! command continues.

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::Id;
use millstream::envelope::encode_ids;
use millstream::names::{PassId, RunName};

use crate::error::Error;
use crate::failpoint;
use crate::model::record::{Covers, PassRecord, PassState, Published, RunRecord};
use crate::model::selection::Selection;
use crate::nats::broker::{Writing, Written};
use crate::nats::bucket::Change;
use crate::seal::copied::check_selected;
use crate::seal::gone::refuse;
use crate::session::Session;
use crate::stop::Stop;
use crate::telemetry::labels::Origin;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::TraceContext;

/// The most batches whose selected ids are read at once, and the most ids in them.
const READ_AT_ONCE: (u32, u32) = (64, 500_000);
/// The most batches that are being published at once.
const IN_FLIGHT: usize = 64;
/// The most ranges of batches in a record.
const RANGES: usize = 1000;

/// The result of a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// The number of the new pass.
    pub pass: u32,
    /// The number of ids that the pass computes.
    pub ids: u64,
    /// The number of batches that hold them.
    pub batches: u64,
}

/// A replay in progress.
struct Replay<'a> {
    session: &'a Session,
    run: &'a RunName,
    selection: Option<&'a Selection>,
    metrics: &'a Metrics,
    stop: &'a Stop,
}

/// Begins a pass over the selected ids of a run, or over all of them, or continues one that the same command
/// began.
///
/// # Errors
/// [`Error::PassOpen`] while the newest pass is running or paused; [`Error::IdsGone`],
/// [`Error::NothingSelected`] and similar errors before anything is written; [`Error::Stopped`]; errors of NATS
/// and ClickHouse.
pub async fn replay<I: Id>(
    session: &Session,
    run: &RunName,
    selection: Option<&Selection>,
    metrics: &Metrics,
    stop: &Stop,
) -> Result<Replayed, Error> {
    let Session { broker, records, .. } = session;
    let record = records.known_run(run).await?.record;
    let Some(published) = &record.published else {
        return Err(Error::NotPublished { run: run.to_string() });
    };
    let replay = Replay { session, run, selection, metrics, stop };
    let begun = replay.open(&record, published).await?;
    let pass = begun.id();
    failpoint::pass("replay-after-record");
    match begun.covers {
        None => {
            broker.ensure_work_consumer(&pass).await?;
            let batches = u64::from(published.batches);
            Ok(Replayed { pass: pass.pass, ids: published.ids, batches })
        }
        Some(covers) => replay.publish_selected::<I>(&pass, &covers, record.batch_ids).await,
    }
}

impl Replay<'_> {
    /// The pass that the same command began, or a new one.
    async fn open(&self, record: &RunRecord, published: &Published) -> Result<PassRecord, Error> {
        let passes = self.session.records.passes_of(self.run).await?;
        let open = || Error::PassOpen { run: self.run.to_string() };
        let newest = passes.last().ok_or_else(open)?;
        match newest.state {
            PassState::Running if self.began(newest) => return Ok(newest.clone()),
            PassState::Running | PassState::Paused => return Err(open()),
            PassState::Cancelled | PassState::Sealed => {}
        }
        let covers = match self.selection {
            None => {
                refuse(&self.session.broker, &self.session.records, record, published).await?;
                None
            }
            Some(selection) => {
                let base = passes.iter().rfind(|pass| pass.state == PassState::Sealed);
                let base = base.ok_or_else(|| Error::NeverSealed { run: self.run.to_string() })?.pass;
                Some(self.covers(base, selection, record, published).await?)
            }
        };
        // The bucket may have lost a pass whose rows still exist.
        let rows = self.session.store.newest_rows(self.run).await?;
        let pass = self.run.pass(self.session.records.next_pass(self.run).await?.max(rows + 1));
        let started_ms = self.session.records.server_ms().await?;
        let begun = PassRecord { covers, ..PassRecord::begin(&pass, record.batch_ids, started_ms) };
        // Another process was first, and may have begun the same replay.
        let _beaten = self.session.records.create_pass(&begun).await?;
        let found = self.session.records.pass(&pass).await?.ok_or_else(open)?.record;
        if self.began(&found) { Ok(found) } else { Err(open()) }
    }

    /// Whether a replay with this selection began the pass. The first pass of a run is not a replay.
    fn began(&self, pass: &PassRecord) -> bool {
        let selection = pass.covers.as_ref().map(|covers| &covers.selection);
        pass.pass > 1 && selection == self.selection
    }

    /// Checks the selection: it must be the same each time, and not empty.
    async fn covers(
        &self,
        base: u32,
        selection: &Selection,
        record: &RunRecord,
        published: &Published,
    ) -> Result<Covers, Error> {
        let run = self.run.to_string();
        let selection = selection.clone();
        let ranges = match &selection {
            Selection::Letters(_) => Vec::new(),
            Selection::Where(condition) => {
                self.session.store.check_condition(condition).await?;
                Vec::new()
            }
            Selection::Batches { end, .. } if *end > published.batches => {
                return Err(Error::NoSuchBatches { run, selection, batches: published.batches });
            }
            Selection::Batches { first, end } => vec![[*first, *end]],
            Selection::Published { since, until } => {
                // The publishing time of a batch is lost when its message is gone.
                refuse(&self.session.broker, &self.session.records, record, published).await?;
                let [since, until] = [since, until].map(|moment| moment.as_ref().map(|moment| moment.at_ms));
                let mut batches = self.session.broker.published_between(self.run, since, until).await?;
                batches.retain(|batch| *batch < published.batches);
                ranges_of(batches)
            }
        };
        if ranges.len() > RANGES {
            return Err(Error::Scattered { run, selection, ranges: ranges.len() });
        }
        let mut covers = Covers { base, selection, ranges, selected: None, ids: None };
        let selected = self.session.store.selected(self.run, &covers).await?;
        if selected.ids == 0 {
            return Err(Error::NothingSelected { run, selection: covers.selection });
        }
        covers.selected = Some(selected);
        check_selected(&self.session.store, self.run, &covers).await?;
        Ok(covers)
    }

    /// Publishes the selected ids, and marks the pass's record as published.
    async fn publish_selected<I: Id>(
        &self,
        pass: &PassId,
        covers: &Covers,
        batch_ids: u32,
    ) -> Result<Replayed, Error> {
        self.session.broker.ensure_replay_consumer(pass).await?;
        check_selected(&self.session.store, self.run, covers).await?;
        let batches = self.session.store.selected_batches(self.run, covers).await?;
        let mut ids = 0;
        let at_once = (READ_AT_ONCE.1 / batch_ids.max(1)).clamp(1, READ_AT_ONCE.0);
        for some in batches.chunks(at_once as usize) {
            ids += self.publish::<I>(pass, covers, some).await?;
        }
        failpoint::pass("replay-before-close");
        self.close(pass, ids).await?;
        Ok(Replayed { pass: pass.pass, ids, batches: batches.len() as u64 })
    }

    /// Publishes the selected ids of some batches, and returns their number.
    async fn publish<I: Id>(&self, pass: &PassId, covers: &Covers, batches: &[u32]) -> Result<u64, Error> {
        let Self { session: Session { broker, .. }, run, metrics, stop, .. } = self;
        let found = self.session.store.selected_ids(run, covers, batches).await?;
        let mut flights = FuturesUnordered::new();
        for batch in found.chunk_by(|a, b| a.0 == b.0) {
            let ids = batch.iter().map(|(_, id)| I::parse(id)).collect::<Result<Vec<I>, _>>();
            let number = batch[0].0;
            let ids =
                ids.map_err(|source| Error::StoredId { run: run.to_string(), batch: number, source })?;
            let bytes = Bytes::from(encode_ids(run.as_str(), number, &ids));
            let subject = broker.names().replay_subject(pass, number);
            let count = ids.len() as u64;
            flights.push(async move {
                let writing = Writing { trace: Some(TraceContext::begin()), metrics, stop };
                let written = broker.write_once(&subject, bytes, writing).await?;
                let origin = if written == Written::First { Origin::Published } else { Origin::Found };
                metrics.published(origin, count, 0);
                Ok::<_, Error>(())
            });
            if flights.len() >= IN_FLIGHT {
                flights.next().await.transpose()?;
            }
        }
        while flights.next().await.transpose()?.is_some() {}
        Ok(found.len() as u64)
    }

    /// Marks the pass's record as published. If the pass was cancelled meanwhile, the messages published since
    /// are removed.
    async fn close(&self, pass: &PassId, ids: u64) -> Result<(), Error> {
        while let Some(mut entry) = self.session.records.pass(pass).await? {
            if entry.record.state == PassState::Cancelled {
                let broker = &self.session.broker;
                broker.purge_ids(broker.names().replay_ids(pass)).await?;
                return Err(Error::Cancelled { run: self.run.to_string() });
            }
            match &mut entry.record.covers {
                Some(covers) if covers.ids.is_none() => covers.ids = Some(ids),
                _ => break,
            }
            if self.session.records.update_pass(&entry).await? == Change::Made {
                break;
            }
        }
        Ok(())
    }
}

/// Joins batches, in ascending order, into half-open ranges.
fn ranges_of(batches: Vec<u32>) -> Vec<[u32; 2]> {
    let mut ranges: Vec<[u32; 2]> = Vec::new();
    for batch in batches {
        match ranges.last_mut() {
            Some([_, end]) if *end == batch => *end = batch + 1,
            _ => ranges.push([batch, batch + 1]),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_range() {
        assert_eq!(ranges_of(vec![]), [[0; 2]; 0]);
        assert_eq!(ranges_of(vec![0, 1, 2, 5, 7, 8]), [[0, 3], [5, 6], [7, 9]]);
    }
}
