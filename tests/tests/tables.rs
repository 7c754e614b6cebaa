//! The tables belong to the user too: what others add stays theirs, what they change is judged by whether our statements
//! work, and what readers see follows the table.

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use serde_json::Value;
use tests::nats::Nats;
use tests::{Called, Host, Launch, Process, SOON, Up, wait_until};

/// A host of the pipeline `shape` in its first version.
fn shapes() -> Host {
    Host::new(env!("CARGO_BIN_EXE_shapes"))
}

/// Calls a command of another version of the pipeline.
fn call_as(host: &Host, shape: &str, args: &[&str]) -> Called {
    host.call_with_env(args, &[("SHAPE", shape)])
}

/// Starts a service of a version of the pipeline.
fn start_as(host: &Host, shape: &str, role: &str) -> Process {
    let launch =
        Launch { words: vec![role.into()], env: vec![("SHAPE".into(), shape.into())], ..Launch::default() };
    host.start_as(&format!("{role}-{shape}"), &launch)
}

/// Publishes a run of a version and waits for its seal.
fn sealed_run(host: &Host, shape: &str, run: &str, ids: &str) {
    call_as(host, shape, &["produce", "--ids", ids, "--run", run]).expect(0);
    host.wait_sealed(run, SOON);
}

/// The verdict of each of doctor's checks on tables and views, by name.
fn checks(host: &Host) -> Vec<(String, String, String)> {
    let doctor = host.call(&["doctor", "--json"]).json();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let checks = doctor["checks"].as_array().expect("checks").iter();
    checks.map(|check| (text(&check["what"]), text(&check["verdict"]), check.to_string())).collect()
}

/// The verdict and all that doctor says under a name.
fn check_of(host: &Host, what: &str) -> (String, String) {
    let checks = checks(host);
    let found = checks.iter().find(|(name, ..)| name == what);
    let (_, verdict, told) = found.unwrap_or_else(|| panic!("doctor has no `{what}`: {checks:?}"));
    (verdict.clone(), told.clone())
}

/// Every row of the view `shape` for a run: `id` and a column.
fn seen(up: &Up, column: &str, run: &str) -> String {
    up.ask(&format!("SELECT sum({column}), count() FROM millstream.shape WHERE run = '{run}' FORMAT TSV"))
}

#[test]
fn types_that_the_server_spells_otherwise_are_the_same() {
    let host = shapes();
    let up = host.up();
    for _ in 0..2 {
        call_as(&host, "spelled", &["setup"]).expect(0);
    }
    call_as(&host, "spelled", &["run", "--ids", "1..=10", "--run", "a"]).expect(0);
    call_as(&host, "spelled", &["run", "--ids", "1..=10", "--run", "b"]).expect(0);
    assert_eq!(up.number("SELECT count() FROM millstream.spelled WHERE kind = 'a'"), 10);
    let doctor = call_as(&host, "spelled", &["doctor"]).expect(0);
    assert!(!doctor.stdout.contains("FAIL"), "{}", doctor.stdout);
}

#[test]
fn a_type_that_the_server_refuses_is_named_before_anything_is_created() {
    let host = shapes();
    let up = host.up();
    let before = up.number("SELECT count() FROM system.tables WHERE database NOT IN ('system')");
    for args in [
        &["setup"][..],
        &["produce", "--ids", "1..=9"],
        &["run", "--ids", "1..=9"],
        &["produce", "--stdin", "--follow", "--run", "f"],
        &["sink"],
    ] {
        call_as(&host, "nowhere", args).expect(1).says(&[
            "error: failed to",
            "column `at` of type DateTime('Nowhere')",
            "Cannot load time zone Nowhere",
            "column `then` of type DateTime64(3, 'Atlantis')",
            "hint: ",
        ]);
    }
    let after = up.number("SELECT count() FROM system.tables WHERE database NOT IN ('system')");
    assert_eq!(before, after, "nothing is created");
    assert_eq!(tests::nats::streams(&up.nats), Vec::<String>::new(), "no stream is created");
    let doctor = call_as(&host, "nowhere", &["doctor"]).expect(1);
    assert!(doctor.stdout.contains("column `at` of type DateTime('Nowhere')"), "{}", doctor.stdout);
}

#[test]
fn what_others_add_to_the_table_is_theirs() {
    let host = shapes();
    let up = host.up();
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "before", "1..=100");
    for change in [
        "ADD COLUMN inserted_at DateTime MATERIALIZED now()",
        "ADD COLUMN twice UInt64 ALIAS a * 2",
        "ADD COLUMN note String DEFAULT 'none'",
        "ADD COLUMN seed UInt8 EPHEMERAL 1",
        "ADD INDEX by_a a TYPE minmax GRANULARITY 1",
        "MODIFY COLUMN a CODEC(ZSTD(3))",
        "COMMENT COLUMN a 'the number'",
        "MODIFY COMMENT 'rows'",
        "MODIFY TTL inserted_at + INTERVAL 10 YEAR",
        "MODIFY SETTING deduplicate_merge_projection_mode = 'drop'",
        "ADD PROJECTION by_error (SELECT error, count() GROUP BY error)",
        "ADD CONSTRAINT positive CHECK a >= 0",
    ] {
        up.ask(&format!("ALTER TABLE millstream.shape_rows {change}"));
    }
    host.call(&["setup"]).expect(0);
    let (mut work, mut sink) = (host.start("later-work", &["work"]), host.start("later-sink", &["sink"]));
    sealed_run(&host, "first", "after", "1..=100");
    assert!(work.runs() && sink.runs(), "{}{}", host.log("later-work"), host.log("later-sink"));
    let (verdict, told) = check_of(&host, "tables");
    assert_eq!(verdict, "ok", "{told}");
    assert_eq!(check_of(&host, "views").0, "ok");
    assert_eq!(up.ask("SELECT sum(a), sum(twice), any(note), min(inserted_at) > 0 FROM millstream.shape WHERE run = 'after'").trim(),
        "5050\t10100\tnone\t1");
    host.call(&["verify", "after"]).expect(0);
}

#[test]
fn a_column_that_the_operator_widened_is_read_as_wide_as_it_is() {
    let host = shapes();
    let up = host.up();
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "r", "1..=10");
    up.ask("ALTER TABLE millstream.shape_rows MODIFY COLUMN a UInt64");
    up.ask(
        "ALTER TABLE millstream.shape_rows UPDATE a = 5000000000 WHERE id = 7 SETTINGS mutations_sync = 2",
    );
    host.call(&["setup"]).expect(0);
    assert_eq!(up.number("SELECT a FROM millstream.shape WHERE run = 'r' AND id = 7"), 5_000_000_000);
    assert_eq!(up.number("SELECT a FROM millstream.shape_live WHERE run = 'r' AND id = 7"), 5_000_000_000);
    let (verdict, told) = check_of(&host, "tables");
    assert_eq!(verdict, "ok", "{told}");
    assert!(told.contains("`a` is UInt64"), "{told}");
}

/// What was asked is told: the view gives the pass, and lags behind its table.
#[test]
fn a_view_that_lags_gives_its_rows_all_the_same() {
    let host = shapes();
    let up = host.up();
    host.call(&["run", "--ids", "1..=10", "--run", "r"]).expect(0);
    up.ask("ALTER TABLE millstream.shape_rows MODIFY COLUMN a UInt64");
    assert_eq!(seen(&up, "a", "r"), "55\t10\n");
    let verify = host.call(&["verify", "r", "--values"]).expect(1).stdout;
    for part in [
        "`millstream`.`shape`",
        "show other columns or types than `millstream`.`shape_rows` has",
        "`setup` recreates them",
    ] {
        assert!(verify.contains(part), "`{part}` is not in {verify}");
    }
    assert!(!verify.contains("NOT see"), "{verify}");
    let status = host.call(&["status", "r"]).expect(0).stdout;
    assert!(status.contains("readers   `millstream`.`shape`") && !status.contains("NOT see"), "{status}");
    let report = host.verify("r");
    assert_eq!((&report["readers_see"], &report["view_lags"]), (&true.into(), &true.into()), "{report}");
    let repaired = host.call(&["verify", "r", "--repair", "--json"]).expect(0).json();
    assert_eq!((&repaired["view_lags"], &repaired["readers"]), (&false.into(), &Value::Null), "{repaired}");
}

#[test]
fn a_table_that_is_detached_is_named_with_the_statement_that_brings_it_back() {
    let host = shapes();
    let up = host.up();
    host.call(&["run", "--ids", "1..=10", "--run", "r"]).expect(0);
    for (detach, name) in [
        ("DETACH TABLE", "shape_rows"),
        ("DETACH TABLE", "shape_passes"),
        ("DETACH TABLE", "shape_view_faults"),
        ("DETACH VIEW", "shape"),
    ] {
        let full = format!("`millstream`.`{name}`");
        up.ask(&format!("{detach} millstream.{name}"));
        let says = format!(
            "error: failed to use {full}, which is detached in ClickHouse\nhint: `ATTACH TABLE {full}` in ClickHouse"
        );
        host.call(&["setup"]).expect(1).says(&[&says]);
        host.call(&["produce", "--ids", "1..=10", "--run", "s"]).expect(1).says(&[&says]);
        let (verdict, told) = check_of(&host, "tables");
        assert!(verdict == "fail" && told.contains("detached") && told.contains("ATTACH TABLE"), "{told}");
        let status = host.call(&["status", "r"]);
        status.says(&[&full, "is detached", "ATTACH TABLE"]);
        up.ask(&format!("ATTACH TABLE millstream.{name}"));
        host.call(&["setup"]).expect(0);
    }
    assert_eq!(seen(&up, "a", "r"), "55\t10\n");
}

#[test]
fn versions_with_a_narrower_and_an_equal_column_write_into_a_widened_one() {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    up.ask("ALTER TABLE millstream.shape_rows MODIFY COLUMN a UInt64");
    let (mut work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "s", "1..=10");
    assert_eq!(seen(&up, "a", "s"), "55\t10\n");
    work.kill();
    let (_work, _sink) = (start_as(&host, "wide", "work"), start_as(&host, "wide", "sink"));
    sealed_run(&host, "wide", "t", "1..=10");
    assert_eq!(seen(&up, "a", "t"), "50000000055\t10\n");
}

#[test]
fn a_running_sink_makes_views_anew_that_lag_behind_their_table() {
    let host = shapes();
    let up = host.up();
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "r", "1..=10");
    up.ask("ALTER TABLE millstream.shape_rows ADD COLUMN b UInt8, ADD COLUMN c UInt16");
    // Without a setup: before it seals, the sink looks.
    host.call(&["replay", "r"]).expect(0);
    wait_until("a second pass that is sealed", SOON, || {
        let status = host.status("r");
        (status["pass"] == 2 && status["state"] == "sealed").then_some(()).ok_or(status.to_string())
    });
    let kinds = up.ask(
        "SELECT table, name, type FROM system.columns WHERE database = 'millstream' AND table IN ('shape', 'shape_live') \
         AND name IN ('b', 'c') ORDER BY table, name FORMAT TSV",
    );
    assert_eq!(kinds, "shape\tb\tUInt8\nshape\tc\tUInt16\nshape_live\tb\tUInt8\nshape_live\tc\tUInt16\n");
}

#[test]
fn two_versions_work_side_by_side_once_a_column_was_added() {
    let host = shapes();
    let up = host.up();
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "old", "1..=100");
    call_as(&host, "second", &["produce", "--ids", "1..=9"])
        .expect(1)
        .says(&["column `extra` is missing", "`setup --yes` adds it"]);
    let shown = call_as(&host, "second", &["setup"]).expect(1);
    assert!(shown.stdout.contains("add column `extra` UInt64"), "{}", shown.stdout);
    assert!(shown.stdout.contains("`setup --yes`"), "{}", shown.stdout);
    let has_extra = "SELECT count() FROM system.columns WHERE database = 'millstream' AND name = 'extra'";
    assert_eq!(up.number(has_extra), 0, "nothing is changed without --yes");
    call_as(&host, "second", &["setup", "--yes"]).expect(0);
    assert_eq!(up.number(has_extra), 3, "the table and two views have it");
    call_as(&host, "second", &["setup"]).expect(0);
    // Processes of both versions start, and those that ran go on.
    let mut late = [host.start("late-work", &["work"]), host.start("late-sink", &["sink"])];
    sealed_run(&host, "first", "a", "1..=2000");
    call_as(&host, "first", &["verify", "a"]).expect(0);
    assert!(late.iter_mut().all(Process::runs), "{}", host.log("late-sink"));
    assert_eq!(seen(&up, "a", "a"), "2001000\t2000\n");
    assert_eq!(up.number("SELECT sum(extra) FROM millstream.shape WHERE run = 'old'"), 0);
    let versions =
        up.ask("SELECT version, columns FROM millstream.shape_schemas FINAL ORDER BY version FORMAT TSV");
    assert_eq!(versions, "1\t`a` UInt32\n2\t`a` UInt32, `extra` UInt64\n");
}

#[test]
fn workers_and_sinks_of_two_versions_share_runs() {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    call_as(&host, "second", &["setup", "--yes"]).expect(0);
    let mut all =
        ["first", "second"].map(|shape| [start_as(&host, shape, "work"), start_as(&host, shape, "sink")]);
    for (shape, run) in [("first", "a"), ("second", "b"), ("first", "c"), ("second", "d")] {
        sealed_run(&host, shape, run, "1..=2000");
        call_as(&host, shape, &["verify", run]).expect(0);
        assert_eq!(seen(&up, "a", run), "2001000\t2000\n");
    }
    assert!(all.iter_mut().flatten().all(Process::runs), "{}", host.log("sink-first"));
}

#[test]
fn rows_that_a_pass_takes_over_keep_columns_of_a_newer_version() {
    let host = shapes();
    let up = host.up();
    call_as(&host, "second", &["run", "--ids", "1..=100", "--run", "r", "--batch", "10"]).expect(0);
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    host.call(&["replay", "r", "--where", "id <= 10"]).expect(0);
    wait_until("a second pass that is sealed", SOON, || {
        let status = host.status("r");
        (status["pass"] == 2 && status["state"] == "sealed").then_some(()).ok_or(status.to_string())
    });
    assert_eq!(
        up.number("SELECT sum(extra) FROM millstream.shape WHERE run = 'r'"),
        (11..=100).sum::<u64>() * 10
    );
}

#[test]
fn what_cannot_be_done_without_loss_is_refused_with_the_statements_for_it() {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    for args in [&["setup"][..], &["setup", "--yes"], &["produce", "--ids", "1..=9"], &["sink"]] {
        call_as(&host, "text", args).expect(1).says(&[
            "column `a`: the table has UInt32, a row takes String",
            "`ALTER TABLE `millstream`.`shape_rows` MODIFY COLUMN `a` String`",
        ]);
    }
    // A table that holds more than the rows need is fine.
    call_as(&host, "narrow", &["setup"]).expect(0);
    assert_eq!(
        up.ask("SELECT type FROM system.columns WHERE table = 'shape_rows' AND name = 'a'").trim(),
        "UInt32"
    );
    // A wider one is a change that loses nothing.
    call_as(&host, "wide", &["produce", "--ids", "1..=9"])
        .expect(1)
        .says(&["column `a`", "`setup --yes` widens it"]);
    let shown = call_as(&host, "wide", &["setup"]).expect(1);
    assert!(shown.stdout.contains("widen column `a` from UInt32 to UInt64"), "{}", shown.stdout);
    call_as(&host, "wide", &["setup", "--yes"]).expect(0);
    call_as(&host, "wide", &["run", "--ids", "1..=10", "--run", "w"]).expect(0);
    assert_eq!(seen(&up, "a", "w"), "50000000055\t10\n");
    // What is no view is not replaced by one.
    up.ask("DROP VIEW millstream.shape_dead");
    up.ask("CREATE TABLE millstream.shape_dead (mine UInt8) ENGINE = MergeTree ORDER BY mine");
    call_as(&host, "wide", &["setup", "--yes"])
        .expect(1)
        .says(&["`millstream`.`shape_dead`", "its engine is MergeTree"]);
    up.ask("DROP TABLE millstream.shape_dead");
    // A column that cannot be written is none of ours any more.
    up.ask("ALTER TABLE millstream.shape_rows MODIFY COLUMN a UInt64 MATERIALIZED id");
    call_as(&host, "wide", &["sink"]).expect(1).says(&["column `a` is MATERIALIZED"]);
}

#[test]
fn a_column_that_was_dropped_is_named_and_added_again() {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    for view in ["shape", "shape_live"] {
        up.ask(&format!("DROP VIEW millstream.{view}"));
    }
    up.ask("ALTER TABLE millstream.shape_rows DROP COLUMN a");
    host.call(&["sink"]).expect(1).says(&["column `a` is missing", "`setup --yes` adds it"]);
    let (verdict, told) = check_of(&host, "tables");
    assert_eq!(verdict, "fail");
    assert!(told.contains("column `a` is missing"), "{told}");
    host.call(&["setup", "--yes"]).expect(0);
    host.call(&["run", "--ids", "1..=10", "--run", "r"]).expect(0);
    assert_eq!(seen(&up, "a", "r"), "55\t10\n");
}

#[test]
fn our_limits_do_not_reach_the_tables_of_views() {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    up.ask("CREATE TABLE millstream.parted (id UInt64, a UInt32) ENGINE = MergeTree PARTITION BY id % 50 ORDER BY id");
    up.ask("CREATE MATERIALIZED VIEW millstream.to_parted TO millstream.parted AS SELECT id, a FROM millstream.shape_rows");
    let told = host.call(&["setup"]).expect(0);
    let warning = "`millstream`.`to_parted`";
    assert!(told.stdout.contains(warning) && told.stdout.contains("repeated"), "{}", told.stdout);
    let (verdict, told) = check_of(&host, "other views");
    assert!(verdict == "ok" && told.contains(warning), "{told}");
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "r", "1..=1000");
    // The rows are there, and proven, before the views of the same insert are filled.
    wait_until("each row in the view's table", SOON, || {
        let rows = up.number("SELECT count() FROM millstream.parted");
        if rows == 1000 { Ok(()) } else { Err(format!("{rows} rows")) }
    });
    assert!(
        host.log("sink-first").contains("to_parted"),
        "the sink tells at its start: {}",
        host.log("sink-first")
    );
    assert_eq!(up.number("SELECT count() FROM millstream.shape_view_faults"), 0);
}

/// A host whose rows fill a view that throws on a condition.
fn picky(throws: &str) -> (Host, Up) {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    up.ask("CREATE TABLE millstream.picky (id UInt64, x UInt8) ENGINE = MergeTree ORDER BY id");
    up.ask(&format!(
        "CREATE MATERIALIZED VIEW millstream.to_picky TO millstream.picky AS \
         SELECT id, throwIf({throws}) AS x FROM millstream.shape_rows"
    ));
    (host, up)
}

#[test]
fn a_view_that_throws_is_named_until_the_operator_has_seen_it() {
    let (host, up) = picky("id = 7");
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "r", "1..=10");
    assert!(host.log("sink-first").contains("to_picky"), "{}", host.log("sink-first"));
    let status = host.status("r");
    assert_eq!(status["view_faults"][0]["view"], "`millstream`.`to_picky`", "{status}");
    let told = host.call(&["status", "r"]).expect(0);
    assert!(told.stdout.contains("to_picky"), "{}", told.stdout);
    let (verdict, told) = check_of(&host, "view faults");
    assert_eq!(verdict, "warn", "{told}");
    // Mended, the view is filled with the statement that doctor gives.
    up.ask("DROP VIEW millstream.to_picky");
    up.ask("CREATE MATERIALIZED VIEW millstream.to_picky TO millstream.picky AS SELECT id, toUInt8(0) AS x FROM millstream.shape_rows");
    let check = host.check("view faults");
    let hint = check["hint"].as_str().expect("a hint");
    let begin = hint.find("INSERT INTO").expect("a statement");
    let statement = hint[begin..].split("; ").next().expect("it ends");
    up.ask(statement);
    assert_eq!(up.number("SELECT count() FROM millstream.picky"), 10);
    // Only what was shown is acknowledged: here more is noted than is listed at once.
    up.ask(
        "INSERT INTO millstream.shape_view_faults SELECT concat('older', toString(number)), 1, [0], 'v', 'e', \
         toDateTime64('2026-01-01 00:00:00', 3, 'UTC') FROM numbers(120)",
    );
    let told = host.call(&["doctor", "--acknowledge"]).expect(0);
    assert!(told.stdout.contains("to_picky") && told.stdout.contains("there may be more"), "{}", told.stdout);
    assert_eq!(host.status("r")["view_faults"], serde_json::json!([]));
    assert_eq!(up.number("SELECT count() FROM millstream.shape_view_faults"), 21);
    // Shown even where the tables cannot be judged: then there is something to acknowledge.
    up.ask("ALTER TABLE millstream.shape_rows MODIFY COLUMN a String");
    assert!(host.call(&["doctor", "--acknowledge"]).expect(1).stdout.contains("run `older"));
    assert_eq!(up.number("SELECT count() FROM millstream.shape_view_faults"), 0);
}

/// No process is left that knows how the insert ended: its rows are there, and the view has none of them.
#[test]
fn a_view_that_throws_is_named_though_the_sink_is_killed_in_the_insert() {
    // It fails late enough for a kill while it is filled.
    let (host, up) = picky("id = 7 + sleepEachRow(0.25)");
    let (_work, mut sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    call_as(&host, "first", &["produce", "--ids", "1..=10", "--run", "r"]).expect(0);
    wait_until("rows of an insert that goes on", SOON, || {
        match up.number("SELECT count() FROM millstream.shape_rows") {
            10 => Ok(()),
            rows => Err(format!("{rows} rows")),
        }
    });
    sink.kill();
    // What it had is delivered again at once, not only after two minutes.
    let mut nats = Nats::connect(&up.nats);
    nats.set_ack_wait("shape_rows", "sink", Duration::from_secs(2));
    let _sink = host.start_as(
        "second-sink",
        &Launch {
            words: vec!["sink".into()],
            env: vec![("SHAPE".into(), "first".into())],
            ..Launch::default()
        },
    );
    host.wait_sealed("r", SOON);
    wait_until("the view named", SOON, || match host.status("r") {
        status if status["view_faults"][0]["view"] == "`millstream`.`to_picky`" => Ok(()),
        status => Err(format!("{status} {}", host.log("second-sink"))),
    });
    let named = up.number("SELECT uniqExactArray(batches) FROM millstream.shape_view_faults");
    assert_eq!(named, up.number("SELECT uniqExact(batch) FROM millstream.shape_rows"));
    assert_eq!(up.number("SELECT count() FROM millstream.picky"), 0);
    // What was kept for that goes once it is named.
    wait_until("no rows in the stream", SOON, || match nats.messages("shape_rows") {
        0 => Ok(()),
        found => Err(format!("{found} messages")),
    });
}

#[test]
fn a_run_that_is_forgotten_leaves_no_faults_of_views() {
    let host = shapes();
    let up = host.up();
    for run in ["r", "s"] {
        call_as(&host, "first", &["run", "--ids", "1..=10", "--run", run]).expect(0);
        up.ask(&format!(
            "INSERT INTO millstream.shape_view_faults SELECT '{run}', number, range(5), 'v', 'e', now64() FROM numbers(1, 2)"
        ));
    }
    host.call(&["forget", "r"]).expect(0);
    let left = up.ask("SELECT run, count() FROM millstream.shape_view_faults GROUP BY run");
    assert_eq!(left, "s\t2\n");
}

#[test]
fn a_view_without_its_target_is_named_and_holds_nothing_up() {
    let host = shapes();
    let up = host.up();
    host.call(&["setup"]).expect(0);
    for name in ["gone", "there"] {
        up.ask(&format!("CREATE TABLE millstream.{name} (id UInt64) ENGINE = MergeTree ORDER BY id"));
        up.ask(&format!(
            "CREATE MATERIALIZED VIEW millstream.to_{name} TO millstream.{name} AS SELECT id FROM millstream.shape_rows"
        ));
    }
    up.ask("DROP TABLE millstream.gone");
    let (verdict, told) = check_of(&host, "other views");
    assert!(verdict == "warn" && told.contains("`millstream`.`to_gone` cannot be filled"), "{told}");
    assert!(!told.contains("`millstream`.`to_there` cannot"), "{told}");
    let (_work, _sink) = (start_as(&host, "first", "work"), start_as(&host, "first", "sink"));
    sealed_run(&host, "first", "r", "1..=100");
    assert!(
        host.log("sink-first").contains("`millstream`.`to_gone` cannot be filled"),
        "{}",
        host.log("sink-first")
    );
    wait_until("each row in the table of the other view", SOON, || {
        let rows = up.number("SELECT count() FROM millstream.there");
        if rows == 100 { Ok(()) } else { Err(format!("{rows} rows")) }
    });
}

#[test]
fn dead_letters_know_their_host_and_build() {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_MICROS".into(), "1".into()));
    let up = host.up();
    host.call(&["run", "--ids", "895..=905", "--run", "r"]).expect(3);
    let dead = host.call(&["dead", "r", "--json"]).expect(0).json();
    let letter = &dead["letters"][0];
    let (name, build) =
        (letter["host"].as_str().expect("a host"), letter["build"].as_str().expect("a build"));
    assert!(!name.is_empty() && build.len() == 16, "{dead}");
    let told = host.call(&["dead", "r"]).expect(0);
    assert!(told.stdout.contains(name) && told.stdout.contains(build), "{}", told.stdout);
    for (flag, value, found) in
        [("--host", name, 3), ("--host", "nowhere", 0), ("--build", build, 3), ("--build", "x", 0)]
    {
        let dead = host.call(&["dead", "r", flag, value, "--json"]).expect(0).json();
        assert_eq!(dead["dead"], found, "{flag} {value}: {dead}");
    }
    let view = up.ask(
        "SELECT count() FROM millstream.trial_dead WHERE host != '' AND build != '' AND computed_at > 0",
    );
    assert_eq!(view.trim(), "3");
    host.call(&["replay", "r", "--where", &format!("host = '{name}' AND status = 'dead'")]).expect(0);
}

#[test]
fn two_builds_of_one_pass_are_told() {
    let mut host = shapes();
    host.env.push(("SHAPE_MICROS".into(), "2000".into()));
    let up = host.up();
    // Another build of the same program: only what hashes it can tell.
    let other = host.path().join("other");
    fs::copy(env!("CARGO_BIN_EXE_shapes"), &other).expect("copied");
    File::options().append(true).open(&other).and_then(|mut file| file.write_all(b"!")).expect("written");
    host.call(&["produce", "--ids", "1..=4000", "--run", "r", "--batch", "100"]).expect(0);
    let _sink = host.start("sink", &["sink"]);
    let mut first = host.start("work", &["work", "--threads", "1"]);
    let stored = || up.number("SELECT count() FROM millstream.shape_rows");
    wait_until(
        "some rows of the first build",
        SOON,
        || if stored() > 0 { Ok(()) } else { Err("none".into()) },
    );
    first.signal("TERM");
    first.wait(SOON);
    let program = other.to_str().expect("UTF-8").to_owned();
    let mut second = std::process::Command::new(program)
        .args(["work", "--threads", "1"])
        .current_dir(host.path())
        .env("SHAPE_MICROS", "2000")
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it starts");
    host.wait_sealed("r", SOON);
    second.kill().and_then(|()| second.wait()).expect("it ends");
    let verify = host.call(&["verify", "r", "--json"]).expect(0).json();
    let builds = verify["builds"].as_array().expect("builds");
    assert_eq!(builds.len(), 2, "{verify}");
    let rows: u64 = builds.iter().map(|build| build["rows"].as_u64().expect("rows")).sum();
    assert_eq!(rows, 4000, "{verify}");
    assert!(
        builds.iter().all(|build| build["hosts"].as_array().is_some_and(|hosts| hosts.len() == 1)),
        "{verify}"
    );
    let told = host.call(&["verify", "r", "--hosts"]).expect(0);
    assert!(
        told.stdout.contains("builds") && told.stdout.contains(builds[0]["build"].as_str().expect("a name")),
        "{}",
        told.stdout
    );
    assert_eq!(host.status("r")["builds"].as_array().map(Vec::len), Some(2));
    assert!(host.call(&["status", "r"]).expect(0).stdout.contains("2 builds"));
    assert_eq!(up.number("SELECT length(builds) FROM millstream.shape_passes WHERE run = 'r'"), 2);
}

#[test]
fn whether_readers_see_a_pass_is_asked_from_clickhouse_and_repaired() {
    let host = shapes();
    let up = host.up();
    host.call(&["run", "--ids", "1..=10", "--run", "r"]).expect(0);
    assert_eq!(host.verify("r")["readers_see"], true);
    assert_eq!(host.status("r")["readers_see"], true);
    up.ask("ALTER TABLE millstream.shape_passes DELETE WHERE run = 'r' SETTINGS mutations_sync = 2");
    let verify = host.call(&["verify", "r"]).expect(1);
    assert!(
        verify.stdout.contains("readers do NOT see it")
            && verify.stdout.contains("`millstream`.`shape_passes`"),
        "{}",
        verify.stdout
    );
    let status = host.call(&["status", "r"]).expect(0);
    assert!(status.stdout.contains("readers do NOT see it"), "{}", status.stdout);
    assert_eq!(host.status("r")["readers_see"], false);
    let repaired = host.call(&["verify", "r", "--repair", "--json"]).expect(0).json();
    assert_eq!(repaired["readers_see"], true, "{repaired}");
    assert_eq!(seen(&up, "a", "r"), "55\t10\n");
    // A view of that name which gives some of the rows.
    up.ask("CREATE OR REPLACE VIEW millstream.shape AS SELECT * FROM millstream.shape_live WHERE id < 5");
    let verify = host.call(&["verify", "r"]).expect(1).stdout;
    assert!(
        verify.contains("readers do NOT see it") && verify.contains("gives 4 of its 10 rows"),
        "{verify}"
    );
    host.call(&["verify", "r", "--repair"]).expect(0);
    assert_eq!(seen(&up, "a", "r"), "55\t10\n");
}

#[test]
fn a_view_that_is_missing_is_named_and_no_run_is_forgotten() {
    let host = shapes();
    let up = host.up();
    host.call(&["run", "--ids", "1..=10", "--run", "r"]).expect(0);
    up.ask("DROP VIEW millstream.shape");
    let runs = host.call(&["runs"]).expect(0).says(&["`millstream`.`shape` is missing", "`setup`"]);
    assert!(runs.stdout.contains("sealed"), "{}", runs.stdout);
    for args in [&["status", "r"][..], &["status"]] {
        let told = host.call(args).expect(0);
        assert!(
            told.stdout.contains("readers do NOT see it") && told.stdout.contains("`millstream`.`shape`"),
            "{}",
            told.stdout
        );
    }
    let verify = host.call(&["verify", "r"]).expect(1);
    assert!(
        verify.stdout.contains("`millstream`.`shape`") && verify.stdout.contains("`setup`"),
        "{}",
        verify.stdout
    );
    let (verdict, told) = check_of(&host, "tables");
    assert!(verdict == "warn" && told.contains("`millstream`.`shape`"), "{told}");
    host.call(&["verify", "r", "--repair"]).expect(0);
    assert_eq!(seen(&up, "a", "r"), "55\t10\n");
    for args in [&["runs"][..], &["status"], &["status", "r"], &["verify", "r"], &["dead", "r"]] {
        let called = host.call(&[args, &["--database", "staging"]].concat()).expect(1);
        called.says(&["database `staging`", "`shape_rows`", "it belongs to", "hint: ", "--database"]);
    }
    up.ask("DROP TABLE millstream.shape_view_faults");
    host.call(&["status", "r"]).expect(0).says(&["`millstream`.`shape_view_faults` is missing"]);
    up.ask("DROP TABLE millstream.shape_passes");
    host.call(&["status", "r"]).expect(1).says(&["`shape_passes`", "database `millstream`"]);
}
