//! The shortest way through everything.

use tests::{Host, SOON};

#[test]
fn a_run_is_computed_stored_and_sealed() {
    let host = Host::new(env!("CARGO_BIN_EXE_trial"));
    let called = host.call(&["run", "--ids", "1..=10000", "--run", "a", "--json"]).expect(3);
    assert_eq!(called.json()["rows"], 10_000);
    assert_eq!(called.json()["dead"], 30);
    let report = host.verify("a");
    assert_eq!((&report["sealed"], &report["complete"]), (&true.into(), &true.into()));
    let answer = host.call(&["sql", "SELECT count(), sum(squared) FROM trial FORMAT TSV"]).expect(0);
    let expected: u64 =
        (1..=10_000u64).filter(|id| !(901..=903).contains(&(id % 1000))).map(|id| id * id).sum();
    assert_eq!(answer.stdout.trim(), format!("9970\t{expected}"));
}

#[test]
fn separate_processes_do_what_one_does() {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    let up = host.up();
    host.call(&["produce", "--ids", "1..=100000", "--run", "a", "--batch", "1000"]).expect(0);
    let _services = ["work-1", "work-2", "sink-1", "sink-2"].map(|name| host.start(name, &[&name[..4]]));
    host.wait_sealed("a", SOON);
    assert_eq!(up.number("SELECT count() FROM millstream.trial"), 100_000);
    assert_eq!(up.number("SELECT count() FROM millstream.trial_rows"), 100_000);
    host.call(&["verify", "a"]).expect(0);
}

#[test]
fn ids_may_be_strings() {
    let host = Host::new(env!("CARGO_BIN_EXE_words"));
    let words = "tea\ncoffee\ntea\nwasser\nmaté\n";
    host.call_with_input(&["run", "--stdin", "--run", "w", "--batch", "3"], words.as_bytes()).expect(0);
    let answer = host.call(&["sql", "SELECT id, length FROM words ORDER BY id FORMAT CSV"]).expect(0);
    assert_eq!(answer.stdout, "\"coffee\",6\n\"maté\",4\n\"tea\",3\n\"wasser\",6\n");
}
