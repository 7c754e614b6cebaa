//! The soak: a random fault every 5 to 20 s on a running load, then quiet. Whatever was submitted must be sealed by
//! itself, and be right; and `status`, which is asked all the while, must have said nothing that was not so.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::Plan;
use crate::matrix::Raw;
use crate::scene::{Report, Scene, Setup};
use crate::table::{Line, Outcome, Table};
use crate::troubled::{SERVICE, VARIABLE};
use crate::watch::{Cause, Caused, Watch, now_ms};
use serde_json::{Value, json};
use tests::nats::Nats;
use tests::proxy::{Mode, Proxy};

/// Ids of one run of the load: a minute or so of both cores.
const RUN_IDS: u64 = 200_000;
const RUN_BATCH: u32 = 500;
/// Between two faults, in milliseconds.
const BETWEEN_MS: (u64, u64) = (5_000, 20_000);
/// How long a server or a service is paused or cut off, in milliseconds: below and beyond what clients wait for.
const AWAY_MS: (u64, u64) = (1_000, 15_000);

/// What the soak does to the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    WorkerKilled,
    WorkersKilled,
    SinkKilled,
    SinksKilled,
    ProducerKilled,
    NatsKilled,
    ClickhouseKilled,
    ServiceTerminated,
    WorkerPaused,
    SinkPaused,
    NatsPaused,
    ClickhousePaused,
    NatsCut,
    ClickhouseCut,
    NatsStalled,
    ClickhouseRepliesLost,
    ClickhouseSlow,
    PoolKilled,
    PoolFrozen,
    MergesStopped,
    TooManyParts,
    ServiceAway,
    SinkConsumerDeleted,
    WorkPaused,
    RowsStreamFull,
}

const FAULTS: [Fault; 25] = [
    Fault::WorkerKilled,
    Fault::WorkersKilled,
    Fault::SinkKilled,
    Fault::SinksKilled,
    Fault::ProducerKilled,
    Fault::NatsKilled,
    Fault::ClickhouseKilled,
    Fault::ServiceTerminated,
    Fault::WorkerPaused,
    Fault::SinkPaused,
    Fault::NatsPaused,
    Fault::ClickhousePaused,
    Fault::NatsCut,
    Fault::ClickhouseCut,
    Fault::NatsStalled,
    Fault::ClickhouseRepliesLost,
    Fault::ClickhouseSlow,
    Fault::PoolKilled,
    Fault::PoolFrozen,
    Fault::MergesStopped,
    Fault::TooManyParts,
    Fault::ServiceAway,
    Fault::SinkConsumerDeleted,
    Fault::WorkPaused,
    Fault::RowsStreamFull,
];

/// The scene with a proxy before each server.
struct Soak {
    scene: Scene,
    nats: Proxy,
    clickhouse: Proxy,
    counts: BTreeMap<Fault, u32>,
    /// What `status` may rightly speak of.
    caused: Vec<Caused>,
    watch: Watch,
}

/// Goes on for `faulting`, then waits for the seals and judges.
pub fn run(plan: Plan, faulting: Duration, table: Table) -> ExitCode {
    table.begin();
    let begun = Instant::now();
    // A soak ends early by a panic, as a scenario does.
    let log = table.beside("status.log", &format!("faults-soak-{}", plan.seed));
    let played = std::thread::spawn(move || Soak::new(plan, log).play(faulting)).join();
    let (faults, outcome) = match played {
        Ok(Played { notes, report, untrue }) if untrue.is_empty() => {
            (notes, Outcome::Judged(Raw::Merged, report))
        }
        Ok(Played { notes, report, untrue }) => {
            let said = format!("`status` said what was not so:\n{}\n{:?}", untrue.join("\n"), report.found);
            (notes, Outcome::Broke(said))
        }
        Err(panic) => (String::new(), Outcome::Broke(crate::runner::said(panic))),
    };
    let moment = format!("every 5 to 20 s for {} min, seed {}", faulting.as_secs() / 60, plan.seed);
    table.note(&faults);
    table.add(Line {
        label: "soak".into(),
        fault: "random faults on a running load",
        moment,
        outcome,
        took: begun.elapsed(),
    });
    table.close(0)
}

/// What came of a soak.
struct Played {
    /// What happened how often.
    notes: String,
    report: Report,
    /// What `status` said that was not so.
    untrue: Vec<String>,
}

impl Soak {
    fn new(plan: Plan, log: PathBuf) -> Self {
        let mut scene = Scene::new(plan, &Setup::new("soak"));
        scene.host.env.push((VARIABLE.to_owned(), "service".to_owned()));
        fs::write(scene.host.path().join(SERVICE), "").expect("a file");
        let watch = Watch::begin(&scene, &log);
        let (nats, clickhouse) = (scene.before_nats(), scene.before_clickhouse());
        scene.host.call(&["setup"]).expect(0);
        scene.keep_raw_rows();
        scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
        Self { scene, nats, clickhouse, counts: BTreeMap::new(), caused: Vec::new(), watch }
    }

    /// The faults by kind, what is stored in the end, and what `status` said meanwhile.
    fn play(mut self, faulting: Duration) -> Played {
        let until = Instant::now() + faulting;
        while Instant::now() < until {
            self.scene.keep_load(RUN_IDS, RUN_BATCH);
            self.watch.follow(self.scene.runs());
            self.scene.pass_between(BETWEEN_MS.0, BETWEEN_MS.1);
            let fault = FAULTS[self.scene.dice.between(0, FAULTS.len() as u64) as usize];
            self.strike(fault);
            *self.counts.entry(fault).or_default() += 1;
            self.scene.fault(format!("{fault:?}"));
            // A soak that hangs is found where it hangs.
            let lost = self.clickhouse.dropped();
            self.scene.note(format!("{} runs, {lost} bytes of replies lost so far", self.scene.runs().len()));
        }
        let mut notes = format!("{} runs of {RUN_IDS} ids;", self.scene.runs().len());
        for (fault, times) in &self.counts {
            notes += &format!(" {fault:?} {times},");
        }
        let report = self.scene.finish();
        let (said, untrue) = self.watch.end(self.scene.runs(), &self.caused);
        Played { notes: format!("{notes}\n{said}"), report, untrue }
    }

    fn strike(&mut self, fault: Fault) {
        let away = self.scene.dice.pause(AWAY_MS.0, AWAY_MS.1);
        match fault {
            Fault::WorkerKilled => self.scene.kill_one_of("work"),
            Fault::WorkersKilled => self.scene.kill_all("work"),
            Fault::SinkKilled => self.scene.kill_one_of("sink"),
            Fault::SinksKilled => self.scene.kill_all("sink"),
            Fault::ProducerKilled => self.scene.kill_all("produce"),
            Fault::NatsKilled => self.scene.kill_nats(),
            Fault::ClickhouseKilled => self.scene.kill_clickhouse(),
            Fault::ServiceTerminated => self.terminate(),
            Fault::WorkerPaused => self.pause_service("work", away),
            Fault::SinkPaused => self.pause_service("sink", away),
            Fault::NatsPaused => self.pause_server("nats-server", away),
            Fault::ClickhousePaused => self.pause_server("__local-engine", away),
            Fault::NatsCut => self.between(away, |soak| &soak.nats, Mode::Refuse),
            Fault::ClickhouseCut => self.between(away, |soak| &soak.clickhouse, Mode::Refuse),
            Fault::NatsStalled => self.between(away, |soak| &soak.nats, Mode::Stall),
            Fault::ClickhouseRepliesLost => self.between(away, |soak| &soak.clickhouse, Mode::DropReplies),
            Fault::ClickhouseSlow => self.between(away, |soak| &soak.clickhouse, Mode::Slow(20_000)),
            Fault::PoolKilled => self.strike_pool("KILL"),
            Fault::PoolFrozen => self.strike_pool("STOP"),
            Fault::MergesStopped => self.stop_merges(away),
            Fault::TooManyParts => self.allow_few_parts(away),
            Fault::ServiceAway => self.take_service(away),
            Fault::SinkConsumerDeleted => {
                let answer =
                    Nats::connect(&self.scene.nats).api("CONSUMER.DELETE.trial_rows.sink", &json!({}));
                self.scene.note(format!("the sinks' consumer is deleted: {answer}"));
            }
            Fault::WorkPaused => self.pause_work(away),
            Fault::RowsStreamFull => self.fill_rows_stream(away),
        }
    }

    /// Ends or stops a process that computes for a worker.
    fn strike_pool(&mut self, signal: &str) {
        let names = self.scene.names("work");
        let pool = names.iter().find_map(|name| self.scene.pools(name).last().copied());
        if let Some(pool) = pool {
            tests::signal(pool, signal);
        }
    }

    fn stop_merges(&mut self, away: Duration) {
        let begun = now_ms();
        self.scene.checker.ask("SYSTEM STOP MERGES millstream.trial_rows");
        self.scene.pass(away);
        self.scene.checker.ask("SYSTEM START MERGES millstream.trial_rows");
        self.caused.push((Cause::Merges, begun, now_ms()));
    }

    /// ClickHouse refuses inserts while it has as many parts as it soon will have.
    fn allow_few_parts(&mut self, away: Duration) {
        for parts in [15, 3000] {
            self.scene.checker.ask(&format!(
                "ALTER TABLE millstream.trial_rows MODIFY SETTING parts_to_delay_insert = {parts}, parts_to_throw_insert = {parts}"
            ));
            if parts == 15 {
                self.scene.pass(away);
            }
        }
    }

    /// Workers are delivered nothing.
    fn pause_work(&mut self, away: Duration) {
        let mut nats = Nats::connect(&self.scene.nats);
        let names = nats.api("CONSUMER.NAMES.trial_ids", &json!({}))["consumers"].take();
        for until in [json!({ "pause_until": "2199-01-01T00:00:00Z" }), json!({})] {
            for name in names.as_array().into_iter().flatten().filter_map(Value::as_str) {
                let answer = nats.api(&format!("CONSUMER.PAUSE.trial_ids.{name}"), &until);
                // Its run may have been sealed meanwhile.
                self.scene.note(format!("consumer `{name}`: {answer}"));
            }
            if until != json!({}) {
                self.scene.pass(away);
            }
        }
    }

    /// The rows stream takes no more than it has, as an operator would have it.
    fn fill_rows_stream(&mut self, away: Duration) {
        let mut nats = Nats::connect(&self.scene.nats);
        let stream = nats.stream("trial_rows");
        let mut full = stream["config"].clone();
        full["max_bytes"] = json!(stream["state"]["bytes"].as_u64().unwrap_or(0).max(4096));
        for config in [&full, &stream["config"]] {
            let answer = nats.api("STREAM.UPDATE.trial_rows", config);
            assert_eq!(answer["config"]["max_bytes"], config["max_bytes"], "{answer}");
            if *config == full {
                self.scene.pass(away);
            }
        }
    }

    fn take_service(&mut self, away: Duration) {
        let (begun, service) = (now_ms(), self.scene.host.path().join(SERVICE));
        fs::remove_file(&service).expect("it is there");
        self.scene.pass(away);
        fs::write(&service, "").expect("a file");
        self.caused.push((Cause::Service, begun, now_ms()));
    }

    fn terminate(&mut self) {
        let names = self.scene.names("sink");
        let name = names[self.scene.dice.between(0, names.len() as u64) as usize].clone();
        self.scene.signal(&name, "TERM");
    }

    fn pause_service(&mut self, kind: &str, away: Duration) {
        let pids: Vec<u32> = self
            .scene
            .pids()
            .into_iter()
            .filter(|(name, _)| name.starts_with(kind))
            .map(|(_, pid)| pid)
            .collect();
        if let [pid, ..] = pids[..] {
            self.pause(pid, away);
        }
    }

    fn pause_server(&mut self, what: &str, away: Duration) {
        let pid = self.scene.server(what);
        self.pause(pid, away);
    }

    fn pause(&mut self, pid: u32, away: Duration) {
        tests::signal(pid, "STOP");
        self.scene.pass(away);
        tests::signal(pid, "CONT");
    }

    fn between(&mut self, away: Duration, which: impl Fn(&Self) -> &Proxy, mode: Mode) {
        which(self).set(mode);
        self.scene.pass(away);
        which(self).set(Mode::Pass);
    }
}
