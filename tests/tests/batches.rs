//! Batches of a size that nobody named: chosen by timing the run's own ids, said, kept, and not chosen a second time.

use std::fs;

use serde_json::Value;
use tests::{Called, Host, SOON, wait_until};

/// A number of a JSON object, by the names on the way to it.
fn number(value: &Value, path: &[&str]) -> u64 {
    let found = path.iter().fold(value, |value, key| &value[*key]);
    found.as_u64().unwrap_or_else(|| panic!("no number {path:?} in {value}"))
}

fn tame(micros: u64) -> Host {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    host.env.push(("TRIAL_MICROS".into(), micros.to_string()));
    host
}

/// What was chosen, after it was said in words too.
fn chosen(called: Called) -> (Value, Value) {
    let published = called.says(&["batches of ", "one host of ", " on a batch"]).json();
    (published["batch"].clone(), published)
}

#[test]
fn a_batch_is_two_seconds_of_one_host() {
    let host = tame(2000);
    let _up = host.up();
    let (batch, published) =
        chosen(host.call(&["produce", "--ids", "1..=1000000", "--run", "a", "--json"]).expect(0));
    let [size, threads, nanos] =
        [&["batch_ids"][..], &["threads"], &["timing", "id_nanos"]].map(|path| number(&batch, path));
    assert_eq!(batch["bound"], "time", "{batch}");
    // The function takes that long by the clock, however busy the machine is.
    assert!(nanos >= 2_000_000, "{batch}");
    let works = size * nanos / threads;
    assert!((1_800_000_000..=2_000_000_000).contains(&works), "{works} ns on a batch: {batch}");
    assert_eq!(number(&published, &["batches"]), 1_000_000u64.div_ceil(size));
    let again = host.call(&["produce", "--ids", "1..=1000000", "--run", "a", "--json"]).expect(0);
    assert!(!again.stderr.contains("batches of "), "{}", again.stderr);
}

#[test]
fn a_producer_that_was_killed_goes_on_with_the_size_it_had_chosen() {
    let mut host = tame(1000);
    let _up = host.up();
    let args = ["produce", "--ids", "1..=20000000", "--run", "a", "--json"];
    let mut producer = host.start("produce", &args);
    wait_until("published batches", SOON, || {
        let status = host.call(&["status", "a", "--json"]);
        let pending = if status.code == 0 { number(&status.json(), &["pending"]) } else { 0 };
        if pending > 0 { Ok(()) } else { Err(format!("{}{}", status.stderr, host.log("produce"))) }
    });
    producer.kill();
    assert_eq!(host.status("a")["state"], "publishing", "it was over before it could be killed");
    // As fast as it is now, another size would be chosen.
    host.env.retain(|(name, _)| name != "TRIAL_MICROS");
    let resumed = host.call(&args).expect(0);
    assert!(!resumed.stderr.contains("batches of "), "{}", resumed.stderr);
    let resumed = resumed.json();
    assert!(
        number(&resumed, &["batches_found"]) > 0 && number(&resumed, &["batches_written"]) > 0,
        "{resumed}"
    );
    assert_eq!(number(&resumed, &["ids"]), 20_000_000);
    assert!(number(&resumed, &["batches"]) >= 20_000_000 / 4_000, "{resumed}");
}

#[test]
fn ids_that_crash_or_never_end_do_not_hurt_the_producer() {
    let host = Host::new(env!("CARGO_BIN_EXE_rogue"));
    let _up = host.up();
    let (batch, published) =
        chosen(host.call(&["produce", "--ids", "1..=1000000", "--run", "a", "--json"]).expect(0));
    assert!(number(&batch, &["timing", "ids"]) > 0, "{batch}");
    assert_eq!(number(&published, &["ids"]), 1_000_000);
    // All of these end their process.
    let ids: String = (0..6_400).map(|thousand| format!("{}\n", thousand * 1000 + 102)).collect();
    fs::write(host.path().join("ids.txt"), ids).expect("written");
    let called = host.call(&["produce", "--file", "ids.txt", "--run", "b", "--json"]).expect(0);
    let called = called.says(&[
        "batches of 25 ids: the function could not be timed (every id of the sample became a dead letter), so that \
         hosts can share the run",
    ]);
    assert_eq!(called.json()["batches"], 256);
}

#[test]
fn tune_shows_the_curve_and_the_choice() {
    let host = tame(1000);
    let tune = ["tune", "--ids", "1..=1000000", "--for", "10s"];
    let found = host.call(&[&tune[..], &["--json", "--threads", "2"]].concat()).expect(0).json();
    let measured = found["measured"].as_array().expect("a list");
    let threads = |cell: &Value| number(cell, &["threads"]);
    assert!(measured.iter().any(|cell| threads(cell) == 1), "{found}");
    assert!(measured.iter().any(|cell| threads(cell) == 2), "{found}");
    for cell in measured {
        // A thousand a second is what one thread can do by the clock.
        let rate = cell["ids_per_second"].as_f64().expect("a number");
        assert!(rate > 0.0 && rate <= 1_000.0 * threads(cell) as f64, "{cell}");
        assert!(rate <= found["best"]["ids_per_second"].as_f64().expect("a number"), "{found}");
    }
    assert_eq!(found["auto"]["bound"], "time", "{found}");
    let text = host.call(&tune).expect(0).stdout;
    for part in ["threads  ids a batch", "█", "\nbest: ", "\n--batch auto: batches of "] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    host.call(&["tune"]).expect(2);
    assert!(!host.path().join(".millstream").exists(), "no servers are needed");
}

#[test]
fn rows_of_a_batch_fit_in_one_message() {
    let host = Host::new(env!("CARGO_BIN_EXE_bulky"));
    // Such a host would work on many more of them in two seconds, however slow this one is.
    fs::write(host.path().join("millstream.toml"), "[work]\nthreads = 256\n").expect("written");
    let _up = host.up();
    let (batch, _) = chosen(host.call(&["produce", "--ids", "1..=100000", "--run", "a", "--json"]).expect(0));
    assert_eq!(batch["bound"], "row_bytes", "{batch}");
    let rows = number(&batch, &["batch_ids"]) * number(&batch, &["timing", "row_bytes"]);
    assert!((1 << 20..=4 << 20).contains(&rows), "{rows} bytes of rows: {batch}");
}

#[test]
fn a_short_run_is_cut_so_that_it_can_be_shared() {
    let host = tame(0);
    let run = |ids: &str, run: &str| {
        let called = host.call(&["run", "--ids", ids, "--run", run, "--json"]).expect(0);
        assert_eq!(called.json()["sealed"], true);
        called.says(&["so that hosts can share the run"]);
        number(&host.status(run), &["batches"])
    };
    assert_eq!(run("1..=10", "few"), 10);
    let some = run("1..=6400", "some");
    assert!((64..=70).contains(&some), "{some} batches");
}
