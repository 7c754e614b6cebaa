//! Rows 18 to 21: a nats-server that is killed, full and paused.

use std::time::Duration;

use tests::SOON;

use crate::Plan;
use crate::scene::{Report, Scene, Setup};

/// 50 times, some before there is any load, most while a run is published, computed and stored.
pub fn killed_under_load(plan: Plan) -> Report {
    const IDLE: usize = 3;
    const KILLS: usize = 50;
    let mut scene = Scene::new(plan, &Setup::new("nats-killed"));
    for _ in 0..IDLE {
        scene.kill_nats();
    }
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    // What starts while the server is away says so and ends; from here on, whoever ends has a fault.
    scene.wait_up();
    scene.keep_load(30_000, 100);
    scene.wait_landed();
    for kill in IDLE..KILLS {
        scene.keep_load(30_000, 100);
        // Half of them while a run is published or rows are, half when acks are on their way.
        if kill % 2 == 0 {
            scene.wait_landed()
        } else {
            scene.pass_between(100, 1200)
        }
        scene.kill_nats();
    }
    let runs = scene.runs().len();
    scene.note(format!("{runs} runs"));
    scene.finish_well()
}

/// The last blocks are taken while a run is published.
pub fn full_in_publish(plan: Plan) -> Report {
    /// Less than the batches of the run take.
    const LEFT: u64 = 128 << 10;
    full(plan, Setup { micros: 100, ..Setup::new("nats-full-ids") }, |scene| {
        scene.host.call(&["setup"]).expect(0);
        let bytes = scene.disk().fill_but(LEFT);
        scene.submit("a", 100_000, 20);
        bytes
    })
}

/// No block is left while rows are published.
pub fn full_in_rows(plan: Plan) -> Report {
    full(plan, Setup { ballast: 1500, micros: 500, ..Setup::new("nats-full-rows") }, |scene| {
        scene.publish("a", 20_000, 100);
        scene.start(&["work-1", "work-2"]);
        scene.wait_status("a", "batches computed", |status| status["pending"].as_u64() < Some(150));
        scene.disk().fill_but(0)
    })
}

/// The stack says that the server refuses work, and starts it again when there is room.
fn full(plan: Plan, setup: Setup, fill: impl FnOnce(&mut Scene) -> u64) -> Report {
    const FULL_FOR: Duration = Duration::from_secs(10);
    // Named: what the engine would take of a larger disk leaves no room on this one.
    let config = "sink.group_age = '200ms'\nstreams.ids_bytes = '64MiB'\nstreams.rows_bytes = '64MiB'\n";
    let mut scene = Scene::new(plan, &Setup { config, nats_disk_mb: Some(400), ..setup });
    let bytes = fill(&mut scene);
    scene.note(format!("{bytes} bytes fill nats-server's disk"));
    // The stack looks every 30 s.
    scene.wait("a word of the stack", SOON, |scene| {
        let log = scene.host.log("up");
        if log.contains("refuses work") { Ok(()) } else { Err(log) }
    });
    scene.fault(format!("{bytes} bytes fill nats-server's disk, and the stack says that it refuses work"));
    scene.pass(FULL_FOR);
    scene.disk().clear();
    let names: Vec<&str> =
        ["work-1", "work-2"].into_iter().filter(|name| scene.names(name).is_empty()).collect();
    scene.start(&names);
    scene.start(&["sink-1"]);
    scene.finish()
}
