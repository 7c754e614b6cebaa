//! The seal: proof that a pass is complete, and the moment when readers see it.
//!
//! Every sink process drives passes that are done to their seal; a compare-and-set on the pass's record lets one of them say
//! so. The proof needs ClickHouse and the run's record alone: what NATS believes only decides when it is worth trying. A pass
//! that has come to rest and is not complete is repaired here, as `verify --repair` does it.
//!
//! `step.rs` decides, without I/O; `drive.rs` takes the steps of several passes at once, `take.rs` and `tidy.rs` on real
//! servers; `house.rs` keeps room in the stream beside them.

pub(crate) mod copied;
mod drive;
pub(crate) mod gone;
mod house;
pub(crate) mod step;
mod take;
mod tidy;
pub mod verify;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use millstream::Id;
use millstream::names::RunName;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{mpsc, watch};

use crate::clickhouse::sql::SeenPass;
use crate::clickhouse::store::{Store, Stored};
use crate::error::{Error, StoreFault};
use crate::failpoint;
use crate::model::record::{PassRecord, PassState, Published, Sealed};
use crate::nats::broker::Broker;
use crate::nats::bucket::{Change, Entry, Records};
use crate::nats::pass_watch;
use crate::sink::{SinkCounts, Waits};
use crate::stop::Stop;
use drive::{Changes, Drive};
use step::Seen;
use take::Carried;

/// How long tasks beside the passes may take to end.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);
/// Changes of runs that are remembered while steps are chosen.
const RUNS_AT_ONCE: usize = 1024;

/// What a run should be, against what ClickHouse holds.
#[derive(Debug, Clone)]
pub struct Proof {
    /// What was published.
    pub published: Published,
    /// What is stored.
    pub stored: Stored,
}

impl Proof {
    /// Asks ClickHouse.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn take(
        store: &Store,
        run: &RunName,
        pass: u32,
        published: &Published,
        may_repeat: bool,
    ) -> Result<Self, Error> {
        // Where an id may stand in two batches, one of it too many could hide that the other is missing.
        let stored = store.stored(run.as_str(), pass, true, Some(published).filter(|_| !may_repeat)).await?;
        Ok(Self { published: published.clone(), stored })
    }

    /// Whether every id of every batch is there, with the values that were computed.
    pub fn is_complete(&self) -> bool {
        let Self { published, stored } = self;
        stored.batches == u64::from(published.batches)
            && stored.ids == published.ids
            && stored.digest == published.digest
            && stored.values.is_none_or(|values| values.at_fault == 0)
    }

    /// Batches whose values cannot be proven, if there are any.
    pub fn unproven(&self) -> Option<u64> {
        self.stored.values.map(|values| values.unproven).filter(|batches| *batches > 0)
    }

    /// Whether, besides, none is there twice, and the figures are of one moment.
    pub fn is_clean(&self) -> bool {
        self.is_complete() && self.stored.raw_duplicates == 0 && !self.stored.is_moving
    }
}

/// What is announced of a sealed pass.
#[derive(Debug, Serialize)]
struct Announcement<'a> {
    run: &'a str,
    pass: u32,
    ids: u64,
    #[serde(flatten)]
    sealed: &'a Sealed,
}

#[derive(Clone)]
struct Sealer {
    broker: Broker,
    store: Store,
    records: Records,
    counts: Arc<SinkCounts>,
}

/// Seals passes as they complete, until taking stops. The sink that has the same `counts` is told when a pass's workers are done,
/// so that its last rows do not wait for more, and tells when they have landed; what keeps passes from their seal is noted there.
///
/// # Errors
/// When the bucket cannot be read at the start; afterwards failures are waited out.
pub async fn seal_passes<I: Id>(
    broker: &Broker,
    store: &Store,
    counts: Arc<SinkCounts>,
    stop: &Stop,
) -> Result<(), Error> {
    let records = broker.records().await?;
    let open = pass_watch::follow_to_seal(&records, stop).await?;
    let sealer = Sealer { broker: broker.clone(), store: store.clone(), records, counts };
    let (told, standings) = watch::channel(HashMap::new());
    let (named, runs) = mpsc::channel(RUNS_AT_ONCE);
    stop.spawn(house::make_room(sealer.clone(), stop.clone()));
    stop.spawn(house::sweep(sealer.clone(), stop.clone()));
    stop.spawn(house::survey(sealer.clone(), open.clone(), told, stop.clone()));
    stop.spawn(house::watch_runs(sealer.clone(), named, stop.clone()));
    Drive::<I>::new(&sealer).run(Changes { open, standings, runs }, stop).await;
    stop.finished(LEAVE_WITHIN).await;
    Ok(())
}

impl Sealer {
    fn waits(&self) -> &Waits {
        &self.counts.waits
    }

    /// Makes a proven pass visible. Readers first: should this process die then, the next one proves again and writes the same
    /// row.
    async fn show(&self, run: &RunName, pass: u32, carried: &mut Carried) -> Result<Seen, Error> {
        let Some(Proof { published, stored }) = &carried.proof else { return Ok(Seen::Beaten) };
        let (summary, summary_fault) = Box::pin(self.sum_up(run, pass)).await?;
        let builds = self.store.build_names(run.as_str(), pass).await?;
        let may_repeat = carried.may_repeat();
        let repeated_ids = if may_repeat { self.store.repeated_ids(run.as_str(), pass).await? } else { 0 };
        // By the one clock: of two rows of a pass, readers have the later.
        let (rows, dead, at_ms) = (stored.ids, stored.dead, self.records.server_ms().await?);
        let sealed = Sealed { rows, dead, repeated_ids, at_ms, summary, summary_fault, builds };
        // What readers are about to see they see through views that have the columns of today.
        self.store.try_follow_views().await;
        let seen = SeenPass::of(pass, published, &sealed);
        let statement = self.store.tables().insert_pass(run.as_str(), &seen);
        // A pass that was cancelled meanwhile may have been taken from readers for the last time.
        let is_as_before =
            self.records.pass(run, pass).await?.map(|entry| entry.revision) == carried.revision();
        if !is_as_before {
            return Ok(Seen::Beaten);
        }
        failpoint::pass("seal-before-row");
        self.store.write("make a sealed pass visible", &statement).await?;
        failpoint::pass("seal-after-row");
        carried.sealed = Some(sealed);
        Ok(Seen::Shown)
    }

    /// Only a pass that is as it was before its proof is sealed.
    async fn mark(&self, run: &RunName, mut entry: Entry<PassRecord>, sealed: Sealed) -> Result<Seen, Error> {
        let (pass, rows, dead) = (entry.record.pass, sealed.rows, sealed.dead);
        entry.record.state = PassState::Sealed;
        entry.record.sealed = Some(sealed);
        (entry.record.repair, entry.record.unsealed) = (None, false);
        if self.records.update_pass(&entry, run).await? == Change::Beaten {
            return self.take_back_if_cancelled(run, pass).await.map(|()| Seen::Beaten);
        }
        self.waits().clear(run, pass);
        tracing::info!(%run, pass, ids = rows, dead, "sealed");
        Ok(Seen::Marked)
    }

    /// A pass that was cancelled while it was proven is not for readers. Of any other the next proof writes the same row.
    async fn take_back_if_cancelled(&self, run: &RunName, pass: u32) -> Result<(), Error> {
        match self.records.pass(run, pass).await? {
            Some(entry) if entry.record.state == PassState::Cancelled => {
                self.store.hide(run.as_str(), Some(pass)).await
            }
            _ => Ok(()),
        }
    }

    /// What the pipeline's summary says of the pass, or why it says nothing: one that fails keeps nothing from being sealed.
    async fn sum_up(&self, run: &RunName, pass: u32) -> Result<(Option<Vec<Value>>, Option<String>), Error> {
        let mut summed = self.store.summary(run.as_str(), pass).await;
        // Without an answer it is asked once more: the server may have been away for another reason.
        if matches!(&summed, Err(Error::Summary { source }) if !matches!(source, StoreFault::Exception { .. }))
        {
            self.store.version().await?;
            summed = self.store.summary(run.as_str(), pass).await;
        }
        match summed {
            Ok(summary) => Ok((summary, None)),
            Err(Error::Summary { source: fault }) => {
                tracing::error!(%run, pass, %fault, hint = "mend the SQL in the pipeline's `SUMMARY`",
                    "the pipeline's SUMMARY failed; the pass is sealed without it");
                Ok((None, Some(fault.to_string())))
            }
            Err(error) => Err(error),
        }
    }
}
