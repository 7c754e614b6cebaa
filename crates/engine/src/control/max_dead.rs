//! Pauses runs that exceed their limit of dead letters (`--max-dead`).

use std::time::Duration;

use millstream::names::PassId;

use crate::control::steer;
use crate::error::{Code, Error, full_cause};
use crate::model::record::PassState;
use crate::model::selection::Letters;
use crate::nats::bucket::Records;
use crate::nats::pass_watch;
use crate::session::Session;
use crate::stop::Stop;

/// Interval between checks of such runs.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Checks runs that have a limit of dead letters, until taking stops.
///
/// # Errors
/// When the bucket cannot be read at the start; later failures are retried.
pub async fn watch_dead(session: &Session, stop: &Stop) -> Result<(), Error> {
    let Session { records, store, .. } = session;
    let open = pass_watch::follow(records, stop).await?;
    loop {
        if !stop.rest(CHECK_EVERY).await {
            return Ok(());
        }
        let limited: Vec<_> = open
            .borrow()
            .iter()
            .filter(|(_, pass)| pass.state == PassState::Running)
            .filter_map(|(id, pass)| Some((id.clone(), pass.max_dead?)))
            .collect();
        for (id, most) in limited {
            let PassId { run, pass } = &id;
            let paused = match store.dead_rows(&id, &Letters::default()).await {
                // The cheap count includes raw duplicates, so the distinct count decides.
                Ok(raw) if raw > most => match store.dead_distinct(&id).await {
                    Ok(dead) if dead <= most => Ok(None),
                    Ok(dead) => pause(records, &id, dead, most).await,
                    Err(error) => Err(error),
                },
                Ok(_) => Ok(None),
                Err(error) => Err(error),
            };
            match paused {
                Ok(Some(why)) => {
                    let hint = format!(
                        "`dead {run}` lists them; `resume {run}` goes on without a limit, `cancel {run}` ends it"
                    );
                    tracing::error!(%run, pass, why, hint, code = %Code::TooManyDead, "the run is paused");
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%run, error = full_cause(&error), "the run's dead letters could not be counted");
                }
            }
        }
    }
}

/// Pauses a pass and returns the reason; `None` if another process was first.
async fn pause(records: &Records, pass: &PassId, dead: u64, most: u64) -> Result<Option<String>, Error> {
    let why = format!("{dead} dead letters are more than the {most} of --max-dead");
    let paused = steer::pause_for(records, pass, &why).await?;
    Ok(paused.then_some(why))
}
