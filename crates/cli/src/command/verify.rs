//! `verify`: the proof batch by batch, and the repair.

use millstream::Pipeline;
use millstream_engine::verify::{Repair, Report, repair, verify as prove};
use serde_json::json;

use super::{Context, run_name};
use crate::args::VerifyArgs;
use crate::session::{Holder, Session};
use crate::{Ended, show};

/// Batch numbers that are shown to a person.
const SHOWN: usize = 20;

pub(super) async fn verify<P: Pipeline>(context: &Context<P>, args: &VerifyArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = Session::of_run::<P>(&servers, "verify", run.as_str()).await?;
            let report = prove::<P::Id>(&session.broker, &session.records, &session.store, &run).await?;
            let repaired = if args.repair && !report.is_clean() {
                Some(repair(&session.broker, &session.records, &session.store, &report).await?)
            } else {
                None
            };
            if args.json {
                let mut value = serde_json::to_value(&report)?;
                if let Some(repaired) = &repaired {
                    value["repair"] = json!(repaired);
                }
                show::json(&value);
            } else {
                show::line(&told(&report));
                repaired.iter().for_each(|repaired| show::line(&repaired_told(repaired)));
            }
            Ok(if report.is_clean() && report.sealed { Ended::Well } else { Ended::Badly })
        })
        .await
}

fn told(report: &Report) -> String {
    let number = show::grouped;
    let verdict = match (report.published, report.is_clean(), report.sealed) {
        (false, ..) => "still being published",
        (true, true, true) => "sealed: every id has its row, once",
        (true, true, false) => "complete, and not sealed yet: a running sink seals it",
        (true, false, _) => "NOT complete",
    };
    let named = |list: &[u32], all: u64| {
        let shown: Vec<String> = list.iter().take(SHOWN).map(u32::to_string).collect();
        let more = if all > shown.len() as u64 { ", …" } else { "" };
        if list.is_empty() { String::new() } else { format!(": {}{more}", shown.join(", ")) }
    };
    let hint = if report.published && !report.is_clean() {
        format!("\n\nhint: verify {} --repair", report.run)
    } else {
        String::new()
    };
    format!(
        "run              {} (pass {})\nverdict          {verdict}\nbatches          {}\nids              {}\n\
         rows             {}\nmissing batches  {}{}\nshort batches    {}{}\nwrong batches    {}{}\nraw duplicates   {}\nrepeated ids     {}\n\
         digest           {}\ndead             {}{hint}",
        report.run,
        report.pass,
        number(report.batches),
        number(report.ids),
        number(report.rows),
        number(report.missing_batches),
        named(&report.missing, report.missing_batches),
        number(report.short_batches),
        named(&report.short, report.short_batches),
        number(report.wrong_batches),
        named(&report.wrong, report.wrong_batches),
        number(report.raw_duplicates),
        number(report.repeated_ids),
        if report.digest_matches { "matches" } else { "differs" },
        number(report.dead),
    )
}

fn repaired_told(repair: &Repair) -> String {
    let mut lines = vec![format!(
        "\nrepair: {} raw duplicates merged away, {} batches are computed again",
        show::grouped(repair.duplicates_merged),
        show::grouped(repair.batches_again),
    )];
    if let Some(busy) = &repair.busy {
        lines.push(format!(
            "nothing counts as lost yet: {busy}; see that `work` and `sink` run, then repair again"
        ));
    }
    if !repair.ids_gone.is_empty() {
        lines.push(format!("the ids of {} batches are no longer in the stream", repair.ids_gone.len()));
    }
    lines.join("\n")
}
