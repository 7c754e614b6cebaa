//! `replay`: a new pass over a run, or over some of its ids.

use millstream::Id;
use millstream_engine::control::replay::{Replayed, replay as begin};
use millstream_engine::model::moment::{Moment, now_ms};
use millstream_engine::model::selection::{Letters, Selection};
use millstream_engine::{Error, Stop};
use serde_json::json;

use super::dead::letters;
use super::{Context, run_name};
use crate::args::ReplayArgs;
use crate::input::parse_range;
use crate::session::{self, Holder};
use crate::{Ended, Usage, show};

pub(super) async fn replay<I: Id>(context: &Context, args: &ReplayArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    let selection = selection(args)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = session::of_run(&servers, &context.spec, "replay", run.as_str()).await?;
            let stop = Stop::new();
            context.on_signal(&stop, {
                let stop = stop.clone();
                move |_| stop.give_up()
            });
            let metrics = &context.metrics;
            match begin::<I>(&session, &run, selection.as_ref(), metrics, &stop).await {
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

/// Which ids are meant; `None` stands for all.
fn selection(args: &ReplayArgs) -> Result<Option<Selection>, Usage> {
    if !args.dead && letters(&args.letters) != Letters::default() {
        return Err(Usage(
            "--error, --batch, --host and --build choose among dead letters\nhint: add --dead".into(),
        ));
    }
    Ok(match args {
        ReplayArgs { dead: true, .. } => Some(Selection::Letters(letters(&args.letters))),
        ReplayArgs { r#where: Some(condition), .. } => Some(Selection::Where(condition.clone())),
        ReplayArgs { batches: Some(range), .. } => Some(batches(range)?),
        ReplayArgs { since: None, until: None, .. } => None,
        ReplayArgs { since, until, .. } => Some(Selection::Published {
            since: since.as_deref().map(|words| moment("--since", words)).transpose()?,
            until: until.as_deref().map(|words| moment("--until", words)).transpose()?,
        }),
    })
}

fn batches(range: &str) -> Result<Selection, Usage> {
    let [first, last] = parse_range("--batches", range).map_err(Usage)?;
    // What is beyond any batch is refused with the run's own number of them.
    let [first, end] = [first, last.saturating_add(1)].map(|batch| u32::try_from(batch).unwrap_or(u32::MAX));
    Ok(Selection::Batches { first, end })
}

fn moment(flag: &str, words: &str) -> Result<Moment, Usage> {
    Moment::parse(words, now_ms()).ok_or_else(|| {
        Usage(format!(
            "{flag}: `{words}` is no moment\nhint: give one as 2026-11-25T18:00:00Z, or as 90s, 10m, 2h, 3d before now"
        ))
    })
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
