//! The seal itself: first readers see the pass, then its record says so.

use millstream::names::PassId;
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
    /// Makes a proven pass visible. Readers come first: if this process dies then, the next sealer proves again
    /// and writes the same row.
    pub(super) async fn show(&self, pass: &PassId, carried: &mut Carried) -> Result<Seen, Error> {
        let Some(Proof { published, stored }) = &carried.proof else { return Ok(Seen::Beaten) };
        let (summary, summary_fault) = Box::pin(self.sum_up(pass)).await?;
        let builds = self.session.store.build_names(pass).await?;
        let may_repeat = carried.may_repeat();
        let repeated_ids = if may_repeat { self.session.store.repeated_ids(pass).await? } else { 0 };
        // By NATS's clock, the same on every host: of two rows of a pass, readers get the later.
        let rows = stored.ids;
        let dead = stored.dead;
        let at_ms = self.session.records.server_ms().await?;
        let sealed = Sealed { rows, dead, repeated_ids, at_ms, summary, summary_fault, builds };
        // The views must have today's columns before readers see the pass.
        self.session.store.try_follow_views().await;
        let seen = SeenPass::of(pass.pass, published, &sealed);
        let statement = self.session.store.tables().insert_pass(&pass.run, &seen);
        // If the pass was cancelled meanwhile, it may already have been hidden for the last time.
        let is_as_before =
            self.session.records.pass(pass).await?.map(|entry| entry.revision) == carried.revision();
        if !is_as_before {
            return Ok(Seen::Beaten);
        }
        failpoint::pass("seal-before-row");
        self.session.store.write("make a sealed pass visible", &statement).await?;
        failpoint::pass("seal-after-row");
        carried.sealed = Some(sealed);
        Ok(Seen::Shown)
    }

    /// Marks the pass sealed, only if its record has not changed since before the proof.
    pub(super) async fn mark(
        &self,
        pass: &PassId,
        mut entry: Entry<PassRecord>,
        sealed: Sealed,
    ) -> Result<Seen, Error> {
        let rows = sealed.rows;
        let dead = sealed.dead;
        entry.record.state = PassState::Sealed;
        entry.record.sealed = Some(sealed);
        (entry.record.repair, entry.record.unsealed) = (None, false);
        if self.session.records.update_pass(&entry).await? == Change::Beaten {
            return self.take_back_if_cancelled(pass).await.map(|()| Seen::Beaten);
        }
        self.waits().clear(pass);
        self.metrics().sealed(rows);
        tracing::info!(run = %pass.run, pass = pass.pass, ids = rows, dead, "sealed");
        Ok(Seen::Marked)
    }

    /// Hides a pass that was cancelled during the proof. For any other pass, the next proof writes the same
    /// row.
    async fn take_back_if_cancelled(&self, pass: &PassId) -> Result<(), Error> {
        match self.session.records.pass(pass).await? {
            Some(entry) if entry.record.state == PassState::Cancelled => {
                self.session.store.hide(&pass.run, Some(pass.pass)).await
            }
            _ => Ok(()),
        }
    }

    /// The pipeline's summary of the pass, or why it failed. A failed summary does not prevent the seal.
    async fn sum_up(&self, pass: &PassId) -> Result<(Option<Vec<Value>>, Option<String>), Error> {
        let mut summed = self.session.store.summary(pass).await;
        // Ask once more if no answer came: the server may have been away for another reason.
        if matches!(&summed, Err(Error::Summary { source }) if !matches!(source, StoreFault::Exception { .. }))
        {
            self.session.store.version().await?;
            summed = self.session.store.summary(pass).await;
        }
        match summed {
            Ok(summary) => Ok((summary, None)),
            Err(Error::Summary { source: fault }) => {
                tracing::error!(run = %pass.run, pass = pass.pass, %fault, hint = "fix the SQL in the pipeline's `SUMMARY`", code = %Code::SummaryFailed,
                    "the pipeline's SUMMARY failed; the pass is sealed without it");
                Ok((None, Some(fault.to_string())))
            }
            Err(error) => Err(error),
        }
    }
}
