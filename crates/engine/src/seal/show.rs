//! The seal itself: readers are shown the pass, then its record says so.

use millstream::names::RunName;
use serde_json::Value;

use super::proof::Proof;
use super::sealer::Sealer;
use super::step::Seen;
use super::take::Carried;
use crate::clickhouse::sql::SeenPass;
use crate::error::{Code, Error, StoreFault};
use crate::failpoint;
use crate::model::record::{PassRecord, PassState, Sealed};
use crate::nats::bucket::{Change, Entry};

impl Sealer {
    /// Makes a proven pass visible. Readers first: should this process die then, the next one proves again and writes the same
    /// row.
    pub(super) async fn show(&self, run: &RunName, pass: u32, carried: &mut Carried) -> Result<Seen, Error> {
        let Some(Proof { published, stored }) = &carried.proof else { return Ok(Seen::Beaten) };
        let (summary, summary_fault) = Box::pin(self.sum_up(run, pass)).await?;
        let builds = self.store.build_names(run.as_str(), pass).await?;
        let may_repeat = carried.may_repeat();
        let repeated_ids = if may_repeat { self.store.repeated_ids(run.as_str(), pass).await? } else { 0 };
        // By the one clock: of two rows of a pass, readers have the later.
        let (rows, dead, at_ms) = (stored.ids, stored.dead, self.records.server_ms().await?);
        let sealed = Sealed { rows, dead, repeated_ids, at_ms, summary, summary_fault, builds };
        // What readers are about to see they see through views that have the columns of today.
        self.store.try_follow_views().await;
        let seen = SeenPass::of(pass, published, &sealed);
        let statement = self.store.tables().insert_pass(run.as_str(), &seen);
        // A pass that was cancelled meanwhile may have been taken from readers for the last time.
        let is_as_before =
            self.records.pass(run, pass).await?.map(|entry| entry.revision) == carried.revision();
        if !is_as_before {
            return Ok(Seen::Beaten);
        }
        failpoint::pass("seal-before-row");
        self.store.write("make a sealed pass visible", &statement).await?;
        failpoint::pass("seal-after-row");
        carried.sealed = Some(sealed);
        Ok(Seen::Shown)
    }

    /// Only a pass that is as it was before its proof is sealed.
    pub(super) async fn mark(
        &self,
        run: &RunName,
        mut entry: Entry<PassRecord>,
        sealed: Sealed,
    ) -> Result<Seen, Error> {
        let (pass, rows, dead) = (entry.record.pass, sealed.rows, sealed.dead);
        entry.record.state = PassState::Sealed;
        entry.record.sealed = Some(sealed);
        (entry.record.repair, entry.record.unsealed) = (None, false);
        if self.records.update_pass(&entry, run).await? == Change::Beaten {
            return self.take_back_if_cancelled(run, pass).await.map(|()| Seen::Beaten);
        }
        self.waits().clear(run, pass);
        tracing::info!(%run, pass, ids = rows, dead, "sealed");
        Ok(Seen::Marked)
    }

    /// A pass that was cancelled while it was proven is not for readers. Of any other the next proof writes the same row.
    async fn take_back_if_cancelled(&self, run: &RunName, pass: u32) -> Result<(), Error> {
        match self.records.pass(run, pass).await? {
            Some(entry) if entry.record.state == PassState::Cancelled => {
                self.store.hide(run.as_str(), Some(pass)).await
            }
            _ => Ok(()),
        }
    }

    /// What the pipeline's summary says of the pass, or why it says nothing: one that fails keeps nothing from being sealed.
    async fn sum_up(&self, run: &RunName, pass: u32) -> Result<(Option<Vec<Value>>, Option<String>), Error> {
        let mut summed = self.store.summary(run.as_str(), pass).await;
        // Without an answer it is asked once more: the server may have been away for another reason.
        if matches!(&summed, Err(Error::Summary { source }) if !matches!(source, StoreFault::Exception { .. }))
        {
            self.store.version().await?;
            summed = self.store.summary(run.as_str(), pass).await;
        }
        match summed {
            Ok(summary) => Ok((summary, None)),
            Err(Error::Summary { source: fault }) => {
                tracing::error!(%run, pass, %fault, hint = "mend the SQL in the pipeline's `SUMMARY`", code = %Code::SummaryFailed,
                    "the pipeline's SUMMARY failed; the pass is sealed without it");
                Ok((None, Some(fault.to_string())))
            }
            Err(error) => Err(error),
        }
    }
}
