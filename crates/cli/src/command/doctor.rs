//! `doctor`: what would go wrong, before it does. Looks, and changes nothing.

mod fleet;
mod room;

use std::time::Duration;

use millstream::{Id, Spec};
use millstream_engine::clickhouse::sql::VIEW_FAULTS;
use millstream_engine::clickhouse::store::ViewFault;
use millstream_engine::compute::Function;
use millstream_engine::error::Code;
use millstream_engine::model::moment::length;
use millstream_engine::nats::broker::Kept;
use millstream_engine::{Broker, Error, Store, StreamLimits, compute};
use serde::Serialize;
use serde_json::json;

use super::Context;
use crate::args::DoctorArgs;
use crate::session::{Holder, Servers};
use crate::{Ended, show};

/// Below this a batch of rows may not fit in one message.
const SOUND_PAYLOAD: usize = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    found: String,
    hint: Option<String>,
    /// The row of README's table of troubles that says more.
    code: Option<Code>,
}

impl Check {
    fn coded(mut self, code: Code) -> Self {
        self.code = Some(code);
        self
    }
}

fn check(what: &'static str, verdict: Verdict, found: impl Into<String>, hint: Option<&str>) -> Check {
    Check { what, verdict, found: found.into(), hint: hint.map(str::to_owned), code: None }
}

fn failed(what: &'static str, error: &anyhow::Error) -> Check {
    let told: Vec<String> = std::iter::once(show::failure(error)).chain(show::causes(error)).collect();
    Check {
        what,
        verdict: Verdict::Fail,
        found: told.join(": "),
        hint: show::hint(error),
        code: show::code(error),
    }
}

pub(super) async fn doctor<I: Id>(
    context: &Context,
    function: &Function<I>,
    args: &DoctorArgs,
) -> anyhow::Result<Ended> {
    context
        .on_servers(Holder::Moment, |servers| async move {
            let mut checks = vec![check_pipeline(&context.spec), check_cores(context)];
            checks.push(Box::pin(fleet::check_host(context, function)).await);
            checks.extend(room::check_data(context));
            checks.extend(check_nats(&servers, &context.spec, &context.config.limits).await);
            let (told, faults) = check_store(&servers, &context.spec).await;
            checks.extend(told);
            // What keeps either of them from an answer is told above.
            if let Ok((broker, store)) = servers.connect(&context.spec, "doctor").await {
                checks.push(fleet::check_runs(&broker, &store).await);
            }
            if args.json {
                show::json(&json!({ "checks": checks }));
            } else {
                checks.iter().for_each(tell);
            }
            if args.acknowledge && !show::failed() {
                acknowledge(&servers, &context.spec, &faults).await?;
            }
            let fails = checks.iter().any(|check| check.verdict == Verdict::Fail);
            Ok(if fails { Ended::Badly } else { Ended::Well })
        })
        .await
}

/// Forgets the faults of views that were shown, and no others.
async fn acknowledge(servers: &Servers, spec: &Spec, faults: &[ViewFault]) -> anyhow::Result<()> {
    if !faults.is_empty() {
        Store::connect(spec, servers.store.clone()).await?.acknowledge(faults).await?;
    }
    show::note(&format!("{} of views acknowledged", show::counted(faults.len() as u64, "fault")));
    Ok(())
}

fn tell(check: &Check) {
    let mark = match check.verdict {
        Verdict::Ok => "ok  ",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let marked = |text: &str| check.code.map_or_else(|| text.to_owned(), |code| code.mark(text));
    let found = if check.hint.is_some() { check.found.clone() } else { marked(&check.found) };
    show::line(&format!("{mark}  {:<14} {found}", check.what));
    if let Some(hint) = &check.hint {
        let hint = marked(hint);
        show::line(&format!("      {:<14} hint: {hint}", ""));
    }
}

/// The schema was checked before the command began.
fn check_pipeline(spec: &Spec) -> Check {
    let columns = spec.schema.columns().iter();
    let columns: Vec<String> = columns.map(|column| format!("{} {}", column.name, column.text)).collect();
    check("pipeline", Verdict::Ok, format!("`{}`: {}", spec.name, columns.join(", ")), None)
}

fn check_cores(context: &Context) -> Check {
    let threads = context.config.work.threads;
    let cores = compute::usable_cores();
    let found = format!("{threads} compute threads on {cores} usable cores");
    match threads {
        more if more > cores => check(
            "cores",
            Verdict::Warn,
            found,
            Some("more threads than cores only cost memory: leave --threads away"),
        ),
        _ => check("cores", Verdict::Ok, found, None),
    }
}

async fn check_nats(servers: &Servers, spec: &Spec, limits: &StreamLimits) -> Vec<Check> {
    let Some(nats) = &servers.nats else { return Vec::new() };
    let broker = match Broker::connect(nats, spec.name, servers.store.environment.clone(), "doctor").await {
        Ok(broker) => broker,
        Err(error) => return vec![failed("NATS", &error.into())],
    };
    let version = broker.server_version();
    let mut checks =
        vec![check("NATS", Verdict::Ok, format!("nats-server {version} ({})", nats.origin), None)];
    if !at_least(&version, (2, 12)) {
        checks.push(check("NATS version", Verdict::Fail, version, Some("2.12 or newer is needed")));
    }
    let payload = broker.max_payload();
    let found = format!("messages of up to {} bytes", show::grouped(payload as u64));
    checks.push(if payload < SOUND_PAYLOAD {
        check("payload", Verdict::Warn, found, Some("set max_payload: 8MB in nats-server's configuration"))
    } else {
        check("payload", Verdict::Ok, found, None)
    });
    checks.push(match broker.is_set_up().await {
        Ok(true) => check("streams", Verdict::Ok, "there", None),
        Ok(false) => {
            check("streams", Verdict::Warn, "not there yet", Some("`setup`, `produce` or `run` creates them"))
        }
        Err(error) => failed("JetStream", &error.into()),
    });
    checks.extend(fleet::check_processes(&broker).await);
    match check_kept(&broker, limits).await {
        Ok(kept) => checks.extend(kept),
        Err(error) => checks.push(failed("kept", &error.into())),
    }
    checks.extend(room::check_storage(&broker).await);
    checks.push(match broker.strays().await {
        Ok(0) => check("set aside", Verdict::Ok, "no message", None),
        Ok(strays) => check(
            "set aside",
            Verdict::Warn,
            format!("{} messages that are no batch", show::grouped(strays)),
            Some("look at them with `nats stream view`: their headers say where each came from and why"),
        )
        .coded(Code::MessageForeign),
        Err(error) => failed("set aside", &error.into()),
    });
    checks
}

/// Mutations of the pipeline's tables that cannot end: what comes after them waits.
async fn check_mutations(store: &Store) -> Check {
    match store.hindrances().await {
        Ok(stuck) if stuck.is_empty() => check("mutations", Verdict::Ok, "none that cannot end", None),
        Ok(stuck) => check(
            "mutations",
            Verdict::Warn,
            stuck.join("; "),
            Some("what removes rows, and `forget` above all, waits until they end"),
        ),
        Err(error) => failed("mutations", &error.into()),
    }
}

/// What the streams keep, and for how long.
async fn check_kept(broker: &Broker, limits: &StreamLimits) -> Result<Vec<Check>, Error> {
    let names = broker.names();
    let ids = broker.kept(&names.ids_stream()).await?;
    let rows = broker.kept(&names.rows_stream()).await?;
    let ids = ids.map(|kept| told_kept("ids kept", "for ever", &kept, limits.ids_age));
    let rows = rows.map(|kept| told_kept("rows kept", "until their pass is sealed", &kept, limits.rows_age));
    Ok(ids.into_iter().chain(rows).collect())
}

fn told_kept(what: &'static str, unlimited: &str, kept: &Kept, wanted: Duration) -> Check {
    let time = |age: Duration| match age {
        Duration::ZERO => unlimited.to_owned(),
        age => format!("for {}", length(age)),
    };
    let found = format!(
        "{}; {} of {} bytes, {} messages",
        time(kept.max_age),
        show::grouped(kept.bytes),
        show::grouped(kept.max_bytes),
        show::grouped(kept.messages)
    );
    let full = kept.max_bytes > 0 && kept.bytes >= kept.max_bytes / 10 * 9;
    if full {
        let hint =
            "it is nearly full: `forget` old runs, or give the stream more bytes with `nats stream edit`";
        return check(what, Verdict::Warn, found, Some(hint));
    }
    if kept.max_age != wanted {
        let hint = format!(
            "the configuration says {}, and holds for streams that are yet to be made: `nats stream edit` changes this one",
            time(wanted)
        );
        return check(what, Verdict::Warn, found, Some(&hint));
    }
    check(what, Verdict::Ok, found, None)
}

/// What ClickHouse says, and the faults of views that are told by it.
async fn check_store(servers: &Servers, spec: &Spec) -> (Vec<Check>, Vec<ViewFault>) {
    let unreachable = |error: Error| (vec![failed("ClickHouse", &error.into())], Vec::new());
    let store = match Store::connect(spec, servers.store.clone()).await {
        Ok(store) => store,
        Err(error) => return unreachable(error),
    };
    let version = match store.version().await {
        Ok(version) => version,
        Err(error) => return unreachable(error),
    };
    let mut checks =
        vec![check("ClickHouse", Verdict::Ok, format!("{version} ({})", servers.store.origin), None)];
    if !at_least(&version, (24, 8)) {
        checks.push(check(
            "ClickHouse version",
            Verdict::Warn,
            version,
            Some("24.8 or newer is what is tested"),
        ));
    }
    match check_tables(&store).await {
        Ok(found) => checks.extend(found),
        Err(error) => checks.push(failed("tables", &error.into())),
    }
    checks.push(check_mutations(&store).await);
    checks.extend(room::check_disks(&store).await);
    // Whatever is wrong with the tables: rows that views lack are told.
    match view_faults(&store).await {
        Ok((told, faults)) => {
            checks.push(told);
            (checks, faults)
        }
        Err(error) => {
            checks.push(failed("view faults", &error.into()));
            (checks, Vec::new())
        }
    }
}

/// Whether the tables take rows, readers see what is there, and what else sees it.
async fn check_tables(store: &Store) -> Result<Vec<Check>, Error> {
    let plan = store.plan().await?;
    store.refuse_detached(plan.missing.clone()).await?;
    // What hinders is an error with a hint of its own.
    store.check(&plan)?;
    let names = |names: &[String]| {
        names.iter().map(|name| store.tables().full_name(name)).collect::<Vec<_>>().join(", ")
    };
    let mut checks = vec![match &plan.missing[..] {
        [] => {
            let wider =
                plan.wider.iter().map(|(name, kind)| format!("; `{name}` is {kind}, which holds more"));
            check(
                "tables",
                Verdict::Ok,
                format!("there, and take the pipeline's rows{}", wider.collect::<String>()),
                None,
            )
        }
        all if all.len() == store.tables().all_names().len() => {
            check("tables", Verdict::Warn, "not there yet", Some("`setup`, `produce` or `run` creates them"))
        }
        some => {
            let found = format!("missing: {}", names(some));
            check("tables", Verdict::Warn, found, Some("`setup`, `produce` or `run` creates them"))
        }
    }];
    checks.push(match &plan.stale[..] {
        [] => check("views", Verdict::Ok, "as their table is", None),
        stale => check(
            "views",
            Verdict::Warn,
            store.lag(stale),
            Some("readers may get wrong values until `setup` makes them anew, which loses nothing that is stored"),
        )
        .coded(Code::ViewLags),
    });
    if !plan.fed.is_empty() {
        let told = format!("{}: {}", plan.fed.join(", "), show::FED);
        checks.push(match &store.broken_views(&plan.fed).await?[..] {
            [] => check("other views", Verdict::Ok, told, None),
            broken => check(
                "other views",
                Verdict::Warn,
                broken.join("; "),
                Some("bring back the tables that they fill, or drop the views"),
            ),
        });
    }
    Ok(checks)
}

/// Rows that materialized views of the operator's did not get.
async fn view_faults(store: &Store) -> Result<(Check, Vec<ViewFault>), Error> {
    let faults = store.view_faults(None).await?;
    if faults.is_empty() {
        return Ok((check("view faults", Verdict::Ok, "none", None), faults));
    }
    let mut told = faults.iter().map(show::view_fault).collect::<Vec<_>>().join("; ");
    if faults.len() == VIEW_FAULTS {
        told = format!("{told}; there may be more, which are shown once these are acknowledged");
    }
    let refills = store.refills(&faults).await?;
    let seen = "then `doctor --acknowledge`";
    let hint = match refills[..] {
        [] => format!("mend the views, see which rows they lack, and fill them; {seen}"),
        _ => format!(
            "mend the views, and let those that lack rows see them again: {}; {seen}",
            refills.join("; ")
        ),
    };
    Ok((check("view faults", Verdict::Warn, told, Some(&hint)).coded(Code::ViewLacksRows), faults))
}

fn at_least(version: &str, (major, minor): (u32, u32)) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
}
