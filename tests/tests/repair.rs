//! What was lost or damaged after it was stored comes back: unattended where what is stored suffices, else with the same
//! input again.

use millstream::envelope::{RowBatch, encode_ids, encode_rows};
use serde_json::{Value, json};
use tests::nats::{Nats, from_base64, nats_info};
use tests::{Host, Process, SOON, Up, wait_until};

/// Ids of the runs here, 1 to this, in batches of a thousand.
const IDS: u64 = 10_000;
const PRODUCE: [&str; 7] = ["produce", "--ids", "1..=10000", "--run", "a", "--batch", "1000"];

/// Servers with a published run `a`.
struct Scene {
    host: Host,
    up: Up,
    nats: Nats,
}

impl Scene {
    fn new() -> Self {
        let scene = Self::empty();
        scene.host.call(&PRODUCE).expect(0);
        scene
    }

    fn empty() -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
        host.env.push(("TRIAL_TAME".into(), "1".into()));
        let up = host.up();
        host.call(&["setup"]).expect(0);
        let nats = Nats::connect(&up.nats);
        Self { host, up, nats }
    }

    /// A run that is sealed, with a worker and a sink that go on.
    fn sealed() -> (Self, [Process; 2]) {
        let scene = Self::new();
        let services = scene.services();
        scene.host.wait_sealed("a", SOON);
        (scene, services)
    }

    fn services(&self) -> [Process; 2] {
        [self.host.start("work", &["work"]), self.host.start("sink", &["sink"])]
    }

    /// Publishes as anybody may who has the right to.
    fn publish(&mut self, subject: &str, payload: &[u8]) {
        let answer = self.nats.request(subject, "", payload).payload;
        let answer: Value = serde_json::from_slice(&answer).expect("JSON");
        assert!(answer["seq"].is_u64(), "{answer}");
    }

    fn purge(&mut self, stream: &str, subject: &str) {
        let answer = self.nats.api(&format!("STREAM.PURGE.{stream}"), &json!({ "filter": subject }));
        assert_eq!(answer["purged"], 1, "{answer}");
    }

    fn delete_consumer(&mut self, stream: &str, name: &str) {
        let answer = self.nats.api(&format!("CONSUMER.DELETE.{stream}.{name}"), &json!({}));
        assert_eq!(answer["success"], true, "{answer}");
    }

    fn has_consumer(&mut self, stream: &str, name: &str) -> bool {
        self.nats.api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({}))["error"].is_null()
    }

    fn wait_stored(&self, rows: u64) {
        wait_until("rows", SOON, || match self.up.number("SELECT count() FROM millstream.trial_rows") {
            stored if stored >= rows => Ok(()),
            stored => Err(format!("{stored} of {rows}")),
        });
    }

    /// Rows that ClickHouse loses.
    fn lose(&self, rows: &str) {
        let statement =
            format!("ALTER TABLE millstream.trial_rows DELETE WHERE {rows} SETTINGS mutations_sync = 2");
        self.up.ask(&statement);
    }

    /// Every id has its one row, in what readers see and in what is stored.
    fn is_right(&self, ids: u64) {
        let squares = (1..=ids).map(|id| id * id).sum::<u64>();
        let all = "SELECT count(), uniqExact(id), sum(squared) FROM millstream.trial WHERE run = 'a'";
        assert_eq!(self.up.ask(all), format!("{ids}\t{ids}\t{squares}\n"));
        assert_eq!(self.up.number("SELECT count() FROM millstream.trial_rows"), ids, "raw rows");
        let report = self.host.call(&["verify", "a", "--json"]).expect(0).json();
        assert_eq!((&report["sealed"], &report["complete"]), (&true.into(), &true.into()), "{report}");
    }

    /// Sealed again after a repair, with nobody doing anything.
    fn wait_verified(&self) {
        wait_until("a new seal", SOON, || {
            let called = self.host.call(&["verify", "a", "--json"]);
            if called.code == 0 { Ok(()) } else { Err(format!("{}{}", called.stdout, self.host.log("sink"))) }
        });
    }

    /// Messages set aside: subject and what the headers and the payload say, in the server's own spelling.
    fn set_aside(&mut self) -> Vec<(String, String)> {
        let messages = self.nats.messages("trial_aside");
        (1..=messages)
            .map(|sequence| {
                let found = self.nats.api("STREAM.MSG.GET.trial_aside", &json!({ "seq": sequence }));
                let text = |name: &str| found["message"][name].as_str().expect("text").to_owned();
                let headers = String::from_utf8(from_base64(&text("hdrs"))).expect("text");
                let payload = String::from_utf8_lossy(&from_base64(&text("data"))).into_owned();
                (text("subject"), format!("{headers}{payload}"))
            })
            .collect()
    }

    /// The whole volume of NATS is gone, while everything goes on.
    fn wipe_nats(&mut self) {
        // The keeper is held, so that the server does not come back between the kill and the removal.
        self.up.process.signal("STOP");
        self.up.kill_nats();
        wait_until("the end of nats-server", SOON, || {
            let alive = self.up.pids("nats-server");
            if alive.is_empty() { Ok(()) } else { Err(format!("{alive:?}")) }
        });
        std::fs::remove_dir_all(self.host.path().join(".millstream/nats")).expect("a volume");
        self.up.process.signal("CONT");
        self.nats = wait_until("nats-server", SOON, || {
            nats_info(&self.up.nats).map_err(|error| error.to_string())?;
            Ok(Nats::connect(&self.up.nats))
        });
        let streams = wait_until("JetStream", SOON, || {
            let answer = self.nats.request("$JS.API.STREAM.NAMES", "", b"").payload;
            serde_json::from_slice::<Value>(&answer).map_err(|error| error.to_string())
        });
        assert_eq!(streams["total"], 0, "{streams}");
    }
}

#[test]
fn a_message_of_rows_that_cannot_be_read_is_set_aside_and_its_batch_computed_again() {
    let mut scene = Scene::new();
    for subject in ["trial.rows.a.1.3", "trial.rows.junk", "trial.rows.nobody.1.0"] {
        scene.publish(subject, format!("junk of {subject}").as_bytes());
    }
    let other = RowBatch {
        run: "a",
        pass: 1,
        batch: 5,
        batch_ids: 1000,
        from: 0,
        ids: 1000,
        first: "",
        last: "",
        dead: 0,
        raw_bytes: 0,
        schema: 0,
        columns: "",
        build: "",
        rows: b"",
    };
    scene.publish("trial.rows.a.1.6", &encode_rows(&other));
    let _services = scene.services();
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
    let kept = scene.set_aside();
    let subjects: Vec<&str> = kept.iter().map(|(subject, _)| subject.as_str()).collect();
    assert_eq!(
        subjects,
        [
            "trial.aside.rows.a.1.3",
            "trial.aside.rows.junk",
            "trial.aside.rows.nobody.1.0",
            "trial.aside.rows.a.1.6"
        ]
    );
    for part in [
        "Millstream-Subject: trial.rows.a.1.3\r\n",
        "Millstream-Stream: trial_rows\r\n",
        "Millstream-Sequence: 1\r\n",
        "Millstream-Fault: the message of 24 bytes does not begin with Millstream's magic number\r\n",
        "Millstream-By: sink on ",
        "Millstream-At-Ms: ",
        "\r\n\r\njunk of trial.rows.a.1.3",
    ] {
        assert!(kept[0].1.contains(part), "{part}: {}", kept[0].1);
    }
    scene.host.wait_log("sink", "the message is no batch, and is quarantined");
    let checks = scene.host.call(&["doctor", "--json"]).expect(0).json();
    let checks = checks["checks"].as_array().expect("a list").clone();
    let check = checks.iter().find(|check| check["what"] == "set aside").expect("a check");
    assert_eq!(check["found"], "4 messages that are no batch");
}

/// Junk, another batch's ids, and a subject that is no batch at all.
#[test]
fn ids_that_cannot_be_read_are_set_aside_and_come_back_with_the_same_input() {
    let mut scene = Scene::new();
    for batch in [4, 6] {
        scene.purge("trial_ids", &format!("trial.ids.a.{batch}"));
    }
    scene.publish("trial.ids.a.4", b"junk");
    let others: Vec<u64> = (5001..=6000).collect();
    scene.publish("trial.ids.a.6", &encode_ids("a", 5, &others));
    scene.publish("trial.ids.a.x", b"no number");
    let _services = scene.services();
    scene.wait_stored(8000);
    scene.host.wait_log("sink", "batches are missing whose ids are not in the stream");
    let mut subjects: Vec<String> = scene.set_aside().into_iter().map(|(subject, _)| subject).collect();
    subjects.sort();
    assert_eq!(subjects, ["trial.aside.ids.a.4", "trial.aside.ids.a.6", "trial.aside.ids.a.x"]);
    let report = scene.host.call(&["verify", "a", "--repair", "--json"]).expect(1).json();
    assert_eq!(report["missing"], json!([4, 6]), "{report}");
    assert_eq!(report["ids_damaged"], json!([4, 6]), "{report}");
    assert_eq!(report["repair"]["batches_again"], 0, "{report}");
    let hint = report["hint"].as_str().expect("a hint");
    assert!(hint.contains("`produce` with the same input"), "{hint}");
    let again = scene.host.call(&[&PRODUCE[..], &["--json"]].concat()).expect(0).json();
    assert_eq!((&again["batches_written"], &again["batches_found"]), (&2.into(), &8.into()), "{again}");
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

/// A message like any other, under a number that the run does not have: its rows are not the run's.
#[test]
fn a_batch_beyond_the_runs_last_is_removed_unattended() {
    let mut scene = Scene::new();
    scene.publish("trial.ids.a.10", &encode_ids("a", 10, &[1_000_001u64, 1_000_002]));
    let _services = scene.services();
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
    assert_eq!(scene.nats.messages("trial_ids"), 10);
}

#[test]
fn a_batch_purged_from_the_ids_comes_back_with_the_same_input() {
    let mut scene = Scene::new();
    scene.purge("trial_ids", "trial.ids.a.7");
    let _services = scene.services();
    scene.wait_stored(9000);
    let report = wait_until("everything at rest", SOON, || {
        let report = scene.host.call(&["verify", "a", "--repair", "--json"]).expect(1).json();
        if report["repair"]["busy"].is_null() { Ok(report) } else { Err(report.to_string()) }
    });
    assert_eq!((&report["missing"], &report["ids_gone"]), (&json!([7]), &json!([7])), "{report}");
    let again = scene.host.call(&[&PRODUCE[..], &["--json"]].concat()).expect(0).json();
    assert_eq!((&again["batches_written"], &again["batches_found"]), (&1.into(), &9.into()), "{again}");
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

/// The worker's ack says that they were stored; nobody inserted them. Several sinks see it at once.
#[test]
fn rows_purged_after_the_ack_are_computed_again_unattended() {
    let mut scene = Scene::new();
    let _work = scene.host.start("work", &["work"]);
    wait_until("rows of every batch", SOON, || match scene.nats.messages("trial_rows") {
        10 => Ok(()),
        found => Err(format!("{found} of 10")),
    });
    wait_until("every ack", SOON, || match scene.nats.consumer("trial_ids", "work-a-1") {
        consumer if consumer.open + consumer.pending == 0 => Ok(()),
        consumer => Err(format!("{consumer:?}")),
    });
    for batch in [2, 8] {
        scene.purge("trial_rows", &format!("trial.rows.a.1.{batch}"));
    }
    let _sinks = ["sink", "sink-2", "sink-3"].map(|name| scene.host.start(name, &["sink"]));
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

#[test]
fn deleted_consumers_come_back_unattended() {
    let mut scene = Scene::empty();
    scene.host.env.push(("TRIAL_MICROS".into(), "2000".into()));
    scene.host.call(&PRODUCE).expect(0);
    let _services = scene.services();
    scene.wait_stored(2000);
    scene.delete_consumer("trial_rows", "sink");
    scene.delete_consumer("trial_ids", "work-a-1");
    wait_until("both consumers", SOON, || {
        let found = [("trial_rows", "sink"), ("trial_ids", "work-a-1")]
            .map(|(stream, name)| scene.has_consumer(stream, name));
        if found == [true, true] { Ok(()) } else { Err(format!("{found:?}\n{}", scene.host.log("sink"))) }
    });
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

/// Reset beyond all there is, they deliver nothing any more.
#[test]
fn consumers_reset_past_their_messages_lose_nothing() {
    let mut scene = Scene::new();
    let reset = |scene: &mut Scene, stream: &str, name: &str, filter: &str| {
        scene.delete_consumer(stream, name);
        let config = json!({
            "durable_name": name, "filter_subject": filter, "ack_policy": "explicit", "ack_wait": 60_000_000_000u64,
            "max_deliver": -1, "deliver_policy": "new", "replay_policy": "instant",
        });
        let request = json!({ "stream_name": stream, "config": config });
        let answer = scene.nats.api(&format!("CONSUMER.DURABLE.CREATE.{stream}.{name}"), &request);
        assert!(answer["error"].is_null(), "{answer}");
    };
    let work = scene.host.start("work", &["work"]);
    wait_until("rows of every batch", SOON, || match scene.nats.messages("trial_rows") {
        10 => Ok(()),
        found => Err(format!("{found} of 10")),
    });
    drop(work);
    reset(&mut scene, "trial_rows", "sink", "trial.rows.>");
    reset(&mut scene, "trial_ids", "work-a-1", "trial.ids.a.*");
    let _services = scene.services();
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

/// Batch 9 waits for its ids, so the pass is not sealed while rows of others are lost.
#[test]
fn rows_lost_before_the_seal_are_computed_again() {
    let mut scene = Scene::new();
    scene.purge("trial_ids", "trial.ids.a.9");
    let _services = scene.services();
    scene.wait_stored(9000);
    scene.lose("batch = 1 OR batch = 5 AND id % 3 = 0");
    scene.host.call(&PRODUCE).expect(0);
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

#[test]
fn rows_lost_after_the_seal_are_computed_again() {
    let (scene, _services) = Scene::sealed();
    scene.lose("batch = 1 OR batch = 5 AND id % 3 = 0");
    let report = scene.host.call(&["verify", "a", "--repair", "--json"]).expect(1).json();
    assert_eq!((&report["missing"], &report["short"]), (&json!([1]), &json!([5])), "{report}");
    assert_eq!(report["repair"]["batches_again"], 2, "{report}");
    scene.wait_verified();
    scene.is_right(IDS);
}

/// All that a repair leaves which dies right after its claim: a running pass that lacks rows and has no consumer.
#[test]
fn a_repair_that_was_killed_is_finished_unattended() {
    let (mut scene, _services) = Scene::sealed();
    wait_until("the end of the seal", SOON, || match scene.has_consumer("trial_ids", "work-a-1") {
        true => Err("the consumer is there".into()),
        false => Ok(()),
    });
    scene.lose("batch IN (3, 4)");
    let claimed = json!({
        "run": "a", "pass": 1, "state": "running", "batch_ids": 1000, "started_ms": 1, "sealed": null,
    });
    scene.publish("$KV.trial_runs.pass.a.1", claimed.to_string().as_bytes());
    scene.wait_verified();
    scene.is_right(IDS);
}

/// What a sink leaves that was paused and woke: its insert once more, after the seal.
/// A repair that removed rows after another one had brought them back would lose them.
#[test]
fn a_pass_that_is_being_repaired_is_left_to_that_repair_until_it_must_be_dead() {
    let (mut scene, _services) = Scene::sealed();
    scene.lose("batch = 5");
    let subject = "$KV.trial_runs.pass.a.1";
    let found = scene.nats.api("STREAM.MSG.GET.KV_trial_runs", &json!({ "last_by_subj": subject }));
    let record = from_base64(found["message"]["data"].as_str().expect("a record"));
    let mut record: Value = serde_json::from_slice(&record).expect("JSON");
    // As a repair leaves it that dies right after its claim.
    (record["state"], record["sealed"], record["repair"]) = ("running".into(), Value::Null, 7.into());
    scene.publish(subject, record.to_string().as_bytes());
    let refused = scene.host.call(&["verify", "a", "--repair", "--json"]).json();
    assert_eq!(refused["repair"]["busy"], "another repair was faster", "{refused}");
    assert_eq!(refused["missing"], json!([5]), "{refused}");
    let seen = "cancel pass 1 of run `a`: readers see it, and it is only being repaired";
    scene.host.call(&["cancel", "a"]).expect(1).says(&[seen]);
    scene.wait_verified();
    scene.is_right(IDS);
}

#[test]
fn raw_duplicates_are_merged_away() {
    let (scene, _services) = Scene::sealed();
    scene
        .up
        .ask("ALTER TABLE millstream.trial_rows MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1");
    scene
        .up
        .ask("INSERT INTO millstream.trial_rows SELECT * FROM millstream.trial_rows WHERE batch IN (2, 3)");
    assert_eq!(scene.up.number("SELECT count() FROM millstream.trial_rows"), IDS + 2000);
    assert_eq!(scene.up.number("SELECT count() FROM millstream.trial"), IDS);
    let report = scene.host.call(&["verify", "a", "--repair", "--json"]).expect(0).json();
    assert_eq!(report["repair"]["duplicates_merged"], 2000, "{report}");
    scene.is_right(IDS);
}

/// More than can be named in one consumer's filter.
#[test]
fn thousands_of_missing_batches_are_repaired_in_one_call() {
    const MANY: u64 = 1200;
    let scene = Scene::empty();
    scene.host.call(&["produce", "--ids", "1..=1200", "--run", "a", "--batch", "1"]).expect(0);
    let _services = scene.services();
    scene.host.wait_sealed("a", SOON);
    scene.lose("batch >= 100");
    let report = scene.host.call(&["verify", "a", "--repair", "--json"]).expect(1).json();
    assert_eq!(report["missing_batches"], MANY - 100, "{report}");
    let repair = &report["repair"];
    assert_eq!((&repair["whole_run"], &repair["batches_again"]), (&true.into(), &MANY.into()), "{repair}");
    scene.wait_verified();
    scene.is_right(MANY);
}

#[test]
fn a_stream_of_ids_that_is_deleted_comes_back_with_the_same_input() {
    let mut scene = Scene::new();
    let answer = scene.nats.api("STREAM.DELETE.trial_ids", &json!({}));
    assert_eq!(answer["success"], true, "{answer}");
    let _services = scene.services();
    scene.host.wait_log("sink", "batches are missing whose ids are not in the stream");
    scene.host.call(&PRODUCE).expect(0);
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

/// A worker and a sink go on through it and are not touched.
#[test]
fn a_wiped_nats_volume_comes_back_with_the_same_input() {
    let (mut scene, _services) = Scene::sealed();
    let sealed_at = "SELECT toString(sealed_at) FROM millstream.trial_passes FINAL";
    let before = scene.up.ask(sealed_at);
    scene.wipe_nats();
    scene.host.call(&["verify", "a"]).expect(1).says(&[
        "which has forgotten it: ClickHouse has its record",
        "hint: `produce` with the same input (ids 1..=10000) and --run a brings it back",
    ]);
    // Other ids are not let in under its name.
    scene
        .host
        .call(&["produce", "--ids", "1..=9", "--run", "a"])
        .expect(1)
        .says(&["it was made of ids 1..=10000 in batches of 1000, not of ids 1..=9"]);
    // The size of a batch is the run's, whether it is said again or not.
    let again = scene.host.call(&[&PRODUCE[..5], &["--json"]].concat()).expect(0).json();
    assert_eq!(
        (&again["batches_written"], &again["repair"]["batches_again"]),
        (&10.into(), &0.into()),
        "{again}"
    );
    scene.is_right(IDS);
    assert_eq!(scene.up.ask(sealed_at), before, "what was proven is not computed again");
    // What is brought back serves: rows that are lost now are computed by the worker that was there all the time.
    scene.lose("batch = 3");
    scene.host.call(&["verify", "a", "--repair"]).expect(1);
    scene.wait_verified();
    scene.is_right(IDS);
}

#[test]
fn a_nats_volume_wiped_before_the_seal_costs_only_what_clickhouse_lacks() {
    let mut scene = Scene::empty();
    scene.host.env.push(("TRIAL_MICROS".into(), "1000".into()));
    scene.host.call(&PRODUCE).expect(0);
    let _services = scene.services();
    scene.wait_stored(2000);
    scene.wipe_nats();
    scene.host.call(&PRODUCE).expect(0);
    scene.host.wait_sealed("a", SOON);
    scene.is_right(IDS);
}

#[test]
fn a_nats_volume_wiped_in_mid_publish_comes_back_with_the_same_input() {
    let mut scene = Scene::empty();
    let words = ["produce", "--ids", "1..=20000", "--run", "a"];
    let mut produce = scene.host.start("produce", &[&words[..], &["--batch", "20"]].concat());
    let _services = scene.services();
    wait_until("batches published", SOON, || match scene.nats.messages("trial_ids") {
        0..50 => Err("fewer than 50".into()),
        _ => Ok(()),
    });
    produce.kill();
    scene.wipe_nats();
    let again = scene.host.call(&[&words[..], &["--json"]].concat()).expect(0).json();
    assert_eq!(again["batches"], 1000, "the batches are cut as before: {again}");
    scene.host.wait_sealed("a", SOON);
    scene.is_right(20_000);
}

/// A later build wrote it, and a later build will read it.
#[test]
fn a_message_of_a_newer_version_waits() {
    let mut scene = Scene::new();
    let mut newer = encode_ids("a", 3, &[1u64]);
    newer[2] = 9;
    scene.purge("trial_ids", "trial.ids.a.3");
    scene.publish("trial.ids.a.3", &newer);
    let _services = scene.services();
    scene.wait_stored(9000);
    scene.host.wait_log("work", "the message has format version 9, this build knows");
    assert_eq!(scene.nats.messages("trial_aside"), 0);
    let consumer = scene.nats.consumer("trial_ids", "work-a-1");
    assert_eq!((consumer.open, consumer.pending), (1, 0), "{consumer:?}");
    scene.host.call(&PRODUCE).expect(0);
}
