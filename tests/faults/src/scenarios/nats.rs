//! Rows 18 to 21: a nats-server that is killed, full and paused.

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
    scene.submit("b", 200_000, 10);
    scene.submit("a", 1_000_000, 1000);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    scene.keep_raw_rows();
    for kill in IDLE..KILLS {
        if kill % 2 == 0 {
            scene.wait_inserted("a")
        } else {
            scene.pass_between(100, 1200)
        }
        scene.kill_nats();
    }
    scene.must_go_on("a");
    scene.finish()
}
