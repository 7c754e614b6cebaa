//! The proof and the repair: what is not as published is never sealed, is named, and is computed again.

use millstream::Id;
use serde_json::{Value, json};
use tests::nats::Nats;
use tests::{Host, Process, SOON, Up, wait_until};

/// A sealed run of 10,000 ids in ten batches, with workers and sinks that go on.
struct Sealed {
    host: Host,
    up: Up,
    services: [Process; 2],
}

impl Sealed {
    fn new() -> Self {
        let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
        host.call(&["produce", "--ids", "1..=10000", "--run", "a", "--batch", "1000"]).expect(0);
        let services = [host.start("work", &["work"]), host.start("sink", &["sink"])];
        host.wait_sealed("a", SOON);
        host.call(&["verify", "a"]).expect(0);
        Self { host, up, services }
    }

    /// Rows that ClickHouse loses.
    fn lose(&self, rows: &str) {
        self.up.ask(&format!(
            "ALTER TABLE millstream.trial_rows DELETE WHERE {rows} SETTINGS mutations_sync = 2"
        ));
    }

    /// What `verify` says of a run that is not as it should be.
    fn faults(&self) -> Value {
        self.host.call(&["verify", "a", "--json"]).expect(1).json()
    }

    /// Repairs, and waits until the pass is sealed anew, as it was.
    fn repair(&self, batches: u64) {
        let sealed_at = "SELECT toString(sealed_at) FROM millstream.trial_passes FINAL";
        let before = self.up.ask(sealed_at);
        let report = self.host.call(&["verify", "a", "--repair", "--json"]).json();
        assert_eq!(report["repair"]["batches_again"], batches, "{report}");
        assert_eq!(report["repair"]["busy"], Value::Null, "{report}");
        wait_until("a new seal", SOON, || {
            let called = self.host.call(&["verify", "a", "--json"]);
            if called.code == 0 { Ok(()) } else { Err(called.stdout) }
        });
        assert!(self.up.ask(sealed_at) > before, "sealed anew");
        let all = "SELECT count(), uniqExact(id), sum(squared) FROM millstream.trial";
        let squares: u64 = (1..=10_000u64).map(|id| id * id).sum();
        assert_eq!(self.up.ask(all), format!("10000\t10000\t{squares}\n"));
        assert_eq!(self.up.number("SELECT count() FROM millstream.trial_rows"), 10_000);
    }
}

fn servers(program: &str) -> (Host, Up) {
    let mut host = Host::new(program);
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    let up = host.up();
    (host, up)
}

/// Compares `(name, value)` pairs of a report.
fn assert_says<const N: usize>(report: &Value, pairs: [(&str, Value); N]) {
    for (name, value) in pairs {
        assert_eq!(report[name], value, "`{name}` of {report}");
    }
}

#[test]
fn proof_digest_is_clickhouses() {
    let up = servers(env!("CARGO_BIN_EXE_trial"));
    let numbers: Vec<u64> =
        (0..64).flat_map(|bit| [1u64 << bit, (1u64 << bit).wrapping_sub(1)]).chain([u64::MAX]).collect();
    let listed: Vec<String> = numbers.iter().map(u64::to_string).collect();
    let answer =
        up.1.ask(&format!("SELECT sipHash64(toUInt64(arrayJoin([{}]::Array(UInt64))))", listed.join(",")));
    let hashes: Vec<u64> = answer.lines().map(|line| line.parse().expect("a number")).collect();
    assert_eq!(hashes, numbers.iter().map(Id::sip_hash).collect::<Vec<_>>());
    // Every length around the hash's blocks of eight, and characters of one to four bytes.
    let words: Vec<String> = (1..70)
        .map(|length| "x".repeat(length))
        .chain(["ü", "日本", "🦀", "a b", "\u{1}"].map(String::from))
        .collect();
    let listed: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let answer = up.1.ask(&format!("SELECT sipHash64(arrayJoin([{}]))", listed.join(",")));
    let hashes: Vec<u64> = answer.lines().map(|line| line.parse().expect("a number")).collect();
    assert_eq!(hashes, words.iter().map(Id::sip_hash).collect::<Vec<_>>());
    // The sum wraps in the same way.
    let sum = numbers.iter().fold(0u64, |sum, id| sum.wrapping_add(id.sip_hash()));
    let listed: Vec<String> = numbers.iter().map(u64::to_string).collect();
    assert_eq!(
        up.1.number(&format!("SELECT sum(sipHash64(arrayJoin([{}]::Array(UInt64))))", listed.join(","))),
        sum
    );
}

#[test]
fn a_run_of_strings_has_the_digest_that_clickhouse_computes() {
    let (host, up) = servers(env!("CARGO_BIN_EXE_words"));
    let words: Vec<String> = (0..5000).map(|number| format!("wörd-{number}")).collect();
    host.call_with_input(
        &["produce", "--stdin", "--run", "w", "--batch", "700"],
        words.join("\n").as_bytes(),
    )
    .expect(0);
    let _services = [host.start("work", &["work"]), host.start("sink", &["sink"])];
    host.wait_sealed("w", SOON);
    let digest = up.number("SELECT sum(sipHash64(concat('wörd-', toString(number)))) FROM numbers(5000)");
    assert_eq!(digest, words.iter().fold(0u64, |sum, word| sum.wrapping_add(word.sip_hash())));
    assert_eq!(
        up.ask("SELECT batches, ids, digest FROM millstream.words_passes"),
        format!("8\t5000\t{digest}\n")
    );
    assert_eq!(
        up.ask("SELECT batches, ids, digest FROM millstream.words_runs FINAL"),
        format!("8\t5000\t{digest}\n")
    );
}

#[test]
fn a_missing_batch_is_named_and_computed_again() {
    let sealed = Sealed::new();
    sealed.lose("batch IN (3, 9)");
    let report = sealed.faults();
    assert_says(
        &report,
        [
            ("missing_batches", 2.into()),
            ("missing", [3, 9].as_slice().into()),
            ("short_batches", 0.into()),
            ("rows", 8000.into()),
            ("digest_matches", false.into()),
            ("complete", false.into()),
        ],
    );
    sealed.repair(2);
}

#[test]
fn a_short_batch_is_named_and_computed_again() {
    let sealed = Sealed::new();
    sealed.lose("batch = 2 AND id % 10 = 0 OR batch = 7 AND id = 7001");
    let report = sealed.faults();
    assert_says(
        &report,
        [
            ("short_batches", 2.into()),
            ("short", [2, 7].as_slice().into()),
            ("missing_batches", 0.into()),
            ("rows", 9899.into()),
            ("complete", false.into()),
        ],
    );
    sealed.repair(2);
}

/// The last batches are missing after the last that is there, the first before the first, and all at once.
#[test]
fn a_run_of_which_nothing_is_left_is_computed_again() {
    let sealed = Sealed::new();
    sealed.lose("1");
    let report = sealed.faults();
    assert_says(
        &report,
        [("missing_batches", 10.into()), ("rows", 0.into()), ("digest_matches", false.into())],
    );
    assert_eq!(report["missing"], Value::from((0..10).collect::<Vec<u32>>()));
    sealed.repair(10);
}

/// The right number of ids, and one of them is another: only the digest knows.
#[test]
fn an_id_in_place_of_another_is_not_complete() {
    let sealed = Sealed::new();
    sealed.lose("id = 4242");
    sealed.up.ask(
        "INSERT INTO millstream.trial_rows SELECT * REPLACE (toUInt64(999999) AS id) \
         FROM (SELECT * FROM millstream.trial_rows WHERE id = 4243)",
    );
    let report = sealed.faults();
    assert_says(
        &report,
        [
            ("rows", 10_000.into()),
            ("digest_matches", false.into()),
            ("complete", false.into()),
            ("missing_batches", 0.into()),
            ("short_batches", 0.into()),
            ("wrong_batches", 1.into()),
            ("wrong", [4].as_slice().into()),
        ],
    );
    sealed.repair(1);
}

/// More ids than the batch has: those that are not its own are removed.
#[test]
fn a_foreign_id_is_removed() {
    let sealed = Sealed::new();
    sealed.up.ask(
        "INSERT INTO millstream.trial_rows SELECT * REPLACE (toUInt64(999999) AS id) \
         FROM (SELECT * FROM millstream.trial_rows WHERE id = 5001)",
    );
    assert_says(
        &sealed.faults(),
        [("rows", 10_001.into()), ("complete", false.into()), ("wrong", [5].as_slice().into())],
    );
    sealed.repair(1);
}

/// What readers see a pass by is compared with its record, and written again.
#[test]
fn a_false_row_among_the_sealed_passes_is_told_and_mended() {
    let sealed = Sealed::new();
    let (host, up) = (&sealed.host, &sealed.up);
    let passes = || up.ask("SELECT * FROM millstream.trial_passes FINAL ORDER BY pass");
    let right = passes();
    let copy = |changed: &str| {
        format!(
            "INSERT INTO millstream.trial_passes SELECT * REPLACE ({changed}) FROM millstream.trial_passes FINAL"
        )
    };
    let update = "ALTER TABLE millstream.trial_passes UPDATE rows = 9999, batches = 11 WHERE 1 \
                  SETTINGS mutations_sync = 2";
    let delete = "ALTER TABLE millstream.trial_passes DELETE WHERE 1 SETTINGS mutations_sync = 2";
    let table = [
        (update.to_owned(), "the row of pass 1: batches 11 in place of 10, rows 9999 in place of 10000"),
        // Readers have the later of two rows.
        (
            copy("5 AS dead, sealed_at + 3600 AS sealed_at"),
            "the row of pass 1: dead 5 in place of 0, sealed_at in",
        ),
        (copy("ids + 1 AS ids, digest + 1 AS digest"), "ids 10001 in place of 10000, digest "),
        (copy("[] AS builds"), "the row of pass 1: builds [] in place of [\""),
        (copy("2::UInt32 AS pass"), "the row of pass 2: no record says that there is such a pass"),
        (delete.to_owned(), "has no row of it"),
    ];
    for (change, says) in table {
        up.ask(&change);
        let told = host.call(&["verify", "a"]).expect(1).stdout;
        assert!(told.contains(says) && told.contains("hint: verify a --repair"), "{change}: {told}");
        let repaired = host.call(&["verify", "a", "--repair"]).expect(0).stdout;
        assert!(repaired.contains("again"), "{repaired}");
        assert_eq!(passes(), right, "{change}");
        host.call(&["verify", "a"]).expect(0);
    }
    assert_eq!(up.number("SELECT count() FROM millstream.trial"), 10_000);
}

/// Mending the row changed the pass's record, and the repair of its rows took that for another repair.
#[test]
fn a_false_row_keeps_no_lost_batch_from_its_repair() {
    let sealed = Sealed::new();
    sealed
        .up
        .ask("ALTER TABLE millstream.trial_passes UPDATE rows = 9999 WHERE 1 SETTINGS mutations_sync = 2");
    sealed.lose("batch = 5");
    sealed.repair(1);
}

/// NATS that was restored from an older copy lacks the newest pass, and a repair took that pass from readers.
#[test]
fn a_pass_whose_record_nats_has_lost_keeps_its_row_and_gets_its_record_back() {
    let sealed = Sealed::new();
    let (host, up) = (&sealed.host, &sealed.up);
    host.call(&["replay", "a"]).expect(0);
    wait_until("the second pass", SOON, || {
        let status = host.status("a");
        if status["pass"] == 2 && status["state"] == "sealed" { Ok(()) } else { Err(status.to_string()) }
    });
    let passes = || up.ask("SELECT * FROM millstream.trial_passes FINAL ORDER BY pass");
    let right = passes();
    let mut nats = Nats::connect(&up.nats);
    let purged = nats.api("STREAM.PURGE.KV_trial_runs", &json!({ "filter": "$KV.trial_runs.pass.a.2" }));
    assert!(purged["purged"].as_u64() > Some(0), "{purged}");
    let told = host.call(&["verify", "a"]).expect(1).stdout;
    assert!(told.contains("the row of pass 2: no record says that there is such a pass"), "{told}");
    let told = host.call(&["verify", "a", "--repair"]).expect(1).stdout;
    assert_eq!(passes(), right, "{told}");
    host.call(&["produce", "--ids", "1..=10000", "--run", "a", "--batch", "1000"]).expect(0);
    host.call(&["verify", "a"]).expect(0);
    assert_eq!((passes(), host.status("a")["pass"].as_u64()), (right, Some(2)));
}

/// A pass that is not sealed is not for readers, whatever the table says.
#[test]
fn a_row_of_a_pass_that_is_not_sealed_is_removed() {
    let mut sealed = Sealed::new();
    for service in &mut sealed.services {
        service.signal("TERM");
        service.wait(SOON);
    }
    sealed.host.call(&["replay", "a"]).expect(0);
    sealed.up.ask(
        "INSERT INTO millstream.trial_passes SELECT * REPLACE (2::UInt32 AS pass) FROM millstream.trial_passes FINAL",
    );
    assert_eq!(sealed.up.number("SELECT count() FROM millstream.trial"), 0);
    let told = sealed.host.call(&["verify", "a"]).expect(1).stdout;
    assert!(told.contains("the row of pass 2: the pass is not sealed, but running"), "{told}");
    let repaired = sealed.host.call(&["verify", "a", "--repair"]).expect(1).stdout;
    assert!(repaired.contains("right again, of pass 2"), "{repaired}");
    assert_eq!(sealed.up.number("SELECT count() FROM millstream.trial"), 10_000);
    assert_eq!(sealed.up.number("SELECT max(pass) FROM millstream.trial_passes"), 1);
}

/// Rows that are lost after they were acked and before the proof.
/// A row that was made a dead letter by hand: every id has its row, and readers lack one.
#[test]
fn dead_letters_that_the_seal_did_not_count_are_told() {
    let sealed = Sealed::new();
    sealed.up.ask(
        "ALTER TABLE millstream.trial_rows UPDATE status = 'dead' WHERE id = 5 SETTINGS mutations_sync = 2",
    );
    let told = sealed.host.call(&["verify", "a"]).expect(1).stdout;
    assert!(told.contains("1, where the seal counted 0") && told.contains("verify a --repair"), "{told}");
    let report = sealed.host.call(&["verify", "a", "--json"]).expect(1).json();
    assert_says(&report, [("dead", 1.into()), ("dead_sealed", 0.into()), ("missing_batches", 0.into())]);
    let status = sealed.host.call(&["status", "a"]).expect(0).stdout;
    assert!(status.contains("1 dead letter") && status.contains("the seal counted 0"), "{status}");
    assert_says(&sealed.host.status("a"), [("dead", 1.into())]);
    sealed.repair(1);
    sealed.host.call(&["verify", "a"]).expect(0);
}

#[test]
fn what_is_not_complete_is_not_sealed() {
    let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
    host.call(&["produce", "--ids", "1..=10000", "--run", "a", "--batch", "1000"]).expect(0);
    up.ask("ALTER TABLE millstream.trial_rows ADD CONSTRAINT held CHECK batch != 5");
    let work = host.start("work", &["work"]);
    let sink = host.start("sink", &["sink"]);
    wait_until("the other nine batches", SOON, || {
        match up.number("SELECT count() FROM millstream.trial_rows") {
            9000 => Ok(()),
            rows => Err(format!("{rows} of 9000")),
        }
    });
    wait_until("batch 5 refused", SOON, || {
        let log = host.log("sink");
        if log.contains("trial.rows.a.1.5") { Ok(()) } else { Err(log) }
    });
    let status = wait_until("the other nine acked", SOON, || {
        let status = host.status("a");
        if status["to_store"] == 1 { Ok(status) } else { Err(status.to_string()) }
    });
    assert_says(&status, [("state", "running".into()), ("done", 9000.into())]);
    assert_eq!(up.number("SELECT count() FROM millstream.trial_passes"), 0);
    assert_says(&host.verify("a"), [("missing", [5].as_slice().into()), ("sealed", false.into())]);
    drop((work, sink));
}

#[test]
fn repeated_ids_are_dropped_within_a_batch_and_reported_across() {
    let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
    // Batches of ten lines: 1 to 9 and 5 again; 11 to 20; 1 to 3 once more, and 21.
    let lines: Vec<u64> = (1..=9).chain([5]).chain(11..=20).chain(1..=3).chain([21]).collect();
    let text: String = lines.iter().map(|id| format!("{id}\n")).collect();
    let words = ["produce", "--stdin", "--run", "a", "--batch", "10", "--json"];
    let published = host.call_with_input(&words, text.as_bytes()).expect(0).json();
    assert_says(&published, [("batches", 3.into()), ("ids", 23.into()), ("dropped_repeats", 1.into())]);
    let _services = [host.start("work", &["work"]), host.start("sink", &["sink"])];
    host.wait_sealed("a", SOON);
    let report = host.call(&["verify", "a", "--json"]).expect(0).json();
    assert_says(
        &report,
        [
            ("ids", 23.into()),
            ("rows", 23.into()),
            ("repeated_ids", 3.into()),
            ("raw_duplicates", 0.into()),
            ("complete", true.into()),
        ],
    );
    assert_eq!(up.ask("SELECT ids, repeated_ids FROM millstream.trial_passes"), "23\t3\n");
    let digest = lines[..9].iter().chain(&lines[10..]).fold(0u64, |sum, id| sum.wrapping_add(id.sip_hash()));
    assert_eq!(up.number("SELECT digest FROM millstream.trial_runs FINAL"), digest);
}
