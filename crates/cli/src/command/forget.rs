//! `forget`: removes a run, or one pass of it.

use anyhow::Context as _;
use indicatif::HumanBytes;
use millstream_engine::control::forget::{
    Belongings, Forgotten, belongings, forget as remove, forget_pipeline,
};
use millstream_engine::{Broker, Store};
use serde_json::json;

use super::{Context, run_name};
use crate::args::ForgetArgs;
use crate::session::{self, Holder};
use crate::{Ended, show};

pub(super) async fn forget(context: &Context, args: &ForgetArgs) -> anyhow::Result<Ended> {
    if let Some(pipeline) = &args.pipeline {
        return forget_whole(context, pipeline, args).await;
    }
    let run = run_name(args.run.as_deref().unwrap_or_default())?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = session::of_run(&servers, &context.spec, "forget", run.as_str()).await?;
            let forgotten = remove(&session, &run, args.pass).await?;
            report(run.as_str(), args.pass, &forgotten, args.json)?;
            Ok(Ended::Well)
        })
        .await
}

async fn forget_whole(context: &Context, pipeline: &str, args: &ForgetArgs) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Moment, |servers| async move {
            let store = Store::connect(&context.spec, servers.store.clone()).await?;
            let nats = servers.nats.as_ref().context("no NATS server is known to this command")?;
            let broker = Broker::connect(nats, pipeline, servers.store.environment.clone(), "forget").await?;
            let all = belongings(&broker, &store).await?;
            if args.yes {
                forget_pipeline(&broker, &store, &all).await?;
            }
            if args.json {
                let mut value = serde_json::to_value(&all)?;
                (value["pipeline"], value["removed"]) = (json!(pipeline), json!(args.yes));
                show::json(&value);
            } else {
                show::line(&told(pipeline, &all, args.yes));
            }
            Ok(Ended::Well)
        })
        .await
}

fn told(pipeline: &str, all: &Belongings, is_done: bool) -> String {
    if all.is_nothing() {
        return format!("there is nothing of a pipeline `{pipeline}` here");
    }
    let Belongings { tables, rows, row_bytes, streams, reserved_bytes, processes, unmarked } = all;
    let mut hindered = String::new();
    for (why, what) in [("stop first", processes), ("not ours by their words", unmarked)] {
        if !what.is_empty() {
            hindered.push_str(&format!("\n{why}: {}", what.join(", ")));
        }
    }
    let text = format!(
        "{} `{pipeline}`{}\nClickHouse  {} ({} rows, {})\nNATS        {} ({} reserved)",
        if is_done { "removed pipeline" } else { "to be removed with pipeline" },
        if is_done { "" } else { ": nothing was changed, --yes does it" },
        tables.join(", "),
        show::grouped(*rows),
        HumanBytes(*row_bytes),
        streams.join(", "),
        HumanBytes(*reserved_bytes),
    );
    text + &hindered
}

fn report(run: &str, pass: Option<u32>, forgotten: &Forgotten, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let mut value = serde_json::to_value(forgotten)?;
        value["run"] = json!(run);
        show::json(&value);
        return Ok(());
    }
    let what = pass.map_or_else(|| format!("run `{run}`"), |pass| format!("pass {pass} of run `{run}`"));
    let Forgotten { rows, row_bytes, ids_messages, rows_messages, aside_messages, .. } = forgotten;
    let [rows, row_bytes, ids, computed, aside] =
        [rows, row_bytes, ids_messages, rows_messages, aside_messages].map(|count| show::grouped(*count));
    show::line(&format!(
        "{what} is forgotten\nrows removed      {rows}, {row_bytes} bytes in ClickHouse\nmessages removed  {ids} of ids, {computed} \
         of rows, {aside} set aside",
    ));
    Ok(())
}
