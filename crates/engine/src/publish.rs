//! Publishing a run: batches go out in any order, each once, and the record closes the run.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::envelope::encode_ids;
use millstream::names::RunName;
use millstream::{Id, MAX_BATCH_IDS};
use tokio::sync::mpsc;

use crate::broker::{Broker, Written};
use crate::error::Error;
use crate::failpoint;
use crate::records::{Change, PassRecord, PassState, Published, Records, RunRecord, now_ms};
use crate::source::{Cut, Cutter, Input, Survey};
use crate::stop::Stop;

/// Batches on their way at once.
const IN_FLIGHT: usize = 64;
/// Batches cut ahead of publishing.
const CUT_AHEAD: usize = 8;
/// Ids of one batch take no more than this in a message, whatever the server allows: workers hold several.
const MAX_BATCH_BYTES: usize = 512 << 10;

/// Ids that a batch has at most unless the user says otherwise.
const USUAL_BATCH_IDS: u64 = 10_000;
/// Batches that a run has at least, ids permitting: what a fleet can share.
const USUAL_BATCHES: u64 = 256;

/// A run to be published.
#[derive(Debug, Clone)]
pub struct Submission {
    /// Its name.
    pub run: RunName,
    /// Its ids.
    pub input: Input,
    /// What is known of them.
    pub survey: Survey,
    /// Ids a batch; `None` takes the existing run's, or the default.
    pub batch_ids: Option<u32>,
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
}

/// How far publishing is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Batches stored or found.
    pub batches: u64,
    /// Ids in them.
    pub ids: u64,
}

/// Publishes a run, or what is missing of it: killed and started again with the same words it resumes.
///
/// # Errors
/// [`Error::OtherIds`] and [`Error::OtherBatch`] when the name belongs to other ids; [`Error::Stopped`].
pub async fn submit<I: Id>(
    broker: &Broker,
    records: &Records,
    submission: &Submission,
    stop: &Stop,
    progress: impl Fn(Progress),
) -> Result<Submitted, Error> {
    let record = open_run(records, submission).await?;
    if let Some(published) = record.published.clone() {
        let found = u64::from(published.batches);
        return Ok(Submitted { record, published, written: 0, found });
    }
    failpoint::pass("produce-after-record");
    open_pass(broker, records, &submission.run, &record).await?;
    let mut tally = Tally::default();
    publish_batches::<I>(broker, submission, record.batch_ids, stop, |batch, written| {
        tally.add(batch, written);
        progress(Progress { batches: tally.written + tally.found, ids: tally.ids });
    })
    .await?;
    let Tally { written, found, .. } = tally;
    let published = tally.published(&record)?;
    failpoint::pass("produce-before-close");
    let record = close_run(records, &submission.run, published.clone()).await?;
    failpoint::pass("produce-after-close");
    Ok(Submitted { record, published, written, found })
}

/// Creates the record, or finds one that was made of the same ids.
async fn open_run(records: &Records, submission: &Submission) -> Result<RunRecord, Error> {
    let Submission { run, survey, batch_ids, .. } = submission;
    let fresh = RunRecord {
        run: run.to_string(),
        source: survey.source.clone(),
        fingerprint: survey.fingerprint.clone(),
        batch_ids: batch_ids.unwrap_or_else(|| usual_batch(survey.ids)).clamp(1, MAX_BATCH_IDS),
        expected_ids: Some(survey.ids),
        may_repeat: survey.may_repeat,
        created_ms: now_ms(),
        published: None,
    };
    if survey.ids.div_ceil(u64::from(fresh.batch_ids)) > u64::from(u32::MAX) {
        return Err(Error::TooManyBatches { input: survey.source.clone() });
    }
    // The lookup goes first so that a second start of a run does not look like a failed write to the broker.
    if records.run(run).await?.is_none() && records.create_run(&fresh, run).await? == Change::Made {
        return Ok(fresh);
    }
    let existing = records.known_run(run).await?.record;
    let other_batch = batch_ids.is_some_and(|batch_ids| batch_ids != existing.batch_ids);
    if existing.fingerprint != fresh.fingerprint || other_batch {
        return Err(Error::OtherIds {
            run: run.to_string(),
            existing: described(&existing, true),
            given: described(&fresh, batch_ids.is_some()),
        });
    }
    tracing::info!(run = %run, "the run exists and was made of the same ids: resuming");
    Ok(existing)
}

/// Batches large enough to cost nothing, and small enough that a short run of heavy ids is shared.
fn usual_batch(ids: u64) -> u32 {
    (ids / USUAL_BATCHES).clamp(1, USUAL_BATCH_IDS) as u32
}

/// The ids in words; with the size of their batches where somebody chose it.
fn described(record: &RunRecord, with_batches: bool) -> String {
    let mut words = record.source.clone();
    if record.fingerprint != record.source {
        words += &format!(" ({})", record.fingerprint);
    }
    if with_batches {
        words += &format!(" in batches of {}", record.batch_ids);
    }
    words
}

/// Lets workers begin before all is published.
async fn open_pass(
    broker: &Broker,
    records: &Records,
    run: &RunName,
    record: &RunRecord,
) -> Result<(), Error> {
    if records.pass(run, 1).await?.is_some() {
        return Ok(());
    }
    broker.ensure_work_consumer(run, 1).await?;
    let pass = PassRecord {
        run: run.to_string(),
        pass: 1,
        state: PassState::Running,
        batch_ids: record.batch_ids,
        started_ms: now_ms(),
        sealed: None,
    };
    records.create_pass(&pass, run).await.map(drop)
}

struct Batch {
    number: u32,
    ids: u64,
    repeats: u64,
    digest: u64,
    bytes: Bytes,
}

#[derive(Debug, Default)]
struct Tally {
    written: u64,
    found: u64,
    ids: u64,
    repeats: u64,
    digest: u64,
}

impl Tally {
    fn add(&mut self, batch: &Batch, written: Written) {
        match written {
            Written::First => self.written += 1,
            Written::Already => self.found += 1,
        }
        self.ids += batch.ids;
        self.repeats += batch.repeats;
        self.digest = self.digest.wrapping_add(batch.digest);
    }

    fn published(self, record: &RunRecord) -> Result<Published, Error> {
        let batches = u32::try_from(self.written + self.found)
            .map_err(|_| Error::TooManyBatches { input: record.source.clone() })?;
        let (ids, digest, dropped_repeats) = (self.ids, self.digest, self.repeats);
        Ok(Published { batches, ids, digest, dropped_repeats, at_ms: now_ms() })
    }
}

async fn publish_batches<I: Id>(
    broker: &Broker,
    submission: &Submission,
    batch_ids: u32,
    stop: &Stop,
    mut done: impl FnMut(&Batch, Written),
) -> Result<(), Error> {
    let max_bytes = MAX_BATCH_BYTES.min(broker.max_payload() / 2);
    let (sender, mut batches) = mpsc::channel(CUT_AHEAD);
    let (run, input) = (submission.run.clone(), submission.input.clone());
    let cutting = tokio::task::spawn_blocking(move || {
        let cutter = Cutter::<I>::new(batch_ids, max_bytes);
        cut_batches(&run, &input, cutter, &sender)
    });
    let mut flights = FuturesUnordered::new();
    loop {
        tokio::select! {
            batch = batches.recv(), if flights.len() < IN_FLIGHT => match batch {
                Some(batch) => flights.push(publish_batch(broker, &submission.run, batch, stop)),
                None => break,
            },
            Some(landed) = flights.next() => {
                let (batch, written) = landed?;
                done(&batch, written);
            }
            () = stop.no_more_taking() => return Err(Error::Stopped),
        }
    }
    while let Some(landed) = flights.next().await {
        let (batch, written) = landed?;
        done(&batch, written);
    }
    cutting
        .await
        .map_err(|panic| Error::Broker { doing: "cut the ids into batches".into(), source: panic.into() })?
}

/// Runs on a thread of its own. A receiver that is gone ends it.
fn cut_batches<I: Id>(
    run: &RunName,
    input: &Input,
    mut cutter: Cutter<I>,
    sender: &mpsc::Sender<Batch>,
) -> Result<(), Error> {
    let mut numbers = 0u32..=u32::MAX;
    let mut send = |cut: Cut<I>| -> Result<bool, Error> {
        let number = numbers.next().ok_or_else(|| Error::TooManyBatches { input: input.shown() })?;
        let digest = cut.ids.iter().fold(0u64, |sum, id| sum.wrapping_add(id.sip_hash()));
        let bytes = encode_ids(run.as_str(), number, &cut.ids).into();
        let batch = Batch { number, ids: cut.ids.len() as u64, repeats: cut.repeats, digest, bytes };
        Ok(sender.blocking_send(batch).is_ok())
    };
    for id in input.ids::<I>()? {
        if let Some(cut) = cutter.push(id?)
            && !send(cut)?
        {
            return Ok(());
        }
    }
    if let Some(cut) = cutter.cut() {
        send(cut)?;
    }
    Ok(())
}

async fn publish_batch(
    broker: &Broker,
    run: &RunName,
    batch: Batch,
    stop: &Stop,
) -> Result<(Batch, Written), Error> {
    let subject = broker.names().ids_subject(run, batch.number);
    loop {
        failpoint::pass("produce-before-publish");
        let written = broker.write_once(&subject, batch.bytes.clone(), stop).await?;
        failpoint::pass("produce-after-publish");
        if written == Written::First {
            return Ok((batch, written));
        }
        // Somebody stored a batch of that number: an earlier start of this run, or a run of other ids.
        match broker.ids_message(&subject).await? {
            Some((_, bytes)) if bytes == batch.bytes => return Ok((batch, written)),
            Some(_) => return Err(Error::OtherBatch { run: run.to_string(), batch: batch.number }),
            // Purged between the two questions: it is to be stored after all.
            None => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
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
                })
            };
        }
        entry.record.published = Some(published.clone());
        if records.update_run(&entry, run).await? == Change::Made {
            return Ok(entry.record);
        }
    }
}
