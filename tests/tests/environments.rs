//! One pipeline in two environments on the same servers (**environments-do-not-meet**).

use tests::{Host, SOON};

fn tame() -> Host {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    host
}

const STAGING: [&str; 2] = ["--namespace", "staging"];

fn in_staging<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &STAGING].concat()
}

#[test]
fn two_namespaces_share_servers_and_nothing_else() {
    let host = tame();
    let up = host.up();
    host.call(&["produce", "--ids", "1..=1000", "--run", "a"]).expect(0);
    host.call(&in_staging(&["produce", "--ids", "1..=500", "--run", "a"])).expect(0);
    let production = [host.start("work", &["work"]), host.start("sink", &["sink"])];
    host.wait_sealed("a", SOON);
    // No process of the other environment has touched it.
    assert!(host.call(&in_staging(&["status", "a", "--json"])).json()["done"] == 0);
    drop(production);
    let _staging =
        [host.start("work-s", &in_staging(&["work"])), host.start("sink-s", &in_staging(&["sink"]))];
    tests::wait_until("staging's run sealed", SOON, || {
        let status = host.call(&in_staging(&["status", "a", "--json"])).json();
        if status["state"] == "sealed" { Ok(()) } else { Err(status.to_string()) }
    });
    assert_eq!(up.number("SELECT count() FROM millstream.trial"), 1000);
    assert_eq!(up.number("SELECT count() FROM millstream_staging.trial"), 500);
    assert_eq!(host.verify("a")["ids"], 1000);
    let doctor = host.call(&in_staging(&["doctor"]));
    assert!(doctor.code < 2, "{doctor:?}");
}

#[test]
fn what_would_mix_two_environments_is_refused_with_both_names() {
    let host = tame();
    let _up = host.up();
    host.call(&["produce", "--ids", "1..=10", "--run", "a"]).expect(0);
    host.call(&in_staging(&["produce", "--ids", "1..=10", "--run", "a"])).expect(0);
    // Another database on the same streams; the other environment's database; its streams.
    for (args, says) in [
        (&["--database", "other"][..], "database `other` without a namespace"),
        (
            &["--namespace", "staging", "--database", "millstream"],
            "database `millstream` in namespace `staging`",
        ),
        (&["--namespace", "third", "--database", "millstream"], "database `millstream` in namespace `third`"),
        (&["--namespace", "staging", "--database", "fourth"], "database `fourth` in namespace `staging`"),
    ] {
        for command in
            [&["sink"][..], &["work"], &["produce", "--ids", "1..=10", "--run", "b"], &["status", "a"]]
        {
            if command[0] == "status" && args[1] == "third" {
                continue; // There is nothing of it yet, which is the answer.
            }
            host.call(&[command, args].concat()).expect(1).says(&[
                "it belongs to database",
                says,
                "--namespace",
            ]);
        }
    }
    host.call(&["runs", "--namespace", "a-b"]).expect(2).says(&["--namespace: namespace `a-b` is not"]);
}

/// Any program removes any pipeline of its environment, by name.
#[test]
fn a_pipeline_is_removed_as_a_whole() {
    let host = tame();
    let up = host.up();
    host.call(&["produce", "--ids", "1..=1000", "--run", "a"]).expect(0);
    let services = [host.start("work", &["work"]), host.start("sink", &["sink"])];
    host.wait_sealed("a", SOON);
    up.ask("CREATE TABLE millstream.trial_notes (a UInt8) ENGINE = Memory");
    let doctor = host.call(&["doctor"]);
    assert!(doctor.stdout.contains("reserved: trial "), "{}", doctor.stdout);
    let other = Host::new(env!("CARGO_BIN_EXE_words"));
    let data = host.path().join(".millstream").display().to_string();
    let forget =
        |more: &[&str]| other.call(&[&["forget", "--pipeline", "trial", "--data", &data], more].concat());
    forget(&["--yes"]).expect(1).says(&["processes work: ", "work on ", "sink on ", "stop them first"]);
    for mut service in services {
        service.signal("TERM");
        service.wait(SOON);
    }
    let told = forget(&[]).expect(0);
    for part in
        ["nothing was changed, --yes does it", "`millstream`.`trial_rows`", "1,000 rows", "KV_trial_runs"]
    {
        assert!(told.stdout.contains(part), "{}", told.stdout);
    }
    assert_eq!(host.verify("a")["sealed"], true);
    let done = forget(&["--yes", "--json"]).expect(0).json();
    assert_eq!((&done["removed"], &done["tables"].as_array().map(Vec::len)), (&true.into(), &Some(8)));
    assert_eq!(up.ask("SELECT name FROM system.tables WHERE database = 'millstream'").trim(), "trial_notes");
    let nothing = forget(&["--yes"]).expect(0);
    assert!(nothing.stdout.contains("there is nothing of a pipeline `trial`"), "{}", nothing.stdout);
    // And the name is free.
    host.call(&["run", "--ids", "1..=10", "--run", "a"]).expect(0);
}

/// The reservations of each are modest, so that they fit beside each other; a stream that is full grows.
#[test]
fn ten_pipelines_fit_one_local_stack_and_streams_grow() {
    let host = tame();
    let up = host.up();
    for number in 0..10 {
        let namespace = format!("n{number}");
        host.call(&["produce", "--ids", "1..=10", "--run", "a", "--namespace", &namespace]).expect(0);
    }
    let doctor = host.call(&["doctor", "--namespace", "n3"]);
    assert!(doctor.stdout.contains("n3-trial ") && doctor.stdout.contains("2 more"), "{}", doctor.stdout);
    drop(up);
}
