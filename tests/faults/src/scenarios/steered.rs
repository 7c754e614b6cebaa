//! Rows 39 to 41, which `reliability.md` does not have: producers of open runs, `forget` and `rebuild` are killed.

use std::fmt::Write;
use std::fs;

use tests::{Launch, SOON};

use crate::Plan;
use crate::scene::{Report, Scene, Setup, trapped};

const IDS: u64 = 10_000;
const BATCH: u64 = 50;

/// Killed at four moments, each time with a run of its own; the next start is given what was not published.
pub fn follower_killed(plan: Plan) -> Report {
    let places = [
        ("a", "follow-before-publish=kill@1", 0),
        ("b", "follow-after-publish=kill@2", 2 * BATCH),
        ("c", "follow-ended=kill@1", IDS),
        ("d", "follow-closed=kill@1", IDS),
    ];
    let mut scene = Scene::new(plan, &Setup::new("follower-killed"));
    for (run, trap, published) in places {
        let name = format!("produce-{run}");
        scene.expect_run(run, IDS);
        let launch = following(&scene, run, BATCH, &[(1, IDS), (published + 1, IDS)]);
        scene.serve(&name, trapped(launch, trap));
        scene.wait_sprung(&name, trap.split('=').next().unwrap_or(trap));
        let report = scene.wait_done(&name, SOON);
        assert_eq!((&report["ids"], &report["closed"]), (&IDS.into(), &true.into()), "{report}");
    }
    scene.keep_raw_rows();
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.finish()
}

/// One is stopped when it has seen that there is no end yet, and is about to store a batch; another ends the run; the first
/// wakes. Its batch is not in the run, and nothing computes it.
pub fn follower_wakes_after_the_end(plan: Plan) -> Report {
    const PLACE: &str = "follow-before-publish";
    let mut scene = Scene::new(plan, &Setup::new("follower-wakes"));
    scene.expect_run("a", IDS);
    // In its second life it has nothing to add, and is content with the end that it finds.
    let first = following(&scene, "a", BATCH, &[(1, 3 * BATCH), (1, 0)]);
    scene.serve("produce-1", trapped(first, &format!("{PLACE}=stop@3")));
    scene.wait_sprung("produce-1", PLACE);
    // Not the same batches: those would be the first one's, too.
    let second = following(&scene, "a", 2 * BATCH, &[(2 * BATCH + 1, IDS)]);
    scene.serve("produce-2", second);
    let report = scene.wait_done("produce-2", SOON);
    assert_eq!((&report["ids"], &report["closed"]), (&IDS.into(), &true.into()), "{report}");
    scene.keep_raw_rows();
    scene.start(&["work-1", "sink-1"]);
    scene.signal("produce-1", "CONT");
    scene.fault("produce-1 woken");
    let said =
        format!("failed to add {BATCH} ids and what follows to run `a`: another producer has closed it");
    scene.wait_log("produce-1", &said);
    scene.wait_done("produce-1", SOON);
    scene.finish()
}

/// Killed at four moments, each time with a run of its own, and finished by the same words; another run stays.
pub fn killed_in_forget(plan: Plan) -> Report {
    let places = [
        ("b", "forget-after-hiding"),
        ("c", "forget-after-messages"),
        ("d", "forget-after-rows"),
        ("e", "forget-in-records"),
    ];
    let mut scene = Scene::new(plan, &Setup::new("forget-killed"));
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.publish("a", IDS, BATCH as u32);
    for (run, place) in places {
        let ids = format!("1..={IDS}");
        scene.host.call(&["produce", "--ids", &ids, "--run", run]).expect(0);
        scene.wait_status(run, "the seal", |status| status["state"] == "sealed");
        let name = format!("forget-{run}");
        let launch = Launch::from(&["forget", run, "--json"][..]);
        scene.serve(&name, trapped(launch, &format!("{place}=kill@1")));
        scene.wait_sprung(&name, place);
        let seen = format!("SELECT count() FROM millstream.trial WHERE run = '{run}'");
        assert_eq!(scene.checker.number(&seen), 0, "readers of `{run}` after {place}");
        scene.wait_done(&name, SOON);
        assert_eq!(scene.checker.rows(run), 0, "rows of `{run}`");
        scene.host.call(&["status", run]).expect(1).says(&["find run"]);
    }
    scene.finish()
}

/// Killed with the rows inserted and before readers are told, each time with a run of its own, and finished by the same words.
pub fn killed_in_rebuild(plan: Plan) -> Report {
    let config = "sink.group_age = '200ms'\nstreams.keep_rows = '1d'\n";
    let mut scene = Scene::new(plan, &Setup { config, ..Setup::new("rebuild-killed") });
    scene.start(&["work-1", "work-2", "sink-1"]);
    for (run, place) in [("a", "rebuild-after-sink"), ("b", "rebuild-before-records")] {
        scene.publish(run, IDS, BATCH as u32);
        scene.wait_status(run, "the seal", |status| status["state"] == "sealed");
        for table in ["rows", "passes"] {
            scene.checker.ask(&format!(
                "ALTER TABLE millstream.trial_{table} DELETE WHERE run = '{run}' SETTINGS mutations_sync = 2"
            ));
        }
        let name = format!("rebuild-{run}");
        let launch = Launch::from(&["rebuild", run, "--json"][..]);
        scene.serve(&name, trapped(launch, &format!("{place}=kill@1")));
        scene.wait_sprung(&name, place);
        assert!(!scene.checker.is_sealed(run), "readers see `{run}` after {place}");
        let report = scene.wait_done(&name, SOON);
        assert_eq!(report["rows"], IDS, "{report}");
    }
    scene.finish()
}

/// `produce --stdin --follow`, each of whose lives reads ids of its own, from the first to the last.
fn following(scene: &Scene, run: &str, batch: u64, lives: &[(u64, u64)]) -> Launch {
    let name = format!("lines-{run}-{}", lives.len());
    for (life, (first, last)) in lives.iter().enumerate() {
        let mut lines = String::new();
        (*first..=*last).for_each(|id| writeln!(lines, "{id}").expect("a string takes all"));
        fs::write(scene.host.path().join(format!("{name}.{life}")), lines).expect("a file is written");
    }
    let batch = batch.to_string();
    let words = ["produce", "--stdin", "--follow", "--run", run, "--batch", &batch, "--json"];
    // The binary and its words are what the shell is given after this.
    let read_next = format!(
        "next=$(ls {name}.[0-9]* | head -n 1) && mv \"$next\" {name}.now && exec \"$0\" \"$@\" < {name}.now"
    );
    let under = ["sh", "-c", &read_next].map(str::to_owned).to_vec();
    Launch { under, ..Launch::from(&words[..]) }
}
