//! `runs`: all runs, a line each.

use millstream::Spec;
use millstream_engine::Store;
use millstream_engine::model::record::{PassRecord, RunRecord, RunState};
use serde_json::{Value, json};

use super::Context;
use crate::session::{self, Holder, Servers};
use crate::{Ended, show};

/// Runs that are named where NATS knows none.
const SHOWN: usize = 8;

/// A run with what its newest pass says.
struct Listed<'a> {
    run: &'a RunRecord,
    pass: u32,
    state: RunState,
    ids: u64,
    /// Dead letters, once the pass is sealed.
    dead: Option<u64>,
}

impl<'a> Listed<'a> {
    fn of(run: &'a RunRecord, passes: &[PassRecord]) -> Self {
        let pass = passes.iter().filter(|pass| pass.run == run.run).max_by_key(|pass| pass.pass);
        let ids = run.published.as_ref().map_or(run.expected_ids, |published| Some(published.ids));
        Self {
            run,
            pass: pass.map_or(1, |pass| pass.pass),
            state: RunState::of(run, pass),
            ids: ids.unwrap_or(0),
            dead: pass.and_then(|pass| pass.sealed.as_ref()).map(|sealed| sealed.dead),
        }
    }

    fn json(&self) -> Value {
        let Self { run, pass, state, ids, dead } = self;
        json!({
            "run": run.run, "pass": pass, "state": state, "ids": ids, "dead": dead, "source": run.source,
            "created_ms": run.created_ms,
        })
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.run.run.to_string(),
            self.pass.to_string(),
            self.state.to_string(),
            show::grouped(self.ids),
            self.dead.map_or_else(|| "-".to_owned(), show::grouped),
            self.run.source.clone(),
        ]
    }
}

pub(super) async fn runs(context: &Context, as_json: bool) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Moment, |servers| async move {
            let Some(session) = session::find(&servers, &context.spec, "runs").await? else {
                if as_json {
                    show::line("[]");
                } else {
                    show::line(&none(&servers, &context.spec).await);
                }
                return Ok(Ended::Well);
            };
            let mut runs = session.records.runs().await?;
            runs.sort_by_key(|run| run.created_ms);
            let passes = session.records.passes().await?;
            let listed: Vec<_> = runs.iter().map(|run| Listed::of(run, &passes)).collect();
            if as_json {
                show::json(&listed.iter().map(Listed::json).collect::<Vec<_>>());
            } else if listed.is_empty() {
                show::line(&none(&servers, &context.spec).await);
            } else {
                let cells: Vec<_> = listed.iter().map(Listed::cells).collect();
                show::line(&show::table(&["run", "pass", "state", "ids", "dead", "made of"], &cells));
            }
            Ok(Ended::Well)
        })
        .await
}

/// What is known where NATS has no run: ClickHouse may have some, whose records were lost, or are in another NATS.
pub(super) async fn none(servers: &Servers, spec: &Spec) -> String {
    let kept = match Store::connect(spec, servers.store.clone()).await {
        Ok(store) => store.kept_runs().await,
        Err(error) => Err(error),
    };
    match kept.as_deref() {
        Ok([]) => "there are no runs yet: `produce` or `run` makes one".to_owned(),
        Ok(runs) => {
            let shown: Vec<String> = runs.iter().take(SHOWN).map(|run| format!("`{run}`")).collect();
            let more = if runs.len() > SHOWN { ", …" } else { "" };
            format!(
                "NATS knows no run of this pipeline, and ClickHouse keeps {} of them ({}{more}): this is another NATS, or it has lost \
                 its volume; `produce` with the same input and --run NAME brings a run back",
                show::grouped(runs.len() as u64),
                shown.join(", ")
            )
        }
        Err(error) => {
            format!("NATS knows no run of this pipeline; what ClickHouse keeps could not be asked: {error}")
        }
    }
}
