//! `run`: every stage in one process, until the run is sealed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use millstream::Id;
use millstream::names::RunName;
use millstream_engine::compute::Function;
use millstream_engine::control::max_dead::watch_dead;
use millstream_engine::model::host::since;
use millstream_engine::observe::status::{Status, status};
use millstream_engine::seal::seal_passes;
use millstream_engine::sink::{SinkState, sink};
use millstream_engine::work::work;
use millstream_engine::{Error, Session, Stop};
use tokio::task::JoinSet;

use super::Context;
use super::finish::{finish, nothing_to_do};
use super::produce::{ask, publish};
use super::service::check_sound;
use crate::args::RunArgs;
use crate::input::{Ids, Words};
use crate::session::{self, Holder};
use crate::{Ended, show};

/// How often progress is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How soon at first: a small run is over by then.
const FIRST_LOOK: Duration = Duration::from_millis(100);
/// A look at a large run reads a byte of each of its rows. It may take this part of the time, and is made so often at least.
const LOOK_SHARE: u32 = 20;
const LOOK_AT_LEAST: Duration = Duration::from_secs(10);
/// How long the stages may take to finish what they hold after Ctrl-C.
const LEAVE_WITHIN: Duration = Duration::from_secs(20);

pub(super) async fn run<I: Id>(
    context: &Context,
    function: &Function<I>,
    args: &RunArgs,
) -> anyhow::Result<Ended> {
    let words = Words::check(&args.produce)?;
    let read = match words.read::<I>(&args.produce, &context.progress).await {
        Ok(read) => read,
        Err(error) => return nothing_to_do(words.run.as_str(), &args.produce, error).await,
    };
    context
        .on_servers(Holder::Run, |servers| async move {
            let session = session::set_up(&servers, &context.spec, &context.config, "run").await?;
            let stop = Stop::new();
            let interrupted = Arc::new(AtomicBool::new(false));
            let noted = interrupted.clone();
            let progress = context.progress.clone();
            context.on_signal(&stop, move |_| {
                noted.store(true, Ordering::Relaxed);
                progress.note("finishing what is held; a second Ctrl-C leaves at once");
            });
            // After that: a Ctrl-C must not leave consumers as they are in the midst of it.
            if servers.own {
                // An earlier `run` that was killed may hold batches still, in the broker's view.
                Box::pin(session.broker.reclaim(&session.records.passes().await?)).await?;
            }
            let ids = match read {
                Some(ids) => Ok(ids),
                None => ask(context, &session, &words, &args.produce, &stop).await,
            };
            let driven = match ids {
                Ok(ids) => Box::pin(drive(context, function, &session, &words, &ids, &stop))
                    .await
                    .map(|last| (last, ids.survey.bad)),
                Err(error) => Err(error),
            };
            check_sound(&stop)?;
            match driven {
                Ok((last, bad)) => finish(context, &last, bad, &args.produce).await,
                Err(error)
                    if matches!(error.downcast_ref(), Some(Error::Stopped))
                        && interrupted.load(Ordering::Relaxed) =>
                {
                    show::note(&format!(
                        "run `{}` is not finished: the same command with --run {} goes on",
                        words.run, words.run
                    ));
                    Ok(Ended::Interrupted)
                }
                Err(error) => nothing_to_do(words.run.as_str(), &args.produce, error).await,
            }
        })
        .await
}

/// Starts the stages, publishes, waits for the seal, ends the stages.
async fn drive<I: Id>(
    context: &Context,
    function: &Function<I>,
    session: &Session,
    words: &Words,
    ids: &Ids<I>,
    stop: &Stop,
) -> anyhow::Result<Status> {
    let mut stages = start_stages(context, function, session, stop);
    // The first ids are computed while the last are published, so both are watched from the start.
    let publishing = async { Ok(publish(context, function, session, words, ids, stop, |_| {}).await?) };
    let both = async { tokio::try_join!(publishing, watch(context, session, &words.run, stop)) };
    let outcome = tokio::select! {
        outcome = both => outcome.map(|(_, last)| last),
        Some(ended) = stages.join_next() => Err(stage_ended(ended)),
    };
    stop.stop_taking();
    let finished = async { while stages.join_next().await.is_some() {} };
    // The rows of the last insert are proven, and views of the operator's may be filled with them still.
    let within = match &outcome {
        Ok(_) if session.store.feeds_views() => session.store.insert_over(),
        _ => LEAVE_WITHIN,
    };
    if tokio::time::timeout(within, finished).await.is_err() {
        stop.give_up();
        stages.shutdown().await;
    }
    outcome
}

fn start_stages<I: Id>(
    context: &Context,
    function: &Function<I>,
    session: &Session,
    stop: &Stop,
) -> JoinSet<Result<(), Error>> {
    let mut stages = JoinSet::new();
    let function = function.clone();
    let plan = context.config.work.clone();
    let broker = session.broker.clone();
    let stage = stop.child();
    let metrics = context.metrics.clone();
    stages.spawn(async move { work(function, &broker, &plan, metrics, &stage).await });
    let broker = session.broker.clone();
    let store = session.store.clone();
    let plan = context.config.sink.clone();
    let stage = stop.child();
    let state = Arc::new(SinkState::counted_by(context.metrics.clone()));
    let shared = state.clone();
    stages.spawn(async move { sink(&broker, &store, plan, state, &stage).await });
    let sealing = session.clone();
    let stage = stop.child();
    stages.spawn(async move { seal_passes::<I>(sealing, shared, &stage).await });
    let limiting = session.clone();
    let stage = stop.child();
    stages.spawn(async move { watch_dead(&limiting, &stage).await });
    stages
}

/// A stage that ends by itself could not begin, or panicked.
fn stage_ended(ended: Result<Result<(), Error>, tokio::task::JoinError>) -> anyhow::Error {
    match ended {
        Ok(Ok(())) => Error::Stopped.into(),
        Ok(Err(error)) => error.into(),
        Err(panic) => anyhow::Error::new(panic).context("a stage panicked: this is a fault of Millstream"),
    }
}

/// The pause after a look at a run that took this long.
pub(super) fn pause_after(look: Duration) -> Duration {
    LOOK.max(look * LOOK_SHARE).min(LOOK_AT_LEAST)
}

/// Shows how a run goes on, until it is over. What processes did is then told of the time since this began to look.
///
/// # Errors
/// [`Error::Stopped`] when no more work is to be taken.
pub(super) async fn watch(
    context: &Context,
    session: &Session,
    run: &RunName,
    stop: &Stop,
) -> anyhow::Result<Status> {
    let mut line = context.progress.run();
    let mut failing: Option<Instant> = None;
    let mut before = None;
    let mut pause = FIRST_LOOK;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.no_more_taking() => return Err(Error::Stopped).context("interrupted"),
        }
        let begun = Instant::now();
        let looked = status(session, run).await;
        pause = pause_after(begun.elapsed());
        match looked {
            Ok(mut status) => {
                failing = None;
                line.show(&status);
                let before = before.get_or_insert_with(|| status.hosts.clone());
                if status.is_over() {
                    status.hosts = since(&status.hosts, before);
                    return Ok(status);
                }
            }
            // Its record is being written.
            Err(Error::NoSuchRun { .. }) => {}
            // Servers come and go; the stages wait for them, and so does this.
            Err(error) => {
                if failing.is_none_or(|since| since.elapsed() > Duration::from_secs(10)) {
                    failing = Some(Instant::now());
                    tracing::warn!("failed to {error}: no progress can be shown for now");
                }
            }
        }
    }
}
