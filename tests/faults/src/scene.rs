//! A stack, the services on it, and what was submitted to them.
//!
//! Services that die are started again as systemd would, two seconds later, whenever anything is waited for. The moment
//! of the last fault is kept, and what shows that it happened: a fault that did not happen is a scenario that failed.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::dice::Dice;
use tests::nats::nats_info;
use tests::processes::children;
use tests::variants::VARIABLE;
use tests::{Host, Launch, Process, SOON, Up, ask_clickhouse, wait_until};

use crate::checker::{Checker, Found, Submitted};
use crate::disk::Disk;
use crate::{PIPELINE, Plan};
use tests::proxy::Proxy;

/// What systemd waits before it starts a service again (`RestartSec=`).
const RESTART_AFTER: Duration = Duration::from_secs(2);
/// Long enough for whatever a killed sink held to be delivered again (120 s), twice, and proven, on a busy machine.
const SEALED_WITHIN: Duration = Duration::from_secs(900);
/// Whatever comes of itself has come by then, on a machine that is busy with other things, too.
pub const PATIENCE: Duration = Duration::from_secs(480);
/// How often raw duplicates are counted while a seal is waited for.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
const SIGKILL: i32 = 9;
/// Set to keep the diary and the logs of scenarios that pass, too.
const KEEP: &str = "FAULTS_KEEP";

/// What a scene needs that is not usual.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Its name, for its logs.
    pub name: &'static str,
    /// The weight of an id.
    pub micros: u32,
    /// Lines of `millstream.toml`.
    pub config: &'static str,
    /// Bytes of ballast in every row.
    pub ballast: u32,
    /// Ids end their process or never end.
    pub rogue: bool,
    /// Pipeline `variant`, as this build of it has it.
    pub build: Option<&'static str>,
    /// nats-server's store is a disk of so many MB.
    pub nats_disk_mb: Option<u32>,
    /// ClickHouse's data are on a disk of so many MB.
    pub clickhouse_disk_mb: Option<u32>,
}

impl Setup {
    /// Rows go to ClickHouse five times a second, so that a short run has many inserts to be hit.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            micros: 200,
            config: "sink.group_age = '200ms'\n",
            ballast: 0,
            rogue: false,
            build: None,
            nats_disk_mb: None,
            clickhouse_disk_mb: None,
        }
    }
}

/// How a scenario ended.
#[derive(Debug, Clone)]
pub struct Report {
    /// What is wrong with what is stored.
    pub found: Found,
    /// The most raw duplicates that were seen before the seal.
    pub raw_seen: u64,
    /// From the last fault to the last seal.
    pub recovered: Duration,
    /// What shows that the faults happened.
    pub proofs: Vec<String>,
}

/// A stack and the services on it.
pub struct Scene {
    // Dropped in this order: services before servers, servers before their disks, disks before their directory.
    services: Vec<Service>,
    up: Option<Up>,
    disks: Vec<Disk>,
    /// Where everything runs.
    pub host: Host,
    /// NATS's own address, whatever the services are told.
    pub nats: String,
    /// ClickHouse's own address.
    pub clickhouse: String,
    /// The random moments.
    pub dice: Dice,
    /// What reads what is stored.
    pub checker: Checker,
    name: &'static str,
    submitted: Vec<Submitted>,
    begun: Instant,
    diary: Vec<String>,
    last_fault: Option<Instant>,
    proofs: Vec<String>,
    raw_seen: u64,
    sampled: Instant,
}

struct Service {
    name: String,
    launch: Launch,
    process: Process,
    died: Option<Instant>,
    /// Whether its end was our doing.
    killed: bool,
    /// How often SIGKILL has ended it.
    kills: u32,
}

impl Scene {
    /// A scene on a local stack of its own.
    pub fn new(plan: Plan, setup: &Setup) -> Self {
        let mut host = host(setup.name, setup.micros, setup.config, setup.ballast);
        if setup.rogue {
            host.env.push(("TRIAL_ROGUE".to_owned(), "1".to_owned()));
        }
        if let Some(build) = setup.build {
            host.env.push((VARIABLE.to_owned(), build.to_owned()));
        }
        let data = host.path().join(".millstream");
        let disks = [("nats", setup.nats_disk_mb), ("clickhouse", setup.clickhouse_disk_mb)];
        let disks = disks.into_iter().filter_map(|(name, mb)| Some(Disk::mount(&data.join(name), mb?)));
        let disks: Vec<Disk> = disks.collect();
        let up = host.up();
        let (nats, clickhouse) = (up.nats.clone(), up.clickhouse.clone());
        let mut scene = Self::on_servers(plan, setup.name, host, &nats, &clickhouse);
        (scene.up, scene.disks) = (Some(up), disks);
        match setup.build {
            _ if setup.rogue => scene.checker = Checker::of_rogue(&scene.clickhouse),
            Some("kinds") => scene.checker = Checker::of_kinds(&scene.clickhouse),
            Some(_) => scene.checker = Checker::of_bounds(&scene.clickhouse),
            None => {}
        }
        scene
    }

    /// A scene on servers from elsewhere. What the services are told of them, the host's environment says.
    pub fn on_servers(plan: Plan, name: &'static str, host: Host, nats: &str, clickhouse: &str) -> Self {
        let mut scene = Self {
            services: Vec::new(),
            up: None,
            disks: Vec::new(),
            nats: nats.to_owned(),
            clickhouse: clickhouse.to_owned(),
            dice: Dice::seeded(plan.seed),
            checker: Checker::new(clickhouse),
            name,
            submitted: Vec::new(),
            begun: Instant::now(),
            diary: Vec::new(),
            last_fault: None,
            proofs: Vec::new(),
            raw_seen: 0,
            sampled: Instant::now(),
            host,
        };
        scene.note(format!("{name} on {}", scene.host.path().display()));
        scene
    }

    /// The local stack.
    pub fn up(&self) -> &Up {
        self.up.as_ref().expect("a scene with a local stack")
    }

    /// The small disk that was mounted first.
    pub fn disk(&mut self) -> &mut Disk {
        self.disks.first_mut().expect("a scene with a small disk")
    }

    /// Ends the local stack as a person would.
    pub fn stop_stack(&mut self) {
        if let Some(mut up) = self.up.take() {
            up.process.signal("TERM");
            up.process.wait(SOON);
        }
    }

    /// Starts the local stack again, at the same addresses.
    pub fn start_stack(&mut self) {
        let up = self.host.up();
        assert_eq!((&up.nats, &up.clickhouse), (&self.nats, &self.clickhouse), "the stack moved");
        self.up = Some(up);
    }

    /// Writes a line into the diary, which a failure shows.
    pub fn note(&mut self, event: impl Into<String>) {
        self.diary.push(format!("{:8.3} {}", self.begun.elapsed().as_secs_f64(), event.into()));
    }

    /// A fault happened now, and this is what shows it.
    pub fn fault(&mut self, proof: impl Into<String>) {
        let proof = proof.into();
        self.note(format!("fault: {proof}"));
        self.last_fault = Some(Instant::now());
        self.proofs.push(proof);
    }

    /// Publishes a run of the ids from 1, to its end.
    pub fn publish(&mut self, run: &str, ids: u64, batch: u32) {
        let launch = self.submission(run, ids, batch);
        let words: Vec<&str> = launch.words.iter().map(String::as_str).collect();
        // Started again with the same words, it goes on.
        self.wait(&format!("run `{run}` published"), SOON, |scene| match scene.host.call(&words) {
            called if called.code == 0 => Ok(()),
            called => Err(called.stderr),
        });
        self.keep_raw_rows();
    }

    /// A run of the ids from 1 is expected from now on, whoever publishes it.
    pub fn expect_run(&mut self, run: &str, ids: u64) {
        self.submitted.push(Submitted { run: run.to_owned(), last: ids });
    }

    /// The words that publish a run, which is expected from now on.
    pub fn submission(&mut self, run: &str, ids: u64, batch: u32) -> Launch {
        self.expect_run(run, ids);
        let (ids, batch) = (format!("1..={ids}"), batch.to_string());
        Launch::from(&["produce", "--ids", &ids, "--run", run, "--batch", &batch, "--json"][..])
    }

    /// Publishes a run in a service of its own, which must end well.
    pub fn submit(&mut self, run: &str, ids: u64, batch: u32) {
        let launch = self.submission(run, ids, batch);
        self.serve(&format!("produce-{run}"), launch);
    }

    /// Has another run published while fewer than two have a quarter of their rows to come, so that there is work for as
    /// long as faults go on, and little of it when they end.
    pub fn keep_load(&mut self, ids: u64, batch: u32) {
        const UNDER_WAY: usize = 2;
        let is_open = |Submitted { run, last }: &&Submitted| self.checker.rows(run) < last / 4 * 3;
        let open = self.submitted.iter().filter(is_open).count();
        for _ in open..UNDER_WAY {
            let run = format!("r{}", self.submitted.len());
            self.submit(&run, ids, batch);
        }
    }

    /// Runs that were submitted.
    pub fn runs(&self) -> &[Submitted] {
        &self.submitted
    }

    /// Merges of ClickHouse's own would hide raw duplicates before they are counted.
    pub fn keep_raw_rows(&self) {
        self.checker.keep_raw_rows();
    }

    /// Starts services, whose command is their name's first part. A worker has one thread, so that a run lasts as long
    /// on a large machine.
    pub fn start(&mut self, names: &[&str]) {
        for name in names {
            self.serve(name, usual(name));
        }
    }

    /// Waits until every worker and sink has found its servers: one that starts while a server is away says so and ends.
    pub fn wait_up(&mut self) {
        for (kind, says) in [("work-", " working"), ("sink-", " sinking")] {
            self.names(kind).iter().for_each(|name| self.wait_log(name, says));
        }
    }

    /// Starts a service with a trap until it has sprung: `sink-before-insert=kill@3`.
    pub fn trap(&mut self, name: &str, trap: &str) {
        self.serve(name, trapped(usual(name), trap));
    }

    /// Starts a service.
    pub fn serve(&mut self, name: &str, launch: Launch) {
        let process = self.host.start_as(name, &launch);
        let name = name.to_owned();
        self.services.push(Service { name, launch, process, died: None, killed: false, kills: 0 });
    }

    /// Waits until a service has been killed or stopped in this place by its trap.
    pub fn wait_sprung(&mut self, name: &str, place: &str) {
        let said = self.wait(&format!("failpoint `{place}` of {name}"), PATIENCE, |scene| {
            let log = scene.host.log(name);
            let line = log.lines().find(|line| line.contains("failpoint") && line.contains(place));
            line.map(str::to_owned).ok_or_else(|| log.lines().last().unwrap_or_default().to_owned())
        });
        if said.contains("SIGKILL") {
            self.wait(&format!("{name} killed"), SOON, |scene| match scene.service(name).kills {
                0 => Err("it runs".to_owned()),
                _ => Ok(()),
            });
        } else {
            let pid = self.service(name).process.pid();
            let state = || if is_stopped(pid) { Ok(()) } else { Err("it runs".to_owned()) };
            wait_until(&format!("{name} stopped"), SOON, state);
        }
        self.fault(format!("{name} sprang {place}"));
    }

    /// Kills a service, which is then started again.
    pub fn kill(&mut self, name: &str) {
        let service = self.service(name);
        if service.died.is_some() {
            return;
        }
        service.process.kill();
        service.killed = true;
        self.tend();
        self.fault(format!("{name} killed"));
    }

    /// Has the services reach ClickHouse through a proxy from now on.
    pub fn before_clickhouse(&mut self) -> Proxy {
        let proxy = Proxy::before(&self.clickhouse);
        self.host.env.push(("CLICKHOUSE_URL".to_owned(), format!("http://{}", proxy.address)));
        proxy
    }

    /// Has the services reach NATS through a proxy from now on.
    pub fn before_nats(&mut self) -> Proxy {
        let proxy = Proxy::before(&self.nats);
        self.host.env.push(("NATS_URL".to_owned(), format!("nats://{}", proxy.address)));
        proxy
    }

    /// Kills one of the services whose names begin so.
    pub fn kill_one_of(&mut self, kind: &str) {
        let names = self.names(kind);
        let name = names[self.dice.between(0, names.len() as u64) as usize].clone();
        self.kill(&name);
    }

    /// Kills all of the services whose names begin so.
    pub fn kill_all(&mut self, kind: &str) {
        self.names(kind).iter().for_each(|name| self.kill(name));
    }

    /// Ends all of them for good.
    pub fn dismiss(&mut self, kind: &str) {
        self.services.retain(|service| !service.name.starts_with(kind));
    }

    /// The names of the services that begin so.
    pub fn names(&self, kind: &str) -> Vec<String> {
        let of_kind = self.services.iter().filter(|service| service.name.starts_with(kind));
        of_kind.map(|service| service.name.clone()).collect()
    }

    /// Sends a signal to a service.
    pub fn signal(&mut self, name: &str, signal: &str) {
        self.service(name).process.signal(signal);
    }

    /// Terminates a service, waits until it has ended well, and starts it again.
    pub fn restart(&mut self, name: &str) {
        let service = self.service(name);
        service.process.signal("TERM");
        let status = service.process.wait(SOON);
        assert!(status.success(), "{name} did not end well: {status}\n{}", self.host.log(name));
        self.revive(name);
        self.fault(format!("{name} terminated and started again"));
    }

    /// Waits until a service has ended well, in whichever life; the last JSON object that it printed.
    pub fn wait_done(&mut self, name: &str, within: Duration) -> Value {
        self.wait(&format!("the end of {name}"), within, |scene| match scene.service(name).process.ended() {
            Some(status) if status.success() => Ok(()),
            _ => Err(scene.host.log(name).lines().last().unwrap_or_default().to_owned()),
        });
        let log = self.host.log(name);
        let json = log.lines().rev().find_map(|line| serde_json::from_str(line).ok());
        json.unwrap_or_else(|| panic!("{name} printed no JSON: {log}"))
    }

    /// Process ids of the services that run.
    pub fn pids(&self) -> Vec<(String, u32)> {
        let running = self.services.iter().filter(|service| service.died.is_none());
        running.map(|service| (service.name.clone(), service.process.pid())).collect()
    }

    /// The processes that compute for a worker.
    pub fn pools(&self, name: &str) -> Vec<u32> {
        let worker = self.services.iter().find(|service| service.name == name && service.died.is_none());
        worker.map(|worker| children(worker.process.pid(), "__compute-pool")).unwrap_or_default()
    }

    /// Stops the newest process that computes for a worker, for ever; which it is, if there is one.
    pub fn freeze_pool(&mut self, name: &str) -> Option<u32> {
        let pool = self.pools(name).last().copied()?;
        tests::signal(pool, "STOP");
        Some(pool)
    }

    fn service(&mut self, name: &str) -> &mut Service {
        let found = self.services.iter_mut().find(|service| service.name == name);
        found.unwrap_or_else(|| panic!("no service `{name}`"))
    }

    fn revive(&mut self, name: &str) {
        let mut launch = self.service(name).launch.clone();
        // A trap springs once.
        if self.host.log(name).contains("failpoint") {
            launch.env.retain(|(variable, _)| variable != TRAP);
        }
        let process = self.host.start_as(name, &launch);
        let service = self.service(name);
        (service.launch, service.process) = (launch, process);
        (service.died, service.killed) = (None, false);
    }

    /// Starts services again that have died. Commands that succeeded are done.
    pub fn tend(&mut self) {
        let (mut notes, mut due) = (Vec::new(), Vec::new());
        for service in &mut self.services {
            match (service.died, service.process.ended()) {
                (None, Some(status)) if !(status.success() && service.ends()) => {
                    service.died = Some(Instant::now());
                    service.kills += u32::from(status.signal() == Some(SIGKILL));
                    let by = if status.signal() == Some(SIGKILL) { "by SIGKILL" } else { "by itself" };
                    if !service.killed {
                        notes.push(format!("{} ended {by}: {status}", service.name));
                    }
                }
                (Some(died), _) if died.elapsed() >= RESTART_AFTER => due.push(service.name.clone()),
                _ => {}
            }
        }
        notes.into_iter().for_each(|note| self.note(note));
        due.iter().for_each(|name| self.revive(name));
    }

    /// Fails the scenario unless every worker and sink is still the process that was started last: a server's absence is
    /// waited out, not died of. A producer may say that it cannot begin, and is then started again.
    pub fn nobody_ended(&mut self) {
        self.tend();
        let is_service = |line: &&String| line.contains("ended by itself") && !line.contains(" produce-");
        let ended: Vec<&String> = self.diary.iter().filter(is_service).collect();
        assert!(ended.is_empty(), "services ended by themselves: {ended:?}");
    }

    /// Waits, and tends the services meanwhile.
    pub fn wait<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut look: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> T {
        wait_until(what, within, || {
            self.tend();
            look(self)
        })
    }

    /// Lets time pass, and tends the services meanwhile.
    pub fn pass(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.tend();
            std::thread::sleep(
                Duration::from_millis(50).min(until.saturating_duration_since(Instant::now())),
            );
        }
    }

    /// A random time passes.
    pub fn pass_between(&mut self, least_ms: u64, most_ms: u64) {
        let pause = self.dice.pause(least_ms, most_ms);
        self.pass(pause);
    }

    /// Kills nats-server, and waits until the stack has started it again.
    pub fn kill_nats(&mut self) {
        self.kill_server("nats-server");
        self.wait_nats();
    }

    /// Waits until nats-server answers.
    pub fn wait_nats(&mut self) {
        let nats = self.nats.clone();
        self.wait("nats-server", SOON, |_| nats_info(&nats).map(drop).map_err(|error| error.to_string()));
    }

    /// Kills ClickHouse, and waits until the stack has started it again.
    pub fn kill_clickhouse(&mut self) {
        self.kill_server("__local-engine");
        self.checker.ask("SELECT 1");
    }

    /// The process id of a server of the stack.
    pub fn server(&self, what: &str) -> u32 {
        wait_until(what, SOON, || match self.up().pids(what)[..] {
            [pid] => Ok(pid),
            ref pids => Err(format!("{pids:?}")),
        })
    }

    /// SIGKILL to a server of the stack.
    pub fn kill_server(&mut self, what: &str) {
        let pid = self.server(what);
        tests::signal(pid, "KILL");
        wait_until(&format!("the end of {what}"), SOON, || match self.up().pids(what).contains(&pid) {
            true => Err(format!("{pid} is there")),
            false => Ok(()),
        });
        self.fault(format!("{what} {pid} killed"));
    }

    /// Waits until so many rows of a run are there.
    pub fn wait_rows(&mut self, run: &str, rows: u64) -> u64 {
        self.wait("rows", PATIENCE, |scene| {
            let found = scene.checker.rows(run);
            if found >= rows { Ok(found) } else { Err(format!("{found} of {rows} rows")) }
        })
    }

    /// Waits until an insert has landed, whose rows are hardly asked for and acked yet.
    pub fn wait_landed(&mut self) {
        let before = self.checker.all_rows();
        self.wait("an insert that landed", PATIENCE, |scene| {
            let now = scene.checker.all_rows();
            if now > before { Ok(()) } else { Err(format!("{now} rows")) }
        });
    }

    /// Waits until an insert is under way.
    pub fn wait_insert(&mut self) {
        let inserts = "SELECT count() FROM system.processes WHERE query ILIKE 'INSERT%trial_rows%'";
        self.wait("an insert under way", PATIENCE, |scene| match scene.checker.number(inserts) {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
    }

    /// Waits until `status --json` of a run is so.
    pub fn wait_status(&mut self, run: &str, what: &str, is_so: impl Fn(&Value) -> bool) {
        self.wait(what, PATIENCE, |scene| {
            let called = scene.host.call(&["status", run, "--json"]);
            match serde_json::from_str(&called.stdout) {
                Ok(status) if is_so(&status) => Ok(()),
                _ => Err(format!("{}{}", called.stdout, called.stderr)),
            }
        });
    }

    /// Waits until a service has written this.
    pub fn wait_log(&mut self, name: &str, text: &str) {
        self.wait(&format!("`{text}` in the log of {name}"), PATIENCE, |scene| {
            let log = scene.host.log(name);
            if log.contains(text) { Ok(()) } else { Err(log.lines().last().unwrap_or_default().to_owned()) }
        });
    }

    /// Fails the scenario when its faults came too late to meet a run that goes on.
    pub fn must_go_on(&self, run: &str) {
        assert!(!self.checker.is_sealed(run), "run `{run}` was sealed before the last fault: make it larger");
    }

    /// Waits until every run is sealed, and judges what is stored.
    pub fn finish(&mut self) -> Report {
        let recovered = self.wait_sealed();
        let found = self.look();
        self.verified();
        Report { found, raw_seen: self.raw_seen, recovered, proofs: self.proofs.clone() }
    }

    /// The same, and every worker and sink must have lived through it.
    pub fn finish_well(&mut self) -> Report {
        let report = self.finish();
        self.nobody_ended();
        report
    }

    /// Waits until every run is sealed; how long after the last fault that was.
    pub fn wait_sealed(&mut self) -> Duration {
        let runs: Vec<String> = self.submitted.iter().map(|submitted| submitted.run.clone()).collect();
        for run in &runs {
            self.wait(&format!("seal of run `{run}`"), SEALED_WITHIN, |scene| {
                scene.sample_raw();
                // Not by `status`: NATS may be on its way back.
                if scene.checker.is_sealed(run) {
                    Ok(())
                } else {
                    Err(format!("{} rows", scene.checker.rows(run)))
                }
            });
            self.note(format!("`{run}` is sealed"));
        }
        let last_fault = self.last_fault.expect("a fault that happened");
        let recovered = last_fault.elapsed();
        runs.iter().for_each(|run| self.host.wait_sealed(run, SOON));
        recovered
    }

    /// What is wrong with what is stored of all runs.
    pub fn look(&self) -> Found {
        let mut found = Found::default();
        self.submitted.iter().for_each(|submitted| found.add(self.checker.look(submitted)));
        found
    }

    /// The engine's own proof, of the values too, must agree with the checker's.
    pub fn verified(&mut self) {
        for Submitted { run, last } in self.submitted.clone() {
            // A server that takes its time may not answer at once.
            let report: Value = self.wait(&format!("the proof of `{run}`"), SOON, |scene| {
                let called = scene.host.call(&["verify", &run, "--values", "--json"]);
                serde_json::from_str(&called.stdout).map_err(|_| called.stderr)
            });
            assert_eq!((&report["sealed"], &report["complete"]), (&true.into(), &true.into()), "{report}");
            assert_eq!((&report["ids"], &report["rows"]), (&last.into(), &last.into()), "{report}");
            assert_eq!(report["values_at_fault"], 0, "{report}");
        }
    }

    /// Counts raw duplicates, if ClickHouse answers and the last count is a while ago.
    fn sample_raw(&mut self) {
        if self.sampled.elapsed() < SAMPLE_EVERY || ask_clickhouse(&self.clickhouse, "SELECT 1").is_err() {
            return;
        }
        self.sampled = Instant::now();
        let raw: u64 = self.submitted.iter().map(|submitted| self.checker.raw_doubled(&submitted.run)).sum();
        if raw > self.raw_seen {
            self.note(format!("{raw} raw duplicates"));
            self.raw_seen = raw;
        }
    }
}

impl Service {
    /// Whether its success is its end.
    fn ends(&self) -> bool {
        ["produce", "verify", "forget", "rebuild"].iter().any(|command| self.name.starts_with(command))
    }
}

/// What arms a place in a process.
const TRAP: &str = "MILLSTREAM_FAIL";

/// The launch of a service by its name.
pub fn usual(name: &str) -> Launch {
    match name.split('-').next() {
        Some("work") => Launch::from(&["work", "--threads", "1"][..]),
        command => Launch::from(&[command.unwrap_or(name)][..]),
    }
}

/// The same with a trap.
pub fn trapped(mut launch: Launch, trap: &str) -> Launch {
    launch.env.push((TRAP.to_owned(), trap.to_owned()));
    launch
}

/// A directory for processes of this very binary, on which every id is done after so many microseconds of a core.
pub fn host(name: &str, micros: u32, config: &str, ballast: u32) -> Host {
    let exe = std::env::current_exe().expect("this binary's path");
    let mut host = Host::new(&exe.to_string_lossy());
    let env = [
        (PIPELINE, name.to_owned()),
        ("TRIAL_TAME", "1".to_owned()),
        ("TRIAL_MICROS", micros.to_string()),
        ("TRIAL_BALLAST", ballast.to_string()),
        ("NO_COLOR", "1".to_owned()),
    ];
    host.env.extend(env.map(|(variable, value)| (variable.to_owned(), value)));
    fs::write(host.path().join("millstream.toml"), config).expect("a file is written");
    host
}

/// Whether a process is stopped by a signal.
pub fn is_stopped(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && line.contains("T (stopped)"))
}

impl Drop for Scene {
    #[expect(clippy::print_stderr, reason = "a failed scenario's diary")]
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os(KEEP).is_some() {
            let kept = PathBuf::from(format!("/tmp/faults-{}-{}", self.name, self.dice.seed));
            let kept = match self.host.keep_logs(&kept) {
                Ok(()) => format!("logs in {}", kept.display()),
                Err(error) => format!("no logs: {error}"),
            };
            eprintln!("{} with seed {}, {kept}\n{}", self.name, self.dice.seed, self.diary.join("\n"));
        }
    }
}
