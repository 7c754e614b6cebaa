//! What comes when a run is over: an event, once; a summary; a command.

use serde_json::{Value, json};
use tests::Host;
use tests::nats::Nats;
use tests::variants::VARIABLE;

const WORDS: &[u8] = b"tea\ncoffee\nwasser\nbiscuit\n";

#[test]
fn a_seal_is_announced_once_with_the_summary() {
    let host = Host::new(env!("CARGO_BIN_EXE_words"));
    let up = host.up();
    let mut nats = Nats::connect(&up.nats);
    nats.listen("words.sealed.>");
    let _services = ["work", "sink-1", "sink-2"].map(|name| host.start(name, &[&name[..4]]));
    let mut heard = |run: &str| {
        host.call_with_input(&["produce", "--stdin", "--run", run], WORDS).expect(0);
        let (subject, event) = nats.heard();
        assert_eq!(subject, format!("words.sealed.{run}.1"));
        serde_json::from_slice::<Value>(&event).expect("JSON")
    };
    let event = heard("a");
    let summary = json!([{"words": 4, "longest": 7, "word": "biscuit"}]);
    // Whether 64-bit numbers are quoted is ClickHouse's choice.
    let words = event["summary"][0]["words"].to_string().trim_matches('"').to_owned();
    assert_eq!(
        (&event["run"], &event["ids"], &event["dead"]),
        (&"a".into(), &4.into(), &0.into()),
        "{event}"
    );
    assert_eq!((words.as_str(), &event["summary"][0]["word"]), ("4", &summary[0]["word"]), "{event}");
    // Had there been a second event of the first run, it would be heard before this one.
    heard("b");
    let status = host.status("a");
    assert_eq!(status["summary"], event["summary"], "{status}");
}

#[test]
fn a_command_follows_a_run_with_what_it_came_to() {
    let host = Host::new(env!("CARGO_BIN_EXE_words"));
    let then = "echo \"$MILLSTREAM_RUN $MILLSTREAM_PASS $MILLSTREAM_STATE $MILLSTREAM_IDS $MILLSTREAM_ROWS \
                $MILLSTREAM_DEAD\" > then; echo \"$MILLSTREAM_SUMMARY\" > summary";
    let called = host.call_with_input(&["run", "--stdin", "--run", "w", "--then", then], WORDS).expect(0);
    let read = |name: &str| std::fs::read_to_string(host.path().join(name)).expect("written");
    assert_eq!(read("then"), "w 1 sealed 4 4 0\n");
    let summary: Value = serde_json::from_str(&read("summary")).expect("JSON");
    assert_eq!(summary[0]["word"], "biscuit", "{summary}");
    assert!(called.stdout.contains("longest  word"), "{}", called.stdout);
    let failing = ["run", "--stdin", "--run", "v", "--then", "exit 7"];
    host.call_with_input(&failing, WORDS).expect(1).says(&["`exit 7` ended with exit status: 7", "hint: "]);
    host.call(&["verify", "v"]).expect(0);
}

#[test]
fn a_producer_can_wait_for_what_others_compute() {
    let host = Host::new(env!("CARGO_BIN_EXE_words"));
    let _up = host.up();
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    let words = ["produce", "--stdin", "--run", "w", "--then", "echo $MILLSTREAM_ROWS > rows", "--json"];
    let summary = host.call_with_input(&words, WORDS).expect(0).json();
    assert_eq!((&summary["rows"], &summary["sealed"]), (&4.into(), &true.into()), "{summary}");
    assert_eq!(std::fs::read_to_string(host.path().join("rows")).expect("written"), "4\n");
    let waited =
        host.call_with_input(&["produce", "--stdin", "--run", "v", "--wait"], WORDS).expect(0).stdout;
    assert!(waited.contains("published run `v`") && waited.contains("sealed   yes"), "{waited}");
}

#[test]
fn a_run_with_dead_letters_is_complete_too() {
    let host = Host::new(env!("CARGO_BIN_EXE_trial"));
    let words = ["run", "--ids", "1..=1000", "--run", "a", "--then", "echo $MILLSTREAM_DEAD > dead"];
    host.call(&words).expect(3);
    assert_eq!(std::fs::read_to_string(host.path().join("dead")).expect("written"), "3\n");
}

/// The pipeline's own SQL fails at the end of a run: the rows are no less right.
#[test]
fn a_summary_that_fails_is_named_and_the_run_is_sealed() {
    let host = Host::new(env!("CARGO_BIN_EXE_words"));
    let _up = host.up();
    let parts = ["the pipeline's SUMMARY", "code 395", "a word of more than 40 symbols"];
    let long = format!("tea\n{}\n", "long".repeat(20));
    let called = host.call_with_input(&["run", "--stdin", "--run", "w"], long.as_bytes()).expect(0);
    for part in parts.iter().chain(&["sealed   yes"]) {
        assert!(called.stdout.contains(part), "`{part}` is not in {}", called.stdout);
    }
    let status = host.call(&["status", "w"]).expect(0).stdout;
    for part in parts {
        assert!(status.contains(part), "`{part}` is not in {status}");
    }
    let status = host.status("w");
    assert_eq!((&status["state"], &status["summary"]), (&"sealed".into(), &Value::Null), "{status}");
    host.call(&["verify", "w"]).expect(0);
    // With dead letters the exit code is theirs, and one that is no SQL is refused before anything is computed.
    let host = Host::new(env!("CARGO_BIN_EXE_variant"));
    let env = [(VARIABLE, "unsummed")];
    host.call_with_env(&["run", "--ids", "1..=9"], &env).expect(1).says(&[
        "the pipeline's SUMMARY",
        "no_such_column",
        "hint: ",
    ]);
}
