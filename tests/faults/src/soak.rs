//! The soak: a random fault every 5 to 20 s on a running load, then quiet. Whatever was submitted must be sealed by
//! itself, and be right.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::Plan;
use crate::matrix::Raw;
use crate::scene::{Report, Scene, Setup};
use crate::table::{Line, Outcome, Table};
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
}

const FAULTS: [Fault; 17] = [
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
];

/// The scene with a proxy before each server.
struct Soak {
    scene: Scene,
    nats: Proxy,
    clickhouse: Proxy,
    counts: BTreeMap<Fault, u32>,
}

/// Goes on for `faulting`, then waits for the seals and judges.
pub fn run(plan: Plan, faulting: Duration, table: Table) -> ExitCode {
    table.begin();
    let begun = Instant::now();
    // A soak ends early by a panic, as a scenario does.
    let played = std::thread::spawn(move || Soak::new(plan).play(faulting)).join();
    let (faults, outcome) = match played {
        Ok((faults, report)) => (faults, Outcome::Judged(Raw::Merged, report)),
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

impl Soak {
    fn new(plan: Plan) -> Self {
        let mut scene = Scene::new(plan, &Setup::new("soak"));
        let (nats, clickhouse) = (scene.before_nats(), scene.before_clickhouse());
        scene.host.call(&["setup"]).expect(0);
        scene.keep_raw_rows();
        scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
        Self { scene, nats, clickhouse, counts: BTreeMap::new() }
    }

    /// The faults by kind, and what is stored in the end.
    fn play(mut self, faulting: Duration) -> (String, Report) {
        let until = Instant::now() + faulting;
        while Instant::now() < until {
            self.scene.keep_load(RUN_IDS, RUN_BATCH);
            self.scene.pass_between(BETWEEN_MS.0, BETWEEN_MS.1);
            let fault = FAULTS[self.scene.dice.between(0, FAULTS.len() as u64) as usize];
            self.strike(fault);
            *self.counts.entry(fault).or_default() += 1;
            self.scene.fault(format!("{fault:?}"));
            // A soak that hangs is found where it hangs.
            let lost = self.clickhouse.dropped();
            self.scene.note(format!("{} runs, {lost} bytes of replies lost so far", self.scene.runs()));
        }
        let mut faults = format!("{} runs of {RUN_IDS} ids;", self.scene.runs());
        for (fault, times) in &self.counts {
            faults += &format!(" {fault:?} {times},");
        }
        (faults, self.scene.finish())
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
        }
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
