//! Rows 3 to 7 and 53: workers that are killed and paused.

use std::time::{Duration, Instant};

use tests::SOON;
use tests::nats::Nats;

use crate::Plan;
use crate::scene::{Report, Scene, Setup};

/// A batch is a second of a core.
fn heavy(name: &'static str) -> Setup {
    Setup { micros: 2000, ..Setup::new(name) }
}

/// Killed while it computes what it holds.
pub fn killed_in_compute(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &heavy("worker-killed"));
    scene.publish("a", 15_000, 500);
    scene.start(&["work-1", "sink-1"]);
    scene.wait_status("a", "batches held", |status| status["in_flight"].as_u64() >= Some(2));
    scene.kill("work-1");
    scene.must_go_on("a");
    scene.finish()
}

/// Killed when its rows are in the stream and its batch is not acked: whoever gets it again finds them there.
pub fn killed_before_ack(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &heavy("worker-before-ack"));
    // Long enough that the batch comes again, 60 s later, before the run is sealed.
    scene.publish("a", 40_000, 500);
    scene.host.env.push(("MILLSTREAM_LOG".into(), "info,millstream_engine=debug".into()));
    scene.trap("work-1", "work-before-ack=kill@3");
    scene.start(&["sink-1"]);
    scene.wait_sprung("work-1", "work-before-ack");
    scene.wait_log("work-1", "rows of the batch are stored already");
    scene.note("the batch came again and its rows were there");
    scene.must_go_on("a");
    scene.finish()
}

/// Killed when some rows of its batch are stored, as they have waited for a second, and others are not done: the worker
/// that gets the batch again stores those, and no others.
pub fn killed_with_early_parts(plan: Plan) -> Report {
    let mut scene = Scene::new(
        plan,
        &Setup {
            config: "sink.group_age = '200ms'\nwork.rows_wait = '1s'\n",
            micros: 20_000,
            ..Setup::new("worker-early-parts")
        },
    );
    // A batch is ten seconds of a core.
    scene.publish("a", 5_000, 500);
    scene.host.env.push(("MILLSTREAM_LOG".into(), "info,millstream_engine=debug".into()));
    scene.trap("work-1", "work-after-part=kill@1");
    scene.start(&["sink-1"]);
    scene.wait_sprung("work-1", "work-after-part");
    scene.wait_log("work-1", "rows of the batch are stored already");
    scene.note("the batch came again and a part of it was there");
    scene.must_go_on("a");
    scene.finish()
}

/// Paused in mid-computation while another worker finishes the run; then it wakes, and what it publishes is old news.
pub fn paused(plan: Plan) -> Report {
    /// Three times `ack_wait`.
    const WHOLE_S: u64 = 180;
    /// The woken worker's last rows are in the stream, and a sink has found them stored.
    const STILL: Duration = Duration::from_secs(10);
    let mut scene = Scene::new(plan, &heavy("worker-paused"));
    scene.publish("a", 15_000, 500);
    scene.start(&["work-1", "sink-1"]);
    scene.wait_status("a", "batches held", |status| status["in_flight"].as_u64() >= Some(2));
    scene.signal("work-1", "STOP");
    scene.fault("work-1 paused with batches in its hands");
    let paused = Instant::now();
    scene.start(&["work-2"]);
    let recovered = scene.wait_sealed();
    scene.pass(plan.lasting(75, WHOLE_S).saturating_sub(paused.elapsed()));
    scene.signal("work-1", "CONT");
    scene.note("work-1 woke");
    scene.pass(STILL);
    let mut nats = Nats::connect(&scene.nats);
    scene.wait("nothing open in the rows stream", SOON, |_| match nats.consumer("trial_rows", "sink") {
        sink if sink.open == 0 && sink.pending == 0 => Ok(()),
        sink => Err(format!("{sink:?}")),
    });
    Report { recovered, ..scene.finish() }
}

/// All of them, again and again, as soon as systemd has started them: what gets through is what is done in between.
pub fn killed_again_and_again(plan: Plan) -> Report {
    /// Two seconds down, two seconds up.
    const EVERY: Duration = Duration::from_secs(4);
    let mut scene = Scene::new(plan, &Setup::new("workers-killed"));
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    scene.start(&["work-1", "work-2", "work-3", "sink-1", "sink-2"]);
    let (until, before) = (Instant::now() + plan.lasting(60, 300), scene.checker.all_rows());
    while Instant::now() < until {
        scene.keep_load(100_000, 200);
        scene.pass(EVERY);
        scene.kill_all("work");
    }
    let after = scene.checker.all_rows();
    assert!(after > before, "nothing got through: {after} rows");
    scene.finish()
}

/// Ids that panic, abort, fault, loop, eat memory and sleep, one each in a thousand: exactly those are dead letters, each
/// with its reason, and the others have rows.
pub fn rogue_ids(plan: Plan) -> Report {
    const IDS: u64 = 2_000;
    /// A batch is delivered again, 60 s later, before its ids are looked at one by one.
    const STORED_WITHIN: Duration = Duration::from_secs(480);
    let mut scene = Scene::new(plan, &Setup { rogue: true, ..Setup::new("rogue-ids") });
    scene.publish("a", IDS, 200);
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait("a row of every id", STORED_WITHIN, |scene| match scene.checker.rows("a") {
        rows if rows >= IDS => Ok(()),
        rows => Err(format!("{rows} rows")),
    });
    let dead = "SELECT id, error FROM millstream.rogue_dead WHERE run = 'a' ORDER BY id FORMAT TSVRaw";
    let dead = scene.checker.ask(dead);
    let mut found = dead.lines().filter_map(|line| line.split_once('\t'));
    for id in 1..=IDS {
        let Some(reason) = tests::Rogue::reason(id) else { continue };
        let (dead_id, error) = found.next().unwrap_or_default();
        assert!(
            dead_id == id.to_string() && error.starts_with(reason),
            "{id} should be dead of `{reason}`: {dead}"
        );
    }
    assert_eq!(found.next(), None, "others are dead, too: {dead}");
    scene.fault(format!("dead letters: {}", dead.trim().replace('\n', "; ").replace('\t', " ")));
    scene.finish()
}
