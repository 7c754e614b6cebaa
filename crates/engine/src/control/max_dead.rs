//! Pauses runs that have more dead letters than they may (`--max-dead`).

use std::time::Duration;

use millstream::names::RunName;

use crate::clickhouse::store::Store;
use crate::control::steer;
use crate::error::{Code, Error, full_cause};
use crate::model::record::PassState;
use crate::model::selection::Letters;
use crate::nats::broker::Broker;
use crate::nats::bucket::Records;
use crate::nats::pass_watch;
use crate::stop::Stop;

/// How often such runs are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Looks at runs that have such a limit, until taking stops.
///
/// # Errors
/// When the bucket cannot be read at the start; later failures are waited out.
pub async fn watch_dead(broker: &Broker, store: &Store, stop: &Stop) -> Result<(), Error> {
    let records = broker.records().await?;
    let open = pass_watch::follow(&records, stop).await?;
    loop {
        if !stop.rest(LOOK).await {
            return Ok(());
        }
        let limited: Vec<_> = open
            .borrow()
            .iter()
            .filter(|(_, pass)| pass.state == PassState::Running)
            .filter_map(|((run, number), pass)| Some((run.clone(), *number, pass.max_dead?)))
            .collect();
        for (run, pass, most) in limited {
            let paused = match store.dead_rows(run.as_str(), pass, &Letters::default()).await {
                // Raw duplicates are counted, too: those that are distinct decide.
                Ok(raw) if raw > most => match store.dead_distinct(run.as_str(), pass).await {
                    Ok(dead) if dead <= most => Ok(None),
                    Ok(dead) => pause(&records, &run, pass, dead, most).await,
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
                    tracing::debug!(%run, error = full_cause(&error), "its dead letters could not be looked at");
                }
            }
        }
    }
}

/// Pauses a pass with its reason; the reason, unless another process was faster.
async fn pause(
    records: &Records,
    run: &RunName,
    pass: u32,
    dead: u64,
    most: u64,
) -> Result<Option<String>, Error> {
    let why = format!("{dead} dead letters are more than the {most} of --max-dead");
    let paused = steer::pause_for(records, run, pass, &why).await?;
    Ok(paused.then_some(why))
}
