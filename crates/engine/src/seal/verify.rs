//! The proof batch by batch, and the repair of what it finds.
//!
//! There is one way to repair a pass: [`repair`]. `verify --repair`, `produce` and the sealer call it.

mod landing;
mod repair;
mod seen;

use std::cmp::Ordering;

use futures_util::{StreamExt, TryStreamExt, stream};
use millstream::Id;
use millstream::envelope::{EnvelopeFault, decode_ids};
use millstream::names::{PassId, RunName};
use serde::Serialize;

use crate::clickhouse::sql::SeenPass;
use crate::clickhouse::store::{BuildRows, Sight, Store, Stored, StoredBatch};
use crate::error::{Error, full_hint};
use crate::fleet::heartbeat;
use crate::model::host::HostReport;
use crate::model::id_digest::IdDigest;
use crate::model::record::{Covers, PassRecord, PassState, RunRecord};
use crate::nats::broker::Broker;
use crate::nats::bucket::{Entry, Records};
use crate::nats::quarantine::fault_of_ids;
use crate::seal::copied::base_gone;
use crate::session::Session;

pub(crate) use landing::{Landing, come_again, is_held_by_none, landing, landing_now, open};
pub(crate) use repair::is_being_repaired;
pub use repair::{Repair, Unstored, heal, repair};
pub use seen::SeenFault;

/// The most batch numbers that a report lists; there may be more batches.
const LISTED: usize = 1000;
/// The most messages that are read at once.
const LOOKS: usize = 32;

/// What is stored of a pass, compared with what should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The name of the run.
    pub run: RunName,
    /// The number of the pass.
    pub pass: u32,
    /// Whether all ids of the run are published; until then nothing can be missing.
    pub published: bool,
    /// The number of batches in the run.
    pub batches: u64,
    /// The number of ids in the run.
    pub ids: u64,
    /// The number of distinct `(batch, id)` stored.
    pub rows: u64,
    /// The number of batches without a stored row.
    pub missing_batches: u64,
    /// The number of batches with some rows stored.
    pub short_batches: u64,
    /// The number of batches with ids that are not theirs, or with wrong values.
    pub wrong_batches: u64,
    /// The number of batches with wrong values; `None` if values were not checked.
    pub values_at_fault: Option<u64>,
    /// The number of batches whose values cannot be proven, because their schema is unknown or the table has
    /// lost its columns; `None` if values were not checked.
    pub values_unproven: Option<u64>,
    /// The number of raw duplicates.
    pub raw_duplicates: u64,
    /// The number of rows that are dead letters.
    pub dead: u64,
    /// The number of dead letters at the seal; `None` before.
    pub dead_sealed: Option<u64>,
    /// The number of ids that were given more than once, in different batches.
    pub repeated_ids: u64,
    /// Whether the digest of the stored ids matches the run's.
    pub digest_matches: bool,
    /// Whether the pass is sealed.
    pub sealed: bool,
    /// The state of the pass.
    pub state: PassState,
    /// Whether each id is stored exactly once.
    pub complete: bool,
    /// The first missing batches.
    pub missing: Vec<u32>,
    /// The first short batches.
    pub short: Vec<u32>,
    /// The first wrong batches.
    pub wrong: Vec<u32>,
    /// The listed batches whose ids the stream no longer holds.
    pub ids_gone: Vec<u32>,
    /// The listed batches whose ids in the stream cannot be read.
    pub ids_damaged: Vec<u32>,
    /// The revision of the pass's record, read before everything else; `None` without a record.
    #[serde(skip)]
    pub revision: Option<u64>,
    /// The number of ids that a partial replay computes; `None` for a full pass.
    pub computes: Option<u64>,
    /// Why the pass can never be complete, because its base has lost rows to copy; and what helps.
    pub base_gone: Option<String>,
    /// Whether readers see the pass, as ClickHouse answered.
    pub readers_see: bool,
    /// Why readers do not see a sealed pass; or what is wrong with the view although they do.
    pub readers: Option<String>,
    /// Whether the readers' view shows other columns or types than its table has.
    pub view_lags: bool,
    /// What keeps the pass from its seal, or blocks ClickHouse, and what helps.
    pub stuck: Vec<String>,
    /// Whether the removal of the pass was begun and not finished; `forget` finishes it.
    pub forgetting: bool,
    /// When the pass was sealed, in milliseconds since 1970; `None` before.
    pub sealed_at_ms: Option<u64>,
    /// The number of rows at the seal; `None` before.
    pub rows_sealed: Option<u64>,
    /// The rows by the build that computed them, the most rows first.
    pub builds: Vec<BuildRows>,
    /// Rows of this run in the table of sealed passes that differ from the records of its passes.
    pub seen_faults: Vec<SeenFault>,
    /// The correct row of a sealed pass in the table of sealed passes.
    #[serde(skip)]
    pub seen: Option<SeenPass>,
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

/// What the walk over the stored batches found.
#[derive(Default)]
struct Walk {
    missing: Found,
    short: Found,
    wrong: Found,
    /// The number of the next expected batch.
    next: u32,
    /// The number of batches in the run, once known.
    batches: Option<u32>,
    /// Batches whose ids could not be compared, because the stream's message is gone or damaged.
    ids_gone: Found,
    ids_damaged: Found,
    /// The digest of each batch with the right number of ids, for the rare comparison with the stream.
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
            Ordering::Equal if stored.values_at_fault => self.wrong.note(stored.batch),
            Ordering::Equal => self.digests.push((stored.batch, stored.digest)),
        }
    }

    fn skip_to(&mut self, batch: u32) {
        let end = self.batches.map_or(batch, |batches| batches.min(batch));
        (self.next..end).for_each(|batch| self.missing.note(batch));
    }
}

impl Report {
    /// Which pass of which run it is about.
    pub fn id(&self) -> PassId {
        self.run.pass(self.pass)
    }

    /// Whether there is nothing to repair.
    pub fn is_clean(&self) -> bool {
        self.complete && self.raw_duplicates == 0 && !self.has_other_dead()
    }

    /// Whether the number of dead letters differs from the seal: the table was changed.
    pub fn has_other_dead(&self) -> bool {
        self.dead_sealed.is_some_and(|dead| dead != self.dead)
    }

    /// Whether the record says that the pass is sealed, and readers do not see it.
    pub fn is_hidden(&self) -> bool {
        self.sealed && !self.readers_see
    }

    /// Whether readers do not see a sealed pass, or see it through a view that a repair recreates.
    pub fn is_shown_badly(&self) -> bool {
        self.is_hidden() || (self.sealed && self.view_lags)
    }

    /// Whether anything that readers see of the run is wrong.
    pub fn is_seen_badly(&self) -> bool {
        self.is_shown_badly() || !self.seen_faults.is_empty()
    }

    /// The number of batches at fault.
    fn faulty(&self) -> u64 {
        self.missing_batches + self.short_batches + self.wrong_batches
    }

    /// Whether the number is beyond the run's last batch.
    fn is_beyond(&self, batch: u32) -> bool {
        u64::from(batch) >= self.batches
    }

    /// Whether a batch can be computed again.
    fn has_ids(&self, batch: u32) -> bool {
        !self.is_beyond(batch) && !self.ids_gone.contains(&batch) && !self.ids_damaged.contains(&batch)
    }

    /// The listed batches at fault.
    fn named(&self) -> impl Iterator<Item = u32> {
        [&self.missing, &self.short, &self.wrong].into_iter().flatten().copied()
    }
}

/// Compares the newest pass of a run with the run's record. With `values`, also compares the stored values with
/// what workers computed.
///
/// # Errors
/// [`Error::NoSuchRun`]; errors of NATS and ClickHouse.
pub async fn verify<I: Id>(session: &Session, run: &RunName, values: bool) -> Result<Report, Error> {
    let Session { records, store, .. } = session;
    let entry = records.newest_pass(run).await?;
    let mut report = examine::<I>(session, run, entry, values).await?;
    report.stuck = stuck(records, store, run, (!report.sealed).then_some(report.pass)).await?;
    Ok(report)
}

/// The report without the reasons of the sealers, which a repair does not need.
async fn examine<I: Id>(
    session: &Session,
    run: &RunName,
    entry: Option<Entry<PassRecord>>,
    values: bool,
) -> Result<Report, Error> {
    let Session { broker, records, store } = session;
    let shown = match store.sealed_passes(run).await {
        // The report says so below, about a sealed pass.
        Err(Error::Store { source, .. }) if source.is_missing() => Vec::new(),
        shown => shown?,
    };
    let record = records.known_run(run).await?.record;
    let passes = records.passes_of(run).await?;
    let revision = entry.as_ref().map(|entry| entry.revision);
    let pass = entry.map(|entry| entry.record);
    let id = run.pass(pass.as_ref().map_or(1, |pass| pass.pass));
    let (walk, stored) = walk::<I>(session, &id, &record, values).await?;
    let complete = record.published.as_ref().is_some_and(|published| stored.is_all_of(published));
    let sight = if pass.as_ref().is_some_and(|pass| pass.state == PassState::Sealed) {
        store.sight(&id, stored.ids.saturating_sub(stored.dead), true).await?
    } else {
        Sight::default()
    };
    let proven = Some(id.pass).filter(|_| complete);
    let seen_faults = seen::faults(&shown, &passes, record.published.as_ref(), proven);
    let builds = store.builds(&id).await?;
    let examined =
        Examined { id, record, revision, pass, walk, stored, complete, sight, seen_faults, builds };
    let base_gone = if complete { None } else { examined.base_gone(store, values).await? };
    let mut report = examined.report();
    report.base_gone = base_gone.as_ref().map(full_hint);
    // A partial replay has its own ids messages.
    if report.published && report.computes.is_none() {
        look_at_ids::<I>(broker, run, &mut report).await?;
    }
    Ok(report)
}

/// Counts what is stored of a pass, batch by batch.
async fn walk<I: Id>(
    Session { broker, store, .. }: &Session,
    id: &PassId,
    record: &RunRecord,
    values: bool,
) -> Result<(Walk, Stored), Error> {
    let published = record.published.as_ref();
    let batches = published.map(|published| published.batches);
    let mut walk = Walk { batches, ..Walk::default() };
    store.each_batch(id, values, |stored| walk.visit(stored)).await?;
    let stored = store.stored(id, values, published.filter(|_| !record.may_repeat)).await?;
    walk.skip_to(batches.unwrap_or(walk.next));
    let counts_agree = walk.missing.count + walk.short.count + walk.wrong.count == 0;
    if counts_agree && published.is_some_and(|published| !stored.is_all_of(published)) {
        find_wrong::<I>(broker, &id.run, &mut walk).await?;
    }
    Ok((walk, stored))
}

/// The answers of both servers that a report is made of.
struct Examined {
    id: PassId,
    record: RunRecord,
    revision: Option<u64>,
    pass: Option<PassRecord>,
    walk: Walk,
    stored: Stored,
    complete: bool,
    sight: Sight,
    seen_faults: Vec<SeenFault>,
    builds: Vec<BuildRows>,
}

impl Examined {
    fn covers(&self) -> Option<&Covers> {
        self.pass.as_ref()?.covers.as_ref()
    }

    /// Why the unchanged rows cannot be copied from the base, if they cannot.
    async fn base_gone(&self, store: &Store, values: bool) -> Result<Option<Error>, Error> {
        let (Some(covers), Some(published)) = (self.covers(), &self.record.published) else {
            return Ok(None);
        };
        if let Some(gone) = base_gone(store, &self.id, covers, published.ids).await? {
            return Ok(Some(gone));
        }
        // A repair removes batches with wrong values; only the base can replace them.
        let Walk { missing, short, wrong, .. } = &self.walk;
        if values && missing.count + short.count + wrong.count > 0 {
            return match store.check_base(&self.id, covers, published.batches).await {
                Err(fault @ Error::BaseValues { .. }) => Ok(Some(fault)),
                checked => checked.map(|()| None),
            };
        }
        Ok(None)
    }

    fn report(self) -> Report {
        let Self { id, record, pass, walk, stored, complete, .. } = self;
        let published = record.published.as_ref();
        let sealed = pass.as_ref().and_then(|pass| pass.sealed.as_ref());
        let is_sealed = pass.as_ref().is_some_and(|pass| pass.state == PassState::Sealed);
        let covers = pass.as_ref().and_then(|pass| pass.covers.as_ref());
        Report {
            run: id.run,
            pass: id.pass,
            published: published.is_some(),
            batches: u64::from(published.map_or(walk.next, |published| published.batches)),
            ids: published.map_or(record.expected_ids.unwrap_or(0), |published| published.ids),
            rows: stored.ids,
            missing_batches: walk.missing.count,
            short_batches: walk.short.count,
            wrong_batches: walk.wrong.count,
            values_at_fault: stored.values.map(|values| values.at_fault),
            values_unproven: stored.values.map(|values| values.unproven),
            raw_duplicates: stored.raw_duplicates,
            dead: stored.dead,
            dead_sealed: sealed.filter(|_| is_sealed).map(|sealed| sealed.dead),
            repeated_ids: sealed.map_or(0, |sealed| sealed.repeated_ids),
            digest_matches: published.is_some_and(|published| published.digest == stored.digest),
            sealed: is_sealed,
            state: pass.as_ref().map_or(PassState::Running, |pass| pass.state),
            complete,
            missing: walk.missing.first,
            short: walk.short.first,
            wrong: walk.wrong.first,
            ids_gone: walk.ids_gone.first,
            ids_damaged: walk.ids_damaged.first,
            revision: self.revision,
            computes: covers.map(|covers| covers.ids.unwrap_or(0)),
            base_gone: None,
            readers_see: self.sight.sees,
            readers: self.sight.why,
            view_lags: self.sight.lags,
            stuck: Vec::new(),
            forgetting: pass.as_ref().is_some_and(|pass| pass.forgetting),
            sealed_at_ms: sealed.map(|sealed| sealed.at_ms),
            rows_sealed: sealed.map(|sealed| sealed.rows),
            builds: self.builds,
            seen_faults: self.seen_faults,
            seen: published.zip(sealed).map(|(published, sealed)| SeenPass::of(id.pass, published, sealed)),
        }
    }
}

/// Why an unsealed pass is not sealed, as the sealers report it, and the stuck mutations of our tables.
///
/// # Errors
/// Errors of NATS and ClickHouse.
async fn stuck(
    records: &Records,
    store: &Store,
    run: &RunName,
    pass: Option<u32>,
) -> Result<Vec<String>, Error> {
    let mut found = match pass {
        Some(pass) => stuck_by(&heartbeat::alive(records).await?, &run.pass(pass)),
        None => Vec::new(),
    };
    found.extend(store.hindrances().await?);
    Ok(found)
}

/// The reasons that sealers report, each text once, because several sealers report the same.
pub(crate) fn stuck_by(hosts: &[HostReport], pass: &PassId) -> Vec<String> {
    let waits = hosts.iter().flat_map(HostReport::waits);
    let of_pass = waits.filter(|wait| wait.run == pass.run.as_str() && wait.pass == pass.pass);
    let mut found: Vec<String> = of_pass.map(|wait| wait.why.clone()).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Checks whether the stream holds the ids of the batches at fault.
async fn look_at_ids<I: Id>(broker: &Broker, run: &RunName, report: &mut Report) -> Result<(), Error> {
    let reads = report.named().filter(|batch| !report.is_beyond(*batch)).map(|batch| async move {
        let message = broker.ids_message(&broker.names().ids_subject(run, batch)).await?;
        Ok::<_, Error>((batch, message.map(|(_, bytes)| fault_of_ids::<I>(run, batch, &bytes))))
    });
    let reads: Vec<_> = reads.collect();
    let found: Vec<_> = stream::iter(reads).buffered(LOOKS).try_collect().await?;
    for (batch, state) in found {
        match state {
            None => report.ids_gone.push(batch),
            // The message waits for a worker of a newer build.
            Some(None | Some(EnvelopeFault::NewerVersion { .. })) => {}
            Some(Some(_)) => report.ids_damaged.push(batch),
        }
    }
    Ok(())
}

/// Finds wrong batches when every batch has the right number of ids but the digest differs: some ids are not
/// those published.
async fn find_wrong<I: Id>(broker: &Broker, run: &RunName, walk: &mut Walk) -> Result<(), Error> {
    let reads = std::mem::take(&mut walk.digests).into_iter().map(|(batch, digest)| async move {
        let message = broker.ids_message(&broker.names().ids_subject(run, batch)).await?;
        let published = message
            .map(|(_, bytes)| decode_ids::<I>(&bytes).map(|published| IdDigest::of(&published.ids).digest));
        Ok::<_, Error>((batch, digest, published))
    });
    let mut reads = stream::iter(reads).buffered(LOOKS);
    while let Some((batch, digest, published)) = reads.try_next().await? {
        match published {
            None => walk.ids_gone.note(batch),
            Some(Err(_)) => walk.ids_damaged.note(batch),
            Some(Ok(sum)) if sum != digest => walk.wrong.note(batch),
            Some(Ok(_)) => {}
        }
    }
    Ok(())
}
