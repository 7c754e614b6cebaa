//! `work` and `sink`: services that run until they are told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use millstream::Id;
use millstream_engine::Stop;
use millstream_engine::compute::Function;
use millstream_engine::control::max_dead::watch_dead;
use millstream_engine::model::counts::{SinkCounts, WorkCounts};
use millstream_engine::seal::seal_passes;
use millstream_engine::sink::SinkState;

use super::{Context, Signal};
use crate::session::{self, Holder};
use crate::{Ended, show};

/// How often a service says what it did.
const REPORT: Duration = Duration::from_secs(30);

pub(super) async fn work<I: Id>(context: &Context, function: &Function<I>) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Service, |servers| async move {
            let session = session::set_up(&servers, &context.spec, &context.config, "work").await?;
            let (stop, how) = stop_on_signal(context);
            let metrics = context.metrics.clone();
            let counted = context.metrics.clone();
            report(&stop, move || {
                let WorkCounts { batches, ids, dead, redelivered, set_aside, slow, isolated, crashed } =
                    counted.work_counts();
                tracing::info!(
                    batches,
                    ids,
                    dead,
                    redelivered,
                    set_aside,
                    slow,
                    isolated,
                    crashed,
                    "computed so far"
                );
            });
            let function = function.clone();
            let plan = &context.config.work;
            millstream_engine::work::work(function, &session.broker, plan, metrics, &stop).await?;
            check_sound(&stop)?;
            Ok(how.ended())
        })
        .await
}

pub(super) async fn sink<I: Id>(context: &Context) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Service, |servers| async move {
            let session = session::set_up(&servers, &context.spec, &context.config, "sink").await?;
            let (stop, how) = stop_on_signal(context);
            let state = Arc::new(SinkState::counted_by(context.metrics.clone()));
            let counted = context.metrics.clone();
            report(&stop, move || {
                let SinkCounts { rows, messages, inserts, failed_inserts, redelivered, set_aside } =
                    counted.sink_counts();
                tracing::info!(
                    rows,
                    messages,
                    inserts,
                    failed = failed_inserts,
                    redelivered,
                    set_aside,
                    "stored so far"
                );
            });
            let sealing = stop.child();
            let sealer = seal_passes::<I>(session.clone(), state.clone(), &sealing);
            let plan = context.config.sink.clone();
            let sink = millstream_engine::sink::sink(&session.broker, &session.store, plan, state, &stop);
            let dead = watch_dead(&session, &stop);
            let both = async { tokio::try_join!(sink, sealer, dead) };
            Box::pin(both).await?;
            check_sound(&stop)?;
            Ok(how.ended())
        })
        .await
}

/// How a service came to stop: SIGTERM is its normal end.
struct How(Arc<AtomicU8>);

impl How {
    fn ended(&self) -> Ended {
        if self.0.load(Ordering::Relaxed) == 2 { Ended::Interrupted } else { Ended::Well }
    }
}

/// A service that ends because of a fault of its own has not ended well.
pub(super) fn check_sound(stop: &Stop) -> anyhow::Result<()> {
    anyhow::ensure!(
        !stop.has_panicked(),
        "a task panicked: this is a fault of Millstream, and the log says where\nhint: nothing is lost; what was held is delivered \
         again once the service is started again"
    );
    Ok(())
}

fn stop_on_signal(context: &Context) -> (Stop, How) {
    let stop = Stop::new();
    let how = Arc::new(AtomicU8::new(0));
    let noted = how.clone();
    context.on_signal(&stop, move |signal| {
        noted.store(if signal == Signal::Interrupt { 2 } else { 1 }, Ordering::Relaxed);
        show::note("draining; a second signal leaves at once");
    });
    (stop, How(how))
}

/// Says every half minute, and in the end, what was done.
fn report(stop: &Stop, say: impl Fn() + Send + 'static) {
    let stopping = stop.clone();
    stop.spawn(async move {
        while stopping.rest(REPORT).await {
            say();
        }
        say();
    });
}
