//! Forgetting a run, or one pass of it: rows, messages, consumers and records are removed, and their space is
//! freed.
//!
//! Readers lose sight of the run first, in one step. The records go last, and only if they have not changed
//! since they were read. So a record is left after a kill at any point, and the same command finishes the
//! removal. A pass that another process began meanwhile is not lost silently.

mod pipeline;

use millstream::names::RunName;
use serde::Serialize;

use crate::error::Error;
use crate::failpoint;
use crate::model::record::{PassRecord, PassState};
use crate::nats::bucket::Change;
use crate::session::Session;

pub use pipeline::{Belongings, belongings, forget_pipeline};

/// How often the rows are removed again, because rows on their way to ClickHouse may be inserted meanwhile.
const SWEEPS: u32 = 5;

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Forgotten {
    /// The number of rows in ClickHouse, raw duplicates included.
    pub rows: u64,
    /// The compressed bytes of the rows.
    pub row_bytes: u64,
    /// The number of ids messages.
    pub ids_messages: u64,
    /// The number of rows messages.
    pub rows_messages: u64,
    /// The number of quarantined messages.
    pub aside_messages: u64,
    /// The passes whose records were removed.
    pub passes: Vec<u32>,
}

/// The run or pass to forget, and the connections.
struct Forget<'a> {
    session: &'a Session,
    run: &'a RunName,
    pass: Option<u32>,
}

/// Forgets a run, or one pass of it that readers do not see.
///
/// # Errors
/// [`Error::NoSuchRun`], [`Error::NoSuchPass`]; [`Error::StillOpen`] while a pass of it is running or paused;
/// [`Error::PassSeen`]; [`Error::BegunMeanwhile`]; errors of NATS and ClickHouse. The call can be repeated.
pub async fn forget(session: &Session, run: &RunName, pass: Option<u32>) -> Result<Forgotten, Error> {
    let forget = Forget { session, run, pass };
    let passes = forget.passes().await?;
    let mut forgotten = Forgotten::default();
    forget.note(&passes).await?;
    forget.hide().await?;
    failpoint::pass("forget-after-hiding");
    forget.remove_messages(&mut forgotten).await?;
    failpoint::pass("forget-after-messages");
    forget.remove_rows(&mut forgotten).await?;
    // A sealer with a proof from before a cancel may have shown a pass that is removed now.
    forget.hide().await?;
    forget.remove_view_faults().await?;
    failpoint::pass("forget-after-rows");
    forget.remove_records(passes, &mut forgotten).await?;
    Ok(forgotten)
}

impl Forget<'_> {
    /// The records to remove, as they are before the removal begins.
    async fn passes(&self) -> Result<Vec<PassRecord>, Error> {
        let run = || self.run.to_string();
        let known = self.session.records.passes_of(self.run).await?;
        let sealed = self.session.store.sealed_passes(self.run).await?;
        let seen = sealed.last().map(|seen| seen.pass);
        let kept =
            |pass| known.iter().any(|record| record.pass == pass) || sealed.iter().any(|of| of.pass == pass);
        if known.is_empty() && sealed.is_empty() && !self.has_rows().await? {
            self.session.records.known_run(self.run).await?;
        }
        match self.pass {
            Some(pass) if seen == Some(pass) => return Err(Error::PassSeen { run: run(), pass }),
            Some(pass) if !kept(pass) && !self.has_rows().await? => {
                let known = known.iter().map(|record| record.pass).collect();
                return Err(Error::NoSuchPass { run: run(), pass, known });
            }
            _ => {}
        }
        let mut records = known;
        records.retain(|record| self.pass.is_none_or(|pass| record.pass == pass));
        match records.iter().find(|record| matches!(record.state, PassState::Running | PassState::Paused)) {
            Some(record) => Err(Error::StillOpen { run: run(), pass: record.pass, state: record.state }),
            None => Ok(records),
        }
    }

    /// Marks the records as being forgotten, so that a removal that was killed or failed is reported as such.
    async fn note(&self, passes: &[PassRecord]) -> Result<(), Error> {
        for before in passes {
            while let Some(mut entry) = self.session.records.pass(&before.id()).await? {
                if entry.record.forgetting {
                    break;
                }
                let PassRecord { state, sealed, .. } = &entry.record;
                if (state, sealed) != (&before.state, &before.sealed) {
                    return Err(Error::BegunMeanwhile { run: self.run.to_string() });
                }
                entry.record.forgetting = true;
                if self.session.records.update_pass(&entry).await? == Change::Made {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Whether ClickHouse still has rows without a record.
    async fn has_rows(&self) -> Result<bool, Error> {
        Ok(self.session.store.rows_of(self.run, self.pass).await? > 0)
    }

    /// Hides the run or pass from readers in one step: the pass that they see is hidden last.
    async fn hide(&self) -> Result<(), Error> {
        self.session.store.hide(self.run, self.pass).await
    }

    /// Removes consumers first, so that workers compute nothing that is being removed.
    async fn remove_messages(&self, forgotten: &mut Forgotten) -> Result<(), Error> {
        let names = self.session.broker.names();
        let run = self.run;
        let passes = match self.pass {
            Some(pass) => pass..pass + 1,
            None => 1..self.session.records.next_pass(run).await?,
        };
        for pass in passes.map(|pass| run.pass(pass)) {
            self.session.broker.remove_work_consumer(&pass).await?;
            self.session.broker.remove_rebuild_consumer(&pass).await?;
        }
        let (ids, rows) = match self.pass.map(|pass| run.pass(pass)) {
            Some(pass) => (names.replay_ids(&pass), names.pass_rows(&pass)),
            None => (names.all_of_ids(run), names.all_of_rows(run)),
        };
        for subject in [&ids, &rows] {
            forgotten.aside_messages += self.session.broker.purge_aside(names.aside_subject(subject)).await?;
        }
        forgotten.ids_messages += self.session.broker.purge_ids(ids).await?;
        forgotten.rows_messages += self.session.broker.purge_rows(rows).await?;
        Ok(())
    }

    /// Removes the rows, and repeats that until none is left, because a sink may have been inserting some.
    async fn remove_rows(&self, forgotten: &mut Forgotten) -> Result<(), Error> {
        let run = self.run;
        let pass = self.pass;
        let before = self.session.store.bytes_beside(run).await?;
        for _ in 0..SWEEPS {
            let rows = self.session.store.rows_of(run, pass).await?;
            if rows == 0 {
                break;
            }
            forgotten.rows += rows;
            match self.session.store.remove_rows(run, pass).await {
                Err(Error::NotRemoved { .. }) => {}
                outcome => outcome?,
            }
        }
        match self.session.store.rows_of(run, pass).await? {
            0 => {}
            rows => return Err(Error::NotRemoved { doing: "remove rows".into(), rows }),
        }
        forgotten.row_bytes = before.saturating_sub(self.session.store.bytes_beside(run).await?);
        Ok(())
    }

    /// Removes the faults of views about rows that are gone. If this process may not, the operator acknowledges
    /// them.
    async fn remove_view_faults(&self) -> Result<(), Error> {
        match self.session.store.forget_view_faults(self.run, self.pass).await {
            Err(Error::Store { source, .. }) if source.is_denied() => {
                tracing::warn!(run = %self.run, %source, hint = "run `doctor --acknowledge` as a user with more rights",
                    "the run's view faults could not be removed");
                Ok(())
            }
            outcome => outcome,
        }
    }

    async fn remove_records(&self, passes: Vec<PassRecord>, forgotten: &mut Forgotten) -> Result<(), Error> {
        let meanwhile = || Error::BegunMeanwhile { run: self.run.to_string() };
        let known = self.session.records.passes_of(self.run).await?;
        let is_new = |record: &PassRecord| passes.iter().all(|before| before.pass != record.pass);
        if self.pass.is_none() && known.iter().any(is_new) {
            return Err(meanwhile());
        }
        for before in passes {
            self.remove_pass(&before).await?;
            forgotten.passes.push(before.pass);
            failpoint::pass("forget-in-records");
        }
        if self.pass.is_none() {
            self.session.store.forget_run(self.run).await?;
            if let Some(entry) = self.session.records.run(self.run).await?
                && self.session.records.remove_run(&entry).await? == Change::Beaten
            {
                return Err(meanwhile());
            }
        }
        Ok(())
    }

    /// Removes the record of a pass, unless another process began something with the pass.
    async fn remove_pass(&self, before: &PassRecord) -> Result<(), Error> {
        while let Some(entry) = self.session.records.pass(&before.id()).await? {
            // A sealer records in a cancelled pass that its messages are gone; that begins nothing.
            let PassRecord { state, sealed, .. } = &entry.record;
            if (state, sealed) != (&before.state, &before.sealed) {
                return Err(Error::BegunMeanwhile { run: self.run.to_string() });
            }
            if self.session.records.remove_pass(&entry).await? == Change::Made {
                break;
            }
        }
        Ok(())
    }
}
