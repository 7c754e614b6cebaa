//! What goes once a pass is over: its messages, and the consumer of its workers.

use std::time::Instant;

use millstream::names::RunName;

use super::{FREE_AGAIN, Sealer, Watch};
use crate::error::{Error, full_cause};
use crate::records::{Change, PassState};
use crate::steer::free_ids;
use crate::verify::{self, Landing};

impl Sealer {
    /// Removes what the broker holds of a cancelled pass, its rows once they are stored.
    pub(super) async fn free(&self, run: &RunName, pass: u32, watch: &mut Watch) -> Result<(), Error> {
        if Instant::now() < watch.next_try {
            return Ok(());
        }
        let Some(mut entry) = self.records.pass(run, pass).await? else { return Ok(()) };
        // Its producer may not have heard of it yet: done is what twice had nothing to remove, a second or more apart.
        let is_free = free_ids(&self.broker, run, &entry.record).await? == 0;
        if !(std::mem::replace(&mut watch.is_free, is_free) && is_free) {
            watch.next_try = Instant::now() + FREE_AGAIN;
            return Ok(());
        }
        let landing = verify::landing(&self.broker, &self.records, &self.store, (run, pass)).await?;
        // What ClickHouse does not take goes with the rest.
        if matches!(landing, Landing::UnderWay(_)) {
            watch.set_back();
            return Ok(());
        }
        self.broker.purge_rows(self.broker.names().pass_rows(run, pass)).await?;
        // A sealer may have been about to say that it is sealed.
        self.store.hide(run.as_str(), Some(pass)).await?;
        entry.record.freed = true;
        if self.records.update_pass(&entry, run).await? == Change::Made {
            tracing::info!(%run, pass, "cancelled, and its messages are gone");
        }
        Ok(())
    }

    /// Rows that are proven need no second copy, where none was asked for, and no worker asks for this pass any more.
    pub(super) async fn tidy(
        &self,
        run: &RunName,
        pass: u32,
        untidy: &mut Vec<(RunName, u32)>,
    ) -> Result<(), Error> {
        match self.may_purge(run, pass).await? {
            true => self.broker.purge_sealed(run, pass).await?,
            false => untidy.push((run.clone(), pass)),
        }
        match self.records.pass(run, pass).await? {
            // A repair has opened it again meanwhile, with a consumer of its own.
            Some(entry) if entry.record.state != PassState::Sealed => Ok(()),
            _ => self.broker.remove_work_consumer(run, pass).await,
        }
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

    /// Purges rows of sealed passes that could not be purged before. Where this process ends first, or other rows are never
    /// acked, they go with the age of the stream or when it needs room.
    pub(super) async fn purge_later(&self, untidy: &mut Vec<(RunName, u32)>) {
        let mut left = Vec::new();
        for (run, pass) in untidy.drain(..) {
            let purged = async {
                match self.records.pass(&run, pass).await? {
                    Some(entry) if entry.record.state == PassState::Sealed => {}
                    // It is computed again, or forgotten.
                    _ => return Ok(true),
                }
                let may = self.may_purge(&run, pass).await?;
                if may {
                    self.broker.purge_sealed(&run, pass).await?;
                }
                Ok::<_, Error>(may)
            };
            match purged.await {
                Ok(true) => {}
                Ok(false) => left.push((run, pass)),
                Err(error) => {
                    tracing::debug!(%run, pass, error = full_cause(&error), "rows of a sealed pass stay");
                    left.push((run, pass));
                }
            }
        }
        *untidy = left;
    }
}
