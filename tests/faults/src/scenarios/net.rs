//! Rows 11 and 22 to 25: a network that drops packets, in one direction or both, that is slow, and that resets.
//!
//! The servers run in a namespace of their own, and the services that are to suffer at the far end of a cable out of it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tests::SOON;
use tests::nats::{Nats, stream_messages};

use crate::Plan;
use crate::netns::{Hub, Lost, Spoke};
use crate::scene::{Report, Scene, Setup, trapped, usual};
use crate::weather::{CLEAR, Link, Weather};

/// A scene whose services may be far away.
struct Net {
    // Dropped in this order: services and servers before the namespaces that they are in.
    scene: Scene,
    spoke: Spoke,
    _hub: Hub,
}

impl Net {
    fn new(plan: Plan, setup: &Setup) -> Self {
        let hub = Hub::enter();
        let spoke = hub.spoke("far");
        Self { scene: Scene::new(plan, setup), spoke, _hub: hub }
    }

    /// Starts services at the far end.
    fn start_far(&mut self, names: &[&str]) {
        start_at(&mut self.scene, &self.spoke, names);
    }

    fn nats_port(&self) -> u16 {
        port(&self.scene.nats)
    }

    fn clickhouse_port(&self) -> u16 {
        port(&self.scene.clickhouse)
    }
}

fn start_at(scene: &mut Scene, spoke: &Spoke, names: &[&str]) {
    for name in names {
        let launch = spoke.launch(usual(name), &scene.nats, &scene.clickhouse);
        scene.serve(name, launch);
    }
}

fn port(url: &str) -> u16 {
    let port = url.trim_end_matches('/').rsplit(':').next().and_then(|port| port.parse().ok());
    port.unwrap_or_else(|| panic!("{url} has no port"))
}

/// Stops a sink before each of these inserts: answers can be lost from then on, and the insert is still to be made.
pub const UNHEARD: [&str; 3] =
    ["sink-before-insert=stop@2", "sink-before-insert=stop@5", "sink-before-insert=stop@8"];

/// Has the answers lost of an insert that the stopped `sink-1` is about to make; how many rows it committed unheard.
pub fn commit_unheard<T>(scene: &mut Scene, lose_answers: impl FnOnce() -> T) -> (u64, T) {
    scene.wait_sprung("sink-1", "sink-before-insert");
    let lost = lose_answers();
    let before = scene.checker.rows("a");
    scene.signal("sink-1", "CONT");
    (scene.wait_rows("a", before + 1) - before, lost)
}

/// Row 11: inserts are committed, their answers vanish, and then the connections too.
pub fn answers_lost(plan: Plan) -> Report {
    let mut net = Net::new(plan, &Setup::new("answers-lost"));
    net.scene.publish("a", 100_000, 500);
    // One worker, so that the run lasts until the last trap.
    net.scene.start(&["work-1"]);
    let launch = net.spoke.launch(usual("sink-1"), &net.scene.nats, &net.scene.clickhouse);
    net.scene.serve("sink-1", trapped(launch, &UNHEARD.join(",")));
    net.scene.wait_up();
    let server = net.clickhouse_port();
    for _ in UNHEARD {
        let (rows, cut) = commit_unheard(&mut net.scene, || net.spoke.cut(server, Lost::Answers));
        net.scene.wait("answers that are dropped", SOON, |_| match cut.packets() {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
        let (packets, connections) = (cut.packets(), net.spoke.reset(server));
        drop(cut);
        net.scene.fault(format!(
            "{rows} rows committed while {packets} packets of answers were dropped, then {connections} connections reset"
        ));
    }
    net.scene.must_go_on("a");
    net.scene.finish_well()
}

/// Row 11: nobody resets anything, and the sink waits until its patience ends.
pub fn answers_lost_for_long(plan: Plan) -> Report {
    silent(plan, "answers-lost-long", Lost::Answers, plan.lasting(100, 120))
}

/// Row 23: the sink is not heard by ClickHouse.
pub fn sink_not_heard(plan: Plan) -> Report {
    silent(plan, "sink-not-heard", Lost::Requests, plan.lasting(45, 120))
}

/// Row 23: the sink does not hear ClickHouse.
pub fn clickhouse_not_heard(plan: Plan) -> Report {
    silent(plan, "clickhouse-not-heard", Lost::Replies, plan.lasting(45, 120))
}

/// Between a sink and ClickHouse, from the middle of an insert on.
fn silent(plan: Plan, name: &'static str, lost: Lost, lasting: Duration) -> Report {
    let mut net = Net::new(plan, &Setup::new(name));
    net.scene.publish("a", 150_000, 1000);
    net.scene.start(&["work-1", "work-2"]);
    net.start_far(&["sink-1"]);
    net.scene.wait_rows("a", 1);
    net.scene.wait_insert();
    let cut = net.spoke.cut(net.clickhouse_port(), lost);
    net.scene.pass(lasting);
    let packets = cut.packets();
    drop(cut);
    assert!(packets > 0, "no packet was dropped");
    net.scene.fault(format!("{packets} packets dropped in {} s: {lost:?}", lasting.as_secs()));
    net.scene.must_go_on("a");
    net.scene.finish_well()
}

/// Row 22: workers lose NATS.
pub fn workers_without_nats(plan: Plan) -> Report {
    let mut net = Net::new(plan, &Setup::new("workers-without-nats"));
    net.scene.publish("a", 150_000, 1000);
    net.start_far(&["work-1", "work-2"]);
    net.scene.start(&["sink-1", "sink-2"]);
    partitioned(plan, net, |scene| Nats::connect(&scene.nats).consumer("trial_ids", "work-a-1").delivered)
}

/// Row 22: sinks lose NATS, and keep ClickHouse.
pub fn sinks_without_nats(plan: Plan) -> Report {
    let mut net = Net::new(plan, &Setup::new("sinks-without-nats"));
    net.scene.publish("a", 150_000, 1000);
    net.scene.start(&["work-1", "work-2"]);
    net.start_far(&["sink-1", "sink-2"]);
    partitioned(plan, net, |scene| Nats::connect(&scene.nats).consumer("trial_rows", "sink").delivered)
}

/// Row 22: a producer loses NATS in mid-publish.
pub fn producer_without_nats(plan: Plan) -> Report {
    let mut net = Net::new(plan, &Setup { micros: 50, ..Setup::new("producer-without-nats") });
    net.scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
    let launch = net.scene.submission("a", 250_000, 20);
    let launch = net.spoke.launch(launch, &net.scene.nats, &net.scene.clickhouse);
    net.scene.serve("produce-a", launch);
    partitioned(plan, net, |scene| stream_messages(&scene.nats, "trial_ids"))
}

/// Twice there is no way between the far services and NATS, whose `progress` with them stands still then.
fn partitioned(plan: Plan, mut net: Net, progress: impl Fn(&Scene) -> u64) -> Report {
    // A service that cannot reach NATS as it starts ends, which is right, and is not what is played here.
    net.scene.wait("all services at work", SOON, |scene| {
        let is_at_work = |name: &&String| {
            let log = scene.host.log(name);
            log.contains("INFO working") || log.contains("INFO sinking")
        };
        match scene.names("work").iter().chain(&scene.names("sink")).find(|name| !is_at_work(name)) {
            Some(name) => Err(format!("{name} has not begun")),
            None => Ok(()),
        }
    });
    for lasting in [Duration::from_secs(10), plan.lasting(60, 300)] {
        let begun = progress(&net.scene);
        goes_on(&mut net.scene, &progress, begun);
        let cut = net.spoke.cut(net.nats_port(), Lost::Both);
        net.scene.pass(lasting / 2);
        let half = progress(&net.scene);
        net.scene.pass(lasting / 2);
        let whole = progress(&net.scene);
        let packets = cut.packets();
        drop(cut);
        assert!(packets > 0, "no packet was dropped");
        assert_eq!(half, whole, "something got through");
        net.scene.fault(format!("{packets} packets dropped in {} s, nothing got through", lasting.as_secs()));
        let healed = Instant::now();
        goes_on(&mut net.scene, &progress, whole);
        net.scene.note(format!("goes on after {:.1} s", healed.elapsed().as_secs_f64()));
    }
    net.scene.must_go_on("a");
    net.scene.finish_well()
}

fn goes_on(scene: &mut Scene, progress: &impl Fn(&Scene) -> u64, from: u64) {
    scene.wait("progress", SOON, |scene| match progress(scene) {
        now if now > from => Ok(()),
        now => Err(format!("{now}")),
    });
}

/// Row 24: every service is behind a link that delays, loses and reorders, and is then nearly closed.
pub fn bad_weather(plan: Plan) -> Report {
    const STORM: Weather = Weather {
        latency: Duration::from_millis(200),
        jitter: Duration::from_millis(100),
        lost_percent: 5,
        bytes_per_second: None,
    };
    /// 64 kbit/s.
    const NARROW: Weather = Weather { bytes_per_second: Some(8000), ..CLEAR };
    let hub = Hub::enter();
    let link = Link::new(&hub, "far", plan.seed);
    let mut scene = Scene::new(plan, &Setup::new("bad-weather"));
    scene.publish("a", 100_000, 500);
    start_at(&mut scene, &link.spoke, &["work-1", "work-2", "sink-1", "sink-2"]);
    scene.wait_rows("a", 1);
    for (weather, lasting) in [(STORM, plan.lasting(60, 300)), (NARROW, plan.lasting(45, 300))] {
        let (before, [passed, lost, overtaken]) = (scene.checker.rows("a"), counted(&link));
        link.set(weather);
        scene.pass(lasting);
        let rows = scene.checker.rows("a") - before;
        let now = counted(&link);
        let (passed, lost, overtaken) = (now[0] - passed, now[1] - lost, now[2] - overtaken);
        assert!(passed > 0 && (weather.lost_percent == 0 || lost > 0 && overtaken > 0), "{now:?}");
        scene.fault(format!(
            "{} s of {weather:?}: {passed} packets passed, {lost} lost, {overtaken} overtaken, {rows} rows stored",
            lasting.as_secs()
        ));
        // What is in flight under bad weather is the point, so a run that is over had too little.
        scene.must_go_on("a");
    }
    link.set(CLEAR);
    scene.finish_well()
}

fn counted(link: &Link) -> [u64; 3] {
    [&link.counts.passed, &link.counts.lost, &link.counts.overtaken]
        .map(|count| count.load(Ordering::Relaxed))
}

/// Row 25: twice a second every connection of every service is reset.
pub fn resets(plan: Plan) -> Report {
    const EVERY: Duration = Duration::from_millis(500);
    /// What the allocator may keep beside what is held.
    const FLAT_KIB: u64 = 24 << 10;
    let mut net = Net::new(plan, &Setup::new("resets"));
    net.scene.publish("a", 400_000, 1000);
    net.start_far(&["work-1", "work-2", "sink-1", "sink-2"]);
    net.scene.wait_rows("a", 1);
    let (storm, mut connections, mut early) = (plan.lasting(60, 300), 0, Vec::new());
    let begun = Instant::now();
    while begun.elapsed() < storm {
        for port in [net.nats_port(), net.clickhouse_port()] {
            connections += net.spoke.reset(port);
        }
        net.scene.pass(EVERY);
        if early.is_empty() && begun.elapsed() > storm / 3 {
            early = resident(&net.scene);
        }
    }
    let late = resident(&net.scene);
    let seconds = storm.as_secs();
    assert!(connections as u64 > seconds, "only {connections} connections were there to be reset");
    net.scene.fault(format!(
        "{connections} connections reset in {seconds} s; KiB resident {early:?}, then {late:?}"
    ));
    for ((name, early), (_, late)) in early.iter().zip(&late) {
        assert!(late < &(early + FLAT_KIB), "{name} grew from {early} to {late} KiB");
    }
    net.scene.must_go_on("a");
    net.scene.finish_well()
}

/// KiB of memory that each service has.
fn resident(scene: &Scene) -> Vec<(String, u64)> {
    let kib = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        line.unwrap_or(0)
    };
    scene.pids().into_iter().map(|(name, pid)| (name, kib(pid))).collect()
}
