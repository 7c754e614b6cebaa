//! The sealer waits for no pass while it could look after another, proves nothing in vain, looks at effects and not at answers,
//! and finishes what another sealer began (**success-is-looked-at**).

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::nats::Nats;
use tests::{Host, Process, SOON, Up, wait_until};

const IDS: u64 = 10_000;
/// A step is named as stuck only after it was looked at for a while.
const NAMED: Duration = Duration::from_secs(120);

struct Scene {
    services: Vec<Process>,
    up: Up,
    host: Host,
}

impl Scene {
    fn new(config: &str) -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
        host.env.push(("TRIAL_TAME".into(), "1".into()));
        host.env.push(("MILLSTREAM_LOG".into(), "info,millstream_engine::seal=debug".into()));
        std::fs::write(host.path().join("millstream.toml"), config).expect("written");
        let up = host.up();
        host.call(&["setup"]).expect(0);
        Self { services: Vec::new(), up, host }
    }

    fn start(&mut self, services: &[&str]) {
        self.services.extend(services.iter().map(|name| self.host.start(name, &[name])));
    }

    fn produce(&self, run: &str) {
        self.host.call(&["produce", "--ids", "1..=10000", "--run", run, "--batch", "1000"]).expect(0);
    }

    fn sealed(run: &str) -> Self {
        let mut scene = Self::new("");
        scene.produce(run);
        scene.start(&["work", "sink"]);
        scene.host.wait_sealed(run, SOON);
        scene
    }

    /// All batches of run `a` are stored but the last, whose ids wait for the same words again.
    fn nearly_done() -> Self {
        let mut scene = Self::new("");
        scene.produce("a");
        scene.purge("trial_ids", "trial.ids.a.9");
        scene.start(&["work", "sink"]);
        wait_until("nine batches", SOON, || match scene.rows() {
            9000 => Ok(()),
            rows => Err(format!("{rows} of 9000")),
        });
        scene
    }

    fn purge(&self, stream: &str, subject: &str) {
        let mut nats = Nats::connect(&self.up.nats);
        let answer = nats.api(&format!("STREAM.PURGE.{stream}"), &json!({ "filter": subject }));
        assert!(answer["purged"].as_u64() > Some(0), "{answer}");
    }

    fn rows(&self) -> u64 {
        self.up.number("SELECT count() FROM millstream.trial_rows WHERE run = 'a'")
    }

    /// Waits until `status` says what keeps the run from its seal.
    fn wait_stuck(&self, run: &str, part: &str) {
        wait_until(&format!("`{part}` in `status`"), NAMED, || {
            let status = self.host.status(run);
            if status["stuck"].to_string().contains(part) { Ok(()) } else { Err(status.to_string()) }
        });
    }
}

/// The reason was in the sink's log only; `status` said "at its end" for ever.
#[test]
fn merges_that_are_stopped_are_named_and_hold_no_other_run_up() {
    let scene = Scene::nearly_done();
    scene.up.ask("SYSTEM STOP MERGES millstream.trial_rows");
    scene.up.ask("INSERT INTO millstream.trial_rows SELECT * FROM millstream.trial_rows WHERE batch = 1");
    scene.produce("a");
    let helps = "SYSTEM START MERGES `millstream`.`trial_rows`";
    scene.wait_stuck("a", helps);
    scene.produce("b");
    scene.host.wait_sealed("b", SOON);
    let told = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(told.contains("stuck") && told.contains(helps), "{told}");
    let check = scene.host.check("seals waiting");
    assert!(check["found"].to_string().contains(helps) && check["verdict"] == "warn", "{check}");
    let report = scene.host.call(&["verify", "a", "--json"]).expect(1).json();
    assert!(report["stuck"].to_string().contains(helps), "{report}");
    // What a repair did is what came of it.
    scene.host.call(&["verify", "a", "--repair"]).expect(1).says(&["are stored a second time still", helps]);
    scene.up.ask("SYSTEM START MERGES millstream.trial_rows");
    scene.host.wait_sealed("a", NAMED);
    assert_eq!(scene.rows(), IDS);
    assert_eq!(scene.host.status("a")["stuck"], json!([]));
}

/// The repair of a wrong batch waits for a mutation that nothing works on: for an hour, and all runs with it.
#[test]
fn a_mutation_that_waits_holds_up_neither_other_runs_nor_the_end_of_the_sink() {
    let mut scene = Scene::nearly_done();
    scene.up.ask("SYSTEM STOP MERGES millstream.trial_rows");
    scene.up.ask(
        "INSERT INTO millstream.trial_rows SELECT * REPLACE (toUInt64(999999) AS id) \
         FROM (SELECT * FROM millstream.trial_rows WHERE id = 5001)",
    );
    scene.produce("a");
    wait_until("a mutation", SOON, || {
        match scene
            .up
            .number("SELECT count() FROM system.mutations WHERE table = 'trial_rows' AND NOT is_done")
        {
            0 => Err(scene.host.log("sink")),
            _ => Ok(()),
        }
    });
    scene.produce("b");
    scene.host.wait_sealed("b", SOON);
    scene.wait_stuck("a", "SYSTEM START MERGES");
    let mut sink = scene.services.pop().expect("the sink");
    sink.signal("TERM");
    assert!(sink.wait(SOON).success(), "{}", scene.host.log("sink"));
    scene.up.ask("SYSTEM START MERGES millstream.trial_rows");
    scene.start(&["sink"]);
    scene.host.wait_sealed("a", NAMED);
    assert_eq!(scene.rows(), IDS);
}

/// It was refused in a second, and its text cut off just before the words that help; `doctor` said ok.
#[test]
fn a_mutation_that_cannot_end_is_named_with_the_statement_that_ends_it() {
    let scene = Scene::sealed("a");
    scene.up.ask(
        "ALTER TABLE millstream.trial_rows DELETE WHERE throwIf(batch = 3, 'by hand') SETTINGS mutations_sync = 0",
    );
    let reason = "SELECT latest_fail_reason FROM system.mutations WHERE table = 'trial_rows' AND NOT is_done";
    wait_until("a failed mutation", SOON, || match scene.up.ask(reason).contains("by hand") {
        true => Ok(()),
        false => Err(scene.up.ask(reason)),
    });
    let helps = "KILL MUTATION WHERE database = 'millstream' AND table = 'trial_rows' AND mutation_id = ";
    scene.host.call(&["forget", "a"]).expect(1).says(&[helps, "by hand"]);
    let check = scene.host.check("mutations");
    assert!(check["found"].to_string().contains(helps) && check["verdict"] == "warn", "{check}");
    // Readers see it no more, and it is no run that a repair could bring back.
    let told = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(
        told.contains("a `forget` has begun and not ended") && told.contains("`forget a` finishes it"),
        "{told}"
    );
    assert!(told.contains(helps), "{told}");
    let report = scene.host.call(&["verify", "a", "--repair", "--json"]).expect(1).json();
    assert_eq!((&report["forgetting"], &report["hint"]), (&true.into(), &"forget a".into()), "{report}");
    assert_eq!(report["repair"]["batches_again"], 0, "{report}");
    scene.up.ask(
        "KILL MUTATION WHERE database = 'millstream' AND table = 'trial_rows' AND command LIKE '%by hand%'",
    );
    scene.host.call(&["forget", "a"]).expect(0);
    assert_eq!(scene.rows(), 0);
    scene.host.call(&["status", "a"]).expect(1).says(&["find run `a`"]);
}

/// What a sealer leaves that dies right after its seal, or whose answer was lost: its pass was never announced, and its consumer
/// stayed for ever.
#[test]
fn a_seal_that_one_sealer_left_half_done_is_finished_by_the_next() {
    let mut scene = Scene::sealed("a");
    let mut nats = Nats::connect(&scene.up.nats);
    let wait_freed = |nats: &mut Nats| {
        wait_until("the end of the consumer", SOON, || {
            let info = nats.api("CONSUMER.INFO.trial_ids.work-a-1", &json!({}));
            if info["error"].is_null() { Err("the consumer is there".to_owned()) } else { Ok(()) }
        });
    };
    wait_freed(&mut nats);
    scene.services.clear();
    let get = json!({ "last_by_subj": "$KV.trial_runs.pass.a.1" });
    let mut record = || {
        let found = nats.api("STREAM.MSG.GET.KV_trial_runs", &get)["message"]["data"]
            .as_str()
            .expect("data")
            .to_owned();
        serde_json::from_slice::<Value>(&tests::nats::from_base64(&found)).expect("JSON")
    };
    let mut left = wait_until("the record's last word", SOON, || match record() {
        found if found["freed"] == true => Ok(found),
        found => Err(found.to_string()),
    });
    left["freed"] = false.into();
    nats.request("$KV.trial_runs.pass.a.1", "", left.to_string().as_bytes());
    let config =
        json!({ "durable_name": "work-a-1", "filter_subject": "trial.ids.a.*", "ack_policy": "explicit" });
    let request = json!({ "stream_name": "trial_ids", "config": config });
    let made = nats.api("CONSUMER.DURABLE.CREATE.trial_ids.work-a-1", &request);
    assert!(made["error"].is_null(), "{made}");
    let mut ear = Nats::connect(&scene.up.nats);
    ear.listen("trial.sealed.>");
    scene.start(&["sink"]);
    let (subject, event) = ear.heard();
    let event: Value = serde_json::from_slice(&event).expect("JSON");
    assert_eq!((subject.as_str(), &event["ids"]), ("trial.sealed.a.1", &IDS.into()), "{event}");
    wait_freed(&mut nats);
    scene.host.call(&["verify", "a"]).expect(0);
}

/// Each proof reads all rows: at 10^9 ids nine were made while sinks were half behind, in competition with their inserts. The
/// view makes each INSERT last three seconds, half a minute in all.
#[test]
fn nothing_is_proven_while_sinks_have_rows_to_store() {
    let mut scene = Scene::new("[sink]\ngroup_rows = 500\ninserts = 2\n");
    scene.up.ask("CREATE TABLE millstream.slow (id UInt64, slept UInt8) ENGINE = MergeTree ORDER BY id");
    scene.up.ask(
        "CREATE MATERIALIZED VIEW millstream.slowly TO millstream.slow AS \
         SELECT id, sleepEachRow(0.005) AS slept FROM millstream.trial_rows",
    );
    scene.host.call(&["produce", "--ids", "1..=10000", "--run", "a", "--batch", "500"]).expect(0);
    scene.start(&["work", "sink"]);
    scene.host.wait_sealed("a", Duration::from_secs(240));
    let log = scene.host.log("sink");
    let proofs = log.lines().filter(|line| line.contains("proving")).count();
    assert_eq!(proofs, 1, "{log}");
    assert!(
        !log.contains("proof failed: stored rows do not match the run")
            && !log.contains("raw duplicates found"),
        "{log}"
    );
}

/// `status` said "1,000 of 1,000 stored".
#[test]
fn rows_that_were_removed_from_a_sealed_run_are_told_with_the_command_that_helps() {
    let scene = Scene::sealed("a");
    let told = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(told.contains("sealed, proven at 20") && !told.contains("changed"), "{told}");
    scene.up.ask("ALTER TABLE millstream.trial_rows DELETE WHERE batch = 1 SETTINGS mutations_sync = 2");
    let status = scene.host.status("a");
    assert_eq!((&status["done"], &status["rows_sealed"]), (&9000.into(), &IDS.into()), "{status}");
    let told = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(told.contains("9,000 rows are stored, the seal counted 10,000"), "{told}");
    assert!(told.contains("verify a --repair"), "{told}");
    let told = scene.host.call(&["verify", "a"]).expect(1).stdout;
    assert!(
        told.contains("NOT complete any more") && told.contains("sealed           with 10,000 rows at 20"),
        "{told}"
    );
}

/// It was "at its end" for as long as the operator looked nowhere else.
#[test]
fn a_run_whose_ids_are_gone_is_not_at_its_end() {
    let scene = Scene::nearly_done();
    wait_until("the verdict", NAMED, || {
        let status = scene.host.status("a");
        let verdict = &status["verdict"];
        let is_told = verdict["bottleneck"] == "missing"
            && verdict["text"].to_string().contains("1000 ids have no row")
            && status["stuck"].to_string().contains("`produce` with the same input");
        if is_told { Ok(()) } else { Err(status.to_string()) }
    });
}

/// `status` said of an hour's soak, twice, that ids had no row: a killed sink had drawn them, and they came again.
#[test]
fn rows_that_a_sink_took_with_it_are_not_missing() {
    let mut scene = Scene::new("");
    scene.produce("a");
    scene.start(&["work"]);
    let mut nats = Nats::connect(&scene.up.nats);
    wait_until("rows of every batch", SOON, || match nats.messages("trial_rows") {
        10 => Ok(()),
        found => Err(format!("{found} messages")),
    });
    while nats.pull("trial_rows", "sink").is_some() {}
    assert_eq!(nats.consumer("trial_rows", "sink").open, 10);
    // After this long it is known that no sink inserts them.
    let settled = Instant::now() + Duration::from_secs(20);
    while Instant::now() < settled {
        let status = scene.host.status("a");
        assert_eq!(status["missing"], 0, "{status}");
        std::thread::sleep(Duration::from_secs(1));
    }
    // Once they are lost in truth, it says so.
    nats.api("CONSUMER.DELETE.trial_rows.sink", &json!({}));
    scene.purge("trial_rows", "trial.rows.>");
    wait_until("ids without rows", SOON, || {
        let status = scene.host.status("a");
        if status["missing"] == IDS { Ok(()) } else { Err(status.to_string()) }
    });
}

/// "There are no runs yet", said every command, with ten thousand rows in the table.
#[test]
fn runs_that_nats_has_lost_are_named() {
    let scene = Scene::sealed("a");
    scene.purge("KV_trial_runs", "$KV.trial_runs.*.a");
    scene.purge("KV_trial_runs", "$KV.trial_runs.pass.a.*");
    let told = scene.host.call(&["runs"]).expect(0).stdout;
    assert!(
        told.contains("ClickHouse keeps 1 of them (`a`)") && told.contains("`produce` with the same input"),
        "{told}"
    );
    scene.host.call(&["status"]).expect(1).says(&["ClickHouse keeps 1 of them (`a`)"]);
}

/// Each open run cost four questions five times a second, whether anything had happened or not.
#[test]
fn open_runs_cost_their_changes_alone() {
    // More by hand: `OPEN_RUNS=1000`.
    let runs: usize = std::env::var("OPEN_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(150);
    let mut scene = Scene::new("");
    let mut nats = Nats::connect(&scene.up.nats);
    for number in 0..runs {
        let run = format!("open-{number}");
        let record = json!({
            "run": run, "source": "open", "fingerprint": "", "batch_ids": 10, "expected_ids": null, "may_repeat": true,
            "created_ms": 1_700_000_000_000u64, "published": null,
        });
        let pass = json!({ "run": run, "pass": 1, "state": "running", "batch_ids": 10, "started_ms": 0, "sealed": null });
        nats.request(&format!("$KV.trial_runs.run.{run}"), "", record.to_string().as_bytes());
        nats.request(&format!("$KV.trial_runs.pass.{run}.1"), "", pass.to_string().as_bytes());
    }
    scene.start(&["sink"]);
    wait_until("a consumer of each run", SOON, || {
        let found = nats.api("CONSUMER.NAMES.trial_ids", &json!({}))["total"].as_u64();
        if found == Some(runs as u64) {
            Ok(())
        } else {
            Err(format!("{found:?}\n{}", scene.host.log("sink")))
        }
    });
    let mut ear = Nats::connect(&scene.up.nats);
    ear.listen("$JS.API.>");
    // However long it really takes: so many questions of a list are asked meanwhile, and all others are counted beside them.
    let (mut lists, mut others) = (0, 0);
    while lists < 15 {
        match ear.heard().0 {
            subject if subject.contains("CONSUMER.LIST") => lists += 1,
            _ => others += 1,
        }
    }
    assert!(others < runs * 2, "{others} questions beside {lists} of the list");
}

/// What a `run` leaves that is killed while it reclaims: every batch that takes longer would be delivered again while it is
/// computed.
#[test]
fn a_wait_for_acks_that_was_left_short_is_set_right() {
    let mut scene = Scene::new("");
    scene.produce("a");
    let mut nats = Nats::connect(&scene.up.nats);
    let consumers = [("trial_rows", "sink", 120u64), ("trial_ids", "work-a-1", 60)];
    for (stream, name, _) in consumers {
        nats.set_ack_wait(stream, name, Duration::from_millis(500));
    }
    scene.start(&["sink"]);
    for (stream, name, seconds) in consumers {
        wait_until(name, SOON, || {
            let info = nats.api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({}));
            if info["config"]["ack_wait"] == seconds * 1_000_000_000 { Ok(()) } else { Err(info.to_string()) }
        });
    }
}

/// Each proof reads all rows: three sinks made three of each.
#[test]
fn of_several_sinks_one_proves() {
    let mut scene = Scene::new("");
    scene.start(&["work"]);
    let sinks = ["sink-a", "sink-b", "sink-c"];
    scene.services.extend(sinks.map(|name| scene.host.start(name, &["sink"])));
    // Until all have said that they are there, more than one may prove.
    scene.produce("first");
    wait_until("the sinks' records", SOON, || {
        let hosts = &scene.host.status("first")["hosts"];
        let sinks = hosts.as_array().into_iter().flatten().filter(|host| host["role"] == "sink").count();
        if sinks == 3 { Ok(()) } else { Err(hosts.to_string()) }
    });
    scene.host.wait_sealed("first", SOON);
    for run in ["a", "b", "c", "d"] {
        scene.produce(run);
        scene.host.wait_sealed(run, SOON);
    }
    let is_proof = |line: &&str| line.contains("proving") && !line.contains("first");
    let proofs = sinks.map(|name| scene.host.log(name).lines().filter(is_proof).count());
    assert_eq!(proofs.iter().sum::<usize>(), 4, "{proofs:?}");
}

/// The sink whose turn it is may hang.
#[test]
fn a_pass_whose_first_sealer_is_stopped_is_sealed_by_another() {
    let mut scene = Scene::new("");
    scene.start(&["work"]);
    let sinks = ["sink-a", "sink-b"].map(|name| scene.host.start(name, &["sink"]));
    for run in ["a", "b", "c", "d"] {
        scene.produce(run);
    }
    for run in ["a", "b", "c", "d"] {
        scene.host.wait_sealed(run, SOON);
    }
    let [first, second] = sinks;
    first.signal("STOP");
    for run in ["e", "f", "g", "h"] {
        scene.produce(run);
    }
    for run in ["e", "f", "g", "h"] {
        scene.host.wait_sealed(run, Duration::from_secs(240));
    }
    first.signal("CONT");
    drop((first, second));
}
