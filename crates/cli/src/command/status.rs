//! `status`: where a run stands.

use std::io::IsTerminal;
use std::time::Duration;

use millstream::Pipeline;
use millstream::names::RunName;
use millstream_engine::status::{Status, status as read_status};

use super::{Context, run_name};
use crate::args::StatusArgs;
use crate::session::{Holder, Session};
use crate::{Ended, show};

const LOOK: Duration = Duration::from_secs(1);

pub(super) async fn status<P: Pipeline>(context: &Context<P>, args: &StatusArgs) -> anyhow::Result<Ended> {
    let asked = args.run.as_deref().map(run_name).transpose()?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = match &asked {
                Some(run) => Session::of_run::<P>(&servers, "status", run.as_str()).await?,
                None => Session::find::<P>(&servers, "status").await?.ok_or_else(no_runs)?,
            };
            let run = match asked {
                Some(run) => run,
                None => newest(&session).await?,
            };
            let mut line = context.progress.run();
            loop {
                let status = read_status(&session.broker, &session.records, &session.store, &run).await?;
                let ended = status.state == "sealed" || !args.watch;
                if args.json {
                    show::json(&status);
                } else if args.watch && !ended && std::io::stderr().is_terminal() {
                    line.show(&status);
                } else {
                    line.clear();
                    show::line(&told(&status));
                }
                if ended {
                    return Ok(Ended::Well);
                }
                tokio::time::sleep(LOOK).await;
            }
        })
        .await
}

async fn newest(session: &Session) -> anyhow::Result<RunName> {
    let runs = session.records.runs().await?;
    let newest = runs.into_iter().max_by_key(|run| run.created_ms);
    Ok(newest.ok_or_else(no_runs)?.run.parse()?)
}

fn no_runs() -> anyhow::Error {
    anyhow::anyhow!("there are no runs yet: `produce` or `run` makes one")
}

fn told(status: &Status) -> String {
    let Status { run, pass, state, source, .. } = status;
    let number = show::grouped;
    let eta = match (*state, status.eta_seconds) {
        ("sealed", _) => format!("took {}", show::duration(status.seconds)),
        (_, Some(seconds)) => format!("ETA {}", show::duration(seconds)),
        (_, None) => "ETA unknown".to_owned(),
    };
    format!(
        "run       {run} (pass {pass}), {source}\nstate     {state}\nids       {} of {} stored, {} dead\n\
         batches   {} in all, {} pending, {} in flight, {} redelivered, {} to be stored\nrate      {} ids/s, {eta}",
        number(status.done),
        number(status.ids),
        number(status.dead),
        number(status.batches),
        number(status.pending),
        number(status.in_flight),
        number(status.redelivered),
        number(status.to_store),
        number(status.ids_per_second as u64),
    )
}
