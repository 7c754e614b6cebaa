//! Row 49: ClickHouse takes what the sealer asks of it, and does nothing of it, until an operator lets it.

use crate::Plan;
use crate::scenarios::streams::{nats, purge};
use crate::scene::{PATIENCE, Report, Scene, Setup};

const IDS: u64 = 10_000;
const BATCH: u32 = 1000;
const TABLE: &str = "millstream.trial_rows";

/// Merges are stopped while raw duplicates lie in the table: the pass is not sealed with them, and says why.
pub fn stopped(plan: Plan) -> Report {
    let mut scene = nearly_done(plan, "merges-stopped");
    scene.checker.ask(&format!("SYSTEM STOP MERGES {TABLE}"));
    scene.checker.ask(&format!("INSERT INTO {TABLE} SELECT * FROM {TABLE} WHERE batch = 1"));
    let raw = scene.checker.raw_doubled("a");
    assert_eq!(raw, u64::from(BATCH), "raw duplicates");
    scene.fault(format!("merges are stopped with {raw} raw duplicates in the table"));
    let report = until_it_heals(scene, "SYSTEM START MERGES", &format!("SYSTEM START MERGES {TABLE}"));
    Report { raw_seen: raw, ..report }
}

/// An operator's mutation that throws stands before the sealer's own, which would remove a row of no batch.
pub fn mutation_stuck(plan: Plan) -> Report {
    let mut scene = nearly_done(plan, "mutation-stuck");
    scene.checker.ask(&format!(
        "ALTER TABLE {TABLE} DELETE WHERE throwIf(batch = 3, 'by hand') SETTINGS mutations_sync = 0"
    ));
    let failed = "SELECT count() FROM system.mutations WHERE table = 'trial_rows' AND NOT is_done \
                  AND latest_fail_reason LIKE '%by hand%'";
    scene.wait("a mutation that throws", PATIENCE, |scene| match scene.checker.number(failed) {
        0 => Err("it has not thrown yet".to_owned()),
        _ => Ok(()),
    });
    scene.checker.ask(&format!(
        "INSERT INTO {TABLE} SELECT * REPLACE (toUInt64(999999) AS id) FROM (SELECT * FROM {TABLE} WHERE id = 5001)"
    ));
    scene.fault("a mutation throws, and a row of no id lies in the table");
    until_it_heals(
        scene,
        "KILL MUTATION",
        "KILL MUTATION WHERE table = 'trial_rows' AND command LIKE '%by hand%'",
    )
}

/// Run `a`, all of which is stored but one batch, whose ids the stream does not have.
fn nearly_done(plan: Plan, name: &'static str) -> Scene {
    let mut scene = Scene::new(plan, &Setup::new(name));
    scene.publish("a", IDS, BATCH);
    purge(&mut nats(&scene), "trial_ids", "trial.ids.a.9");
    scene.start(&["work-1", "sink-1", "sink-2"]);
    scene.wait_rows("a", IDS - u64::from(BATCH));
    scene
}

/// Gives run `a` its last batch: it is not sealed, `status` and `verify` name what helps, another run is sealed meanwhile, and
/// sinks are killed. Then the operator does what helps.
fn until_it_heals(mut scene: Scene, named: &str, helps: &str) -> Report {
    scene.host.call(&["produce", "--ids", "1..=10000", "--run", "a", "--batch", "1000"]).expect(0);
    scene.wait_status("a", "what helps", |status| status["stuck"].to_string().contains(named));
    scene.publish("b", IDS, BATCH);
    scene.wait_status("b", "the seal of another run", |status| status["state"] == "sealed");
    let report = scene.host.call(&["verify", "a", "--json"]).expect(1).json();
    assert!(report["stuck"].to_string().contains(named), "`verify` does not say `{named}`: {report}");
    scene.fault(format!("`status` and `verify` say `{named}`, and run `b` is sealed"));
    scene.kill_all("sink");
    scene.must_go_on("a");
    scene.checker.ask(helps);
    scene.fault(format!("an operator says {helps}"));
    scene.finish()
}
