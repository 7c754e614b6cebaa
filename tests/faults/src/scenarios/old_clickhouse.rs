//! Row 11 again, on a real ClickHouse server in a process of its own: Debian's 18.16.1.
//!
//! It is too old for the product's tables and questions, so these scenarios are of the wire alone: what [`Store`] does with
//! an insert that cannot be finished, and with one that runs already. The table and the rows are the suite's own.

use std::time::Instant;

use bytes::Bytes;
use millstream::names::PassId;
use millstream::schema::{OWN_COLUMNS, Schema};
use millstream::{frame, native};
use millstream_engine::error::StoreFault;
use millstream_engine::model::rows::Portion;
use millstream_engine::{Environment, Store, StoreAddress};
use tests::proxy::{Mode, Proxy};
use tests::{SOON, Trial, wait_until};
use tokio::runtime::Runtime;

use crate::Plan;
use crate::checker::{Checker, Submitted};
use crate::old_clickhouse::OldClickHouse;
use crate::scene::Report;

const INSERTS: &str = "SELECT count() FROM system.processes WHERE query LIKE 'INSERT INTO %trial_rows%'";

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

fn pass() -> PassId {
    PassId { run: RUN.parse().expect("legal"), pass: PASS }
}
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
            environment: Environment::plain("millstream"),
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
        let inserting = std::thread::spawn(move || {
            handle.block_on(store.insert_rows(query_id, &schema(), false, &bodies()))
        });
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
        self.runtime.block_on(store.ask(&pass(), batch.iter())).expect("an answer")[0]
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
    wire.runtime.block_on(direct.insert_rows("again", &schema(), false, &bodies())).expect("it is inserted");
    wire.finish(last_fault)
}

/// While an insert runs, another of its name is refused as one whose outcome is unknown.
pub fn query_id_in_use(_: Plan) -> Report {
    let mut wire = Wire::new();
    let inserting = wire.stalled_insert("same");
    let direct = wire.store(&wire.server.url());
    let refused = wire
        .runtime
        .block_on(direct.insert_rows("same", &schema(), false, &bodies()))
        .expect_err("it runs already");
    assert!(matches!(refused, StoreFault::Exception { code: 216, .. }), "{refused}");
    assert_eq!(refused.class(), millstream_engine::error::Class::Unclear);
    let last_fault = Instant::now();
    wire.proofs.push(format!("an insert under way, and one of the same query_id refused: {refused}"));
    assert_eq!(wire.rows(), 0, "rows of half an insert");
    wire.proxy.set(Mode::Pass);
    inserting.join().expect("it ended").expect("it is inserted");
    wire.finish(last_fault)
}

/// The columns of pipeline `trial`.
fn schema() -> Schema {
    Schema::parse(&[("squared", "UInt64")]).expect("sound")
}

/// The batch as one block in frames, with the types that the table of this server has.
fn bodies() -> Vec<Bytes> {
    const FRAME: usize = 1 << 16;
    let (ids, count) = (1..=u64::from(IDS), IDS as usize);
    let numbers =
        |numbers: &mut dyn Iterator<Item = u64>| numbers.flat_map(u64::to_le_bytes).collect::<Vec<u8>>();
    let mut raw = Vec::new();
    native::begin_block(&mut raw, OWN_COLUMNS.len() + 1, count);
    for (name, kind) in OWN_COLUMNS {
        match name {
            "run" => native::texts(&mut raw, name, (0..count).map(|_| RUN)),
            "pass" => native::repeated(&mut raw, name, kind, &PASS.to_le_bytes(), count),
            "batch" => native::repeated(&mut raw, name, kind, &0u32.to_le_bytes(), count),
            "batch_ids" => native::repeated(&mut raw, name, kind, &IDS.to_le_bytes(), count),
            "id" => native::fixed(&mut raw, name, "UInt64", &numbers(&mut ids.clone())),
            "status" => native::repeated(&mut raw, name, kind, &[1], count),
            "batch_digest" | "schema" | "computed_at" => {
                native::repeated(&mut raw, name, "UInt64", &0u64.to_le_bytes(), count)
            }
            _ => native::texts(&mut raw, name, (0..count).map(|_| "")),
        }
    }
    native::fixed(&mut raw, "squared", "UInt64", &numbers(&mut ids.map(|id| id * id)));
    let frames = raw.chunks(FRAME).map(|chunk| {
        let mut body = Vec::new();
        frame::compress(chunk, &mut body);
        Bytes::from(body)
    });
    frames.collect()
}
