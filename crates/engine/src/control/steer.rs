//! What a person says of a run while it is computed: pause, resume, cancel, priority, rate.
//!
//! All of it is a change of the record of the run's newest pass, made by compare-and-set. Every process follows those
//! records (`pass_watch`), so it holds on all hosts at once, and after a restart of everything.

use millstream::names::{PassId, RunName};

use crate::error::Error;
use crate::model::record::{PassRecord, PassState};
use crate::nats::bucket::{Change, Records};
use crate::session::Session;

/// The largest and the smallest priority: a share of 1024 to 1.
pub const PRIORITIES: std::ops::RangeInclusive<i8> = -5..=5;

/// Holds the newest pass of a run back; whether it was not so already.
///
/// # Errors
/// [`Error::NoSuchRun`]; [`Error::PassEnded`]; the broker's.
pub async fn pause(records: &Records, run: &RunName) -> Result<bool, Error> {
    switch(records, run, "pause", [PassState::Running, PassState::Paused]).await
}

/// Lets it go on; whether it was paused.
///
/// # Errors
/// As of [`pause`].
pub async fn resume(records: &Records, run: &RunName) -> Result<bool, Error> {
    switch(records, run, "resume", [PassState::Paused, PassState::Running]).await
}

/// Pauses a pass, if it still runs, for a reason that is not a person's; whether it did.
///
/// # Errors
/// As of [`pause`].
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

/// Ends it for good: workers let go of it, its messages are removed, it is never sealed. Rows that are stored stay, those
/// that are computed are stored still. Whether it was not cancelled already.
///
/// # Errors
/// As of [`pause`]; [`Error::Repaired`]; ClickHouse's.
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
    // A sink does the same, and the rest: here only so that the room is there at once. Of what was cancelled alone: a pass
    // may have been sealed and another begun since the first look.
    let cancelled =
        records.newest_pass(run).await?.filter(|entry| entry.record.state == PassState::Cancelled);
    if let Some(entry) = cancelled {
        broker.free_ids(run, &entry.record).await?;
    }
    Ok(changed)
}

/// What may be changed of a pass while it is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// Its priority.
    pub priority: Option<i8>,
    /// Its limit in ids a second, or that it has none.
    pub rate: Option<Option<u32>>,
}

/// Changes settings of the newest pass of a run; whether they were other ones.
///
/// # Errors
/// As of [`pause`].
pub async fn set(records: &Records, run: &RunName, settings: Settings) -> Result<bool, Error> {
    change(records, run, "change", |pass| {
        let before = (pass.priority, pass.rate);
        pass.priority = settings.priority.unwrap_or(pass.priority);
        pass.rate = settings.rate.unwrap_or(pass.rate);
        (pass.priority, pass.rate) != before
    })
    .await
}

/// Puts the newest pass, if it is in the first of these states, into the second; whether it was.
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
            // A person has seen it, and goes on nevertheless.
            pass.max_dead = None;
        }
        changed
    })
    .await
}

/// Changes the record of the newest pass, which is not at its end; `false` where there is nothing to change.
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
