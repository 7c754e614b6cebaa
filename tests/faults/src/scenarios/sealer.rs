//! Row 35: whoever seals or repairs is killed on the way.

use serde_json::json;
use tests::nats::Nats;
use tests::{Launch, SOON};

use crate::Plan;
use crate::scene::{Report, Scene, Setup, trapped};

/// Killed at four moments, each time with a run of its own; views show each run once, and whole.
pub fn killed_in_seal(plan: Plan) -> Report {
    let places = [
        ("a", "seal-before-row"),
        ("b", "seal-after-row"),
        ("c", "seal-before-tidy"),
        ("d", "seal-after-tidy"),
    ];
    let mut scene = Scene::new(plan, &Setup::new("sealer-killed"));
    scene.start(&["work-1"]);
    for (at, (run, place)) in places.into_iter().enumerate() {
        scene.publish(run, 10_000, 500);
        // A killed sink counts as alive for a while, and the next one would leave it a turn.
        scene.wait_status(run, "no sink that counts as alive", |status| {
            let mut hosts = status["hosts"].as_array().into_iter().flatten();
            hosts.all(|host| host["role"] != "sink")
        });
        let name = format!("sink-{at}");
        scene.trap(&name, &format!("{place}=kill@1"));
        scene.wait_sprung(&name, place);
        let seen = scene.checker.number(&format!("SELECT count() FROM millstream.trial WHERE run = '{run}'"));
        let expected = if place == "seal-before-row" { 0 } else { 10_000 };
        assert_eq!(seen, expected, "readers of `{run}` after {place}");
        scene.wait_status(run, "the seal", |status| status["state"] == "sealed");
        // The next trap is for the next run: nothing is left to be tidied of this one.
        let consumer = format!("work-{run}-1");
        scene.wait("a tidy pass", SOON, |scene| {
            let found = Nats::connect(&scene.nats).api("CONSUMER.NAMES.trial_ids", &json!({}));
            let left = found["consumers"]
                .as_array()
                .is_some_and(|names| names.iter().any(|name| *name == consumer.as_str()));
            if left { Err(found.to_string()) } else { Ok(()) }
        });
        scene.dismiss("sink");
    }
    scene.start(&["sink-9"]);
    scene.finish()
}

/// Killed with the pass claimed, before and after the consumer of the missing batches is made; the repair is then asked
/// for again.
pub fn killed_in_repair(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("repair-killed"));
    scene.start(&["work-1"]);
    let places =
        [("a", "repair-after-claim"), ("b", "repair-before-consumer"), ("c", "repair-after-consumer")];
    for (run, place) in places {
        scene.publish(run, 10_000, 500);
        scene.start(&["sink-1"]);
        scene.wait_status(run, "the seal", |status| status["state"] == "sealed");
        // No sink repairs of its own accord before the command does.
        scene.dismiss("sink");
        scene.checker.ask(&format!(
            "ALTER TABLE millstream.trial_rows DELETE WHERE run = '{run}' AND batch IN (3, 4) SETTINGS mutations_sync = 2"
        ));
        let name = format!("verify-{run}");
        scene.serve(
            &name,
            trapped(Launch::from(&["verify", run, "--repair", "--json"][..]), &format!("{place}=kill@1")),
        );
        scene.wait_sprung(&name, place);
        scene.start(&["sink-2"]);
        scene.wait_done(&name, SOON * 2);
        scene.dismiss("sink");
    }
    scene.start(&["sink-1"]);
    scene.finish()
}
