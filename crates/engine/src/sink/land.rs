//! Storing one group: ask, insert missing rows, ask, ack stored rows, and repeat with the rest.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millstream::names::PassId;
use millstream::schema::Schema;
use tracing::{Instrument, Level, Span, field};

use super::group::{GroupKey, Item};
use super::schemas::Known;
use super::step::{Seen, Step, is_landed};
use super::{ASKING, INSERTING, Sink};
use crate::clickhouse::store::{Fit, in_ranges};
use crate::error::{Code, Error, StoreFault, full_cause};
use crate::failpoint;
use crate::model::host::{Cause, REFUSED_HINT};
use crate::nats::delivery::REDELIVER_AFTER;
use crate::retry::Backoff;

/// Pauses between attempts while ClickHouse is away: bounded so that the sink soon notices its return.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Longest redelivery delay of rows that the table does not take.
const LEFT_AT_MOST: Duration = Duration::from_secs(600);

/// Most traces that an insert's span lists.
const TRACES: usize = 32;

/// A group on its way into ClickHouse.
struct Landing<'a> {
    sink: &'a Sink,
    key: &'a GroupKey,
    schema: Arc<Schema>,
    /// Whether the table's types are wider than the rows' types, so that the server has to convert values.
    wider: bool,
    items: Vec<Item>,
    pause: Backoff,
    /// The query id of the last insert.
    query_id: String,
    /// Why the last step failed.
    fault: StoreFault,
    /// How the last insert failed, until it is known whether its rows are stored anyway.
    failed: Option<StoreFault>,
}

impl Sink {
    /// Returns when every item is ended: acked after ClickHouse reported all of its ids, or returned to the stream.
    pub(super) async fn land(&self, key: &GroupKey, mut items: Vec<Item>) {
        // Batches arrive as workers finish them; in order, ClickHouse has nothing to sort.
        items.sort_unstable_by_key(|item| item.rows.portion.batch);
        let Some(Known { schema, fit }) = self.judge(key, &items).await else {
            return hand_back(items, Duration::ZERO).await;
        };
        let schema = match (schema, &fit) {
            (Some(schema), Fit::Exact | Fit::Wider) => schema,
            (_, Fit::Unfit(faults)) => return self.leave(key, items, faults).await,
            (None, _) => return self.leave(key, items, &[]).await,
        };
        self.state.left.fits(key.schema);
        let pause = Backoff::new(PAUSE.0, PAUSE.1);
        let wider = fit == Fit::Wider;
        let mut landing = Landing {
            sink: self,
            key,
            schema,
            wider,
            items,
            pause,
            query_id: String::new(),
            fault: unconfirmed(),
            failed: None,
        };
        let mut step = Step::Ask;
        loop {
            let seen = match step {
                Step::Ask | Step::Confirm => landing.ask().await,
                Step::Insert => landing.insert().await,
                Step::End => landing.end_insert().await,
                Step::Wait => landing.wait().await,
                Step::Apart => return landing.insert_alone().await,
                Step::HandBack => return hand_back(landing.items, Duration::ZERO).await,
                Step::SetBack => return hand_back(landing.items, self.store.insert_over()).await,
                Step::Done => return,
            };
            step = step.next(seen);
        }
    }

    /// Whether the table takes the columns of these rows; `None` when the sink gives up before ClickHouse answers.
    async fn judge(&self, key: &GroupKey, items: &[Item]) -> Option<Known> {
        let first = items.first()?;
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            let error = tokio::select! {
                known = self.schemas.judge(&self.store, key.schema, first) => match known {
                    Ok(known) => return Some(known),
                    Err(error) => error,
                },
                () = self.stop.given_up() => return None,
            };
            tracing::warn!(run = %key.pass.run, pass = key.pass.pass, error = full_cause(&error), "the table's columns cannot be read yet, trying again");
            if !self.stop.pause(pause.wait()).await {
                return None;
            }
        }
    }

    /// Returns rows that this table does not take now: for another sink, or for later. More redeliveries mean a longer
    /// delay.
    async fn leave(&self, key: &GroupKey, items: Vec<Item>, faults: &[String]) {
        let Some(first) = items.first() else { return };
        let why = format!("{}: {}", of_build(first), faults.join(", "));
        let delay = |item: &Item| {
            let times = u32::try_from(item.delivery.deliveries()).unwrap_or(u32::MAX);
            REDELIVER_AFTER.saturating_mul(times).min(LEFT_AT_MOST)
        };
        let longest = items.iter().map(delay).max().unwrap_or_default();
        self.state.left.note(key, Cause::Columns, why, longest);
        self.state.metrics.not_taken(Cause::Columns, items.len());
        for item in items {
            let delay = delay(&item);
            item.delivery.nak(delay).await;
        }
    }

    /// Returns rows that ClickHouse refuses although the table has their columns.
    async fn reject(&self, key: &GroupKey, items: Vec<Item>, fault: &StoreFault) {
        let drops = fault.constraint().map(|name| self.store.tables().drop_constraint(name));
        let helps = drops
            .map_or_else(String::new, |drops| format!("; `{drops}` takes that constraint from the table"));
        self.state.metrics.not_taken(Cause::Refused, items.len());
        for item in &items {
            self.state.left.note(
                key,
                Cause::Refused,
                format!("{}: {fault}{helps}", of_build(item)),
                REDELIVER_AFTER,
            );
            tracing::error!(
                subject = item.delivery.subject(),
                build = %String::from_utf8_lossy(&item.rows.build),
                %fault,
                hint = format!("{}{helps}", REFUSED_HINT.replace("RUN", key.pass.run.as_str())),
                code = %Code::RowsRefused,
                "ClickHouse refuses this batch's rows: they stay in the stream and are redelivered after 60 s"
            );
        }
        hand_back(items, REDELIVER_AFTER).await;
    }
}

impl Landing<'_> {
    async fn ask(&mut self) -> Seen {
        let asked_at = Instant::now();
        let given_up = self.sink.stop.clone();
        let settled = tokio::select! {
            settled = self.settle() => settled,
            () = given_up.given_up() => return Seen::GivenUp,
        };
        match settled {
            Ok(()) if self.items.is_empty() => Seen::AllStored,
            Ok(()) if self.sink.held.woke_since(asked_at) => Seen::Overslept,
            Ok(()) => Seen::Missing,
            Err(fault) => {
                self.fault = fault;
                Seen::NoAnswer
            }
        }
    }

    /// Acks stored rows.
    async fn settle(&mut self) -> Result<(), StoreFault> {
        failpoint::pass("sink-before-ask");
        let (asking, begun) = (self.sink.phases.begin(ASKING), Instant::now());
        let portions = self.items.iter().map(|item| &item.rows.portion);
        let stored = self.sink.store.ask(&self.key.pass, portions).await?;
        drop(asking);
        self.sink.state.metrics.asked(begun.elapsed());
        failpoint::pass("sink-after-ask");
        let mut stored = stored.into_iter();
        let mut landed = |item: &Item| stored.next().is_some_and(|stored| is_landed(item.rows.ids, stored));
        let landed: Vec<Item> = self.items.extract_if(.., |item| landed(item)).collect();
        // Before the ack, so that a kill between the two repeats the note instead of losing it.
        if let Err(fault) = self.note_views(&landed).await {
            self.items.extend(landed);
            self.items.sort_unstable_by_key(|item| item.rows.portion.batch);
            return Err(fault);
        }
        let has_landed = !landed.is_empty();
        for item in landed {
            self.sink.state.metrics.confirmed(item.rows.ids);
            item.delivery.ack().await;
            failpoint::pass("sink-after-ack");
        }
        if has_landed {
            self.sink.state.bells.ring_landed(&self.key.pass.run);
        }
        Ok(())
    }

    /// Notes views that may lack rows. Rows that are stored although their insert failed may be missing in an
    /// operator's materialized view. So may rows that were delivered to another process before, which did not report
    /// how its insert ended.
    async fn note_views(&mut self, landed: &[Item]) -> Result<(), StoreFault> {
        let of_others = |item: &&Item| self.query_id.is_empty() && item.delivery.deliveries() > 1;
        let (doubtful, fault): (Vec<&Item>, _) = match &self.failed {
            Some(fault) => (landed.iter().collect(), fault.clone()),
            None => (landed.iter().filter(of_others).collect(), unreported()),
        };
        if doubtful.is_empty() {
            self.failed = None;
            return Ok(());
        }
        let batches = in_ranges(doubtful.iter().map(|item| item.rows.portion.batch));
        let PassId { run, pass } = &self.key.pass;
        match self.sink.store.note_view_fault(&self.key.pass, &batches, &fault).await {
            // The note is written once the server answers again: until then no row is acked.
            Err(Error::Store { source: away @ (StoreFault::Unclear(_) | StoreFault::Silent(_)), .. }) => {
                return Err(away);
            }
            Ok(views) if views.is_empty() => {}
            Ok(views) => {
                self.sink.state.metrics.views_lack_rows(views.len());
                tracing::error!(%run, pass, batches = ?batches, views = views.join(", "), %fault,
                hint = "the rows are stored; repair the view, then `doctor` shows the statement that fills it",
                code = %Code::ViewLacksRows,
                "materialized views on the rows table may lack these rows")
            }
            Err(error) => tracing::error!(%run, pass, batches = ?batches, %fault, error = full_cause(&error),
                code = %Code::ViewLacksRows,
                "materialized views on the rows table may lack these rows, and the sink could not record this"),
        }
        self.failed = None;
        Ok(())
    }

    /// An insert under way is never dropped, because its outcome would be unknown.
    async fn insert(&mut self) -> Seen {
        let Sink { name, attempts, state, store, phases, .. } = self.sink;
        let _inserting = phases.begin(INSERTING);
        self.query_id = format!("{name}-{}", attempts.fetch_add(1, Ordering::Relaxed));
        // A repeated insert uses the same bytes (**own-the-bytes**).
        let bodies: Vec<Bytes> = self.items.iter().map(|item| item.rows.body.clone()).collect();
        let (rows, bytes) = (self.rows(), bodies.iter().map(|body| body.len() as u64).sum());
        let begun = Instant::now();
        failpoint::pass("sink-before-insert");
        let inserting = async {
            let inserted = store.insert_rows(&self.query_id, &self.schema, self.wider, &bodies).await;
            let (took_ms, done) = (begun.elapsed().as_millis() as u64, inserted.is_ok());
            tracing::debug!(took_ms, done, "insert");
            inserted
        };
        let inserted = inserting.instrument(self.span(rows, bytes)).await;
        failpoint::pass("sink-after-insert");
        let Err(fault) = inserted else {
            state.metrics.inserted(rows, bytes, begun.elapsed());
            (self.fault, self.failed) = (unconfirmed(), None);
            return Seen::Accepted;
        };
        let class = fault.class();
        state.metrics.insert_failed(class, begun.elapsed());
        (self.fault, self.failed) = (fault.clone(), Some(fault));
        Seen::Failed(class)
    }

    /// The span of the insert that `query_id` names. At level debug it lists the first traces of its batches.
    fn span(&self, rows: u64, bytes: u64) -> Span {
        let PassId { run, pass } = &self.key.pass;
        let table = self.sink.store.tables().rows();
        let messages = self.items.len();
        let span = tracing::info_span!(
            "insert", %run, pass, table, messages, rows, bytes, query_id = self.query_id, traces = field::Empty
        );
        if tracing::enabled!(Level::DEBUG) {
            let traces =
                self.items.iter().take(TRACES).map(|item| item.delivery.trace().trace_id().to_string());
            span.record("traces", traces.collect::<Vec<_>>().join(","));
        }
        span
    }

    fn rows(&self) -> u64 {
        self.items.iter().map(|item| item.rows.ids).sum()
    }

    /// Returns when an insert of unknown outcome is over, or when the sink gives up.
    async fn end_insert(&mut self) -> Seen {
        let query_id = &self.query_id;
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            match self.sink.store.kill(query_id).await {
                Ok(()) => return Seen::Ended,
                // Without the right to kill, the insert ends by its own time limit, and the sink asks again until then.
                Err(StoreFault::Exception { code: 497, text }) => {
                    tracing::warn!(
                        query_id,
                        text,
                        "no right to kill our own insert: waiting until it ends by its time limit"
                    );
                    return Seen::Ended;
                }
                Err(fault) => {
                    tracing::warn!(query_id, %fault, code = %Code::InsertUnknown, "an insert of unknown outcome cannot be ended yet")
                }
            }
            if !self.sink.stop.pause(pause.wait()).await {
                return Seen::GivenUp;
            }
        }
    }

    async fn wait(&mut self) -> Seen {
        let wait = self.pause.wait();
        let rows = self.rows();
        tracing::warn!(run = %self.key.pass.run, pass = self.key.pass.pass, batches = self.items.len(), rows, fault = %self.fault,
            retry_ms = wait.as_millis() as u64, code = %Code::RowsNotStored, "rows are not stored yet, trying again");
        if self.sink.stop.pause(wait).await { Seen::Waited } else { Seen::GivenUp }
    }

    /// Inserts each body alone, after ClickHouse refused one or all of them. The table may have changed, so its columns
    /// are read again. Valid bodies are then stored.
    async fn insert_alone(self) {
        let Self { sink, key, items, fault, wider, .. } = self;
        sink.schemas.doubt(key.schema);
        if items.len() > 1 {
            for item in items {
                Box::pin(sink.land(key, vec![item])).await;
            }
            return;
        }
        let Some(known) = sink.judge(key, &items).await else {
            return hand_back(items, Duration::ZERO).await;
        };
        match known.fit == if wider { Fit::Wider } else { Fit::Exact } {
            true => sink.reject(key, items, &fault).await,
            // The table has changed, so this recursion ends once it stops changing.
            false => Box::pin(sink.land(key, items)).await,
        }
    }
}

fn unconfirmed() -> StoreFault {
    StoreFault::Unclear("the insert succeeded, but some of its rows are not stored".into())
}

fn unreported() -> StoreFault {
    StoreFault::Unclear("the sink that had these rows before did not report how its insert ended".into())
}

async fn hand_back(items: Vec<Item>, delay: Duration) {
    for item in items {
        item.delivery.nak(delay).await;
    }
}

fn of_build(item: &Item) -> String {
    format!("rows of build `{}`", String::from_utf8_lossy(&item.rows.build))
}
