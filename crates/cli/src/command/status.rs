//! `status`: where a run stands.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use millstream::names::RunName;
use millstream_engine::Session;
use millstream_engine::error::Code;
use millstream_engine::model::host::{Cause, Doing, HostReport, left_hint};
use millstream_engine::model::moment::shown;
use millstream_engine::model::record::RunState;
use millstream_engine::observe::status::{Status, status as read_status};

use serde::Serialize;

use super::run::pause_after;
use super::verify::remembered;
use super::{Context, run_name};
use crate::args::StatusArgs;
use crate::progress::Most;
use crate::session::{self, Holder};
use crate::{Ended, show};

/// After so many looks that found the same, it is looked less often: each of them costs the servers some milliseconds of a core.
const STILL: u32 = 10;
const SELDOM: Duration = Duration::from_secs(5);

/// How often a run is looked at that is watched.
#[derive(Debug, Default)]
struct Pace {
    /// What counts of the last look.
    before: Option<[u64; 6]>,
    /// Looks in a row that found the same.
    still: u32,
}

impl Pace {
    /// The pause after a look that found this, and took so long.
    fn pause(&mut self, status: &Status, look: Duration) -> Duration {
        let Status { done, dead, pending, in_flight, to_store, hosts, .. } = status;
        let found = Some([*done, *dead, *pending, *in_flight, *to_store, hosts.len() as u64]);
        self.still = if found == self.before { self.still + 1 } else { 0 };
        self.before = found;
        let pause = pause_after(look);
        if self.still >= STILL { pause.max(SELDOM) } else { pause }
    }
}

pub(super) async fn status(context: &Context, args: &StatusArgs) -> anyhow::Result<Ended> {
    let asked = args.run.as_deref().map(run_name).transpose()?;
    context
        .on_servers(Holder::Moment, |servers| async move {
            let session = match &asked {
                Some(run) => session::of_run(&servers, &context.spec, "status", run.as_str()).await?,
                None => match session::find(&servers, &context.spec, "status").await? {
                    Some(session) => session,
                    None => anyhow::bail!(super::runs::none(&servers, &context.spec).await),
                },
            };
            let run = match asked {
                Some(run) => run,
                None => match newest(&session).await? {
                    Some(newest) => newest,
                    None => anyhow::bail!(super::runs::none(&servers, &context.spec).await),
                },
            };
            let page = context.progress.page();
            let mut pace = Pace::default();
            let mut most = Most::default();
            loop {
                let begun = Instant::now();
                let mut status = match read_status(&session, &run).await {
                    Ok(status) => status,
                    Err(error) => {
                        return Err(remembered(&servers, &context.spec, &run, error.into()).await);
                    }
                };
                let done = most.of(&status);
                // A pass that lacks rows says so by its number.
                if !status.is_over() && status.missing == 0 {
                    status.done = done.ids;
                }
                let ended = status.is_over() || !args.watch;
                let drawn = !ended && !servers.started && std::io::stderr().is_terminal();
                match (args.json, drawn) {
                    (true, _) => show::json(&Coded { codes: codes(&status), status: &status }),
                    (false, true) => page.say(&told(&status)),
                    (false, false) => {
                        page.clear();
                        show::line(&told(&status));
                    }
                }
                if ended || show::failed() {
                    return Ok(Ended::Well);
                }
                if servers.started {
                    page.clear();
                    return Err(nothing_works(context, &status.run));
                }
                tokio::time::sleep(pace.pause(&status, begun.elapsed())).await;
            }
        })
        .await
}

/// Why it is of no use to wait for a run on servers that were started for this command.
pub(super) fn nothing_works(context: &Context, run: &RunName) -> anyhow::Error {
    let data = context.config.data.display().to_string();
    show::NothingWorks { run: run.to_string(), data }.into()
}

async fn newest(session: &Session) -> anyhow::Result<Option<RunName>> {
    let runs = session.records.runs().await?;
    let newest = runs.into_iter().max_by_key(|run| run.created_ms);
    Ok(newest.map(|newest| newest.run))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Coded<'a> {
    #[serde(flatten)]
    status: &'a Status,
    /// Rows of README's table of troubles that say more.
    codes: BTreeSet<Code>,
}

/// Which troubles of README's table the status shows.
fn codes(status: &Status) -> BTreeSet<Code> {
    let any = |told: fn(&HostReport) -> bool| status.hosts.iter().any(told);
    let unseen = !status.forgetting && status.readers.is_some();
    let pass = status.id();
    let left = |cause| {
        let left = status.hosts.iter().filter_map(|host| host.left_of(&pass));
        left.into_iter().any(|left| left.cause == cause)
    };
    let waits = !status.is_over() && (status.base_gone.is_some() || !status.stuck.is_empty());
    [
        (status.dead_sealed.is_some() || status.rows_sealed.is_some(), Code::DeadChanged),
        (waits, Code::PassWaits),
        (status.summary_fault.is_some(), Code::SummaryFailed),
        (unseen && !status.readers_see, Code::ReadersBlind),
        (unseen && status.readers_see, Code::ViewLags),
        (!status.view_faults.is_empty(), Code::ViewLacksRows),
        (left(Cause::Columns), Code::RowsOfOtherSchema),
        (left(Cause::Refused), Code::RowsRefused),
        (any(|host| host.unable().is_some()), Code::HostUnable),
        (status.paused_for.is_some(), Code::TooManyDead),
        (status.asking > 0, Code::ManyRetries),
    ]
    .into_iter()
    .filter_map(|(is_so, code)| is_so.then_some(code))
    .collect()
}

fn told(status: &Status) -> String {
    let run = &status.run;
    let mut lines = counts(status);
    lines.extend(faults(status));
    lines
        .extend(status.summary_fault.iter().map(|fault| format!("summary   {}", show::summary_fault(fault))));
    lines.extend(readers(status));
    lines.extend(builds(status));
    lines.extend(
        status
            .view_faults
            .iter()
            .map(|fault| format!("views     {}; `doctor` says what helps", show::view_fault(fault))),
    );
    lines.extend(status.view_faults_unknown.iter().map(|why| {
        format!(
            "views     whether views lack rows of it could not be asked: {why}; grant SELECT on that table"
        )
    }));
    lines.extend(status.hosts.iter().filter_map(waits));
    lines.extend(status.hosts.iter().filter_map(unable));
    lines.extend(status.paused_for.iter().map(|why| {
        format!("paused    {why}; `dead {run}` lists them, `resume {run}` goes on without that limit")
    }));
    lines.extend(asking(status));
    lines.extend(show::codes(&codes(status)).map(|codes| format!("codes     {codes}")));
    let hosts: Vec<Vec<String>> = status.hosts.iter().map(|host| host_cells(host, status)).collect();
    if !hosts.is_empty() {
        lines.push(String::new());
        lines.push(show::table(&["host", "role", "cores", "busy", "ids/s", "share", "batches"], &hosts));
    }
    if let Some(verdict) = &status.verdict {
        lines.push(String::new());
        lines.push(verdict.text.replace("RUN", run.as_str()));
    }
    lines.join("\n")
}

/// What the run is, and how far it has come.
fn counts(status: &Status) -> Vec<String> {
    let Status { run, pass, state, source, .. } = status;
    let number = show::grouped;
    vec![
        format!("run       {run} (pass {pass}), {source}"),
        format!("state     {state}{}{}", settings(status), proven(status)),
        format!(
            "ids       {} of {} stored, {} dead",
            number(status.done),
            number(status.ids),
            number(status.dead)
        ),
        format!(
            "batches   {} in all, {} pending, {} in flight, {} redelivered{}",
            number(status.batches),
            number(status.pending),
            number(status.in_flight),
            number(status.redelivered),
            status
                .oldest_batch_seconds
                .map_or_else(String::new, |age| format!(", the oldest for {}", show::duration(age))),
        ),
        format!(
            "to store  {} batches of all runs, about {} rows in {} MB",
            number(status.to_store),
            number(status.lag_rows),
            number(status.lag_bytes.div_ceil(1_000_000))
        ),
        format!(
            "rate      {} ids/s{}, {}",
            number(status.ids_per_second as u64),
            if status.is_over() {
                String::new()
            } else {
                format!(" on average, {} now", number(status.ids_per_second_now as u64))
            },
            eta(status)
        ),
    ]
}

/// What is wrong with what is stored, and what keeps the pass from its seal.
fn faults(status: &Status) -> Vec<String> {
    let run = &status.run;
    let number = show::grouped;
    let mut lines = Vec::new();
    lines.extend(status.dead_sealed.map(|sealed| {
        format!(
            "changed   {} stored, the seal counted {}: rows were changed since; `verify {run} --repair` has their batches \
             computed again",
            show::counted(status.dead, "dead letter"),
            number(sealed)
        )
    }));
    lines.extend(status.rows_sealed.map(|sealed| {
        format!(
            "changed   {} rows are stored, the seal counted {}: rows were removed since; `verify {run}` names their batches, \
             `verify {run} --repair` has them computed again",
            number(status.done),
            number(sealed)
        )
    }));
    if status.forgetting {
        lines.push(format!(
            "forgotten half of it: a `forget` has begun and not ended, readers see it no more; `forget {run}` finishes it"
        ));
    }
    lines.extend(status.base_gone.iter().chain(&status.stuck).map(|why| format!("stuck     {why}")));
    lines
}

/// When a sealed pass was proven: what was done to its rows since, the proof does not know.
fn proven(status: &Status) -> String {
    let at_ms = status.sealed_at_ms.filter(|_| status.state == RunState::Sealed);
    at_ms.map_or_else(String::new, |at_ms| format!(", proven at {}", shown(at_ms)))
}

/// What is wrong with what readers see.
fn readers(status: &Status) -> Option<String> {
    if status.forgetting {
        return None;
    }
    let why = status.readers.as_ref()?;
    Some(if status.readers_see {
        format!("readers   {why}")
    } else {
        format!("readers   readers do NOT see it: {why}")
    })
}

/// That more than one build worked on the pass.
fn builds(status: &Status) -> Option<String> {
    let builds = &status.builds;
    let run = &status.run;
    (builds.len() > 1).then(|| {
        format!(
            "builds    {} builds worked on it: {}; `verify {run}` counts their rows",
            builds.len(),
            builds.join(", ")
        )
    })
}

/// That a sink has rows, of whatever run, that the table does not take.
fn waits(host: &HostReport) -> Option<String> {
    let left = host.left()?;
    Some(format!("waiting   {left} (sink on {}, process {}); {}", host.host, host.pid, left_hint([host])))
}

/// That ids ask for another attempt.
fn asking(status: &Status) -> Option<String> {
    let why = status.asking_why.as_deref().unwrap_or("no reason given");
    (status.asking > 0)
        .then(|| format!("again     {} ids wait for another attempt: {why}", show::grouped(status.asking)))
}

/// That a host cannot compute.
fn unable(host: &HostReport) -> Option<String> {
    let why = host.unable()?;
    Some(format!("unable    {} (process {}) draws no batches: {why}", host.host, host.pid))
}

/// Settings that an operator has changed.
fn settings(status: &Status) -> String {
    let priority = (status.priority != 0).then(|| format!(", priority {}", status.priority));
    let rate = status.rate.map(|rate| format!(", at most {} ids/s", show::grouped(rate.into())));
    format!("{}{}", priority.unwrap_or_default(), rate.unwrap_or_default())
}

fn eta(status: &Status) -> String {
    match (status.state, status.eta_range_seconds) {
        (RunState::Sealed, _) => format!("took {}", show::duration(status.seconds)),
        (RunState::Paused | RunState::Cancelled, _) => "no ETA".to_owned(),
        (_, Some((fast, slow))) if show::duration(fast) == show::duration(slow) => {
            format!("ETA {}", show::duration(fast))
        }
        (_, Some((fast, slow))) => format!("ETA {} to {}", show::duration(fast), show::duration(slow)),
        (_, None) => "ETA unknown".to_owned(),
    }
}

/// One process in the table of hosts; its share is that of the ids which are computed of this run now.
fn host_cells(host: &HostReport, status: &Status) -> Vec<String> {
    let percent = |part: f64, of: f64| format!("{:.0} %", 100.0 * part / of.max(f64::MIN_POSITIVE));
    let none = || "-".to_owned();
    let share = host.share_of(&status.id());
    let (role, cores, busy) = match &host.doing {
        Doing::Work { cores, recent, .. } => {
            ("work", cores.to_string(), percent(recent.computing + recent.encoding, recent.all))
        }
        Doing::Sink { recent, .. } => ("sink", none(), percent(recent.inserting + recent.asking, recent.all)),
        Doing::Produce { recent, .. } => ("produce", none(), percent(recent.waiting_for_broker, recent.all)),
    };
    vec![
        format!("{} ({})", host.host, host.pid),
        role.to_owned(),
        cores,
        busy,
        share.map_or_else(none, |share| show::grouped(share.ids_per_second as u64)),
        share.map_or_else(none, |share| percent(share.ids_per_second, status.ids_per_second_now)),
        share.map_or_else(none, |share| share.held.to_string()),
    ]
}
