//! Forgetting a run, or one pass of it: rows, messages, consumers and records go, and their space is free again.
//!
//! Readers first: what they see goes in one step. Records last, and only as they were read: killed at any point, there
//! is still a record that the same words begin from, and what somebody began meanwhile is not lost unseen.

mod pipeline;

use millstream::names::RunName;
use serde::Serialize;

use crate::error::Error;
use crate::failpoint;
use crate::model::record::{PassRecord, PassState};
use crate::nats::bucket::Change;
use crate::session::Session;

pub use pipeline::{Belongings, belongings, forget_pipeline};

/// Rows that were on their way to ClickHouse may land while they are removed; they are removed again so many times.
const SWEEPS: u32 = 5;

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Forgotten {
    /// Rows in ClickHouse, raw duplicates counted.
    pub rows: u64,
    /// Bytes that they took there, compressed.
    pub row_bytes: u64,
    /// Messages of ids.
    pub ids_messages: u64,
    /// Messages of computed rows.
    pub rows_messages: u64,
    /// Messages that had been set aside.
    pub aside_messages: u64,
    /// Passes whose record was removed.
    pub passes: Vec<u32>,
}

/// What is to be forgotten, and everything of it.
struct Forget<'a> {
    session: &'a Session,
    run: &'a RunName,
    pass: Option<u32>,
}

/// Forgets a run, or one pass of it that readers do not see.
///
/// # Errors
/// [`Error::NoSuchRun`], [`Error::NoSuchPass`]; [`Error::StillOpen`] while a pass of it is running or paused;
/// [`Error::PassSeen`]; [`Error::BegunMeanwhile`]; those of the broker and ClickHouse. It can be called again.
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
    // A sealer that had its proof before a cancel may have shown a pass that is gone now.
    forget.hide().await?;
    forget.remove_view_faults().await?;
    failpoint::pass("forget-after-rows");
    forget.remove_records(passes, &mut forgotten).await?;
    Ok(forgotten)
}

impl Forget<'_> {
    /// The records that will go, as they are before anything does.
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

    /// Notes in the records that it has begun, so that what a kill or an error leaves is told as what it is.
    async fn note(&self, passes: &[PassRecord]) -> Result<(), Error> {
        for before in passes {
            while let Some(mut entry) = self.session.records.pass(&self.run.pass(before.pass)).await? {
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

    /// Whether ClickHouse has rows of it, which no record may tell of any more.
    async fn has_rows(&self) -> Result<bool, Error> {
        Ok(self.session.store.rows_of(self.run, self.pass).await? > 0)
    }

    /// Takes it from readers in one step: of all passes, the one that they see goes last.
    async fn hide(&self) -> Result<(), Error> {
        self.session.store.hide(self.run, self.pass).await
    }

    /// Consumers first, so that nothing is computed of what is being removed.
    async fn remove_messages(&self, forgotten: &mut Forgotten) -> Result<(), Error> {
        let names = self.session.broker.names();
        let run = self.run;
        let passes = match self.pass {
            Some(pass) => pass..pass + 1,
            None => 1..self.session.records.next_pass(run).await?,
        };
        for pass in passes {
            self.session.broker.remove_work_consumer(&run.pass(pass)).await?;
            self.session.broker.remove_rebuild_consumer(&run.pass(pass)).await?;
        }
        let (ids, rows) = match self.pass {
            Some(pass) => (names.replay_ids(&run.pass(pass)), names.pass_rows(&run.pass(pass))),
            None => (names.all_of_ids(run), names.all_of_rows(run)),
        };
        for subject in [&ids, &rows] {
            forgotten.aside_messages += self.session.broker.purge_aside(names.aside_subject(subject)).await?;
        }
        forgotten.ids_messages += self.session.broker.purge_ids(ids).await?;
        forgotten.rows_messages += self.session.broker.purge_rows(rows).await?;
        Ok(())
    }

    /// A sink may have had some of the rows in its hands: until none is there, they are removed again.
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

    /// What views did not get of rows that are gone. Where this process may not look, the operator acknowledges it.
    async fn remove_view_faults(&self) -> Result<(), Error> {
        match self.session.store.forget_view_faults(self.run, self.pass).await {
            Err(Error::Store { source, .. }) if source.is_denied() => {
                tracing::warn!(run = %self.run, %source, hint = "`doctor --acknowledge` by a user who may removes them",
                    "what is noted of views that lack its rows stays");
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

    /// Removes the record of a pass with which nothing was begun.
    async fn remove_pass(&self, before: &PassRecord) -> Result<(), Error> {
        while let Some(entry) = self.session.records.pass(&self.run.pass(before.pass)).await? {
            // A sealer notes in the record of a cancelled pass that its messages are gone: that begins nothing.
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
