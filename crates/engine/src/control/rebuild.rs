//! Inserts the rows of a sealed pass again, from the rows stream, into a table that has lost them. Nothing is
//! computed.
//!
//! A separate consumer delivers the pass's rows to a sink, which treats them like any others: ask, insert what
//! is missing, ask, ack. A partial replay needs rows of an older pass, which is rebuilt first. Readers see the
//! result once all of it is proven. After a kill at any point the same command continues.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer;
use millstream::names::{PassId, RunName};
use serde::Serialize;

use crate::clickhouse::sql::SeenPass;
use crate::clickhouse::store::StoredBatch;
use crate::error::Error;
use crate::failpoint;
use crate::model::moment::{length, shown};
use crate::model::record::{PassRecord, PassState, Published, RunRecord, Sealed};
use crate::model::rows::Drawn;
use crate::nats::broker::Kept;
use crate::seal::Proof;
use crate::seal::copied::{check_selected, copy_others};
use crate::session::Session;
use crate::sink::{SinkPlan, SinkState, sink};
use crate::stop::Stop;

/// Interval between checks whether all rows are delivered.
const CHECK_EVERY: Duration = Duration::from_millis(200);

/// The result of a rebuild.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rebuilt {
    /// The number of the pass.
    pub pass: u32,
    /// The number of rows in the pass, one for each id.
    pub rows: u64,
    /// The number of rows, over all checked passes, that were missing before.
    pub inserted: u64,
    /// The passes that were inserted, the oldest first.
    pub passes: Vec<u32>,
}

struct Rebuild<'a> {
    session: &'a Session,
    run: &'a RunName,
    record: &'a RunRecord,
    published: &'a Published,
    plan: SinkPlan,
    stop: &'a Stop,
}

/// Restores the rows of a pass, or of the newest sealed one, and the records that readers need.
///
/// # Errors
/// [`Error::NoSuchPass`]; [`Error::NotSealed`]; [`Error::RowsGone`] when the stream lacks some of the missing
/// rows (the others are inserted); [`Error::RowsLeft`] when the table refuses rows; [`Error::Stopped`]; errors
/// of NATS and ClickHouse.
pub async fn rebuild(
    session: &Session,
    run: &RunName,
    pass: Option<u32>,
    plan: SinkPlan,
    stop: &Stop,
) -> Result<Rebuilt, Error> {
    let Session { records, store, .. } = session;
    let record = records.known_run(run).await?.record;
    let Some(published) = record.published.clone() else {
        return Err(Error::NotPublished { run: run.to_string() });
    };
    let record = &record;
    let published = &published;
    let rebuild = Rebuild { session, run, record, published, plan, stop };
    let chain = rebuild.chain(pass).await?;
    let mut rebuilt = Rebuilt { pass: chain[0].0.pass, rows: 0, inserted: 0, passes: Vec::new() };
    let mut proofs = Vec::new();
    for (pass, before) in chain.iter().rev() {
        if !before.is_complete() {
            rebuild.insert(pass).await?;
            rebuilt.passes.push(pass.pass);
        }
        let proof = rebuild.prove(pass).await?;
        rebuilt.inserted += proof.stored.ids.saturating_sub(before.stored.ids);
        proofs.push(proof);
    }
    failpoint::pass("rebuild-before-records");
    store.keep_run(record).await?;
    // The newest first, so that readers never see an older pass instead.
    for ((pass, _), proof) in chain.iter().zip(proofs.iter().rev()) {
        rebuild.show(pass, proof).await?;
    }
    rebuilt.rows = proofs.last().map_or(0, |proof| proof.stored.ids);
    Ok(rebuilt)
}

impl Rebuild<'_> {
    /// The requested pass and the passes whose rows it copied, each with its proof. The last one is complete,
    /// or copied no rows.
    async fn chain(&self, pass: Option<u32>) -> Result<Vec<(PassRecord, Proof)>, Error> {
        let known = self.session.records.passes_of(self.run).await?;
        let sealed = known.iter().rfind(|record| record.state == PassState::Sealed);
        let wanted = pass.or(sealed.map(|record| record.pass)).or(known.last().map(|record| record.pass));
        let mut next = wanted.unwrap_or(1);
        let mut chain = Vec::new();
        loop {
            let run = || self.run.to_string();
            let Some(record) = known.iter().find(|record| record.pass == next) else {
                let known = known.iter().map(|record| record.pass).collect();
                return Err(Error::NoSuchPass { run: run(), pass: next, known });
            };
            if record.state != PassState::Sealed {
                return Err(Error::NotSealed { run: run(), pass: next, state: record.state });
            }
            let proof = self.proof(&record.id()).await?;
            let needs = record.covers.as_ref().filter(|_| !proof.is_complete());
            chain.push((record.clone(), proof));
            match needs {
                Some(covers) => next = covers.base,
                None => return Ok(chain),
            }
        }
    }

    async fn proof(&self, pass: &PassId) -> Result<Proof, Error> {
        Proof::take(&self.session.store, pass, self.published, true).await
    }

    /// Inserts the rows of a pass from the stream, and copies its unchanged rows from its base.
    async fn insert(&self, pass: &PassRecord) -> Result<(), Error> {
        self.sink(&pass.id()).await?;
        failpoint::pass("rebuild-after-sink");
        match &pass.covers {
            Some(covers) => {
                let Self { session: Session { store, .. }, run, record, published, .. } = self;
                check_selected(store, run, covers).await?;
                copy_others(store, &pass.id(), covers, record.batch_ids, published).await
            }
            None => Ok(()),
        }
    }

    /// Runs a sink until the pass's own consumer has delivered everything.
    async fn sink(&self, pass: &PassId) -> Result<(), Error> {
        let broker = &self.session.broker;
        broker.make_rebuild_consumer(pass).await?;
        let state = Arc::new(SinkState::default());
        let stage = self.stop.child();
        let watch = async {
            while !stage.taking_stopped() {
                let open = broker.rebuild_progress(pass).await;
                // If the server does not answer, ask again: the sink waits for it too.
                let all_delivered = matches!(open, Ok(open) if open.as_ref().is_none_or(is_delivered));
                // Rows that the table refuses are redelivered for ever, until the operator acts.
                if all_delivered || !state.left.faults().is_empty() {
                    stage.stop_taking();
                }
                tokio::select! {
                    () = tokio::time::sleep(CHECK_EVERY) => {}
                    () = stage.no_more_taking() => {}
                }
            }
        };
        let plan = SinkPlan { drawn: Drawn::Pass(pass.clone()), ..self.plan.clone() };
        let sinking = Box::pin(sink(broker, &self.session.store, plan, state.clone(), &stage));
        let (sunk, ()) = tokio::join!(sinking, watch);
        sunk?;
        let faults = state.left.faults();
        if !faults.is_empty() {
            broker.remove_rebuild_consumer(pass).await?;
            return Err(Error::RowsLeft { run: pass.run.to_string(), pass: pass.pass, faults });
        }
        let messages = state.metrics.sink_counts().messages;
        tracing::info!(pass = pass.pass, messages, "inserted the pass's rows from the rows stream");
        if self.stop.taking_stopped() {
            return Err(Error::Stopped);
        }
        broker.remove_rebuild_consumer(pass).await
    }

    /// Proves that the pass is complete again.
    async fn prove(&self, pass: &PassRecord) -> Result<Proof, Error> {
        let id = pass.id();
        let mut proof = self.proof(&id).await?;
        if proof.is_complete() && !proof.is_clean() {
            self.session.store.merge_away(&id, proof.stored.ids).await?;
            proof = self.proof(&id).await?;
        }
        if proof.is_clean() {
            return Ok(proof);
        }
        let mut whole = 0;
        let count = |batch: StoredBatch| whole += u64::from(batch.ids == batch.expected);
        self.session.store.each_batch(&id, false, count).await?;
        let stream = self.session.broker.names().rows_stream();
        let why = match self.session.broker.kept(&stream).await? {
            Some(kept) => why(&kept, pass, self.session.records.server_ms().await?),
            None => "the stream no longer exists".to_owned(),
        };
        let batches = self.published.batches;
        Err(Error::RowsGone {
            run: id.run.to_string(),
            pass: id.pass,
            stream,
            missing: u64::from(batches).saturating_sub(whole),
            batches,
            why,
        })
    }

    /// Makes a proven pass visible, unless readers see it.
    async fn show(&self, pass: &PassRecord, proof: &Proof) -> Result<(), Error> {
        if self.session.store.sealed_passes(self.run).await?.iter().any(|seen| seen.pass == pass.pass) {
            return Ok(());
        }
        let sealed = match &pass.sealed {
            Some(sealed) => sealed.clone(),
            None => Sealed {
                rows: proof.stored.ids,
                dead: proof.stored.dead,
                repeated_ids: 0,
                at_ms: self.session.records.server_ms().await?,
                summary: None,
                summary_fault: None,
                builds: self.session.store.build_names(&pass.id()).await?,
            },
        };
        let row = self
            .session
            .store
            .tables()
            .insert_pass(self.run, &SeenPass::of(pass.pass, self.published, &sealed));
        self.session.store.write("make a pass visible again", &row).await
    }
}

/// Whether all messages are delivered and acked.
fn is_delivered(info: &consumer::Info) -> bool {
    info.num_pending == 0 && info.num_ack_pending == 0
}

/// Why the stream lacks rows of a pass.
fn why(kept: &Kept, pass: &PassRecord, now_ms: u64) -> String {
    let sealed_ms = pass.sealed.as_ref().map_or(pass.started_ms, |sealed| sealed.at_ms);
    let aged_out = pass.started_ms.saturating_add(kept.max_age.as_millis() as u64);
    if kept.max_age.is_zero() {
        return "it keeps rows until their pass is sealed, and no longer".to_owned();
    }
    if kept.created_ms > pass.started_ms {
        return format!("the stream was created again {}", shown(kept.created_ms));
    }
    if aged_out <= now_ms {
        return format!(
            "it keeps rows for {}, so those went from {} on",
            length(kept.max_age),
            shown(aged_out)
        );
    }
    format!(
        "it keeps rows for {}, but they were removed by hand, or purged when the stream was half full, or the pass was \
         sealed {} before that was set",
        length(kept.max_age),
        shown(sealed_ms)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_follows_from_the_stream_state() {
        const HOUR: u64 = 3_600_000;
        let run: RunName = "a".parse().expect("legal");
        let pass = PassRecord::begin(&run.pass(1), 100, 2 * HOUR);
        let kept = |created_ms, hours: u64| Kept {
            created_ms,
            oldest_ms: None,
            max_age: Duration::from_secs(hours * 3600),
            messages: 0,
            bytes: 0,
            max_bytes: 0,
        };
        let table = [
            (kept(0, 0), "it keeps rows until their pass is sealed, and no longer"),
            (kept(3 * HOUR, 9), "the stream was created again 1970-01-01T03:00:00Z"),
            (kept(0, 1), "it keeps rows for 1h, so those went from 1970-01-01T03:00:00Z on"),
        ];
        for (kept, text) in table {
            assert_eq!(why(&kept, &pass, 4 * HOUR), text);
        }
        assert!(why(&kept(0, 9), &pass, 4 * HOUR).contains("or purged when"));
    }
}
