//! The proof told batch by batch, and the repair of what it finds.
//!
//! There is one way of healing: [`repair`]. `verify --repair`, `produce` and the sealer call it.

use std::cmp::Ordering;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::Id;
use millstream::envelope::{EnvelopeFault, decode_ids};
use millstream::names::RunName;
use serde::Serialize;

use crate::aside::fault_of_ids;
use crate::broker::Broker;
use crate::error::Error;
use crate::failpoint;
use crate::records::{Change, Entry, PassRecord, PassState, Records, now_ms};
use crate::seal::Proof;
use crate::store::{Store, StoredBatch};

/// Batch numbers that a report lists; there may be more of them.
const LISTED: usize = 1000;
/// Messages that are looked at together.
const LOOKS: usize = 32;
/// A repair that has claimed a pass is left alone for this long without a change of the pass's record: it may have died.
const LEASE: Duration = Duration::from_secs(30);

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
    /// Where the pass stands, in a word.
    pub state: &'static str,
    /// Whether everything is there, once.
    pub complete: bool,
    /// The first of the missing batches.
    pub missing: Vec<u32>,
    /// The first of the short batches.
    pub short: Vec<u32>,
    /// The first of the wrong batches.
    pub wrong: Vec<u32>,
    /// Those of the batches named here whose ids the stream holds no more.
    pub ids_gone: Vec<u32>,
    /// Those of the batches named here whose ids in the stream cannot be read.
    pub ids_damaged: Vec<u32>,
    /// Revision of the pass's record from before anything was looked at; `None` without a record.
    #[serde(skip)]
    pub revision: Option<u64>,
    /// Ids that the pass computes again, where those are not all: it takes over the rows of the others.
    pub computes: Option<u64>,
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
    /// How many the run has, once that is known.
    batches: Option<u32>,
    /// Batches whose ids could not be compared, as the stream has none that can be read: gone, damaged.
    ids_gone: Found,
    ids_damaged: Found,
    /// Digest of each batch that has as many ids as it should, for the rare comparison with the stream.
    digests: Vec<(u32, u64)>,
}

impl Walk {
    fn visit(&mut self, stored: StoredBatch) {
        self.skip_to(stored.batch);
        self.next = stored.batch.saturating_add(1);
        match stored.ids.cmp(&stored.expected) {
            _ if self.batches.is_some_and(|batches| stored.batch >= batches) => self.wrong.note(stored.batch),
            Ordering::Less => self.short.note(stored.batch),
            Ordering::Greater => self.wrong.note(stored.batch),
            Ordering::Equal => self.digests.push((stored.batch, stored.digest)),
        }
    }

    fn skip_to(&mut self, batch: u32) {
        let end = self.batches.map_or(batch, |batches| batches.min(batch));
        (self.next..end).for_each(|batch| self.missing.note(batch));
    }
}

impl Report {
    /// Whether there is nothing to repair.
    pub fn is_clean(&self) -> bool {
        self.complete && self.raw_duplicates == 0
    }

    /// Batches that are not as they should be.
    fn faulty(&self) -> u64 {
        self.missing_batches + self.short_batches + self.wrong_batches
    }

    /// Whether the run has no batch of that number.
    fn is_beyond(&self, batch: u32) -> bool {
        u64::from(batch) >= self.batches
    }

    /// Whether a batch can be computed again.
    fn has_ids(&self, batch: u32) -> bool {
        !self.is_beyond(batch) && !self.ids_gone.contains(&batch) && !self.ids_damaged.contains(&batch)
    }

    /// The first of them.
    fn named(&self) -> impl Iterator<Item = u32> {
        [&self.missing, &self.short, &self.wrong].into_iter().flatten().copied()
    }
}

/// Compares the newest pass of a run with the run's record.
///
/// # Errors
/// [`Error::NoSuchRun`]; the broker's and ClickHouse's.
pub async fn verify<I: Id>(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
) -> Result<Report, Error> {
    let entry = records.newest_pass(run).await?;
    examine::<I>(broker, records, store, run, entry).await
}

async fn examine<I: Id>(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
    entry: Option<Entry<PassRecord>>,
) -> Result<Report, Error> {
    let record = records.known_run(run).await?.record;
    let revision = entry.as_ref().map(|entry| entry.revision);
    let pass = entry.map(|entry| entry.record);
    let covers = pass.as_ref().and_then(|pass| pass.covers.clone());
    let number = pass.as_ref().map_or(1, |pass| pass.pass);
    let sealed = pass.as_ref().and_then(|pass| pass.sealed.clone());
    let batches = record.published.as_ref().map(|published| published.batches);
    let mut walk = Walk { batches, ..Walk::default() };
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
    let mut report = Report {
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
        sealed: pass.as_ref().is_some_and(|pass| pass.state == PassState::Sealed),
        state: pass.as_ref().map_or(PassState::Running, |pass| pass.state).word(),
        complete,
        missing: walk.missing.first,
        short: walk.short.first,
        wrong: walk.wrong.first,
        ids_gone: walk.ids_gone.first,
        ids_damaged: walk.ids_damaged.first,
        revision,
        computes: covers.map(|covers| covers.ids.unwrap_or(0)),
    };
    // A pass over some ids has messages of its own for them.
    if report.published && report.computes.is_none() {
        look_at_ids::<I>(broker, run, &mut report).await?;
    }
    Ok(report)
}

/// Whether the ids are there of the batches that are not as they should be.
async fn look_at_ids<I: Id>(broker: &Broker, run: &RunName, report: &mut Report) -> Result<(), Error> {
    let looks = report.named().filter(|batch| !report.is_beyond(*batch)).map(|batch| async move {
        let message = broker.ids_message(&broker.names().ids_subject(run, batch)).await?;
        Ok::<_, Error>((batch, message.map(|(_, bytes)| fault_of_ids::<I>(run, batch, &bytes))))
    });
    let looks: Vec<_> = looks.collect();
    let found: Vec<_> = stream::iter(looks).buffered(LOOKS).try_collect().await?;
    for (batch, state) in found {
        match state {
            None => report.ids_gone.push(batch),
            // It waits for a worker that knows it.
            Some(None | Some(EnvelopeFault::NewerVersion { .. })) => {}
            Some(Some(_)) => report.ids_damaged.push(batch),
        }
    }
    Ok(())
}

/// All batches have as many ids as they should and the digest differs: some ids are not those that were published.
async fn find_wrong<I: Id>(broker: &Broker, run: &RunName, walk: &mut Walk) -> Result<(), Error> {
    for (batch, digest) in std::mem::take(&mut walk.digests) {
        let subject = broker.names().ids_subject(run, batch);
        let Some((_, bytes)) = broker.ids_message(&subject).await? else {
            walk.ids_gone.note(batch);
            continue;
        };
        let Ok(published) = decode_ids::<I>(&bytes) else {
            walk.ids_damaged.note(batch);
            continue;
        };
        if digest != published.ids.iter().fold(0, |sum: u64, id| sum.wrapping_add(id.sip_hash())) {
            walk.wrong.note(batch);
        }
    }
    Ok(())
}

/// What a repair did, and what it left to a person.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Repair {
    /// Raw duplicates that were merged away.
    pub duplicates_merged: u64,
    /// Batches that workers compute again.
    pub batches_again: u64,
    /// Whether those are all batches of the run, as more were at fault than can be named one by one. Rows that are
    /// stored stay as they are.
    pub whole_run: bool,
    /// Batches whose ids are no longer in the stream: publishing the same input again brings them back.
    pub ids_gone: Vec<u32>,
    /// Batches whose ids cannot be read: publishing the same input again replaces them.
    pub ids_damaged: Vec<u32>,
    /// Why nothing was had computed again: work is still under way.
    pub busy: Option<String>,
}

impl Repair {
    /// What a person has to do.
    pub fn hint(&self, run: &str) -> Option<String> {
        let lost = self.ids_gone.len() + self.ids_damaged.len();
        (lost > 0).then(|| {
            format!("`produce` with the same input and --run {run} publishes the ids of those batches again")
        })
    }
}

/// Verifies a pass, and repairs what is found.
///
/// # Errors
/// As of [`verify`] and [`repair`].
pub async fn heal<I: Id>(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
    pass: u32,
) -> Result<Repair, Error> {
    let entry = records.pass(run, pass).await?;
    let state = entry.as_ref().map_or(PassState::Running, |entry| entry.record.state);
    if entry.as_ref().is_some_and(is_being_repaired) {
        return Ok(Repair { busy: Some("another repair is under way".into()), ..Repair::default() });
    }
    // Before the walk over all that is stored, which costs more than the question.
    if let Some(busy) = under_way(broker, run, pass, state.word()).await? {
        return Ok(Repair { busy: Some(busy), ..Repair::default() });
    }
    let report = examine::<I>(broker, records, store, run, entry).await?;
    repair(broker, records, store, &report).await
}

/// Heals what a report found. Batches are computed again by whatever workers run; sinks seal the pass anew.
///
/// Of several that repair at once, one makes its claim on the pass's record; the others, and sealers, leave the pass to it.
/// One that is killed half-way leaves a running pass that is not complete, which is repaired like any other a little
/// later. One that was paused meanwhile finds its claim gone before it removes anything.
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
    let mut repair = Repair::default();
    if report.raw_duplicates > 0 {
        store.heal(run.as_str()).await?;
        repair.duplicates_merged = report.raw_duplicates;
    }
    if !report.published {
        return Ok(repair);
    }
    if let Some(busy) = under_way(broker, &run, report.pass, report.state).await? {
        return Ok(Repair { busy: Some(busy), ..repair });
    }
    (repair.ids_gone, repair.ids_damaged) = (report.ids_gone.clone(), report.ids_damaged.clone());
    let again: Vec<u32> = report.named().filter(|batch| report.has_ids(*batch)).collect();
    // The rows of a wrong batch are all there is of it while its ids are not.
    let wrong = report.wrong.iter().copied();
    let wrong: Vec<u32> = wrong.filter(|batch| report.is_beyond(*batch) || report.has_ids(*batch)).collect();
    if again.is_empty() && wrong.is_empty() {
        return Ok(repair);
    }
    let faster = |repair| Ok(Repair { busy: Some("another repair was faster".into()), ..repair });
    let Some(claim) = claim(records, &run, report).await? else { return faster(repair) };
    failpoint::pass("repair-after-claim");
    if !holds(records, &run, report.pass, claim).await? {
        return faster(repair);
    }
    remove_wrong(broker, store, &run, report, &wrong).await?;
    if !holds(records, &run, report.pass, claim).await? {
        return faster(repair);
    }
    compute_again(broker, &run, report, &again, &mut repair).await?;
    release(records, &run, report.pass, claim).await?;
    Ok(repair)
}

/// Whether somebody has claimed this pass for a repair, and may be at it still.
pub(crate) fn is_being_repaired(entry: &Entry<PassRecord>) -> bool {
    let age = now_ms().saturating_sub(entry.written_ms);
    entry.record.repair.is_some() && age < LEASE.as_millis() as u64
}

/// What still has to come to rest before something counts as lost.
async fn under_way(broker: &Broker, run: &RunName, pass: u32, state: &str) -> Result<Option<String>, Error> {
    let open = |info: &async_nats::jetstream::consumer::Info| info.num_pending + info.num_ack_pending as u64;
    if [PassState::Paused, PassState::Cancelled].map(PassState::word).contains(&state) {
        return Ok(Some(format!("the pass is {state}")));
    }
    // Nobody draws from what is left of a sealed pass's consumer.
    if state != PassState::Sealed.word() {
        let computing = broker.work_progress(run, pass).await?.map_or(0, |info| open(&info));
        if computing > 0 {
            return Ok(Some(format!("{computing} batches are still to be computed")));
        }
    }
    broker.ensure_sink_consumer().await?;
    let Some(sinks) = broker.sink_progress().await? else { return Ok(None) };
    let landing = open(&sinks);
    if landing == 0 {
        return Ok(None);
    }
    // Rows of other passes may never come to rest; all up to the floor are stored.
    let last = broker.last_rows(run, pass).await?;
    let landed = last.is_none_or(|last| last <= sinks.ack_floor.stream_sequence);
    Ok((!landed).then(|| format!("{landing} computed batches are still to be stored")))
}

/// Makes the pass a running one that is being repaired, in a single step, and returns the claim; `None` when its record is
/// not the one that the report began with, or another repair is at it.
async fn claim(records: &Records, run: &RunName, report: &Report) -> Result<Option<u64>, Error> {
    // Unlike any other: seeded by the system for each value.
    let claim = RandomState::new().hash_one(now_ms());
    let change = match records.pass(run, report.pass).await? {
        Some(mut entry) => {
            if Some(entry.revision) != report.revision || is_being_repaired(&entry) {
                return Ok(None);
            }
            entry.record.state = PassState::Running;
            entry.record.sealed = None;
            entry.record.repair = Some(claim);
            records.update_pass(&entry, run).await?
        }
        None => {
            let batch_ids = records.known_run(run).await?.record.batch_ids;
            let begun = PassRecord { repair: Some(claim), ..PassRecord::begin(run, report.pass, batch_ids) };
            records.create_pass(&begun, run).await?
        }
    };
    Ok((change == Change::Made).then_some(claim))
}

/// Whether the claim still holds.
async fn holds(records: &Records, run: &RunName, pass: u32, claim: u64) -> Result<bool, Error> {
    let entry = records.pass(run, pass).await?;
    Ok(entry.is_some_and(|entry| entry.record.repair == Some(claim)))
}

/// Lets go of the pass.
async fn release(records: &Records, run: &RunName, pass: u32, claim: u64) -> Result<(), Error> {
    while let Some(mut entry) =
        records.pass(run, pass).await?.filter(|entry| entry.record.repair == Some(claim))
    {
        entry.record.repair = None;
        if records.update_pass(&entry, run).await? == Change::Made {
            break;
        }
    }
    Ok(())
}

/// Computing a batch again adds its own ids and would leave the others.
async fn remove_wrong(
    broker: &Broker,
    store: &Store,
    run: &RunName,
    report: &Report,
    wrong: &[u32],
) -> Result<(), Error> {
    if wrong.is_empty() {
        return Ok(());
    }
    store.remove_batches(run.as_str(), report.pass, wrong).await?;
    for batch in wrong.iter().filter(|batch| report.is_beyond(**batch)) {
        // Whoever published it is not the producer.
        broker.purge_ids(broker.names().ids_subject(run, *batch)).await?;
        broker.purge_batch(run, report.pass, *batch).await?;
    }
    Ok(())
}

/// The ids stay where they are: a consumer of just these batches delivers them once more, or one of the whole run when
/// they cannot all be named.
async fn compute_again(
    broker: &Broker,
    run: &RunName,
    report: &Report,
    again: &[u32],
    repair: &mut Repair,
) -> Result<(), Error> {
    if again.is_empty() {
        return Ok(());
    }
    repair.whole_run = report.faulty() > LISTED as u64;
    // Rows that the first worker stored stand in the way of the second's.
    if report.computes.is_some() {
        // Its ids alone: the sealer brings the other rows from the pass before.
        repair.batches_again = again.len() as u64;
        broker.purge_rows(broker.names().pass_rows(run, report.pass)).await?;
        failpoint::pass("repair-before-consumer");
        broker.remove_work_consumer(run, report.pass).await?;
        return broker.ensure_replay_consumer(run, report.pass).await;
    }
    if repair.whole_run {
        repair.batches_again = report.batches;
        broker.purge_rows(broker.names().pass_rows(run, report.pass)).await?;
    } else {
        repair.batches_again = again.len() as u64;
        for batch in again {
            broker.purge_batch(run, report.pass, *batch).await?;
        }
    }
    failpoint::pass("repair-before-consumer");
    let listed = (!repair.whole_run).then_some(again);
    broker.replace_work_consumer(run, report.pass, listed).await?;
    failpoint::pass("repair-after-consumer");
    Ok(())
}
