//! Rows 15, 16, 17, 20 and 21: servers that are away, slow, old, at their limits or paused, under full load.

use std::collections::HashMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tests::SOON;
use tests::nats::Nats;

use crate::Plan;
use crate::scene::{Report, Scene, Setup};
use tests::proxy::Mode;

/// What a publisher hears from a stream that is full.
const FULL: &str = "maximum bytes";
const MB: u64 = 1 << 20;

/// Rows of 2 kB, so that small streams fill soon.
fn large_rows(name: &'static str) -> Setup {
    Setup { ballast: 2000, micros: 500, ..Setup::new(name) }
}

/// Gives a stream another byte limit, as `nats stream edit` does.
fn limit(scene: &Scene, stream: &str, bytes: u64) {
    let mut nats = Nats::connect(&scene.nats);
    let mut config = nats.stream(stream)["config"].take();
    config["max_bytes"] = json!(bytes);
    let answer = nats.api(&format!("STREAM.UPDATE.{stream}"), &config);
    assert_eq!(answer["config"]["max_bytes"], json!(bytes), "{answer}");
}

/// Away at full load: computing goes on until the rows stream is full, the producer waits, memory stays flat, and all of
/// it drains when ClickHouse is back.
pub fn clickhouse_away(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &large_rows("clickhouse-away"));
    let proxy = scene.before_clickhouse();
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    limit(&scene, "trial_rows", 8 * MB);
    // The ids of half of the batches: ids stay for replay, so a person has to give room for the other half.
    limit(&scene, "trial_ids", 18_000);
    scene.submit("a", 20_000, 100);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_up();
    scene.wait_rows("a", 1);
    proxy.set(Mode::Refuse);
    scene.fault("ClickHouse refuses every connection");
    scene.wait_log("produce-a", FULL);
    scene.wait_log("work-1", FULL);
    scene.note("workers and the producer wait for room");
    let grown = watch_memory(&mut scene, plan.lasting(20, 600));
    proxy.set(Mode::Pass);
    scene.fault(format!("ClickHouse is back; meanwhile memory grew: {grown}"));
    limit(&scene, "trial_ids", 64 * MB);
    scene.finish_well()
}

/// Watches the memory of all processes; fails the scenario when one grows.
fn watch_memory(scene: &mut Scene, time: Duration) -> String {
    const EVERY: Duration = Duration::from_millis(500);
    /// What an allocator may take or give back without any growth.
    const SLACK_KB: u64 = 16 << 10;
    let (begun, mut halves) = (Instant::now(), [HashMap::new(), HashMap::new()]);
    while begun.elapsed() < time {
        let half = &mut halves[usize::from(begun.elapsed() > time / 2)];
        let servers = ["nats-server", "__local-engine"].map(|what| (what.to_owned(), scene.server(what)));
        for (name, pid) in scene.pids().into_iter().chain(servers) {
            let most = half.entry(name).or_insert(0);
            *most = resident_kb(pid).max(*most);
        }
        scene.pass(EVERY);
    }
    let [first, second] = halves;
    let mut grown: Vec<String> = Vec::new();
    for (name, kb) in &second {
        let before = first.get(name).copied().unwrap_or(0);
        assert!(*kb <= before + before / 10 + SLACK_KB, "{name} grew from {before} to {kb} KB");
        grown.push(format!("{name} {before} to {kb} KB"));
    }
    grown.sort();
    grown.join(", ")
}

fn resident_kb(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// It refuses inserts because there are too many parts, and merges none.
pub fn too_many_parts(plan: Plan) -> Report {
    const SINKS: [&str; 2] = ["sink-1", "sink-2"];
    let refusals = |scene: &Scene| {
        let logs = SINKS.map(|name| scene.host.log(name));
        logs.iter().flat_map(|log| log.lines()).filter(|line| line.contains("Too many parts")).count()
    };
    let mut scene = Scene::new(plan, &Setup::new("too-many-parts"));
    scene.publish("a", 60_000, 500);
    scene.checker.ask(
        "ALTER TABLE millstream.trial_rows MODIFY SETTING parts_to_delay_insert = 15, parts_to_throw_insert = 15",
    );
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait(
        "refused inserts",
        SOON,
        |scene| if refusals(scene) > 0 { Ok(()) } else { Err("none".into()) },
    );
    let (before, time) = (refusals(&scene), plan.lasting(30, 120));
    scene.pass(time);
    let refused = refusals(&scene) - before;
    scene.fault(format!("{refused} inserts refused in {time:?}"));
    let most = SINKS.len() as u64 * time.as_secs();
    assert!(refused as u64 <= most, "a sink tries more than one insert a second: {refused} in {time:?}");
    scene.must_go_on("a");
    scene.checker.ask(
        "ALTER TABLE millstream.trial_rows MODIFY SETTING parts_to_delay_insert = 3000, parts_to_throw_insert = 3000",
    );
    scene.finish_well()
}

/// A backup from before a run is put back after the run was sealed: the proof says so, and a repair brings it back.
pub fn old_data(plan: Plan) -> Report {
    let services = ["work-1", "work-2", "sink-1"];
    let mut scene = Scene::new(plan, &Setup::new("clickhouse-old"));
    let data = scene.host.path().join(".millstream/clickhouse");
    let backup = scene.host.path().join("backup");
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let copied = Command::new("cp").arg("-a").args([from, to]).status();
        assert!(copied.is_ok_and(|status| status.success()), "no copy of {}", from.display());
    };
    for (run, ids) in [("a", 20_000), ("b", 30_000)] {
        scene.publish(run, ids, 500);
        scene.start(&services);
        scene.wait(
            "a seal",
            SOON,
            |scene| if scene.checker.is_sealed(run) { Ok(()) } else { Err(String::new()) },
        );
        services.iter().for_each(|name| scene.dismiss(name));
        scene.stop_stack();
        if run == "a" {
            copy(&data, &backup);
        } else {
            fs::remove_dir_all(&data).expect("the directory is removed");
            copy(&backup, &data);
        }
        scene.start_stack();
    }
    scene.keep_raw_rows();
    let alarm = scene.host.call(&["verify", "b", "--json"]).expect(1).json();
    assert_eq!(alarm["missing_batches"], 60, "{alarm}");
    scene.fault("a backup from before run `b` is back, and `verify` misses its 60 batches");
    scene.start(&services);
    scene.host.call(&["verify", "b", "--repair", "--json"]);
    scene.finish()
}

/// The rows stream holds a quarter of the run's rows: workers wait until sinks have made room.
pub fn rows_at_limit(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &large_rows("rows-at-limit"));
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    limit(&scene, "trial_rows", 8 * MB);
    scene.publish("a", 16_000, 100);
    scene.start(&["work-1", "work-2"]);
    scene.wait_log("work-1", FULL);
    scene.fault("the rows stream is full, and a worker is refused");
    scene.start(&["sink-1"]);
    scene.finish_well()
}

/// The ids stream is full: the producer waits until a person gives it room, since ids stay for replay.
pub fn ids_at_limit(plan: Plan) -> Report {
    const FULL_FOR: Duration = Duration::from_secs(10);
    let mut scene = Scene::new(plan, &Setup::new("ids-at-limit"));
    scene.host.call(&["setup"]).expect(0);
    limit(&scene, "trial_ids", 12_000);
    scene.submit("a", 20_000, 50);
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_log("produce-a", FULL);
    scene.fault("the ids stream is full, and the producer is refused");
    scene.pass(FULL_FOR);
    limit(&scene, "trial_ids", 64 * MB);
    scene.finish_well()
}

/// Everybody's connections hang for a while.
pub fn nats_paused(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("nats-paused"));
    scene.submit("b", 20_000, 50);
    scene.publish("a", 150_000, 1000);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    let (pid, time) = (scene.server("nats-server"), plan.lasting(45, 120));
    tests::signal(pid, "STOP");
    scene.pass(time);
    assert!(crate::scene::is_stopped(pid), "nats-server {pid} did not stay paused");
    tests::signal(pid, "CONT");
    scene.fault(format!("nats-server {pid} paused for {time:?}"));
    let woken = Instant::now();
    scene.wait_landed();
    scene.note(format!("rows land again {:?} after it woke", woken.elapsed()));
    scene.must_go_on("a");
    scene.finish_well()
}
