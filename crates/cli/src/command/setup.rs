//! `setup`: streams, bucket, consumer, tables.

use super::Context;
use crate::Ended;
use crate::session::{Holder, Session};
use crate::show;

pub(super) async fn setup(context: &Context) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Moment, |servers| async move {
            Session::set_up(&servers, &context.spec, &context.config, "setup").await?;
            show::line(&format!(
                "pipeline `{}` is set up in database `{}`",
                context.spec.name, context.config.database
            ));
            Ok(Ended::Well)
        })
        .await
}
