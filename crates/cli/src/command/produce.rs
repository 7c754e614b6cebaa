//! `produce`: publishes a run.

use millstream::Id;
use millstream_engine::compute::Function;
use millstream_engine::observe::status::status;
use millstream_engine::produce::publish::{Progress, Submission, Submitted, is_new, submit};
use millstream_engine::produce::sample::{Choice, Limits, choose};
use millstream_engine::{Broker, Error, Session, Stop};
use serde_json::json;

use super::Context;
use super::finish::{finish, nothing_to_do};
use super::run::watch;
use super::status::nothing_works;
use crate::args::{ProduceArgs, PublishArgs};
use crate::input::{Ids, Words};
use crate::session::{self, Holder};
use crate::{Ended, show};

pub(super) async fn produce<I: Id>(
    context: &Context,
    function: &Function<I>,
    published: &PublishArgs,
) -> anyhow::Result<Ended> {
    let args = &published.produce;
    let waits = published.wait || args.then.is_some();
    let words = Words::check(args)?;
    let read = match words.read::<I>(args, &context.progress).await {
        Ok(read) => read,
        Err(error) => return nothing_to_do(words.run.as_str(), args, error).await,
    };
    let stop = Stop::new();
    context
        .on_servers(Holder::Maker, |servers| async move {
            let session = session::set_up(&servers, &context.spec, &context.config, "produce").await?;
            let progress = context.progress.clone();
            context.on_signal(&stop, move |_| {
                progress.note("stopping: started again with the same words, it resumes");
            });
            let ids = match read {
                Some(ids) => Ok(ids),
                None => ask(context, &session, &words, args, &stop).await,
            };
            let ids = match ids {
                Ok(ids) => ids,
                Err(error) if matches!(error.downcast_ref(), Some(Error::Stopped)) => {
                    show::note("stopped before anything was published");
                    return Ok(Ended::Interrupted);
                }
                Err(error) => return nothing_to_do(words.run.as_str(), args, error).await,
            };
            let came = Came { words: &words, ids: &ids, stop: &stop, waits, started: servers.started };
            Box::pin(came.publish(context, function, &session, args)).await
        })
        .await
}

/// What a `produce` has to publish, and how it was asked to.
struct Came<'a, I> {
    words: &'a Words,
    ids: &'a Ids<I>,
    stop: &'a Stop,
    /// Whether it waits for the end of the run.
    waits: bool,
    /// Whether the servers were started for this command.
    started: bool,
}

impl<I: Id> Came<'_, I> {
    async fn publish(
        self,
        context: &Context,
        function: &Function<I>,
        session: &Session,
        args: &ProduceArgs,
    ) -> anyhow::Result<Ended> {
        let Self { words, ids, stop, waits, started } = self;
        let bad = ids.survey.bad;
        let line = context.progress.publishing(&words.run, ids.survey.ids);
        let publishing = publish(context, function, session, words, ids, stop, |done| line.show(done));
        let submitted = Box::pin(publishing).await;
        drop(line);
        let (submitted, chosen) = match submitted {
            Ok(submitted) => submitted,
            Err(Error::Stopped) => {
                show::note(&format!(
                    "run `{}` is published in part; publish the rest with --run {}",
                    words.run, words.run
                ));
                return Ok(Ended::Interrupted);
            }
            Err(error) => return Err(error.into()),
        };
        if !(waits && args.json) {
            report(&submitted, chosen.as_ref(), bad, args.json);
        }
        if waits {
            if started && !is_over(session, words).await? {
                return Err(nothing_works(context, &words.run));
            }
            return Box::pin(wait(context, session, words, args, bad, stop)).await;
        }
        Ok(if bad == 0 { Ended::Well } else { Ended::InPart })
    }
}

async fn is_over(session: &Session, words: &Words) -> Result<bool, Error> {
    let looking = status(session, &words.run);
    Ok(Box::pin(looking).await?.is_over())
}

/// Waits until others have computed and stored all of it.
async fn wait(
    context: &Context,
    session: &Session,
    words: &Words,
    args: &ProduceArgs,
    bad: u64,
    stop: &Stop,
) -> anyhow::Result<Ended> {
    match Box::pin(watch(context, session, &words.run, stop)).await {
        Ok(last) => finish(context, &last, bad, args).await,
        Err(error) if matches!(error.downcast_ref(), Some(Error::Stopped)) => {
            show::note(&format!("run `{}` is published, and goes on without being waited for", words.run));
            Ok(Ended::Interrupted)
        }
        Err(error) => Err(error),
    }
}

/// Reads the ids that ClickHouse has.
///
/// # Errors
/// [`Error::Stopped`]; what is wrong with them.
pub(super) async fn ask<I: Id>(
    context: &Context,
    session: &Session,
    words: &Words,
    args: &ProduceArgs,
    stop: &Stop,
) -> anyhow::Result<Ids<I>> {
    tokio::select! {
        ids = words.ask::<I>(args, &session.store, &context.progress) => ids,
        () = stop.no_more_taking() => Err(Error::Stopped.into()),
    }
}

/// Publishes ids that were read, in batches of a size that is chosen here where the command does not name it.
pub(super) async fn publish<I: Id>(
    context: &Context,
    function: &Function<I>,
    session: &Session,
    words: &Words,
    ids: &Ids<I>,
    stop: &Stop,
    progress: impl Fn(Progress),
) -> Result<(Submitted, Option<Choice>), Error> {
    let new = async {
        match words.batch_ids {
            None => is_new(&session.records, &session.store, &words.run).await,
            Some(_) => Ok(false),
        }
    };
    let new = tokio::select! {
        new = new => new?,
        () = stop.no_more_taking() => return Err(Error::Stopped),
    };
    let chosen = if new { Some(size(context, function, &session.broker, ids, stop).await?) } else { None };
    let Words { run, batch_ids, priority, rate, max_dead, .. } = words.clone();
    let max_dead = max_dead.map(|most| most.of(ids.survey.ids));
    let input = ids.input.clone();
    let survey = ids.survey.clone();
    let chosen_ = chosen.clone();
    let metrics = context.metrics.clone();
    let submission =
        Submission { run, input, survey, batch_ids, chosen: chosen_, priority, rate, max_dead, metrics };
    let submitted = submit::<I>(session, &submission, stop, progress).await?;
    Ok((submitted, chosen))
}

/// Times the ids, and says which size that makes.
async fn size<I: Id>(
    context: &Context,
    function: &Function<I>,
    broker: &Broker,
    ids: &Ids<I>,
    stop: &Stop,
) -> Result<Choice, Error> {
    let Context { config, progress, .. } = context;
    let threads = config.work.threads;
    let max_payload = broker.max_payload();
    let limits = Limits { ids: ids.survey.ids, threads, max_payload };
    let step = progress.step("timing a sample of the ids");
    let choice = choose(function, &config.work, ids.sample.clone(), &limits, stop).await?;
    drop(step);
    progress.note(&show::choice(&choice));
    Ok(choice)
}

fn report(submitted: &Submitted, chosen: Option<&Choice>, bad: u64, as_json: bool) {
    let Submitted { record, published, written, found, repair } = submitted;
    if as_json {
        let mut value = json!({
            "run": record.run,
            "batches": published.batches,
            "ids": published.ids,
            "dropped_repeats": published.dropped_repeats,
            "batches_written": written,
            "batches_found": found,
            "bad_lines": bad,
        });
        if let Some(chosen) = chosen {
            value["batch"] = json!(chosen);
        }
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
