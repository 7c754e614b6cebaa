//! Every command as a new user types it: its text, its JSON, its help.

use std::fs;

use serde_json::{Value, json};
use tests::nats::Nats;
use tests::nats_server::NatsServer;
use tests::{Called, Host, SOON, wait_until};

fn trial() -> Host {
    Host::new(env!("CARGO_BIN_EXE_trial"))
}

/// A host whose ids all behave.
fn tame() -> Host {
    let mut host = trial();
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    host
}

/// Fails unless the object has all of these keys.
fn has_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object.get(key).is_some(), "no key `{key}` in {object}");
    }
}

/// Fails unless stdout has all of these.
fn shows(called: &Called, parts: &[&str]) {
    for part in parts {
        assert!(called.stdout.contains(part), "`{part}` is not in\n{}", called.stdout);
    }
}

#[test]
fn a_question_does_not_make_a_stack() {
    let host = trial();
    let none = "there is no local stack in `mistyped`\nhint: name the directory of one with --data";
    let service = "the local stack of `mistyped` is not up\nhint: start `up`";
    for (args, says) in [
        (&["runs"][..], none),
        (&["status"], none),
        (&["sql", "SELECT 1"], none),
        (&["doctor"], none),
        (&["pause", "a"], none),
        (&["work"], service),
    ] {
        let args = [args, &["--data", "mistyped"]].concat();
        host.call(&args).expect(2).says(&[says]);
        assert!(!host.path().join("mistyped").exists(), "{args:?}");
    }
}

#[test]
fn a_data_directory_that_is_gone_is_noticed() {
    let host = trial();
    let mut up = host.up();
    fs::rename(host.path().join(".millstream"), host.path().join("moved")).expect("moved");
    assert_eq!(up.process.wait(SOON).code(), Some(1));
    let log = host.log("up");
    assert!(log.contains("its data directory `.millstream` is gone"), "{log}");
}

/// On another data directory than the usual one, and typed into a shell as they stand.
#[test]
fn run_ends_with_a_summary_whose_commands_work() {
    let host = trial();
    let run = ["run", "--ids", "1..=2000", "--run", "a", "--data", "my data"];
    let called = host.call(&run).expect(3);
    shows(
        &called,
        &[
            "run      a (pass 1)\n",
            "ids      2,000\n",
            "rows     2,000\n",
            "dead     6\n",
            "seconds  ",
            "ids/s    ",
        ],
    );
    shows(&called, &["sealed   yes\n", "look at the rows:\n", "look at the dead letters:\n"]);
    called.says(&["opening the local stack in `my data`", "of run `a`: "]);
    let called = host.call(&run).expect(3);
    let commands: Vec<&str> = called.stdout.lines().filter(|line| line.starts_with("  /")).collect();
    assert_eq!(commands.len(), 3, "{}", called.stdout);
    for command in commands {
        let mut shell = std::process::Command::new("sh");
        let output = shell.args(["-c", command]).current_dir(host.path()).output().expect("a shell");
        assert!(output.status.success(), "{command}: {output:?}");
        assert!(output.stdout.iter().filter(|byte| **byte == b'\n').count() > 2, "{command}: {output:?}");
    }
    assert!(!host.path().join(".millstream").exists(), "one of them made another stack");
}

#[test]
fn run_says_in_json_what_it_did() {
    let host = tame();
    let called =
        host.call(&["run", "--ids", "0..500", "--batch", "100", "--threads", "1", "--json"]).expect(0);
    let summary = called.json();
    has_keys(&summary, &["run", "pass", "ids", "rows", "dead", "seconds", "ids_per_second", "sealed"]);
    assert_eq!(
        (&summary["ids"], &summary["rows"], &summary["sealed"]),
        (&500.into(), &500.into(), &true.into())
    );
    let name = summary["run"].as_str().expect("a name");
    assert!(name.split('-').count() == 3, "`{name}` is no readable name");
    assert_eq!(host.status(name)["state"], "sealed");
    // A second run adds to the first.
    host.call(&["run", "--ids", "500..=501", "--json"]).expect(0);
    assert_eq!(host.call(&["runs", "--json"]).json().as_array().expect("a list").len(), 2);
}

#[test]
fn up_prints_two_addresses_and_ends_well() {
    let host = tame();
    let mut up = host.up();
    assert!(up.nats.starts_with("nats://127.0.0.1:"), "{}", up.nats);
    assert!(up.clickhouse.starts_with("http://127.0.0.1:"), "{}", up.clickhouse);
    assert_eq!(up.ask("SELECT 1"), "1\n");
    host.call(&["up"]).expect(1).says(&[
        &format!(
            "error: failed to open the data directory `.millstream`, which is in use by `up` (pid {})",
            up.process.pid()
        ),
        "hint: ",
    ]);
    up.process.signal("INT");
    assert_eq!(up.process.wait(SOON).code(), Some(0), "{}", host.log("up"));
    assert!(host.log("up").contains("stopping the servers"), "{}", host.log("up"));
}

#[test]
fn produce_takes_ids_in_every_form() {
    let host = tame();
    let up = host.up();
    let write = |name: &str, text: &str| fs::write(host.path().join(name), text).expect("written");
    write("ids.txt", "3\n1\r\n\n  2\n");
    write("users.csv", "name,id\n\"Ann, B.\",7\nBob,8\n");
    let published = |args: &[&str], text: &str| {
        let called = host.call(&[&["produce"], args].concat()).expect(0);
        assert_eq!(called.stdout, format!("published run {text}\n"), "{}", called.stderr);
    };
    published(&["--ids", "1..=100", "--batch", "30", "--run", "a"], "`a`: 100 ids in 4 batches");
    published(&["--ids", "1..101", "--batch", "30", "--run", "b"], "`b`: 100 ids in 4 batches");
    published(&["--ids", "1..=10_000", "--batch", "1_000", "--run", "c"], "`c`: 10,000 ids in 10 batches");
    published(&["--file", "ids.txt", "--batch", "2", "--run", "d"], "`d`: 3 ids in 2 batches");
    published(
        &["--file", "users.csv", "--column", "id", "--batch", "9", "--run", "e"],
        "`e`: 2 ids in 1 batches",
    );
    published(
        &["--query", "SELECT number * 2 AS id FROM numbers(50);", "--batch", "50", "--run", "f"],
        "`f`: 50 ids in 1 batches",
    );
    published(
        &["--ids", "1..=100", "--batch", "30", "--run", "a"],
        "`a`: 100 ids in 4 batches; all of it had been published before",
    );
    let called = host
        .call_with_input(&["produce", "--stdin", "--batch", "2", "--run", "g", "--json"], b"5\n5\n6\n")
        .expect(0);
    assert_eq!(
        called.json(),
        json!({ "run": "g", "batches": 2, "ids": 2, "dropped_repeats": 1, "batches_written": 2, "batches_found": 0,
                "bad_lines": 0 })
    );
    let made: Vec<Value> = host.call(&["runs", "--json"]).json().as_array().expect("a list").to_vec();
    let sources: Vec<&str> = made.iter().map(|run| run["source"].as_str().expect("text")).collect();
    assert_eq!(
        sources,
        [
            "ids 1..=100",
            "ids 1..=100",
            "ids 1..=10000",
            "file `ids.txt`",
            "column `id` of file `users.csv`",
            "query `SELECT number * 2 AS id FROM numbers(50);`",
            "standard input",
        ]
    );
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    for run in ["a", "b", "c", "d", "e", "f", "g"] {
        host.wait_sealed(run, SOON);
    }
    let ids = |run: &str| {
        up.ask(&format!(
            "SELECT groupArray(id) FROM (SELECT id FROM millstream.trial WHERE run = '{run}' ORDER BY id)"
        ))
    };
    assert_eq!([ids("d"), ids("e"), ids("g")], ["[1,2,3]\n", "[7,8]\n", "[5,6]\n"]);
    assert_eq!(up.number("SELECT sum(id) FROM millstream.trial WHERE run = 'f'"), 2450);
}

#[test]
fn an_interrupted_producer_says_how_to_go_on_and_resumes() {
    let host = tame();
    let up = host.up();
    let args = ["produce", "--ids", "1..=50000", "--batch", "1", "--run", "long"];
    let mut producer = host.start("produce", &args);
    wait_until("published batches", SOON, || {
        let status = host.call(&["status", "long", "--json"]);
        if status.code == 0 && status.json()["pending"].as_u64() > Some(0) {
            Ok(())
        } else {
            Err(status.stderr)
        }
    });
    producer.signal("INT");
    assert_eq!(producer.wait(SOON).code(), Some(130), "{}", host.log("produce"));
    let log = host.log("produce");
    assert!(log.contains("stopping: started again with the same words, it resumes"), "{log}");
    assert!(log.contains("run `long` is published in part; publish the rest with --run long"), "{log}");
    assert_eq!(host.status("long")["state"], "publishing");
    let report = host.call(&["verify", "long"]).expect(1);
    shows(&report, &["verdict          still being published"]);
    let resumed = host.call(&[&args[..], &["--json"]].concat()).expect(0).json();
    let [written, found] =
        ["batches_written", "batches_found"].map(|key| resumed[key].as_u64().expect("a number"));
    assert!(written > 0 && found > 0, "{resumed}");
    assert_eq!(written + found, 50_000);
    drop(up);
}

#[test]
fn services_drain_when_they_are_told_to_stop() {
    let host = tame();
    let _up = host.up();
    host.call(&["produce", "--ids", "1..=20000", "--run", "a"]).expect(0);
    let mut services = ["work", "sink"].map(|name| host.start(name, &[name]));
    host.wait_sealed("a", SOON);
    for (service, (signal, code)) in services.iter_mut().zip([("TERM", 0), ("INT", 130)]) {
        service.signal(signal);
        assert_eq!(service.wait(SOON).code(), Some(code));
    }
    for name in ["work", "sink"] {
        assert!(host.log(name).contains("draining; a second signal leaves at once"), "{}", host.log(name));
    }
}

/// Waiting on a stack of its own, it would keep `up` and all others from it.
#[test]
fn what_waits_holds_no_stack_that_it_started() {
    let host = tame();
    host.call(&["produce", "--ids", "1..=10", "--run", "a"]).expect(0);
    let says = "error: failed to wait for run `a`: the local stack of `.millstream` is not up";
    let watch = host.call(&["status", "a", "--watch"]).expect(1).says(&[says, "hint: start `up`"]);
    shows(&watch, &["run       a (pass 1)", "state     running"]);
    host.call(&["produce", "--ids", "1..=10", "--run", "a", "--wait"])
        .expect(1)
        .says(&[says, "hint: start `up`"]);
    host.call(&["work"]).expect(2).says(&["the local stack of `.millstream` is not up"]);
    host.call(&["run", "--ids", "1..=10", "--run", "a"]).expect(0);
    // What is over has not to be waited for.
    host.call(&["status", "a", "--watch"]).expect(0);
    host.call(&["produce", "--ids", "1..=10", "--run", "a", "--wait"]).expect(0);
}

#[test]
fn status_is_watched_until_the_run_is_sealed() {
    let mut host = tame();
    host.env.push(("TRIAL_MICROS".into(), "100".into()));
    let _up = host.up();
    host.call(&["produce", "--ids", "1..=10000", "--batch", "100", "--run", "a"]).expect(0);
    let text = host.call(&["status"]).expect(0);
    shows(
        &text,
        &[
            "run       a (pass 1), ids 1..=10000\n",
            "state     running\n",
            "ids       0 of 10,000 stored, 0 dead\n",
        ],
    );
    shows(
        &text,
        &[
            "batches   100 in all, 100 pending, 0 in flight, 0 redelivered\n",
            "ETA unknown",
            "no worker computes: ",
        ],
    );
    let mut watch = host.start("watch", &["status", "a", "--watch", "--json"]);
    wait_until("a first status", SOON, || match host.log("watch") {
        log if log.ends_with('\n') => Ok(()),
        log => Err(log),
    });
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    assert_eq!(watch.wait(SOON).code(), Some(0), "{}", host.log("watch"));
    let log = host.log("watch");
    let seen: Vec<Value> =
        log.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    for status in &seen {
        has_keys(
            status,
            &[
                "run",
                "pass",
                "state",
                "batches",
                "ids",
                "done",
                "dead",
                "in_flight",
                "pending",
                "redelivered",
            ],
        );
        has_keys(status, &["ids_per_second", "eta_seconds"]);
    }
    assert_eq!((&seen[0]["state"], &seen[0]["pending"]), (&"running".into(), &100.into()));
    let last = &seen[seen.len() - 1];
    assert_eq!((&last["state"], &last["done"]), (&"sealed".into(), &10_000.into()));
    let text = host.call(&["status", "a"]).expect(0);
    shows(
        &text,
        &["state     sealed, proven at ", "ids       10,000 of 10,000 stored, 0 dead\n", "ids/s, took "],
    );
}

#[test]
fn finished_runs_are_listed_proved_and_explained() {
    let host = trial();
    host.call(&["run", "--ids", "1..=1000", "--batch", "500", "--run", "a"]).expect(3);
    let _up = host.up();
    let runs = host.call(&["runs"]).expect(0);
    assert_eq!(
        runs.stdout,
        "run  pass  state     ids  dead  made of\na       1  sealed  1,000     3  ids 1..=1000\n"
    );
    let list = host.call(&["runs", "--json"]).expect(0).json();
    has_keys(&list[0], &["run", "pass", "state", "ids", "dead", "source", "created_ms"]);

    insta::assert_snapshot!("verify", host.call(&["verify", "a"]).expect(0).stdout);
    let report = host.verify("a");
    has_keys(
        &report,
        &[
            "run",
            "pass",
            "batches",
            "ids",
            "rows",
            "missing_batches",
            "short_batches",
            "raw_duplicates",
            "dead",
            "sealed",
        ],
    );

    let dead = host.call(&["dead", "a"]).expect(0).stdout;
    // Where in the test's own pipeline the panic is, is told right by `rustc`; what counts is that it is told.
    let (before, place) = dead.rsplit_once("src/lib.rs:").expect("the place of the panic");
    let after = place.trim_start_matches(|symbol: char| symbol.is_ascii_digit() || symbol == ':');
    let letters = host.call(&["dead", "a", "--json"]).expect(0).json();
    let [name, build] = ["host", "build"].map(|key| letters["letters"][0][key].as_str().expect("text"));
    // Host and build are another on each machine, and so is the width of their columns.
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let told = format!("{before}src/lib.rs:LINE:{after}").replace(name, "HOST").replace(build, "BUILD");
    insta::assert_snapshot!("dead", told.lines().map(words).collect::<Vec<_>>().join("\n"));
    let filtered = host.call(&["dead", "a", "--error", "never", "--json"]).expect(0).json();
    assert_eq!((&filtered["dead"], &filtered["letters"][0]["id"]), (&1.into(), &"903".into()), "{filtered}");
    let some = host.call(&["dead", "a", "--limit", "2"]).expect(0);
    shows(&some, &["… 1 more: --limit N lists them\n"]);
    has_keys(&letters, &["run", "pass", "dead", "by_error", "letters"]);
    let first = json!({ "batch": 1, "id": "901", "error": "rejected", "host": name, "build": build });
    assert_eq!(letters["letters"][0], first);

    host.call(&["produce", "--ids", "1..=10", "--run", "b"]).expect(0);
    assert_eq!(host.call(&["dead", "b"]).expect(0).stdout, "run `b` has no dead letters\n");
    let waiting = host.call(&["verify", "b"]).expect(1);
    shows(&waiting, &["verdict          NOT complete\n", "ids              10\n", "rows             0\n"]);
}

#[test]
fn sql_prints_a_table_or_what_the_query_asks_for() {
    let host = tame();
    host.call(&["run", "--ids", "1..=100", "--run", "a"]).expect(0);
    let up = host.up();
    let sql = |query: &str| host.call(&["sql", query]).expect(0).stdout;
    let table = sql("SELECT id, squared FROM trial ORDER BY id LIMIT 2");
    assert!(table.contains("id") && table.contains("squared") && table.contains('│'), "{table}");
    assert_eq!(sql("SELECT id, squared FROM trial ORDER BY id LIMIT 2 FORMAT CSV"), "1,1\n2,4\n");
    assert_eq!(sql("SELECT 1 AS one\nFORMAT\nJSONEachRow"), "{\"one\":1}\n");
    assert!(sql("SELECT\n  'two lines' AS text -- and a comment\n").contains("two lines"));
    assert!(sql("SELECT 'a ? and FORMAT in a text' AS text;").contains("a ? and FORMAT in a text"));
    assert_eq!(sql("CREATE VIEW twice AS SELECT 2 * squared AS two FROM trial"), "");
    assert_eq!(up.number("SELECT max(two) FROM millstream.twice"), 20_000);
    let called = host.call(&["sql", "SELECT wrong FROM trial"]).expect(1);
    assert_eq!(called.stdout, "");
    called.says(&[
        "error: failed to run the query in ClickHouse at `http://127.0.0.1:",
        "code 47: ",
        "`wrong`",
    ]);
    host.call(&["sql", "SELEC"]).expect(1).says(&["code 62: Syntax error"]);
}

#[test]
fn doctor_says_what_is_well_and_what_is_not() {
    let host = tame();
    let _up = host.up();
    let early = host.call(&["doctor"]).expect(0);
    shows(
        &early,
        &[
            "warn  streams        not there yet",
            "hint: `setup`, `produce` or `run` creates them",
            "warn  tables",
        ],
    );
    host.call(&["setup"]).expect(0);
    let well = host.call(&["doctor"]).expect(0);
    for line in well.stdout.lines() {
        assert!(line.starts_with("ok    "), "{}", well.stdout);
    }
    shows(
        &well,
        &[
            "ok    pipeline       `trial`: squared UInt64\n",
            "ok    NATS           nats-server ",
            "ok    ClickHouse     ",
        ],
    );
    shows(&well, &["(local stack in `.millstream`)\n"]);
    let checks = host.call(&["doctor", "--json"]).expect(0).json();
    assert!(
        checks["checks"].as_array().expect("a list").iter().all(|check| check["verdict"] == "ok"),
        "{checks}"
    );

    let down = host.call(&["doctor", "--nats", "nats://127.0.0.1:1"]).expect(1);
    shows(
        &down,
        &[
            "FAIL  NATS           failed to connect to NATS at `nats://127.0.0.1:1` (--nats): ",
            "ok    ClickHouse     ",
        ],
    );
    shows(&down, &["                     hint: start nats-server there, name another with --nats URL"]);
    let checks = host.call(&["doctor", "--json", "--nats", "nats://127.0.0.1:1"]).expect(1).json();
    let nats = checks["checks"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|check| check["what"] == "NATS")
        .expect("a check");
    assert_eq!(nats["verdict"], "fail");
    assert!(nats["hint"].is_string(), "{nats}");
    let threads = host.call(&["doctor", "--config", "more.toml"]).expect(2);
    assert!(threads.stderr.contains("more.toml"), "{}", threads.stderr);
}

#[test]
fn doctor_names_runs_that_nats_has_lost() {
    let host = tame();
    let up = host.up();
    for run in ["a", "b"] {
        host.call(&["run", "--ids", "1..=9", "--run", run]).expect(0);
    }
    assert_eq!(host.check("runs")["verdict"], "ok");
    let mut nats = Nats::connect(&up.nats);
    for (records, found, hint) in [
        (
            "$KV.trial_runs.*.a",
            "1 run, ",
            "`produce` with the same input (ids 1..=9) and --run a brings it back",
        ),
        ("$KV.trial_runs.>", "2 runs, ", "`produce` with the same input and --run NAME brings a run back"),
    ] {
        let purged = nats.api("STREAM.PURGE.KV_trial_runs", &json!({ "filter": records }));
        assert!(purged["purged"].as_u64() > Some(0), "{purged}");
        let check = host.check("runs");
        assert_eq!((&check["verdict"], &check["hint"]), (&"warn".into(), &hint.into()), "{check}");
        let told = check["found"].as_str().expect("a text");
        assert!(told.contains(found) && told.contains("`a` (ids 1..=9)"), "{told}");
    }
    for run in ["a", "b"] {
        host.call(&["produce", "--ids", "1..=9", "--run", run]).expect(0);
    }
    assert_eq!(host.check("runs")["verdict"], "ok");
}

#[test]
fn doctor_says_that_an_account_has_no_room_for_larger_streams() {
    let mut host = tame();
    let up = host.up();
    let account = |size| {
        format!(
            "accounts {{ A {{ jetstream {{ max_mem: 0, max_file: {size} }}, users [{{ user: a, password: b }}] }} }}\n"
        )
    };
    let mut server = NatsServer::start(&host.path().join("accounts"), &account("350MB"));
    host.env.push(("NATS_URL".into(), server.url("nats", "a:b@")));
    host.env.push(("CLICKHOUSE_URL".into(), up.clickhouse.clone()));
    host.call(&["setup"]).expect(0);
    let check = host.check("storage");
    assert_eq!(check["verdict"], "warn", "{check}");
    assert!(
        check["found"].as_str().is_some_and(|found| found.contains("this account may have 3")),
        "{check}"
    );
    server.restart(&account("900MB"));
    assert_eq!(host.check("storage")["verdict"], "ok");
}

#[test]
fn help_reads_like_a_manual_page() {
    let host = trial();
    let help = |args: &[&str]| {
        // Wrapped as for a terminal of a hundred columns, wherever the test runs.
        let output = host.command(args).env("COLUMNS", "100").output().expect("it starts");
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    insta::assert_snapshot!("help", help(&["--help"]));
    let commands = [
        "run", "up", "produce", "work", "sink", "setup", "runs", "status", "pause", "cancel", "set",
        "verify", "dead", "replay", "forget", "rebuild", "sql", "tune", "doctor",
    ];
    for command in commands {
        let text = help(&[command, "--help"]);
        // The options that every command has are in the snapshot above.
        let own = text.split("Servers and logs:").next().unwrap_or_default();
        let examples = text.find("Examples:").map_or("", |at| &text[at..]);
        insta::assert_snapshot!(format!("help_{command}"), format!("{own}{examples}"));
    }
    assert_eq!(help(&["--version"]), format!("trial {}\n", env!("CARGO_PKG_VERSION")));
    // Nobody typed anything yet: the same help, as wrong usage.
    let bare = host.call(&[]).expect(2);
    assert!(bare.stderr.contains("Commands:\n  run "), "{}", bare.stderr);
    assert!(!host.path().join(".millstream").exists(), "help starts nothing");
}
