//! The last steps after a pass has ended: the announcement, and the removal of what NATS holds of it. The
//! pass's record marks them as done, so that any sealer can finish what another began.

use millstream::names::{PassId, RunName};
use serde::Serialize;

use super::sealer::Sealer;
use crate::error::Error;
use crate::failpoint;
use crate::model::record::{PassState, Sealed};
use crate::nats::bucket::Change;
use crate::seal::step::Seen;
use crate::seal::verify::{self, Landing};

/// The announcement of a sealed pass.
#[derive(Debug, Serialize)]
struct Announcement<'a> {
    run: &'a RunName,
    pass: u32,
    ids: u64,
    #[serde(flatten)]
    sealed: &'a Sealed,
}

impl Sealer {
    /// Removes what NATS holds of a cancelled pass; its rows only once they are stored. `was_free` says whether
    /// the previous check found no ids message of it.
    pub(super) async fn free(&self, pass: &PassId, was_free: &mut bool) -> Result<Seen, Error> {
        let Some(mut entry) = self.session.records.pass(pass).await? else { return Ok(Seen::Gone) };
        if entry.record.state != PassState::Cancelled {
            return Ok(Seen::Gone);
        }
        // The producer may not know of the cancel yet. It is done when two checks, at least a second apart,
        // find nothing to remove.
        let is_free = self.session.broker.free_ids(&entry.record).await? == 0;
        if !(std::mem::replace(was_free, is_free) && is_free) {
            return Ok(Seen::NotFinished);
        }
        let landing = verify::landing(&self.session, pass).await?;
        // Rows that ClickHouse refuses are removed too.
        if matches!(landing, Landing::UnderWay(_)) {
            return Ok(Seen::NotFinished);
        }
        self.session.broker.purge_rows(self.session.broker.names().pass_rows(pass)).await?;
        // A sealer may have been about to seal the pass.
        self.session.store.hide(&pass.run, Some(pass.pass)).await?;
        entry.record.freed = true;
        if self.session.records.update_pass(&entry).await? == Change::Beaten {
            return Ok(Seen::NotFinished);
        }
        tracing::info!(run = %pass.run, pass = pass.pass, "the pass is cancelled: its messages were removed");
        Ok(Seen::Finished)
    }

    /// Announces a sealed pass, and removes its consumer and its rows from the stream, unless the stream
    /// retains them. After a kill it is done again: the seal is announced at least once.
    pub(super) async fn finish(&self, pass: &PassId) -> Result<Seen, Error> {
        let Some(entry) = self.session.records.pass(pass).await? else { return Ok(Seen::Gone) };
        let (mut entry, sealed) = match entry.record.sealed.clone() {
            Some(sealed) if entry.record.state == PassState::Sealed && !entry.record.freed => (entry, sealed),
            // The pass is finished; or a repair has opened it again, with a new consumer.
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
            // Another sealer has done it; or the pass was opened again meanwhile, which creates its consumer
            // again.
            Change::Beaten => Seen::NotFinished,
        })
    }

    /// Whether no sink needs the rows again. If they fill an operator's materialized views, a sink may have
    /// been killed in an INSERT that failed there; the next sink that receives the rows reports it.
    async fn may_purge(&self, pass: &PassId) -> Result<bool, Error> {
        if !self.session.store.feeds_views() {
            return Ok(true);
        }
        let Some(sinks) = self.session.broker.sink_progress().await? else { return Ok(true) };
        let last = self.session.broker.last_rows(pass).await?;
        Ok(last.is_none_or(|last| last.sequence <= sinks.ack_floor.stream_sequence))
    }
}
