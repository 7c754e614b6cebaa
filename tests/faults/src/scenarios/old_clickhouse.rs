//! Rows 11, 13, 23 and 33 again, on a real ClickHouse server in a process of its own: Debian's 18.16.1.
//!
//! Everything but the `CREATE` statements is the product's: workers, sinks, asks, the proof and the seal. Two scenarios are
//! of the wire alone: what [`Store`] does with an insert that nobody can finish, and with one that runs already.

use std::time::{Duration, Instant};

use bytes::Bytes;
use millstream::{frame, rowbinary};
use millstream_engine::error::StoreFault;
use millstream_engine::store::Portion;
use millstream_engine::{Store, StoreAddress};
use tests::{SOON, Trial, Up, wait_until};
use tokio::runtime::Runtime;

use crate::Plan;
use crate::checker::{Checker, Submitted};
use crate::old_clickhouse::OldClickHouse;
use crate::scenarios::net::{UNHEARD, commit_unheard};
use crate::scene::{PATIENCE, Report, Scene, Setup, host};
use tests::proxy::{Mode, Proxy};

/// A local stack, whose NATS is used, an old ClickHouse beside it, and a proxy before that.
struct Old {
    _up: Up,
    server: OldClickHouse,
    proxy: Proxy,
    scene: Scene,
}

impl Old {
    /// A run of 100,000 ids waits to be computed, and stored over the proxy.
    fn new(plan: Plan, name: &'static str) -> Self {
        let usual = Setup::new(name);
        let mut host = host(name, usual.micros, usual.config, usual.ballast);
        let up = host.up();
        let server = OldClickHouse::start(&host.path().join("old"));
        let proxy = Proxy::before(&server.url());
        host.env.push(("CLICKHOUSE_URL".to_owned(), format!("http://{}", proxy.address)));
        let mut scene = Scene::on_servers(plan, name, host, &up.nats, &server.url());
        let words = scene.submission("a", 100_000, 500).words;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        scene.host.call(&words).expect(0);
        Self { _up: up, server, proxy, scene }
    }

    fn under_load(plan: Plan, name: &'static str) -> Self {
        let mut old = Self::new(plan, name);
        old.scene.start(&["work-1", "work-2", "sink-1", "sink-2"]);
        old.scene.wait_up();
        old.scene.wait_rows("a", 1);
        old
    }

    /// Waits until the server executes an insert.
    fn wait_insert(&mut self) {
        let server = &self.server;
        self.scene.wait("an insert under way", PATIENCE, |_| match server.number(INSERTS) {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
    }

    fn finish(mut self) -> Report {
        self.scene.must_go_on("a");
        self.scene.finish_well()
    }
}

const INSERTS: &str = "SELECT count() FROM system.processes WHERE query LIKE 'INSERT INTO %trial_rows%'";

/// Answers vanish, and then connections, when rows have been committed.
pub fn answers_lost(plan: Plan) -> Report {
    let mut old = Old::new(plan, "old-answers-lost");
    // One worker, so that the run lasts until the last trap.
    old.scene.start(&["work-1"]);
    old.scene.trap("sink-1", &UNHEARD.join(","));
    old.scene.wait_up();
    for _ in UNHEARD {
        let proxy = &old.proxy;
        let (rows, dropped) = commit_unheard(&mut old.scene, || {
            proxy.set(Mode::DropReplies);
            proxy.dropped()
        });
        old.scene.wait("answers that vanish", SOON, |_| match proxy.dropped() - dropped {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
        let bytes = proxy.dropped() - dropped;
        proxy.set(Mode::Refuse);
        old.scene.fault(format!(
            "{rows} rows committed while {bytes} bytes of answers vanished, then every connection"
        ));
        old.scene.pass(Duration::from_millis(500));
        proxy.set(Mode::Pass);
    }
    old.finish()
}

/// SIGKILL while an insert is executed.
pub fn killed_in_insert(plan: Plan) -> Report {
    const KILLS: usize = 5;
    let mut old = Old::under_load(plan, "old-killed");
    for _ in 0..KILLS {
        old.scene.keep_load(20_000, 100);
        old.wait_insert();
        old.server.kill();
        old.scene.fault("clickhouse-server killed while it executed an insert");
        old.scene.pass(Duration::from_secs(1));
        old.server.revive();
        old.scene.wait_landed();
    }
    old.scene.finish_well()
}

/// SIGTERM under load, and started again.
pub fn restarted(plan: Plan) -> Report {
    const TIMES: usize = 3;
    let mut old = Old::under_load(plan, "old-restarted");
    for _ in 0..TIMES {
        old.scene.keep_load(60_000, 200);
        old.scene.wait_landed();
        let took = old.server.terminate();
        old.scene.fault(format!("clickhouse-server terminated, gone after {:.1} s", took.as_secs_f64()));
        old.server.revive();
        old.scene.wait_landed();
    }
    old.finish()
}

/// The wire alone: a server, a proxy, and a [`Store`] on each side of it.
struct Wire {
    server: OldClickHouse,
    proxy: Proxy,
    runtime: Runtime,
    proofs: Vec<String>,
    _dir: tempfile::TempDir,
}

/// The run that the wire's inserts are of: one batch.
const RUN: &str = "wire";
const IDS: u32 = 120_000;
const PASS: u32 = 1;
/// So slow that an insert's body is long under way: the server begins to execute it after its first 256 KiB.
const SLOW: u32 = 300_000;

impl Wire {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("millstream-wire-").tempdir().expect("a directory");
        let server = OldClickHouse::start(dir.path());
        let proxy = Proxy::before(&server.url());
        Self { server, proxy, runtime: Runtime::new().expect("a runtime"), proofs: Vec::new(), _dir: dir }
    }

    fn store(&self, url: &str) -> Store {
        let address = StoreAddress {
            url: url.to_owned(),
            user: String::new(),
            password: String::new(),
            database: "millstream".to_owned(),
            origin: "the fault suite".to_owned(),
        };
        let spec = millstream::check::<Trial>().expect("sound");
        self.runtime.block_on(Store::connect(&spec, address)).expect("an old server is good enough")
    }

    /// An insert whose body stops half-way, in a thread of its own, once the server executes it.
    fn stalled_insert(&self, query_id: &'static str) -> std::thread::JoinHandle<Result<(), StoreFault>> {
        let store = self.store(&format!("http://{}", self.proxy.address));
        self.proxy.set(Mode::Slow(SLOW));
        let handle = self.runtime.handle().clone();
        let inserting = std::thread::spawn(move || handle.block_on(store.insert_rows(query_id, &bodies())));
        wait_until("an insert under way", SOON, || match self.server.number(INSERTS) {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
        self.proxy.set(Mode::Stall);
        inserting
    }

    fn rows(&self) -> u64 {
        self.server.number("SELECT count() FROM millstream.trial_rows")
    }

    /// Ids of the batch that are stored, as a sink asks for them.
    fn asked(&self, store: &Store) -> u64 {
        let batch = [Portion::all(0, IDS)];
        self.runtime.block_on(store.ask(RUN, PASS, batch.iter())).expect("an answer")[0]
    }

    /// The batch has landed: readers may see it, and the checker does.
    fn finish(self, last_fault: Instant) -> Report {
        let store = self.store(&self.server.url());
        assert_eq!(self.asked(&store), u64::from(IDS), "ids of the batch");
        let recovered = last_fault.elapsed();
        self.server.ask(&format!(
            "INSERT INTO millstream.trial_passes (run, pass, batches, ids, rows) VALUES ('{RUN}', {PASS}, 1, {IDS}, {IDS})"
        ));
        let submitted = Submitted { run: RUN.to_owned(), last: IDS.into() };
        let found = Checker::new(&self.server.url()).look(&submitted);
        Report { raw_seen: found.raw_doubled, found, recovered, proofs: self.proofs }
    }
}

/// An insert that nobody can finish is killed: when that returns, it is over, and nothing of it is there.
pub fn kill_query_sync(_: Plan) -> Report {
    let mut wire = Wire::new();
    let inserting = wire.stalled_insert("stalled");
    let direct = wire.store(&wire.server.url());
    let begun = Instant::now();
    // Whoever lost touch with it: the connection goes while the server waits for the rest.
    wire.proxy.set(Mode::Refuse);
    wire.runtime.block_on(direct.kill("stalled")).expect("it is killed");
    let took = begun.elapsed().as_secs_f64();
    assert_eq!(wire.server.number(INSERTS), 0, "an insert runs after KILL QUERY SYNC");
    let (outcome, rows) = (inserting.join().expect("it ended"), wire.rows());
    assert!(matches!(outcome, Err(StoreFault::Unclear(_) | StoreFault::Exception { .. })), "{outcome:?}");
    let last_fault = Instant::now();
    wire.proofs
        .push(format!("an insert cut in its body and killed, over after {took:.1} s; {rows} rows of it"));
    assert_eq!((rows, wire.asked(&direct)), (0, 0), "rows of half an insert");
    wire.runtime.block_on(direct.insert_rows("again", &bodies())).expect("it is inserted");
    wire.finish(last_fault)
}

/// While an insert runs, another of its name is refused as one whose outcome is unknown.
pub fn query_id_in_use(_: Plan) -> Report {
    let mut wire = Wire::new();
    let inserting = wire.stalled_insert("same");
    let direct = wire.store(&wire.server.url());
    let refused = wire.runtime.block_on(direct.insert_rows("same", &bodies())).expect_err("it runs already");
    assert!(matches!(refused, StoreFault::Exception { code: 216, .. }), "{refused}");
    assert_eq!(refused.class(), millstream_engine::error::Class::Unclear);
    let last_fault = Instant::now();
    wire.proofs.push(format!("an insert under way, and one of the same query_id refused: {refused}"));
    assert_eq!(wire.rows(), 0, "rows of half an insert");
    wire.proxy.set(Mode::Pass);
    inserting.join().expect("it ended").expect("it is inserted");
    wire.finish(last_fault)
}

/// The batch as a worker encodes it: in frames of a few thousand rows.
fn bodies() -> Vec<Bytes> {
    const FRAME: usize = 4000;
    let ids: Vec<u64> = (1..=u64::from(IDS)).collect();
    let frames = ids.chunks(FRAME).map(|ids| {
        let (mut raw, mut body) = (Vec::new(), Vec::new());
        ids.iter().for_each(|id| write_row(*id, &mut raw));
        frame::compress(&raw, &mut body);
        Bytes::from(body)
    });
    frames.collect()
}

fn write_row(id: u64, out: &mut Vec<u8>) {
    const OK: u8 = 1;
    rowbinary::write_string(out, RUN);
    for number in [PASS, 0, IDS] {
        out.extend(number.to_le_bytes());
    }
    out.extend(id.to_le_bytes());
    out.push(OK);
    rowbinary::write_string(out, "");
    out.extend((id * id).to_le_bytes());
}
