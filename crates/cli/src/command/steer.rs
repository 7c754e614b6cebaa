//! `pause`, `resume`, `cancel`, `set`: what an operator changes of a run while it is computed.

use millstream_engine::Session;
use millstream_engine::control::steer::{self, Settings};
use millstream_engine::model::record::RunState;
use serde_json::json;

use super::{Context, run_name};
use crate::args::{RunJsonArgs, SetArgs};
use crate::session::{self, Holder};
use crate::{Ended, show};

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Pause,
    Resume,
    Cancel,
}

impl Word {
    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Cancel => "cancel",
        }
    }

    /// What is to be read once it holds.
    fn told(self, changed: bool, name: &str, run: &str) -> String {
        match (self, changed) {
            (Self::Pause, true) => {
                format!("paused run `{run}` on every host; `{name} resume {run}` lets it go on")
            }
            (Self::Pause, false) => format!("run `{run}` was paused already"),
            (Self::Resume, true) => format!("run `{run}` goes on"),
            (Self::Resume, false) => format!("run `{run}` was not paused"),
            (Self::Cancel, true) => {
                format!("cancelled run `{run}` on every host; what is computed stays in `{name}_live`")
            }
            (Self::Cancel, false) => format!("run `{run}` was cancelled already"),
        }
    }
}

pub(super) async fn steer(context: &Context, args: &RunJsonArgs, word: Word) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = session::of_run(&servers, &context.spec, word.name(), run.as_str()).await?;
            let records = &session.records;
            let changed = match word {
                Word::Pause => steer::pause(records, &run).await?,
                Word::Resume => steer::resume(records, &run).await?,
                Word::Cancel => steer::cancel(&session, &run).await?,
            };
            if args.json {
                show::json(&state(&session, &args.run, changed).await?)
            } else {
                show::line(&word.told(changed, context.spec.name, run.as_str()))
            }
            Ok(Ended::Well)
        })
        .await
}

pub(super) async fn set(context: &Context, args: &SetArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    let settings = Settings { priority: args.settings.priority, rate: args.settings.rate.map(|rate| rate.0) };
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = session::of_run(&servers, &context.spec, "set", run.as_str()).await?;
            let changed = steer::set(&session.records, &run, settings).await?;
            let now = state(&session, &args.run, changed).await?;
            if args.json {
                show::json(&now)
            } else {
                show::line(&format!(
                    "run `{run}` has priority {} and {}",
                    now["priority"],
                    now["rate"].as_u64().map_or("no rate limit".to_owned(), |rate| format!(
                        "a limit of {} ids/s",
                        show::grouped(rate)
                    ))
                ))
            }
            Ok(Ended::Well)
        })
        .await
}

/// How the run stands now, for machines.
async fn state(session: &Session, run: &str, changed: bool) -> anyhow::Result<serde_json::Value> {
    let run = run_name(run)?;
    let record = session.records.known_run(&run).await?.record;
    let pass = session.records.newest_pass(&run).await?.map(|entry| entry.record);
    Ok(json!({
        "run": record.run,
        "pass": pass.as_ref().map_or(1, |pass| pass.pass),
        "state": RunState::of(&record, pass.as_ref()),
        "priority": pass.as_ref().map_or(0, |pass| pass.priority),
        "rate": pass.as_ref().and_then(|pass| pass.rate),
        "changed": changed,
    }))
}
