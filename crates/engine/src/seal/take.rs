//! The steps to a seal on real servers: each asks or does one thing, and returns its result.

use millstream::Id;
use millstream::names::PassId;

use super::proof::Proof;
use super::sealer::Sealer;
use super::step::{Seen, Step};
use crate::clickhouse::store::Stored;
use crate::error::{Code, Error, StoreFault, full_hint};
use crate::fleet::heartbeat;
use crate::model::record::{PassRecord, PassState, Published, RunRecord, Sealed};
use crate::nats::bucket::Entry;
use crate::seal::copied::take_over;
use crate::seal::verify::{self, Landing, Repair};

/// A pass with this many ids is large: its proof takes long.
const LARGE_IDS: u64 = 20_000_000;

/// A sealer that is not first gives the others one more turn per this many ids: a proof of 10^9 ids takes
/// minutes.
const IDS_A_TURN: u64 = 50_000_000;

/// Data that steps of a pass leave for later ones. After a restart it is asked for again.
#[derive(Default)]
pub(super) struct Carried {
    /// Whether this process has made all the repairs that it makes by itself.
    pub is_out_of_repairs: bool,
    /// Whether the run's record is stored in ClickHouse.
    run_stored: bool,
    /// Whether the sinks know that no more rows come.
    flushed: bool,
    /// The turns that this sealer has left to others.
    turns: u64,
    /// Whether the last check of a cancelled pass found no ids message of it.
    pub(super) is_free: bool,
    run: Option<RunRecord>,
    /// The pass's record from before its proof, so that the seal cannot apply to a pass that was opened again
    /// since.
    before: Option<Entry<PassRecord>>,
    pub(super) proof: Option<Proof>,
    pub(super) sealed: Option<Sealed>,
}

impl Carried {
    fn published(&self) -> Option<(&RunRecord, &Published)> {
        let run = self.run.as_ref()?;
        Some((run, run.published.as_ref()?))
    }

    /// Whether the run is large: its proof takes long.
    pub(super) fn is_large(&self) -> bool {
        self.published().is_some_and(|(_, published)| published.ids >= LARGE_IDS)
    }

    /// Whether the input may hold one id twice.
    pub(super) fn may_repeat(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.may_repeat)
    }

    /// The revision of the pass's record, as it was before the proof.
    pub(super) fn revision(&self) -> Option<u64> {
        self.before.as_ref().map(|entry| entry.revision)
    }

    fn before(&self) -> Option<&PassRecord> {
        self.before.as_ref().map(|entry| &entry.record)
    }

    /// The number of ids to compute.
    fn wanted(&self) -> u64 {
        let covers = self.before().and_then(|pass| pass.covers.as_ref());
        let all = self.published().map_or(u64::MAX, |(_, published)| published.ids);
        covers.map_or(all, |covers| covers.ids.unwrap_or(u64::MAX))
    }
}

impl Sealer {
    /// Runs a step. If data of an earlier step is missing, the course starts over.
    pub(super) async fn take<I: Id>(
        &self,
        step: Step,
        pass: &PassId,
        carried: &mut Carried,
    ) -> Result<Seen, Error> {
        match step {
            Step::Read => self.read(pass, carried).await,
            Step::Ask => self.ask(pass, carried).await,
            Step::Count => self.count(pass, carried).await,
            Step::Landing => self.landing(pass).await,
            Step::Turn => self.turn(pass, carried).await,
            Step::TakeOver => Box::pin(self.take_over(pass, carried)).await,
            Step::Prove => self.prove(pass, carried).await,
            Step::Merge => self.merge(pass, carried).await,
            Step::Repair => Box::pin(self.repair::<I>(pass, carried)).await,
            Step::Show => Box::pin(self.show(pass, carried)).await,
            Step::Mark => match (carried.before.take(), carried.sealed.clone()) {
                (Some(entry), Some(sealed)) => self.mark(pass, entry, sealed).await,
                _ => Ok(Seen::Beaten),
            },
            Step::Finish => self.finish(pass).await,
            Step::Free => self.free(pass, &mut carried.is_free).await,
            Step::Rest => Ok(Seen::Finished),
        }
    }

    /// Records what an operator has to do, and logs it once.
    fn report_stuck(&self, pass: &PassId, why: &str) {
        if self.waits().note(pass, why) {
            tracing::error!(run = %pass.run, pass = pass.pass, why, code = %Code::PassWaits, "the pass is not sealed, and waits for an operator");
        }
    }

    async fn read(&self, pass: &PassId, carried: &mut Carried) -> Result<Seen, Error> {
        let is_published = carried.published().is_some();
        if !is_published {
            carried.run = Some(self.session.records.known_run(&pass.run).await?.record);
        }
        let Some((record, _)) = carried.published() else {
            // Until all ids are published nothing counts as missing, so no other step would create the consumer
            // again.
            self.session.broker.ensure_work_consumer(pass).await?;
            return Ok(Seen::Publishing);
        };
        // The run's record is stored in ClickHouse as soon as it is complete, because NATS is never the only
        // truth.
        if !carried.run_stored {
            self.session.store.keep_run(record).await?;
        }
        carried.run_stored = true;
        carried.before = self.session.records.pass(pass).await?;
        Ok(match &carried.before {
            None => Seen::Gone,
            Some(entry) if entry.record.state != PassState::Running => Seen::Gone,
            Some(entry) if verify::is_being_repaired(&self.session.records, entry).await? => {
                Seen::BeingRepaired
            }
            Some(entry) if entry.record.covers.as_ref().is_some_and(|covers| covers.ids.is_none()) => {
                Seen::Publishing
            }
            Some(_) => Seen::Published,
        })
    }

    async fn ask(&self, pass: &PassId, carried: &mut Carried) -> Result<Seen, Error> {
        let workers = self.session.broker.work_progress(pass).await?;
        if let Some(info) = &workers {
            self.session.broker.keep_ack_wait(&self.session.broker.names().ids_stream(), info).await?;
        }
        let (pending, open) = workers.map_or((0, 0), |info| (info.num_pending, info.num_ack_pending));
        if pending > 0 {
            carried.flushed = false;
            self.waits().clear(pass);
            return Ok(Seen::Computing);
        }
        if open == 0 && !std::mem::replace(&mut carried.flushed, true) {
            tracing::debug!(run = %pass.run, pass = pass.pass, "all batches of the pass are computed");
            self.state.bells.ring_computed();
        }
        let Some(sinks) = self.session.broker.sink_progress().await? else {
            // The operator deleted the consumer. A new one delivers everything that the stream holds.
            self.session.broker.ensure_sink_consumer().await?;
            return Ok(Seen::Undrawn);
        };
        let last = self.session.broker.last_rows(pass).await?.map_or(0, |last| last.sequence);
        Ok(match () {
            () if last > sinks.delivered.stream_sequence => Seen::Undrawn,
            () if open > 0 => Seen::InWorkers,
            () if last <= sinks.ack_floor.stream_sequence || verify::open(&sinks) == 0 => Seen::Landed,
            () => Seen::InSinks,
        })
    }

    async fn count(&self, pass: &PassId, carried: &Carried) -> Result<Seen, Error> {
        let rows = self.session.store.raw_rows(pass).await?;
        Ok(if rows >= carried.wanted() { Seen::Enough } else { Seen::Lacking })
    }

    async fn landing(&self, pass: &PassId) -> Result<Seen, Error> {
        let landing = verify::landing(&self.session, pass).await?;
        Ok(match landing {
            Landing::Over | Landing::Settled { .. } => Seen::Landed,
            Landing::UnderWay(why) => {
                tracing::debug!(run = %pass.run, pass = pass.pass, why, "rows of the pass are on their way to ClickHouse");
                Seen::InSinks
            }
            Landing::Left(why) => {
                self.report_stuck(pass, &why);
                Seen::Refused
            }
        })
    }

    async fn take_over(&self, pass: &PassId, carried: &Carried) -> Result<Seen, Error> {
        let (Some((record, published)), Some(before)) = (carried.published(), carried.before()) else {
            return Ok(Seen::Beaten);
        };
        let Some(covers) = &before.covers else { return Ok(Seen::TakenOver) };
        match take_over(&self.session.store, pass, covers, record.batch_ids, published).await {
            Ok(true) => Ok(Seen::TakenOver),
            Ok(false) => Ok(Seen::Incomplete),
            // A non-deterministic `--where` or a lost base cannot be fixed automatically; the operator has to
            // decide.
            Err(error @ (Error::BaseGone { .. } | Error::Unstable { .. } | Error::BaseValues { .. })) => {
                self.report_stuck(pass, &full_hint(&error));
                Ok(Seen::Stuck)
            }
            Err(error) => Err(error),
        }
    }

    /// The living sinks have a different order for each pass, and each gives those before it time to seal the
    /// pass.
    async fn turn(&self, pass: &PassId, carried: &mut Carried) -> Result<Seen, Error> {
        let Some((_, published)) = carried.published() else { return Ok(Seen::Beaten) };
        let turns =
            heartbeat::sinks_before(&self.session.records, pass).await? * (1 + published.ids / IDS_A_TURN);
        if carried.turns < turns {
            carried.turns += 1;
            return Ok(Seen::OthersTurn);
        }
        carried.turns = 0;
        Ok(Seen::OurTurn)
    }

    async fn prove(&self, pass: &PassId, carried: &mut Carried) -> Result<Seen, Error> {
        let Some((_, published)) = carried.published() else { return Ok(Seen::Beaten) };
        tracing::debug!(run = %pass.run, pass = pass.pass, ids = published.ids, "proving");
        let proof = Proof::take(&self.session.store, pass, published, carried.may_repeat()).await?;
        let Stored { batches, ids, raw_duplicates, .. } = proof.stored;
        let seen = match &proof {
            proof if proof.stored.is_moving => {
                tracing::debug!(run = %pass.run, pass = pass.pass, ids, "rows were inserted during the count: proving again");
                Seen::Moving
            }
            proof if !proof.is_complete() => {
                tracing::warn!(run = %pass.run, pass = pass.pass, batches, of_batches = published.batches, ids, of_ids = published.ids,
                    raw_duplicates, code = %Code::PassIncomplete, "proof failed: stored rows do not match the run");
                Seen::Incomplete
            }
            proof if !proof.is_clean() => {
                tracing::warn!(run = %pass.run, pass = pass.pass, rows = raw_duplicates, code = %Code::RawDuplicates, "raw duplicates found: deduplicating the run");
                Seen::Duplicates
            }
            proof => match proof.unproven() {
                Some(batches) => {
                    let run = &pass.run;
                    let why = format!(
                        "the values of {batches} batches cannot be proven: `verify {run} --values` says what is missing; `setup` of \
                         the build that computed them keeps its schema, and ALTER TABLE … ADD COLUMN brings a column back"
                    );
                    self.report_stuck(pass, &why);
                    Seen::Unproven
                }
                None => Seen::Clean,
            },
        };
        carried.proof = Some(proof);
        Ok(seen)
    }

    /// Removes raw duplicates. It has worked once there are no more rows than ids, whatever the server
    /// answered.
    async fn merge(&self, pass: &PassId, carried: &Carried) -> Result<Seen, Error> {
        let Some(proof) = &carried.proof else { return Ok(Seen::Beaten) };
        match self.session.store.merge_away(pass, proof.stored.ids).await {
            Ok(()) => {
                self.waits().clear(pass);
                Ok(Seen::Merged)
            }
            Err(error @ Error::NotMerged { .. }) => {
                self.report_stuck(pass, &full_hint(&error));
                Ok(Seen::NotMerged)
            }
            Err(error) => Err(error),
        }
    }

    /// Has lost rows computed again where possible, and reports what an operator has to do about the rest.
    async fn repair<I: Id>(&self, pass: &PassId, carried: &Carried) -> Result<Seen, Error> {
        let run = &pass.run;
        if carried.is_out_of_repairs {
            let why = format!(
                "it is still incomplete after {} repairs: `verify {run}` names what is missing, `verify {run} --repair` \
                 tries again",
                super::step::REPAIRS
            );
            self.report_stuck(pass, &Code::RepairsSpent.mark(&why));
            return Ok(Seen::Stuck);
        }
        match verify::heal::<I>(&self.session, pass).await {
            Ok(Repair { busy: Some(why), .. }) => {
                tracing::debug!(run = %pass.run, pass = pass.pass, why, "the pass is incomplete, and cannot be repaired yet");
                Ok(Seen::NotRepaired)
            }
            Ok(Repair { stuck: Some(why), .. }) => {
                self.report_stuck(pass, &why);
                Ok(Seen::Stuck)
            }
            // Rows were inserted since the count.
            Ok(repair) if repair.is_nothing() => Ok(Seen::NotRepaired),
            Ok(repair) => {
                log_repair(pass, &repair);
                if repair.comes_to() > 0 {
                    self.metrics().repaired(repair.batches_again + repair.batches_handed_out);
                }
                match repair.hint(pass.run.as_str()) {
                    Some(hint) => {
                        self.report_stuck(pass, &format!("ids of the pass are not in the stream: {hint}"))
                    }
                    None => self.waits().clear(pass),
                }
                // A repair that waits for its input does not count as an attempt.
                Ok(if repair.comes_to() > 0 { Seen::Repaired } else { Seen::NotRepaired })
            }
            Err(error) if error.is_nobody() => Err(error),
            // ClickHouse broke off; an operator need not act.
            Err(error @ Error::Store { source: StoreFault::Unclear(_) | StoreFault::Silent(_), .. }) => {
                Err(error)
            }
            // The operator has to remove the cause, and this does not count as a repair.
            Err(error @ (Error::Mutation { .. } | Error::NotRemoved { .. } | Error::NotMerged { .. })) => {
                self.report_stuck(pass, &full_hint(&error));
                Ok(Seen::Stuck)
            }
            Err(error) => {
                let why =
                    format!("{}; run `verify {run} --repair` as a user with more rights", full_hint(&error));
                self.report_stuck(pass, &why);
                Ok(Seen::Repaired)
            }
        }
    }
}

fn log_repair(pass: &PassId, repair: &Repair) {
    let Repair {
        batches_again, batches_handed_out, duplicates_merged, whole_run, ids_gone, ids_damaged, ..
    } = repair;
    if repair.comes_to() > 0 {
        tracing::warn!(run = %pass.run, pass = pass.pass, batches_again, batches_handed_out, whole_run, duplicates_merged,
            code = %Code::PassIncomplete, "repaired what was not complete");
    }
    if let Some(hint) = repair.hint(pass.run.as_str()) {
        tracing::error!(run = %pass.run, pass = pass.pass, ids_gone = ids_gone.len(), ids_damaged = ids_damaged.len(), hint, code = %Code::IdsNotInStream,
            "batches are missing whose ids are not in the stream");
    }
}
