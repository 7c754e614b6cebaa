//! `up`: the local stack alone.

use millstream_engine::Stop;
use millstream_local::Owner;

use super::Context;
use crate::args::UpArgs;
use crate::session::{Needs, open_stack};
use crate::{Ended, show};

pub(super) async fn up(context: &Context, args: &UpArgs) -> anyhow::Result<Ended> {
    let config = &context.config;
    // It is asked for by name: servers that are named for other commands do not matter.
    let needs = Needs { nats: true, clickhouse: true };
    let mut stack =
        open_stack(config, Owner::Up, needs, (args.nats_port, args.clickhouse_port), &context.progress)
            .await?;
    let stop = Stop::new();
    context.on_signal(&stop, |_| show::note("stopping the servers; a second signal leaves at once"));
    show::line(&format!(
        "NATS        {}\nClickHouse  {}",
        stack.nats_url().unwrap_or_default(),
        stack.clickhouse_url().unwrap_or_default()
    ));
    show::note(&format!(
        "the local stack of `{}` is up, on {} only: other commands with this --data use it; Ctrl-C ends it",
        config.data.display(),
        args.listen
    ));
    let failed = tokio::select! {
        error = stack.failed() => Some(error),
        () = stop.no_more_taking() => None,
        // Addresses that could not be told are of no use.
        () = std::future::ready(()), if show::failed() => None,
    };
    stack.stop().await?;
    failed.map_or(Ok(Ended::Well), |error| Err(error.into()))
}
