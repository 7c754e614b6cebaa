//! `forget`: removes a run, or one pass of it.

use millstream_engine::forget::{Forgotten, forget as remove};
use serde_json::json;

use super::{Context, run_name};
use crate::args::ForgetArgs;
use crate::session::{Holder, Session};
use crate::{Ended, show};

pub(super) async fn forget(context: &Context, args: &ForgetArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let Session { broker, store, records } =
                Session::of_run(&servers, &context.spec, "forget", run.as_str()).await?;
            let forgotten = remove(&broker, &records, &store, &run, args.pass).await?;
            report(run.as_str(), args.pass, &forgotten, args.json)?;
            Ok(Ended::Well)
        })
        .await
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
