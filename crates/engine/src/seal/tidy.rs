//! What is left to be done once a pass is over: the word of it, and what the broker holds of it. The pass's record says when that
//! is done, so whichever sealer comes next finishes what another began.

use millstream::names::{PassId, RunName};
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
    run: &'a RunName,
    pass: u32,
    ids: u64,
    #[serde(flatten)]
    sealed: &'a Sealed,
}

impl Sealer {
    /// Removes what the broker holds of a cancelled pass, its rows once they are stored. `was_free` says whether the look before
    /// found no message of its ids.
    pub(super) async fn free(&self, pass: &PassId, was_free: &mut bool) -> Result<Seen, Error> {
        let Some(mut entry) = self.session.records.pass(pass).await? else { return Ok(Seen::Gone) };
        if entry.record.state != PassState::Cancelled {
            return Ok(Seen::Gone);
        }
        // Its producer may not have heard of it yet: done is what twice had nothing to remove, a second or more apart.
        let is_free = self.session.broker.free_ids(&pass.run, &entry.record).await? == 0;
        if !(std::mem::replace(was_free, is_free) && is_free) {
            return Ok(Seen::NotFinished);
        }
        let landing = verify::landing(&self.session, pass).await?;
        // What ClickHouse does not take goes with the rest.
        if matches!(landing, Landing::UnderWay(_)) {
            return Ok(Seen::NotFinished);
        }
        self.session.broker.purge_rows(self.session.broker.names().pass_rows(pass)).await?;
        // A sealer may have been about to say that it is sealed.
        self.session.store.hide(&pass.run, Some(pass.pass)).await?;
        entry.record.freed = true;
        if self.session.records.update_pass(&entry).await? == Change::Beaten {
            return Ok(Seen::NotFinished);
        }
        tracing::info!(run = %pass.run, pass = pass.pass, "cancelled, and its messages are gone");
        Ok(Seen::Finished)
    }

    /// Announces a sealed pass, and removes its rows, which need no second copy where none was asked for, and the consumer that
    /// no worker draws from any more. A kill on the way has it done again: it is announced at least once.
    pub(super) async fn finish(&self, pass: &PassId) -> Result<Seen, Error> {
        let Some(entry) = self.session.records.pass(pass).await? else { return Ok(Seen::Gone) };
        let (mut entry, sealed) = match entry.record.sealed.clone() {
            Some(sealed) if entry.record.state == PassState::Sealed && !entry.record.freed => (entry, sealed),
            // It is done; or a repair has opened the pass again, with a consumer of its own.
            _ => return Ok(Seen::Gone),
        };
        let may_purge = self.may_purge(pass).await?;
        if !entry.record.announced {
            let announcement =
                Announcement { run: &pass.run, pass: pass.pass, ids: sealed.rows, sealed: &sealed };
            let bytes = serde_json::to_vec(&announcement).expect("names and numbers");
            self.session
                .broker
                .announce(self.session.broker.names().sealed_subject(pass), bytes.into())
                .await?;
        }
        if !may_purge {
            if !std::mem::replace(&mut entry.record.announced, true) {
                self.session.records.update_pass(&entry).await?;
            }
            return Ok(Seen::NotFinished);
        }
        failpoint::pass("seal-before-tidy");
        self.session.broker.purge_sealed(pass).await?;
        self.session.broker.remove_work_consumer(pass).await?;
        failpoint::pass("seal-after-tidy");
        entry.record.freed = true;
        Ok(match self.session.records.update_pass(&entry).await? {
            Change::Made => Seen::Finished,
            // Another sealer has done it; or the pass was opened again meanwhile, and makes its consumer anew.
            Change::Beaten => Seen::NotFinished,
        })
    }

    /// Whether no sink has to look at the rows once more. Where materialized views of the operator's are filled with them, a sink
    /// may have been killed in an INSERT that failed there: the next one that draws them says so.
    async fn may_purge(&self, pass: &PassId) -> Result<bool, Error> {
        if !self.session.store.feeds_views() {
            return Ok(true);
        }
        let Some(sinks) = self.session.broker.sink_progress().await? else { return Ok(true) };
        let last = self.session.broker.last_rows(pass).await?;
        Ok(last.is_none_or(|last| last.sequence <= sinks.ack_floor.stream_sequence))
    }
}
