//! Rows 13 to 17: a ClickHouse that is killed, full, away, slow, and old.

use std::time::Duration;

use tests::SOON;

use crate::Plan;
use crate::inject::{RENAMES, SYNCS, Strace};
use crate::scene::{PATIENCE, Report, Scene, Setup};

/// The server's process.
const ENGINE: &str = "__local-engine";

fn scene(plan: Plan, name: &'static str) -> Scene {
    let mut scene = Scene::new(plan, &Setup::new(name));
    scene.publish("a", 100_000, 1000);
    scene
}

/// Nobody asks it anything when it goes.
pub fn killed_idle(plan: Plan) -> Report {
    let mut scene = scene(plan, "clickhouse-idle");
    scene.kill_clickhouse();
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.finish_well()
}

/// Six times when an insert is under way.
pub fn killed_in_insert(plan: Plan) -> Report {
    const KILLS: usize = 6;
    let mut scene = scene(plan, "clickhouse-insert");
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_up();
    for _ in 0..KILLS {
        // Computing goes on while it is away.
        scene.keep_load(20_000, 100);
        scene.wait_insert();
        scene.kill_clickhouse();
    }
    scene.finish_well()
}

/// The part is written under its temporary name and never gets another.
pub fn killed_at_rename(plan: Plan) -> Report {
    const KILLS: usize = 3;
    let mut scene = scene(plan, "clickhouse-rename");
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_up();
    scene.wait_rows("a", 1);
    let mut hits = Vec::new();
    for kill in 0..KILLS {
        let log = scene.host.path().join(format!("strace-{kill}.log"));
        let pid = scene.server(ENGINE);
        // At the first: `strace` counts the calls of each thread for itself, and the server has many.
        let strace = Strace::attach(pid, RENAMES, "signal=KILL:when=1", log);
        scene.wait("ClickHouse killed", PATIENCE, |scene| {
            if scene.up().pids(ENGINE).contains(&pid) { Err("it runs".to_owned()) } else { Ok(()) }
        });
        scene.fault(format!("ClickHouse {pid} killed at {:?}", strace.hits()));
        hits.extend(strace.hits());
        scene.checker.ask("SELECT 1");
    }
    assert!(!hits.is_empty(), "no kill came between a part and its name");
    scene.must_go_on("a");
    scene.finish_well()
}

/// While it merges the parts of the run.
pub fn killed_in_merge(plan: Plan) -> Report {
    const KILLS: usize = 3;
    /// A merge may be over before it is seen, or before the kill.
    const TRIES: usize = 30;
    let mut scene = Scene::new(plan, &Setup { ballast: 1000, ..Setup::new("clickhouse-merge") });
    scene.publish("a", 100_000, 1000);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    let mut killed = 0;
    for _ in 0..TRIES {
        scene.wait_rows("a", (killed + 1) * 15_000);
        killed += u64::from(kill_in_merge(&mut scene));
        if killed == KILLS as u64 {
            break;
        }
    }
    assert_eq!(killed, KILLS as u64, "merges were over before the kill");
    scene.must_go_on("a");
    scene.finish_well()
}

/// Kills ClickHouse while it merges all parts; whether the merge was not over by then.
fn kill_in_merge(scene: &mut Scene) -> bool {
    let url = scene.clickhouse.clone();
    let merging =
        std::thread::spawn(move || tests::ask_clickhouse(&url, "OPTIMIZE TABLE millstream.trial_rows FINAL"));
    let seen = scene.wait("a merge", SOON, |scene| {
        let merges = "SELECT count() FROM system.merges WHERE table = 'trial_rows'";
        if merging.is_finished() {
            return Ok(false);
        }
        if scene.checker.number(merges) > 0 { Ok(true) } else { Err("none".to_owned()) }
    });
    if seen {
        scene.kill_clickhouse();
    }
    merging.join().expect("it was asked").is_err()
}

/// No block is left: it refuses to begin a part.
pub fn full_disk(plan: Plan) -> Report {
    const FULL_FOR: Duration = Duration::from_secs(10);
    let setup = Setup { clickhouse_disk_mb: Some(256), ..Setup::new("clickhouse-full") };
    let mut scene = Scene::new(plan, &setup);
    scene.publish("a", 100_000, 1000);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    let bytes = scene.disk().fill();
    scene.wait_log("sink-1", "NOT_ENOUGH_SPACE");
    scene.fault(format!("{bytes} bytes fill ClickHouse's disk, and a sink hears of it"));
    scene.pass(FULL_FOR);
    scene.disk().clear();
    scene.must_go_on("a");
    scene.finish_well()
}

/// The files of every part cannot be brought to the disk, for a while.
pub fn full_at_sync(plan: Plan) -> Report {
    full_at(plan, SYNCS)
}

/// Every part is written, and none gets its name, for a while.
pub fn full_at_rename(plan: Plan) -> Report {
    full_at(plan, RENAMES)
}

fn full_at(plan: Plan, calls: &str) -> Report {
    const HITS: usize = 4;
    let mut scene = scene(plan, "clickhouse-full-at");
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    let log = scene.host.path().join("strace.log");
    let strace = Strace::attach(scene.server(ENGINE), calls, "error=ENOSPC", log);
    scene.wait("parts that cannot be finished", SOON, |_| match strace.hits().len() {
        hits if hits >= HITS => Ok(()),
        hits => Err(format!("{hits}")),
    });
    let hits = strace.hits();
    scene.fault(format!("{} calls failed, as {:?}", hits.len(), hits.first()));
    drop(strace);
    scene.must_go_on("a");
    scene.finish_well()
}
