//! `produce --stdin --follow`: publishes ids as they come, and closes the run when they end.

use millstream::Id;
use millstream_engine::compute::Function;
use millstream_engine::model::record::Published;
use millstream_engine::produce::input::{Sample, feed};
use millstream_engine::produce::open_run::{End, Feed, Followed, follow as follow_feed};
use millstream_engine::produce::sample::{Limits, choose};
use millstream_engine::{Broker, Error, Stop};
use serde_json::json;

use super::Context;
use super::finish::nothing_to_do;
use crate::args::{MaxDead, PublishArgs};
use crate::input::Words;
use crate::session::{self, Holder};
use crate::{Ended, Usage, show};

pub(super) async fn follow<I: Id>(
    context: &Context,
    function: &Function<I>,
    args: &PublishArgs,
) -> anyhow::Result<Ended> {
    let Words { run, batch_ids, priority, rate, max_dead, .. } = Words::check(&args.produce)?;
    let max_dead = match max_dead {
        None => None,
        Some(MaxDead::Ids(most)) => Some(most),
        Some(MaxDead::Percent(_)) => {
            return Err(Usage(
                "--max-dead: a number is wanted with --follow: how many ids will come is not known"
                    .to_owned(),
            )
            .into());
        }
    };
    let metrics = context.metrics.clone();
    let feed_of = Feed { run, batch_ids, linger: args.linger, priority, rate, max_dead, metrics };
    context
        .on_servers(Holder::Maker, |servers| async move {
            let session = session::set_up(&servers, &context.spec, &context.config, "produce").await?;
            let stop = Stop::new();
            let progress = context.progress.clone();
            context.on_signal(&stop, move |_| {
                progress.note("publishing what is held; a second signal leaves at once");
            });
            context.progress.note(&format!("following standard input into run `{}`", feed_of.run));
            let lines = feed::<I>(std::io::stdin())
                .map_err(|source| Error::Input { input: "standard input".into(), source })?;
            let time = async |sample| size(context, function, &session.broker, sample, &stop).await;
            let following = follow_feed(&session, &feed_of, lines, time, &stop);
            let followed = match Box::pin(following).await {
                Ok(followed) => followed,
                Err(error) => return nothing_to_do(feed_of.run.as_str(), &args.produce, error.into()).await,
            };
            report(feed_of.run.as_str(), followed, args.produce.json)
        })
        .await
}

/// Times the first ids, and says which size of batches that makes.
async fn size<I: Id>(
    context: &Context,
    function: &Function<I>,
    broker: &Broker,
    sample: Sample<I>,
    stop: &Stop,
) -> Option<u32> {
    let Context { config, progress, .. } = context;
    // The number of ids is not known yet.
    let limits = Limits { ids: u64::MAX, threads: config.work.threads, max_payload: broker.max_payload() };
    let choice = choose(function, &config.work, sample, &limits, stop).await.ok()?;
    progress.note(&show::choice(&choice));
    Some(choice.batch_ids)
}

fn report(run: &str, followed: Followed, as_json: bool) -> anyhow::Result<Ended> {
    let Followed { end, written, bad, first_bad, broken } = followed;
    let (published, state) = match &end {
        End::Closed(published) => (published, "closed"),
        End::Open(published) => (published, "open"),
        End::ClosedElsewhere { published, .. } => (published, "closed elsewhere"),
    };
    told(run, published, state, written, bad, as_json);
    let input = || "standard input".to_owned();
    if bad > 0 {
        let error = Error::PassedOver { input: input(), count: bad, first: first_bad };
        show::report(&error.into());
    }
    match end {
        End::ClosedElsewhere { not_taken, .. } => {
            Err(Error::ClosedElsewhere { run: run.to_owned(), ids: not_taken }.into())
        }
        End::Open(_) => {
            show::note(&format!(
                "run `{run}` is open: --run {run} adds to it, and `produce --stdin --follow --run {run} < /dev/null` closes it"
            ));
            match broken {
                Some(source) => Err(Error::Input { input: input(), source }.into()),
                None => Ok(Ended::Interrupted),
            }
        }
        End::Closed(_) if bad > 0 => Ok(Ended::InPart),
        End::Closed(_) => Ok(Ended::Well),
    }
}

fn told(run: &str, published: &Published, state: &str, written: u64, bad: u64, as_json: bool) {
    let Published { batches, ids, dropped_repeats, .. } = published;
    if as_json {
        return show::json(&json!({
            "run": run, "batches": batches, "ids": ids, "dropped_repeats": dropped_repeats,
            "batches_written": written, "bad_lines": bad, "closed": state != "open",
        }));
    }
    let repeats = match dropped_repeats {
        0 => String::new(),
        repeats => format!(", {} dropped", show::counted(*repeats, "repeated id")),
    };
    let ids = show::grouped(*ids);
    let batches = show::grouped(u64::from(*batches));
    show::line(&format!("published run `{run}`: {ids} ids in {batches} batches{repeats}; it is {state}"));
}
