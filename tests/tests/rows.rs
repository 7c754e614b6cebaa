//! Rows say what they are: columns go by name, a bad value costs one id, and rows know who computed them.

use serde_json::json;
use tests::nats::Nats;
use tests::variants::VARIABLE;
use tests::{Called, Host, Launch, Process, SOON, Up, wait_until};

struct Scene {
    host: Host,
    up: Up,
}

/// A command or service of one build.
fn of(build: &str, words: &[&str]) -> Launch {
    Launch { env: vec![(VARIABLE.into(), build.into())], ..Launch::from(words) }
}

impl Scene {
    fn new() -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_variant"));
        let up = host.up();
        host.env.push(("NATS_URL".into(), up.nats.clone()));
        host.env.push(("CLICKHOUSE_URL".into(), up.clickhouse.clone()));
        Self { host, up }
    }

    fn call(&self, build: &str, words: &[&str]) -> Called {
        self.host.call_as(&of(build, words))
    }

    fn start(&self, name: &str, build: &str, words: &[&str]) -> Process {
        self.host.start_as(name, &of(build, words))
    }

    /// Rows of a run for which a condition holds, as they lie in the table.
    fn rows(&self, run: &str, condition: &str) -> u64 {
        self.up.number(&format!(
            "SELECT count() FROM millstream.variant_rows FINAL WHERE run = '{run}' AND {condition}"
        ))
    }

    /// A run of one build from its ids to its end, all in one process.
    fn run(&self, build: &str, ids: &str, run: &str, code: i32) -> Called {
        self.call(build, &["run", "--ids", ids, "--run", run]).expect(code)
    }
}

/// Fields in another order after a deploy: an old worker, a new sink.
#[test]
fn columns_go_by_name_when_a_sink_has_them_in_another_order() {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    let _worker = scene.start("work", "lohi", &["work"]);
    let _sink = scene.start("sink", "hilo", &["sink"]);
    scene.call("lohi", &["produce", "--ids", "1..=5000", "--run", "a"]).expect(0);
    scene.host.wait_sealed("a", SOON);
    assert_eq!(scene.rows("a", "lo = id AND hi = id + 1000"), 5000);
    scene.call("hilo", &["verify", "a"]).expect(0);
}

#[test]
fn columns_go_by_name_when_rows_are_inserted_once_more_by_another_build() {
    let scene = Scene::new();
    std::fs::write(scene.host.path().join("millstream.toml"), "[streams]\nkeep_rows = '1h'\n")
        .expect("written");
    scene.run("lohi", "1..=5000", "a", 0);
    scene.up.ask("TRUNCATE TABLE millstream.variant_rows");
    scene.call("hilo", &["rebuild", "a"]).expect(0);
    assert_eq!(scene.rows("a", "lo = id AND hi = id + 1000"), 5000);
}

#[test]
fn a_struct_in_a_named_tuple_goes_by_name() {
    let scene = Scene::new();
    scene.run("places", "1..=1000", "a", 0);
    assert_eq!(scene.rows("a", "at.lat = id AND at.lon = -toFloat64(id)"), 1000);
}

#[test]
fn a_value_that_an_enum_does_not_have_costs_one_id() {
    let scene = Scene::new();
    scene.run("kinds", "1..=1000", "a", 3);
    assert_eq!(scene.rows("a", "status = 'dead'"), 200);
    // Rows that cannot be read would fail this question.
    let kinds = scene.up.ask("SELECT kind, name, count() FROM millstream.variant GROUP BY ALL ORDER BY kind");
    assert_eq!(kinds, "low\thigh\t400\nhigh\thigh\t400\n");
    for (id, column, value) in [(17, "`kind`", "9"), (18, "`name`", "middle")] {
        let error = scene.up.ask(&format!("SELECT error FROM millstream.variant_dead WHERE id = {id}"));
        assert!(error.contains(column) && error.contains(value), "{error}");
    }
}

#[test]
fn a_field_that_is_left_out_is_named_at_its_id() {
    let scene = Scene::new();
    scene.run("skips", "1..=100", "a", 3);
    assert_eq!(scene.rows("a", "status = 'dead'"), 10);
    assert_eq!(scene.rows("a", "status = 'dead' AND id % 10 = 5 AND position(error, '`lo`') > 0"), 10);
}

#[test]
fn a_field_that_can_be_left_out_is_refused_at_the_start_where_that_is_seen() {
    let scene = Scene::new();
    scene.call("zeroless", &["run", "--ids", "1..=100"]).expect(2).says(&["`lo`", "skip_serializing_if"]);
    assert_eq!(scene.up.number("SELECT count() FROM system.tables WHERE name LIKE 'variant%'"), 0);
}

#[test]
fn a_flattened_row_goes_by_name() {
    let scene = Scene::new();
    scene.run("flat", "1..=100", "a", 0);
    assert_eq!(scene.rows("a", "lo = id AND hi = id"), 100);
}

#[test]
fn a_row_that_serialises_to_something_else_than_it_reads_costs_its_ids() {
    let scene = Scene::new();
    scene.run("lies", "1000001..=1000400", "a", 3);
    assert_eq!(scene.rows("a", "status = 'dead'"), 300);
    assert_eq!(scene.rows("a", "status = 'ok' AND lo = 1 AND id % 4 = 0"), 100);
    for (rest, part) in [(1, "text"), (2, "low"), (3, "-1")] {
        let condition = format!("status = 'dead' AND id % 4 = {rest} AND position(error, '{part}') > 0");
        assert_eq!(scene.rows("a", &condition), 100, "{part}");
    }
}

/// A sink leaves rows whose columns its table does not have, names the columns, and holds up no other run.
#[test]
fn rows_of_a_schema_that_the_table_does_not_have_wait_and_are_named() {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    // The worker's build starts where the table has its column, which then is taken away.
    scene.up.ask("ALTER TABLE millstream.variant_rows ADD COLUMN top UInt64");
    let mut renamed = scene.start("renamed", "renamed", &["work"]);
    wait_until("a worker", SOON, || match scene.host.log("renamed") {
        log if log.contains("working") => Ok(()),
        log => Err(log),
    });
    scene.up.ask("ALTER TABLE millstream.variant_rows DROP COLUMN top SETTINGS alter_sync = 2");
    let _sink = scene.start("sink", "lohi", &["sink"]);
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "foreign"]).expect(0);
    wait_until("rows that are left", SOON, || match scene.host.log("sink") {
        log if log.contains("rows of another schema are not stored") => Ok(log),
        log => Err(log),
    });
    assert!(scene.host.log("sink").contains("`top`"), "{}", scene.host.log("sink"));
    renamed.kill();
    let _worker = scene.start("work", "lohi", &["work"]);
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "own"]).expect(0);
    scene.host.wait_sealed("own", SOON);
    assert_eq!(scene.rows("foreign", "1"), 0);
    // Once the table has the column, they are stored by this very sink.
    scene.up.ask("ALTER TABLE millstream.variant_rows ADD COLUMN top UInt64");
    scene.host.wait_sealed("foreign", SOON);
    assert_eq!(scene.rows("foreign", "lo = id AND top = id + 1000 AND hi = 0"), 1000);
}

/// Two versions that differ by an added column, side by side while a fleet is deployed.
#[test]
fn two_builds_work_on_one_run_while_a_column_is_added() {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    let _old_sink = scene.start("old-sink", "lohi", &["sink"]);
    let _old_worker = scene.start("old-work", "lohi", &["work"]);
    scene.call("extra", &["setup", "--yes"]).expect(0);
    let _new_sink = scene.start("new-sink", "extra", &["sink"]);
    let _new_worker = scene.start("new-work", "extra", &["work"]);
    // An old process can still be started.
    let _late = scene.start("late-work", "lohi", &["work"]);
    scene.call("extra", &["produce", "--ids", "1..=200000", "--run", "a", "--batch", "500"]).expect(0);
    scene.host.wait_sealed("a", SOON);
    assert_eq!(scene.rows("a", "lo = id AND hi = id + 1000 AND extra IN (0, 7)"), 200_000);
    assert_eq!(
        scene
            .rows("a", "(extra = 7) = startsWith(build, '3+') AND host != '' AND computed_at > '2026-01-01'"),
        200_000
    );
    let report = scene.call("extra", &["verify", "a", "--values", "--json"]).expect(0).json();
    for figure in ["values_at_fault", "values_unproven", "wrong_batches", "missing_batches", "short_batches"]
    {
        assert_eq!(report[figure], 0, "{figure}: {report}");
    }
}

/// An operator's constraint refuses what one build computes; a mended build is deployed.
#[test]
fn rows_that_clickhouse_refuses_are_computed_again_by_a_mended_build() {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    scene.up.ask("ALTER TABLE millstream.variant_rows ADD CONSTRAINT small CHECK hi < 1000000");
    let _sink = scene.start("sink", "lohi", &["sink"]);
    let mut faulty = scene.start("faulty", "large", &["work"]);
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "a", "--batch", "100"]).expect(0);
    wait_until("a refusal", SOON, || match scene.host.log("sink") {
        log if log.contains("ClickHouse refuses this batch's rows") => Ok(()),
        log => Err(log),
    });
    let log = scene.host.log("sink");
    assert!(log.contains("5+") && log.contains("--recompute"), "{log}");
    wait_until("all batches computed", SOON, || match scene.host.status("a") {
        status if status["pending"] == 0 && status["in_flight"] == 0 => Ok(()),
        status => Err(status.to_string()),
    });
    faulty.kill();
    let _mended = scene.start("mended", "lohi", &["work"]);
    scene.call("lohi", &["verify", "a", "--repair", "--recompute"]);
    scene.host.wait_sealed("a", SOON);
    assert_eq!(scene.rows("a", "hi = id + 1000 AND startsWith(build, '1+')"), 1000);
}

/// A scene in which ClickHouse refuses the rows of run `refused`, with a sink that goes on and no worker.
fn refusing() -> (Scene, Process) {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    scene.up.ask("ALTER TABLE millstream.variant_rows ADD CONSTRAINT small CHECK hi < 1000000");
    let sink = scene.start("sink", "lohi", &["sink"]);
    let mut faulty = scene.start("faulty", "large", &["work"]);
    scene.call("lohi", &["produce", "--ids", "1..=100", "--run", "refused", "--batch", "100"]).expect(0);
    scene.host.wait_log("sink", "ClickHouse refuses this batch's rows");
    faulty.kill();
    (scene, sink)
}

/// Rows that come back for ever are those of another run: what is missing of this one is lost.
#[test]
fn rows_that_clickhouse_refuses_hold_up_no_repair_of_another_run() {
    let (scene, mut sink) = refusing();
    let mut nats = Nats::connect(&scene.up.nats);
    sink.signal("TERM");
    sink.wait(SOON);
    let words = ["produce", "--ids", "1..=1000", "--batch", "100", "--run"];
    for run in ["purged", "lost"] {
        scene.call("lohi", &[&words[..], &[run]].concat()).expect(0);
    }
    // One batch of it cannot be computed yet, so that it is not sealed before rows of others are lost.
    let gone = nats.api("STREAM.PURGE.variant_ids", &json!({ "filter": "variant.ids.lost.9" }));
    assert_eq!(gone["purged"], 1, "{gone}");
    let _worker = scene.start("work", "lohi", &["work"]);
    wait_until("rows of every batch", SOON, || match nats.messages("variant_rows") {
        // One of the run that is refused, ten, and nine.
        20 => Ok(()),
        found => Err(format!("{found} messages")),
    });
    let purged = nats.api("STREAM.PURGE.variant_rows", &json!({ "filter": "variant.rows.purged.1.3" }));
    assert_eq!(purged["purged"], 1, "{purged}");
    let _sink = scene.start("second-sink", "lohi", &["sink"]);
    scene.host.wait_log("second-sink", "ClickHouse refuses this batch's rows");
    scene.host.wait_sealed("purged", SOON);
    wait_until("rows of the other run", SOON, || match scene.rows("lost", "1") {
        900.. => Ok(()),
        found => Err(format!("{found} rows")),
    });
    scene.up.ask(
        "ALTER TABLE millstream.variant_rows DELETE WHERE run = 'lost' AND (batch = 1 OR batch = 5 AND id % 3 = 0) \
         SETTINGS mutations_sync = 2",
    );
    scene.call("lohi", &[&words[..], &["lost"]].concat()).expect(0);
    scene.host.wait_sealed("lost", SOON);
    for run in ["purged", "lost"] {
        scene.call("lohi", &["verify", run, "--values"]).expect(0);
        assert_eq!(scene.rows(run, "hi = id + 1000"), 1000);
    }
    assert_ne!(scene.host.status("refused")["state"], "sealed");
}

/// Nothing is done that comes to the same again, and what helps is said.
#[test]
fn a_repair_of_rows_that_clickhouse_refuses_says_so() {
    let (scene, _sink) = refusing();
    let status = wait_until("what waits in status", SOON, || {
        let told = scene.call("lohi", &["status", "refused"]).stdout;
        if told.contains("waiting ") { Ok(told) } else { Err(told) }
    });
    let drops = "`ALTER TABLE `millstream`.`variant_rows` DROP CONSTRAINT `small`` takes that constraint from the table";
    let recompute = "`verify refused --repair --recompute` has these ids computed again";
    let doctor = scene.call("lohi", &["doctor"]).stdout;
    for told in [&status, &doctor] {
        for part in ["Constraint `small`", drops, recompute] {
            assert!(told.contains(part), "`{part}` is not in {told}");
        }
        assert!(!told.contains("setup --yes"), "{told}");
    }
    let _worker = scene.start("work", "large", &["work"]);
    let told = wait_until("the reason", SOON, || {
        let called = scene.call("lohi", &["verify", "refused", "--repair"]);
        let told = called.stdout + &called.stderr;
        if told.contains("ClickHouse refuses") { Ok(told) } else { Err(told) }
    });
    for part in ["code 469", "build `5+", "verify refused --repair --recompute"] {
        assert!(told.contains(part), "`{part}` is not in {told}");
    }
    assert!(!told.contains("see that `work` and `sink` run"), "{told}");
    let report = scene.call("lohi", &["verify", "refused", "--repair", "--json"]).json();
    assert_eq!(report["repair"]["batches_again"], 0, "{report}");
    // Unattended, the sealer says it as well.
    scene.host.wait_log("sink", "the pass is not sealed, and waits");
}

#[test]
fn values_that_were_changed_are_found_and_computed_again() {
    let scene = Scene::new();
    scene.run("lohi", "1..=5000", "a", 0);
    scene
        .up
        .ask("ALTER TABLE millstream.variant_rows UPDATE hi = 5 WHERE id = 77 SETTINGS mutations_sync = 2");
    // Every id has its row still.
    scene.call("lohi", &["verify", "a"]).expect(0);
    let report = scene.call("lohi", &["verify", "a", "--values", "--json"]).expect(1).json();
    assert_eq!((&report["values_at_fault"], &report["wrong_batches"]), (&1.into(), &1.into()), "{report}");
    let _worker = scene.start("work", "lohi", &["work"]);
    let _sink = scene.start("sink", "lohi", &["sink"]);
    scene.call("lohi", &["verify", "a", "--repair"]);
    wait_until("values as they were computed", SOON, || {
        match scene.call("lohi", &["verify", "a", "--values"]) {
            Called { code: 0, .. } => Ok(()),
            called => Err(called.stdout),
        }
    });
    assert_eq!(scene.rows("a", "lo = id AND hi = id + 1000"), 5000);
}

#[test]
fn values_of_a_column_that_was_dropped_are_not_proven_and_not_wrong() {
    let scene = Scene::new();
    scene.run("extra", "1..=5000", "a", 0);
    scene.up.ask("ALTER TABLE millstream.variant_rows DROP COLUMN extra");
    let called = scene.call("lohi", &["verify", "a", "--values", "--repair"]).expect(0);
    assert!(called.stdout.contains("not proven in"), "{}", called.stdout);
    assert_eq!(scene.rows("a", "lo = id AND hi = id + 1000"), 5000);
}

#[test]
fn a_column_that_was_widened_holds_values_that_the_older_build_has_not() {
    let scene = Scene::new();
    scene.run("lohi", "1..=5000", "a", 0);
    scene
        .up
        .ask("ALTER TABLE millstream.variant_rows MODIFY COLUMN hi Nullable(UInt64) SETTINGS alter_sync = 2");
    scene.run("nullable", "1..=5000", "b", 0);
    for (build, run) in [("lohi", "a"), ("nullable", "a"), ("lohi", "b"), ("nullable", "b")] {
        scene.call(build, &["verify", run, "--values"]).expect(0);
    }
    assert_eq!(scene.rows("b", "isNull(hi) = (id % 2)"), 5000);
}

#[test]
fn a_pass_takes_over_nothing_but_what_was_computed() {
    let scene = Scene::new();
    let mut sink = scene.start("sink", "kinds", &["sink"]);
    scene.call("kinds", &["setup"]).expect(0);
    let _worker = scene.start("work", "kinds", &["work"]);
    scene.call("kinds", &["produce", "--ids", "1..=1000", "--run", "a", "--batch", "100"]).expect(0);
    scene.host.wait_sealed("a", SOON);
    scene.call("kinds", &["replay", "a", "--dead"]).expect(0);
    wait_until("the second pass sealed", SOON, || match scene.host.status("a") {
        status if status["pass"] == 2 && status["state"] == "sealed" => Ok(()),
        status => Err(status.to_string()),
    });
    scene.call("kinds", &["verify", "a", "--values"]).expect(0);
    assert_eq!(scene.rows("a", "pass = 2"), 1000);
    // What is copied was computed so: a base that somebody changed is refused.
    sink.kill();
    scene.up.ask(
        "ALTER TABLE millstream.variant_rows UPDATE kind = 'high' WHERE pass = 2 AND id = 2 SETTINGS mutations_sync = 2",
    );
    scene.call("kinds", &["replay", "a", "--dead"]).expect(0);
    let _sink = scene.start("second-sink", "kinds", &["sink"]);
    wait_until("a refusal", SOON, || match scene.host.log("second-sink") {
        log if log.contains("hold other values than those computed") => Ok(()),
        log => Err(log),
    });
    assert_ne!(scene.host.status("a")["state"], "sealed");
}

/// An operator drops a column under a running sink: the rows wait, named, and hold up no other run.
#[test]
fn rows_whose_column_is_dropped_under_a_running_sink_wait_and_are_named() {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "waits"]).expect(0);
    scene.call("lohi", &["pause", "waits"]).expect(0);
    let _sink = scene.start("sink", "lohi", &["sink"]);
    let _worker = scene.start("work", "lohi", &["work"]);
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "before"]).expect(0);
    scene.host.wait_sealed("before", SOON);
    // The sink has asked the table a moment ago, and goes by that.
    scene.up.ask("ALTER TABLE millstream.variant_rows DROP COLUMN hi SETTINGS mutations_sync = 2");
    scene.call("lohi", &["resume", "waits"]).expect(0);
    wait_until("rows that are left", SOON, || match scene.host.log("sink") {
        log if log.contains("rows of another schema are not stored") => Ok(()),
        log => Err(log),
    });
    assert!(scene.host.log("sink").contains("the table has no column `hi`"), "{}", scene.host.log("sink"));
    assert_eq!(scene.rows("waits", "1"), 0);
    // Not in its log alone.
    let status = wait_until("a report of the sink", SOON, || {
        match scene.call("lohi", &["status", "waits"]).expect(0).stdout {
            told if told.contains("has no column `hi`") => Ok(told),
            told => Err(told),
        }
    });
    assert!(status.contains("rows of build `1+") && status.contains("setup --yes"), "{status}");
    let doctor = scene.call("lohi", &["doctor"]).stdout;
    assert!(doctor.contains("warn  rows waiting") && doctor.contains("has no column `hi`"), "{doctor}");
    scene.up.ask("ALTER TABLE millstream.variant_rows ADD COLUMN hi UInt64");
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "after"]).expect(0);
    scene.host.wait_sealed("waits", SOON);
    scene.host.wait_sealed("after", SOON);
    assert_eq!(scene.rows("waits", "hi = id + 1000"), 1000);
}

/// Another build's rows, for which the table has no column by now.
#[test]
fn a_rebuild_ends_where_the_table_does_not_take_the_rows() {
    let scene = Scene::new();
    std::fs::write(scene.host.path().join("millstream.toml"), "[streams]\nkeep_rows = '1h'\n")
        .expect("written");
    scene.run("extra", "1..=1000", "a", 0);
    scene.up.ask("TRUNCATE TABLE millstream.variant_rows");
    scene.up.ask("ALTER TABLE millstream.variant_rows DROP COLUMN extra SETTINGS mutations_sync = 2");
    let refused = scene.call("lohi", &["rebuild", "a"]).expect(1);
    refused.says(&[
        "rows of build `3+",
        "has no column `extra` (UInt32)",
        "hint: ",
        "setup --yes",
        "rebuild a",
    ]);
    scene.call("extra", &["setup", "--yes"]).expect(0);
    scene.call("lohi", &["rebuild", "a"]).expect(0);
    assert_eq!(scene.rows("a", "extra = 7"), 1000);
}

/// Where versions of the columns cannot be kept, rows are stored all the same.
#[test]
fn a_sink_goes_on_without_the_table_of_schemas() {
    let scene = Scene::new();
    scene.call("lohi", &["setup"]).expect(0);
    scene.up.ask("ALTER TABLE millstream.variant_rows ADD COLUMN extra UInt32");
    scene.call("lohi", &["produce", "--ids", "1..=1000", "--run", "a"]).expect(0);
    scene.call("lohi", &["pause", "a"]).expect(0);
    let _services =
        [("sink", "lohi"), ("work", "extra")].map(|(role, build)| scene.start(role, build, &[role]));
    wait_until("both services", SOON, || match scene.host.status("a") {
        status if status["hosts"].as_array().is_some_and(|hosts| hosts.len() == 2) => Ok(()),
        status => Err(status.to_string()),
    });
    // What sets up would make it anew.
    scene.up.ask("DROP TABLE millstream.variant_schemas");
    scene.call("lohi", &["resume", "a"]).expect(0);
    wait_until("stored rows", SOON, || match scene.rows("a", "extra = 7") {
        1000 => Ok(()),
        rows => Err(format!("{rows} rows: {}", scene.host.log("sink"))),
    });
    assert!(scene.host.log("sink").contains("the schema version is not kept"), "{}", scene.host.log("sink"));
}
