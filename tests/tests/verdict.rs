//! Each kind of bottleneck provoked, and named by `status`.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::proxy::{Mode, Proxy};
use tests::{Host, Launch, Process, SOON, Up, wait_until};

/// Servers, and services on them.
struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    services: Vec<Process>,
    up: Up,
    host: Host,
}

impl Scene {
    /// Ids take this long; `config` is the `millstream.toml` of all processes.
    fn new(micros: u64, config: &str, services: &[&str]) -> Self {
        Self::of(env!("CARGO_BIN_EXE_trial"), micros, config, services)
    }

    fn of(program: &str, micros: u64, config: &str, services: &[&str]) -> Self {
        let mut host = Host::new(program);
        host.env.push(("TRIAL_MICROS".into(), micros.to_string()));
        host.env.push(("BULKY_PLAIN".into(), "1".into()));
        host.env.push(("TRIAL_TAME".into(), "1".into()));
        std::fs::write(host.path().join("millstream.toml"), config).expect("written");
        let up = host.up();
        let mut scene = Self { services: Vec::new(), up, host };
        scene.start(services);
        scene
    }

    fn start(&mut self, services: &[&str]) {
        self.services.extend(services.iter().map(|name| self.host.start(name, &[name])));
    }

    /// Starts one that reaches NATS over a connection that carries so many bytes a second, each a little late.
    fn start_far(&mut self, words: &[&str], bytes: u32) -> Proxy {
        let proxy = Proxy::before(&self.up.nats);
        proxy.set(Mode::Slow(bytes));
        let env = vec![("NATS_URL".to_owned(), format!("nats://{}", proxy.address))];
        let process = self.host.start_as(words[0], &Launch { env, ..Launch::from(words) });
        self.services.push(process);
        proxy
    }

    fn publish(&self, ids: u64, batch: u64, more: &[&str]) {
        let (ids, batch) = (format!("1..={ids}"), batch.to_string());
        let words = ["produce", "--ids", &ids, "--run", "a", "--batch", &batch];
        self.host.call(&[&words[..], more].concat()).expect(0);
    }

    /// Waits until `status` names this bottleneck in a sentence with this beginning; the status then. What it says
    /// before that is about the start.
    fn wait_verdict(&self, bottleneck: &str, beginning: &str) -> Value {
        wait_until(&format!("verdict `{bottleneck}`: {beginning}…"), SOON, || {
            let status = self.host.status("a");
            let Value::Object(verdict) = &status["verdict"] else { return Err(status.to_string()) };
            match verdict["bottleneck"] == bottleneck && text(&status).starts_with(beginning) {
                true => Ok(status),
                false => Err(status.to_string()),
            }
        })
    }
}

fn text(status: &Value) -> &str {
    status["verdict"]["text"].as_str().expect("a sentence")
}

#[test]
fn without_workers_or_sinks_it_says_who_is_missing() {
    let mut scene = Scene::new(0, "", &[]);
    scene.publish(1000, 100, &[]);
    let told = "no worker computes: 10 batches wait, and no worker reports; start `work` on a host";
    scene.wait_verdict("nobody", told);
    scene.start(&["work"]);
    scene.wait_verdict("nobody", "no sink stores: about 1000 rows wait");
    scene.start(&["sink"]);
    scene.host.wait_sealed("a", SOON);
    assert_eq!(scene.host.status("a")["verdict"], Value::Null);
}

#[test]
fn busy_cores_are_compute_bound_and_every_host_is_listed() {
    let scene = Scene::new(1000, "[work]\nthreads = 2\n", &["work", "sink"]);
    scene.publish(10_000_000, 1000, &[]);
    let status = scene.wait_verdict("compute", "compute-bound: 1 host with 2 cores is ");
    let said = text(&status);
    assert!(said.ends_with(" % busy; adding hosts will help"), "{said}");
    let roles: Vec<&str> =
        status["hosts"].as_array().expect("hosts").iter().filter_map(|host| host["role"].as_str()).collect();
    assert_eq!(roles, ["sink", "work"]);
    assert!(status["ids_per_second_now"].as_f64() > Some(0.0), "{status}");
    assert!(status["oldest_batch_seconds"].as_f64() > Some(0.0), "{status}");
    let shown = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(shown.contains("compute-bound: ") && shown.contains("work  2 "), "{shown}");
    scene.host.call(&["cancel", "a"]).expect(0);
}

#[test]
fn a_slow_store_is_named() {
    // Every batch is an insert of its own.
    let scene = Scene::new(0, "[sink]\ngroup_rows = 1\ninserts = 1\n", &["work", "sink"]);
    scene.publish(200_000, 10, &[]);
    let status = scene.wait_verdict("store", "store-bound: sinks spend ");
    let said = text(&status);
    assert!(said.contains(" of their time in ClickHouse"), "{said}");
    assert!(status["lag_rows"].as_u64() > Some(0) && status["lag_bytes"].as_u64() > Some(0), "{status}");
    scene.host.call(&["cancel", "a"]).expect(0);
}

#[test]
fn a_slow_input_starves_the_workers() {
    let scene = Scene::new(0, "", &["work", "sink"]);
    let mut feed = scene
        .host
        .command(&["produce", "--stdin", "--follow", "--run", "a", "--linger", "100ms"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut lines = feed.stdin.take().expect("piped");
    let begun = Instant::now();
    let status = loop {
        writeln!(lines, "{}", begun.elapsed().as_nanos()).expect("it reads");
        let status = scene.host.call(&["status", "a", "--json"]);
        // At first nobody has heard of the producer, and it creates the run.
        if status.code == 0 && status.stdout.contains("waiting for its input") {
            break status.json();
        }
        assert!(begun.elapsed() < SOON, "{} {}", status.stdout, status.stderr);
    };
    let said = text(&status);
    assert_eq!(status["verdict"]["bottleneck"], "input", "{said}");
    assert!(said.starts_with("starved: workers wait for ids "), "{said}");
    assert!(said.contains("; a faster input will help"), "{said}");
    drop(lines);
    assert!(feed.wait().expect("it ends").success());
    scene.host.wait_sealed("a", SOON);
}

#[test]
fn a_limited_run_is_held_by_its_rate() {
    let scene = Scene::new(0, "", &["work", "sink"]);
    scene.publish(100_000, 100, &["--rate", "20"]);
    scene.wait_verdict("rate", "rate-limited: cores wait ");
    let shown = scene.host.call(&["status", "a"]).expect(0).stdout;
    assert!(shown.contains("`set a --rate N` changes it"), "{shown}");
    scene.host.call(&["cancel", "a"]).expect(0);
}

#[test]
fn a_nats_that_is_far_from_workers_is_named() {
    let mut scene = Scene::new(0, "", &["sink"]);
    scene.publish(20_000, 1, &[]);
    let _proxy = scene.start_far(&["work"], 400_000);
    let status = scene.wait_verdict("broker", "broker-bound: ");
    let said = text(&status);
    assert!(said.contains("larger batches (--batch)"), "{said}");
    scene.host.call(&["cancel", "a"]).expect(0);
}

#[test]
fn a_nats_that_is_far_from_the_producer_is_named() {
    let mut scene = Scene::new(0, "", &["work", "sink"]);
    let words = ["produce", "--ids", "1..=500000", "--run", "a", "--batch", "1"];
    // Much less than what workers bring to the disk of the same NATS.
    let _proxy = scene.start_far(&words, 10_000);
    wait_until("the run", SOON, || match scene.host.call(&["status", "a"]) {
        called if called.code == 0 => Ok(()),
        called => Err(called.stderr),
    });
    // The workers are near to the same NATS, and have room once it has settled.
    let status = scene.wait_verdict("broker", "starved: workers wait for ids ");
    let said = text(&status);
    assert!(said.contains("waiting for NATS; look at the disk and network of NATS"), "{said}");
    scene.host.call(&["cancel", "a"]).expect(0);
}

#[test]
fn rows_that_cost_more_than_the_function_are_named() {
    let mut scene = Scene::of(env!("CARGO_BIN_EXE_bulky"), 0, "[work]\nthreads = 1\n", &["sink"]);
    // ClickHouse has what it needs of the same cores, so that rows do not pile up before it.
    let under = ["nice", "-n", "19"].map(str::to_owned).to_vec();
    let worker = scene.host.start_as("work", &Launch { under, ..Launch::from(&["work"][..]) });
    scene.services.push(worker);
    scene.publish(10_000_000, 1000, &[]);
    let status = scene.wait_verdict("encode", "encode-bound: 1 core ");
    let said = text(&status);
    assert!(
        said.ends_with(" with writing and compressing rows; smaller rows or more hosts will help"),
        "{said}"
    );
    scene.host.call(&["cancel", "a"]).expect(0);
}

#[test]
fn the_end_of_a_run_says_what_was_during_it() {
    let scene = Scene::new(1000, "[work]\nthreads = 2\n", &["work", "sink"]);
    // Services that have waited for longer than the run will last.
    std::thread::sleep(Duration::from_secs(20));
    let words = ["produce", "--ids", "1..=60000", "--run", "a", "--batch", "600", "--wait", "--json"];
    let called = scene.host.call(&words).expect(0);
    let last: Value = serde_json::from_str(called.stdout.lines().last().expect("a summary")).expect("JSON");
    assert_eq!(last["verdict"]["bottleneck"], "compute", "{last}");
    // Looked at once more there is nothing that could be said.
    let called = scene.host.call(&words).expect(0);
    let last: Value = serde_json::from_str(called.stdout.lines().last().expect("a summary")).expect("JSON");
    assert_eq!((&last["sealed"], &last["verdict"]), (&true.into(), &Value::Null), "{last}");
}
