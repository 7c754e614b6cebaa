//! Rows 8, 9, 10 and 12: sinks that are killed, paused and restarted.

use std::time::{Duration, Instant};

use tests::SOON;

use crate::Plan;
use crate::scene::{Report, Scene, Setup, is_stopped};

/// Long enough that a paused sink's batches are another's: `ack_wait` is 120 s.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(300);

/// The third batch of an insert that has twenty.
const IN_BODY: u32 = 3;

/// Inserts of many batches, two seconds apart.
fn setup(name: &'static str) -> Setup {
    Setup { config: "sink.group_age = '2s'\n", ..Setup::new(name) }
}

/// Killed when nothing of its insert has been sent.
pub fn killed_before_insert(plan: Plan) -> Report {
    killed_at(plan, "sink-before-insert", 2)
}

/// Killed when one of the insert's batches has been sent and others have not.
pub fn killed_in_insert(plan: Plan) -> Report {
    killed_at(plan, "sink-in-insert", IN_BODY)
}

/// Killed when ClickHouse has said 200, and not yet what landed.
pub fn killed_after_insert(plan: Plan) -> Report {
    killed_at(plan, "sink-after-insert", 2)
}

/// Killed when ClickHouse has said what landed, and nothing is acked.
pub fn killed_after_ask(plan: Plan) -> Report {
    killed_at(plan, "sink-after-ask", 4)
}

/// Killed when the first of several acks is given.
pub fn killed_after_ack(plan: Plan) -> Report {
    killed_at(plan, "sink-after-ack", 4)
}

fn killed_at(plan: Plan, place: &str, passage: u32) -> Report {
    let mut scene = Scene::new(plan, &setup("sink-killed"));
    scene.publish("a", 30_000, 500);
    scene.trap("sink-1", &format!("{place}=kill@{passage}"));
    scene.start(&["work-1"]);
    scene.wait_sprung("sink-1", place);
    scene.start(&["sink-2"]);
    scene.must_go_on("a");
    scene.finish()
}

/// Paused between the question what is there and the insert: another sink takes over and seals, then the first wakes.
pub fn paused_before_insert(plan: Plan) -> Report {
    paused_at(plan, "sink-before-insert", 2)
}

/// Paused when a part of the insert's body has been sent.
pub fn paused_in_insert(plan: Plan) -> Report {
    paused_at(plan, "sink-in-insert", IN_BODY)
}

/// The zombie's rows may lie beside the other sink's for a while: views never show it, and `verify --repair` merges them
/// away when they came after the seal.
fn paused_at(plan: Plan, place: &str, passage: u32) -> Report {
    let mut scene = Scene::new(plan, &setup("sink-paused"));
    scene.host.env.push(("MILLSTREAM_LOG".into(), "info,millstream_engine=debug".into()));
    scene.publish("a", 30_000, 500);
    scene.trap("sink-1", &format!("{place}=stop@{passage}"));
    scene.start(&["work-1"]);
    scene.wait_sprung("sink-1", place);
    scene.start(&["sink-2"]);
    let recovered = scene.wait_sealed();
    assert!(recovered < TAKEN_OVER_WITHIN, "sealed {recovered:?} after the pause");
    let said = scene.host.log("sink-1").len();
    wake(&mut scene, "sink-1");
    let raw = watch_zombie(&mut scene);
    scene.wait("the zombie's insert", SOON, |scene| {
        match scene.host.log("sink-1")[said..].contains("insert") {
            true => Ok(()),
            false => Err("nothing was said of it".to_owned()),
        }
    });
    scene.note(format!("the zombie says:\n{}", &scene.host.log("sink-1")[said..]));
    let found = scene.look();
    assert!(found.is_right(), "while the zombie's rows are there: {found:?}");
    scene.fault(format!("the zombie woke after the seal and left {raw} raw duplicates"));
    scene.host.call(&["verify", "a", "--repair", "--json"]);
    Report { recovered, raw_seen: raw, ..scene.finish() }
}

fn wake(scene: &mut Scene, name: &str) {
    let pid = scene.pids().into_iter().find_map(|(service, pid)| (service == name).then_some(pid));
    let pid = pid.expect("the paused service is there");
    assert!(is_stopped(pid), "{name} is not paused any more");
    scene.signal(name, "CONT");
}

/// Watches readers while the zombie does what it was about to do, until it is done; the most raw duplicates seen.
fn watch_zombie(scene: &mut Scene) -> u64 {
    const WATCHED: Duration = Duration::from_secs(15);
    let (until, mut most) = (Instant::now() + WATCHED, 0);
    while Instant::now() < until {
        most = most.max(scene.checker.raw_doubled("a"));
        let seen =
            scene.checker.number("SELECT count() - uniqExact(id) FROM millstream.trial WHERE run = 'a'");
        assert_eq!(seen, 0, "readers see ids twice");
        scene.pass(Duration::from_millis(200));
    }
    most
}

/// Two sinks that are started again in turn, every other time without a word: they do not keep each other from landing.
pub fn restarted_in_turn(plan: Plan) -> Report {
    const EVERY: Duration = Duration::from_secs(4);
    let mut scene = Scene::new(plan, &Setup::new("sinks-in-turn"));
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    let (until, mut before) = (Instant::now() + plan.lasting(60, 300), 0);
    for turn in 0.. {
        scene.keep_load(100_000, 500);
        scene.pass(EVERY);
        let name = ["sink-1", "sink-2"][turn % 2];
        if turn % 4 < 2 {
            scene.restart(name)
        } else {
            scene.kill(name)
        }
        if turn % 4 == 3 {
            let after = scene.checker.all_rows();
            assert!(after > before, "no row landed in four turns: {after}");
            before = after;
        }
        if Instant::now() > until {
            break;
        }
    }
    scene.finish()
}
