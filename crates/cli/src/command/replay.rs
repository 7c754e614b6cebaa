//! `replay`: a new pass over a run's dead letters.

use millstream::Pipeline;
use millstream_engine::replay::{Replayed, replay_dead};
use millstream_engine::{Error, Stop};
use serde_json::json;

use super::dead::letters;
use super::{Context, on_signal, run_name};
use crate::args::ReplayArgs;
use crate::session::{Holder, Session};
use crate::{Ended, show};

pub(super) async fn replay<P: Pipeline>(context: &Context<P>, args: &ReplayArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let Session { broker, store, records } =
                Session::of_run::<P>(&servers, "replay", run.as_str()).await?;
            let stop = Stop::new();
            on_signal(&stop, {
                let stop = stop.clone();
                move |_| stop.give_up()
            })?;
            let letters = letters(&args.letters);
            match replay_dead::<P::Id>(&broker, &records, &store, &run, &letters, &stop).await {
                Ok(replayed) => {
                    report(run.as_str(), &replayed, args.json);
                    Ok(Ended::Well)
                }
                Err(Error::Stopped) => {
                    show::note("the pass is published in part; the same words go on");
                    Ok(Ended::Interrupted)
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
}

fn report(run: &str, replayed: &Replayed, as_json: bool) {
    let Replayed { pass, ids, batches } = replayed;
    if as_json {
        show::json(&json!({ "run": run, "pass": pass, "ids": ids, "batches": batches }));
    } else {
        show::line(&format!(
            "pass {pass} of run `{run}` computes {} ids of {} batches again; `status {run} --watch` shows when it is sealed",
            show::grouped(*ids),
            show::grouped(*batches),
        ));
    }
}
