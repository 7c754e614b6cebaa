//! A run, or one pass of it, that is forgotten: nothing of it stays anywhere, and what is not meant stays as it is.

use serde_json::{Value, json};
use tests::dice::Dice;
use tests::nats::Nats;
use tests::{Host, Process, SOON, Up, wait_until};

const IDS: u64 = 3000;

struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    work: Process,
    _sink: Process,
    up: Up,
    host: Host,
}

impl Scene {
    /// Two sealed runs: `a` of two passes, and `b`, which stays.
    fn new() -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
        host.env.push(("TRIAL_TAME".into(), "1".into()));
        let up = host.up();
        let scene =
            Self { work: host.start("work", &["work"]), _sink: host.start("sink", &["sink"]), up, host };
        for run in ["a", "b"] {
            scene.produce(run);
            scene.host.wait_sealed(run, SOON);
        }
        scene.replay(&["--batches", "0..3"], 2);
        scene
    }

    fn produce(&self, run: &str) {
        let ids = format!("1..={IDS}");
        self.host.call(&["produce", "--ids", &ids, "--run", run, "--batch", "100"]).expect(0);
    }

    fn replay(&self, words: &[&str], pass: u64) {
        self.host.call(&[&["replay", "a"], words].concat()).expect(0);
        wait_until("a sealed pass", SOON, || {
            let status = self.host.status("a");
            let sealed = status["pass"] == pass && status["state"] == "sealed";
            if sealed { Ok(()) } else { Err(status.to_string()) }
        });
    }

    /// Rows of each pass of a run, in all parts.
    fn rows(&self, run: &str) -> String {
        let each = "SELECT pass, count() AS rows FROM millstream.trial_rows WHERE run";
        self.up
            .ask(&format!(
                "SELECT groupArray((pass, rows)) FROM ({each} = '{run}' GROUP BY pass ORDER BY pass)"
            ))
            .trim()
            .to_owned()
    }

    /// Everything that is kept of `a`: rows, records in ClickHouse, messages, consumers.
    fn traces(&self) -> Value {
        let mut nats = Nats::connect(&self.up.nats);
        let messages = ["trial_ids", "trial_rows", "trial_aside"].map(|stream| {
            let found = nats.api(&format!("STREAM.INFO.{stream}"), &json!({ "subjects_filter": ">" }));
            let subjects = found["state"]["subjects"].as_object().cloned().unwrap_or_default();
            subjects.keys().filter(|subject| subject.split('.').any(|token| token == "a")).count()
        });
        let consumers = nats.api("CONSUMER.NAMES.trial_ids", &json!({}))["consumers"].clone();
        let consumers = consumers.as_array().cloned().unwrap_or_default();
        let rows = |table: &str| {
            self.up.number(&format!("SELECT count() FROM millstream.trial_{table} WHERE run = 'a'"))
        };
        json!({
            "rows": rows("rows"), "passes": rows("passes"), "runs": rows("runs"), "messages": messages,
            "consumers": consumers.iter().filter(|name| name.as_str().is_some_and(|name| name.starts_with("work-a-"))).count(),
        })
    }

    fn wait_forgotten(&self) {
        let nothing = json!({ "rows": 0, "passes": 0, "runs": 0, "messages": [0, 0, 0], "consumers": 0 });
        assert_eq!(self.traces(), nothing);
        self.host.call(&["status", "a"]).expect(1).says(&["find run `a`"]);
        let b = "SELECT count(), uniqExact(id) FROM millstream.trial WHERE run = 'b'";
        assert_eq!(self.up.ask(b), format!("{IDS}\t{IDS}\n"));
        self.host.call(&["verify", "b"]).expect(0);
    }
}

#[test]
fn a_pass_is_forgotten_once_readers_see_a_newer_one() {
    let scene = Scene::new();
    let forget = |pass: &str| scene.host.call(&["forget", "a", "--pass", pass, "--json"]);
    forget("2").expect(1).says(&["it is the one that readers see", "hint: "]);
    forget("7").expect(1).says(&["find pass 7 of run `a`: there are 1, 2"]);
    let forgotten = forget("1").expect(0).json();
    assert_eq!((&forgotten["rows"], &forgotten["passes"]), (&IDS.into(), &json!([1])), "{forgotten}");
    assert_eq!(scene.rows("a"), format!("[(2,{IDS})]"));
    forget("1").expect(1).says(&["there is pass 2"]);
    // The same words as ever do not bring it back, and no number is given twice.
    scene.produce("a");
    assert_eq!(scene.host.status("a")["pass"], 2);
    scene.host.call(&["verify", "a"]).expect(0);
    scene.replay(&["--where", "id < 10"], 3);
    forget("2").expect(0);
    scene.replay(&[], 4);
    assert_eq!(scene.rows("a"), format!("[(3,{IDS}),(4,{IDS})]"));
    assert_eq!(scene.rows("b"), format!("[(1,{IDS})]"));
}

#[test]
fn a_run_is_forgotten_everywhere_and_its_name_is_free() {
    let mut scene = Scene::new();
    scene.work.signal("TERM");
    scene.work.wait(SOON);
    scene.host.call(&["replay", "a"]).expect(0);
    scene.host.call(&["forget", "a"]).expect(1).says(&["pass 3 of run `a`: it is running", "hint: "]);
    scene.host.call(&["forget", "a", "--pass", "3"]).expect(1).says(&["it is running"]);
    scene.host.call(&["cancel", "a"]).expect(0);
    scene.host.call(&["forget", "a", "--pass", "3"]).expect(0);
    scene.work = scene.host.start("work", &["work"]);
    let called = scene.host.call(&["forget", "a", "--json"]).expect(0).json();
    assert_eq!((&called["rows"], &called["passes"]), (&(2 * IDS).into(), &json!([1, 2])), "{called}");
    // 30 batches, and 3 of the pass over some.
    assert_eq!(called["ids_messages"], 33, "{called}");
    assert!(called["row_bytes"].as_u64() > Some(0), "{called}");
    scene.wait_forgotten();
    scene.host.call(&["forget", "a"]).expect(1).says(&["find run `a`", "hint: there are `b`"]);

    scene.host.call(&["produce", "--ids", "5..=9", "--run", "a"]).expect(0);
    scene.host.wait_sealed("a", SOON);
    scene.host.call(&["verify", "a"]).expect(0);
    assert_eq!(scene.rows("a"), "[(1,5)]");
}

#[test]
fn a_forget_that_is_killed_is_finished_by_the_same_words() {
    let scene = Scene::new();
    let mut dice = Dice::drawn("FORGET_SEED");
    for _ in 0..5 {
        let mut forget = scene.host.start("forget", &["forget", "a"]);
        std::thread::sleep(dice.pause(1, 500));
        forget.kill();
        // What is half gone is never seen in part.
        let seen = scene.up.number("SELECT count() FROM millstream.trial WHERE run = 'a'");
        assert!(seen == 0 || seen == IDS, "{seen} rows, seed {}", dice.seed);
    }
    let called = scene.host.call(&["forget", "a"]);
    assert!(called.code == 0 || called.stderr.contains("find run `a`"), "{called:?}, seed {}", dice.seed);
    scene.wait_forgotten();
}
