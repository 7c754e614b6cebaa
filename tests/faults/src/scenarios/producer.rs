//! Rows 1 and 2: producers that are killed, and two of them at once.

use serde_json::Value;
use tests::SOON;
use tests::nats::stream_messages;

use crate::Plan;
use crate::scene::{Report, Scene, Setup, trapped};

const IDS: u64 = 20_000;
const BATCH: u32 = 50;
const BATCHES: u64 = IDS / BATCH as u64;

/// Killed at five moments, each time with a run of its own, and started again with the same words.
pub fn killed(plan: Plan) -> Report {
    let places = [
        ("a", "produce-after-record=kill@1"),
        ("b", "produce-before-publish=kill@100"),
        ("c", "produce-after-publish=kill@100"),
        ("d", "produce-before-close=kill@1"),
        ("e", "produce-after-close=kill@1"),
    ];
    let mut scene = Scene::new(plan, &Setup::new("producer-killed"));
    for (run, trap) in places {
        let name = format!("produce-{run}");
        let launch = trapped(scene.submission(run, IDS, BATCH), trap);
        scene.serve(&name, launch);
        scene.wait_sprung(&name, trap.split('=').next().unwrap_or(trap));
        let report = scene.wait_done(&name, SOON);
        assert_eq!(counted(&report, "batches"), BATCHES, "{report}");
        let found = counted(&report, "batches_found");
        assert_eq!(found + counted(&report, "batches_written"), BATCHES, "{report}");
        scene.note(format!("{run}: the second start found {found} of {BATCHES} batches"));
        assert_eq!(found > 0, !trap.contains("after-record"), "{report}");
    }
    assert_eq!(stream_messages(&scene.nats, "trial_ids"), BATCHES * places.len() as u64);
    scene.keep_raw_rows();
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.finish()
}

/// Two that publish the same ids under the same name: one set of batches.
pub fn twice_at_once(plan: Plan) -> Report {
    // Enough that neither is done before both are seen.
    const IDS: u64 = 200_000;
    const BATCHES: u64 = IDS / BATCH as u64;
    let mut scene = Scene::new(plan, &Setup::new("producer-twice"));
    let launch = scene.submission("a", IDS, BATCH);
    let names = ["produce-1", "produce-2"];
    names.iter().for_each(|name| scene.serve(name, launch.clone()));
    let found =
        scene.wait("a run half published", SOON, |scene| match stream_messages(&scene.nats, "trial_ids") {
            found if found > BATCHES / 4 => Ok(found),
            found => Err(format!("{found} batches")),
        });
    scene.tend();
    assert!(
        found < BATCHES && scene.pids().iter().all(|(_, pid)| is_running(*pid)),
        "they are done too soon"
    );
    let reports = names.map(|name| scene.wait_done(name, SOON));
    // Whoever is a little ahead may win every batch.
    let written = reports.each_ref().map(|report| counted(report, "batches_written"));
    let found = reports.each_ref().map(|report| counted(report, "batches_found"));
    assert_eq!((written.iter().sum::<u64>(), found.iter().sum::<u64>()), (BATCHES, BATCHES), "{reports:?}");
    assert_eq!(stream_messages(&scene.nats, "trial_ids"), BATCHES);
    scene.fault(format!("two producers stored {written:?} of {BATCHES} batches, and found {found:?}"));
    scene.keep_raw_rows();
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.finish()
}

fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

fn counted(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("no `{key}` in {report}"))
}
