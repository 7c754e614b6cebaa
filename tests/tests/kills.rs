//! Every process of a run killed with SIGKILL at random moments while the run goes on: it seals unattended, nothing is
//! missing, nothing is doubled.
//!
//! The moments are drawn from a seed, which a failed test prints with the diary of its kills; `KILLS_SEED=<number>`
//! draws the same again. What ClickHouse holds is counted over plain HTTP, and then by `verify` too.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::dice::Dice;
use tests::nats::{nats_info, stream_messages};
use tests::{Host, Process, SOON, Up, wait_until};

/// Long enough for whatever a killed sink held to be delivered again (120 s) and proven, on a busy machine.
const SEALED_WITHIN: Duration = Duration::from_secs(900);
/// Rows go to ClickHouse this often, so that a short run has many inserts to be hit.
const GROUP_MS: u64 = 200;

#[test]
fn a_producer_killed_in_mid_publish_resumes_and_publishes_nothing_twice() {
    const KILLS: usize = 6;
    let mut scene = Scene::new("producer", 0);
    let words = ["produce", "--ids", "1..=100000", "--run", "a", "--batch", "10", "--json"];
    let mut published = 0;
    for kill in 1..=KILLS {
        let mut producer = scene.host.start("produce", &words);
        // So many batches further on, wherever that is: always in mid-publish, never at its end.
        let until = published + scene.dice.between(50, 1200);
        published = wait_until("batches published", SOON, || {
            let found = stream_messages(&scene.up.nats, "trial_ids");
            if found >= until { Ok(found) } else { Err(format!("{found} of {until}")) }
        });
        sleep(scene.dice.pause(0, 20));
        producer.kill();
        let found = stream_messages(&scene.up.nats, "trial_ids");
        assert!(found < 10_000, "kill {kill} came after the last of the batches");
        scene.note(format!("producer killed after {found} batches"));
    }
    let stored = stream_messages(&scene.up.nats, "trial_ids");
    let report = scene.host.call(&words).expect(0).json();
    assert_eq!((&report["batches"], &report["ids"]), (&10_000.into(), &100_000.into()), "{report}");
    // The server may have gone on storing what it had read of the last producer when this was counted.
    let [found, written] = ["batches_found", "batches_written"].map(|key| report[key].as_u64().unwrap_or(0));
    assert!(found >= stored && found + written == 10_000, "{stored} were stored: {report}");
    let again = scene.host.call(&words).expect(0).json();
    assert_eq!(again["batches_written"], 0, "{again}");
    assert_eq!(stream_messages(&scene.up.nats, "trial_ids"), 10_000);
    scene.host.call(&["produce", "--ids", "1..=100001", "--run", "a", "--batch", "10"]).expect(1);
    assert_eq!(stream_messages(&scene.up.nats, "trial_ids"), 10_000);
    scene.keep_raw_rows();
    scene.start(&["work", "sink"]);
    scene.finish(&[("a", 100_000)]);
}

#[test]
fn killed_workers_lose_nothing_and_double_nothing() {
    let mut scene = Scene::new("workers", 200);
    scene.publish("a", 150_000, 1000);
    scene.start(&["work-1", "work-2", "work-3", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    for _ in 0..10 {
        sleep(scene.dice.pause(300, 800));
        scene.kill_one_of("work");
    }
    scene.must_go_on("a");
    scene.finish(&[("a", 150_000)]);
}

#[test]
fn killed_sinks_lose_nothing_and_double_nothing() {
    let mut scene = Scene::new("sinks", 200);
    scene.publish("a", 120_000, 500);
    // One worker, so that there are rows to come until the last kill.
    scene.start(&["work-1", "sink-1", "sink-2", "sink-3"]);
    scene.wait_rows("a", 1);
    for kill in 0..12 {
        match kill % 4 {
            0 | 1 => sleep(scene.dice.pause(100, 700)),
            2 => scene.wait_insert(),
            _ => scene.wait_inserted("a"),
        }
        // An insert that is watched for is any sink's, so all of them go.
        if kill % 4 < 2 { scene.kill_one_of("sink") } else { scene.kill_all("sink") }
    }
    scene.must_go_on("a");
    scene.finish(&[("a", 120_000)]);
}

#[test]
fn a_killed_nats_server_loses_nothing_and_doubles_nothing() {
    let mut scene = Scene::new("nats", 200);
    scene.may_double = true;
    let publishing =
        scene.host.start("produce", &["produce", "--ids", "1..=30000", "--run", "b", "--batch", "10"]);
    scene.publish("a", 250_000, 1000);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_up();
    scene.wait_rows("a", 1);
    for kill in 0..10 {
        sleep(scene.dice.pause(200, 1200));
        if kill % 2 == 0 {
            // It forgets deliveries and acks of about the last second.
            scene.wait_inserted("a");
        }
        scene.kill_nats();
    }
    scene.must_go_on("a");
    scene.nobody_ended();
    let mut publishing = publishing;
    assert!(publishing.wait(SOON).success(), "{}", scene.host.log("produce"));
    scene.finish(&[("a", 250_000), ("b", 30_000)]);
    scene.nobody_ended();
}

#[test]
fn a_killed_clickhouse_loses_nothing_and_doubles_nothing() {
    let mut scene = Scene::new("clickhouse", 200);
    scene.publish("a", 250_000, 1000);
    // One worker, so that there are rows to come until the last kill.
    scene.start(&["work-1", "sink-1", "sink-2"]);
    scene.wait_up();
    scene.wait_rows("a", 1);
    for kill in 0..10 {
        if kill % 2 == 0 {
            sleep(scene.dice.pause(100, 1500))
        } else {
            scene.wait_insert()
        }
        scene.kill_clickhouse();
    }
    scene.must_go_on("a");
    scene.nobody_ended();
    scene.finish(&[("a", 250_000)]);
    scene.nobody_ended();
}

#[test]
fn everything_killed_at_once_loses_nothing_and_doubles_nothing() {
    const KILLING: Duration = Duration::from_secs(35);
    let mut scene = Scene::new("everything", 200);
    scene.may_double = true;
    scene.publish("a", 300_000, 1000);
    scene.serve("produce", &["produce", "--ids", "1..=60000", "--run", "b", "--batch", "20"]);
    scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    let quiet = Instant::now() + KILLING;
    while Instant::now() < quiet {
        sleep(scene.dice.pause(200, 1500));
        match scene.dice.between(0, 5) {
            0 => scene.kill_one_of("work"),
            1 => scene.kill_one_of("sink"),
            2 => scene.kill_one_of("produce"),
            3 => scene.kill_nats(),
            _ => scene.kill_clickhouse(),
        }
        scene.tend();
    }
    scene.finish(&[("a", 300_000), ("b", 60_000)]);
}

#[test]
fn a_killed_run_goes_on_with_the_same_words() {
    let mut dice = Dice::drawn("KILLS_SEED");
    let host = tame_host(100);
    let words = ["run", "--ids", "1..=150000", "--run", "a", "--batch", "1000", "--json"];
    for _ in 0..2 {
        let mut run = host.start("run", &words);
        wait_done(&host, "a", dice.between(1, 50_000));
        run.kill();
    }
    let report = host.call(&words).expect(0);
    assert!(!report.stderr.contains(HEALING), "{}", report.stderr);
    assert_eq!((&report.json()["rows"], &report.json()["sealed"]), (&150_000.into(), &true.into()));
    check(&host, &host.up(), "a", 150_000);
}

#[test]
fn an_interrupted_run_says_130_and_goes_on_with_the_same_words() {
    let host = tame_host(100);
    let words = ["run", "--ids", "1..=150000", "--run", "a", "--batch", "1000", "--json"];
    let mut run = host.start("run", &words);
    wait_done(&host, "a", 1);
    run.signal("INT");
    assert_eq!(run.wait(SOON).code(), Some(130));
    assert!(host.log("run").contains("--run a goes on"), "{}", host.log("run"));
    // What an interrupted run held was finished or handed back: nothing is waited for.
    assert_eq!(host.status("a")["in_flight"], 0);
    let report = host.call(&words).expect(0).json();
    assert_eq!((&report["rows"], &report["sealed"]), (&150_000.into(), &true.into()), "{report}");
    check(&host, &host.up(), "a", 150_000);
}

#[test]
fn a_terminated_worker_finishes_or_hands_back_what_it_holds() {
    let mut scene = Scene::new("drain", 5000);
    let config = scene.host.path().join("millstream.toml");
    let may_drain = |seconds: u32| {
        fs::write(&config, format!("work.drain = '{seconds}s'\n")).expect("a file is written");
    };
    // A batch is five seconds of a core: less than the time to drain, and one thread holds two of them.
    may_drain(300);
    scene.publish("short", 4000, 1000);
    let mut worker = scene.host.start("work-1", &["work", "--threads", "1"]);
    scene.wait_held("short", 2);
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).code(), Some(0), "{}", scene.host.log("work-1"));
    assert_eq!(scene.host.status("short")["in_flight"], 0, "held batches were neither acked nor handed back");
    scene.serve("work-2", &["work"]);
    scene.serve("sink", &["sink"]);
    scene.finish(&[("short", 4000)]);

    // A batch is 50 seconds of a core, and there are three seconds to drain: both are handed back, unfinished.
    scene.dismiss("work");
    may_drain(3);
    scene.publish("long", 20_000, 10_000);
    let mut worker = scene.host.start("work-3", &["work", "--threads", "1"]);
    scene.wait_held("long", 2);
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).code(), Some(0), "{}", scene.host.log("work-3"));
    may_drain(300);
    let mut worker = scene.host.start("work-4", &["work", "--threads", "1"]);
    // What was handed back comes to somebody else at once; what was not would after 60 s.
    wait_until("batches delivered again", Duration::from_secs(45), || {
        let status = scene.host.status("long");
        if status["redelivered"] == 2 { Ok(()) } else { Err(status.to_string()) }
    });

    // Twice: it leaves at once, whatever it holds.
    worker.signal("TERM");
    wait_until("word of draining", SOON, || {
        let log = scene.host.log("work-4");
        if log.contains("draining") { Ok(()) } else { Err(log) }
    });
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).code(), Some(130));
}

/// A stack and the services on it, which are started again when they are killed.
struct Scene {
    // Dropped in this order: services before servers, servers before their directory.
    services: Vec<Service>,
    up: Up,
    host: Host,
    dice: Dice,
    begun: Instant,
    diary: Vec<String>,
    /// Whether raw duplicates may lie in the table for a while, until a sink merges them away before the seal.
    ///
    /// nats-server that is killed forgets acks and deliveries of its last second, so a batch that one sink is inserting
    /// can be given to another, which asks too early. Views never show it, and no pass is sealed with it.
    may_double: bool,
}

struct Service {
    name: String,
    words: Vec<String>,
    process: Process,
}

impl Scene {
    /// `micros` is the weight of an id.
    fn new(name: &str, micros: u32) -> Self {
        let host = tame_host(micros);
        fs::write(host.path().join("millstream.toml"), format!("sink.group_age = '{GROUP_MS}ms'\n"))
            .expect("a file");
        let up = host.up();
        let mut scene = Self {
            services: Vec::new(),
            up,
            host,
            dice: Dice::drawn("KILLS_SEED"),
            begun: Instant::now(),
            diary: Vec::new(),
            may_double: false,
        };
        scene.note(format!("{name} on {}", scene.host.path().display()));
        scene
    }

    fn note(&mut self, event: String) {
        self.diary.push(format!("{:8.3} {event}", self.begun.elapsed().as_secs_f64()));
    }

    /// Publishes a run of the ids from 1.
    fn publish(&mut self, run: &str, ids: u64, batch: u32) {
        let (ids, batch) = (format!("1..={ids}"), batch.to_string());
        self.host.call(&["produce", "--ids", &ids, "--run", run, "--batch", &batch]).expect(0);
        self.keep_raw_rows();
    }

    /// Merges of ClickHouse's own would hide raw duplicates before they are counted.
    fn keep_raw_rows(&self) {
        self.up.ask(
            "ALTER TABLE millstream.trial_rows MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1",
        );
    }

    /// Starts services, whose command is their name's first part. A worker has one thread, so that a run lasts as long
    /// on a large machine.
    fn start(&mut self, names: &[&str]) {
        for name in names {
            match name.split('-').next() {
                Some("work") => self.serve(name, &["work", "--threads", "1"]),
                command => self.serve(name, &[command.unwrap_or(name)]),
            }
        }
    }

    /// Waits until every worker and sink has found its servers: one that starts while a server is away says so and ends.
    fn wait_up(&self) {
        let services = self.services.iter().map(|service| service.name.as_str());
        for name in services.filter(|name| ["work", "sink"].iter().any(|kind| name.starts_with(kind))) {
            wait_until(&format!("{name} at work"), SOON, || match self.host.log(name) {
                log if log.contains(" working") || log.contains(" sinking") => Ok(()),
                log => Err(log),
            });
        }
    }

    fn serve(&mut self, name: &str, words: &[&str]) {
        let process = self.host.start(name, words);
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        self.services.push(Service { name: name.to_owned(), words, process });
    }

    /// Kills one of the services whose names begin so, and starts it again.
    fn kill_one_of(&mut self, kind: &str) {
        let of_kind: Vec<usize> = (0..self.services.len()).filter(|at| self.services[*at].is(kind)).collect();
        let at = of_kind[self.dice.between(0, of_kind.len() as u64) as usize];
        self.kill(at);
        self.revive(at);
    }

    /// Kills all of them, and starts them again.
    fn kill_all(&mut self, kind: &str) {
        let of_kind: Vec<usize> = (0..self.services.len()).filter(|at| self.services[*at].is(kind)).collect();
        of_kind.iter().for_each(|at| self.kill(*at));
        of_kind.iter().for_each(|at| self.revive(*at));
    }

    /// Kills all of them for good.
    fn dismiss(&mut self, kind: &str) {
        self.services.retain(|service| !service.is(kind));
    }

    fn kill(&mut self, at: usize) {
        self.services[at].process.kill();
        self.note(format!("{} killed", self.services[at].name));
    }

    fn revive(&mut self, at: usize) {
        let Service { name, words, process } = &mut self.services[at];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        *process = self.host.start(name, &words);
    }

    /// What systemd does: a service that was started while a server was away, and said so, is started again. A
    /// producer that succeeded is done.
    fn tend(&mut self) {
        for at in 0..self.services.len() {
            if let Some(status) = self.services[at].process.ended()
                && !status.success()
            {
                self.note(format!("{} ended by itself: {status}", self.services[at].name));
                self.revive(at);
            }
        }
    }

    /// Fails the test unless every service is still the process that was started.
    fn nobody_ended(&mut self) {
        for Service { name, process, .. } in &mut self.services {
            assert!(process.runs(), "{name} ended by itself: {}", self.host.log(name));
        }
    }

    /// Kills nats-server, and waits until the stack has started it again.
    fn kill_nats(&mut self) {
        self.note("nats-server killed".to_owned());
        self.up.kill_nats();
        let nats = self.up.nats.clone();
        wait_until("nats-server", SOON, || nats_info(&nats).map_err(|error| error.to_string()));
        self.no_raw_duplicates();
        self.note("nats-server is back".to_owned());
    }

    /// Kills ClickHouse, and waits until the stack has started it again.
    fn kill_clickhouse(&mut self) {
        self.note("ClickHouse killed".to_owned());
        self.up.kill_clickhouse();
        self.up.number("SELECT 1");
        self.note("ClickHouse is back".to_owned());
    }

    /// Waits until so many rows of a run are there.
    fn wait_rows(&self, run: &str, rows: u64) -> u64 {
        let count = format!("SELECT count() FROM millstream.trial_rows WHERE run = '{run}'");
        wait_until("rows", SOON, || {
            let found = self.up.number(&count);
            if found >= rows { Ok(found) } else { Err(format!("{found} of {rows} rows")) }
        })
    }

    /// Waits until an insert is under way.
    fn wait_insert(&self) {
        let inserts = "SELECT count() FROM system.processes WHERE query ILIKE 'INSERT%trial_rows%'";
        wait_until("an insert under way", SOON, || match self.up.number(inserts) {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
    }

    /// Waits until an insert has landed, whose rows are hardly asked for and acked yet.
    fn wait_inserted(&self, run: &str) {
        self.wait_rows(run, self.wait_rows(run, 0) + 1);
    }

    fn wait_status(&self, run: &str, what: &str, is_so: impl Fn(&Value) -> bool) {
        wait_until(what, SOON, || {
            let called = self.host.call(&["status", run, "--json"]);
            match serde_json::from_str(&called.stdout) {
                Ok(status) if is_so(&status) => Ok(()),
                _ => Err(format!("{}{}", called.stdout, called.stderr)),
            }
        });
    }

    /// Waits until workers hold so many batches.
    fn wait_held(&self, run: &str, batches: u64) {
        self.wait_status(run, "batches held", |status| status["in_flight"] == batches);
    }

    /// Fails the test when the faults came too late to meet a run that goes on.
    fn must_go_on(&self, run: &str) {
        assert_eq!(self.sealed(run), 0, "run `{run}` was sealed before the last kill: make it larger");
    }

    fn sealed(&self, run: &str) -> u64 {
        self.up.number(&format!("SELECT count() FROM millstream.trial_passes WHERE run = '{run}'"))
    }

    /// Waits until every run, given with its last id, is sealed, and checks what is stored.
    fn finish(&mut self, runs: &[(&str, u64)]) {
        let quiet = Instant::now();
        for (run, _) in runs {
            let limit = Instant::now() + SEALED_WITHIN;
            while self.sealed(run) == 0 {
                assert!(Instant::now() < limit, "run `{run}` is not sealed: {}", self.host.status(run));
                self.tend();
                self.no_raw_duplicates();
                sleep(Duration::from_millis(200));
            }
            self.note(format!("`{run}` sealed {:.1} s after the last kill", quiet.elapsed().as_secs_f64()));
            self.host.wait_sealed(run, SOON);
        }
        for (run, last) in runs {
            check(&self.host, &self.up, run, *last);
        }
        for Service { name, .. } in &self.services {
            let log = self.host.log(name);
            assert!(self.may_double || !log.contains(HEALING), "{name} found raw duplicates:\n{log}");
        }
        self.tell();
    }

    /// Copies every log to a place that the test does not remove.
    fn keep_logs(&mut self) {
        let kept = std::env::temp_dir().join(format!("kills-{}", self.dice.seed));
        if let Err(error) = self.host.keep_logs(&kept) {
            self.note(format!("{}: {error}", kept.display()));
        }
        self.note(format!("the logs are kept in {}", kept.display()));
    }

    /// Fails the test with the parts in which raw duplicates lie, as long as they are there to be seen: before the
    /// seal, sinks merge them away.
    fn no_raw_duplicates(&mut self) {
        if self.may_double {
            return;
        }
        let twice = "SELECT run, pass, batch, count() AS ids, any(parts) FROM (SELECT run, pass, batch, \
                     groupArray(_part) AS parts FROM millstream.trial_rows GROUP BY run, pass, batch, id \
                     HAVING count() > 1) GROUP BY run, pass, batch ORDER BY run, batch";
        let found = self.up.ask(twice);
        if !found.trim().is_empty() {
            let parts = "SELECT name, active, rows, modification_time FROM system.parts WHERE table = 'trial_rows' \
                         ORDER BY modification_time";
            let parts = self.up.ask(parts);
            panic!("raw duplicates (run, pass, batch, ids, parts):\n{found}\nparts:\n{parts}");
        }
    }

    #[expect(
        clippy::print_stderr,
        reason = "a failed test's seed and diary; shown with --nocapture for any other"
    )]
    fn tell(&self) {
        eprintln!("KILLS_SEED={}\n{}", self.dice.seed, self.diary.join("\n"));
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_logs();
            self.tell();
        }
    }
}

impl Service {
    fn is(&self, kind: &str) -> bool {
        self.name.starts_with(kind)
    }
}

/// The log line of a sealer that begins to deduplicate a run.
const HEALING: &str = "raw duplicates found";

/// A host on which every id is done, after so many microseconds of a core.
fn tame_host(micros: u32) -> Host {
    let mut host = Host::new(env!("CARGO_BIN_EXE_trial"));
    host.env.extend([("TRIAL_TAME".into(), "1".into()), ("TRIAL_MICROS".into(), micros.to_string())]);
    host
}

/// Waits until so many rows of a run are stored, on a stack that belongs to `run`.
fn wait_done(host: &Host, run: &str, rows: u64) {
    wait_until("rows stored", SOON, || {
        let called = host.call(&["status", run, "--json"]);
        match serde_json::from_str::<Value>(&called.stdout) {
            Ok(status) if status["done"].as_u64() >= Some(rows) => Ok(()),
            _ => Err(format!("{rows} wanted: {}{}", called.stdout, called.stderr)),
        }
    });
}

/// Asks ClickHouse, without any code of ours between, whether exactly the ids `1..=last` are there, and then `verify`.
fn check(host: &Host, up: &Up, run: &str, last: u64) {
    let of_run = format!("millstream.trial WHERE run = '{run}'");
    let zero = |what: &str, query: String| assert_eq!(up.number(&query), 0, "{what}: {query}");
    let totals = up.ask(&format!("SELECT count(), sum(id), sum(squared), min(id), max(id) FROM {of_run}"));
    let (sum, squares) = (last * (last + 1) / 2, last * (last + 1) * (2 * last + 1) / 6);
    assert_eq!(totals.trim(), format!("{last}\t{sum}\t{squares}\t1\t{last}"), "totals of `{run}`");
    zero(
        "ids missing",
        format!("SELECT count() FROM numbers(1, {last}) WHERE number NOT IN (SELECT id FROM {of_run})"),
    );
    zero(
        "foreign ids",
        format!("SELECT count() FROM {of_run} AND id NOT IN (SELECT number FROM numbers(1, {last}))"),
    );
    let twice =
        |table: &str| format!("SELECT count() FROM (SELECT id FROM {table} GROUP BY id HAVING count() > 1)");
    zero("ids twice in the view", twice(&of_run));
    zero("wrong results", format!("SELECT count() FROM {of_run} AND squared != id * id"));
    zero("raw duplicates", twice(&format!("millstream.trial_rows WHERE run = '{run}'")));
    let report = host.call(&["verify", run, "--json"]).expect(0).json();
    assert_eq!(
        (&report["sealed"], &report["complete"], &report["digest_matches"]),
        (&true.into(), &true.into(), &true.into())
    );
    for fault in ["missing_batches", "short_batches", "raw_duplicates", "dead", "repeated_ids"] {
        assert_eq!(report[fault], 0, "{fault}: {report}");
    }
    assert_eq!((&report["ids"], &report["rows"]), (&last.into(), &last.into()), "{report}");
}
