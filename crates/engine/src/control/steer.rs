//! Run control while a run is computed: pause, resume, cancel, priority, rate limit.
//!
//! Each command is a compare-and-set of the record of the run's newest pass. Every process follows those
//! records (`pass_watch`), so a command takes effect on all hosts at once and survives restarts.

use millstream::names::{PassId, RunName};

use crate::error::Error;
use crate::model::record::{PassRecord, PassState};
use crate::nats::bucket::{Change, Records};
use crate::session::Session;

/// The range of priorities: the highest gets 1024 times the share of the lowest.
pub const PRIORITIES: std::ops::RangeInclusive<i8> = -5..=5;

/// Pauses the newest pass of a run, and returns whether it was running.
///
/// # Errors
/// [`Error::NoSuchRun`]; [`Error::PassEnded`]; when NATS refuses or does not answer.
pub async fn pause(records: &Records, run: &RunName) -> Result<bool, Error> {
    switch(records, run, "pause", [PassState::Running, PassState::Paused]).await
}

/// Resumes the newest pass of a run, and returns whether it was paused.
///
/// # Errors
/// The errors of [`pause`].
pub async fn resume(records: &Records, run: &RunName) -> Result<bool, Error> {
    switch(records, run, "resume", [PassState::Paused, PassState::Running]).await
}

/// Pauses a pass for Millstream's own reason, and returns whether it was running.
///
/// # Errors
/// The errors of [`pause`].
pub(crate) async fn pause_for(records: &Records, pass: &PassId, why: &str) -> Result<bool, Error> {
    change(records, &pass.run, "pause", |record| {
        if record.pass != pass.pass || record.state != PassState::Running {
            return false;
        }
        (record.state, record.paused_for) = (PassState::Paused, Some(why.to_owned()));
        true
    })
    .await
}

/// Cancels the newest pass of a run for good: workers drop it, its messages are removed, and it is never
/// sealed. Stored rows stay, and computed rows are still stored. Returns whether it was not cancelled already.
///
/// # Errors
/// The errors of [`pause`]; [`Error::Repaired`]; errors of ClickHouse.
pub async fn cancel(session: &Session, run: &RunName) -> Result<bool, Error> {
    let Session { broker, records, store } = session;
    let newest = records.newest_pass(run).await?;
    match newest.map(|entry| (entry.record.state, entry.record.pass)) {
        Some((PassState::Cancelled, _)) => return Ok(false),
        Some((PassState::Running | PassState::Paused, pass)) => {
            let seen = store.sealed_passes(run).await?;
            if seen.iter().any(|seen| seen.pass == pass) {
                return Err(Error::Repaired { run: run.to_string(), pass });
            }
        }
        Some((PassState::Sealed, _)) | None => {}
    }
    let changed = change(records, run, "cancel", |pass| {
        pass.state = PassState::Cancelled;
        true
    })
    .await?;
    // A sink does this too, and the rest; done here so that storage is freed at once. Only for the pass that
    // was cancelled, because it may have been sealed and another begun since it was read.
    let cancelled =
        records.newest_pass(run).await?.filter(|entry| entry.record.state == PassState::Cancelled);
    if let Some(entry) = cancelled {
        broker.free_ids(&entry.record).await?;
    }
    Ok(changed)
}

/// The settings of a pass that can change while it is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// The priority of the pass.
    pub priority: Option<i8>,
    /// The rate limit in ids a second; `Some(None)` removes it.
    pub rate: Option<Option<u32>>,
}

/// Changes settings of the newest pass of a run, and returns whether they differ from before.
///
/// # Errors
/// The errors of [`pause`].
pub async fn set(records: &Records, run: &RunName, settings: Settings) -> Result<bool, Error> {
    change(records, run, "change", |pass| {
        let before = (pass.priority, pass.rate);
        pass.priority = settings.priority.unwrap_or(pass.priority);
        pass.rate = settings.rate.unwrap_or(pass.rate);
        (pass.priority, pass.rate) != before
    })
    .await
}

/// Moves the newest pass from one of the first states into the second, and returns whether it did.
async fn switch(
    records: &Records,
    run: &RunName,
    doing: &'static str,
    [from, to]: [PassState; 2],
) -> Result<bool, Error> {
    change(records, run, doing, |pass| {
        let changed = pass.state == from;
        pass.state = to;
        if changed && pass.paused_for.take().is_some() {
            // The operator has seen the dead letters and continues nevertheless.
            pass.max_dead = None;
        }
        changed
    })
    .await
}

/// Changes the record of the newest unfinished pass; `false` if there is nothing to change.
async fn change(
    records: &Records,
    run: &RunName,
    doing: &'static str,
    apply: impl Fn(&mut PassRecord) -> bool,
) -> Result<bool, Error> {
    loop {
        records.known_run(run).await?;
        let run_ = run.to_string();
        let Some(mut entry) = records.newest_pass(run).await? else {
            return Err(Error::NoPass { run: run_ });
        };
        let state = entry.record.state;
        if matches!(state, PassState::Sealed | PassState::Cancelled) {
            return Err(Error::PassEnded { doing, run: run_, pass: entry.record.pass, state });
        }
        if !apply(&mut entry.record) {
            return Ok(false);
        }
        if records.update_pass(&entry).await? == Change::Made {
            return Ok(true);
        }
    }
}
