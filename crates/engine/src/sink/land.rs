//! Landing one group: ask, insert what is not there, ask, ack what landed, again with the rest.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use std::sync::Arc;

use millstream::schema::Schema;

use super::group::{GroupKey, Item};
use super::schemas::Known;
use super::step::{Seen, Step, is_landed};
use super::{ASKING, INSERTING, SET_BACK, Sink};
use crate::clickhouse::store::{Fit, in_ranges};
use crate::error::{Code, Error, StoreFault, full_cause};
use crate::failpoint;
use crate::model::host::{Cause, REFUSED_HINT};
use crate::retry::Backoff;

/// Pauses between attempts while ClickHouse is away: bounded so that its return is noticed soon.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Rows that the table does not take come again after this at the latest.
const LEFT_AT_MOST: Duration = Duration::from_secs(600);

/// A group on its way into ClickHouse.
struct Landing<'a> {
    sink: &'a Sink,
    key: &'a GroupKey,
    schema: Arc<Schema>,
    /// Whether the table's types are wider than those of the rows, so that the server has to convert values.
    wider: bool,
    items: Vec<Item>,
    pause: Backoff,
    /// Of the last insert.
    query_id: String,
    /// Why the last step failed.
    fault: StoreFault,
    /// How the last insert failed, until it is known whether its rows are stored all the same.
    failed: Option<StoreFault>,
}

impl Sink {
    /// Returns when every item is ended: acked after ClickHouse said that all of its ids are there, or handed back.
    pub(super) async fn land(&self, key: &GroupKey, mut items: Vec<Item>) {
        // Batches come as workers finish them; in order, ClickHouse has nothing to sort.
        items.sort_unstable_by_key(|item| item.rows.portion.batch);
        let Some(Known { schema, fit }) = self.judge(key, &items).await else {
            return hand_back(items, Duration::ZERO).await;
        };
        let schema = match (schema, &fit) {
            (Some(schema), Fit::Exact | Fit::Wider) => schema,
            (_, Fit::Unfit(faults)) => return self.leave(key, items, faults).await,
            (None, _) => return self.leave(key, items, &[]).await,
        };
        self.counts.left.fits(key.schema);
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
                Step::Apart => return landing.apart().await,
                Step::HandBack => return hand_back(landing.items, Duration::ZERO).await,
                Step::SetBack => return hand_back(landing.items, self.store.insert_over()).await,
                Step::Done => return,
            };
            step = step.next(seen);
        }
    }

    /// What the table says of the columns of these rows; `None` when work is given up before it answers.
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
            tracing::warn!(run = %key.run, pass = key.pass, error = full_cause(&error), "the table's columns cannot be asked about yet, trying again");
            if !self.stop.pause(pause.wait()).await {
                return None;
            }
        }
    }

    /// Rows that this table does not take now: for another sink, or for later. The more often they came, the later.
    async fn leave(&self, key: &GroupKey, items: Vec<Item>, faults: &[String]) {
        let Some(first) = items.first() else { return };
        let why = format!("{}: {}", of_build(first), faults.join(", "));
        let delay = |item: &Item| {
            let times = u32::try_from(item.delivery.deliveries()).unwrap_or(u32::MAX);
            SET_BACK.saturating_mul(times).min(LEFT_AT_MOST)
        };
        let longest = items.iter().map(delay).max().unwrap_or_default();
        self.counts.left.note(key, Cause::Columns, why, longest);
        for item in items {
            let delay = delay(&item);
            item.delivery.nak(delay).await;
        }
    }

    /// Rows of columns that the table has, and which ClickHouse refuses all the same.
    async fn reject(&self, key: &GroupKey, items: Vec<Item>, fault: &StoreFault) {
        let drops = fault.constraint().map(|name| self.store.tables().drop_constraint(name));
        let helps = drops
            .map_or_else(String::new, |drops| format!("; `{drops}` takes that constraint from the table"));
        for item in &items {
            self.counts.left.note(
                key,
                Cause::Refused,
                format!("{}: {fault}{helps}", of_build(item)),
                SET_BACK,
            );
            tracing::error!(
                subject = item.delivery.subject(),
                build = %String::from_utf8_lossy(&item.rows.build),
                %fault,
                hint = format!("{}{helps}", REFUSED_HINT.replace("RUN", key.run.as_str())),
                code = %Code::RowsRefused,
                "ClickHouse refuses this batch's rows; they are kept and tried again in 60 s"
            );
        }
        hand_back(items, SET_BACK).await;
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

    /// Acks what is stored.
    async fn settle(&mut self) -> Result<(), StoreFault> {
        failpoint::pass("sink-before-ask");
        let asking = self.sink.phases.begin(ASKING);
        let portions = self.items.iter().map(|item| &item.rows.portion);
        let stored = self.sink.store.ask(self.key.run.as_str(), self.key.pass, portions).await?;
        drop(asking);
        failpoint::pass("sink-after-ask");
        let mut stored = stored.into_iter();
        let mut landed = |item: &Item| stored.next().is_some_and(|stored| is_landed(item.rows.ids, stored));
        let landed: Vec<Item> = self.items.extract_if(.., |item| landed(item)).collect();
        // Before the ack: a kill between the two has it noted once more.
        if let Err(fault) = self.note_views(&landed).await {
            self.items.extend(landed);
            self.items.sort_unstable_by_key(|item| item.rows.portion.batch);
            return Err(fault);
        }
        let has_landed = !landed.is_empty();
        for item in landed {
            self.sink.counts.rows.fetch_add(item.rows.ids, Ordering::Relaxed);
            self.sink.counts.batches.fetch_add(1, Ordering::Relaxed);
            item.delivery.ack().await;
            failpoint::pass("sink-after-ack");
        }
        if has_landed {
            self.sink.counts.bells.ring_landed(&self.key.run);
        }
        Ok(())
    }

    /// Rows that are stored although their insert failed may have come to no materialized view of the operator's. Neither may
    /// those that were delivered to another process before, which did not say how its insert ended.
    async fn note_views(&mut self, landed: &[Item]) -> Result<(), StoreFault> {
        let of_others = |item: &&Item| self.query_id.is_empty() && item.delivery.deliveries() > 1;
        let (doubtful, fault): (Vec<&Item>, _) = match &self.failed {
            Some(fault) => (landed.iter().collect(), fault.clone()),
            None => (landed.iter().filter(of_others).collect(), unsaid()),
        };
        if doubtful.is_empty() {
            self.failed = None;
            return Ok(());
        }
        let batches = in_ranges(doubtful.iter().map(|item| item.rows.portion.batch));
        let GroupKey { run, pass, .. } = self.key;
        let pass = *pass;
        match self.sink.store.note_view_fault(run.as_str(), pass, &batches, &fault).await {
            // It is noted once the server answers again: until then nothing is acked.
            Err(Error::Store { source: away @ (StoreFault::Unclear(_) | StoreFault::Silent(_)), .. }) => {
                return Err(away);
            }
            Ok(views) if views.is_empty() => {}
            Ok(views) => {
                tracing::error!(%run, pass, batches = ?batches, views = views.join(", "), %fault,
                hint = "the rows are stored; mend the view, then `doctor` shows the statement that fills it",
                code = %Code::ViewLacksRows,
                "materialized views on the rows table may lack these rows")
            }
            Err(error) => tracing::error!(%run, pass, batches = ?batches, %fault, error = full_cause(&error),
                code = %Code::ViewLacksRows,
                "materialized views on the rows table may lack these rows, and this could not be written down"),
        }
        self.failed = None;
        Ok(())
    }

    /// An insert under way is never dropped: what became of it would not be known.
    async fn insert(&mut self) -> Seen {
        let Sink { name, attempts, counts, store, phases, .. } = self.sink;
        let _inserting = phases.begin(INSERTING);
        self.query_id = format!("{name}-{}", attempts.fetch_add(1, Ordering::Relaxed));
        // From the same bytes as before, if there was a before (**own-the-bytes**).
        let bodies: Vec<_> = self.items.iter().map(|item| item.rows.body.clone()).collect();
        counts.inserts.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        failpoint::pass("sink-before-insert");
        let inserted = store.insert_rows(&self.query_id, &self.schema, self.wider, &bodies).await;
        failpoint::pass("sink-after-insert");
        let (took_ms, done) = (begun.elapsed().as_millis() as u64, inserted.is_ok());
        tracing::debug!(query_id = self.query_id, batches = bodies.len(), took_ms, done, "insert");
        let Err(fault) = inserted else {
            (self.fault, self.failed) = (unconfirmed(), None);
            return Seen::Accepted;
        };
        counts.failed_inserts.fetch_add(1, Ordering::Relaxed);
        let class = fault.class();
        (self.fault, self.failed) = (fault.clone(), Some(fault));
        Seen::Failed(class)
    }

    /// Returns when an insert of unknown outcome is over, or when work is given up.
    async fn end_insert(&mut self) -> Seen {
        let query_id = &self.query_id;
        let mut pause = Backoff::new(PAUSE.0, PAUSE.1);
        loop {
            match self.sink.store.kill(query_id).await {
                Ok(()) => return Seen::Ended,
                // Not allowed to: it ends by its own time limit, and is asked about again and again until then.
                Err(StoreFault::Exception { code: 497, text }) => {
                    tracing::warn!(query_id, text, "no right to kill an insert of our own");
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
        let rows: u64 = self.items.iter().map(|item| item.rows.ids).sum();
        tracing::warn!(run = %self.key.run, pass = self.key.pass, batches = self.items.len(), rows, fault = %self.fault,
            retry_ms = wait.as_millis() as u64, code = %Code::RowsNotStored, "rows are not stored yet, trying again");
        if self.sink.stop.pause(wait).await { Seen::Waited } else { Seen::GivenUp }
    }

    /// One of these bodies is refused, or all of them, as the table is another by now: it is asked once more. Alone, those
    /// that are at no fault land.
    async fn apart(self) {
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
            // The table has changed. It cannot change with each attempt for long.
            false => Box::pin(sink.land(key, items)).await,
        }
    }
}

fn unconfirmed() -> StoreFault {
    StoreFault::Unclear("the insert is done, and not all of its rows are there".into())
}

fn unsaid() -> StoreFault {
    StoreFault::Unclear("the sink that had these rows before did not say how its insert ended".into())
}

async fn hand_back(items: Vec<Item>, delay: Duration) {
    for item in items {
        item.delivery.nak(delay).await;
    }
}

fn of_build(item: &Item) -> String {
    format!("rows of build `{}`", String::from_utf8_lossy(&item.rows.build))
}
