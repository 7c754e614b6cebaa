//! `setup`: streams, bucket, consumer, tables.

use millstream::Pipeline;

use super::Context;
use crate::Ended;
use crate::session::{Holder, Session};
use crate::show;

pub(super) async fn setup<P: Pipeline>(context: &Context<P>) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Moment, |servers| async move {
            Session::set_up::<P>(&servers, &context.config, "setup").await?;
            show::line(&format!(
                "pipeline `{}` is set up in database `{}`",
                P::NAME,
                context.config.database
            ));
            Ok(Ended::Well)
        })
        .await
}
