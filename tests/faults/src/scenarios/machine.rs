//! Rows 32, 33, 34 and 38: the clock, restarts in turn, and a machine that runs out of things.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tests::{Launch, SOON};

use crate::Plan;
use crate::disk::Disk;
use crate::scene::{Report, Scene, Setup, usual};

const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// An hour ahead, then an hour behind, for worker and sink, in mid-run; the servers keep the right time.
pub fn clock_shifted(plan: Plan) -> Report {
    const BETWEEN: Duration = Duration::from_secs(8);
    install_faketime();
    let mut scene = Scene::new(plan, &Setup::new("clock"));
    let clock = scene.host.path().join("clock");
    fs::write(&clock, "+0\n").expect("a clock");
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    for name in ["work-1", "sink-1"] {
        scene.serve(name, faked(usual(name), &clock));
    }
    scene.start(&["work-2", "sink-2"]);
    scene.keep_load(60_000, 500);
    scene.wait_landed();
    for shift in ["+1h", "-1h"] {
        scene.keep_load(60_000, 500);
        fs::write(&clock, format!("{shift}\n")).expect("a clock");
        scene.pass(BETWEEN);
        scene.fault(format!("wall clock of a worker and a sink at {shift}"));
        assert_sees_all(&mut scene, &clock);
    }
    // What they say when they end carries their time.
    for name in ["work-1", "sink-1"] {
        scene.restart(name);
        let hour = hour_ago();
        assert!(
            scene.host.log(name).contains(&hour),
            "no line of {name} is of {hour}: {}",
            scene.host.log(name)
        );
    }
    scene.finish()
}

/// A command whose clock is wrong knows who is alive: by the server's clock, to which all others are nothing.
fn assert_sees_all(scene: &mut Scene, clock: &Path) {
    let status = faked(Launch::from(&["status", "--json"][..]), clock);
    scene.wait("all processes in sight", SOON, |scene| {
        let told = scene.host.call_as(&status).expect(0).stdout;
        let told = told.replace(' ', "");
        let seen = ["work", "sink"].map(|role| told.matches(&format!("\"role\":\"{role}\"")).count());
        if seen == [2, 2] { Ok(()) } else { Err(told) }
    });
}

fn faked(mut launch: Launch, clock: &Path) -> Launch {
    let env = [
        ("LD_PRELOAD", FAKETIME.to_owned()),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_string_lossy().into_owned()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ];
    launch.env.extend(env.map(|(name, value)| (name.to_owned(), value)));
    launch
}

/// An hour ago as logs begin with it, to the ten minutes.
fn hour_ago() -> String {
    let output =
        Command::new("date").args(["-u", "-d", "-1 hour", "+%Y-%m-%dT%H:%M"]).output().expect("`date` runs");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    text[..text.len() - 1].to_owned()
}

fn install_faketime() {
    if Path::new(FAKETIME).exists() {
        return;
    }
    let installed =
        Command::new("apt-get").args(["install", "-y", "-qq", "libfaketime"]).stdout(Stdio::null()).status();
    assert!(
        installed.is_ok_and(|status| status.success()) && Path::new(FAKETIME).exists(),
        "`libfaketime` is missing and cannot be installed"
    );
}

/// Every service and both servers are terminated and started again, one after the other, as an upgrade does.
pub fn rolling_restart(plan: Plan) -> Report {
    const BETWEEN: Duration = Duration::from_secs(3);
    let services = ["work-1", "work-2", "sink-1", "sink-2"];
    let mut scene = Scene::new(plan, &Setup::new("rolling"));
    scene.host.call(&["setup"]).expect(0);
    scene.keep_raw_rows();
    scene.start(&services);
    scene.keep_load(60_000, 200);
    scene.wait_landed();
    for name in services {
        scene.keep_load(60_000, 200);
        scene.restart(name);
        scene.pass(BETWEEN);
    }
    let held = redelivered(&scene);
    for server in ["nats-server", "__local-engine"] {
        let pid = scene.server(server);
        tests::signal(pid, "TERM");
        scene.wait(&format!("another {server}"), SOON, |scene| match scene.up().pids(server)[..] {
            [now] if now != pid => Ok(()),
            ref pids => Err(format!("{pids:?}")),
        });
        scene.fault(format!("{server} {pid} terminated and started again"));
        scene.keep_load(60_000, 200);
        scene.pass(BETWEEN);
    }
    let report = scene.finish();
    assert_eq!(held, 0, "batches of services that were terminated came again");
    report
}

/// The most that services have counted as delivered again.
fn redelivered(scene: &Scene) -> u64 {
    let logs = scene.names("work").into_iter().chain(scene.names("sink")).map(|name| scene.host.log(&name));
    let counts = logs.flat_map(|log| {
        let words = log.split_whitespace().filter_map(|word| word.strip_prefix("redelivered=")?.parse().ok());
        words.collect::<Vec<u64>>()
    });
    counts.max().unwrap_or(0)
}

/// A worker that may have less memory than its batches need, until somebody gives it more.
pub fn worker_out_of_memory(plan: Plan) -> Report {
    out_of_memory(plan, "work-1")
}

/// The same with a sink.
pub fn sink_out_of_memory(plan: Plan) -> Report {
    out_of_memory(plan, "sink-1")
}

fn out_of_memory(plan: Plan, name: &str) -> Report {
    const LITTLE: u64 = 24 << 20;
    const ENOUGH: u64 = 1 << 30;
    let setup = Setup { ballast: 4000, micros: 100, ..Setup::new("out-of-memory") };
    let mut scene = Scene::new(plan, &setup);
    let cgroup = Cgroup::new(&format!("faults-{}-{name}", std::process::id()), LITTLE);
    scene.publish("a", 20_000, 1000);
    if name == "sink-1" {
        scene.start(&["work-2"]);
        // More than a sink holds at once, and far more than it may have.
        scene.wait_status("a", "rows that wait", |status| status["to_store"].as_u64() >= Some(12));
    } else {
        scene.start(&["sink-2"]);
    }
    scene.serve(name, Launch { under: cgroup.enter(), ..usual(name) });
    let mut little = LITTLE;
    scene.wait("a kill for lack of memory", SOON, |_| match cgroup.kills() {
        0 => {
            // A build that needs less gets less.
            little -= little / 50;
            let limited = cgroup.try_limit(little);
            Err(format!("{} of {little} bytes are used, {limited:?}", cgroup.used()))
        }
        _ => Ok(()),
    });
    scene.fault(format!("{name} killed {} times with {little} bytes", cgroup.kills()));
    scene.must_go_on("a");
    cgroup.limit(ENOUGH);
    let report = scene.finish();
    scene.dismiss(name);
    report
}

/// A control group with a memory limit; removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str, bytes: u64) -> Self {
        let path = Path::new("/sys/fs/cgroup/memory").join(name);
        fs::create_dir(&path).expect("a memory control group of version 1 can be made: root is needed");
        let cgroup = Self(path);
        cgroup.limit(bytes);
        cgroup
    }

    fn limit(&self, bytes: u64) {
        self.try_limit(bytes).expect("a limit");
    }

    /// Refused while more is used that cannot be had back.
    fn try_limit(&self, bytes: u64) -> std::io::Result<()> {
        fs::write(self.0.join("memory.limit_in_bytes"), bytes.to_string())
    }

    /// What a process is started under to be in it from its first moment.
    fn enter(&self) -> Vec<String> {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", self.0.display());
        ["sh", "-c", &script].map(str::to_owned).to_vec()
    }

    fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.oom_control")).unwrap_or_default();
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        kills.unwrap_or(0)
    }

    fn used(&self) -> String {
        fs::read_to_string(self.0.join("memory.usage_in_bytes")).unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Empty once its processes have ended; else it stays, and its name tells whose it was.
        drop(fs::remove_dir(&self.0));
    }
}

/// Worker and sink may have few files open.
pub fn few_files(plan: Plan) -> Report {
    const FILES: u32 = 40;
    let mut scene = Scene::new(plan, &Setup::new("few-files"));
    scene.publish("a", 60_000, 500);
    let under: Vec<String> = ["prlimit".to_owned(), format!("--nofile={FILES}")].to_vec();
    for name in ["work-1", "sink-1"] {
        scene.serve(name, Launch { under: under.clone(), ..usual(name) });
    }
    scene.wait_rows("a", 1);
    for (name, pid) in scene.pids() {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
        let line =
            limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default().to_owned();
        assert!(line.contains(&FILES.to_string()), "{name}: {line}");
        scene.fault(format!("{name}: {line}"));
    }
    scene.finish_well()
}

/// What worker and sink log is lost, since its disk is full.
pub fn full_logs(plan: Plan) -> Report {
    let mut scene = Scene::new(plan, &Setup::new("full-logs"));
    let mut disk = Disk::mount(&scene.host.path().join("logs"), 1);
    scene.publish("a", 60_000, 500);
    scene.host.env.push(("MILLSTREAM_LOG".into(), "debug".into()));
    for name in ["work-1", "sink-1"] {
        scene.serve(&format!("logs/{name}"), usual(name));
    }
    scene.wait_rows("a", 1);
    let bytes = disk.fill();
    scene.must_go_on("a");
    let size = |scene: &Scene| ["work-1", "sink-1"].map(|name| scene.host.log(&format!("logs/{name}")).len());
    let before = size(&scene);
    scene.fault(format!("{bytes} bytes fill the disk of the logs"));
    let report = scene.finish();
    let most = before.map(|bytes| bytes + 4096);
    assert!(size(&scene).iter().zip(most).all(|(now, most)| *now <= most), "there was room for logs");
    scene.nobody_ended();
    scene.dismiss("logs");
    report
}

/// Nothing may be written under /etc.
pub fn read_only_etc(plan: Plan) -> Report {
    let script = "mount --bind /etc /etc && mount -o remount,ro,bind /etc && touch /etc/faults 2> /dev/null; \
                  test ! -e /etc/faults && echo 'read-only /etc' >&2 && exec \"$0\" \"$@\"";
    let mut scene = Scene::new(plan, &Setup::new("read-only-etc"));
    scene.publish("a", 60_000, 500);
    let under = ["unshare", "-m", "sh", "-c", script].map(str::to_owned).to_vec();
    for name in ["work-1", "sink-1"] {
        scene.serve(name, Launch { under: under.clone(), ..usual(name) });
        scene.wait_log(name, "read-only /etc");
        scene.fault(format!("{name} cannot write under /etc"));
    }
    scene.finish_well()
}
