//! `rebuild`: inserts the rows of a sealed run again, from the stream that keeps them.

use millstream_engine::control::rebuild::{Rebuilt, rebuild as bring_back};
use millstream_engine::{Error, Stop};
use serde_json::json;

use super::{Context, run_name};
use crate::args::RebuildArgs;
use crate::session::{self, Holder};
use crate::{Ended, show};

pub(super) async fn rebuild(context: &Context, args: &RebuildArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = session::of_tables(&servers, &context.spec, "rebuild", run.as_str()).await?;
            let stop = Stop::new();
            context
                .on_signal(&stop, |_| show::note("inserting what is held; a second Ctrl-C leaves at once"));
            let plan = context.config.sink.clone();
            let rebuilding = bring_back(&session, &run, args.pass, plan, &stop);
            match Box::pin(rebuilding).await {
                Ok(rebuilt) => {
                    report(run.as_str(), &rebuilt, args.json)?;
                    Ok(Ended::Well)
                }
                Err(Error::Stopped) => {
                    show::note("the rows are inserted in part; the same words go on");
                    Ok(Ended::Interrupted)
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
}

fn report(run: &str, rebuilt: &Rebuilt, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let mut value = serde_json::to_value(rebuilt)?;
        value["run"] = json!(run);
        show::json(&value);
        return Ok(());
    }
    let Rebuilt { pass, rows, inserted, .. } = rebuilt;
    show::line(&format!(
        "pass {pass} of run `{run}` is whole and can be seen: {} rows; {} were inserted",
        show::grouped(*rows),
        show::grouped(*inserted),
    ));
    Ok(())
}
