//! `produce`: publishes a run.

use millstream::Pipeline;
use millstream_engine::publish::{Submission, Submitted, submit};
use millstream_engine::{Error, Stop};
use serde_json::json;

use super::{Context, on_signal};
use crate::args::ProduceArgs;
use crate::input::Words;
use crate::session::{Holder, Session};
use crate::{Ended, show};

pub(super) async fn produce<P: Pipeline>(context: &Context<P>, args: &ProduceArgs) -> anyhow::Result<Ended> {
    let words = Words::check(args)?;
    let stop = Stop::new();
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = Session::set_up::<P>(&servers, &context.config, "produce").await?;
            on_signal(&stop, |_| show::note("stopping: started again with the same words, it resumes"))?;
            match publish::<P>(&session, args, &words, &stop).await {
                Ok(submitted) => {
                    report(&submitted, args.json);
                    Ok(Ended::Well)
                }
                Err(error) if matches!(error.downcast_ref(), Some(Error::Stopped)) => {
                    show::note(&format!("run `{}` is published in part; publish the rest with --run {}", words.run, words.run));
                    Ok(Ended::Interrupted)
                }
                Err(error) => Err(error),
            }
        })
        .await
}

/// Reads the input, checks it, publishes it.
pub(super) async fn publish<P: Pipeline>(
    session: &Session,
    args: &ProduceArgs,
    words: &Words,
    stop: &Stop,
) -> anyhow::Result<Submitted> {
    let spooled = words.input::<P::Id>(args, &session.store).await?;
    let input = spooled.input.clone();
    let survey = tokio::task::spawn_blocking(move || input.survey::<P::Id>()).await??;
    let submission =
        Submission { run: words.run.clone(), input: spooled.input.clone(), survey, batch_ids: words.batch_ids };
    Ok(submit::<P::Id>(&session.broker, &session.records, &submission, stop, |_| {}).await?)
}

fn report(submitted: &Submitted, as_json: bool) {
    let Submitted { record, published, written, found } = submitted;
    if as_json {
        show::json(&json!({
            "run": record.run,
            "batches": published.batches,
            "ids": published.ids,
            "dropped_repeats": published.dropped_repeats,
            "batches_written": written,
            "batches_found": found,
        }));
        return;
    }
    let repeats = match published.dropped_repeats {
        0 => String::new(),
        repeats => format!(", {} repeated ids dropped", show::grouped(repeats)),
    };
    let found = match (*written, *found) {
        (_, 0) => String::new(),
        (0, _) => "; all of it had been published before".to_owned(),
        (_, found) => format!("; {} batches had been published before", show::grouped(found)),
    };
    show::line(&format!(
        "published run `{}`: {} ids in {} batches{repeats}{found}",
        record.run,
        show::grouped(published.ids),
        show::grouped(u64::from(published.batches)),
    ));
}
