//! The steps to a seal on real servers: each asks or does one thing, and says what it came to.

use millstream::Id;
use millstream::names::RunName;

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

/// A pass of so many ids is a large one: its proof takes long.
const LARGE_IDS: u64 = 20_000_000;

/// A sealer that comes after another gives it one turn more for each so many ids of the pass: a proof of 10^9 takes minutes.
const IDS_A_TURN: u64 = 50_000_000;

/// What steps of a pass hand to later ones. Lost with the process, it is asked for again.
#[derive(Default)]
pub(super) struct Carried {
    /// Whether this process has made all the repairs that it makes by itself.
    pub is_out_of_repairs: bool,
    /// Whether the run's record is kept in ClickHouse.
    run_kept: bool,
    /// Whether sinks were told that no more rows come.
    hurried: bool,
    /// Turns that were left to other sealers.
    turns: u64,
    /// Whether the last look at a cancelled pass found no message of its ids.
    pub(super) is_free: bool,
    run: Option<RunRecord>,
    /// The pass's record as it was before its proof, so that the seal cannot be that of a pass which was opened again since.
    before: Option<Entry<PassRecord>>,
    pub(super) proof: Option<Proof>,
    pub(super) sealed: Option<Sealed>,
}

impl Carried {
    fn published(&self) -> Option<(&RunRecord, &Published)> {
        let run = self.run.as_ref()?;
        Some((run, run.published.as_ref()?))
    }

    /// Whether its run is a large one: its proof takes long.
    pub(super) fn is_large(&self) -> bool {
        self.published().is_some_and(|(_, published)| published.ids >= LARGE_IDS)
    }

    /// Whether the input can hold one id twice.
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

    /// Ids that are to be computed.
    fn wanted(&self) -> u64 {
        let covers = self.before().and_then(|pass| pass.covers.as_ref());
        let all = self.published().map_or(u64::MAX, |(_, published)| published.ids);
        covers.map_or(all, |covers| covers.ids.unwrap_or(u64::MAX))
    }
}

impl Sealer {
    /// Takes a step. What an earlier step should have carried and has not is asked for again from the start.
    pub(super) async fn take<I: Id>(
        &self,
        step: Step,
        run: &RunName,
        pass: u32,
        carried: &mut Carried,
    ) -> Result<Seen, Error> {
        match step {
            Step::Read => self.read(run, pass, carried).await,
            Step::Ask => self.ask(run, pass, carried).await,
            Step::Count => self.count(run, pass, carried).await,
            Step::Landing => self.landing(run, pass).await,
            Step::Turn => self.turn(run, pass, carried).await,
            Step::TakeOver => Box::pin(self.take_over(run, pass, carried)).await,
            Step::Prove => self.prove(run, pass, carried).await,
            Step::Merge => self.merge(run, pass, carried).await,
            Step::Repair => Box::pin(self.repair::<I>(run, pass, carried)).await,
            Step::Show => Box::pin(self.show(run, pass, carried)).await,
            Step::Mark => match (carried.before.take(), carried.sealed.clone()) {
                (Some(entry), Some(sealed)) => self.mark(run, entry, sealed).await,
                _ => Ok(Seen::Beaten),
            },
            Step::Finish => self.finish(run, pass).await,
            Step::Free => self.free(run, pass, &mut carried.is_free).await,
            Step::Rest => Ok(Seen::Finished),
        }
    }

    /// Notes what a person has to see to, and says it once.
    fn tell(&self, run: &RunName, pass: u32, why: &str) {
        if self.waits().note(run, pass, why) {
            tracing::error!(%run, pass, why, code = %Code::PassWaits, "the pass is not sealed, and waits");
        }
    }

    async fn read(&self, run: &RunName, pass: u32, carried: &mut Carried) -> Result<Seen, Error> {
        let is_published = carried.published().is_some();
        if !is_published {
            carried.run = Some(self.records.known_run(run).await?.record);
        }
        let Some((record, _)) = carried.published() else {
            // Until all is published nothing counts as missing, so nothing else would bring it back.
            self.broker.ensure_work_consumer(run, pass).await?;
            return Ok(Seen::Publishing);
        };
        // The run's record is kept in ClickHouse from the moment it is complete: NATS is never the only truth.
        if !carried.run_kept {
            self.store.keep_run(record).await?;
        }
        carried.run_kept = true;
        carried.before = self.records.pass(run, pass).await?;
        Ok(match &carried.before {
            None => Seen::Gone,
            Some(entry) if entry.record.state != PassState::Running => Seen::Gone,
            Some(entry) if verify::is_being_repaired(&self.records, entry).await? => Seen::BeingRepaired,
            Some(entry) if entry.record.covers.as_ref().is_some_and(|covers| covers.ids.is_none()) => {
                Seen::Publishing
            }
            Some(_) => Seen::Published,
        })
    }

    async fn ask(&self, run: &RunName, pass: u32, carried: &mut Carried) -> Result<Seen, Error> {
        let workers = self.broker.work_progress(run, pass).await?;
        if let Some(info) = &workers {
            self.broker.keep_ack_wait(&self.broker.names().ids_stream(), info).await?;
        }
        let (pending, open) = workers.map_or((0, 0), |info| (info.num_pending, info.num_ack_pending));
        if pending > 0 {
            carried.hurried = false;
            self.waits().clear(run, pass);
            return Ok(Seen::Computing);
        }
        if open == 0 && !std::mem::replace(&mut carried.hurried, true) {
            tracing::debug!(%run, pass, "all batches are computed");
            self.counts.bells.ring_computed();
        }
        let Some(sinks) = self.broker.sink_progress().await? else {
            // The operator deleted it: made again, it delivers what the stream holds.
            self.broker.ensure_sink_consumer().await?;
            return Ok(Seen::Undrawn);
        };
        let last = self.broker.last_rows(run, pass).await?.map_or(0, |last| last.sequence);
        Ok(match () {
            () if last > sinks.delivered.stream_sequence => Seen::Undrawn,
            () if open > 0 => Seen::InWorkers,
            () if last <= sinks.ack_floor.stream_sequence || verify::open(&sinks) == 0 => Seen::Landed,
            () => Seen::InSinks,
        })
    }

    async fn count(&self, run: &RunName, pass: u32, carried: &Carried) -> Result<Seen, Error> {
        let rows = self.store.raw_rows(run.as_str(), pass).await?;
        Ok(if rows >= carried.wanted() { Seen::Enough } else { Seen::Lacking })
    }

    async fn landing(&self, run: &RunName, pass: u32) -> Result<Seen, Error> {
        let landing = verify::landing(&self.broker, &self.records, &self.store, (run, pass)).await?;
        Ok(match landing {
            Landing::Over | Landing::Settled { .. } => Seen::Landed,
            Landing::UnderWay(why) => {
                tracing::debug!(%run, pass, why, "rows are on their way");
                Seen::InSinks
            }
            Landing::Left(why) => {
                self.tell(run, pass, &why);
                Seen::Refused
            }
        })
    }

    async fn take_over(&self, run: &RunName, pass: u32, carried: &Carried) -> Result<Seen, Error> {
        let (Some((record, published)), Some(before)) = (carried.published(), carried.before()) else {
            return Ok(Seen::Beaten);
        };
        let Some(covers) = &before.covers else { return Ok(Seen::TakenOver) };
        match take_over(&self.store, run, pass, covers, record.batch_ids, published).await {
            Ok(true) => Ok(Seen::TakenOver),
            Ok(false) => Ok(Seen::Incomplete),
            // A selection that is another each time, or a base that is gone: what to do is for an operator to say.
            Err(error @ (Error::BaseGone { .. } | Error::Unstable { .. } | Error::BaseValues { .. })) => {
                self.tell(run, pass, &full_hint(&error));
                Ok(Seen::Stuck)
            }
            Err(error) => Err(error),
        }
    }

    /// Sinks that live come to a pass in an order of its own; each gives those before it time to seal it.
    async fn turn(&self, run: &RunName, pass: u32, carried: &mut Carried) -> Result<Seen, Error> {
        let Some((_, published)) = carried.published() else { return Ok(Seen::Beaten) };
        let turns =
            heartbeat::sinks_before(&self.records, run, pass).await? * (1 + published.ids / IDS_A_TURN);
        if carried.turns < turns {
            carried.turns += 1;
            return Ok(Seen::OthersTurn);
        }
        carried.turns = 0;
        Ok(Seen::OurTurn)
    }

    async fn prove(&self, run: &RunName, pass: u32, carried: &mut Carried) -> Result<Seen, Error> {
        let Some((_, published)) = carried.published() else { return Ok(Seen::Beaten) };
        tracing::debug!(%run, pass, ids = published.ids, "proving");
        let proof = Proof::take(&self.store, run, pass, published, carried.may_repeat()).await?;
        let Stored { batches, ids, raw_duplicates, .. } = proof.stored;
        let seen = match &proof {
            proof if proof.stored.is_moving => {
                tracing::debug!(%run, pass, ids, "rows landed while they were counted");
                Seen::Moving
            }
            proof if !proof.is_complete() => {
                tracing::warn!(%run, pass, batches, of_batches = published.batches, ids, of_ids = published.ids,
                    raw_duplicates, code = %Code::PassIncomplete, "not every id has its one row");
                Seen::Incomplete
            }
            proof if !proof.is_clean() => {
                tracing::warn!(%run, pass, rows = raw_duplicates, code = %Code::RawDuplicates, "raw duplicates found, merging them away");
                Seen::Duplicates
            }
            proof => match proof.unproven() {
                Some(batches) => {
                    let why = format!(
                        "the values of {batches} batches cannot be proven: `verify {run} --values` says what is missing; `setup` of \
                         the build that computed them keeps its schema, and ALTER TABLE … ADD COLUMN brings a column back"
                    );
                    self.tell(run, pass, &why);
                    Seen::Unproven
                }
                None => Seen::Clean,
            },
        };
        carried.proof = Some(proof);
        Ok(seen)
    }

    /// A merge has worked once the rows are no more than the ids, whatever the server answered.
    async fn merge(&self, run: &RunName, pass: u32, carried: &Carried) -> Result<Seen, Error> {
        let Some(proof) = &carried.proof else { return Ok(Seen::Beaten) };
        match self.store.merge_away(run.as_str(), pass, proof.stored.ids).await {
            Ok(()) => {
                self.waits().clear(run, pass);
                Ok(Seen::Merged)
            }
            Err(error @ Error::NotMerged { .. }) => {
                self.tell(run, pass, &full_hint(&error));
                Ok(Seen::NotMerged)
            }
            Err(error) => Err(error),
        }
    }

    /// Has computed again what can be, and says what a person has to do about the rest.
    async fn repair<I: Id>(&self, run: &RunName, pass: u32, carried: &Carried) -> Result<Seen, Error> {
        if carried.is_out_of_repairs {
            let why = format!(
                "it is still not complete after {} repairs: `verify {run}` names what is missing, `verify {run} --repair` \
                 tries again",
                super::step::REPAIRS
            );
            self.tell(run, pass, &Code::RepairsSpent.mark(&why));
            return Ok(Seen::Stuck);
        }
        match verify::heal::<I>(&self.broker, &self.records, &self.store, run, pass).await {
            Ok(Repair { busy: Some(why), .. }) => {
                tracing::debug!(%run, pass, why, "not repaired yet");
                Ok(Seen::NotRepaired)
            }
            Ok(Repair { stuck: Some(why), .. }) => {
                self.tell(run, pass, &why);
                Ok(Seen::Stuck)
            }
            // Rows landed since they were counted.
            Ok(repair) if repair.is_nothing() => Ok(Seen::NotRepaired),
            Ok(repair) => {
                told(run, pass, &repair);
                match repair.hint(run.as_str()) {
                    Some(hint) => self.tell(run, pass, &format!("ids of it are not in the stream: {hint}")),
                    None => self.waits().clear(run, pass),
                }
                // What has to wait for its input again is no attempt.
                Ok(if repair.comes_to() > 0 { Seen::Repaired } else { Seen::NotRepaired })
            }
            Err(error) if error.is_nobody() => Err(error),
            // ClickHouse broke off: nothing that a person has to see to.
            Err(error @ Error::Store { source: StoreFault::Unclear(_) | StoreFault::Silent(_), .. }) => {
                Err(error)
            }
            // What stands in the way is a person's to remove, and no repair is used up by it.
            Err(error @ (Error::Mutation { .. } | Error::NotRemoved { .. } | Error::NotMerged { .. })) => {
                self.tell(run, pass, &full_hint(&error));
                Ok(Seen::Stuck)
            }
            Err(error) => {
                let why =
                    format!("{}; `verify {run} --repair`, by a user with more rights", full_hint(&error));
                self.tell(run, pass, &why);
                Ok(Seen::Repaired)
            }
        }
    }
}

fn told(run: &RunName, pass: u32, repair: &Repair) {
    let Repair {
        batches_again, batches_handed_out, duplicates_merged, whole_run, ids_gone, ids_damaged, ..
    } = repair;
    if repair.comes_to() > 0 {
        tracing::warn!(%run, pass, batches_again, batches_handed_out, whole_run, duplicates_merged, code = %Code::PassIncomplete,
            "repaired what was not complete");
    }
    if let Some(hint) = repair.hint(run.as_str()) {
        tracing::error!(%run, pass, ids_gone = ids_gone.len(), ids_damaged = ids_damaged.len(), hint, code = %Code::IdsNotInStream,
            "batches are missing whose ids are not in the stream");
    }
}
