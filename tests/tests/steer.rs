//! What a person says of runs while they are computed: on every host, and after a restart of everything.

use serde_json::Value;
use tests::nats::stream_messages;
use tests::{Host, Process, SOON, Up, wait_until};

/// Servers, and services that are started again as a supervisor would.
struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    services: Vec<(String, Process)>,
    up: Option<Up>,
    host: Host,
}

impl Scene {
    /// Every id takes this long; `services` are named by their command and a number.
    fn new(micros: u64, services: &[&str]) -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
        host.env.push(("TRIAL_MICROS".into(), micros.to_string()));
        host.env.push(("TRIAL_TAME".into(), "1".into()));
        let up = host.up();
        let mut scene = Self { services: Vec::new(), up: Some(up), host };
        scene.start(services);
        scene
    }

    fn start(&mut self, services: &[&str]) {
        for name in services {
            let command = name.split('-').next().expect("a name has a first part");
            let words: &[&str] = match command {
                "work" => &["work", "--threads", "2"],
                _ => &[command],
            };
            self.services.push(((*name).to_owned(), self.host.start(name, words)));
        }
    }

    /// Kills every process of ours, and starts all of them again.
    fn restart_everything(&mut self) {
        let names: Vec<String> = self
            .services
            .drain(..)
            .map(|(name, mut process)| {
                process.kill();
                name
            })
            .collect();
        // SIGKILL: its servers end with it.
        drop(self.up.take());
        self.up = Some(self.host.up());
        self.start(&names.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn up(&self) -> &Up {
        self.up.as_ref().expect("it is up")
    }

    fn publish(&self, run: &str, ids: u64, batch: u64, more: &[&str]) {
        let (ids, batch) = (format!("1..={ids}"), batch.to_string());
        let words = ["produce", "--ids", &ids, "--run", run, "--batch", &batch];
        self.host.call(&[&words[..], more].concat()).expect(0);
    }

    fn say(&self, words: &[&str]) -> Value {
        self.host.call(&[words, &["--json"]].concat()).expect(0).json()
    }

    fn rows(&self, run: &str) -> u64 {
        self.up().number(&format!("SELECT count() FROM millstream.trial_live WHERE run = '{run}'"))
    }

    fn wait_rows(&self, run: &str, rows: u64) {
        wait_until("rows", SOON, || match self.rows(run) {
            found if found >= rows => Ok(()),
            found => {
                let status = self.host.call(&["status", run]);
                Err(format!("{found} of {rows} rows of `{run}`: {}{}", status.stdout, status.stderr))
            }
        });
    }

    /// Waits until workers hold nothing of a run that does not run, and all that was computed is stored; the rows then.
    fn wait_at_rest(&self, run: &str) -> u64 {
        wait_until("rest", SOON, || {
            let status = self.host.status(run);
            match (status["in_flight"].as_u64(), status["to_store"].as_u64()) {
                (Some(0), Some(0)) => Ok(()),
                _ => Err(status.to_string()),
            }
        });
        self.rows(run)
    }

    fn state(&self, run: &str) -> String {
        self.host.status(run)["state"].as_str().expect("a state").to_owned()
    }
}

#[test]
fn a_paused_run_stands_still_on_every_host_and_after_a_restart_of_everything() {
    let mut scene = Scene::new(1000, &["work-1", "work-2", "sink"]);
    scene.publish("a", 60_000, 300, &[]);
    scene.wait_rows("a", 1000);
    let said = scene.say(&["pause", "a"]);
    assert_eq!((&said["state"], &said["changed"]), (&"paused".into(), &true.into()), "{said}");
    assert_eq!(scene.say(&["pause", "a"])["changed"], false);
    let rows = scene.wait_at_rest("a");
    assert!(rows < 60_000, "it was paused too late to show anything");
    scene.restart_everything();
    // Another run is computed by the same hosts meanwhile: they are not merely slow.
    scene.publish("b", 2000, 100, &[]);
    scene.host.wait_sealed("b", SOON);
    assert_eq!((scene.state("a").as_str(), scene.wait_at_rest("a")), ("paused", rows));
    let told = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(told.contains("state     paused"), "{told}");
    assert_eq!(scene.say(&["resume", "a"])["state"], "running");
    assert_eq!(scene.say(&["resume", "a"])["changed"], false);
    scene.host.wait_sealed("a", SOON);
    assert_eq!(scene.rows("a"), 60_000);
    scene.host.call(&["pause", "a"]).expect(1).says(&["pause run `a`: its newest pass, 1, is sealed"]);
}

#[test]
fn a_pause_does_not_wait_for_the_end_of_a_long_batch() {
    let scene = Scene::new(20_000, &["work", "sink"]);
    // A batch of ten minutes of one core.
    scene.publish("a", 60_000, 30_000, &[]);
    wait_until("a batch in flight", SOON, || match scene.host.status("a")["in_flight"].as_u64() {
        Some(held) if held > 0 => Ok(()),
        held => Err(format!("{held:?}")),
    });
    scene.say(&["pause", "a"]);
    // What was done of it is stored, and is little.
    let rows = scene.wait_at_rest("a");
    assert!(rows < 30_000, "{rows} rows");
    // The cores are free again.
    scene.publish("b", 200, 100, &[]);
    scene.host.wait_sealed("b", SOON);
    assert_eq!(scene.state("a"), "paused");
}

#[test]
fn a_cancelled_run_keeps_its_rows_frees_its_messages_and_is_never_sealed() {
    let mut scene = Scene::new(1000, &["work-1", "work-2", "sink"]);
    scene.publish("a", 400_000, 1000, &[]);
    scene.publish("other", 3000, 100, &[]);
    scene.wait_rows("a", 1000);
    let cancelled = scene.host.call(&["cancel", "a"]).expect(0).stdout;
    assert!(cancelled.contains("cancelled run `a`"), "{cancelled}");
    scene.host.wait_sealed("other", SOON);
    wait_until("its messages gone", SOON, || {
        let nats = &scene.up().nats;
        let left = [stream_messages(nats, "trial_ids"), stream_messages(nats, "trial_rows")];
        // Those of the other run's ids stay.
        if left == [30, 0] { Ok(()) } else { Err(format!("{left:?}")) }
    });
    let rows = scene.wait_at_rest("a");
    assert!((1000..400_000).contains(&rows), "{rows} rows");
    scene.restart_everything();
    assert_eq!((scene.state("a").as_str(), scene.rows("a")), ("cancelled", rows));
    let seen = scene.up().number("SELECT count() FROM millstream.trial WHERE run = 'a'");
    assert_eq!(seen, 0, "readers see sealed passes only");
    let again = scene.host.call(&["cancel", "a"]).expect(0).stdout;
    assert!(again.contains("cancelled already"), "{again}");
    scene.host.call(&["resume", "a"]).expect(1).says(&["its newest pass, 1, is cancelled", "hint: "]);
    let produce = ["produce", "--ids", "1..=400000", "--run", "a", "--batch", "1000"];
    scene.host.call(&produce).expect(1).says(&["publish run `a`: it was cancelled", "hint: `forget a`"]);
    let repair = scene.host.call(&["verify", "a", "--repair", "--json"]).json();
    assert_eq!((&repair["sealed"], &repair["state"]), (&false.into(), &"cancelled".into()), "{repair}");
    assert_eq!(scene.wait_at_rest("a"), rows, "nothing of it is computed again");
}

#[test]
fn a_producer_notices_that_its_run_is_cancelled() {
    let mut scene = Scene::new(1000, &["work", "sink"]);
    let words = ["produce", "--ids", "1..=100000000", "--run", "a", "--batch", "10"];
    let mut producer = scene.host.start("produce", &words);
    scene.wait_rows("a", 1);
    scene.say(&["cancel", "a"]);
    assert_eq!(producer.wait(SOON).code(), Some(1));
    let log = scene.host.log("produce");
    assert!(log.contains("publish run `a`: it was cancelled"), "{log}");
    wait_until("its messages gone", SOON, || match stream_messages(&scene.up().nats, "trial_ids") {
        0 => Ok(()),
        left => Err(format!("{left} messages")),
    });
    scene.services.clear();
}

#[test]
fn equal_runs_share_the_cores_evenly_and_priority_doubles_the_share() {
    let mut scene = Scene::new(500, &["sink"]);
    // Batches of different sizes, so that sharing by number would give one ten times as much.
    scene.publish("a", 60_000, 50, &[]);
    scene.publish("b", 60_000, 300, &[]);
    scene.publish("c", 120_000, 100, &["--priority", "1"]);
    scene.start(&["work"]);
    scene.wait_rows("c", 50_000);
    // All three end at once, on one host that counts its own cores' time. A busy machine takes from batches of different sizes
    // differently (1.15 was seen beside 28 others); by number of batches, `b` would have six times as much as `a`.
    let (_, mut work) = scene.services.pop().expect("the worker");
    work.signal("TERM");
    assert!(work.wait(SOON).success());
    let rows: Vec<f64> = ["a", "b", "c"].iter().map(|run| scene.wait_at_rest(run) as f64).collect();
    assert!((0.8..=1.25).contains(&(rows[0] / rows[1])), "{rows:?}");
    assert!((1.6..=2.5).contains(&(rows[2] / rows[0])), "{rows:?}");
    assert_eq!(scene.say(&["set", "b", "--priority", "-2"])["priority"], -2);
    let status = scene.host.status("b");
    assert_eq!((&status["priority"], &status["state"]), (&(-2).into(), &"running".into()), "{status}");
}

#[test]
fn a_small_run_behind_a_large_one_is_done_long_before_it() {
    let scene = Scene::new(2000, &["work", "sink"]);
    scene.publish("large", 1_000_000, 200, &[]);
    scene.wait_rows("large", 1000);
    let before = scene.rows("large");
    scene.publish("small", 1000, 100, &[]);
    scene.host.wait_sealed("small", SOON);
    let done = scene.rows("large") - before;
    // Evenly shared, the large one has advanced by as much as the small one is large, and what a busy machine delays.
    assert!(done < 100_000, "{done} rows of it meanwhile");
    scene.say(&["cancel", "large"]);
}

#[test]
fn a_rate_limits_a_run_over_all_hosts_and_leaves_the_cores_to_others() {
    let scene = Scene::new(100, &["work-1", "work-2", "sink"]);
    scene.publish("never", 1_000_000, 1000, &["--rate", "1"]);
    scene.publish("free", 20_000, 100, &[]);
    scene.host.wait_sealed("free", SOON);
    let status = scene.host.status("never");
    assert_eq!(status["rate"], 1, "{status}");
    assert_ne!(status["state"], "sealed", "{status}");
    scene.publish("slow", 400, 40, &["--rate", "50"]);
    scene.host.wait_sealed("slow", SOON);
    let seconds = scene.host.status("slow")["seconds"].as_f64().expect("seconds");
    assert!(seconds >= 7.5, "400 ids at 50 a second took {seconds} s");
    scene.say(&["set", "never", "--rate", "none"]);
    scene.wait_rows("never", 10_000);
    scene.host.call(&["set", "never", "--rate", "0"]).expect(2).says(&["`pause` holds a run back"]);
    scene.host.call(&["set", "never"]).expect(2);
    scene.host.call(&["set", "never", "--priority", "6"]).expect(2).says(&["-5..=5"]);
    scene.say(&["cancel", "never"]);
}

/// A worker that has just begun takes nothing of a limited run for six seconds, with a batch in its hands.
#[test]
fn a_limit_that_is_lifted_lets_go_who_waits_for_it() {
    let mut scene = Scene::new(0, &["sink"]);
    scene.publish("a", 3000, 1000, &["--rate", "1"]);
    scene.start(&["work-1"]);
    wait_until("a batch in hand", SOON, || {
        let status = scene.host.status("a");
        if status["in_flight"].as_u64() > Some(0) { Ok(()) } else { Err(status.to_string()) }
    });
    scene.say(&["set", "a", "--rate", "none"]);
    scene.host.wait_sealed("a", SOON);
    scene.host.call(&["verify", "a"]).expect(0);
}

#[test]
fn ten_runs_at_once_one_paused_one_cancelled_one_replayed_all_processes_killed() {
    let mut scene = Scene::new(300, &["sink", "work-1"]);
    let runs: Vec<String> = (0..10).map(|run| format!("r{run}")).collect();
    // Those that are steered last longer than it takes to say so.
    let ids = |run: &str| if ["r3", "r6"].contains(&run) { 30_000 } else { 5000 };
    scene.publish("r9", 5000, 100, &["--priority", "2"]);
    scene.host.wait_sealed("r9", SOON);
    let (_, mut work) = scene.services.pop().expect("the worker");
    work.signal("TERM");
    assert!(work.wait(SOON).success());
    scene.say(&["replay", "r9"]);
    scene.say(&["set", "r9", "--priority", "2"]);
    for (number, run) in runs[..9].iter().enumerate() {
        let priority = (number as i64 % 5 - 2).to_string();
        scene.publish(run, ids(run), 100, &["--priority", &priority]);
    }
    scene.start(&["work-1", "work-2"]);
    scene.wait_rows("r0", 100);
    scene.say(&["pause", "r3"]);
    scene.say(&["cancel", "r6"]);
    scene.restart_everything();
    for (number, run) in runs.iter().enumerate() {
        let status = scene.host.status(run);
        assert_eq!(status["priority"], number as i64 % 5 - 2, "{status}");
        match number {
            3 => assert_eq!(status["state"], "paused", "{status}"),
            6 => assert_eq!(status["state"], "cancelled", "{status}"),
            _ => scene.host.wait_sealed(run, SOON * 2),
        }
    }
    assert_eq!((scene.state("r3"), scene.state("r6")), ("paused".to_owned(), "cancelled".to_owned()));
    scene.say(&["resume", "r3"]);
    scene.host.wait_sealed("r3", SOON * 2);
    assert_eq!(scene.host.status("r9")["pass"], 2);
    for run in runs.iter().filter(|run| *run != "r6") {
        let ids = ids(run);
        let view = format!(
            "SELECT count() = {ids} AND uniqExact(id) = {ids} FROM millstream.trial WHERE run = '{run}'"
        );
        assert_eq!(scene.up().number(&view), 1, "{run}: {}", scene.host.verify(run));
    }
}
