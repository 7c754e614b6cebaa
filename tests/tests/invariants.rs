//! The ten invariants of the design, each by its name, on a real nats-server and a real ClickHouse.
//!
//! Where raw duplicates are looked for, background merges are held, which would hide them, and the engine's sink runs
//! without its sealer, which would heal them.

mod wire;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millstream::envelope::{Rows, decode_rows};
use millstream::names::RunName;
use millstream::schema::Schema;
use millstream::{Id, Limits, Outcome, Pipeline};
use millstream_engine::compute::{BatchKey, Function, Maker, Place, Pool};
use millstream_engine::model::rows::MAX_INSERT_ROWS;
use millstream_engine::nats::broker::{Writing, Written};
use millstream_engine::nats::bucket::Records;
use millstream_engine::seal::seal_passes;
use millstream_engine::sink::{SinkPlan, SinkState, sink};
use millstream_engine::work::{WorkPlan, rows_message, work};
use millstream_engine::{Broker, Metrics, Session, Stop, Store, StreamLimits};
use serde_json::{Value, json};
use tests::nats::{Consumer, Nats};
use tests::stage::{self, Service};
use tests::{Host, SOON, Squared, Trial, Up, wait_until};

use wire::{Fate, Proxy};

/// Pipeline `trial` with rows that say who computed them.
struct Signed {
    by: u64,
    /// Called for every id, before its row is there.
    computing: Box<dyn Fn(u64) + Send + Sync>,
}

impl Signed {
    fn new(by: u64, computing: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { by, computing: Box::new(computing) }
    }
}

impl Pipeline for Signed {
    const NAME: &'static str = Trial::NAME;
    const COLUMNS: &'static [(&'static str, &'static str)] = Trial::COLUMNS;
    type Id = u64;
    type Row = Squared;

    fn compute(&self, id: &u64) -> Outcome<Squared> {
        (self.computing)(*id);
        Ok(Squared { squared: self.by })
    }
}

/// Servers of one test, and the engine's connections to them.
struct Scene {
    host: Host,
    up: Up,
    nats: Nats,
    proxy: Proxy,
    broker: Broker,
    /// Goes through the proxy.
    store: Store,
    records: Records,
}

impl Scene {
    async fn new() -> Self {
        let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
        let proxy = Proxy::before(&up.clickhouse);
        let broker = stage::broker(&up.nats, Trial::NAME).await;
        broker.setup(&StreamLimits::default()).await.expect("streams");
        let store = stage::store::<Trial>(&proxy.url).await;
        store.setup().await.expect("tables");
        let records = broker.records().await.expect("bucket");
        let nats = Nats::connect(&up.nats);
        Self { host, up, nats, proxy, broker, store, records }
    }

    /// No merges but those that are asked for, so that what was inserted stays to be seen.
    fn hold_merges(&self) {
        hold_merges(&self.up);
    }

    fn raw_rows(&self) -> u64 {
        self.up.number("SELECT count() FROM millstream.trial_rows")
    }

    /// Computes batches of `each` ids and stores them in the rows stream, as a worker does; the rows of each.
    async fn stage(&self, run: &str, batches: Range<u32>, each: u32) -> Vec<Vec<u8>> {
        let mut staged = Vec::new();
        for batch in batches {
            let (message, frames) = message(run, 1, batch, each, 0).await;
            let subject = self.broker.names().rows_subject(&name(run).pass(1), batch);
            assert_eq!(self.write(&subject, message).await, Written::First);
            staged.push(frames);
        }
        staged
    }

    /// What the one way of writing to a stream came to; left alone it never gives up.
    async fn write(&self, subject: &str, bytes: Vec<u8>) -> Written {
        let (metrics, stop) = (Metrics::default(), Stop::new());
        let writing = Writing { trace: None, metrics: &metrics, stop: &stop };
        let write = self.broker.write_once(subject, bytes.into(), writing);
        tokio::time::timeout(SOON, write).await.expect("an answer").expect("written")
    }

    async fn insert(&self, query_id: &str, bodies: &[Vec<u8>]) {
        let bodies: Vec<_> = bodies.iter().map(|body| body.clone().into()).collect();
        let schema = Schema::parse(Trial::COLUMNS).expect("sound");
        self.store.insert_rows(query_id, &schema, false, &bodies).await.expect("inserted");
    }

    /// Every message of the sinks' consumer is taken and handed back: its next delivery is not its first.
    fn make_redelivered(&mut self, messages: usize) {
        let taken: Vec<_> = (0..messages)
            .map(|_| {
                wait_until("a message", SOON, || self.nats.pull("trial_rows", "sink").ok_or_else(String::new))
            })
            .collect();
        taken.iter().for_each(|message| self.nats.nak(message));
    }

    fn sinks(&mut self) -> Consumer {
        self.nats.consumer("trial_rows", "sink")
    }

    fn wait_acked(&mut self, up_to: u64) {
        wait_until("all rows acked", SOON, || {
            let sinks = self.sinks();
            if sinks.acked_up_to == up_to && sinks.open == 0 { Ok(()) } else { Err(format!("{sinks:?}")) }
        });
    }

    fn wait_inserts(&self, inserts: usize) {
        wait_until("inserts", SOON, || {
            let found = self.proxy.inserts().len();
            if found >= inserts { Ok(()) } else { Err(format!("{found} of {inserts}")) }
        });
    }

    /// The sink alone: nobody seals.
    fn start_sink(&self, plan: SinkPlan) -> (Service, Metrics) {
        let metrics = Metrics::default();
        let state = Arc::new(SinkState::counted_by(metrics.clone()));
        let (broker, store) = (self.broker.clone(), self.store.clone());
        let service = Service::start(|stop| async move { sink(&broker, &store, plan, state, &stop).await });
        (service, metrics)
    }

    fn start_sealer(&self) -> Service {
        let session =
            Session { broker: self.broker.clone(), records: self.records.clone(), store: self.store.clone() };
        Service::start(|stop| async move { seal_passes::<u64>(session, Arc::default(), &stop).await })
    }

    /// The durable of a run's first pass, with an `ack_wait` other than usual: made before the run, it is left as it is.
    fn make_work_consumer(&mut self, run: &str, ack_wait: Duration) {
        let durable = format!("work-{run}-1");
        let config = json!({
            "durable_name": durable, "filter_subject": format!("trial.ids.{run}.*"), "ack_policy": "explicit",
            "ack_wait": ack_wait.as_nanos() as u64, "max_deliver": -1, "deliver_policy": "all", "replay_policy": "instant",
        });
        let subject = format!("CONSUMER.DURABLE.CREATE.trial_ids.{durable}");
        let answer = self.nats.api(&subject, &json!({ "stream_name": "trial_ids", "config": config }));
        assert!(answer["error"].is_null(), "{answer}");
    }

    async fn is_sealed(&self, run: &str) -> bool {
        let pass = self.records.pass(&name(run).pass(1)).await.expect("a bucket").expect("a pass");
        pass.record.state == millstream_engine::model::record::PassState::Sealed
    }
}

/// A worker host in this process.
fn start_work(broker: &Broker, pipeline: Signed, threads: usize) -> (Service, Metrics) {
    let metrics = Metrics::default();
    let (broker, counted) = (broker.clone(), metrics.clone());
    let function = Function::of(Arc::new(pipeline)).expect("sound");
    let plan = WorkPlan { threads, drain: SOON, place: Place::Here, limits: Limits::DEFAULT };
    let service =
        Service::start(|stop| async move { Box::pin(work(function, &broker, &plan, counted, &stop)).await });
    (service, metrics)
}

fn servers(program: &str) -> (Host, Up) {
    let mut host = Host::new(program);
    host.env.push(("TRIAL_TAME".into(), "1".into()));
    let up = host.up();
    (host, up)
}

fn name(run: &str) -> RunName {
    run.parse().expect("a legal name")
}

fn hold_merges(up: &Up) {
    up.ask("ALTER TABLE millstream.trial_rows MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1");
}

/// Ids `batch * each ..` computed and packed as a worker does: the message, and the rows in it.
async fn message(run: &str, pass: u32, batch: u32, each: u32, by: u64) -> (Vec<u8>, Vec<u8>) {
    let function = Function::of(Arc::new(Signed::new(by, |_| ()))).expect("sound");
    let pool = Pool::start(function.clone(), 2).expect("threads");
    let first = u64::from(batch) * u64::from(each);
    let key = BatchKey { pass: name(run).pass(pass), batch, ids: each };
    let computed = pool.compute((first..first + u64::from(each)).collect(), true).await;
    let maker = Arc::new(Maker { host: "test".into(), build: by.to_string() });
    let message = rows_message::whole_message(&key, computed, &function.spec().schema, &maker);
    let Ok(Rows::Batch(rows)) = decode_rows(&message) else { panic!("no rows") };
    (message.to_vec(), rows.rows.to_vec())
}

async fn frames(run: &str, pass: u32, batch: u32, each: u32, by: u64) -> Vec<u8> {
    message(run, pass, batch, each, by).await.1
}

/// Asks until it is so.
async fn until<F: Future<Output = Result<(), String>>>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> F,
) {
    let limit = Instant::now() + within;
    while let Err(state) = look().await {
        assert!(Instant::now() < limit, "no {what} within {within:?}: {state}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Two writers at once, many times over; then another, with every window of the server's deduplication gone by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_writer_wins() {
    let mut scene = Scene::new().await;
    let subject = |batch| format!("trial.ids.a.{batch}");
    for batch in 0..50 {
        let subject = subject(batch);
        let written =
            tokio::join!(scene.write(&subject, "one".into()), scene.write(&subject, "other".into()));
        let (winner, bytes) = match written {
            (Written::First, Written::Already) => ("one", &b"one"[..]),
            (Written::Already, Written::First) => ("other", &b"other"[..]),
            both => panic!("batch {batch}: {both:?}"),
        };
        let (_, stored) = scene.broker.ids_message(&subject).await.expect("NATS").expect("a message");
        assert_eq!(stored, bytes, "{winner} was told that it is the first");
    }
    assert_eq!(scene.nats.stream("trial_ids")["config"]["duplicate_window"], 1_000_000_000);
    let probe = |nats: &mut Nats| {
        let answer = nats.request("trial.ids.probe.0", "Nats-Msg-Id: probe", b"probe").payload;
        serde_json::from_slice::<Value>(&answer).expect("JSON")
    };
    assert!(probe(&mut scene.nats)["seq"].is_u64());
    wait_until("end of the duplicate window", SOON, || {
        let answer = probe(&mut scene.nats);
        if answer["duplicate"] == true { Err(answer.to_string()) } else { Ok(()) }
    });
    for batch in 0..50 {
        assert_eq!(scene.write(&subject(batch), "late".into()).await, Written::Already);
    }
    assert_eq!(scene.nats.messages("trial_ids"), 51);
}

#[test]
fn first_writer_wins_among_producers() {
    const BATCHES: u64 = 10_000;
    let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
    host.call(&["setup"]).expect(0);
    let mut nats = Nats::connect(&up.nats);
    let words = ["produce", "--ids", "1..=20000", "--run", "a", "--batch", "2", "--json"];
    let mut killed = host.start("produce-1", &words);
    let mut other = host.start("produce-2", &words);
    wait_until("batches published", SOON, || match nats.messages("trial_ids") {
        0..300 => Err("fewer than 300".into()),
        _ => Ok(()),
    });
    killed.kill();
    let published = nats.messages("trial_ids");
    assert!(published < BATCHES, "killed after the end");
    let resumed = host.call(&words).expect(0).json();
    assert!(other.wait(SOON).success(), "{}", host.log("produce-2"));
    let found = resumed["batches_found"].as_u64().expect("a number");
    assert!(found >= published, "{published} were there: {resumed}");
    assert_eq!(found + resumed["batches_written"].as_u64().expect("a number"), BATCHES);
    let state = &nats.stream("trial_ids")["state"];
    // The stream never took a message that it did not keep.
    assert_eq!((&state["messages"], &state["last_seq"]), (&BATCHES.into(), &BATCHES.into()));
    let status = host.status("a");
    assert_eq!((&status["batches"], &status["ids"]), (&BATCHES.into(), &20_000.into()));
}

/// Batches are delivered again after a second and take two, so both hosts compute them, with different results.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_writer_wins_among_workers() {
    let mut scene = Scene::new().await;
    scene.make_work_consumer("a", Duration::from_secs(1));
    scene.host.call(&["produce", "--ids", "0..6", "--run", "a", "--batch", "1"]).expect(0);
    let slow = |by| Signed::new(by, |_| std::thread::sleep(Duration::from_secs(2)));
    let (one, first) = start_work(&scene.broker, slow(1), 2);
    let (two, second) = start_work(&scene.broker, slow(2), 2);
    wait_until("rows of every batch", SOON, || match scene.nats.messages("trial_rows") {
        6 => Ok(()),
        found => Err(format!("{found} of 6")),
    });
    one.end().await;
    two.end().await;
    let computed = first.work_counts().batches + second.work_counts().batches;
    assert!(computed > 6, "no batch was computed twice");
    let state = scene.nats.stream("trial_rows")["state"].clone();
    assert_eq!((&state["messages"], &state["last_seq"]), (&6.into(), &6.into()));
    scene.hold_merges();
    let (sink, _) = scene.start_sink(SinkPlan::default());
    scene.wait_acked(6);
    sink.end().await;
    assert_eq!(scene.raw_rows(), 6);
}

/// A worker that slept through the rest of the run, in which others computed its batch and the pass was sealed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_writer_wins_after_the_seal() {
    let mut scene = Scene::new().await;
    scene.make_work_consumer("a", Duration::from_secs(1));
    scene.host.call(&["produce", "--ids", "0..4", "--run", "a", "--batch", "1"]).expect(0);
    let (asleep, awake) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (sleeping, woken) = (asleep.clone(), awake.clone());
    let (late, late_metrics) = start_work(
        &scene.broker,
        Signed::new(666, move |_| {
            sleeping.fetch_add(1, Ordering::SeqCst);
            while !woken.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }),
        1,
    );
    wait_until("a batch begun", SOON, || match asleep.load(Ordering::SeqCst) {
        0 => Err("none".into()),
        _ => Ok(()),
    });
    let (other, _) = start_work(&scene.broker, Signed::new(1, |_| ()), 2);
    let (sink, _) = scene.start_sink(SinkPlan::default());
    let sealer = scene.start_sealer();
    until("seal", SOON, async || if scene.is_sealed("a").await { Ok(()) } else { Err("running".into()) })
        .await;
    let answer = "SELECT id, squared FROM millstream.trial ORDER BY id FORMAT CSV";
    assert_eq!(scene.up.ask(answer), "0,1\n1,1\n2,1\n3,1\n");
    awake.store(true, Ordering::SeqCst);
    wait_until("the late batch published", SOON, || match late_metrics.work_counts().batches {
        0 => Err("not yet".into()),
        _ => Ok(()),
    });
    late.end().await;
    wait_until("nothing left for sinks", SOON, || {
        let sinks = scene.sinks();
        if sinks.open + sinks.pending == 0 { Ok(()) } else { Err(format!("{sinks:?}")) }
    });
    other.end().await;
    sink.end().await;
    sealer.end().await;
    assert_eq!(
        scene.up.ask(answer),
        "0,1\n1,1\n2,1\n3,1\n",
        "readers saw other results under the same seal before"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ask_before_ack() {
    let mut scene = Scene::new().await;
    scene.hold_merges();
    let staged = scene.stage("a", 0..20, 1000).await;
    scene.insert("earlier", &staged[..10]).await;
    scene.make_redelivered(20);
    let (sink, metrics) = scene.start_sink(SinkPlan::default());
    scene.wait_acked(20);
    sink.end().await;
    assert_eq!(metrics.sink_counts().redelivered, 20);
    assert_eq!(scene.raw_rows(), 20_000);
    let inserted = scene.proxy.inserts()[1..].iter().flat_map(wire::Request::rows).collect::<Vec<_>>();
    let batches: BTreeSet<u32> = inserted.iter().map(|row| row.batch).collect();
    assert_eq!((inserted.len(), batches), (10_000, (10..20).collect()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ask_before_ack_of_a_batch_that_is_stored_in_part() {
    let mut scene = Scene::new().await;
    let staged = scene.stage("a", 0..1, 1000).await;
    scene.insert("half", &staged).await;
    scene.up.ask("ALTER TABLE millstream.trial_rows DELETE WHERE id >= 400 SETTINGS mutations_sync = 2");
    let stored = scene.raw_rows();
    assert!((1..1000).contains(&stored), "{stored}");
    scene.make_redelivered(1);
    scene.proxy.rule(|request| if request.inserts_rows() { Fate::TooManyParts } else { Fate::Pass });
    let (sink, _) = scene.start_sink(SinkPlan::default());
    scene.wait_inserts(4);
    let sinks = scene.sinks();
    assert_eq!(
        (sinks.acked_up_to, sinks.open),
        (0, 1),
        "acked while ClickHouse has {stored} of its 1000 ids"
    );
    scene.proxy.rule(|_| Fate::Pass);
    scene.wait_acked(1);
    sink.end().await;
    assert_eq!(scene.up.number("SELECT uniqExact(id) FROM millstream.trial_rows"), 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ask_before_ack_when_the_reply_is_lost() {
    for fate in [Fate::LoseAnswer, Fate::CutWhenRunning] {
        let mut scene = Scene::new().await;
        scene.hold_merges();
        scene.stage("a", 0..8, 50_000).await;
        scene.proxy.inserts_meet(&[fate]);
        let (sink, metrics) = scene.start_sink(SinkPlan::default());
        scene.wait_acked(8);
        sink.end().await;
        assert_eq!(metrics.sink_counts().failed_inserts, 1);
        assert_eq!(scene.raw_rows(), 400_000, "{fate:?}");
        let seen = scene.proxy.seen();
        let insert = seen.iter().position(wire::Request::inserts_rows).expect("an insert");
        let after: Vec<String> = seen[insert + 1..].iter().map(wire::Request::text).collect();
        let place = |part: &str| after.iter().position(|text| text.contains(part)).unwrap_or(usize::MAX);
        let (kill, ask) = (place("KILL QUERY"), place("_part_index"));
        assert!(kill < ask && ask < usize::MAX, "killed {kill}, asked {ask}: {after:#?}");
        if fate == Fate::LoseAnswer {
            assert_eq!(scene.proxy.inserts().len(), 1, "inserted again what had landed");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ask_before_ack_because_a_200_is_no_proof() {
    let mut scene = Scene::new().await;
    scene.hold_merges();
    scene.stage("a", 0..5, 1000).await;
    scene.proxy.rule(|request| if request.inserts_rows() { Fate::Lie } else { Fate::Pass });
    let (sink, _) = scene.start_sink(SinkPlan::default());
    scene.wait_inserts(4);
    let sinks = scene.sinks();
    assert_eq!((sinks.acked_up_to, sinks.open), (0, 5), "acked, and ClickHouse has nothing");
    assert_eq!(scene.raw_rows(), 0);
    scene.proxy.rule(|_| Fate::Pass);
    scene.wait_acked(5);
    sink.end().await;
    assert_eq!(scene.raw_rows(), 5000);
}

/// Every command of a run's life goes through the proxy.
#[test]
fn no_dedup_tokens() {
    let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
    let proxy = Proxy::before(&up.clickhouse);
    let with = |words: &[&'static str]| {
        [words, &["--nats", &up.nats, "--clickhouse", &proxy.url]].concat().join(" ")
    };
    let call = |words: &[&'static str]| host.call(&with(words).split(' ').collect::<Vec<_>>()).expect(0);
    call(&["produce", "--ids", "1..=5000", "--run", "a", "--batch", "500"]);
    let start = |word: &'static str| host.start(word, &with(&[word]).split(' ').collect::<Vec<_>>());
    let _services = [start("work"), start("sink")];
    host.wait_sealed("a", SOON);
    call(&["verify", "a"]);
    let inserts = proxy.inserts();
    assert!(!inserts.is_empty(), "the sink does not go through the proxy");
    let known =
        up.ask("SELECT name FROM system.settings WHERE name IN ('async_insert', 'insert_deduplicate')");
    assert!(known.contains("async_insert"), "{known}");
    for insert in &inserts {
        for setting in known.lines() {
            assert!(insert.head.contains(&format!("{setting}=0")), "{setting}: {}", insert.head);
        }
    }
    for request in proxy.seen() {
        let text = request.text();
        assert!(!text.contains("insert_deduplication_token"), "{text}");
        // Only an INSERT that brings its data can be made asynchronous by the server's own default.
        let elsewhere = text.contains("INSERT INTO") && !request.inserts_rows();
        assert!(!elsewhere || text.contains(" SELECT "), "{text}");
    }
    let table =
        up.ask("SELECT engine_full FROM system.tables WHERE database = 'millstream' AND name = 'trial_rows'");
    assert!(table.contains("non_replicated_deduplication_window = 0"), "{table}");
}

/// What a token would swallow: the same bytes again, after the first were lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_dedup_tokens_so_the_same_bytes_are_stored_again() {
    let scene = Scene::new().await;
    let body = [frames("a", 1, 0, 1000, 1).await];
    scene.insert("first", &body).await;
    scene.up.ask("TRUNCATE TABLE millstream.trial_rows");
    scene.insert("second", &body).await;
    assert_eq!(scene.raw_rows(), 1000);
    scene.hold_merges();
    scene.insert("third", &body).await;
    assert_eq!(scene.raw_rows(), 2000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_the_bytes() {
    let mut scene = Scene::new().await;
    scene.hold_merges();
    scene.stage("a", 0..10, 10_000).await;
    let fates = [Fate::TooManyParts, Fate::CutBody, Fate::TooManyParts, Fate::CutBody, Fate::LoseAnswer];
    scene.proxy.inserts_meet(&fates);
    let (sink, metrics) = scene.start_sink(SinkPlan::default());
    scene.wait_acked(10);
    sink.end().await;
    assert_eq!(scene.raw_rows(), 100_000);
    let inserts = scene.proxy.inserts();
    assert_eq!((inserts.len(), metrics.sink_counts().failed_inserts), (5, 5));
    assert!(inserts.iter().all(|insert| insert.body == inserts[0].body), "tried again with other bytes");
}

/// Three runs in one stream, of which one is more than an insert may carry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_insert_one_part() {
    let mut scene = Scene::new().await;
    scene.hold_merges();
    for batch in 0..40 {
        scene.stage("a", batch..batch + 1, 30_000).await;
        if batch % 5 == 0 {
            scene.stage("b", batch..batch + 1, 1000).await;
            scene.stage("c", batch..batch + 1, 1000).await;
        }
    }
    // So large that only the bound of an insert ends a group.
    let plan = SinkPlan {
        group_rows: MAX_INSERT_ROWS,
        group_age: SOON,
        held_bytes: 256 << 20,
        ..SinkPlan::default()
    };
    let (sink, _) = scene.start_sink(plan);
    scene.wait_acked(56);
    sink.end().await;
    let mut largest = 0;
    for insert in scene.proxy.inserts() {
        let rows = insert.rows();
        let passes: BTreeSet<(&str, u32)> = rows.iter().map(|row| (row.run.as_str(), row.pass)).collect();
        assert_eq!(passes.len(), 1, "{passes:?} in one insert");
        largest = largest.max(rows.len());
    }
    assert!((600_000..=MAX_INSERT_ROWS as usize).contains(&largest), "the largest insert has {largest} rows");
    assert_eq!(scene.raw_rows(), 1_216_000);
    assert_one_part_each(&scene);
}

/// As many rows as an insert may carry, and as small as one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_insert_one_part_whatever_its_size() {
    let scene = Scene::new().await;
    scene.hold_merges();
    let mut largest = Vec::new();
    for batch in 0..20 {
        largest.push(frames("a", 1, batch, 50_000, 1).await);
    }
    scene.insert("largest", &largest).await;
    scene.insert("smallest", &[frames("a", 2, 0, 1, 1).await]).await;
    let parts = "SELECT rows FROM system.parts WHERE database = 'millstream' AND table = 'trial_rows' AND active \
                 ORDER BY rows";
    assert_eq!(scene.up.ask(parts).split_whitespace().collect::<Vec<_>>(), ["1", "1000000"]);
    assert_one_part_each(&scene);
}

/// Every insert that the proxy saw made one part, and none was merged since.
fn assert_one_part_each(scene: &Scene) {
    let parts = "FROM system.parts WHERE database = 'millstream' AND table = 'trial_rows' AND active";
    let inserts = scene.proxy.inserts().len() as u64;
    assert_eq!(scene.up.number(&format!("SELECT count() {parts}")), inserts);
    let merged = format!("SELECT countIf(min_block_number != max_block_number) {parts}");
    assert_eq!(scene.up.number(&merged), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_insert_one_part_and_many_runs_few_partitions() {
    let scene = Scene::new().await;
    for run in 0..40 {
        scene.insert(&format!("{run}"), &[frames(&format!("run-{run}"), 1, 0, 10, 1).await]).await;
    }
    let partitions = scene.up.number(
        "SELECT uniqExact(partition) FROM system.parts WHERE database = 'millstream' AND table = 'trial_rows' AND active",
    );
    assert!((5..=16).contains(&partitions), "{partitions} partitions for 40 runs");
}

#[test]
fn every_id_yields_one_row() {
    let host = Host::new(env!("CARGO_BIN_EXE_trial"));
    let up = host.up();
    host.call(&["produce", "--ids", "1..=3000", "--run", "a", "--batch", "750"]).expect(0);
    let _services = [host.start("work", &["work"]), host.start("sink", &["sink"])];
    host.wait_sealed("a", SOON);
    assert_eq!(up.ask("SELECT count(), uniqExact(id) FROM millstream.trial_rows"), "3000\t3000\n");
    assert_eq!(
        up.ask(
            "SELECT status, count(), sum(squared) FROM millstream.trial_rows GROUP BY status ORDER BY status"
        ),
        format!(
            "ok\t2991\t{}\ndead\t9\t0\n",
            (1..=3000u64).filter(|id| !is_bad(*id)).map(|id| id * id).sum::<u64>()
        ),
    );
    let dead = up.ask("SELECT id, error FROM millstream.trial_dead ORDER BY id");
    let dead: Vec<(u64, &str)> = dead
        .lines()
        .map(|line| line.split_once('\t').expect("two columns"))
        .map(|(id, error)| (id.parse().expect("a number"), error))
        .collect();
    assert_eq!(
        dead.iter().map(|row| row.0).collect::<Vec<_>>(),
        (1..=3000).filter(|id| is_bad(*id)).collect::<Vec<_>>()
    );
    for (id, error) in dead {
        match id % 1000 {
            901 => assert_eq!(error, "rejected"),
            902 => {
                assert!(
                    error.starts_with("panicked at ") && error.ends_with(&format!(": this id panics: {id}")),
                    "{error}"
                );
            }
            _ => assert_eq!(error, "gave up after every attempt: never ready"),
        }
    }
    assert_eq!(up.number("SELECT count() FROM millstream.trial_rows WHERE status = 'ok' AND error != ''"), 0);
    let report = host.verify("a");
    assert_eq!((&report["rows"], &report["dead"], &report["ids"]), (&3000.into(), &9.into(), &3000.into()));
}

fn is_bad(id: u64) -> bool {
    (901..=903).contains(&(id % 1000))
}

/// What a host holds is at least what was delivered less what was stored: a permit is free only after that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permits_before_pull() {
    // A batch that occupies both cores: one runs, one is ahead. Of batches of one id, two run and two are ahead.
    for (ids, batch, nap_ms, most) in [("0..4000", "10", 20, 2), ("0..800", "1", 100, 4)] {
        let mut scene = Scene::new().await;
        scene.host.call(&["produce", "--ids", ids, "--run", "a", "--batch", batch]).expect(0);
        let slow = || Signed::new(1, move |_| std::thread::sleep(Duration::from_millis(nap_ms)));
        let mut held = || {
            let consumer = scene.nats.consumer("trial_ids", "work-a-1");
            (consumer.delivered.saturating_sub(scene.nats.messages("trial_rows")), consumer)
        };
        let (one, first) = start_work(&scene.broker, slow(), 2);
        let mut peak = 0;
        wait_until("ten batches of one host, with one ahead of each that runs", SOON, || {
            let (now, consumer) = held();
            assert!(now <= most, "one host of two cores holds {now}: {consumer:?}");
            assert!(consumer.pending > 0, "nothing was left to be hoarded: {consumer:?}");
            peak = peak.max(now);
            match first.work_counts().batches {
                10.. if peak == most => Ok(()),
                computed => Err(format!("{computed}, at most {peak} at once")),
            }
        });
        let (two, second) = start_work(&scene.broker, slow(), 2);
        wait_until("a batch of the second host", SOON, || {
            let (now, consumer) = held();
            assert!(now <= 2 * most, "two hosts hold {now}: {consumer:?}");
            if second.work_counts().batches > 0 { Ok(()) } else { Err(format!("{consumer:?}")) }
        });
        one.end().await;
        two.end().await;
    }
}

/// The one thread of the pool is busy for longer than `ack_wait`, and another batch waits for it, while somebody else
/// asks for work all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_outside_the_pool() {
    const ACK_WAIT: Duration = Duration::from_secs(30);
    let mut scene = Scene::new().await;
    scene.make_work_consumer("a", ACK_WAIT);
    scene.host.call(&["produce", "--ids", "0..2", "--run", "a", "--batch", "1"]).expect(0);
    // Whichever comes first.
    let begun = AtomicBool::new(false);
    let busy = Signed::new(1, move |_| {
        if !begun.swap(true, Ordering::SeqCst) {
            std::thread::sleep(ACK_WAIT + ACK_WAIT / 4);
        }
    });
    let (service, metrics) = start_work(&scene.broker, busy, 1);
    wait_until("both batches held", SOON, || match scene.nats.consumer("trial_ids", "work-a-1") {
        Consumer { open: 2, .. } => Ok(()),
        consumer => Err(format!("{consumer:?}")),
    });
    let begun = Instant::now();
    wait_until("both batches computed", SOON, || {
        let stolen = scene.nats.pull("trial_ids", "work-a-1");
        assert!(stolen.is_none(), "a held batch was delivered again after {:?}: {stolen:?}", begun.elapsed());
        match metrics.work_counts().batches {
            computed @ 0..2 => Err(format!("{computed}")),
            _ => Ok(()),
        }
    });
    assert!(begun.elapsed() > ACK_WAIT, "the batch was too short to be delivered again");
    service.end().await;
    let consumer = scene.nats.consumer("trial_ids", "work-a-1");
    assert_eq!((consumer.delivered, consumer.open, consumer.redelivered), (2, 0, 0));
    assert_eq!(metrics.work_counts().redelivered, 0);
    for (stream, durable) in [("trial_ids", "work-a-1"), ("trial_rows", "sink")] {
        let config =
            scene.nats.api(&format!("CONSUMER.INFO.{stream}.{durable}"), &json!({}))["config"].clone();
        assert_eq!(config["max_deliver"], -1, "{config}");
    }
}

/// Everything has landed, some of it twice, and nothing shows until the duplicates are merged away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_sealed_passes_only() {
    let mut scene = Scene::new().await;
    scene.hold_merges();
    scene.host.call(&["produce", "--ids", "0..10000", "--run", "a", "--batch", "1000"]).expect(0);
    let (worker, _) = start_work(&scene.broker, Signed::new(1, |_| ()), 2);
    let (sink, _) = scene.start_sink(SinkPlan::default());
    scene.wait_acked(10);
    let twice = [frames("a", 1, 3, 1000, 1).await];
    scene.insert("by hand", &twice).await;
    let count =
        |scene: &Scene, table: &str| scene.up.number(&format!("SELECT count() FROM millstream.{table}"));
    assert_eq!(scene.raw_rows(), 11_000);
    assert_eq!((count(&scene, "trial"), count(&scene, "trial_live")), (0, 10_000));
    let report = scene.host.verify("a");
    assert_eq!((&report["raw_duplicates"], &report["sealed"]), (&1000.into(), &false.into()), "{report}");
    scene.proxy.rule(|request| match request.text().contains("OPTIMIZE") {
        true => Fate::TooManyParts,
        false => Fate::Pass,
    });
    let sealer = scene.start_sealer();
    wait_until("attempts to merge", SOON, || match scene.proxy.count("OPTIMIZE") {
        attempts @ 0..2 => Err(format!("{attempts} of 2")),
        _ => Ok(()),
    });
    assert!(!scene.is_sealed("a").await, "sealed with raw duplicates");
    assert_eq!((count(&scene, "trial_passes"), count(&scene, "trial")), (0, 0));
    scene.proxy.rule(|_| Fate::Pass);
    until("seal", SOON, async || if scene.is_sealed("a").await { Ok(()) } else { Err("running".into()) })
        .await;
    for service in [worker, sink, sealer] {
        service.end().await;
    }
    assert_eq!(
        (scene.raw_rows(), count(&scene, "trial"), count(&scene, "trial_live")),
        (10_000, 10_000, 10_000)
    );
    // Rows of a second pass that nobody has sealed.
    scene.insert("second pass", &[frames("a", 2, 0, 1000, 2).await]).await;
    assert_eq!((count(&scene, "trial"), count(&scene, "trial_live")), (10_000, 11_000));
    assert_eq!(scene.up.number("SELECT max(squared) FROM millstream.trial"), 1);
}

/// What a paused sink does when it wakes: the same rows once more, after the seal, dead letters among them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_sealed_passes_only_and_no_row_twice() {
    let mut scene = Scene::new().await;
    scene.host.env.retain(|(name, _)| name != "TRIAL_TAME");
    scene.host.call(&["produce", "--ids", "1..=2000", "--run", "a", "--batch", "1000"]).expect(0);
    let services = [scene.host.start("work", &["work"]), scene.host.start("sink", &["sink"])];
    scene.host.wait_sealed("a", SOON);
    drop(services);
    scene.hold_merges();
    let state = |scene: &Scene| {
        let tables = ["trial", "trial_live", "trial_dead"];
        tables
            .map(|table| scene.up.ask(&format!("SELECT count(), sum(sipHash64(*)) FROM millstream.{table}")))
    };
    let sealed = state(&scene);
    assert!(sealed[0].starts_with("1994\t") && sealed[2].starts_with("6\t"), "{sealed:?}");
    scene.up.ask("INSERT INTO millstream.trial_rows SELECT * FROM millstream.trial_rows WHERE batch = 1");
    assert_eq!(scene.raw_rows(), 3000);
    assert_eq!(state(&scene), sealed);
    let called = scene.host.call(&["verify", "a", "--json"]).expect(1);
    assert_eq!((&called.json()["raw_duplicates"], &called.json()["rows"]), (&1000.into(), &2000.into()));
    let repaired = scene.host.call(&["verify", "a", "--repair", "--json"]).json();
    assert_eq!(repaired["repair"]["duplicates_merged"], 1000, "{repaired}");
    assert_eq!((scene.raw_rows(), state(&scene)), (2000, sealed));
    let report = scene.host.call(&["verify", "a", "--json"]).expect(0).json();
    assert_eq!((&report["raw_duplicates"], &report["sealed"]), (&0.into(), &true.into()), "{report}");
}

/// The whole proof again, without NATS and without any code of ours.
#[test]
fn nats_is_never_the_only_truth() {
    let (host, up) = servers(env!("CARGO_BIN_EXE_trial"));
    host.call(&["produce", "--ids", "7..30007", "--run", "a", "--batch", "1000"]).expect(0);
    let _sink = host.start("sink", &["sink"]);
    // Kept from the moment that all is published: nothing is computed yet.
    let digest = up.number("SELECT sum(sipHash64(number)) FROM numbers(7, 30000)");
    assert_eq!(digest, (7..30_007u64).fold(0u64, |sum, id| sum.wrapping_add(id.sip_hash())));
    let record = "SELECT run, source, batch_ids, batches, ids, digest FROM millstream.trial_runs FINAL";
    wait_until("the run's record in ClickHouse", SOON, || {
        let found = up.ask(record);
        let expected = format!("a\tids 7..=30006\t1000\t30\t30000\t{digest}\n");
        if found == expected { Ok(()) } else { Err(found) }
    });
    let _work = host.start("work", &["work"]);
    host.wait_sealed("a", SOON);
    assert_eq!(
        up.ask("SELECT run, pass, batches, ids, rows, dead, digest, repeated_ids FROM millstream.trial_passes FINAL"),
        format!("a\t1\t30\t30000\t30000\t0\t{digest}\t0\n")
    );
    let proof = "SELECT count(), uniqExact(id), uniqExact(batch), sum(sipHash64(id)) FROM millstream.trial_rows \
                 WHERE (run, pass) = ('a', 1)";
    assert_eq!(up.ask(proof), format!("30000\t30000\t30\t{digest}\n"));
    // Identity is (run, pass, batch): what is stored says nothing of the streams, which hold no rows any more.
    let mut nats = Nats::connect(&up.nats);
    wait_until("rows purged behind the seal", SOON, || match nats.messages("trial_rows") {
        0 => Ok(()),
        left => Err(format!("{left} left")),
    });
    assert_eq!(up.ask("SELECT count() FROM millstream.trial WHERE run = 'a'"), "30000\n");
}
