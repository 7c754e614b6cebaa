//! The status of a run.

use async_nats::jetstream::consumer;
use millstream::names::{PassId, RunName};
use serde::Serialize;

use crate::clickhouse::store::{Store, ViewFault};
use crate::error::{Error, full_hint};
use crate::fleet::heartbeat::{self, REPORT};
use crate::fleet::times::RECENT;
use crate::model::host::HostReport;
use crate::model::record::{PassRecord, RunRecord, RunState, Sealed};
use crate::model::selection::Letters;
use crate::observe::bottleneck::{Bottleneck, Scene, Span, Verdict, verdict};
use crate::seal::copied::base_gone;
use crate::seal::verify::{self, Landing};
use crate::session::Session;

/// The status of a run and its newest pass at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The name of the run.
    pub run: RunName,
    /// The number of the newest pass.
    pub pass: u32,
    /// The state of the run.
    pub state: RunState,
    /// The input of the run.
    pub source: String,
    /// The number of batches; until all are published, an estimate from the number of ids.
    pub batches: u64,
    /// The number of ids; until all are published, the number that the input announced.
    pub ids: u64,
    /// The number of ids whose row is stored. Until the pass is sealed, raw duplicates count too, so the number
    /// may fall when ClickHouse merges them.
    pub done: u64,
    /// The number of stored rows that are dead letters.
    pub dead: u64,
    /// The number of dead letters at the seal, if rows were changed since and the number differs now.
    pub dead_sealed: Option<u64>,
    /// The number of batches that workers hold.
    pub in_flight: u64,
    /// The number of batches that no worker has received yet.
    pub pending: u64,
    /// The number of batches in flight that were delivered more than once.
    pub redelivered: u64,
    /// The number of computed batches of all runs that sinks have not stored yet.
    pub to_store: u64,
    /// An estimate of the rows of all runs that sinks have not stored yet, from the number of messages and the
    /// size of this run's batches.
    pub lag_rows: u64,
    /// An estimate of the bytes of those rows in the rows stream, from the mean size of its messages.
    pub lag_bytes: u64,
    /// Rows stored per second, on average since the pass began.
    pub ids_per_second: f64,
    /// Ids computed per second by all hosts in the last seconds.
    pub ids_per_second_now: f64,
    /// Seconds until the end at the average rate; `null` while nothing is done.
    pub eta_seconds: Option<f64>,
    /// Seconds until the end at the faster and at the slower of the two rates.
    pub eta_range_seconds: Option<(f64, f64)>,
    /// Seconds since the pass began, or its duration.
    pub seconds: f64,
    /// Seconds since a worker received the oldest open batch; `null` if none is held.
    pub oldest_batch_seconds: Option<f64>,
    /// The priority; each step doubles the run's share of the cores.
    pub priority: i8,
    /// The rate limit of the run, in ids per second over the whole fleet.
    pub rate: Option<u32>,
    /// The number of dead letters above which the run is paused.
    pub max_dead: Option<u64>,
    /// Why Millstream paused the run; `null` if an operator did.
    pub paused_for: Option<String>,
    /// The number of ids that wait for another attempt now.
    pub asking: u64,
    /// The reason that one of these ids gave.
    pub asking_why: Option<String>,
    /// Processes that work for this pipeline now.
    pub hosts: Vec<HostReport>,
    /// The answer of the pipeline's summary query when the pass was sealed.
    pub summary: Option<Vec<serde_json::Value>>,
    /// Why the summary query failed.
    pub summary_fault: Option<String>,
    /// Why the pass can never be complete, because its base has lost rows to copy; and what helps.
    pub base_gone: Option<String>,
    /// What keeps the pass from its seal, or blocks ClickHouse, and what helps.
    pub stuck: Vec<String>,
    /// Whether the removal of the pass was begun and not finished; `forget` finishes it.
    pub forgetting: bool,
    /// When the pass was sealed, in milliseconds since 1970; `null` before.
    pub sealed_at_ms: Option<u64>,
    /// The number of rows at the seal, if fewer are stored now.
    pub rows_sealed: Option<u64>,
    /// The number of ids without a row, if nothing of the pass is on its way.
    pub missing: u64,
    /// What limits the run; `null` if nothing is computed.
    pub verdict: Option<Verdict>,
    /// Whether readers see the pass, as ClickHouse answered.
    pub readers_see: bool,
    /// Why readers do not see a sealed pass; or what is wrong with the view although they do.
    pub readers: Option<String>,
    /// The builds that computed a sealed pass, or that work on an open one now.
    pub builds: Vec<String>,
    /// The operator's materialized views that lack rows of this run.
    pub view_faults: Vec<ViewFault>,
    /// Why the view faults are unknown, if this user lacks the right to ask.
    pub view_faults_unknown: Option<String>,
}

/// Reads a run's status. Costs a few requests at any run size, and one for each process that works.
///
/// # Errors
/// [`Error::NoSuchRun`]; errors of NATS and ClickHouse.
pub async fn status(session: &Session, run: &RunName) -> Result<Status, Error> {
    let Session { broker, records, store } = session;
    // Boxed, because five requests at once are too large for a caller's future.
    let (record, pass, hosts, stream, now_ms) = tokio::try_join!(
        Box::pin(records.known_run(run)),
        Box::pin(records.newest_pass(run)),
        Box::pin(heartbeat::alive(records)),
        Box::pin(broker.rows_stream_size()),
        Box::pin(records.server_ms()),
    )?;
    let record = record.record;
    let pass = pass.map(|entry| entry.record);
    let id = run.pass(pass.as_ref().map_or(1, |pass| pass.pass));
    let mut status = begin(&record, pass.as_ref(), now_ms);
    // In the order of a batch's path: a batch that moves on meanwhile may be counted twice, but is never
    // missed.
    if let Some(workers) = broker.work_progress(&id).await? {
        status.note_workers(&workers, &record);
    }
    status.to_store = broker.sink_progress().await?.map_or(0, |sinks| verify::open(&sinks));
    match pass.as_ref().and_then(|pass| pass.sealed.as_ref()) {
        Some(sealed) => status.look_at_sealed(store, &id, sealed).await?,
        None => status.look_at_stored(session, &id, (&record, pass.as_ref())).await?,
    }
    status.look_at_views(store, run).await?;
    status.note_lag(stream);
    if !status.is_over() {
        status.stuck = verify::stuck_by(&hosts, &id);
    }
    status.stuck.extend(store.hindrances().await?);
    status.hosts = hosts;
    status.look_at_hosts();
    status.rate();
    status.judge();
    if record.is_open() && record.published.is_none() {
        (status.eta_seconds, status.eta_range_seconds) = (None, None);
    }
    Ok(status)
}

/// The number of ids of a published pass without a row, if nothing of it is on its way. Asked only once workers
/// are done with the pass.
async fn missing(
    session: &Session,
    id: &PassId,
    (record, pass): (&RunRecord, Option<&PassRecord>),
    rows: u64,
    status: &Status,
) -> Result<u64, Error> {
    let Session { broker, records, store } = session;
    let covers = pass.and_then(|pass| pass.covers.as_ref());
    let published = record.published.as_ref().map(|published| published.ids);
    let wanted = covers.map_or(published, |covers| covers.ids).unwrap_or(0);
    let lacking = wanted.saturating_sub(rows);
    if lacking == 0 || status.pending + status.in_flight > 0 || status.state == RunState::Paused {
        return Ok(0);
    }
    let nothing_comes = match verify::landing_now(session, id).await? {
        Landing::Over => true,
        Landing::Settled { acked } => match (covers, &record.published) {
            (None, Some(published)) => {
                verify::is_held_by_none(broker, records, id).await?
                    && !verify::come_again(broker, store, id, published.batches, acked).await?
            }
            _ => false,
        },
        Landing::UnderWay(_) | Landing::Left(_) => false,
    };
    // Rows may have been inserted between the count above and the check of their whereabouts.
    if nothing_comes { Ok(wanted.saturating_sub(store.raw_rows(id).await?)) } else { Ok(0) }
}

fn begin(record: &RunRecord, pass: Option<&PassRecord>, now_ms: u64) -> Status {
    let published = record.published.as_ref();
    let sealed = pass.and_then(|pass| pass.sealed.as_ref());
    let started = pass.map_or(record.created_ms, |pass| pass.started_ms);
    let expected = record.expected_ids.unwrap_or(0);
    let ended = sealed.map_or(now_ms, |sealed| sealed.at_ms);
    Status {
        run: record.run.clone(),
        pass: pass.map_or(1, |pass| pass.pass),
        state: RunState::of(record, pass),
        source: record.source.clone(),
        batches: published
            .map_or(expected.div_ceil(u64::from(record.batch_ids)), |published| u64::from(published.batches)),
        ids: published.map_or(expected, |published| published.ids),
        done: sealed.map_or(0, |sealed| sealed.rows),
        dead: sealed.map_or(0, |sealed| sealed.dead),
        dead_sealed: None,
        in_flight: 0,
        pending: 0,
        redelivered: 0,
        to_store: 0,
        lag_rows: 0,
        lag_bytes: 0,
        ids_per_second: 0.0,
        ids_per_second_now: 0.0,
        eta_seconds: None,
        eta_range_seconds: None,
        seconds: ended.saturating_sub(started) as f64 / 1000.0,
        oldest_batch_seconds: None,
        priority: pass.map_or(0, |pass| pass.priority),
        rate: pass.and_then(|pass| pass.rate),
        max_dead: pass.and_then(|pass| pass.max_dead),
        paused_for: pass.and_then(|pass| pass.paused_for.clone()),
        asking: 0,
        asking_why: None,
        hosts: Vec::new(),
        summary: sealed.and_then(|sealed| sealed.summary.clone()),
        summary_fault: sealed.and_then(|sealed| sealed.summary_fault.clone()),
        base_gone: None,
        stuck: Vec::new(),
        forgetting: pass.is_some_and(|pass| pass.forgetting),
        sealed_at_ms: sealed.map(|sealed| sealed.at_ms),
        rows_sealed: None,
        missing: 0,
        verdict: None,
        readers_see: false,
        readers: None,
        builds: sealed.map(|sealed| sealed.builds.clone()).unwrap_or_default(),
        view_faults: Vec::new(),
        view_faults_unknown: None,
    }
}

impl Status {
    /// Records the state of the pass's workers.
    fn note_workers(&mut self, workers: &consumer::Info, record: &RunRecord) {
        self.in_flight = workers.num_ack_pending as u64;
        // After an open run has ended, its last message is the end marker, not a batch.
        let has_end = record.is_open() && record.published.is_some();
        self.pending = workers.num_pending.saturating_sub(u64::from(has_end));
        self.redelivered = workers.num_redelivered as u64;
    }

    /// Counts the stored rows of a sealed pass, and checks whether readers see it.
    async fn look_at_sealed(&mut self, store: &Store, id: &PassId, sealed: &Sealed) -> Result<(), Error> {
        let sight = store.sight(id, sealed.rows.saturating_sub(sealed.dead), false).await?;
        (self.readers_see, self.readers) = (sight.sees, sight.why);
        self.dead = store.dead_ids(id, sealed.dead).await?;
        self.dead_sealed = Some(sealed.dead).filter(|dead| *dead != self.dead);
        self.done = store.raw_rows(id).await?.min(sealed.rows);
        self.rows_sealed = Some(sealed.rows).filter(|rows| *rows > self.done);
        self.missing = sealed.rows - self.done;
        Ok(())
    }

    /// Counts the stored rows of an unsealed pass, and what it lacks for good.
    async fn look_at_stored(
        &mut self,
        session: &Session,
        id: &PassId,
        (record, pass): (&RunRecord, Option<&PassRecord>),
    ) -> Result<(), Error> {
        let store = &session.store;
        let letters = Letters::default();
        let (rows, dead) = tokio::try_join!(store.raw_rows(id), store.dead_rows(id, &letters))?;
        if record.is_open() && record.published.is_none() {
            // The final number is unknown.
            self.ids = rows;
        }
        // Raw duplicates, which only FINAL removes, must not make the number exceed the total.
        self.done = rows.min(self.ids);
        self.dead = dead;
        if self.is_over() {
            return Ok(());
        }
        // Boxed, because it is seldom called and too large for a caller's future.
        let missing = Box::pin(missing(session, id, (record, pass), rows, self)).await?;
        self.missing = missing;
        let covers = pass.and_then(|pass| pass.covers.as_ref());
        if let (Some(covers), Some(published)) = (covers, &record.published)
            && rows < published.ids
        {
            let gone = base_gone(store, id, covers, published.ids).await?;
            self.base_gone = gone.as_ref().map(full_hint);
        }
        Ok(())
    }

    /// Lists the materialized views that lack rows of the run.
    async fn look_at_views(&mut self, store: &Store, run: &RunName) -> Result<(), Error> {
        match store.view_faults(Some(run)).await {
            Ok(faults) => self.view_faults = faults,
            // A user who may only read results may still see the rest.
            Err(Error::Store { source, .. }) if source.is_denied() => {
                self.view_faults_unknown = Some(source.to_string());
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Estimates how far sinks are behind, from the `(messages, bytes)` of the rows stream.
    fn note_lag(&mut self, (messages, bytes): (u64, u64)) {
        // The messages may belong to any run; what this run lacks is the upper bound of its share.
        let rows = self.to_store * self.ids.div_ceil(self.batches.max(1));
        self.lag_rows = rows.min(self.ids.saturating_sub(self.done));
        self.lag_bytes = self.to_store * bytes / messages.max(1);
    }

    /// Finds what limits the run, while it goes on.
    fn judge(&mut self) {
        if !matches!(self.state, RunState::Publishing | RunState::Running) {
            return;
        }
        let found = verdict(&self.hosts, &self.run, Span::Recent, &self.scene());
        // The recent times of processes are from before this run.
        let is_early = self.seconds < (REPORT * RECENT as u32).as_secs_f64();
        let is_reported = !is_early || matches!(found.bottleneck, Bottleneck::Nobody | Bottleneck::Missing);
        self.verdict = is_reported.then_some(found);
    }

    fn rate(&mut self) {
        if self.done == 0 || self.seconds <= 0.0 {
            return;
        }
        self.ids_per_second = self.done as f64 / self.seconds;
        if self.state == RunState::Sealed {
            (self.eta_seconds, self.eta_range_seconds) = (Some(0.0), Some((0.0, 0.0)));
            return;
        }
        if !matches!(self.state, RunState::Publishing | RunState::Running) {
            return;
        }
        let left = self.ids.saturating_sub(self.done) as f64;
        let average = left / self.ids_per_second;
        self.eta_seconds = Some(average);
        let now = if self.ids_per_second_now > 0.0 { left / self.ids_per_second_now } else { average };
        self.eta_range_seconds = Some((average.min(now), average.max(now)));
    }

    /// Whether nothing more happens to the run without an operator.
    pub fn is_over(&self) -> bool {
        self.state.is_over()
    }

    /// Sums up what hosts do for this run.
    fn look_at_hosts(&mut self) {
        let pass = self.id();
        let shares = self.hosts.iter().filter_map(|host| host.share_of(&pass));
        let mut now = 0.0;
        let mut oldest = None;
        let mut held = 0;
        let mut asking = 0;
        let mut why = None;
        for share in shares {
            now += share.ids_per_second;
            held += share.held as u64;
            asking += share.asking;
            why = why.or_else(|| share.why.clone());
            if share.held > 0 {
                oldest = Some(share.oldest_seconds.max(oldest.unwrap_or(0.0)));
            }
        }
        (self.ids_per_second_now, self.oldest_batch_seconds) = (now, oldest);
        // A worker may still hold a batch of a pass that is sealed: its rows are stored.
        if !self.is_over() {
            (self.asking, self.asking_why) = (asking, why);
        }
        if !self.is_over() {
            let at_it = self.hosts.iter().filter(|host| host.share_of(&pass).is_some());
            self.builds = at_it.map(|host| host.build.clone()).filter(|build| !build.is_empty()).collect();
            self.builds.sort();
            self.builds.dedup();
        }
        if self.state == RunState::Paused {
            // NATS counts a message after its nak as in flight until a worker asks for it again.
            let open = self.pending + self.in_flight;
            self.in_flight = held.min(self.in_flight);
            self.pending = open - self.in_flight;
        }
    }

    /// Which pass of which run it is about.
    pub fn id(&self) -> PassId {
        self.run.pass(self.pass)
    }

    /// What the verdict needs to know about the run.
    pub fn scene(&self) -> Scene {
        Scene {
            publishing: self.state == RunState::Publishing,
            ended: self.state == RunState::Sealed,
            pending: self.pending,
            in_flight: self.in_flight,
            rows_to_store: self.lag_rows,
            asking: self.asking,
            ids_per_second: self.ids_per_second_now,
            oldest_seconds: self.oldest_batch_seconds.unwrap_or(0.0),
            missing: self.missing,
        }
    }
}
