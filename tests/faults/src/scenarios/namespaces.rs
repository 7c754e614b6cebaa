//! Row 48: one pipeline in two environments on the same servers, at once.

use tests::{Launch, SOON};

use crate::Plan;
use crate::checker::Submitted;
use crate::scene::{PATIENCE, Report, Scene, Setup, usual};
use crate::troubled::VARIABLE;

const STAGING: [&str; 2] = ["--namespace", "staging"];
/// Ids of staging's run, which has the name of production's.
const FEWER: u64 = 30_000;

/// A service of staging, whose build computes other values: what would be mixed is wrong there or here.
fn staged(mut launch: Launch) -> Launch {
    launch.words.extend(STAGING.map(str::to_owned));
    launch.env.push((VARIABLE.to_owned(), "shifted".to_owned()));
    launch
}

/// Workers and sinks of both are killed while both have a run of one name.
pub fn killed_in_both(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup { micros: 500, ..Setup::new("namespaces") });
    let checker = scene.checker.clone().of_database("millstream_staging", "squared = id * id + 1");
    let run = Submitted { run: "a".to_owned(), last: FEWER };
    scene.publish("a", FEWER + 10_000, 200);
    let ids = format!("1..={FEWER}");
    let words = ["produce", "--ids", &ids, "--run", "a", "--batch", "250", "--json"];
    scene.host.call_as(&staged(Launch::from(&words[..]))).expect(0);
    checker.keep_raw_rows();
    scene.start(&["work-1", "sink-1"]);
    for name in ["work-2", "sink-2"] {
        scene.serve(name, staged(usual(name)));
    }
    scene.wait_rows("a", 1_000);
    for name in ["work-2", "sink-1", "work-1", "sink-2"] {
        scene.pass_between(500, 2_500);
        scene.kill(name);
    }
    scene.must_go_on("a");
    assert!(!checker.is_sealed("a"), "staging's run was sealed before the last fault: make it larger");
    let mut report = scene.finish();
    scene.wait("the seal of staging's run", PATIENCE, |_| match checker.is_sealed("a") {
        true => Ok(()),
        false => Err(format!("{} rows", checker.rows("a"))),
    });
    report.found.add(checker.look(&run));
    let words = [&["verify", "a", "--values", "--json"][..], &STAGING].concat();
    let proof = scene.wait("the proof of staging's run", SOON, |scene| {
        let called = scene.host.call(&words);
        serde_json::from_str::<serde_json::Value>(&called.stdout).map_err(|_| called.stderr)
    });
    assert_eq!((&proof["complete"], &proof["ids"]), (&true.into(), &FEWER.into()), "{proof}");
    assert_eq!(proof["values_at_fault"], 0, "{proof}");
    report
}
