//! Open runs: lines become batches as they come, producers come and go, and the end of the input closes the run.

use std::fs::File;
use std::io::Write;
use std::process::{Child, ChildStdin, Stdio};

use serde_json::Value;
use tests::{Host, SOON, Up, signal, wait_until};

/// `produce --stdin --follow` with a pipe that stays open.
struct Feeder<'a> {
    host: &'a Host,
    name: String,
    child: Child,
    pipe: Option<ChildStdin>,
}

impl<'a> Feeder<'a> {
    fn start(host: &'a Host, name: &str, args: &[&str]) -> Self {
        let log = File::create(host.path().join(format!("{name}.log"))).expect("a log file");
        let args = [&["produce", "--stdin", "--follow", "--run", "feed"], args].concat();
        let mut child = host
            .command(&args)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        let pipe = child.stdin.take();
        Self { host, name: name.to_owned(), child, pipe }
    }

    fn write(&mut self, text: &str) {
        self.pipe.as_mut().expect("open").write_all(text.as_bytes()).expect("it reads its input");
    }

    fn write_ids(&mut self, ids: std::ops::RangeInclusive<u64>) {
        let text: String = ids.map(|id| format!("{id}\n")).collect();
        self.write(&text);
    }

    fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits for its end: the exit code, and all that it said.
    fn wait(mut self) -> (Option<i32>, String) {
        let status = wait_until("the end of a producer", SOON, || {
            self.child.try_wait().expect("it can be waited for").ok_or_else(|| self.host.log(&self.name))
        });
        (status.code(), self.host.log(&self.name))
    }

    /// Ends its input, and waits.
    fn end(mut self) -> (Option<i32>, String) {
        drop(self.pipe.take());
        self.wait()
    }
}

impl Drop for Feeder<'_> {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ended = self.child.kill();
        self.child.wait().expect("it ends");
    }
}

fn tame() -> Host {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    host
}

/// Waits until the stream holds so many batches that nobody has taken.
fn wait_pending(host: &Host, batches: u64) {
    wait_until(&format!("{batches} batches"), SOON, || {
        let called = host.call(&["status", "feed", "--json"]);
        let pending = if called.code == 0 { called.json()["pending"].clone() } else { Value::Null };
        if pending == batches { Ok(()) } else { Err(format!("{pending} pending {}", called.stderr)) }
    });
}

/// Has it computed and sealed, and checks that these ids are there.
fn expect_sealed(host: &Host, up: &Up, ids: std::ops::RangeInclusive<u64>) {
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    host.wait_sealed("feed", SOON);
    host.call(&["verify", "feed"]).expect(0);
    let all = up.ask("SELECT count(), min(id), max(id), uniqExact(id) FROM millstream.trial");
    let count = ids.end() - ids.start() + 1;
    assert_eq!(all, format!("{count}\t{}\t{}\t{count}\n", ids.start(), ids.end()));
}

#[test]
fn lines_become_rows_while_the_run_is_open() {
    let host = tame();
    let up = host.up();
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    let mut feeder = Feeder::start(&host, "feeder", &["--linger", "100ms"]);
    // A line that is not whole holds nothing back.
    feeder.write("1\n2\n3");
    let rows = || up.ask("SELECT count() FROM millstream.trial_live");
    wait_until("rows of the first lines", SOON, || {
        match host.path().join(".millstream").exists().then(rows) {
            Some(count) if count == "2\n" => Ok(()),
            count => Err(format!("{count:?} {}", host.log("feeder"))),
        }
    });
    let status = host.status("feed");
    assert_eq!((&status["state"], &status["done"]), (&"publishing".into(), &2.into()), "{status}");
    feeder.write("\nx\n\n4\n");
    let (code, log) = feeder.end();
    assert_eq!(code, Some(3), "{log}");
    for part in [
        "following standard input into run `feed`",
        "published run `feed`: 4 ids in ",
        "error: failed to publish all of standard input: a line of it holds no id\n  line 4: `x` is not a whole number",
        "hint: all other lines are published",
    ] {
        assert!(log.contains(part), "`{part}` is not in\n{log}");
    }
    host.wait_sealed("feed", SOON);
    host.call(&["verify", "feed"]).expect(0);
    assert_eq!(
        up.ask("SELECT groupArray(id) FROM (SELECT id FROM millstream.trial ORDER BY id)"),
        "[1,2,3,4]\n"
    );
}

#[test]
fn producers_come_and_go_and_the_end_of_input_closes() {
    let host = tame();
    let up = host.up();
    let batches_of_100 = ["--batch", "100", "--linger", "10min"];
    let mut killed = Feeder::start(&host, "killed", &batches_of_100);
    killed.write_ids(1..=1000);
    wait_pending(&host, 10);
    killed.signal("KILL");
    assert_eq!(killed.wait().0, None);

    let mut told = Feeder::start(&host, "told", &batches_of_100);
    // Written at once, they are read at once: when a batch of them is there, the rest is held.
    told.write_ids(1001..=1250);
    wait_pending(&host, 12);
    told.signal("TERM");
    let (code, log) = told.wait();
    assert_eq!(code, Some(130), "{log}");
    assert!(log.contains("1,250 ids in 13 batches; it is open"), "{log}");
    assert!(log.contains("`produce --stdin --follow --run feed < /dev/null` closes it"), "{log}");
    assert_eq!(host.status("feed")["state"], "publishing");

    let refused = host.call(&["produce", "--ids", "1..=5", "--run", "feed"]).expect(1);
    refused.says(&["it was made of lines as they come", "not of ids 1..=5"]);
    let close = ["produce", "--stdin", "--follow", "--run", "feed", "--json"];
    for _ in 0..2 {
        let closed = host.call(&close).expect(0).json();
        assert_eq!((&closed["ids"], &closed["batches"]), (&1250.into(), &13.into()), "{closed}");
        assert_eq!(closed["closed"], true);
    }
    host.call_with_input(&close, b"7\n")
        .expect(1)
        .says(&["it is closed, with 1250 ids", "hint: name a new run"]);
    expect_sealed(&host, &up, 1..=1250);
}

#[test]
fn of_two_producers_the_first_to_end_closes_for_both() {
    let host = tame();
    let up = host.up();
    let args = ["--batch", "10", "--linger", "1min"];
    let mut feeders = [Feeder::start(&host, "one", &args), Feeder::start(&host, "other", &args)];
    for tens in 0..10 {
        feeders[tens as usize % 2].write_ids(tens * 10 + 1..=tens * 10 + 10);
    }
    wait_pending(&host, 10);
    let [one, mut other] = feeders;
    let (code, log) = one.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("100 ids in 10 batches; it is closed"), "{log}");
    other.write_ids(101..=110);
    let (code, log) = other.wait();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("failed to add 10 ids and what follows to run `feed`: another producer has closed it"),
        "{log}"
    );
    expect_sealed(&host, &up, 1..=100);
}

#[test]
fn the_first_ids_say_how_large_batches_are() {
    let mut host = tame();
    host.env.push(("TRIAL_MICROS".into(), "2000".into()));
    let _up = host.up();
    let mut feeder = Feeder::start(&host, "feeder", &["--linger", "1min"]);
    feeder.write_ids(1..=256);
    let log = wait_until("the size of batches", SOON, || {
        let log = host.log("feeder");
        if log.contains(" on a batch\n") { Ok(log) } else { Err(log) }
    });
    let size =
        log.split_once("batches of ").expect("a size").1.split_once(" ids: an id takes ").expect("a size").0;
    let size: u64 = size.replace(',', "").parse().expect("a number");
    assert!((1..=2_000).contains(&size), "{log}");
    // That was one batch of the size from before anything was known; what follows is of the new one.
    feeder.write_ids(257..=256 + size * 3);
    wait_pending(&host, 4);
    let (code, log) = feeder.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("in 4 batches; it is closed"), "{log}");
}

#[test]
fn a_feed_without_ids_makes_no_closed_run() {
    let host = tame();
    let _up = host.up();
    let follow = ["produce", "--stdin", "--follow", "--run", "feed"];
    host.call(&follow).expect(4).says(&["make a run of lines as they come: there are no ids in it"]);
    // It is open still.
    let closed = host.call_with_input(&follow, b"5\n5\n").expect(0);
    assert_eq!(
        closed.stdout, "published run `feed`: 1 ids in 1 batches, 1 repeated id dropped; it is closed\n",
        "{}",
        closed.stderr
    );
    host.call(&["produce", "--ids", "1..=5", "--follow"]).expect(2);
}

#[test]
fn a_row_beyond_the_end_is_removed_and_the_run_can_be_replayed() {
    let host = tame();
    let up = host.up();
    let lines: String = (1..=30).map(|id| format!("{id}\n")).collect();
    let follow = ["produce", "--stdin", "--follow", "--run", "feed", "--batch", "10"];
    host.call_with_input(&follow, lines.as_bytes()).expect(0);
    expect_sealed(&host, &up, 1..=30);
    let _services = ["work", "sink"].map(|name| host.start(name, &[name]));
    // In the place of the end, which is all that the stream has there.
    up.ask("INSERT INTO millstream.trial_rows SELECT * REPLACE (3 AS batch, 99 AS id) FROM millstream.trial_rows LIMIT 1");
    let report = host.call(&["verify", "feed", "--repair", "--json"]).json();
    assert_eq!(report["wrong"], serde_json::json!([3]), "{report}");
    wait_until("a run that is as it should be", SOON, || match host.call(&["verify", "feed"]) {
        called if called.code == 0 => Ok(()),
        called => Err(called.stdout),
    });
    host.call(&["replay", "feed"]).expect(0);
    wait_until("a second pass", SOON, || {
        let status = host.status("feed");
        let sealed = status["pass"] == 2 && status["state"] == "sealed";
        if sealed { Ok(()) } else { Err(status.to_string()) }
    });
}
