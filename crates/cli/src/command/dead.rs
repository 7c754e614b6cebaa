//! `dead`: a run's dead letters.

use millstream::names::{PassId, RunName};
use millstream_engine::Session;
use millstream_engine::clickhouse::sql::SeenPass;
use millstream_engine::clickhouse::store::DeadLetter;
use millstream_engine::error::Code;
use millstream_engine::model::selection::Letters;
use serde_json::json;

use super::{Context, run_name};
use crate::args::{DeadArgs, LettersArgs};
use crate::session::{self, Holder};
use crate::{Ended, show};

/// Errors that are counted apart.
const KINDS: u64 = 20;

pub(super) async fn dead(context: &Context, args: &DeadArgs) -> anyhow::Result<Ended> {
    let run = run_name(&args.run)?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = session::of_run(&servers, &context.spec, "dead", run.as_str()).await?;
            session.records.known_run(&run).await?;
            let pass = whole_pass(&session, &run).await?;
            let which = letters(&args.letters);
            let total = session.store.dead_rows(&pass, &which).await?;
            let kinds = session.store.dead_by_error(&pass, &which, KINDS).await?;
            let letters = session.store.dead(&pass, &which, args.limit).await?;
            if args.json {
                let kinds: Vec<_> = kinds.iter().map(|(error, ids)| json!({ "error": error, "ids": ids, "code": Code::of_reason(error) })).collect();
                let letters: Vec<_> = letters
                    .iter()
                    .map(|letter| json!(letter))
                    .collect();
                show::json(&json!({ "run": run.as_str(), "pass": pass.pass, "dead": total, "by_error": kinds, "letters": letters }));
                return Ok(Ended::Well);
            }
            if total == 0 {
                let like_that = if which == Letters::default() { "" } else { " like that" };
                show::line(&format!("run `{run}` has no dead letters{like_that}"));
                return Ok(Ended::Well);
            }
            let kinds: Vec<Vec<String>> =
                kinds.into_iter().map(|(error, ids)| vec![show::grouped(ids), code(&error), one_line(&error)]).collect();
            show::line(&show::table(&["ids", "code", "error"], &kinds));
            let shown = letters.len() as u64;
            let cells: Vec<Vec<String>> = letters
                .into_iter()
                .map(|letter| {
                    let DeadLetter { batch, id, error, host, build } = letter;
                    vec![id, batch.to_string(), host, build, one_line(&error)]
                })
                .collect();
            show::line(&format!("\n{}", show::table(&["id", "batch", "host", "build", "error"], &cells)));
            if total > shown {
                show::line(&format!("… {} more: --limit N lists them", show::grouped(total - shown)));
            }
            Ok(Ended::Well)
        })
        .await
}

/// Which dead letters are meant, as the user said it.
pub(super) fn letters(args: &LettersArgs) -> Letters {
    let LettersArgs { error, batch, host, build } = args.clone();
    Letters { error, batch, host, build }
}

/// The pass that readers see, or the newest while they see none.
async fn whole_pass(session: &Session, run: &RunName) -> anyhow::Result<PassId> {
    if let Some(SeenPass { pass, .. }) = session.store.sealed_passes(run).await?.last() {
        return Ok(run.pass(*pass));
    }
    Ok(run.pass(session.records.newest_pass(run).await?.map_or(1, |entry| entry.record.pass)))
}

/// The row of README's table of troubles about the reason.
fn code(error: &str) -> String {
    Code::of_reason(error).map_or_else(|| "-".to_owned(), |code| code.to_string())
}

fn one_line(error: &str) -> String {
    error.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(120).collect()
}
