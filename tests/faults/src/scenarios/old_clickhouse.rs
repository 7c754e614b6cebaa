//! Row 11 again, on a real ClickHouse server in a process of its own: Debian's 18.16.1.
//!
//! The product does not talk to so old a server, so these scenarios show what the server does with an insert that cannot be
//! finished, and with one that runs already: the sink rests on both. Table, rows, inserts and questions are the suite's own;
//! the statement that ends an insert is the product's.

use std::thread::JoinHandle;
use std::time::Instant;

use millstream::schema::OWN_COLUMNS;
use millstream::{frame, native};
use millstream_engine::clickhouse::sql;
use millstream_engine::error::{Class, StoreFault};
use tests::proxy::{Mode, Proxy};
use tests::{SOON, wait_until};

use crate::Plan;
use crate::checker::{Checker, Submitted};
use crate::old_clickhouse::{OldClickHouse, post};
use crate::scene::Report;

const INSERTS: &str = "SELECT count() FROM system.processes WHERE query LIKE 'INSERT INTO %trial_rows%'";
/// ClickHouse's code for a `query_id` that is in use.
const IN_USE: u32 = 216;
/// ClickHouse's code for a query that is past the stages in which it can be killed.
const CANNOT_KILL: u32 = 380;

/// The wire alone: a server, and a proxy before it.
struct Wire {
    server: OldClickHouse,
    proxy: Proxy,
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
        Self { server, proxy, proofs: Vec::new(), _dir: dir }
    }

    /// An insert past the proxy; what the server says, or why it says nothing.
    fn insert(&self, query_id: &str, body: &[u8]) -> Result<String, String> {
        insert(self.server.url().trim_start_matches("http://"), query_id, body)
    }

    /// An insert whose body stops half-way, in a thread of its own, once the server executes it.
    fn stalled_insert(&self, query_id: &'static str) -> JoinHandle<Result<String, String>> {
        self.proxy.set(Mode::Slow(SLOW));
        let address = self.proxy.address.clone();
        let inserting = std::thread::spawn(move || insert(&address, query_id, &body()));
        wait_until("an insert under way", SOON, || match self.server.number(INSERTS) {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        });
        self.proxy.set(Mode::Stall);
        inserting
    }

    /// Ends an insert with the product's statements. A server that cannot kill it any more says so at once; then it is waited
    /// for, as a sink does.
    fn end(&self, query_id: &str) {
        if let Err(refused) = self.server.try_ask(&sql::kill(query_id)) {
            assert!(refused.to_string().contains(&format!("Code: {CANNOT_KILL}")), "{refused}");
        }
        wait_until("the end of the insert", SOON, || match self.server.number(&sql::running(query_id)) {
            0 => Ok(()),
            queries => Err(format!("{queries} run")),
        });
    }

    fn rows(&self) -> u64 {
        self.server.number("SELECT count() FROM millstream.trial_rows")
    }

    /// The batch has landed: readers may see it, and the checker does.
    fn finish(self, last_fault: Instant) -> Report {
        let ids =
            "SELECT uniqExact(id) FROM millstream.trial_rows WHERE run = 'wire' AND pass = 1 AND batch = 0";
        assert_eq!(self.server.number(ids), u64::from(IDS), "ids of the batch");
        let recovered = last_fault.elapsed();
        self.server.ask(&format!(
            "INSERT INTO millstream.trial_passes (run, pass, batches, ids, rows) VALUES ('{RUN}', {PASS}, 1, {IDS}, {IDS})"
        ));
        let submitted = Submitted { run: RUN.to_owned(), last: IDS.into() };
        let found = Checker::new(&self.server.url()).look(&submitted);
        Report { raw_seen: found.raw_doubled, found, recovered, proofs: self.proofs }
    }
}

/// An insert that no client can finish is killed: when that returns, it is over, and nothing of it is there.
pub fn kill_query_sync(_: Plan) -> Report {
    let mut wire = Wire::new();
    let inserting = wire.stalled_insert("stalled");
    let begun = Instant::now();
    // The client has lost touch with it: the connection goes while the server waits for the rest.
    wire.proxy.set(Mode::Refuse);
    wire.end("stalled");
    let took = begun.elapsed().as_secs_f64();
    assert_eq!(wire.server.number(INSERTS), 0, "an insert runs after it was ended");
    let (outcome, rows) = (inserting.join().expect("it ended"), wire.rows());
    assert!(outcome.is_err(), "{outcome:?}");
    let last_fault = Instant::now();
    wire.proofs
        .push(format!("an insert cut in its body and killed, over after {took:.1} s; {rows} rows of it"));
    assert_eq!(rows, 0, "rows of half an insert");
    wire.insert("again", &body()).expect("it is inserted");
    wire.finish(last_fault)
}

/// While an insert runs, another of its name is refused, which the product takes for one whose outcome is unknown.
pub fn query_id_in_use(_: Plan) -> Report {
    let mut wire = Wire::new();
    let inserting = wire.stalled_insert("same");
    // Without a body: the server refuses the query before it reads one.
    let refused = wire.insert("same", &[]).expect_err("it runs already");
    assert!(refused.contains(&format!("Code: {IN_USE}")), "{refused}");
    let fault = StoreFault::Exception { code: IN_USE, text: refused };
    assert_eq!(fault.class(), Class::Unclear);
    let last_fault = Instant::now();
    wire.proofs.push(format!("an insert under way, and one of the same query_id refused: {fault}"));
    assert_eq!(wire.rows(), 0, "rows of half an insert");
    wire.proxy.set(Mode::Pass);
    inserting.join().expect("it ended").expect("it is inserted");
    wire.finish(last_fault)
}

/// Sends an insert of this body, in compressed frames, as a sink does.
fn insert(address: &str, query_id: &str, body: &[u8]) -> Result<String, String> {
    let own = OWN_COLUMNS.map(|(name, _)| name).join(",");
    let query = format!("INSERT+INTO+millstream.trial_rows+({own},squared)+FORMAT+Native");
    let path = format!("/?query={query}&query_id={query_id}&decompress=1");
    post(address, &path, body).map_err(|error| error.to_string())
}

/// The batch as one block in frames, with the types that the table of this server has.
fn body() -> Vec<u8> {
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
    let mut body = Vec::new();
    raw.chunks(FRAME).for_each(|chunk| frame::compress(chunk, &mut body));
    body
}
