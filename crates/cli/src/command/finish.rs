//! What comes once a run is over: its summary, and the command that was to follow it.

use anyhow::Context as _;
use millstream_engine::Error;
use millstream_engine::model::record::RunState;
use millstream_engine::observe::bottleneck::{Span, verdict};
use millstream_engine::observe::status::Status;
use serde_json::{Value, json};

use super::Context;
use crate::args::ProduceArgs;
use crate::{Ended, show};

/// Shows what the run came to, then runs the command with it in its environment. `bad` lines of its input were passed over.
///
/// # Errors
/// When the command cannot be started, or does not end well.
pub(super) async fn finish(
    context: &Context,
    last: &Status,
    bad: u64,
    args: &ProduceArgs,
) -> anyhow::Result<Ended> {
    summarize(last, context, bad, args.json);
    if let Some(command) = &args.then {
        follow_up(last, bad, command).await?;
    }
    Ok(match (last.state, last.dead + bad) {
        (RunState::Sealed, 0) => Ended::Well,
        (RunState::Sealed, _) => Ended::InPart,
        _ => Ended::Badly,
    })
}

/// An input without ids, where the user has said that there may be none: the command has its turn, and no run is made.
///
/// # Errors
/// As [`finish`]; the given one, where the user has not said so or it is another.
pub(super) async fn nothing_to_do(
    run: &str,
    args: &ProduceArgs,
    error: anyhow::Error,
) -> anyhow::Result<Ended> {
    let Some(Error::NoIds { input }) = error.downcast_ref().filter(|_| args.allow_empty) else {
        return Err(error);
    };
    if args.json {
        show::json(&json!({
            "run": run, "ids": 0, "rows": 0, "dead": 0, "batches": 0, "sealed": false, "empty": true,
        }));
    } else {
        show::line(&format!("there are no ids in {input}: nothing to do"));
    }
    if let Some(command) = &args.then {
        let none = [("RUN", run), ("STATE", "empty"), ("SUMMARY", "")];
        let zeros = ["PASS", "IDS", "ROWS", "DEAD", "BAD", "SECONDS"].map(|name| (name, "0"));
        call(command, none.into_iter().chain(zeros).map(|(name, value)| (name, value.to_owned()))).await?;
    }
    Ok(Ended::Well)
}

async fn follow_up(last: &Status, bad: u64, command: &str) -> anyhow::Result<()> {
    let summary = last.summary.as_ref().map_or_else(String::new, |rows| json!(rows).to_string());
    let came = [
        ("RUN", last.run.to_string()),
        ("PASS", last.pass.to_string()),
        ("STATE", last.state.to_string()),
        ("IDS", last.ids.to_string()),
        ("ROWS", last.done.to_string()),
        ("DEAD", last.dead.to_string()),
        ("BAD", bad.to_string()),
        ("SECONDS", format!("{:.3}", last.seconds)),
        ("SUMMARY", summary),
    ];
    call(command, came).await
}

async fn call(command: &str, came: impl IntoIterator<Item = (&str, String)>) -> anyhow::Result<()> {
    let status = tokio::process::Command::new("sh")
        .args(["-c", command])
        .envs(came.into_iter().map(|(name, value)| (format!("MILLSTREAM_{name}"), value)))
        .status()
        .await
        .with_context(|| format!("failed to start `sh -c '{command}'`"))?;
    anyhow::ensure!(
        status.success(),
        "the run is over, and the command after it failed: `{command}` ended with {status}\nhint: the run itself needs \
         nothing; run the command again by hand"
    );
    Ok(())
}

fn summarize(last: &Status, context: &Context, bad: u64, as_json: bool) {
    let name = context.spec.name;
    let typed = &context.typed;
    let Status {
        run,
        pass,
        ids,
        done,
        dead,
        seconds,
        ids_per_second,
        state,
        hosts,
        summary,
        summary_fault,
        ..
    } = last;
    let sealed = *state == RunState::Sealed;
    // A run that was over before the first report has no hosts to judge.
    let verdict = (!hosts.is_empty()).then(|| verdict(hosts, run, Span::Total, &last.scene()));
    if as_json {
        show::json(&json!({
            "run": run, "pass": pass, "ids": ids, "rows": done, "dead": dead, "seconds": seconds,
            "ids_per_second": ids_per_second, "sealed": sealed, "summary": summary, "summary_fault": summary_fault, "verdict": verdict, "bad_lines": bad,
        }));
        return;
    }
    if !sealed {
        show::line(&format!(
            "run `{run}` was cancelled: {} of {} ids have rows, in `{}_live`",
            show::grouped(*done),
            show::grouped(*ids),
            name
        ));
        return;
    }
    let summary = summary.as_deref().map(summary_table).filter(|table| !table.is_empty());
    let failed = summary_fault
        .as_deref()
        .map_or_else(String::new, |fault| format!("\n\n{}", show::summary_fault(fault)));
    show::line(&format!(
        "run      {run} (pass {pass})\nids      {}\nrows     {}\ndead     {}\nseconds  {seconds:.1}\nids/s    {}\n\
         sealed   yes{}{}\n\nlook at the rows:\n  {typed} sql \"SELECT * FROM {name} WHERE run = '{run}' ORDER BY id LIMIT 10\"\n  \
         {typed} sql \"SELECT count() FROM {name} WHERE run = '{run}'\"",
        show::grouped(*ids),
        show::grouped(*done),
        show::grouped(*dead),
        show::grouped(*ids_per_second as u64),
        summary.map_or_else(String::new, |table| format!("\n\n{table}")) + &failed,
        verdict
            .map_or_else(String::new, |verdict| format!("\n\n{}", verdict.text.replace("RUN", run.as_str()))),
    ));
    if *dead > 0 {
        show::line(&format!("\nlook at the dead letters:\n  {typed} dead {run}"));
    }
}

/// The answer of the pipeline's summary query as a table.
fn summary_table(rows: &[Value]) -> String {
    let Some(head) = rows.first().and_then(Value::as_object) else { return String::new() };
    let head: Vec<&str> = head.keys().map(String::as_str).collect();
    let cell = |row: &Value, column: &str| match &row[column] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| head.iter().map(|column| cell(row, column)).collect()).collect();
    show::table(&head, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_a_table() {
        let rows = [json!({"longest": 12, "word": "abc"}), json!({"longest": 7, "word": "d"})];
        assert_eq!(summary_table(&rows), "longest  word\n     12  abc\n      7  d");
        assert_eq!(summary_table(&[]), "");
    }
}
