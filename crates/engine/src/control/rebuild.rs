//! Inserting the rows of a sealed pass once more, from the rows stream, into a table that has lost them: nothing is
//! computed.
//!
//! A consumer of its own draws the pass's rows, and the sink does with them what it does with any: asks, inserts what is
//! not there, asks, acks. A pass over some ids has the other rows from an older pass, which is brought back before it.
//! Readers see the result once all is proven. Killed at any point, the same words do it again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::consumer;
use millstream::names::RunName;
use serde::Serialize;

use crate::clickhouse::sql::SeenPass;
use crate::clickhouse::store::{Store, StoredBatch};
use crate::error::Error;
use crate::failpoint;
use crate::model::moment::{length, now_ms, shown};
use crate::model::record::{PassRecord, PassState, Published, RunRecord, Sealed};
use crate::model::rows::Drawn;
use crate::nats::broker::{Broker, Kept};
use crate::nats::bucket::Records;
use crate::seal::Proof;
use crate::seal::copied::{check_selected, copy_others};
use crate::sink::{SinkCounts, SinkPlan, sink};
use crate::stop::Stop;

/// How often it is looked whether all rows are drawn.
const LOOK: Duration = Duration::from_millis(200);

/// What a rebuild came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rebuilt {
    /// The pass.
    pub pass: u32,
    /// Rows that it has, one for each id.
    pub rows: u64,
    /// How many of all passes that were looked at were not there before.
    pub inserted: u64,
    /// Passes that were inserted, the oldest first.
    pub passes: Vec<u32>,
}

struct Rebuild<'a> {
    broker: &'a Broker,
    records: &'a Records,
    store: &'a Store,
    run: &'a RunName,
    record: &'a RunRecord,
    published: &'a Published,
    plan: SinkPlan,
    stop: &'a Stop,
}

/// Brings back the rows of a pass, or of the newest sealed one, and the records of it that readers need.
///
/// # Errors
/// [`Error::NoSuchPass`]; [`Error::NotSealed`]; [`Error::RowsGone`] when the stream does not have all that the table
/// lacks: then what it has is inserted; [`Error::RowsLeft`] when the table does not take them; [`Error::Stopped`]; those of the broker and ClickHouse.
pub async fn rebuild(
    broker: &Broker,
    records: &Records,
    store: &Store,
    run: &RunName,
    pass: Option<u32>,
    plan: SinkPlan,
    stop: &Stop,
) -> Result<Rebuilt, Error> {
    let record = records.known_run(run).await?.record;
    let Some(published) = record.published.clone() else {
        return Err(Error::NotPublished { run: run.to_string() });
    };
    let (record, published) = (&record, &published);
    let rebuild = Rebuild { broker, records, store, run, record, published, plan, stop };
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
    // The newest first: readers never see an older one in its place.
    for ((pass, _), proof) in chain.iter().zip(proofs.iter().rev()) {
        rebuild.show(pass, proof).await?;
    }
    rebuilt.rows = proofs.last().map_or(0, |proof| proof.stored.ids);
    Ok(rebuilt)
}

impl Rebuild<'_> {
    /// The pass that is asked for, and those that it needs rows from, with what is there of each. The last of them is whole,
    /// or took no rows from any.
    async fn chain(&self, pass: Option<u32>) -> Result<Vec<(PassRecord, Proof)>, Error> {
        let known = self.records.passes_of(self.run).await?;
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
                return Err(Error::NotSealed { run: run(), pass: next, state: record.state.word() });
            }
            let proof = self.proof(next).await?;
            let needs = record.covers.as_ref().filter(|_| !proof.is_complete());
            chain.push((record.clone(), proof));
            match needs {
                Some(covers) => next = covers.base,
                None => return Ok(chain),
            }
        }
    }

    async fn proof(&self, pass: u32) -> Result<Proof, Error> {
        Proof::take(self.store, self.run, pass, self.published, true).await
    }

    /// Inserts what the stream has of a pass, and copies what it took over.
    async fn insert(&self, pass: &PassRecord) -> Result<(), Error> {
        self.sink(pass.pass).await?;
        failpoint::pass("rebuild-after-sink");
        match &pass.covers {
            Some(covers) => {
                let Self { store, run, record, published, .. } = self;
                check_selected(store, run, covers).await?;
                copy_others(store, run, pass.pass, covers, record.batch_ids, published).await
            }
            None => Ok(()),
        }
    }

    /// Sinks until the pass's own consumer has nothing more to give.
    async fn sink(&self, pass: u32) -> Result<(), Error> {
        let broker = self.broker;
        broker.make_rebuild_consumer(self.run, pass).await?;
        let (counts, stage) = (Arc::new(SinkCounts::default()), self.stop.child());
        let watch = async {
            while !stage.taking_stopped() {
                let open = broker.rebuild_progress(self.run, pass).await;
                // A server that does not answer now is asked again: the sink waits for it too.
                let is_drawn = matches!(open, Ok(open) if open.as_ref().is_none_or(is_drawn));
                // Rows that the table does not take come again and again: the operator has to do something first.
                if is_drawn || !counts.left.faults().is_empty() {
                    stage.stop_taking();
                }
                tokio::select! {
                    () = tokio::time::sleep(LOOK) => {}
                    () = stage.no_more_taking() => {}
                }
            }
        };
        let plan = SinkPlan { drawn: Drawn::Pass(self.run.clone(), pass), ..self.plan.clone() };
        let sinking = Box::pin(sink(broker, self.store, plan, counts.clone(), &stage));
        let (sunk, ()) = tokio::join!(sinking, watch);
        sunk?;
        let faults = counts.left.faults();
        if !faults.is_empty() {
            broker.remove_rebuild_consumer(self.run, pass).await?;
            return Err(Error::RowsLeft { run: self.run.to_string(), pass, faults });
        }
        tracing::info!(pass, batches = counts.batches.load(Ordering::Relaxed), "inserted from the stream");
        if self.stop.taking_stopped() {
            return Err(Error::Stopped);
        }
        broker.remove_rebuild_consumer(self.run, pass).await
    }

    /// The proof that a pass is whole again.
    async fn prove(&self, pass: &PassRecord) -> Result<Proof, Error> {
        let mut proof = self.proof(pass.pass).await?;
        if proof.is_complete() && !proof.is_clean() {
            self.store.merge_away(self.run.as_str(), pass.pass, proof.stored.ids).await?;
            proof = self.proof(pass.pass).await?;
        }
        if proof.is_clean() {
            return Ok(proof);
        }
        let mut whole = 0;
        let count = |batch: StoredBatch| whole += u64::from(batch.ids == batch.expected);
        self.store.each_batch(self.run.as_str(), pass.pass, false, count).await?;
        let stream = self.broker.names().rows_stream();
        let why = match self.broker.kept(&stream).await? {
            Some(kept) => why(&kept, pass, now_ms()),
            None => "there is no such stream any more".to_owned(),
        };
        let (run, pass, batches) = (self.run.to_string(), pass.pass, self.published.batches);
        Err(Error::RowsGone {
            run,
            pass,
            stream,
            missing: u64::from(batches).saturating_sub(whole),
            batches,
            why,
        })
    }

    /// Makes a pass visible that was proven, unless it is.
    async fn show(&self, pass: &PassRecord, proof: &Proof) -> Result<(), Error> {
        let run = self.run.as_str();
        if self.store.sealed_passes(run).await?.iter().any(|seen| seen.pass == pass.pass) {
            return Ok(());
        }
        let sealed = match &pass.sealed {
            Some(sealed) => sealed.clone(),
            None => Sealed {
                rows: proof.stored.ids,
                dead: proof.stored.dead,
                repeated_ids: 0,
                at_ms: self.records.server_ms().await?,
                summary: None,
                summary_fault: None,
                builds: self.store.build_names(run, pass.pass).await?,
            },
        };
        let row = self.store.tables().insert_pass(run, &SeenPass::of(pass.pass, self.published, &sealed));
        self.store.write("make a pass visible again", &row).await
    }
}

/// Whether nothing is left to come, and nothing in anybody's hands.
fn is_drawn(info: &consumer::Info) -> bool {
    info.num_pending == 0 && info.num_ack_pending == 0
}

/// Why a stream does not have all rows of a pass.
fn why(kept: &Kept, pass: &PassRecord, now_ms: u64) -> String {
    let sealed_ms = pass.sealed.as_ref().map_or(pass.started_ms, |sealed| sealed.at_ms);
    let aged_out = pass.started_ms.saturating_add(kept.max_age.as_millis() as u64);
    if kept.max_age.is_zero() {
        return "it keeps rows until their pass is sealed, and no longer".to_owned();
    }
    if kept.created_ms > pass.started_ms {
        return format!("it was made anew {}", shown(kept.created_ms));
    }
    if aged_out <= now_ms {
        return format!(
            "it keeps rows for {}, so those went from {} on",
            length(kept.max_age),
            shown(aged_out)
        );
    }
    format!(
        "it keeps rows for {}, but they were removed by hand, or to make room when it was half full, or the pass was \
         sealed {} before that was set",
        length(kept.max_age),
        shown(sealed_ms)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_what_the_stream_lets_know() {
        const HOUR: u64 = 3_600_000;
        let run: RunName = "a".parse().expect("legal");
        let pass = PassRecord::begin(&run, 1, 100, 2 * HOUR);
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
            (kept(3 * HOUR, 9), "it was made anew 1970-01-01T03:00:00Z"),
            (kept(0, 1), "it keeps rows for 1h, so those went from 1970-01-01T03:00:00Z on"),
        ];
        for (kept, text) in table {
            assert_eq!(why(&kept, &pass, 4 * HOUR), text);
        }
        assert!(why(&kept(0, 9), &pass, 4 * HOUR).contains("or to make room"));
    }
}
