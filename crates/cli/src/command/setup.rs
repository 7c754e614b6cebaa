//! `setup`: streams, bucket, consumer, tables. What it changes of an existing table it shows first.

use millstream_engine::Store;
use millstream_engine::clickhouse::sql::{Column, View};
use millstream_engine::clickhouse::store::{Change, Plan};

use super::Context;
use crate::args::SetupArgs;
use crate::session::{self, Holder};
use crate::{Ended, show};

pub(super) async fn setup(context: &Context, args: &SetupArgs) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Maker, |servers| async move {
            let (_broker, store) = servers.connect(&context.spec, "setup").await?;
            let plan = store.plan().await?;
            if plan.refused.is_empty() {
                told(&plan, &store).iter().for_each(|line| show::line(line));
                if !plan.changes.is_empty() && !args.yes {
                    show::line("nothing has been changed: `setup --yes` does it");
                    return Ok(Ended::Badly);
                }
            }
            store.change(&plan).await?;
            session::set_up(&servers, &context.spec, &context.config, "setup").await?;
            show::line(&format!(
                "pipeline `{}` is set up in database `{}`",
                context.spec.name, context.config.environment.database
            ));
            if !plan.fed.is_empty() {
                show::line(&format!("{}: {}", plan.fed.join(", "), show::FED));
            }
            Ok(Ended::Well)
        })
        .await
}

/// What a plan changes, what it makes anew, and what is lost by it.
fn told(plan: &Plan, store: &Store) -> Vec<String> {
    let mut lines = Vec::new();
    if !plan.changes.is_empty() {
        lines.push(format!("changes of table {}:", store.tables().rows()));
        lines.extend(plan.changes.iter().map(changed));
    }
    let views: Vec<View> = match plan.changes[..] {
        [] => plan.stale.clone(),
        _ => View::ALL.into_iter().filter(|view| *view != View::Dead || plan.stale.contains(view)).collect(),
    };
    if !views.is_empty() {
        let names = views.iter().map(|view| store.tables().full_name(&store.tables().view_name(*view)));
        lines.push(format!("views made anew over it: {}", names.collect::<Vec<_>>().join(", ")));
        lines.push(
            "lost by that: nothing that is stored; a definition or comment that was given to those views by hand".to_owned(),
        );
    }
    lines
}

fn changed(change: &Change) -> String {
    match change {
        Change::Add(Column { name, kind, .. }) => format!(
            "  add column `{name}` {kind}: rows that are stored, and those of versions without it, have its type's blank there"
        ),
        Change::Widen { column: Column { name, kind, .. }, from } => format!(
            "  widen column `{name}` from {from} to {kind}: ClickHouse writes that column anew; versions with the narrower \
             one go on"
        ),
    }
}
