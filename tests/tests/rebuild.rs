//! Rows that a table has lost come back from the stream that keeps them, and nothing is computed.

use serde_json::{Value, json};
use tests::dice::Dice;
use tests::nats::Nats;
use tests::{Host, Process, SOON, Up, wait_until};

const IDS: u64 = 3000;

/// Two sealed passes of a run, the second over some ids, in a stream that keeps their rows. Nobody works any more.
struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    sink: Process,
    up: Up,
    host: Host,
}

impl Scene {
    /// With this in `millstream.toml`.
    fn configured(config: &str) -> Self {
        let host = Host::new(env!("CARGO_BIN_EXE_trial"));
        std::fs::write(host.path().join("millstream.toml"), config).expect("a file");
        let up = host.up();
        host.call(&["setup"]).expect(0);
        // This sink says otherwise; the stream decides.
        std::fs::write(host.path().join("millstream.toml"), "").expect("a file");
        let (mut work, sink) = (host.start("work", &["work"]), host.start("sink", &["sink"]));
        host.call(&["produce", "--ids", &format!("1..={IDS}"), "--run", "a", "--batch", "100"]).expect(0);
        host.wait_sealed("a", SOON);
        host.call(&["replay", "a", "--where", "status = 'dead' OR id < 50"]).expect(0);
        wait_until("a sealed pass", SOON, || {
            let status = host.status("a");
            let sealed = status["pass"] == 2 && status["state"] == "sealed";
            if sealed { Ok(()) } else { Err(status.to_string()) }
        });
        work.signal("TERM");
        work.wait(SOON);
        Self { sink, up, host }
    }

    fn kept() -> Self {
        Self::configured("[streams]\nkeep_rows = '1d'\n")
    }

    fn lose(&self, table: &str, rows: &str) {
        self.up.ask(&format!(
            "ALTER TABLE millstream.trial_{table} DELETE WHERE {rows} SETTINGS mutations_sync = 2"
        ));
    }

    fn rebuild(&self, words: &[&str]) -> Value {
        self.host.call(&[&["rebuild", "a", "--json"], words].concat()).expect(0).json()
    }

    /// What is stored of each pass, and what readers see.
    fn stored(&self, database: &str) -> String {
        let rows =
            format!("SELECT pass, status, id, squared, error, batch_ids FROM {database}.trial_rows FINAL");
        let passes = self.up.ask(&format!(
            "SELECT pass, count(), countIf(status = 'dead'), sum(sipHash64(id, squared, error, batch_ids)) FROM ({rows}) GROUP BY pass ORDER BY pass"
        ));
        let raw = self.up.ask(&format!("SELECT count() FROM {database}.trial_rows"));
        let seen = self.up.ask(&format!("SELECT count(), sum(sipHash64(id, squared)) FROM {database}.trial"));
        let sealed = self.up.ask(&format!(
            "SELECT pass, batches, ids, rows, dead, digest, repeated_ids, sealed_at FROM {database}.trial_passes FINAL ORDER BY pass"
        ));
        let runs = self.up.ask(&format!("SELECT * FROM {database}.trial_runs FINAL"));
        [passes, raw, seen, sealed, runs].concat()
    }
}

#[test]
fn an_empty_table_is_filled_again() {
    let scene = Scene::kept();
    let before = scene.stored("millstream");
    let doctor = scene.host.call(&["doctor"]).expect(0).stdout;
    assert!(doctor.contains("ids kept       for 30d; "), "{doctor}");
    assert!(doctor.contains("rows kept      for 1d; "), "{doctor}");
    assert!(doctor.contains("the configuration says until their pass is sealed"), "{doctor}");
    assert!(Nats::connect(&scene.up.nats).messages("trial_rows") >= 33, "the stream keeps rows");
    let inserted =
        |rebuilt: &Value| (rebuilt["rows"].clone(), rebuilt["inserted"].clone(), rebuilt["passes"].clone());
    assert_eq!(inserted(&scene.rebuild(&[])), (json!(IDS), json!(0), json!([])));

    scene.lose("rows", "1");
    assert_eq!(inserted(&scene.rebuild(&[])), (json!(IDS), json!(2 * IDS), json!([1, 2])));
    assert_eq!(scene.stored("millstream"), before);

    for table in ["rows", "passes", "runs"] {
        scene.lose(table, "1");
    }
    assert_eq!(inserted(&scene.rebuild(&["--pass", "1"])), (json!(IDS), json!(IDS), json!([1])));
    assert_eq!(inserted(&scene.rebuild(&[])), (json!(IDS), json!(IDS), json!([2])));
    assert_eq!(scene.stored("millstream"), before);
    // What is there in part is completed.
    scene.lose("rows", "id % 3 = 0 AND pass = 2");
    assert_eq!(scene.rebuild(&[])["inserted"], IDS / 3);
    assert_eq!(scene.stored("millstream"), before);

    // A new table, in a database that was not there.
    let restored = scene.host.call(&["rebuild", "a", "--database", "restored"]).expect(0);
    assert!(restored.stdout.contains("pass 2 of run `a` is whole"), "{}", restored.stdout);
    assert_eq!(scene.stored("restored"), before);
    let mut nats = Nats::connect(&scene.up.nats);
    assert_eq!(nats.api("CONSUMER.NAMES.trial_rows", &json!({}))["consumers"], json!(["sink"]));
    scene.host.call(&["rebuild", "a", "--pass", "3"]).expect(1).says(&["find pass 3", "there are 1, 2"]);
    scene.host.call(&["rebuild", "b"]).expect(1).says(&["find run `b`"]);
}

#[test]
fn rows_that_the_stream_lacks_are_told_with_the_reason() {
    let scene = Scene::kept();
    let purge = json!({ "filter": "trial.rows.a.1.7" });
    assert_eq!(Nats::connect(&scene.up.nats).api("STREAM.PURGE.trial_rows", &purge)["purged"], 1);
    scene.lose("rows", "1");
    let says = [
        "rebuild pass 1 of run `a`: 1 of its 30 batches lack rows that stream `trial_rows` does not hold",
        "it keeps rows for 1d",
        "hint: ",
    ];
    scene.host.call(&["rebuild", "a"]).expect(1).says(&says);
    // All others are there.
    assert_eq!(scene.up.number("SELECT count() FROM millstream.trial_rows WHERE pass = 1"), IDS - 100);
}

#[test]
fn rows_that_were_never_kept_are_told_with_the_reason() {
    let scene = Scene::configured("");
    // They go just after the seal.
    wait_until("no rows kept", SOON, || match Nats::connect(&scene.up.nats).messages("trial_rows") {
        0 => Ok(()),
        left => Err(format!("{left} messages")),
    });
    scene.lose("rows", "pass = 2 AND batch >= 3");
    let says = [
        "rebuild pass 2 of run `a`: 3 of its 30 batches lack rows",
        "it keeps rows until their pass is sealed, and no longer",
        "hint: `verify a --repair`",
    ];
    scene.host.call(&["rebuild", "a"]).expect(1).says(&says);
}

#[test]
fn a_rebuild_that_is_killed_is_done_by_the_same_words() {
    let mut scene = Scene::kept();
    scene.sink.signal("TERM");
    scene.sink.wait(SOON);
    let before = scene.stored("millstream");
    let mut dice = Dice::drawn("REBUILD_SEED");
    for _ in 0..3 {
        for table in ["rows", "passes"] {
            scene.lose(table, "1");
        }
        for _ in 0..3 {
            let mut rebuild = scene.host.start("rebuild", &["rebuild", "a"]);
            std::thread::sleep(dice.pause(1, 700));
            rebuild.kill();
            let seen = scene.up.ask("SELECT count() FROM millstream.trial");
            assert!(seen == "0\n" || seen == format!("{}\n", IDS - 9), "{seen}, seed {}", dice.seed);
        }
        scene.rebuild(&[]);
        assert_eq!(scene.stored("millstream"), before, "seed {}", dice.seed);
    }
}
