//! Repairs what a report found: rows of batches at fault are removed, and the batches computed again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use millstream::Id;
use millstream::names::PassId;
use serde::Serialize;

use super::landing::{not_acked, open};
use super::{LISTED, Landing, Report, examine, landing, seen};
use crate::clickhouse::store::Store;
use crate::error::{Error, full_cause};
use crate::failpoint;
use crate::model::moment::now_ms;
use crate::model::record::{PassRecord, PassState};
use crate::nats::broker::{Broker, RowsMessage};
use crate::nats::bucket::{Change, Entry, Records};
use crate::session::Session;

/// How long the claim of a repair holds without a change of the pass's record, because the repair may have
/// died.
const LEASE: Duration = Duration::from_secs(30);

/// How a repair treats rows that are computed and not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unstored {
    /// Waits for them: no row counts as lost while a sink may still store it.
    Wait,
    /// Removes them and has their ids computed again, because ClickHouse refuses them and workers with another
    /// build run now.
    Recompute,
}

/// What a repair did, and what it left to an operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Repair {
    /// The number of raw duplicates that were removed.
    pub duplicates_merged: u64,
    /// The number of batches that workers compute again.
    pub batches_again: u64,
    /// Whether the whole run is computed again, because too many batches are at fault to list them. Stored rows
    /// stay.
    pub whole_run: bool,
    /// Batches whose ids are no longer in the stream: publishing the same input again restores them.
    pub ids_gone: Vec<u32>,
    /// Batches whose ids cannot be read: publishing the same input again replaces them.
    pub ids_damaged: Vec<u32>,
    /// The number of batches whose rows are in the stream and not stored: sinks receive them again.
    pub batches_handed_out: u64,
    /// Why nothing is computed again: work is still in progress.
    pub busy: Option<String>,
    /// Why nothing is computed again: ClickHouse refuses the rows, or the rows to copy are gone.
    pub stuck: Option<String>,
    /// Whether a sealed pass that readers did not see was made visible again, or its view was recreated.
    pub shown_again: bool,
    /// Passes whose rows in the table of sealed passes were wrong, and were corrected or removed.
    pub seen_mended: Vec<u32>,
}

impl Report {
    /// Whether more batches are at fault than can be listed.
    fn is_too_much(&self) -> bool {
        self.faulty() > LISTED as u64
    }

    /// Whether a repair of some batches would remove all rows of the pass from the stream.
    fn needs_all_again(&self) -> bool {
        self.is_too_much() || self.computes.is_some()
    }
}

impl Repair {
    /// How much was repaired; zero if only what readers see was changed.
    pub fn comes_to(&self) -> u64 {
        self.duplicates_merged + self.batches_again + self.batches_handed_out
    }

    /// Whether the repair did nothing and knows no reason.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// What an operator has to do.
    pub fn hint(&self, run: &str) -> Option<String> {
        if self.stuck.is_some() {
            return None;
        }
        let lost = self.ids_gone.len() + self.ids_damaged.len();
        (lost > 0).then(|| {
            format!("`produce` with the same input and --run {run} publishes the ids of these batches again")
        })
    }
}

/// Verifies a pass, and repairs what is found.
///
/// # Errors
/// The errors of [`verify`](super::verify()) and [`repair`].
pub async fn heal<I: Id>(session: &Session, pass: &PassId) -> Result<Repair, Error> {
    let Session { records, .. } = session;
    let entry = records.pass(pass).await?;
    let state = entry.as_ref().map_or(PassState::Running, |entry| entry.record.state);
    if let Some(entry) = &entry
        && is_being_repaired(records, entry).await?
    {
        return Ok(Repair { busy: Some("another repair is under way".into()), ..Repair::default() });
    }
    // Checked before the walk over all stored batches, which costs more.
    if let Err(repair) = at_rest(session, pass, state, Unstored::Wait).await? {
        return Ok(repair);
    }
    let report = examine::<I>(session, &pass.run, entry, true).await?;
    repair(session, &report, Unstored::Wait).await
}

/// Repairs what a report found. Any running worker computes the batches again; sinks seal the pass again.
///
/// If several repair at once, one claims the pass's record; the others, and sealers, leave the pass alone. A
/// killed repair leaves an incomplete running pass, which is repaired like any other a little later. A repair
/// that was paused checks its claim before it removes anything.
///
/// # Errors
/// Errors of NATS and ClickHouse. The call can be repeated at any time.
pub async fn repair(session: &Session, report: &Report, unstored: Unstored) -> Result<Repair, Error> {
    let Session { broker, store, .. } = session;
    let run = &report.run;
    let pass = report.id();
    let mut repair = Repair::default();
    if report.forgetting {
        let stuck =
            format!("the pass is being forgotten, and some of it may be gone: `forget {run}` finishes that");
        return Ok(Repair { stuck: Some(stuck), ..repair });
    }
    repair.seen_mended = correct_seen(session, report).await;
    if report.is_shown_badly() && report.is_clean() {
        // Restores the views and the row in the table of sealed passes. All rows are stored, so nothing is
        // computed.
        store.setup().await?;
        if let Some(right) = &report.seen {
            seen::show(store, run, right).await?;
        }
        return Ok(Repair { shown_again: true, ..repair });
    }
    if report.is_clean() {
        return Ok(repair);
    }
    if report.raw_duplicates > 0 {
        store.merge_away(&pass, report.rows).await?;
        repair.duplicates_merged = report.raw_duplicates;
    }
    if !report.published {
        return Ok(repair);
    }
    if let Some(gone) = &report.base_gone {
        return Ok(Repair { stuck: Some(gone.clone()), ..repair });
    }
    let acked = match at_rest(session, &pass, report.state, unstored).await? {
        Ok(acked) => acked,
        Err(Repair { busy, stuck, .. }) => return Ok(Repair { busy, stuck, ..repair }),
    };
    let todo = Todo::of(broker, &pass, report, acked).await?;
    (repair.ids_gone, repair.ids_damaged) = (report.ids_gone.clone(), report.ids_damaged.clone());
    if todo.is_nothing() {
        return Ok(repair);
    }
    if !carry_out(session, report, todo, &mut repair).await? {
        repair.busy = Some("another repair was faster".into());
    }
    Ok(repair)
}

/// Corrects wrong rows in the table of sealed passes, and returns their passes.
async fn correct_seen(Session { records, store, .. }: &Session, report: &Report) -> Vec<u32> {
    let run = &report.run;
    let mut corrected = Vec::new();
    for fault in &report.seen_faults {
        match seen::mend(records, store, run, fault).await {
            Ok(true) => corrected.push(fault.pass),
            Ok(false) => {}
            // Lost rows are repaired all the same.
            Err(error) => {
                tracing::warn!(%run, pass = fault.pass, error = full_cause(&error), hint = error.hint(),
                "the pass's row in the table of sealed passes could not be corrected")
            }
        }
    }
    corrected
}

/// The batches that a repair treats.
struct Todo {
    /// Batches to compute again.
    again: Vec<u32>,
    /// Batches whose rows are removed first.
    wrong: Vec<u32>,
    /// Batches whose rows the stream holds and no sink stored: they are delivered again.
    unstored: Vec<(u32, Vec<RowsMessage>)>,
}

impl Todo {
    /// Plans the repair of what a report found. `acked` is the sequence below which every message is acked, if
    /// some above it may not be.
    async fn of(broker: &Broker, pass: &PassId, report: &Report, acked: Option<u64>) -> Result<Self, Error> {
        let lacking = report.missing.iter().chain(&report.short).copied().collect();
        let unstored = match acked {
            Some(acked) => not_acked(broker, pass, lacking, acked).await?,
            None => Vec::new(),
        };
        let is_unstored = |batch: &u32| unstored.iter().any(|(unstored, _)| unstored == batch);
        let mut again: Vec<u32> =
            report.named().filter(|batch| report.has_ids(*batch) && !is_unstored(batch)).collect();
        if !unstored.is_empty() && report.needs_all_again() {
            // Computing again would remove these rows. The rest is left to the next repair.
            again.clear();
        }
        // The rows of a wrong batch stay while its ids are missing, because nothing else is left of it.
        let wrong = report.wrong.iter().copied();
        let wrong = wrong.filter(|batch| report.is_beyond(*batch) || report.has_ids(*batch)).collect();
        Ok(Self { again, wrong, unstored })
    }

    fn is_nothing(&self) -> bool {
        self.again.is_empty() && self.wrong.is_empty() && self.unstored.is_empty()
    }
}

/// Carries the plan out, under a claim on the pass's record; `false` if another repair has the claim.
async fn carry_out(
    session: &Session,
    report: &Report,
    todo: Todo,
    repair: &mut Repair,
) -> Result<bool, Error> {
    let Session { broker, records, store } = session;
    let pass = report.id();
    let Some(claim) = claim(records, &pass, report).await? else { return Ok(false) };
    failpoint::pass("repair-after-claim");
    if !holds(records, &pass, claim).await? {
        return Ok(false);
    }
    remove_wrong(broker, store, report, &todo.wrong).await?;
    if !holds(records, &pass, claim).await? {
        return Ok(false);
    }
    compute_again(broker, report, &todo.again, repair).await?;
    for (_, messages) in todo.unstored {
        for message in messages {
            broker.hand_out_again(message).await?;
        }
        repair.batches_handed_out += 1;
    }
    release(records, &pass, claim).await?;
    Ok(true)
}

/// Whether another process has claimed this pass for a repair, and may still work on it.
///
/// # Errors
/// When NATS refuses or does not answer.
pub(crate) async fn is_being_repaired(records: &Records, entry: &Entry<PassRecord>) -> Result<bool, Error> {
    if entry.record.repair.is_none() {
        return Ok(false);
    }
    let age_ms = records.server_ms().await?.saturating_sub(entry.written_ms);
    Ok(age_ms < LEASE.as_millis() as u64)
}

/// Whether nothing of a pass is on its way, so that what is not stored counts as lost. Returns the sequence
/// below which all messages are acked, if some above it may not be; otherwise the reason to wait.
async fn at_rest(
    session: &Session,
    pass: &PassId,
    state: PassState,
    unstored: Unstored,
) -> Result<Result<Option<u64>, Repair>, Error> {
    let Session { broker, .. } = session;
    let busy = |why: String| Ok(Err(Repair { busy: Some(why), ..Repair::default() }));
    if matches!(state, PassState::Paused | PassState::Cancelled) {
        return busy(format!("the pass is {state}"));
    }
    // No worker pulls from what is left of a sealed pass's consumer.
    if state != PassState::Sealed {
        let computing = broker.work_progress(pass).await?.map_or(0, |info| open(&info));
        if computing > 0 {
            return busy(format!("{computing} batches are still to be computed"));
        }
    }
    if unstored == Unstored::Recompute {
        return Ok(Ok(None));
    }
    match landing(session, pass).await? {
        Landing::Over => Ok(Ok(None)),
        Landing::Settled { acked } => Ok(Ok(Some(acked))),
        Landing::UnderWay(why) => busy(why),
        Landing::Left(why) => {
            let run = &pass.run;
            let stuck = format!(
                "{why}. They are redelivered automatically, and stored once the table accepts them; if the build is at fault: deploy \
                 a fixed one to the workers, then `verify {run} --repair --recompute`"
            );
            Ok(Err(Repair { stuck: Some(stuck), ..Repair::default() }))
        }
    }
}

/// Claims the pass in one step: it becomes a running pass under repair. Returns the claim; `None` if the record
/// has changed since the report, or another repair has the claim.
async fn claim(records: &Records, pass: &PassId, report: &Report) -> Result<Option<u64>, Error> {
    // Unique, because the system seeds each `RandomState`.
    let claim = RandomState::new().hash_one(now_ms());
    let change = match records.pass(pass).await? {
        Some(mut entry) => {
            if Some(entry.revision) != report.revision || is_being_repaired(records, &entry).await? {
                return Ok(None);
            }
            entry.record.unsealed |= entry.record.state == PassState::Sealed;
            entry.record.state = PassState::Running;
            entry.record.sealed = None;
            (entry.record.freed, entry.record.announced) = (false, false);
            entry.record.repair = Some(claim);
            records.update_pass(&entry).await?
        }
        None => {
            let batch_ids = records.known_run(&pass.run).await?.record.batch_ids;
            let begun = PassRecord::begin(pass, batch_ids, records.server_ms().await?);
            records.create_pass(&PassRecord { repair: Some(claim), ..begun }).await?
        }
    };
    Ok((change == Change::Made).then_some(claim))
}

/// Whether the claim still holds.
async fn holds(records: &Records, pass: &PassId, claim: u64) -> Result<bool, Error> {
    let entry = records.pass(pass).await?;
    Ok(entry.is_some_and(|entry| entry.record.repair == Some(claim)))
}

/// Releases the claim.
async fn release(records: &Records, pass: &PassId, claim: u64) -> Result<(), Error> {
    while let Some(mut entry) = records.pass(pass).await?.filter(|entry| entry.record.repair == Some(claim)) {
        entry.record.repair = None;
        if records.update_pass(&entry).await? == Change::Made {
            break;
        }
    }
    Ok(())
}

/// Removes the rows of wrong batches, because computing a batch again adds its own ids and would leave the
/// others.
async fn remove_wrong(broker: &Broker, store: &Store, report: &Report, wrong: &[u32]) -> Result<(), Error> {
    if wrong.is_empty() {
        return Ok(());
    }
    let pass = report.id();
    store.remove_batches(&pass, wrong).await?;
    for batch in wrong.iter().filter(|batch| report.is_beyond(**batch)) {
        // This message was not published by the producer.
        broker.purge_ids(broker.names().ids_subject(&pass.run, *batch)).await?;
        broker.purge_batch(&pass, *batch).await?;
    }
    Ok(())
}

/// Has batches computed again. Their ids stay in the stream: a new consumer delivers just these batches, or the
/// whole run if they cannot all be listed.
async fn compute_again(
    broker: &Broker,
    report: &Report,
    again: &[u32],
    repair: &mut Repair,
) -> Result<(), Error> {
    if again.is_empty() {
        return Ok(());
    }
    let pass = report.id();
    repair.whole_run = report.is_too_much();
    // The first worker's rows would block those of the second.
    if report.computes.is_some() {
        // Only the computed ids; the sealer copies the other rows from the base pass.
        repair.batches_again = again.len() as u64;
        broker.purge_rows(broker.names().pass_rows(&pass)).await?;
        failpoint::pass("repair-before-consumer");
        broker.remove_work_consumer(&pass).await?;
        return broker.ensure_replay_consumer(&pass).await;
    }
    if repair.whole_run {
        repair.batches_again = report.batches;
        broker.purge_rows(broker.names().pass_rows(&pass)).await?;
    } else {
        repair.batches_again = again.len() as u64;
        for batch in again {
            broker.purge_batch(&pass, *batch).await?;
        }
    }
    failpoint::pass("repair-before-consumer");
    let listed = (!repair.whole_run).then_some(again);
    broker.replace_work_consumer(&pass, listed).await?;
    failpoint::pass("repair-after-consumer");
    Ok(())
}
