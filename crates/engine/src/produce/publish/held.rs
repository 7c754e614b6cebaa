//! What the stream already holds of a run, and what is left to publish.
//!
//! The producer checks all of the stream before it writes anything. Otherwise, if the ids came in another order this
//! time, batches of both orders would lie side by side, with some ids twice.

use std::collections::HashMap;

use futures_util::stream::FuturesUnordered;
use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::Id;
use millstream::envelope::decode_ids;

use super::Submission;
use super::batches::{Batch, Cutting, Stored, Tally, look_up};
use crate::error::Error;
use crate::model::id_digest::IdDigest;
use crate::nats::broker::{Broker, Written};
use crate::produce::sample::max_ids_bytes;
use crate::retry::patiently;
use crate::stop::Stop;
use crate::telemetry::labels::Origin;

/// Batches that are read concurrently.
const READ_AT_ONCE: usize = 32;
/// Most bytes of ids kept in memory to find each id, if they come in another order than before.
const MOST_BYTES: usize = 256 << 20;

/// What is left to publish of a run.
pub(super) struct Plan<I> {
    /// Whether the stream holds each batch, as the input is cut now.
    pub there: Vec<bool>,
    /// Ids that the stream holds in batches of another order, and how often.
    pub held: HashMap<I, u32>,
    /// Free numbers below `end`.
    pub free: Vec<u32>,
    /// The first number after all stored batches.
    pub end: u32,
    /// Totals of the stored batches.
    pub tally: Tally,
}

impl<I> Plan<I> {
    /// A plan that publishes all batches except those in `there`, cut in the order of the input.
    fn all(there: Vec<bool>) -> Self {
        Self { there, held: HashMap::new(), free: Vec::new(), end: 0, tally: Tally::default() }
    }
}

/// Checks everything that the stream holds of the run. A `closed` run may have rows that name its batches, so lost
/// batches may only be replaced by identical ones.
///
/// # Errors
/// [`Error::OtherBatch`] if the ids come in another order and the producer cannot adapt; [`Error::Stopped`].
pub(super) async fn plan<I: Id>(
    broker: &Broker,
    submission: &Submission,
    batch_ids: u32,
    closed: bool,
    stop: &Stop,
) -> Result<Plan<I>, Error> {
    let run = &submission.run;
    let Some(last) = patiently(run, stop, || broker.last_batch(run)).await? else {
        return Ok(Plan::all(Vec::new()));
    };
    match check::<I>(broker, submission, batch_ids, last, stop).await {
        Err(Error::OtherBatch { .. }) if !closed => {
            tracing::warn!(%run, "the ids come in another order than before: reading the published ids back, to publish only the others");
            read_back(broker, submission, last, stop).await
        }
        checked => Ok(Plan::all(checked?)),
    }
}

/// Which of the batches up to `last` the stream holds; [`Error::OtherBatch`] when one of them is a different batch.
async fn check<I: Id>(
    broker: &Broker,
    submission: &Submission,
    batch_ids: u32,
    last: u32,
    stop: &Stop,
) -> Result<Vec<bool>, Error> {
    let run = &submission.run;
    let mut there = vec![false; last as usize + 1];
    let cutting = Cutting::<I>::start(
        submission,
        batch_ids,
        max_ids_bytes(broker.max_payload()),
        Plan::all(Vec::new()),
    );
    let Cutting { mut batches, ended, .. } = cutting;
    let lookup = |batch: Batch| async move {
        let subject = broker.names().ids_subject(run, batch.number);
        let ask = || look_up::<I>(broker, run, &subject, batch.number, &batch.bytes);
        match patiently(run, stop, ask).await? {
            Stored::Same => Ok((batch.number, true)),
            Stored::Nothing => Ok((batch.number, false)),
            Stored::Other(_) => Err(Error::OtherBatch { run: run.to_string(), batch: batch.number }),
        }
    };
    let mut lookups = FuturesUnordered::new();
    let mut cut = 0;
    while cut <= last || !lookups.is_empty() {
        tokio::select! {
            batch = batches.recv(), if cut <= last && lookups.len() < READ_AT_ONCE => match batch {
                Some(batch) => {
                    cut = batch.number + 1;
                    lookups.push(lookup(batch));
                }
                None => {
                    ended.await?;
                    // The stream has more batches than the ids now make.
                    return Err(Error::OtherBatch { run: run.to_string(), batch: last });
                }
            },
            Some(looked) = lookups.next() => {
                let (number, found) = looked?;
                there[number as usize] = found;
            }
            () = stop.no_more_taking() => return Err(Error::Stopped),
        }
    }
    Ok(there)
}

/// A plan that leaves out the ids that the stream holds.
async fn read_back<I: Id>(
    broker: &Broker,
    submission: &Submission,
    last: u32,
    stop: &Stop,
) -> Result<Plan<I>, Error> {
    let run = &submission.run;
    let mut plan = Plan { end: last.saturating_add(1), ..Plan::all(Vec::new()) };
    let read = |number: u32| async move {
        let subject = broker.names().ids_subject(run, number);
        let found = patiently(run, stop, || broker.ids_message(&subject)).await?;
        let read = found.map(|(_, bytes)| decode_ids::<I>(&bytes)).transpose();
        let read = read.map_err(|source| Error::Message { subject, source })?;
        Ok::<_, Error>((number, read.map(|read| read.ids)))
    };
    let mut batches = stream::iter(0..=last).map(read).buffered(READ_AT_ONCE);
    let mut bytes = 0;
    while let Some((number, ids)) = batches.try_next().await? {
        let Some(ids) = ids else {
            plan.free.push(number);
            continue;
        };
        bytes += ids.iter().map(Id::wire_size).sum::<usize>();
        if bytes > MOST_BYTES {
            return Err(Error::OtherBatch { run: run.to_string(), batch: number });
        }
        let batch = Batch {
            number,
            ids: IdDigest::of(&ids),
            repeats: IdDigest::default(),
            bytes: Default::default(),
        };
        plan.tally.add(&batch, Written::Already);
        submission.metrics.published(Origin::Found, batch.ids.ids, 0);
        ids.into_iter().for_each(|id| *plan.held.entry(id).or_default() += 1);
    }
    Ok(plan)
}
