//! Rows 46, 47 and 50 to 52: what ids start and leave, a host that cannot compute, a pool that gives no sign, an id that
//! takes long, and a service that ids need.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::Value;
use tests::processes::sleeps;
use tests::{Launch, SOON, wait_until};

use crate::Plan;
use crate::scene::{PATIENCE, Report, Scene, Setup};
use crate::troubled::{DEAD, SERVICE, SLEEP, STRAGGLER, VARIABLE, begun};

/// Ids whose programs or crashes take a process each; one of a thousand is trouble.
const FEW: u64 = 6_000;

/// Ids start a program that ignores SIGTERM, and wait for it: each is a dead letter at its hard limit, and its program ends. A
/// worker that is terminated meanwhile ends well.
pub fn program_ignores_sigterm(plan: Plan) -> Report {
    let (mut scene, seconds) = with_programs(plan, "stubborn", "timed out after 4 s");
    scene.start(&["work-1", "sink-1"]);
    wait_program(&mut scene, &seconds);
    scene.restart("work-1");
    wait_program(&mut scene, &seconds);
    scene.kill("work-1");
    all_ended(scene, "timed out after 4 s", &seconds)
}

/// Ids crash and leave a program in a session of its own that holds their pipes open: the crash is seen at once all the same,
/// the id is a dead letter, and the program ends.
pub fn pipe_held_open(plan: Plan) -> Report {
    let (mut scene, seconds) = with_programs(plan, "holds-pipe", "crashed: signal 6");
    scene.start(&["work-1", "sink-1"]);
    scene.wait("crashes whose programs have ended", PATIENCE, |scene| {
        let crashes = scene.host.log("work-1").matches("an id ended its process").count();
        // A worker that is killed in the moment of a crash leaves the program: no process is left that could end it.
        match &sleeps(&seconds)[..] {
            [] if crashes >= 2 => Ok(()),
            left => Err(format!("{crashes} crashes, {left:?}")),
        }
    });
    scene.kill("work-1");
    all_ended(scene, "crashed: signal 6", &seconds)
}

/// A published run some of whose ids start programs, which sleep for so many seconds.
fn with_programs(plan: Plan, trouble: &'static str, reason: &str) -> (Scene, String) {
    let config = "sink.group_age = '200ms'\nwork.hard_limit = '4s'\n";
    let mut scene = Scene::new(plan, &Setup { config, micros: 1000, ..Setup::new(trouble) });
    let port = scene.nats.trim_end_matches('/').rsplit(':').next().and_then(|port| port.parse().ok());
    let seconds = (200_000u32 + port.unwrap_or(0)).to_string();
    scene.checker = scene.checker.clone().with_dead(DEAD);
    set(&mut scene, VARIABLE, trouble);
    set(&mut scene, SLEEP, &seconds);
    scene.note(format!("ids with `{DEAD}` must be dead letters: {reason}"));
    scene.publish("a", FEW, 200);
    (scene, seconds)
}

fn set(scene: &mut Scene, variable: &str, value: &str) {
    scene.host.env.push((variable.to_owned(), value.to_owned()));
}

fn wait_program(scene: &mut Scene, seconds: &str) {
    scene.wait("a program of an id", PATIENCE, |scene| match &sleeps(seconds)[..] {
        [] => Err(scene.host.log("work-1").lines().last().unwrap_or_default().to_owned()),
        _ => Ok(()),
    });
}

/// The dead letters have this reason, and no program is left.
fn all_ended(mut scene: Scene, reason: &str, seconds: &str) -> Report {
    let report = scene.finish();
    let letters =
        format!("SELECT count(), countIf(startsWith(error, '{reason}')) FROM millstream.trial_dead");
    let (letters, trouble) = (scene.checker.ask(&letters), FEW / 1000);
    assert_eq!(
        letters.trim(),
        format!("{trouble}\t{trouble}"),
        "dead letters, and those with the reason `{reason}`"
    );
    wait_until("the end of what ids started", SOON, || match &sleeps(seconds)[..] {
        [] => Ok(()),
        left => Err(format!("{left:?}")),
    });
    report
}

/// A host that may have few threads draws nothing and says why; another, which is killed meanwhile, computes the run.
pub fn host_without_threads(plan: Plan) -> Report {
    const WHY: [&str; 3] = ["draws no batches", "128 threads", "`ulimit -u`: 24"];
    let mut scene = Scene::new(plan, &Setup { micros: 1000, ..Setup::new("no-threads") });
    // It runs as a user of its own, who has no other processes.
    let readable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(scene.host.path(), readable).expect("its own directory");
    let (nats, clickhouse) = (scene.nats.clone(), scene.clickhouse.clone());
    set(&mut scene, "NATS_URL", &nats);
    set(&mut scene, "CLICKHOUSE_URL", &clickhouse);
    scene.publish("a", 20_000, 200);
    let under = ["setpriv", "--reuid", "64322", "--clear-groups", "prlimit", "--nproc=24"];
    let poor =
        Launch { under: under.map(str::to_owned).into(), ..Launch::from(&["work", "--threads", "64"][..]) };
    scene.serve("work-poor", poor);
    WHY.iter().for_each(|part| scene.wait_log("work-poor", part));
    scene.wait_status("a", "the poor host named", |status| status["hosts"].to_string().contains(WHY[2]));
    scene.fault("a host that may have 24 threads draws no batches and says so");
    scene.start(&["work-1", "sink-1"]);
    scene.wait_rows("a", 2_000);
    scene.kill("work-1");
    scene.must_go_on("a");
    let status = scene.host.status("a");
    let poor = |host: &&Value| !host["unable"].is_null() && host["cores"] == 64;
    let poor = status["hosts"].as_array().and_then(|hosts| hosts.iter().find(poor)).cloned();
    let ids =
        poor.as_ref().and_then(|poor| poor["runs"].as_array()?.iter().map(|run| run["ids"].as_u64()).sum());
    assert_eq!(ids, Some(0), "the poor host has computed: {poor:?}");
    scene.finish_well()
}

/// The process that computes for a worker is stopped: the worker misses it, names it and replaces it.
pub fn pool_frozen(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup { micros: 2000, ..Setup::new("pool-frozen") });
    scene.publish("a", 15_000, 500);
    scene.start(&["work-1", "sink-1"]);
    scene.wait_status("a", "batches held", |status| status["in_flight"].as_u64() >= Some(2));
    let pool = scene.freeze_pool("work-1").expect("a pool that computes");
    scene.fault(format!("pool process {pool} of work-1 stopped"));
    scene.wait_log("work-1", "gave no sign for 30 s");
    scene.must_go_on("a");
    scene.wait("another pool process", SOON, |scene| {
        let pools = scene.pools("work-1");
        if pools.iter().any(|other| *other != pool) { Ok(()) } else { Err(format!("{pools:?}")) }
    });
    assert!(!sees(pool), "process {pool} is there still");
    scene.finish_well()
}

fn sees(pid: u32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap_or(false)
}

/// One id takes long, and all workers are killed while they compute it: everything else is stored meanwhile, and it is computed
/// in the end.
pub fn straggler(plan: Plan) -> Report {
    const BATCH: u32 = 200;
    let mut scene = Scene::new(plan, &Setup { micros: 500, ..Setup::new("straggler") });
    set(&mut scene, VARIABLE, "straggler");
    scene.publish("a", 20_000, BATCH);
    scene.start(&["work-1", "work-2", "sink-1"]);
    for times in 1..=2 {
        scene.wait("the straggler begun", PATIENCE, |scene| match begun(scene.host.path()) {
            now if now >= times => Ok(()),
            now => Err(format!("{now} of {times} times")),
        });
        scene.pass_between(500, 3_000);
        scene.kill_all("work");
    }
    scene.wait_rows("a", 20_000 - u64::from(BATCH));
    scene.must_go_on("a");
    scene.fault(format!("all others are stored while id {STRAGGLER} is computed"));
    let report = scene.finish();
    assert!(begun(scene.host.path()) >= 3, "no worker was killed while it computed the straggler");
    report
}

/// The service that ids need is away ten times as long as all attempts would take, and a worker is killed meanwhile: the run slows
/// down and says so, and no id is given up.
pub fn service_away(plan: Plan) -> Report {
    /// Five attempts have four pauses of 0.2 s, 0.4 s, 0.8 s and 1.6 s between them.
    const AWAY: Duration = Duration::from_secs(30);
    const SAYS: &str = "wait for another attempt: the service is away";
    let config = "sink.group_age = '200ms'\nwork.retry_for = '2m'\n";
    let mut scene = Scene::new(plan, &Setup { config, micros: 1000, ..Setup::new("service-away") });
    set(&mut scene, VARIABLE, "service");
    let service = scene.host.path().join(SERVICE);
    fs::write(&service, "").expect("a file");
    scene.publish("a", 30_000, 100);
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 1_000);
    fs::remove_file(&service).expect("it is there");
    scene.fault("the service that ids need is away");
    scene.wait("the reason in `status`", SOON, |scene| {
        let told = scene.host.call(&["status", "a"]).stdout;
        if told.contains(SAYS) { Ok(()) } else { Err(told) }
    });
    scene.wait_log("work-1", "many ids ask for another attempt");
    scene.pass(AWAY / 2);
    scene.kill("work-2");
    scene.pass(AWAY / 2);
    let status = scene.host.status("a");
    // What both had drawn by then, and two of the run for each since: of 300.
    assert!(status["in_flight"].as_u64() < Some(100), "the run does not slow down: {status}");
    scene.must_go_on("a");
    fs::write(&service, "").expect("a file");
    scene.fault("the service is back");
    scene.finish()
}
