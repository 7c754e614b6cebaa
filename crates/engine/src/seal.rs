//! The seal: proof that a pass is complete, and the moment when readers see it.
//!
//! Every sink process watches for passes that are done and proves them; a compare-and-set on the pass's record lets
//! one of them say so. The proof needs ClickHouse and the run's record alone: what NATS believes only decides when it
//! is worth trying. A pass that has come to rest and is not complete is repaired here, as `verify --repair` does it.

mod tidy;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream::Id;
use millstream::names::RunName;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::Notify;

use crate::board::{self, Open};
use crate::broker::Broker;
use crate::error::{Error, StoreFault, full_cause};
use crate::failpoint;
use crate::hosts;
use crate::records::{Change, Entry, PassRecord, PassState, Published, Records, RunRecord, Sealed, now_ms};
use crate::replay::take_over;
use crate::retry::Backoff;
use crate::stop::Stop;
use crate::store::{Store, Stored};
use crate::tables::SeenPass;
use crate::verify::{self, Repair};

/// How often passes are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How often the rows stream is looked at for what may go.
const ROOM_EVERY: Duration = Duration::from_secs(2);
/// How often records of processes that are gone are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// How long the watch on records may take to end.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);
/// A pass whose workers are done is proven after this long even if sinks are busy: with other passes, perhaps.
const PATIENCE: Duration = Duration::from_secs(20);
/// The pause after a server could not be asked.
const AFTER_ERROR: Duration = Duration::from_secs(2);
/// The pause between two looks at what is left of a cancelled pass.
const FREE_AGAIN: Duration = Duration::from_secs(2);
/// Pauses between proofs of a pass that is not complete.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Repairs of one pass that this process makes by itself; after so many a person has to look.
const REPAIRS: u32 = 5;

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
    pub async fn take(store: &Store, run: &RunName, pass: u32, published: &Published) -> Result<Self, Error> {
        let stored = store.stored(run.as_str(), pass, true).await?;
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

    /// Whether, besides, none is there twice.
    pub fn is_clean(&self) -> bool {
        self.is_complete() && self.stored.raw_duplicates == 0
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

struct Sealer {
    broker: Broker,
    store: Store,
    records: Records,
    hurry: Arc<Notify>,
}

/// A pass on its way to the seal.
struct Watch {
    drained_since: Option<Instant>,
    next_try: Instant,
    pause: Backoff,
    run_kept: bool,
    repairs: u32,
    /// Of a cancelled pass: whether the last look found no message of its ids.
    is_free: bool,
}

/// Seals passes as they complete, until taking stops. Tells a sink through `hurry` when a pass's workers are done, so
/// that its last rows do not wait for more.
///
/// # Errors
/// When the bucket cannot be read at the start; afterwards failures are waited out.
pub async fn seal_passes<I: Id>(
    broker: &Broker,
    store: &Store,
    hurry: Arc<Notify>,
    stop: &Stop,
) -> Result<(), Error> {
    let records = broker.records().await?;
    let open = board::follow(&records, stop).await?;
    let sealer = Sealer { broker: broker.clone(), store: store.clone(), records, hurry };
    let (mut watches, mut untidy) = (HashMap::new(), Vec::new());
    let (mut next_room, mut next_sweep) = (Instant::now(), Instant::now());
    while !stop.taking_stopped() {
        if Instant::now() >= next_room {
            next_room = Instant::now() + ROOM_EVERY;
            if let Err(error) = broker.make_room().await {
                tracing::warn!(error = full_cause(&error), "no room could be made in the rows stream");
            }
            Box::pin(sealer.purge_later(&mut untidy)).await;
        }
        if Instant::now() >= next_sweep {
            next_sweep = Instant::now() + SWEEP_EVERY;
            if let Err(error) = hosts::sweep(&sealer.records).await {
                tracing::debug!(error = full_cause(&error), "records of processes that are gone stay");
            }
            sealer.store.try_follow_views().await;
        }
        let passes: Open = open.borrow().clone();
        watches.retain(|key, _| passes.contains_key(key));
        for (key, pass) in passes {
            let watch = watches.entry(key.clone()).or_insert_with(Watch::new);
            let looked = match pass.state {
                PassState::Running => sealer.look::<I>(&key.0, key.1, watch, &mut untidy).await,
                PassState::Cancelled => sealer.free(&key.0, key.1, watch).await,
                PassState::Paused | PassState::Sealed => continue,
            };
            if let Err(error) = looked {
                watch.next_try = watch.next_try.max(Instant::now() + AFTER_ERROR);
                tracing::warn!(run = %key.0, pass = key.1, error = full_cause(&error), hint = error.hint(), "not sealed yet");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.no_more_taking() => break,
        }
    }
    stop.finished(LEAVE_WITHIN).await;
    Ok(())
}

impl Watch {
    fn new() -> Self {
        Self {
            drained_since: None,
            next_try: Instant::now(),
            pause: Backoff::new(PAUSE.0, PAUSE.1),
            run_kept: false,
            repairs: 0,
            is_free: false,
        }
    }

    fn set_back(&mut self) -> Duration {
        let wait = self.pause.wait();
        self.next_try = Instant::now() + wait;
        wait
    }
}

impl Sealer {
    async fn look<I: Id>(
        &self,
        run: &RunName,
        pass: u32,
        watch: &mut Watch,
        untidy: &mut Vec<(RunName, u32)>,
    ) -> Result<(), Error> {
        if Instant::now() < watch.next_try {
            return Ok(());
        }
        let record = self.records.known_run(run).await?.record;
        let Some(published) = record.published.clone() else {
            // Until all is published nothing counts as missing, so nothing else would bring it back.
            return self.broker.ensure_work_consumer(run, pass).await;
        };
        self.keep_run(&record, watch).await?;
        // Read before the proof, so that the seal cannot be that of a pass which was opened again since.
        let Some(entry) = self.records.pass(run, pass).await? else { return Ok(()) };
        if verify::is_being_repaired(&entry) {
            return Ok(());
        }
        let covers = entry.record.covers.as_ref();
        let Some(wanted) = covers.map_or(Some(published.ids), |covers| covers.ids) else {
            // Its ids are being published.
            return Ok(());
        };
        if !self.is_worth_trying(run, pass, wanted, watch).await? {
            return Ok(());
        }
        if let Some(covers) = covers {
            let taking_over = take_over(&self.store, run, pass, covers, record.batch_ids, &published);
            // Of a selection that is another each time, or a base that is gone, only a person can say what to do.
            if let Err(error) = taking_over.await {
                watch.set_back();
                return Err(error);
            }
        }
        let proof = self.prove(run, pass, &published).await?;
        if !proof.is_clean() {
            let Stored { batches, ids, raw_duplicates, .. } = proof.stored;
            let wait = watch.set_back();
            tracing::warn!(%run, pass, batches, of_batches = published.batches, ids, of_ids = published.ids,
                raw_duplicates, retry_s = wait.as_secs(), "not every id has its one row");
            self.repair::<I>(run, pass, watch).await;
            return Ok(());
        }
        if let Some(batches) = proof.unproven() {
            let wait = watch.set_back();
            tracing::warn!(%run, pass, batches, retry_s = wait.as_secs(),
                hint = "`verify RUN --values` says what is missing: `setup` of the build that computed them keeps its schema, and \
                        ALTER TABLE … ADD COLUMN brings a column back",
                "the pass is not sealed: the values of some rows cannot be proven");
            return Ok(());
        }
        let repeated_ids =
            if record.may_repeat { self.store.repeated_ids(run.as_str(), pass).await? } else { 0 };
        Box::pin(self.seal(run, entry, &proof, repeated_ids, untidy)).await
    }

    /// Has computed again what can be, and says what a person has to do about the rest.
    async fn repair<I: Id>(&self, run: &RunName, pass: u32, watch: &mut Watch) {
        if watch.repairs >= REPAIRS {
            let hint = format!("`verify {run}` names what is missing, `verify {run} --repair` tries again");
            tracing::error!(%run, pass, repairs = REPAIRS, hint, "the pass is still not complete, and is left alone");
            return;
        }
        // Boxed: the walk over a pass and its repair are more than each look should hold.
        let healing = Box::pin(verify::heal::<I>(&self.broker, &self.records, &self.store, run, pass));
        match healing.await {
            Ok(Repair { busy: Some(why), .. }) => tracing::debug!(%run, pass, why, "not repaired yet"),
            Ok(Repair { stuck: Some(why), .. }) => {
                tracing::error!(%run, pass, why, "the pass waits for what no repair brings")
            }
            // Rows landed since the proof.
            Ok(repair) if repair == Repair::default() => {}
            Ok(repair) => {
                // What has to wait for its input again is no attempt.
                watch.repairs += u32::from(repair.comes_to() > 0);
                told(run, pass, &repair);
            }
            Err(error) => {
                watch.repairs += u32::from(!error.is_nobody());
                let (error, hint) =
                    (full_cause(&error), format!("`verify {run} --repair`, by a user with more rights"));
                tracing::error!(%run, pass, error, hint, "the pass is not complete, and cannot be repaired from here");
            }
        }
    }

    /// The run's record is kept in ClickHouse from the moment it is complete: NATS is never the only truth.
    async fn keep_run(&self, record: &RunRecord, watch: &mut Watch) -> Result<(), Error> {
        if !watch.run_kept {
            self.store.keep_run(record).await?;
        }
        watch.run_kept = true;
        Ok(())
    }

    /// Whether there are rows enough; or, with too few of them, workers and sinks say that they are done with it.
    ///
    /// ClickHouse is asked only once no batch waits for a worker: until then rows are missing in any case.
    async fn is_worth_trying(
        &self,
        run: &RunName,
        pass: u32,
        wanted: u64,
        watch: &mut Watch,
    ) -> Result<bool, Error> {
        let (pending, open) = match self.broker.work_progress(run, pass).await? {
            Some(info) => (info.num_pending, info.num_ack_pending),
            None => (0, 0),
        };
        if pending > 0 {
            watch.drained_since = None;
            return Ok(false);
        }
        // What a killed worker held is open for another minute, though all of its rows may be there already.
        if self.store.raw_rows(run.as_str(), pass).await? >= wanted {
            return Ok(true);
        }
        if open > 0 {
            watch.drained_since = None;
            return Ok(false);
        }
        if watch.drained_since.is_none() {
            tracing::debug!(%run, pass, "all batches are computed");
            self.hurry.notify_one();
        }
        let since = *watch.drained_since.get_or_insert_with(Instant::now);
        let Some(sinks) = self.broker.sink_progress().await? else {
            // Somebody deleted it: made again, it delivers what the stream holds.
            return self.broker.ensure_sink_consumer().await.map(|()| false);
        };
        let landed = sinks.num_pending == 0 && sinks.num_ack_pending == 0;
        Ok(landed || since.elapsed() > PATIENCE)
    }

    /// Proves, and merges raw duplicates away if there are any.
    async fn prove(&self, run: &RunName, pass: u32, published: &Published) -> Result<Proof, Error> {
        let proof = Proof::take(&self.store, run, pass, published).await?;
        if !proof.is_complete() || proof.is_clean() {
            return Ok(proof);
        }
        tracing::warn!(%run, pass, rows = proof.stored.raw_duplicates, "raw duplicates found, merging them away");
        self.store.heal(run.as_str()).await?;
        Proof::take(&self.store, run, pass, published).await
    }

    async fn seal(
        &self,
        run: &RunName,
        entry: Entry<PassRecord>,
        proof: &Proof,
        repeated_ids: u64,
        untidy: &mut Vec<(RunName, u32)>,
    ) -> Result<(), Error> {
        let (Proof { published, stored }, pass) = (proof, entry.record.pass);
        if entry.record.state != PassState::Running {
            return Ok(());
        }
        let (summary, summary_fault) = Box::pin(self.sum_up(run, pass)).await?;
        let builds = self.store.build_names(run.as_str(), pass).await?;
        let (rows, dead, at_ms) = (stored.ids, stored.dead, now_ms());
        let sealed = Sealed { rows, dead, repeated_ids, at_ms, summary, summary_fault, builds };
        // What readers are about to see they see through views that have the columns of today.
        self.store.try_follow_views().await;
        // Readers first: should this process die now, the next one proves again and writes the same row.
        let seen = SeenPass {
            run: run.as_str(),
            pass,
            batches: published.batches,
            stored,
            repeated_ids,
            builds: &sealed.builds,
            at_ms: sealed.at_ms,
        };
        let statement = self.store.tables().insert_pass(&seen);
        failpoint::pass("seal-before-row");
        self.store.write("make a sealed pass visible", &statement).await?;
        failpoint::pass("seal-after-row");
        if self.mark_sealed(run, entry, &sealed).await? == Change::Beaten {
            return self.take_back_if_cancelled(run, pass).await;
        }
        tracing::info!(%run, pass, ids = published.ids, dead = sealed.dead, "sealed");
        let announcement = Announcement { run: run.as_str(), pass, ids: published.ids, sealed: &sealed };
        let bytes = serde_json::to_vec(&announcement).expect("names and numbers");
        let announced =
            self.broker.announce(self.broker.names().sealed_subject(run, pass), bytes.into()).await;
        failpoint::pass("seal-before-tidy");
        let tidied = self.tidy(run, pass, untidy).await;
        failpoint::pass("seal-after-tidy");
        announced.and(tidied)
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

    /// Only a pass that is as it was before its proof is sealed.
    async fn mark_sealed(
        &self,
        run: &RunName,
        mut entry: Entry<PassRecord>,
        sealed: &Sealed,
    ) -> Result<Change, Error> {
        entry.record.state = PassState::Sealed;
        entry.record.sealed = Some(sealed.clone());
        entry.record.repair = None;
        self.records.update_pass(&entry, run).await
    }
}

fn told(run: &RunName, pass: u32, repair: &Repair) {
    let Repair {
        batches_again, batches_handed_out, duplicates_merged, whole_run, ids_gone, ids_damaged, ..
    } = repair;
    if repair.comes_to() > 0 {
        tracing::warn!(%run, pass, batches_again, batches_handed_out, whole_run, duplicates_merged,
            "repaired what was not complete");
    }
    if let Some(hint) = repair.hint(run.as_str()) {
        tracing::error!(%run, pass, ids_gone = ids_gone.len(), ids_damaged = ids_damaged.len(), hint,
            "batches are missing whose ids are not in the stream");
    }
}
