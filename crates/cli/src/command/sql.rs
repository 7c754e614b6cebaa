//! `sql`: a question to the configured ClickHouse.

use millstream_engine::Store;

use super::Context;
use crate::args::SqlArgs;
use crate::session::Holder;
use crate::{Ended, show};

pub(super) async fn sql(context: &Context, args: &SqlArgs) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Question, |servers| async move {
            let store = Store::connect(&context.spec, servers.store.clone()).await?;
            let mut answer = show::Answer::new();
            store.sql(&args.query, "PrettyCompactMonoBlock", |piece| answer.piece(&piece)).await?;
            Ok(Ended::Well)
        })
        .await
}
