//! The proof told batch by batch, and the repair of what it finds.

use std::cmp::Ordering;

use millstream::Id;
use millstream::envelope::decode_ids;
use millstream::names::RunName;
use serde::Serialize;

use crate::broker::Broker;
use crate::error::Error;
use crate::failpoint;
use crate::records::{Change, PassState, Records};
use crate::seal::Proof;
use crate::store::{Store, StoredBatch};

/// Batch numbers that a report lists; there may be more of them.
const LISTED: usize = 1000;
/// Batches that one repair has computed again: they are listed in a consumer's filter.
const REPAIRED_AT_ONCE: usize = 1000;

/// What a pass has, against what it should have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// Whether all of the run is published: before, nothing can be missing.
    pub published: bool,
    /// Batches that the run has.
    pub batches: u64,
    /// Ids that the run has.
    pub ids: u64,
    /// Distinct `(batch, id)` stored.
    pub rows: u64,
    /// Batches of which no row is stored.
    pub missing_batches: u64,
    /// Batches of which some rows are stored.
    pub short_batches: u64,
    /// Batches that hold ids which are not theirs.
    pub wrong_batches: u64,
    /// Rows stored a second time.
    pub raw_duplicates: u64,
    /// Rows that are dead letters.
    pub dead: u64,
    /// Ids given more than once, in different batches.
    pub repeated_ids: u64,
    /// Whether the ids' digest is the run's.
    pub digest_matches: bool,
    /// Whether the pass is sealed.
    pub sealed: bool,
    /// Whether everything is there, once.
    pub complete: bool,
    /// The first of the missing batches.
    pub missing: Vec<u32>,
    /// The first of the short batches.
    pub short: Vec<u32>,
    /// The first of the wrong batches.
    pub wrong: Vec<u32>,
}

/// Batches of one kind: how many, and the first of them by number.
#[derive(Default)]
struct Found {
    count: u64,
    first: Vec<u32>,
}

impl Found {
    fn note(&mut self, batch: u32) {
        self.count += 1;
        if self.first.len() < LISTED {
            self.first.push(batch);
        }
    }
}

/// What a walk over the stored batches found.
#[derive(Default)]
struct Walk {
    missing: Found,
    short: Found,
    wrong: Found,
    /// The batch that should come next.
    next: u32,
    /// Digest of each batch that has as many ids as it should, for the rare comparison with the stream.
    digests: Vec<(u32, u64)>,
}

impl Walk {
    fn visit(&mut self, stored: StoredBatch) {
        self.skip_to(stored.batch);
        self.next = stored.batch + 1;
        match stored.ids.cmp(&stored.expected) {
            Ordering::Less => self.short.note(stored.batch),
            Ordering::Greater => self.wrong.note(stored.batch),
            Ordering::Equal => self.digests.push((stored.batch, stored.digest)),
        }
    }

    fn skip_to(&mut self, batch: u32) {
        (self.next..batch).for_each(|batch| self.missing.note(batch));
    }
}

impl Report {
    /// Whether there is nothing to repair.
    pub fn is_clean(&self) -> bool {
        self.complete && self.raw_duplicates == 0
    }
}

/// Compares a pass with its run's record.
///
/// # Errors
/// [`Error::NoSuchRun`]; the broker's and ClickHouse's.
pub async fn verify<I: Id>(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
) -> Result<Report, Error> {
    let record = records.known_run(run).await?.record;
    let pass = records.newest_pass(run).await?.map(|entry| entry.record);
    let number = pass.as_ref().map_or(1, |pass| pass.pass);
    let sealed = pass.as_ref().and_then(|pass| pass.sealed.clone());
    let mut walk = Walk::default();
    store.each_batch(run.as_str(), number, |stored| walk.visit(stored)).await?;
    let stored = store.stored(run.as_str(), number).await?;
    let published = record.published.clone();
    let batches = published.as_ref().map_or(walk.next, |published| published.batches);
    walk.skip_to(batches);
    let proof = published.clone().map(|published| Proof { published, stored });
    let complete = proof.as_ref().is_some_and(Proof::is_complete);
    let counts_agree = walk.missing.count + walk.short.count + walk.wrong.count == 0;
    if proof.is_some() && !complete && counts_agree {
        find_wrong::<I>(broker, run, &mut walk).await?;
    }
    Ok(Report {
        run: run.to_string(),
        pass: number,
        published: published.is_some(),
        batches: u64::from(batches),
        ids: published.as_ref().map_or(record.expected_ids.unwrap_or(0), |published| published.ids),
        rows: stored.ids,
        missing_batches: walk.missing.count,
        short_batches: walk.short.count,
        wrong_batches: walk.wrong.count,
        raw_duplicates: stored.raw_duplicates,
        dead: stored.dead,
        repeated_ids: sealed.as_ref().map_or(0, |sealed| sealed.repeated_ids),
        digest_matches: published.is_some_and(|published| published.digest == stored.digest),
        sealed: pass.is_some_and(|pass| pass.state == PassState::Sealed),
        complete,
        missing: walk.missing.first,
        short: walk.short.first,
        wrong: walk.wrong.first,
    })
}

/// All batches have as many ids as they should and the digest differs: some ids are not those that were published.
async fn find_wrong<I: Id>(broker: &Broker, run: &RunName, walk: &mut Walk) -> Result<(), Error> {
    for (batch, digest) in std::mem::take(&mut walk.digests) {
        let subject = broker.names().ids_subject(run, batch);
        let Some((_, bytes)) = broker.ids_message(&subject).await? else { continue };
        let published = decode_ids::<I>(&bytes).map_err(|source| Error::Message { subject, source })?;
        if digest != published.ids.iter().fold(0, |sum: u64, id| sum.wrapping_add(id.sip_hash())) {
            walk.wrong.note(batch);
        }
    }
    Ok(())
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repair {
    /// Raw duplicates that were merged away.
    pub duplicates_merged: u64,
    /// Batches that workers compute again.
    pub batches_again: u64,
    /// Batches whose ids are no longer in the stream: publishing the same input again brings them back.
    pub ids_gone: Vec<u32>,
    /// Why nothing was had computed again: work is still under way.
    pub busy: Option<String>,
}

/// Heals what a report found. Batches are computed again by whatever workers run; sinks seal the pass anew.
///
/// # Errors
/// The broker's and ClickHouse's. It can be called again at any time.
pub async fn repair(
    broker: &Broker,
    records: &Records,
    store: &Store,
    report: &Report,
) -> Result<Repair, Error> {
    let run: RunName = report.run.parse()?;
    let mut repair = Repair { duplicates_merged: 0, batches_again: 0, ids_gone: Vec::new(), busy: None };
    if report.raw_duplicates > 0 {
        store.heal(run.as_str()).await?;
        repair.duplicates_merged = report.raw_duplicates;
    }
    let lists = [&report.missing, &report.short, &report.wrong];
    let wanted: Vec<u32> = lists.into_iter().flatten().copied().take(REPAIRED_AT_ONCE).collect();
    if wanted.is_empty() || !report.published {
        return Ok(repair);
    }
    if let Some(busy) = under_way(broker, &run, report.pass).await? {
        return Ok(Repair { busy: Some(busy), ..repair });
    }
    let mut again = Vec::new();
    for batch in wanted {
        if broker.ids_message(&broker.names().ids_subject(&run, batch)).await?.is_none() {
            repair.ids_gone.push(batch);
            continue;
        }
        // Rows that the first worker stored stand in the way of the second's.
        broker.purge_rows(broker.names().rows_subject(&run, report.pass, batch)).await?;
        again.push(batch);
    }
    let foreign: Vec<u32> = report.wrong.iter().filter(|batch| again.contains(batch)).copied().collect();
    if !foreign.is_empty() {
        // Computing a batch again adds its own ids and would leave the others.
        store.remove_batches(run.as_str(), report.pass, &foreign).await?;
    }
    repair.batches_again = again.len() as u64;
    if !again.is_empty() {
        // The ids stay where they are: a consumer of just these batches delivers them once more.
        failpoint::pass("repair-before-consumer");
        broker.replace_work_consumer(&run, report.pass, &again).await?;
        failpoint::pass("repair-after-consumer");
        reopen(records, &run, report.pass).await?;
    }
    Ok(repair)
}

/// What still has to come to rest before something counts as lost.
async fn under_way(broker: &Broker, run: &RunName, pass: u32) -> Result<Option<String>, Error> {
    let open = |info: &async_nats::jetstream::consumer::Info| info.num_pending + info.num_ack_pending as u64;
    let computing = broker.work_progress(run, pass).await?.map_or(0, |info| open(&info));
    if computing > 0 {
        return Ok(Some(format!("{computing} batches are still to be computed")));
    }
    let landing = broker.sink_progress().await?.map_or(0, |info| open(&info));
    Ok((landing > 0).then(|| format!("{landing} computed batches are still to be stored")))
}

async fn reopen(records: &Records, run: &RunName, pass: u32) -> Result<(), Error> {
    while let Some(mut entry) = records.pass(run, pass).await? {
        if entry.record.state == PassState::Running {
            break;
        }
        entry.record.state = PassState::Running;
        if records.update_pass(&entry, run).await? == Change::Made {
            break;
        }
    }
    Ok(())
}
