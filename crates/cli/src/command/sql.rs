//! `sql`: a question to the configured ClickHouse.

use millstream_engine::Store;
use tokio::sync::Notify;

use super::Context;
use crate::args::SqlArgs;
use crate::session::Holder;
use crate::{Ended, show};

pub(super) async fn sql(context: &Context, args: &SqlArgs) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Question, |servers| async move {
            let store = Store::connect(&context.spec, servers.store.clone()).await?;
            let mut answer = show::Answer::new();
            let unread = Notify::new();
            let print = |piece: bytes::Bytes| {
                answer.piece(&piece);
                if show::failed() {
                    unread.notify_one();
                }
            };
            // The rest of an answer that is not read any more may be without an end.
            tokio::select! {
                asked = store.sql(&args.query, "PrettyCompactMonoBlock", print) => asked?,
                () = unread.notified() => {}
            }
            Ok(Ended::Well)
        })
        .await
}
