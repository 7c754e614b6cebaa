//! Publishing a run: batches go out in any order, each once; then the record closes the run.
//!
//! The same command given again restores what NATS has lost since: the records, which ClickHouse keeps too, and the
//! batches.

mod batches;
mod held;

use std::time::Duration;

use millstream::names::RunName;
use millstream::{Id, MAX_BATCH_IDS};

use crate::clickhouse::store::Store;
use crate::error::{Code, Error, full_cause};
use crate::failpoint;
use crate::fleet::heartbeat;
use crate::fleet::times::{Phases, Recent};
use crate::model::build;
use crate::model::host::Doing;
use crate::model::id_digest::IdDigest;
use crate::model::input_fault::ReadFault;
use crate::model::moment::now_ms;
use crate::model::record::{PassRecord, PassState, Published, RunRecord};
use crate::nats::broker::{Broker, Written};
use crate::nats::bucket::{Change, Records};
use crate::produce::input::{Input, Survey, aside, range_in};
use crate::produce::sample::{Choice, blind_size};
use crate::retry::patiently;
use crate::seal::verify::{Repair, heal};
use crate::session::Session;
use crate::stop::Stop;
use crate::telemetry::labels::Origin;
use crate::telemetry::metrics::Metrics;

pub(crate) use batches::{Batch, Stored, look_up, publish_span};
use batches::{Tally, publish_batches};
use held::plan;

/// Phases of a producer, as indexes; phase 0 is waiting for the input.
pub(crate) const WAITING_FOR_BROKER: usize = 1;
/// How often the producer checks whether the run was cancelled.
const CANCEL_LOOK: Duration = Duration::from_secs(1);

/// A run to publish.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The name of the run.
    pub run: RunName,
    /// The ids.
    pub input: Input,
    /// The survey of the ids.
    pub survey: Survey,
    /// Ids of a batch, if the user chose a size.
    pub batch_ids: Option<u32>,
    /// The measured batch size for a new run ([`is_new`]), if the user chose none.
    pub chosen: Option<Choice>,
    /// Priority of the first pass; an existing run keeps its own.
    pub priority: i8,
    /// The pass is paused beyond so many dead letters.
    pub max_dead: Option<u64>,
    /// Rate limit: most ids that the whole fleet begins in a second.
    pub rate: Option<u32>,
    /// The metrics that count published batches.
    pub metrics: Metrics,
}

/// The result of publishing.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// The closed record.
    pub record: RunRecord,
    /// Totals of the run.
    pub published: Published,
    /// Batches that this process stored.
    pub written: u64,
    /// Batches that an earlier start had stored.
    pub found: u64,
    /// What was repaired in a run that had been published before and had lost data.
    pub repair: Option<Repair>,
}

/// Progress of publishing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Batches stored or found.
    pub batches: u64,
    /// Ids in these batches.
    pub ids: u64,
}

/// Whether no run of this name exists, so that its batch size must still be chosen.
///
/// # Errors
/// When NATS or ClickHouse does not answer.
pub async fn is_new(records: &Records, store: &Store, run: &RunName) -> Result<bool, Error> {
    Ok(records.run(run).await?.is_none() && store.run_record(run).await?.is_none())
}

/// Publishes a run, or its missing batches: after a kill, the same command resumes it.
///
/// # Errors
/// [`Error::OtherIds`] when the name belongs to other ids, [`Error::OtherBatch`] when they come in another order;
/// [`Error::InputChanged`] when the input changed after the survey: the run then stays open; [`Error::Stopped`].
pub async fn submit<I: Id>(
    session: &Session,
    submission: &Submission,
    stop: &Stop,
    progress: impl Fn(Progress),
) -> Result<Submitted, Error> {
    let Session { broker, records, store } = session;
    let run = &submission.run;
    let record = tokio::select! {
        record = open_run::<I>(records, store, submission) => record?,
        () = stop.no_more_taking() => return Err(Error::Stopped),
    };
    if is_cancelled(records, run).await? {
        return Err(Error::Cancelled { run: run.to_string() });
    }
    let before = record.published.clone();
    if let Some(published) = &before
        && is_whole(broker, run, published).await?
    {
        restore_passes(records, store, run, &record).await?;
        let found = u64::from(published.batches);
        let published = published.clone();
        return Ok(Submitted { record, published, written: 0, found, repair: None });
    }
    failpoint::pass("produce-after-record");
    if before.is_none() {
        // The pass is opened first, so that workers begin before all ids are published.
        let Submission { priority, rate, max_dead, .. } = *submission;
        let begun = PassRecord::begin(&run.pass(1), record.batch_ids, records.server_ms().await?);
        let begun = PassRecord { priority, rate, max_dead, ..begun };
        open_pass(broker, records, &begun).await?;
    }
    let tally = publish::<I>(session, submission, &record, stop, progress).await?;
    if let Some(now) = tally.other_than(&submission.survey) {
        return Err(not_surveyed(submission, now));
    }
    let Tally { written, found, .. } = tally;
    let published = tally.published(&record)?;
    failpoint::pass("produce-before-close");
    // Waits while NATS is away, until the user stops it: the same command closes the run later.
    let record = tokio::select! {
        record = patiently(run, stop, || close_run(records, run, published.clone())) => record?,
        () = stop.no_more_taking() => return Err(Error::Stopped),
    };
    failpoint::pass("produce-after-close");
    keep(store, &record).await;
    let repair = if before.is_some() {
        restore_passes(records, store, run, &record).await?;
        let pass = records.newest_pass(run).await?.map_or(1, |entry| entry.record.pass);
        Some(heal::<I>(session, &run.pass(pass)).await?)
    } else {
        None
    };
    Ok(Submitted { record, published, written, found, repair })
}

/// Publishes the batches that the stream lacks, with a heartbeat meanwhile; returns the totals.
async fn publish<I: Id>(
    session: &Session,
    submission: &Submission,
    record: &RunRecord,
    stop: &Stop,
    progress: impl Fn(Progress),
) -> Result<Tally, Error> {
    let Session { broker, records, .. } = session;
    let run = &submission.run;
    let is_again = record.published.is_some();
    let phases = Phases::new();
    let reporting = stop.child();
    let mut tally = Tally::default();
    let publishing = Box::pin(async {
        let mut plan = plan::<I>(broker, submission, record.batch_ids, is_again, stop).await?;
        tally = std::mem::take(&mut plan.tally);
        publish_batches(broker, submission, record.batch_ids, plan, &phases, stop, |batch, written| {
            tally.add(batch, written);
            submission.metrics.published(origin(written), batch.ids.ids, batch.repeats.ids);
            progress(Progress { batches: tally.written + tally.found, ids: tally.ids.ids });
        })
        .await
    });
    let publishing = async {
        let published = tokio::select! {
            published = publishing => published,
            () = cancelled(records, run) => Err(Error::Cancelled { run: run.to_string() }),
        };
        reporting.stop_taking();
        published
    };
    let (published, ()) = tokio::join!(publishing, tell(records, run, &phases, &reporting));
    submission.metrics.publishing(0);
    match published {
        Ok(()) => Ok(tally),
        Err(cancelled @ Error::Cancelled { .. }) => {
            // These batches were in flight when the run was cancelled.
            broker.purge_ids(broker.names().run_ids(run)).await?;
            Err(cancelled)
        }
        Err(Error::Input { source, .. }) if ReadFault::of(&source) == Some(&ReadFault::Changed) => {
            Err(changed::<I>(submission).await)
        }
        Err(error) => Err(error),
    }
}

/// How a batch came to be in the stream, as a label for metrics.
fn origin(written: Written) -> Origin {
    match written {
        Written::First => Origin::Published,
        Written::Already => Origin::Found,
    }
}

/// Creates the record, or finds one of the same ids: in the bucket, or in ClickHouse if the bucket has lost it.
async fn open_run<I: Id>(
    records: &Records,
    store: &Store,
    submission: &Submission,
) -> Result<RunRecord, Error> {
    let Submission { run, survey, batch_ids, chosen, .. } = submission;
    let chosen = chosen.as_ref();
    let size = batch_ids.or(chosen.map(|choice| choice.batch_ids)).unwrap_or(blind_size(survey.ids));
    let fresh = RunRecord {
        run: run.clone(),
        source: survey.source.clone(),
        fingerprint: survey.fingerprint.clone(),
        batch_ids: size.clamp(1, MAX_BATCH_IDS),
        expected_ids: Some(survey.ids),
        may_repeat: survey.may_repeat,
        created_ms: now_ms(),
        published: None,
        timing: chosen.and_then(|choice| choice.timing),
        so_far: None,
    };
    if survey.ids.div_ceil(u64::from(fresh.batch_ids)) > u64::from(u32::MAX) {
        return Err(Error::TooManyBatches { input: survey.source.clone() });
    }
    // The lookup goes first, so that resuming a run does not look like a failed write.
    if records.run(run).await?.is_none() {
        let kept = store.run_record(run).await?;
        if let Some(kept) = &kept {
            let given = RunRecord { fingerprint: spelled_as::<I>(kept, survey).await?, ..fresh.clone() };
            same_ids(kept, &given, *batch_ids)?;
            tracing::warn!(%run, code = %Code::IdsNotInStream, "NATS has forgotten the run: its record is restored from ClickHouse");
        }
        let record = kept.unwrap_or_else(|| fresh.clone());
        if records.create_run(&record).await? == Change::Made {
            keep(store, &record).await;
            return Ok(record);
        }
    }
    let existing = records.known_run(run).await?.record;
    let given = RunRecord { fingerprint: spelled_as::<I>(&existing, survey).await?, ..fresh };
    same_ids(&existing, &given, *batch_ids)?;
    keep(store, &existing).await;
    tracing::info!(%run, "the run exists and has the same ids: resuming");
    Ok(existing)
}

/// Persists the record in ClickHouse too. If that fails, publishing goes on, and a sink persists it later.
pub(crate) async fn keep(store: &Store, record: &RunRecord) {
    if let Err(error) = store.keep_run(record).await {
        tracing::warn!(
            run = %record.run,
            error = full_cause(&error),
            "the run's record was not written to ClickHouse: a sink will write it"
        );
    }
}

pub(crate) fn same_ids(existing: &RunRecord, given: &RunRecord, batch_ids: Option<u32>) -> Result<(), Error> {
    let other_batch = batch_ids.is_some_and(|batch_ids| batch_ids != existing.batch_ids);
    if existing.fingerprint == given.fingerprint && !other_batch {
        return Ok(());
    }
    let goes_on = if other_batch && existing.fingerprint == given.fingerprint {
        format!("the same without --batch, or with --batch {},", existing.batch_ids)
    } else {
        words_of(existing)
    };
    Err(Error::OtherIds {
        run: existing.run.to_string(),
        existing: described(existing, true),
        given: described(given, batch_ids.is_some()),
        goes_on,
    })
}

/// The command that made a run, as far as its record says.
fn words_of(record: &RunRecord) -> String {
    let RunRecord { run, source, .. } = record;
    let file = source.strip_prefix("file `").and_then(|rest| rest.strip_suffix('`'));
    match (range_in(source), file) {
        (Some((first, last)), _) => format!("`--ids {first}..={last} --run {run}`"),
        (_, Some(path)) => format!("`--file {path} --run {run}`, with the ids that were in it,"),
        _ if record.is_open() => format!("`produce --stdin --follow --run {run}`"),
        _ => format!("the same input ({source}) with --run {run}"),
    }
}

/// The survey's fingerprint in the form that the run's record uses: a range is named by its ends, a list by its digest.
/// Comparing a long range with a list takes a while, and happens only if both have equally many ids.
async fn spelled_as<I: Id>(record: &RunRecord, survey: &Survey) -> Result<String, Error> {
    let of_record = &record.fingerprint;
    let given = &survey.fingerprint;
    let (range, list) = match (range_in(of_record), range_in(given)) {
        (Some(range), None) => (range, given),
        (None, Some(range)) => (range, of_record),
        _ => return Ok(given.clone()),
    };
    let (first, last) = range;
    let Some(ids) = last.checked_sub(first).and_then(|more| more.checked_add(1)) else {
        return Ok(given.clone());
    };
    if !list.starts_with(&format!("{ids} ids ")) {
        return Ok(given.clone());
    }
    let digest = aside("input", move || {
        let mut ids = IdDigest::default();
        (first..=last).for_each(|number| ids.add(&I::from_number(number)));
        ids
    });
    let failed = |source| Error::Input { input: survey.source.clone(), source };
    let is_same = *list == digest.await.map_err(failed)?.to_string();
    Ok(if is_same { of_record.clone() } else { given.clone() })
}

/// The error for published ids that differ from the survey: the run stays open.
fn not_surveyed(submission: &Submission, now: String) -> Error {
    let Submission { run, input, survey, .. } = submission;
    let surveyed = survey.fingerprint.clone();
    Error::InputChanged { run: run.to_string(), input: input.shown(), surveyed, now }
}

/// The same error as [`not_surveyed`], with the input's current fingerprint.
async fn changed<I: Id>(submission: &Submission) -> Error {
    let input = submission.input.clone();
    let again = aside("input", move || input.survey_past_bad::<I>(|_, _| Ok(()))).await;
    let now = match again {
        Ok(Ok((survey, _))) => survey.fingerprint,
        Ok(Err(error)) => format!("there is a fault: failed to {}", full_cause(&error)),
        Err(error) => format!("it cannot be read: {error}"),
    };
    not_surveyed(submission, now)
}

/// Whether the stream holds every batch of a published run, none of them known to be damaged. It takes two requests,
/// however many batches there are.
async fn is_whole(broker: &Broker, run: &RunName, published: &Published) -> Result<bool, Error> {
    let stored = broker.count_ids(run).await?;
    Ok(stored == u64::from(published.batches) && broker.count_aside(run).await? == 0)
}

/// The ids in words; with their batch size if `with_batches`.
fn described(record: &RunRecord, with_batches: bool) -> String {
    let mut words = record.source.clone();
    if record.fingerprint != record.source && !record.is_open() {
        words += &format!(" ({})", record.fingerprint);
    }
    if with_batches {
        words += &format!(" in batches of {}", record.batch_ids);
    }
    words
}

/// Begins the first pass, whose batches have at most `batch_ids` ids.
pub(crate) async fn open_pass(broker: &Broker, records: &Records, begun: &PassRecord) -> Result<(), Error> {
    let pass = begun.id();
    broker.ensure_work_consumer(&pass).await?;
    if records.pass(&pass).await?.is_none() {
        records.create_pass(begun).await?;
    }
    Ok(())
}

/// Whether an operator has cancelled the run's first pass: its ids are deleted, and no others follow.
pub(crate) async fn is_cancelled(records: &Records, run: &RunName) -> Result<bool, Error> {
    let first = records.pass(&run.pass(1)).await?;
    Ok(first.is_some_and(|entry| entry.record.state == PassState::Cancelled))
}

/// Reports what this producer waits for to the fleet.
pub(crate) async fn tell(records: &Records, run: &RunName, phases: &Phases<2>, stop: &Stop) {
    let mut recent = Recent::new();
    let doing = || {
        let seconds = phases.seconds();
        let total = seconds.into();
        let recent = recent.note(seconds).0.into();
        Doing::Produce { run: run.to_string(), recent, total }
    };
    heartbeat::report(records, &build::of_this_program(""), stop, doing).await;
}

/// Resolves when an operator has cancelled the run.
pub(crate) async fn cancelled(records: &Records, run: &RunName) {
    loop {
        tokio::time::sleep(CANCEL_LOOK).await;
        if is_cancelled(records, run).await.is_ok_and(|is_cancelled| is_cancelled) {
            return;
        }
    }
}

/// Restores passes of a published run that the bucket has lost; as sealed, if ClickHouse has their seal.
async fn restore_passes(
    records: &Records,
    store: &Store,
    run: &RunName,
    record: &RunRecord,
) -> Result<(), Error> {
    let known = records.passes_of(run).await?;
    let passes = store.sealed_passes(run).await?;
    // Only if there is no other pass: an operator may have removed this one with `forget`.
    if known.is_empty() && passes.is_empty() {
        // Without a seal the sealer proves and repairs it like any running pass.
        let begun = PassRecord::begin(&run.pass(1), record.batch_ids, records.server_ms().await?);
        return records.create_pass(&begun).await.map(drop);
    }
    // The newest pass first: after a kill, the bucket then knows the pass that readers see.
    for seen in passes.into_iter().rev() {
        let is_known = known.iter().any(|record| record.pass == seen.pass);
        // A row in ClickHouse alone proves no pass, because the row may be false. A forgotten pass has neither.
        let pass = run.pass(seen.pass);
        if is_known || (!known.is_empty() && store.raw_rows(&pass).await? == 0) {
            continue;
        }
        let begun = PassRecord::begin(&pass, record.batch_ids, record.created_ms);
        let sealed = Some(seen.sealed());
        let restored = PassRecord { state: PassState::Sealed, sealed, freed: true, ..begun };
        records.create_pass(&restored).await?;
    }
    Ok(())
}

/// Writes the totals into the record. A second producer finds them there, and they must be equal.
async fn close_run(records: &Records, run: &RunName, published: Published) -> Result<RunRecord, Error> {
    loop {
        let mut entry = records.known_run(run).await?;
        if let Some(other) = &entry.record.published {
            return if other.is(published.batches.into(), published.id_digest()) {
                Ok(entry.record)
            } else {
                Err(Error::OtherIds {
                    run: run.to_string(),
                    existing: format!("{} ids in {} batches", other.ids, other.batches),
                    given: format!("{} ids in {} batches", published.ids, published.batches),
                    goes_on: words_of(&entry.record),
                })
            };
        }
        entry.record.published = Some(published.clone());
        if records.update_run(&entry).await? == Change::Made {
            return Ok(entry.record);
        }
    }
}
