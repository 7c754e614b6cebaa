//! `sql`: a question to the configured ClickHouse.

use millstream::Pipeline;
use millstream_engine::Store;

use super::Context;
use crate::args::SqlArgs;
use crate::session::{Holder, Servers};
use crate::{Ended, show};

pub(super) async fn sql<P: Pipeline>(context: &Context<P>, args: &SqlArgs) -> anyhow::Result<Ended> {
    // Only ClickHouse is asked: a NATS that is away, or not named, is no obstacle.
    context
        .on_servers(Holder::Moment, |servers| async move {
            let store = open::<P>(&servers).await?;
            store.sql(&args.query, "PrettyCompactMonoBlock", |piece| show::bytes(&piece)).await?;
            Ok(Ended::Well)
        })
        .await
}

async fn open<P: Pipeline>(servers: &Servers) -> anyhow::Result<Store> {
    Ok(Store::connect::<P>(servers.store.clone()).await?)
}
