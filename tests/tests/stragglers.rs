//! One id of a batch lasts: rows that are done do not wait for it, and a worker that comes later computes what is left.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use millstream::names::PassId;
use millstream_engine::compute::{BatchKey, Function, Maker, Pool};
use millstream_engine::work::rows_message::whole_message;
use serde_json::Value;
use tests::guest::{GO, Guest, LASTING, TIMES, VARIABLE};
use tests::nats::Nats;
use tests::{Host, Process, SOON, Up, wait_until};

const IDS: u64 = 200;
const WAIT: &str = "rows_wait = '1s'";

/// A run of one batch, one id of which lasts until it is told to end.
struct Place {
    // Dropped before the directory that its log is in.
    sink: Option<Process>,
    up: Up,
    host: Host,
}

impl Place {
    /// With this under `[work]`.
    fn new(doing: &str, limits: &str) -> Self {
        let mut host = Host::new(env!("CARGO_BIN_EXE_guest"));
        host.env.push((VARIABLE.to_owned(), doing.to_owned()));
        host.env.push(("MILLSTREAM_LOG".to_owned(), "info,millstream_engine=debug".to_owned()));
        fs::write(host.path().join("millstream.toml"), format!("[work]\n{limits}\n")).expect("a file");
        let up = host.up();
        let sink = Some(host.start("sink", &["sink"]));
        Self { sink, up, host }
    }

    fn publish(&self) {
        let ids = format!("1..={IDS}");
        self.host.call(&["produce", "--ids", &ids, "--run", "a", "--batch", &IDS.to_string()]).expect(0);
    }

    fn work(&self, name: &str) -> Process {
        self.host.start(name, &["work", "--threads", "2"])
    }

    /// Waits until all rows but one are stored, and fails if that one is, too.
    fn wait_all_but_one(&self, log: &str) {
        let query = format!(
            "SELECT uniqExact(id), countIf(id = {LASTING}), count() FROM millstream.guest_rows WHERE run = 'a' FORMAT TSV"
        );
        let wanted = format!("{0}\t0\t{0}\n", IDS - 1);
        wait_until("all rows but one", SOON, || match self.up.ask(&query) {
            found if found == wanted => Ok(()),
            found => Err(format!("{found}{}", self.host.log(log))),
        });
        let status = self.host.status("a");
        assert_eq!((&status["state"], &status["done"]), (&"running".into(), &(IDS - 1).into()), "{status}");
    }

    /// Lets the id end, and waits for a seal that is right in all rows.
    fn end(&self) {
        fs::write(self.host.path().join(GO), "").expect("a file");
        self.host.wait_sealed("a", SOON);
        let report = self.host.call(&["verify", "a", "--values", "--json"]).expect(0).json();
        let [rows, doubled, wrong] = ["rows", "raw_duplicates", "values_at_fault"].map(|name| &report[name]);
        assert_eq!((rows, doubled, wrong), (&Value::from(IDS), &0.into(), &0.into()), "{report}");
        assert_eq!(self.up.number("SELECT count() FROM millstream.guest"), IDS);
    }

    /// How often each id was computed.
    fn times(&self) -> BTreeMap<u64, usize> {
        let text = fs::read_to_string(self.host.path().join(TIMES)).unwrap_or_default();
        let mut times = BTreeMap::new();
        for id in text.lines().filter_map(|line| line.parse().ok()) {
            *times.entry(id).or_default() += 1;
        }
        times
    }

    fn assert_each_once(&self) {
        let times = self.times();
        assert!(times.len() == IDS as usize && times.values().all(|count| *count == 1), "{times:?}");
    }
}

fn rows_do_not_wait(limits: &str, rate: Option<&str>) {
    let place = Place::new("lasts", &format!("{WAIT}\n{limits}"));
    place.publish();
    if let Some(rate) = rate {
        place.host.call(&["set", "a", "--rate", rate]).expect(0);
    }
    let _work = place.work("work");
    place.wait_all_but_one("work");
    place.end();
    place.assert_each_once();
}

#[test]
fn rows_do_not_wait_for_an_id_that_lasts() {
    rows_do_not_wait("", None);
}

#[test]
fn rows_do_not_wait_for_an_id_that_lasts_in_a_process_of_its_own() {
    rows_do_not_wait("isolate = true", None);
}

#[test]
fn rows_of_a_limited_run_do_not_wait_for_an_id_that_lasts() {
    rows_do_not_wait("", Some("100"));
}

/// The id asks for another attempt until it is told not to.
#[test]
fn rows_do_not_wait_for_an_id_that_is_tried_again() {
    let place = Place::new("asks", &format!("{WAIT}\nretry_for = '10m'"));
    place.publish();
    let _work = place.work("work");
    place.wait_all_but_one("work");
    place.end();
    let mut times = place.times();
    assert!(times.remove(&LASTING) > Some(1), "it was tried once");
    assert!(times.len() == IDS as usize - 1 && times.values().all(|count| *count == 1), "{times:?}");
}

fn a_restart_computes_what_is_left(limits: &str) {
    let place = Place::new("lasts", &format!("{WAIT}\n{limits}"));
    place.publish();
    let mut first = place.work("first");
    place.wait_all_but_one("first");
    first.kill();
    let _second = place.work("second");
    // Its batch comes again a minute after the first worker's last sign.
    wait_until("the id begun a second time", SOON, || match place.times().get(&LASTING) {
        Some(2) => Ok(()),
        times => Err(format!("{times:?} {}", place.host.log("second"))),
    });
    place.end();
    let mut times = place.times();
    times.remove(&LASTING);
    assert!(times.len() == IDS as usize - 1 && times.values().all(|count| *count == 1), "{times:?}");
}

#[test]
fn a_restart_computes_only_what_is_left() {
    a_restart_computes_what_is_left("");
}

#[test]
fn a_restart_computes_only_what_is_left_in_a_process_of_its_own() {
    a_restart_computes_what_is_left("isolate = true");
}

/// The second worker begins while the first is paused, and both store the rest: the first of them wins.
#[test]
fn a_worker_that_wakes_doubles_nothing() {
    let place = Place::new("lasts", WAIT);
    place.publish();
    let first = place.work("first");
    place.wait_all_but_one("first");
    first.signal("STOP");
    let _second = place.work("second");
    wait_until("the id begun a second time", SOON, || match place.times().get(&LASTING) {
        Some(2) => Ok(()),
        times => Err(format!("{times:?} {}", place.host.log("second"))),
    });
    first.signal("CONT");
    place.end();
    let mut times = place.times();
    times.remove(&LASTING);
    assert!(times.len() == IDS as usize - 1 && times.values().all(|count| *count == 1), "{times:?}");
}

/// SIGTERM, and the deadline passes: what is done is stored before the batch is handed back.
#[test]
fn a_worker_that_is_stopped_leaves_what_is_done() {
    let place = Place::new("lasts", "drain = '10s'\nrows_wait = '1h'");
    place.publish();
    let mut first = place.work("first");
    wait_until("all ids begun", SOON, || match place.times().len() as u64 {
        IDS => Ok(()),
        ids => Err(format!("{ids} {}", place.host.log("first"))),
    });
    first.signal("TERM");
    first.wait(SOON);
    let _second = place.work("second");
    place.wait_all_but_one("second");
    place.end();
    let mut times = place.times();
    assert_eq!(times.remove(&LASTING), Some(2));
    assert!(times.len() == IDS as usize - 1 && times.values().all(|count| *count == 1), "{times:?}");
}

/// The worker that drew the batch first has stored all of its rows, and did not say that it is done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_stored_is_not_computed_again() {
    let mut place = Place::new("lasts", WAIT);
    place.publish();
    // It would seal the run before the worker has drawn the batch.
    place.sink = None;
    let mut nats = Nats::connect(&place.up.nats);
    nats.set_ack_wait("guest_ids", "work-a-1", Duration::from_secs(5));
    nats.request("$JS.API.CONSUMER.MSG.NEXT.guest_ids.work-a-1", "", b"1");
    // In this process, without the variable that says what to do.
    let function = Function::of(Arc::new(Guest)).expect("sound");
    let pool = Pool::start(function.clone(), 2).expect("threads");
    let computed = pool.compute((1..=IDS).collect(), true).await;
    let key =
        BatchKey { pass: PassId { run: "a".parse().expect("legal"), pass: 1 }, batch: 0, ids: IDS as u32 };
    let maker = Arc::new(Maker { host: "test".into(), build: "1".into() });
    nats.request("guest.rows.a.1.0", "", &whole_message(&key, computed, &function.spec().schema, &maker));
    let _work = place.work("work");
    place.host.wait_log("work", "rows of the batch are stored already");
    place.sink = Some(place.host.start("sink", &["sink"]));
    place.end();
    assert_eq!(place.times(), BTreeMap::new());
}

/// Rows of 1 MB each, as much as a message may have, in a batch that was made without a look at them: those that are done are
/// stored once they are more than one message could ever carry, long before their time is up.
#[test]
fn wide_rows_are_not_kept_until_their_batch_is_done() {
    let mut place = Place::new("lasts", "rows_wait = '1h'");
    place.host.env.push(("GUEST_BYTES".to_owned(), "1000000".to_owned()));
    place.publish();
    let _work = place.work("work");
    wait_until("the first rows", SOON, || {
        match place.up.number("SELECT count() FROM millstream.guest_rows") {
            rows if rows >= 100 => Ok(()),
            rows => Err(format!("{rows} {}", place.host.log("work"))),
        }
    });
    assert_eq!(place.host.status("a")["state"], "running");
    place.end();
    place.assert_each_once();
}

/// Rows that were stored in several messages, as an id lasted, come back from them; those of a second pass that took over others
/// as well.
#[test]
fn early_rows_are_rebuilt_from_their_messages() {
    let place = Place::new("lasts", &format!("{WAIT}\n[streams]\nkeep_rows = '1d'"));
    let stored = || {
        let rows = place.up.ask(
            "SELECT pass, count(), uniqExact(id), sum(sipHash64(id, batch, batch_ids, batch_digest)) \
             FROM millstream.guest_rows GROUP BY pass ORDER BY pass",
        );
        let passes = place.up.ask("SELECT * FROM millstream.guest_passes FINAL ORDER BY pass");
        rows + &passes + &place.up.ask("SELECT count(), sum(id) FROM millstream.guest")
    };
    let lose = |table: &str, rows: &str| {
        place.up.ask(&format!(
            "ALTER TABLE millstream.guest_{table} DELETE WHERE {rows} SETTINGS mutations_sync = 2"
        ))
    };
    let rebuilt = |inserted: u64| {
        let rebuilt = place.host.call(&["rebuild", "a", "--json"]).expect(0).json();
        assert_eq!((&rebuilt["rows"], &rebuilt["inserted"]), (&IDS.into(), &inserted.into()), "{rebuilt}");
    };
    place.publish();
    let _work = place.work("work");
    place.wait_all_but_one("work");
    place.end();
    let messages = Nats::connect(&place.up.nats).messages("guest_rows");
    assert!(messages >= 4, "a cut and what lies before, at, and behind the id: {messages}");
    let before = stored();
    for (rows, lost) in
        [("1".to_owned(), IDS), (format!("id = {LASTING}"), 1), ("id % 3 = 0".to_owned(), IDS / 3)]
    {
        lose("rows", &rows);
        rebuilt(lost);
        assert_eq!(stored(), before, "{rows}");
    }

    fs::remove_file(place.host.path().join(GO)).expect("it is there");
    place.host.call(&["replay", "a", "--where", "id > 50"]).expect(0);
    let second =
        format!("SELECT countIf(id != {LASTING}), count() FROM millstream.guest_rows WHERE pass = 2");
    wait_until("all computed rows but one", SOON, || match place.up.ask(&second).as_str() {
        "149\t149\n" => Ok(()),
        found => Err(found.to_owned()),
    });
    place.end();
    let before = stored();
    for table in ["rows", "passes", "runs"] {
        lose(table, "1");
    }
    rebuilt(2 * IDS);
    let report = place.host.call(&["verify", "a", "--values", "--json"]).expect(0).json();
    assert_eq!((&report["pass"], &report["values_at_fault"]), (&2.into(), &0.into()), "{report}");
    assert_eq!(stored(), before);
}
