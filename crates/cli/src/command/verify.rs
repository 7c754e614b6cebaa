//! `verify`: the proof batch by batch, and the repair.

use std::collections::BTreeSet;

use millstream::names::RunName;
use millstream::{Id, Spec};
use millstream_engine::clickhouse::store::BuildRows;
use millstream_engine::error::Code;
use millstream_engine::model::moment::shown;
use millstream_engine::seal::verify::{Repair, Report, SeenFault, Unstored, repair, verify as prove};
use millstream_engine::{Error, Store};
use serde_json::json;

use super::{Context, run_name};
use crate::args::VerifyArgs;
use crate::session::{self, Holder, Servers};
use crate::{Ended, show};

/// Batch numbers that the text lists; JSON has all.
const SHOWN: usize = 20;

pub(super) async fn verify<I: Id>(context: &Context, args: &VerifyArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let verified = proven::<I>(&servers, &context.spec, &run, args).await;
            let (report, repaired) = match verified {
                Ok(verified) => verified,
                Err(error) => return Err(remembered(&servers, &context.spec, &run, error).await),
            };
            let hint = hint(&report, repaired.as_ref());
            if args.json {
                let mut value = serde_json::to_value(&report)?;
                if let Some(repaired) = &repaired {
                    value["repair"] = json!(repaired);
                }
                value["hint"] = json!(hint);
                value["codes"] = json!(codes(&report));
                show::json(&value);
            } else {
                show::line(&told(&report, args.hosts));
                repaired.iter().for_each(|repaired| show::line(&repaired_told(repaired)));
                show::codes(&codes(&report))
                    .iter()
                    .for_each(|codes| show::line(&format!("codes            {codes}")));
                hint.iter().for_each(|hint| show::line(&format!("\nhint: {hint}")));
            }
            let well = report.is_clean() && report.sealed && !report.is_seen_badly();
            Ok(if well { Ended::Well } else { Ended::Badly })
        })
        .await
}

async fn proven<I: Id>(
    servers: &Servers,
    spec: &Spec,
    run: &RunName,
    args: &VerifyArgs,
) -> anyhow::Result<(Report, Option<Repair>)> {
    let session = session::of_run(servers, spec, "verify", run.as_str()).await?;
    let values = args.values || args.repair;
    let report = prove::<I>(&session, run, values).await?;
    if !args.repair || (report.is_clean() && !report.is_seen_badly()) {
        return Ok((report, None));
    }
    let unstored = if args.recompute { Unstored::Recompute } else { Unstored::Wait };
    let repaired = repair(&session, &report, unstored).await?;
    // What merging alone has healed is well now.
    let healed = (repaired.duplicates_merged > 0 && report.complete)
        || repaired.shown_again
        || !repaired.seen_mended.is_empty();
    let report = if healed { prove::<I>(&session, run, values).await? } else { report };
    Ok((report, Some(repaired)))
}

/// A run that is unknown to NATS alone was lost with its volume.
pub(super) async fn remembered(
    servers: &Servers,
    spec: &Spec,
    run: &RunName,
    error: anyhow::Error,
) -> anyhow::Error {
    if !matches!(error.downcast_ref(), Some(Error::NoSuchRun { .. })) {
        return error;
    }
    let kept = match Store::connect(spec, servers.store.clone()).await {
        Ok(store) => store.run_record(run).await,
        Err(_) => return error,
    };
    match kept {
        Ok(Some(record)) => {
            Error::ForgottenRun { run: record.run.to_string(), made_of: record.source }.into()
        }
        _ => error,
    }
}

/// Which troubles of README's table the report shows.
fn codes(report: &Report) -> BTreeSet<Code> {
    if report.forgetting {
        return BTreeSet::new();
    }
    let lost = report.published && report.sealed && !report.complete;
    [
        (report.is_hidden(), Code::ReadersBlind),
        (!report.seen_faults.is_empty(), Code::PassRowWrong),
        (report.is_shown_badly() && !report.is_hidden(), Code::ViewLags),
        (report.has_other_dead() || lost, Code::DeadChanged),
        (report.values_at_fault.is_some_and(|batches| batches > 0), Code::ValuesChanged),
        (report.raw_duplicates > 0, Code::RawDuplicates),
        (!report.ids_gone.is_empty() || !report.ids_damaged.is_empty(), Code::IdsNotInStream),
        (report.base_gone.is_some() || !report.stuck.is_empty(), Code::PassWaits),
    ]
    .into_iter()
    .filter_map(|(is_so, code)| is_so.then_some(code))
    .collect()
}

/// What is left to do.
fn hint(report: &Report, repaired: Option<&Repair>) -> Option<String> {
    match repaired {
        _ if report.forgetting => Some(format!("forget {}", report.run)),
        Some(Repair { busy: Some(_), .. }) => {
            Some(format!("see that `work` and `sink` run, then verify {} --repair", report.run))
        }
        Some(repaired) if repaired.is_nothing() => changes_nothing(report),
        Some(repaired) => repaired.hint(report.run.as_str()),
        None if report.base_gone.is_some() => None,
        None if !report.seen_faults.is_empty()
            || report.published && (!report.is_clean() || report.is_shown_badly()) =>
        {
            Some(format!("verify {} --repair", report.run))
        }
        None => None,
    }
}

/// What helps where a repair has nothing that it could change.
fn changes_nothing(report: &Report) -> Option<String> {
    let unproven = report.values_unproven.is_some_and(|batches| batches > 0);
    if !report.seen_faults.is_empty() {
        return Some(format!(
            "the row among the sealed passes stays. Where NATS has lost a pass's record, `produce` with the same input and --run {} \
             brings it back",
            report.run
        ));
    }
    Some(match unproven {
        true => "`setup` of the build that computed those rows keeps their schema, and ALTER TABLE … ADD COLUMN brings a column \
                 back; a repair brings neither"
            .to_owned(),
        false if report.is_clean() => return None,
        false => format!("rows have landed or changed meanwhile: verify {} again", report.run),
    })
}

fn told(report: &Report, with_hosts: bool) -> String {
    let number = show::grouped;
    let verdict = match (report.published, report.is_clean(), report.sealed) {
        _ if report.forgetting => "half forgotten: a `forget` has begun and not ended",
        (false, ..) => "still being published",
        (true, true, true) if report.is_hidden() => "every id has its row, once, but readers do NOT see it",
        (true, true, true) if !report.seen_faults.is_empty() => {
            "every id has its row, once, but its row among the sealed passes is NOT right"
        }
        (true, true, true) if report.is_shown_badly() => {
            "every id has its row, once, but readers see it through a view that lags behind its table"
        }
        (true, true, true) if report.values_at_fault.is_some() && report.values_unproven == Some(0) => {
            "sealed: every id has its row, once, with the values that were computed"
        }
        (true, true, true) => "sealed: every id has its row, once",
        (true, false, true) if report.complete && report.raw_duplicates == 0 => "NOT as it was sealed",
        (true, true, false) => "complete, and not sealed yet: a running sink seals it",
        (true, false, true) if !report.complete => "NOT complete any more",
        (true, false, _) => "NOT complete",
    };
    let named = |list: &[u32], all: u64| {
        let shown: Vec<String> = list.iter().take(SHOWN).map(u32::to_string).collect();
        let more = if all > shown.len() as u64 { ", …" } else { "" };
        if list.is_empty() { String::new() } else { format!(": {}{more}", shown.join(", ")) }
    };
    let lost = |what: &str, list: &[u32]| match list {
        [] => String::new(),
        _ => format!("\n{what:<16} {}{}", number(list.len() as u64), named(list, list.len() as u64)),
    };
    format!(
        "run              {} (pass {})\nverdict          {verdict}\nbatches          {}\nids              {}\n\
         rows             {}\nmissing batches  {}{}\nshort batches    {}{}\nwrong batches    {}{}\nraw duplicates   {}\nrepeated ids     {}\n\
         digest           {}\nvalues           {}\ndead             {}{}{}{}{}{}{}",
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
        values_told(report),
        dead_told(report),
        lost("ids gone", &report.ids_gone),
        lost("ids damaged", &report.ids_damaged),
        told_as("stuck", &report.base_gone) + &told_as("readers", &report.readers) + &seen_told(report),
        report.stuck.iter().map(|why| format!("\n{:<16} {why}", "stuck")).collect::<String>(),
        sealed_told(report),
        builds(&report.builds, with_hosts),
    )
}

/// What the seal said, where it is no longer so.
fn sealed_told(report: &Report) -> String {
    match (report.sealed_at_ms, report.rows_sealed) {
        (Some(at_ms), Some(rows)) if report.sealed && rows != report.rows => {
            format!(
                "\n{:<16} with {} rows at {}: rows were changed since",
                "sealed",
                show::grouped(rows),
                shown(at_ms)
            )
        }
        _ => String::new(),
    }
}

/// Rows among the sealed passes that are not right.
fn seen_told(report: &Report) -> String {
    let told = |fault: &SeenFault| {
        format!("\n{:<16} the row of pass {}: {}", "sealed passes", fault.pass, fault.why)
    };
    report.seen_faults.iter().map(told).collect()
}

fn told_as(what: &str, why: &Option<String>) -> String {
    why.as_ref().map_or_else(String::new, |why| format!("\n{what:<16} {why}"))
}

fn dead_told(report: &Report) -> String {
    let dead = show::grouped(report.dead);
    match report.dead_sealed.filter(|_| report.has_other_dead()) {
        Some(sealed) => format!(
            "{dead}, where the seal counted {}: rows were changed since, and --values says in how many batches",
            show::grouped(sealed)
        ),
        None => dead,
    }
}

fn values_told(report: &Report) -> String {
    let number = show::grouped;
    match (report.values_at_fault, report.values_unproven.unwrap_or(0)) {
        (None, _) => "not looked at: --values does".to_owned(),
        (Some(0), 0) => "as they were computed".to_owned(),
        (Some(0), unproven) => format!(
            "not proven in {} batches: the schema of their rows is not known, or the table lacks its columns; all others are \
             as they were computed",
            number(unproven)
        ),
        (Some(batches), 0) => format!("not as they were computed in {} batches", number(batches)),
        (Some(batches), unproven) => format!(
            "not as they were computed in {} batches, and not proven in {}",
            number(batches),
            number(unproven)
        ),
    }
}

/// Who computed how many rows, where that is worth a line: by more than one build, or asked for.
fn builds(builds: &[BuildRows], with_hosts: bool) -> String {
    if builds.len() < 2 && !with_hosts {
        return String::new();
    }
    let told = builds.iter().map(|BuildRows { build, rows, hosts }| {
        let on = if with_hosts { format!(" on {}", hosts.join(", ")) } else { String::new() };
        format!("{} rows by {build}{on}", show::grouped(*rows))
    });
    format!("\nbuilds           {}", told.collect::<Vec<_>>().join("\n                 "))
}

fn repaired_told(repair: &Repair) -> String {
    let number = show::grouped;
    if repair.is_nothing() {
        return "\nrepair: it changed nothing, as it found nothing that it could".to_owned();
    }
    let mut lines = vec![format!(
        "\nrepair: {} raw duplicates merged away, {} batches are computed again",
        number(repair.duplicates_merged),
        number(repair.batches_again),
    )];
    if !repair.seen_mended.is_empty() {
        let passes: Vec<String> = repair.seen_mended.iter().map(u32::to_string).collect();
        lines
            .push(format!("the rows among the sealed passes are right again, of pass {}", passes.join(", ")));
    }
    if repair.shown_again {
        lines.push("readers see the pass as it is stored again".to_owned());
    }
    if repair.whole_run {
        lines.push(
            "more batches are at fault than can be named one by one, so all of the run is computed again; rows that are \
             stored stay as they are"
                .to_owned(),
        );
    }
    if repair.batches_handed_out > 0 {
        lines.push(format!(
            "the rows of {} batches, which the stream has, are handed out to sinks once more",
            number(repair.batches_handed_out)
        ));
    }
    lines.extend(repair.stuck.iter().map(|why| format!("nothing is computed again: {why}")));
    if let Some(busy) = &repair.busy {
        lines.push(format!("nothing counts as lost yet: {busy}"));
    }
    for (lost, why) in [
        (&repair.ids_gone, "are no longer in the stream"),
        (&repair.ids_damaged, "cannot be read in the stream"),
    ] {
        if !lost.is_empty() {
            lines.push(format!("the ids of {} batches {why}", number(lost.len() as u64)));
        }
    }
    lines.join("\n")
}
