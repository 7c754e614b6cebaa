//! What is left to be done once a pass is over: the word of it, and what the broker holds of it. The pass's record says when that
//! is done, so whichever sealer comes next finishes what another began.

use millstream::names::RunName;
use serde::Serialize;

use super::sealer::Sealer;
use crate::error::Error;
use crate::failpoint;
use crate::model::record::{PassState, Sealed};
use crate::nats::bucket::Change;
use crate::seal::step::Seen;
use crate::seal::verify::{self, Landing};

/// What is announced of a sealed pass.
#[derive(Debug, Serialize)]
struct Announcement<'a> {
    run: &'a str,
    pass: u32,
    ids: u64,
    #[serde(flatten)]
    sealed: &'a Sealed,
}

impl Sealer {
    /// Removes what the broker holds of a cancelled pass, its rows once they are stored. `was_free` says whether the look before
    /// found no message of its ids.
    pub(super) async fn free(&self, run: &RunName, pass: u32, was_free: &mut bool) -> Result<Seen, Error> {
        let Some(mut entry) = self.records.pass(run, pass).await? else { return Ok(Seen::Gone) };
        if entry.record.state != PassState::Cancelled {
            return Ok(Seen::Gone);
        }
        // Its producer may not have heard of it yet: done is what twice had nothing to remove, a second or more apart.
        let is_free = self.broker.free_ids(run, &entry.record).await? == 0;
        if !(std::mem::replace(was_free, is_free) && is_free) {
            return Ok(Seen::NotFinished);
        }
        let landing = verify::landing(&self.broker, &self.records, &self.store, (run, pass)).await?;
        // What ClickHouse does not take goes with the rest.
        if matches!(landing, Landing::UnderWay(_)) {
            return Ok(Seen::NotFinished);
        }
        self.broker.purge_rows(self.broker.names().pass_rows(run, pass)).await?;
        // A sealer may have been about to say that it is sealed.
        self.store.hide(run.as_str(), Some(pass)).await?;
        entry.record.freed = true;
        if self.records.update_pass(&entry, run).await? == Change::Beaten {
            return Ok(Seen::NotFinished);
        }
        tracing::info!(%run, pass, "cancelled, and its messages are gone");
        Ok(Seen::Finished)
    }

    /// Announces a sealed pass, and removes its rows, which need no second copy where none was asked for, and the consumer that
    /// no worker draws from any more. A kill on the way has it done again: it is announced at least once.
    pub(super) async fn finish(&self, run: &RunName, pass: u32) -> Result<Seen, Error> {
        let Some(entry) = self.records.pass(run, pass).await? else { return Ok(Seen::Gone) };
        let (mut entry, sealed) = match entry.record.sealed.clone() {
            Some(sealed) if entry.record.state == PassState::Sealed && !entry.record.freed => (entry, sealed),
            // It is done; or a repair has opened the pass again, with a consumer of its own.
            _ => return Ok(Seen::Gone),
        };
        let may_purge = self.may_purge(run, pass).await?;
        if !entry.record.announced {
            let announcement = Announcement { run: run.as_str(), pass, ids: sealed.rows, sealed: &sealed };
            let bytes = serde_json::to_vec(&announcement).expect("names and numbers");
            self.broker.announce(self.broker.names().sealed_subject(run, pass), bytes.into()).await?;
        }
        if !may_purge {
            if !std::mem::replace(&mut entry.record.announced, true) {
                self.records.update_pass(&entry, run).await?;
            }
            return Ok(Seen::NotFinished);
        }
        failpoint::pass("seal-before-tidy");
        self.broker.purge_sealed(run, pass).await?;
        self.broker.remove_work_consumer(run, pass).await?;
        failpoint::pass("seal-after-tidy");
        entry.record.freed = true;
        Ok(match self.records.update_pass(&entry, run).await? {
            Change::Made => Seen::Finished,
            // Another sealer has done it; or the pass was opened again meanwhile, and makes its consumer anew.
            Change::Beaten => Seen::NotFinished,
        })
    }

    /// Whether no sink has to look at the rows once more. Where materialized views of the operator's are filled with them, a sink
    /// may have been killed in an INSERT that failed there: the next one that draws them says so.
    async fn may_purge(&self, run: &RunName, pass: u32) -> Result<bool, Error> {
        if !self.store.feeds_views() {
            return Ok(true);
        }
        let Some(sinks) = self.broker.sink_progress().await? else { return Ok(true) };
        let last = self.broker.last_rows(run, pass).await?;
        Ok(last.is_none_or(|last| last.sequence <= sinks.ack_floor.stream_sequence))
    }
}
