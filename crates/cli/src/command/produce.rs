//! `produce`: publishes a run.

use millstream::Pipeline;
use millstream_engine::publish::{Progress, Submission, Submitted, submit};
use millstream_engine::{Error, Stop};
use serde_json::json;

use super::{Context, on_signal};
use crate::args::ProduceArgs;
use crate::input::{Ids, Words};
use crate::session::{Holder, Session};
use crate::{Ended, show};

pub(super) async fn produce<P: Pipeline>(context: &Context<P>, args: &ProduceArgs) -> anyhow::Result<Ended> {
    let words = Words::check(args)?;
    let read = words.read::<P::Id>(args, &context.progress).await?;
    let stop = Stop::new();
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = Session::set_up::<P>(&servers, &context.config, "produce").await?;
            let progress = context.progress.clone();
            on_signal(&stop, move |_| {
                progress.note("stopping: started again with the same words, it resumes")
            })?;
            let ids = match read {
                Some(ids) => ids,
                None => words.ask::<P::Id>(args, &session.store, &context.progress).await?,
            };
            let line = context.progress.publishing(&words.run, ids.survey.ids);
            let submitted = publish::<P>(&session, &words, &ids, &stop, |done| line.show(done)).await;
            drop(line);
            match submitted {
                Ok(submitted) => {
                    report(&submitted, args.json);
                    Ok(Ended::Well)
                }
                Err(Error::Stopped) => {
                    show::note(&format!(
                        "run `{}` is published in part; publish the rest with --run {}",
                        words.run, words.run
                    ));
                    Ok(Ended::Interrupted)
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
}

/// Publishes ids that were read.
pub(super) async fn publish<P: Pipeline>(
    session: &Session,
    words: &Words,
    ids: &Ids,
    stop: &Stop,
    progress: impl Fn(Progress),
) -> Result<Submitted, Error> {
    let Words { run, batch_ids, priority, rate, .. } = words.clone();
    let (input, survey) = (ids.input.clone(), ids.survey.clone());
    let submission = Submission { run, input, survey, batch_ids, priority, rate };
    submit::<P::Id>(&session.broker, &session.records, &session.store, &submission, stop, progress).await
}

fn report(submitted: &Submitted, as_json: bool) {
    let Submitted { record, published, written, found, repair } = submitted;
    if as_json {
        let mut value = json!({
            "run": record.run,
            "batches": published.batches,
            "ids": published.ids,
            "dropped_repeats": published.dropped_repeats,
            "batches_written": written,
            "batches_found": found,
        });
        if let Some(repair) = repair {
            value["repair"] = json!(repair);
        }
        show::json(&value);
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
    if let Some(repair) = repair.as_ref().filter(|repair| repair.batches_again > 0) {
        show::line(&format!("{} batches are computed again", show::grouped(repair.batches_again)));
    }
}
