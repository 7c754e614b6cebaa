//! A new pass over a run's dead letters: they are computed again, and the pass takes over the other rows of the one
//! before, so that what readers see is whole at every moment.
//!
//! The ids of such a pass are published like a run's, under subjects of the pass; workers and sinks know no difference.
//! The sealer copies the other rows inside ClickHouse once the ids are computed (`take_over`), proves the pass against
//! the run's record like any other, and readers flip. Killed at any point, the same words go on.

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millstream::Id;
use millstream::envelope::encode_ids;
use millstream::names::RunName;

use crate::broker::{Broker, Written};
use crate::error::Error;
use crate::failpoint;
use crate::records::{Change, Covers, Entry, PassRecord, PassState, Published, Records};
use crate::stop::Stop;
use crate::store::Store;
use crate::tables::Letters;

/// Batches whose dead letters are read at once.
const READ_AT_ONCE: usize = 64;
/// Batches on their way at once.
const IN_FLIGHT: usize = 64;
/// Rows that one copy inside ClickHouse takes at most, which is what one part should hold.
const COPIED_AT_ONCE: u32 = 500_000;

/// What a replay came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// The new pass.
    pub pass: u32,
    /// Ids that it computes.
    pub ids: u64,
    /// Batches that they are in.
    pub batches: u64,
}

/// Begins a pass over the dead letters of a run's newest pass, or goes on publishing one.
///
/// # Errors
/// [`Error::NoDeadLetters`]; [`Error::PassOpen`] while the newest pass is not sealed; [`Error::Stopped`]; those of the
/// broker and ClickHouse.
pub async fn replay_dead<I: Id>(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
    letters: &Letters,
    stop: &Stop,
) -> Result<Replayed, Error> {
    let batch_ids = records.known_run(run).await?.record.batch_ids;
    let entry = open_pass(records, store, run, letters, batch_ids).await?;
    let (pass, base) = (entry.record.pass, entry.record.covers.as_ref().map_or(0, |covers| covers.base));
    broker.ensure_replay_consumer(run, pass).await?;
    failpoint::pass("replay-after-record");
    let batches = store.dead_batches(run.as_str(), base, letters).await?;
    let mut ids = 0;
    for some in batches.chunks(READ_AT_ONCE) {
        ids += publish::<I>(broker, store, run, [pass, base], letters, some, stop).await?;
    }
    failpoint::pass("replay-before-close");
    close(records, run, pass, ids).await?;
    Ok(Replayed { pass, ids, batches: batches.len() as u64 })
}

/// The pass that computes these letters again: one whose publishing was interrupted, or a new one.
async fn open_pass(
    records: &Records,
    store: &Store,
    run: &RunName,
    letters: &Letters,
    batch_ids: u32,
) -> Result<Entry<PassRecord>, Error> {
    let newest = records.newest_pass(run).await?;
    let open = || Error::PassOpen { run: run.to_string() };
    let newest = newest.ok_or_else(open)?;
    match (&newest.record.covers, newest.record.state) {
        (Some(covers), PassState::Running) if covers.letters == *letters => return Ok(newest),
        (_, PassState::Running | PassState::Paused) => return Err(open()),
        (_, PassState::Cancelled | PassState::Sealed) => {}
    }
    let base = newest.record.pass;
    if store.dead_rows(run.as_str(), base, letters).await? == 0 {
        return Err(Error::NoDeadLetters { run: run.to_string() });
    }
    let covers = Covers { base, letters: letters.clone(), ids: None };
    let record = PassRecord { covers: Some(covers), ..PassRecord::begin(run, base + 1, batch_ids) };
    // Somebody was faster: what they began may be the same.
    let _beaten = records.create_pass(&record, run).await?;
    let entry = records.pass(run, base + 1).await?.ok_or_else(open)?;
    if entry.record.covers == record.covers { Ok(entry) } else { Err(open()) }
}

/// Publishes the dead letters of some batches; how many there are.
async fn publish<I: Id>(
    broker: &Broker,
    store: &Store,
    run: &RunName,
    [pass, base]: [u32; 2],
    letters: &Letters,
    batches: &[u32],
    stop: &Stop,
) -> Result<u64, Error> {
    let found = store.dead_ids(run.as_str(), base, letters, batches).await?;
    let mut flights = FuturesUnordered::new();
    for batch in found.chunk_by(|a, b| a.0 == b.0) {
        let ids = batch.iter().map(|(_, id)| I::parse(id)).collect::<Result<Vec<I>, _>>();
        let number = batch[0].0;
        let ids = ids.map_err(|source| Error::StoredId { run: run.to_string(), batch: number, source })?;
        let bytes = Bytes::from(encode_ids(run.as_str(), number, &ids));
        let subject = broker.names().replay_subject(run, pass, number);
        flights.push(async move { broker.write_once(&subject, bytes, stop).await });
        if flights.len() >= IN_FLIGHT {
            let _written: Option<Written> = flights.next().await.transpose()?;
        }
    }
    while flights.next().await.transpose()?.is_some() {}
    Ok(found.len() as u64)
}

/// Says in the pass's record that all of it is published.
async fn close(records: &Records, run: &RunName, pass: u32, ids: u64) -> Result<(), Error> {
    while let Some(mut entry) = records.pass(run, pass).await? {
        match &mut entry.record.covers {
            Some(covers) if covers.ids.is_none() => covers.ids = Some(ids),
            _ => break,
        }
        if records.update_pass(&entry, run).await? == Change::Made {
            break;
        }
    }
    Ok(())
}

/// Once every id that the pass covers is computed, copies the rows of all others from the pass before it; `false`
/// while they are not.
///
/// # Errors
/// ClickHouse's. It can be called again at any time, by any number of processes: what is copied twice is merged away
/// before the seal.
pub(crate) async fn take_over(
    store: &Store,
    run: &RunName,
    pass: u32,
    covers: &Covers,
    batch_ids: u32,
    published: &Published,
) -> Result<bool, Error> {
    let Covers { base, letters, ids } = covers;
    if store.computed_again(run.as_str(), pass, *base, letters).await? < ids.unwrap_or(u64::MAX) {
        return Ok(false);
    }
    let step = (COPIED_AT_ONCE / batch_ids.max(1)).max(1);
    for first in (0..published.batches).step_by(step as usize) {
        let end = first.saturating_add(step).min(published.batches);
        store.take_over(run.as_str(), pass, *base, letters, [first, end]).await?;
        failpoint::pass("replay-in-copy");
    }
    Ok(true)
}
