//! Row 36: three nats-servers, each in a network namespace of its own, with three copies of every stream.

use std::time::Instant;

use tests::SOON;

use crate::Plan;
use crate::cluster::Cluster;
use crate::netns::Hub;
use crate::scene::{Report, Scene, Setup};

/// A stream that is written all the time.
const BUSY: &str = "trial_rows";
const SERVERS: usize = 3;
/// Runs of the load.
const IDS: u64 = 20_000;
const BATCH: u32 = 100;

struct Trio {
    // Dropped in this order: services, then servers, then namespaces.
    scene: Scene,
    cluster: Cluster,
    _hub: Hub,
}

impl Trio {
    /// A run is being published, computed and stored.
    fn under_load(plan: Plan, name: &'static str) -> Self {
        let hub = Hub::enter();
        let config = "sink.group_age = '200ms'\nstreams.replicas = 3\nstreams.ids_bytes = \"512MiB\"\nstreams.rows_bytes = \"512MiB\"\n";
        let mut scene = Scene::new(plan, &Setup { micros: 400, config, ..Setup::new(name) });
        let cluster = Cluster::start(&hub, scene.host.path());
        for (variable, url) in [("NATS_URL", cluster.urls()), ("CLICKHOUSE_URL", scene.clickhouse.clone())] {
            scene.host.env.push((variable.to_owned(), url));
        }
        scene.publish("a", 40_000, 200);
        scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
        scene.wait_rows("a", 1);
        scene.keep_load(IDS, BATCH);
        Self { scene, cluster, _hub: hub }
    }

    /// Waits until rows go on being stored, of runs that are added as others end.
    fn goes_on(&mut self) -> f64 {
        let since = Instant::now();
        self.scene.keep_load(IDS, BATCH);
        self.scene.wait_landed();
        since.elapsed().as_secs_f64()
    }

    /// All servers are there again: what is stored is right. A producer whose record meets an election ends with an error,
    /// and is started again.
    fn finish(mut self) -> Report {
        self.cluster.wait_ready();
        self.scene.finish()
    }
}

/// The leader of the rows stream, three times.
pub fn leader_killed(plan: Plan) -> Report {
    const KILLS: usize = 3;
    let mut trio = Trio::under_load(plan, "cluster-leader");
    for _ in 0..KILLS {
        let leader = trio.cluster.leader(BUSY, None);
        trio.cluster.kill(leader);
        trio.scene.fault(format!("nats-{leader}, which led, killed"));
        let next = trio.cluster.leader(BUSY, Some(leader));
        let seconds = trio.goes_on();
        trio.scene.note(format!("nats-{next} leads, rows go on after {seconds:.1} s"));
        trio.cluster.revive(leader);
        trio.cluster.wait_ready();
    }
    trio.finish()
}

/// Two of three: nothing can be stored until one is back.
pub fn two_killed(plan: Plan) -> Report {
    let away = plan.lasting(20, 120);
    let mut trio = Trio::under_load(plan, "cluster-two");
    let leader = trio.cluster.leader(BUSY, None);
    let other = (leader + 1) % SERVERS;
    let left = (leader + 2) % SERVERS;
    trio.cluster.kill(leader);
    trio.cluster.kill(other);
    trio.scene.pass(away / 2);
    let half = trio.cluster.messages(left, BUSY);
    trio.scene.pass(away / 2);
    assert_eq!(half, trio.cluster.messages(left, BUSY), "one server of three stored something");
    trio.cluster.revive(other);
    trio.cluster.revive(leader);
    trio.scene.fault(format!("nats-{leader} and nats-{other} killed, and away for {} s", away.as_secs()));
    trio.cluster.wait_ready();
    let seconds = trio.goes_on();
    trio.scene.note(format!("rows go on after {seconds:.1} s"));
    trio.finish()
}

/// The leader cannot reach anybody, and nobody can reach it.
pub fn leader_cut_off(plan: Plan) -> Report {
    let lasting = plan.lasting(40, 120);
    let mut trio = Trio::under_load(plan, "cluster-partition");
    let leader = trio.cluster.leader(BUSY, None);
    let cut = trio.cluster.spoke(leader).isolate();
    let next = trio.cluster.leader(BUSY, Some(leader));
    trio.scene.pass(lasting);
    let packets = cut.packets();
    drop(cut);
    assert!(packets > 0, "no packet was dropped");
    trio.scene.fault(format!(
        "nats-{leader}, which led, cut off for {} s, {packets} packets dropped; nats-{next} led instead",
        lasting.as_secs()
    ));
    trio.finish()
}

/// All at once, twice.
pub fn all_restarted(plan: Plan) -> Report {
    const TIMES: usize = 2;
    let mut trio = Trio::under_load(plan, "cluster-all");
    for _ in 0..TIMES {
        (0..SERVERS).for_each(|at| trio.cluster.kill(at));
        trio.scene.fault("all three nats-servers killed");
        (0..SERVERS).for_each(|at| trio.cluster.revive(at));
        trio.cluster.wait_ready();
        trio.scene.wait("a leader", SOON, |_| Ok(trio.cluster.leader(BUSY, None)));
        let seconds = trio.goes_on();
        trio.scene.note(format!("rows go on after {seconds:.1} s"));
    }
    trio.finish()
}
