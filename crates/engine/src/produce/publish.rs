//! Publishing a run: batches go out in any order, each once, and the record closes the run.
//!
//! The same words again bring back what the broker has lost since: the records, which ClickHouse keeps too, and the batches.

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
use crate::model::input_fault::ReadFault;
use crate::model::moment::now_ms;
use crate::model::record::{PassRecord, PassState, Published, RunRecord};
use crate::nats::broker::Broker;
use crate::nats::bucket::{Change, Records};
use crate::produce::input::{Input, Survey, aside, described as listed, range_in};
use crate::produce::sample::{Choice, blind_size};
use crate::retry::patiently;
use crate::seal::verify::{Repair, heal};
use crate::stop::Stop;

pub(crate) use batches::{Batch, Stored, digest, look_up};
use batches::{Tally, publish_batches};
use held::plan;

/// What a producer does at a moment, by the place among its phases; 0 is to wait for its input.
pub(crate) const WAITING_FOR_BROKER: usize = 1;
/// How often it is looked whether the run was cancelled.
const CANCEL_LOOK: Duration = Duration::from_secs(1);

/// A run to be published.
#[derive(Debug, Clone)]
pub struct Submission {
    /// Its name.
    pub run: RunName,
    /// Its ids.
    pub input: Input,
    /// What is known of them.
    pub survey: Survey,
    /// Ids a batch, where somebody said so.
    pub batch_ids: Option<u32>,
    /// The size to take where nobody did, and the run is new ([`is_new`]).
    pub chosen: Option<Choice>,
    /// Priority of its first pass; a run that exists keeps its own.
    pub priority: i8,
    /// Dead letters beyond which it is paused.
    pub max_dead: Option<u64>,
    /// Ids a second that the whole fleet begins at most.
    pub rate: Option<u32>,
}

/// How publishing came out.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// The closed record.
    pub record: RunRecord,
    /// What it came to.
    pub published: Published,
    /// Batches that this process stored.
    pub written: u64,
    /// Batches that were there already, from an earlier start.
    pub found: u64,
    /// What was repaired of a run that had been published before, and had lost something since.
    pub repair: Option<Repair>,
}

/// How far publishing is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Batches stored or found.
    pub batches: u64,
    /// Ids in them.
    pub ids: u64,
}

/// Whether nothing is known of a run by that name, so that the size of its batches is still to be chosen.
///
/// # Errors
/// The broker's and ClickHouse's.
pub async fn is_new(records: &Records, store: &Store, run: &RunName) -> Result<bool, Error> {
    Ok(records.run(run).await?.is_none() && store.run_record(run.as_str()).await?.is_none())
}

/// Publishes a run, or what is missing of it: killed and started again with the same words it resumes.
///
/// # Errors
/// [`Error::OtherIds`] when the name belongs to other ids, [`Error::OtherBatch`] when they come in another order;
/// [`Error::InputChanged`] when the input is no more what was surveyed: the run is then not closed; [`Error::Stopped`].
pub async fn submit<I: Id>(
    broker: &Broker,
    records: &Records,
    store: &Store,
    submission: &Submission,
    stop: &Stop,
    progress: impl Fn(Progress),
) -> Result<Submitted, Error> {
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
        let (found, published) = (u64::from(published.batches), published.clone());
        return Ok(Submitted { record, published, written: 0, found, repair: None });
    }
    failpoint::pass("produce-after-record");
    if before.is_none() {
        // Workers begin before all is published.
        let Submission { priority, rate, max_dead, .. } = *submission;
        let begun = PassRecord::begin(run, 1, record.batch_ids, records.server_ms().await?);
        let begun = PassRecord { priority, rate, max_dead, ..begun };
        open_pass(broker, records, run, &begun).await?;
    }
    let mut tally = Tally::default();
    let (phases, telling) = (Phases::new(), stop.child());
    let publishing = Box::pin(async {
        let mut plan = plan::<I>(broker, submission, record.batch_ids, before.is_some(), stop).await?;
        tally = std::mem::take(&mut plan.tally);
        publish_batches(broker, submission, record.batch_ids, plan, &phases, stop, |batch, written| {
            tally.add(batch, written);
            progress(Progress { batches: tally.written + tally.found, ids: tally.ids });
        })
        .await
    });
    let publishing = async {
        let published = tokio::select! {
            published = publishing => published,
            () = cancelled(records, run) => Err(Error::Cancelled { run: run.to_string() }),
        };
        telling.stop_taking();
        published
    };
    let (published, ()) = tokio::join!(publishing, tell(records, run, &phases, &telling));
    if matches!(published, Err(Error::Cancelled { .. })) {
        // What was on its way when the run was cancelled.
        broker.purge_ids(broker.names().run_ids(run)).await?;
    }
    match published {
        Err(Error::Input { source, .. }) if ReadFault::of(&source) == Some(&ReadFault::Changed) => {
            return Err(changed::<I>(submission).await);
        }
        published => published?,
    }
    if let Some(now) = tally.other_than(&submission.survey) {
        return Err(not_surveyed(submission, now));
    }
    let Tally { written, found, .. } = tally;
    let published = tally.published(&record)?;
    failpoint::pass("produce-before-close");
    // A broker that is away is waited for until somebody says not to: the same words close the run later.
    let record = tokio::select! {
        record = patiently(run, stop, || close_run(records, run, published.clone())) => record?,
        () = stop.no_more_taking() => return Err(Error::Stopped),
    };
    failpoint::pass("produce-after-close");
    keep(store, &record).await;
    let repair = match before {
        Some(_) => {
            restore_passes(records, store, run, &record).await?;
            let pass = records.newest_pass(run).await?.map_or(1, |entry| entry.record.pass);
            Some(heal::<I>(broker, records, store, run, pass).await?)
        }
        None => None,
    };
    Ok(Submitted { record, published, written, found, repair })
}

/// Creates the record, or finds one that was made of the same ids: in the bucket, or in ClickHouse when the bucket has
/// forgotten it.
async fn open_run<I: Id>(
    records: &Records,
    store: &Store,
    submission: &Submission,
) -> Result<RunRecord, Error> {
    let Submission { run, survey, batch_ids, chosen, .. } = submission;
    let chosen = chosen.as_ref();
    let size = batch_ids.or(chosen.map(|choice| choice.batch_ids)).unwrap_or(blind_size(survey.ids));
    let fresh = RunRecord {
        run: run.to_string(),
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
    // The lookup goes first so that a second start of a run does not look like a failed write to the broker.
    if records.run(run).await?.is_none() {
        let kept = store.run_record(run.as_str()).await?;
        if let Some(kept) = &kept {
            let given = RunRecord { fingerprint: spelled_as::<I>(kept, survey).await?, ..fresh.clone() };
            same_ids(kept, &given, *batch_ids)?;
            tracing::warn!(%run, code = %Code::IdsNotInStream, "NATS has forgotten the run: its record is restored from ClickHouse");
        }
        let record = kept.unwrap_or_else(|| fresh.clone());
        if records.create_run(&record, run).await? == Change::Made {
            keep(store, &record).await;
            return Ok(record);
        }
    }
    let existing = records.known_run(run).await?.record;
    let given = RunRecord { fingerprint: spelled_as::<I>(&existing, survey).await?, ..fresh };
    same_ids(&existing, &given, *batch_ids)?;
    keep(store, &existing).await;
    tracing::info!(%run, "the run exists and was made of the same ids: resuming");
    Ok(existing)
}

/// Keeps the record in ClickHouse too. A server that is full or away does not stop publishing: a sink keeps it later.
pub(crate) async fn keep(store: &Store, record: &RunRecord) {
    if let Err(error) = store.keep_run(record).await {
        let (run, error) = (&record.run, full_cause(&error));
        tracing::warn!(
            run,
            error,
            "the run's record is in NATS alone for now: a sink keeps it in ClickHouse, too"
        );
    }
}

pub(crate) fn same_ids(existing: &RunRecord, given: &RunRecord, batch_ids: Option<u32>) -> Result<(), Error> {
    let other_batch = batch_ids.is_some_and(|batch_ids| batch_ids != existing.batch_ids);
    if existing.fingerprint == given.fingerprint && !other_batch {
        return Ok(());
    }
    let goes_on = match other_batch && existing.fingerprint == given.fingerprint {
        true => format!("the same without --batch, or with --batch {},", existing.batch_ids),
        false => words_of(existing),
    };
    Err(Error::OtherIds {
        run: existing.run.clone(),
        existing: described(existing, true),
        given: described(given, batch_ids.is_some()),
        goes_on,
    })
}

/// The words that a run was made with, as far as its record says.
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

/// The fingerprint of what was surveyed, as the run's record would spell it: a range says by its ends which ids it holds, and a
/// list of the very same ids by their digest. A long range takes a while, and only where there are as many ids in both.
async fn spelled_as<I: Id>(record: &RunRecord, survey: &Survey) -> Result<String, Error> {
    let (of_record, given) = (&record.fingerprint, &survey.fingerprint);
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
        (first..=last).fold(0u64, |sum, number| sum.wrapping_add(I::from_number(number).sip_hash()))
    });
    let failed = |source| Error::Input { input: survey.source.clone(), source };
    let is_same = *list == listed(ids, digest.await.map_err(failed)?);
    Ok(if is_same { of_record.clone() } else { given.clone() })
}

/// What is published is not what was checked: the run stays open.
fn not_surveyed(submission: &Submission, now: String) -> Error {
    let Submission { run, input, survey, .. } = submission;
    let surveyed = survey.fingerprint.clone();
    Error::InputChanged { run: run.to_string(), input: input.shown(), surveyed, now }
}

/// The same with what the input has now.
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

/// Whether the stream holds every batch of a published run, and none of them is known to be damaged. Two questions,
/// however many batches there are.
async fn is_whole(broker: &Broker, run: &RunName, published: &Published) -> Result<bool, Error> {
    let stored = broker.count_ids(run).await?;
    Ok(stored == u64::from(published.batches) && broker.count_aside(run).await? == 0)
}

/// The ids in words; with the size of their batches where somebody chose it.
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

/// Begins the first pass, whose batches have no more ids than this.
pub(crate) async fn open_pass(
    broker: &Broker,
    records: &Records,
    run: &RunName,
    begun: &PassRecord,
) -> Result<(), Error> {
    broker.ensure_work_consumer(run, 1).await?;
    if records.pass(run, 1).await?.is_none() {
        records.create_pass(begun, run).await?;
    }
    Ok(())
}

/// Whether somebody has cancelled the pass that a run comes with: its ids are gone, and no others come.
pub(crate) async fn is_cancelled(records: &Records, run: &RunName) -> Result<bool, Error> {
    let first = records.pass(run, 1).await?;
    Ok(first.is_some_and(|entry| entry.record.state == PassState::Cancelled))
}

/// Keeps the fleet told of what this producer waits for.
pub(crate) async fn tell(records: &Records, run: &RunName, phases: &Phases<2>, stop: &Stop) {
    let mut recent = Recent::new();
    let look = || {
        let seconds = phases.seconds();
        let (total, recent) = (seconds.into(), recent.note(seconds).0.into());
        Doing::Produce { run: run.to_string(), recent, total }
    };
    heartbeat::report(records, &build::of_this_program(""), stop, look).await;
}

/// Resolves when somebody has cancelled the run.
pub(crate) async fn cancelled(records: &Records, run: &RunName) {
    loop {
        tokio::time::sleep(CANCEL_LOOK).await;
        if is_cancelled(records, run).await.is_ok_and(|is_cancelled| is_cancelled) {
            return;
        }
    }
}

/// Brings back the passes of a published run that the bucket has forgotten: sealed where ClickHouse says so.
async fn restore_passes(
    records: &Records,
    store: &Store,
    run: &RunName,
    record: &RunRecord,
) -> Result<(), Error> {
    let known = records.passes_of(run).await?;
    let passes = store.sealed_passes(run.as_str()).await?;
    // Not the first of several, which an operator may have had forgotten.
    if known.is_empty() && passes.is_empty() {
        // Without a seal it is proven, and repaired, like any running one.
        let begun = PassRecord::begin(run, 1, record.batch_ids, records.server_ms().await?);
        return records.create_pass(&begun, run).await.map(drop);
    }
    // The newest first: killed after that, what readers see is known.
    for seen in passes.into_iter().rev() {
        let is_known = known.iter().any(|record| record.pass == seen.pass);
        // A row alone makes no pass; it may be false. A forgotten pass has neither.
        if is_known || (!known.is_empty() && store.raw_rows(run.as_str(), seen.pass).await? == 0) {
            continue;
        }
        let begun = PassRecord::begin(run, seen.pass, record.batch_ids, record.created_ms);
        let sealed = Some(seen.sealed());
        let restored = PassRecord { state: PassState::Sealed, sealed, freed: true, ..begun };
        records.create_pass(&restored, run).await?;
    }
    Ok(())
}

/// Writes what was published into the record; of two producers the second finds it written, and the same.
async fn close_run(records: &Records, run: &RunName, published: Published) -> Result<RunRecord, Error> {
    loop {
        let mut entry = records.known_run(run).await?;
        if let Some(other) = &entry.record.published {
            let same = (other.batches, other.ids, other.digest)
                == (published.batches, published.ids, published.digest);
            return if same {
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
        if records.update_run(&entry, run).await? == Change::Made {
            return Ok(entry.record);
        }
    }
}
