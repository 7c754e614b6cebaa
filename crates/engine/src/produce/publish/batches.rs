//! Batches: cut from the input, and published, each once.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::Id;
use millstream::envelope::{EnvelopeFault, encode_ids};
use millstream::names::RunName;
use tokio::sync::mpsc;
use tracing::Instrument;

use super::held::Plan;
use super::{Submission, WAITING_FOR_BROKER};
use crate::error::Error;
use crate::failpoint;
use crate::fleet::times::Phases;
use crate::model::id_digest::IdDigest;
use crate::model::moment::now_ms;
use crate::model::record::{Published, RunRecord};
use crate::nats::broker::{Broker, Stray, Writing, Written};
use crate::nats::quarantine::fault_of_ids;
use crate::produce::input::{Cut, Cutter, Ids, Input, Survey, aside};
use crate::produce::sample::max_ids_bytes;
use crate::retry::patiently;
use crate::stop::Stop;
use crate::telemetry::trace::TraceContext;

/// Batches that may be in flight at once.
const IN_FLIGHT: usize = 64;
/// Batches that may be cut ahead of publishing.
const CUT_AHEAD: usize = 8;

/// A batch in its published form.
pub(crate) struct Batch {
    pub number: u32,
    pub ids: IdDigest,
    /// Ids that were dropped because the batch had them already.
    pub repeats: IdDigest,
    pub bytes: Bytes,
}

impl Batch {
    pub fn new<I: Id>(run: &RunName, number: u32, cut: &Cut<I>) -> Self {
        let bytes = encode_ids(run.as_str(), number, &cut.ids).into();
        Self { number, ids: IdDigest::of(&cut.ids), repeats: cut.repeats, bytes }
    }
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    pub written: u64,
    pub found: u64,
    pub ids: IdDigest,
    pub repeats: IdDigest,
}

impl Tally {
    pub fn add(&mut self, batch: &Batch, written: Written) {
        match written {
            Written::First => self.written += 1,
            Written::Already => self.found += 1,
        }
        self.ids += batch.ids;
        self.repeats += batch.repeats;
    }

    /// How the published ids differ from the survey, in words.
    pub fn other_than(&self, survey: &Survey) -> Option<String> {
        let mut all = self.ids;
        all += self.repeats;
        let same = all.ids == survey.ids && survey.digest.is_none_or(|surveyed| surveyed == all.digest);
        (!same).then(|| all.to_string())
    }

    pub fn published(self, record: &RunRecord) -> Result<Published, Error> {
        let batches = u32::try_from(self.written + self.found)
            .map_err(|_| Error::TooManyBatches { input: record.source.clone() })?;
        let IdDigest { ids, digest } = self.ids;
        Ok(Published { batches, ids, digest, dropped_repeats: self.repeats.ids, at_ms: now_ms() })
    }
}

/// Cuts ids into batches on a thread of its own, which ends with the input, or when the receiver is dropped.
pub(super) struct Cutting<I> {
    pub batches: mpsc::Receiver<Batch>,
    /// How the cutting ended.
    pub ended: Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>,
    _of: PhantomData<I>,
}

impl<I: Id> Cutting<I> {
    pub fn start(submission: &Submission, batch_ids: u32, max_bytes: usize, plan: Plan<I>) -> Self {
        let (sender, batches) = mpsc::channel(CUT_AHEAD);
        let Submission { run, input, survey, .. } = submission.clone();
        let shown = input.shown();
        let cutting = aside("input", move || {
            let cutter = Cutter::new(batch_ids, max_bytes);
            cut_batches(&run, input.ids(&survey)?, cutter, plan, &sender, &input)
        });
        let ended = async move { cutting.await.map_err(|source| Error::Input { input: shown, source })? };
        Self { batches, ended: Box::pin(ended), _of: PhantomData }
    }
}

fn cut_batches<I: Id>(
    run: &RunName,
    ids: Ids<I>,
    mut cutter: Cutter<I>,
    plan: Plan<I>,
    sender: &mpsc::Sender<Batch>,
    input: &Input,
) -> Result<(), Error> {
    let Plan { mut held, free, end, .. } = plan;
    let mut numbers = free.into_iter().chain(end..=u32::MAX);
    let mut send = |cut: Cut<I>| -> Result<bool, Error> {
        let number = numbers.next().ok_or_else(|| Error::TooManyBatches { input: input.shown() })?;
        Ok(sender.blocking_send(Batch::new(run, number, &cut)).is_ok())
    };
    for id in ids {
        let id = id?;
        if is_held(&mut held, &id) {
            continue;
        }
        if let Some(cut) = cutter.push(id)
            && !send(cut)?
        {
            return Ok(());
        }
    }
    if let Some(cut) = cutter.cut() {
        send(cut)?;
    }
    match held.len() as u64 {
        0 => Ok(()),
        ids => Err(Error::Overlap { run: run.to_string(), ids }),
    }
}

/// Whether the stream holds this id, counting each occurrence in the input.
fn is_held<I: Id>(held: &mut HashMap<I, u32>, id: &I) -> bool {
    let Some(times) = held.get_mut(id) else { return false };
    *times -= 1;
    if *times == 0 {
        held.remove(id);
    }
    true
}

pub(super) async fn publish_batches<I: Id>(
    broker: &Broker,
    submission: &Submission,
    batch_ids: u32,
    mut plan: Plan<I>,
    phases: &Phases<2>,
    stop: &Stop,
    mut done: impl FnMut(&Batch, Written),
) -> Result<(), Error> {
    let there = std::mem::take(&mut plan.there);
    let cutting = Cutting::start(submission, batch_ids, max_ids_bytes(broker.max_payload()), plan);
    let Cutting { mut batches, ended, .. } = cutting;
    let mut flights = FuturesUnordered::new();
    let mut more = true;
    while more || !flights.is_empty() {
        submission.metrics.publishing(flights.len());
        let _full = (flights.len() >= IN_FLIGHT).then(|| phases.begin(WAITING_FOR_BROKER));
        tokio::select! {
            batch = batches.recv(), if more && flights.len() < IN_FLIGHT => match batch {
                Some(batch) if there.get(batch.number as usize) == Some(&true) => done(&batch, Written::Already),
                Some(batch) => flights.push(publish_batch::<I>(broker, submission, batch, stop)),
                None => more = false,
            },
            Some(landed) = flights.next() => {
                let (batch, written) = landed?;
                done(&batch, written);
            }
            () = stop.no_more_taking() => return Err(Error::Stopped),
        }
    }
    ended.await
}

async fn publish_batch<I: Id>(
    broker: &Broker,
    submission: &Submission,
    batch: Batch,
    stop: &Stop,
) -> Result<(Batch, Written), Error> {
    let Submission { run, metrics, .. } = submission;
    let trace = TraceContext::begin();
    let writing = Writing { trace: Some(trace), metrics, stop };
    let span = publish_span(run, batch.number, trace);
    let publishing = async move {
        let written = store_batch::<I>(broker, run, &batch, writing).await?;
        tracing::debug!(ids = batch.ids.ids, ?written, "published");
        Ok((batch, written))
    };
    publishing.instrument(span).await
}

/// The span in which a batch is published.
pub(crate) fn publish_span(run: &RunName, batch: u32, trace: TraceContext) -> tracing::Span {
    tracing::debug_span!("publish", %run, batch, trace_id = %trace.trace_id())
}

async fn store_batch<I: Id>(
    broker: &Broker,
    run: &RunName,
    batch: &Batch,
    writing: Writing<'_>,
) -> Result<Written, Error> {
    let (subject, stop) = (broker.names().ids_subject(run, batch.number), writing.stop);
    loop {
        failpoint::pass("produce-before-publish");
        let written = broker.write_once(&subject, batch.bytes.clone(), writing).await?;
        failpoint::pass("produce-after-publish");
        // An earlier attempt with a lost reply stored this batch, or another producer stored a batch of this number.
        let is_there = || is_stored::<I>(broker, run, &subject, batch);
        if written == Written::First || patiently(run, stop, is_there).await? {
            return Ok(written);
        }
        if !stop.pause(Duration::from_millis(100)).await {
            return Err(Error::Stopped);
        }
    }
}

/// Whether the stream holds exactly this batch under its number.
async fn is_stored<I: Id>(
    broker: &Broker,
    run: &RunName,
    subject: &str,
    batch: &Batch,
) -> Result<bool, Error> {
    match look_up::<I>(broker, run, subject, batch.number, &batch.bytes).await? {
        Stored::Same => Ok(true),
        Stored::Nothing => Ok(false),
        Stored::Other(_) => Err(Error::OtherBatch { run: run.to_string(), batch: batch.number }),
    }
}

/// What the stream holds under a batch's subject.
pub(crate) enum Stored {
    Nothing,
    Same,
    Other(Bytes),
}

/// Compares the message under a batch's subject with these bytes. A malformed message moves to quarantine, which frees
/// the subject.
pub(crate) async fn look_up<I: Id>(
    broker: &Broker,
    run: &RunName,
    subject: &str,
    number: u32,
    bytes_of_ours: &Bytes,
) -> Result<Stored, Error> {
    let Some((sequence, bytes)) = broker.ids_message(subject).await? else { return Ok(Stored::Nothing) };
    if bytes == bytes_of_ours {
        return Ok(Stored::Same);
    }
    match fault_of_ids::<I>(run, number, &bytes) {
        None => Ok(Stored::Other(bytes)),
        Some(source @ EnvelopeFault::NewerVersion { .. }) => {
            Err(Error::Message { subject: subject.to_owned(), source })
        }
        Some(fault) => {
            let stream = broker.names().ids_stream();
            broker
                .keep_aside(&Stray { subject, stream: &stream, sequence, fault: &fault, payload: &bytes })
                .await?;
            tracing::warn!(subject, %fault, "malformed batch moved to quarantine: its ids are published again");
            broker.purge_ids(subject.to_owned()).await?;
            Ok(Stored::Nothing)
        }
    }
}
