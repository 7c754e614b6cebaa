//! Rows 26, 27, 31 and 37: streams that lose what they held, and messages that are none of ours.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use tests::nats::Nats;

use crate::Plan;
use crate::scene::{Report, Scene, Setup};

/// Bytes that begin like no message of ours.
const JUNK: &[u8] = b"these bytes are not of this protocol";
/// Where the envelope has its version, and one that no build knows yet.
const VERSION_AT: usize = 2;
const NEWER: u8 = 99;

fn scene(plan: Plan, name: &'static str) -> Scene {
    let mut scene = Scene::new(plan, &Setup::new(name));
    scene.publish("a", 60_000, 500);
    scene
}

pub(super) fn nats(scene: &Scene) -> Nats {
    Nats::connect(&scene.nats)
}

pub(super) fn purge(nats: &mut Nats, stream: &str, subject: &str) {
    let answer = nats.api(&format!("STREAM.PURGE.{stream}"), &json!({ "filter": subject }));
    assert_eq!(answer["purged"], 1, "{subject}: {answer}");
}

/// Publishes into a stream as anyone could; the answer is the stream's.
pub(super) fn put(nats: &mut Nats, subject: &str, bytes: &[u8]) {
    let answer = nats.request(subject, "", bytes).payload;
    let answer: Value = serde_json::from_slice(&answer).expect("JSON");
    assert!(answer["seq"].is_u64(), "{subject}: {answer}");
}

/// The bytes of the last message under a subject.
pub(super) fn stored(nats: &mut Nats, stream: &str, subject: &str) -> Vec<u8> {
    let bytes = nats.request(&format!("$JS.API.DIRECT.GET.{stream}.{subject}"), "", b"").payload;
    assert!(!bytes.is_empty(), "nothing under {subject}");
    bytes
}

/// All of nats-server's data, in mid-run: the same input, given again, brings back what was not stored yet.
pub fn wiped(plan: Plan) -> Report {
    let mut scene = scene(plan, "nats-wiped");
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 5_000);
    scene.stop_stack();
    let store = scene.host.path().join(".millstream/nats");
    fs::remove_dir_all(&store).expect("the directory is removed");
    fs::create_dir(&store).expect("an empty one");
    scene.start_stack();
    scene.must_go_on("a");
    scene.fault("nats-server started on an empty directory");
    scene.host.call(&["produce", "--ids", "1..=60000", "--run", "a", "--batch", "500"]).expect(0);
    scene.finish()
}

/// The consumer from which workers draw.
pub fn work_consumer_deleted(plan: Plan) -> Report {
    consumer_deleted(plan, "trial_ids", "work-a-1")
}

/// The consumer that sinks share.
pub fn sink_consumer_deleted(plan: Plan) -> Report {
    consumer_deleted(plan, "trial_rows", "sink")
}

fn consumer_deleted(plan: Plan, stream: &str, name: &str) -> Report {
    let mut scene = scene(plan, "consumer-deleted");
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 5_000);
    let answer = nats(&scene).api(&format!("CONSUMER.DELETE.{stream}.{name}"), &json!({}));
    assert_eq!(answer["success"], true, "{answer}");
    scene.must_go_on("a");
    scene.fault(format!("consumer `{name}` deleted"));
    scene.finish()
}

/// Every batch is delivered once more, stored or not.
pub fn consumer_reset(plan: Plan) -> Report {
    let mut scene = scene(plan, "consumer-reset");
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 5_000);
    let mut nats = nats(&scene);
    let config = nats.api("CONSUMER.INFO.trial_ids.work-a-1", &json!({}))["config"].take();
    nats.api("CONSUMER.DELETE.trial_ids.work-a-1", &json!({}));
    let question = json!({ "stream_name": "trial_ids", "config": config });
    let answer = nats.api("CONSUMER.DURABLE.CREATE.trial_ids.work-a-1", &question);
    assert_eq!(answer["name"], "work-a-1", "{answer}");
    scene.must_go_on("a");
    scene.fault("consumer `work-a-1` begins anew");
    scene.finish()
}

/// Nothing is delivered until the pause is over.
pub fn consumer_paused(plan: Plan) -> Report {
    const PAUSED: Duration = Duration::from_secs(20);
    let mut scene = scene(plan, "consumer-paused");
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 5_000);
    let mut nats = nats(&scene);
    let long = json!({ "pause_until": "2199-01-01T00:00:00Z" });
    let answer = nats.api("CONSUMER.PAUSE.trial_ids.work-a-1", &long);
    assert_eq!(answer["paused"], true, "{answer}");
    scene.fault("consumer `work-a-1` paused");
    scene.pass(PAUSED);
    scene.must_go_on("a");
    nats.api("CONSUMER.PAUSE.trial_ids.work-a-1", &json!({}));
    scene.finish()
}

/// Ids of a batch that no worker has had yet: the same input, given again, brings them back.
pub fn ids_purged(plan: Plan) -> Report {
    let mut scene = scene(plan, "ids-purged");
    purge(&mut nats(&scene), "trial_ids", "trial.ids.a.100");
    scene.fault("the ids of batch 100 purged");
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_rows("a", 59_500);
    scene.must_go_on("a");
    scene.host.call(&["produce", "--ids", "1..=60000", "--run", "a", "--batch", "500"]).expect(0);
    scene.finish()
}

/// Rows of a batch that no sink has had yet: the batch is computed again.
pub fn rows_purged(plan: Plan) -> Report {
    let mut scene = scene(plan, "rows-purged");
    scene.start(&["work-1", "work-2"]);
    scene.wait_status("a", "all batches computed", |status| {
        status["in_flight"] == 0 && status["pending"] == 0
    });
    purge(&mut nats(&scene), "trial_rows", "trial.rows.a.1.7");
    scene.fault("the rows of batch 7 purged");
    scene.start(&["sink-1"]);
    scene.wait_rows("a", 59_500);
    scene.must_go_on("a");
    scene.finish()
}

/// Under subjects that belong to no batch, in both streams.
pub fn foreign(plan: Plan) -> Report {
    let mut scene = scene(plan, "foreign");
    let mut nats = nats(&scene);
    for subject in ["trial.ids.a.999999", "trial.ids.nobody", "trial.rows.a.1.999999", "trial.rows.x"] {
        put(&mut nats, subject, JUNK);
    }
    scene.start(&["work-1", "work-2", "sink-1"]);
    scene.wait_log("sink-1", "trial.rows.x");
    scene.fault("foreign messages in both streams");
    scene.finish()
}

/// In the place of a batch's rows, which no worker can then store.
pub fn rows_corrupt(plan: Plan) -> Report {
    let mut scene = scene(plan, "rows-corrupt");
    scene.start(&["work-1", "work-2"]);
    scene.wait_status("a", "all batches computed", |status| {
        status["in_flight"] == 0 && status["pending"] == 0
    });
    let (mut nats, subject) = (nats(&scene), "trial.rows.a.1.7");
    let mut bytes = stored(&mut nats, "trial_rows", subject);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    purge(&mut nats, "trial_rows", subject);
    put(&mut nats, subject, &bytes);
    scene.fault("a bit of the rows of batch 7 flipped");
    scene.start(&["sink-1"]);
    scene.wait_log("sink-1", subject);
    scene.finish()
}

/// In the place of a batch's ids: the same input, given again, brings them back.
pub fn ids_corrupt(plan: Plan) -> Report {
    let mut scene = scene(plan, "ids-corrupt");
    let (mut nats, subject) = (nats(&scene), "trial.ids.a.7");
    let mut bytes = stored(&mut nats, "trial_ids", subject);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    purge(&mut nats, "trial_ids", subject);
    put(&mut nats, subject, &bytes);
    scene.start(&["work-1", "sink-1"]);
    scene.wait_log("work-1", subject);
    scene.fault("a bit of the ids of batch 7 flipped, and a worker refuses them");
    scene.wait_rows("a", 59_500);
    scene.host.call(&["produce", "--ids", "1..=60000", "--run", "a", "--batch", "500"]).expect(0);
    scene.finish()
}

/// A batch's ids and another's rows are of a version that this build does not know: both wait, and nothing is lost.
pub fn newer_versions(plan: Plan) -> Report {
    let mut scene = scene(plan, "newer-versions");
    let mut nats = nats(&scene);
    let replace = |nats: &mut Nats, stream: &str, subject: &str, bytes: &[u8]| {
        purge(nats, stream, subject);
        put(nats, subject, bytes);
    };
    let (ids_subject, rows_subject) = ("trial.ids.a.7", "trial.rows.a.1.8");
    let ids = stored(&mut nats, "trial_ids", ids_subject);
    let newer = |bytes: &[u8]| {
        let mut newer = bytes.to_vec();
        newer[VERSION_AT] = NEWER;
        newer
    };
    replace(&mut nats, "trial_ids", ids_subject, &newer(&ids));
    scene.start(&["work-1", "work-2"]);
    scene.wait_status("a", "all other batches computed", |status| {
        status["pending"] == 0 && status["in_flight"] == 1
    });
    let rows = stored(&mut nats, "trial_rows", rows_subject);
    replace(&mut nats, "trial_rows", rows_subject, &newer(&rows));
    scene.start(&["sink-1"]);
    scene.wait_rows("a", 59_000);
    scene.wait_log("sink-1", &format!("version {NEWER}"));
    let refused =
        ["work-1", "work-2"].iter().any(|name| scene.host.log(name).contains(&format!("version {NEWER}")));
    assert!(refused, "no worker said that it does not know version {NEWER}");
    for (stream, subject, bytes) in [("trial_ids", ids_subject, &ids), ("trial_rows", rows_subject, &rows)] {
        let waiting = stored(&mut nats, stream, subject);
        assert_eq!(waiting, newer(bytes), "{subject} did not wait for a newer build");
    }
    scene.must_go_on("a");
    scene.fault(format!("ids and rows of version {NEWER} refused and kept"));
    // The newer build comes: for it they are what the others are for this one.
    replace(&mut nats, "trial_ids", ids_subject, &ids);
    replace(&mut nats, "trial_rows", rows_subject, &rows);
    scene.finish()
}
