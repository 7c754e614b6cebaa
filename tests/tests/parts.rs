//! Rows that are more than one message may carry, on a nats-server with its own default limit of 1 MiB: each id's row is
//! stored once, whoever computed it, whoever was killed between two parts.
//!
//! What ClickHouse holds is asked over plain HTTP, and every row is compared with what the function returns.

#[expect(dead_code, reason = "other tests use more of it")]
mod wire;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millstream::names::RunName;
use millstream::{Id, Limits, Pipeline};
use millstream_engine::compute::{Function, Place};
use millstream_engine::model::record::PassState;
use millstream_engine::nats::bucket::Records;
use millstream_engine::produce::input::Input;
use millstream_engine::produce::publish::{Submission, submit};
use millstream_engine::seal::seal_passes;
use millstream_engine::sink::{SinkPlan, sink};
use millstream_engine::work::{WorkPlan, work};
use millstream_engine::{Broker, Metrics, Session, Stop, Store, StreamLimits};
use serde_json::{Value, json};
use tests::nats::Nats;
use tests::stage::{self, Service};
use tests::{Bulky, Host, SOON, Up, ask_clickhouse, signal, wait_until};

use wire::{Fate, Proxy};

/// A batch comes again this soon after the process that held it died.
const ACK_WAIT: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_larger_than_a_message_land_in_parts() {
    let mut scene = Scene::new().await;
    scene.publish::<u64>("a", range(0, 179), 90).await;
    let (worker, metrics) = scene.start_work(&scene.broker, Bulky::<u64>::new(1));
    wait_done(&metrics, 2);
    let subjects = scene.subjects();
    let cuts = subjects.iter().filter(|subject| subject.split('.').count() == 5).count();
    assert_eq!(cuts, 2, "each batch is cut: {subjects:?}");
    assert!(subjects.len() > 2 + 2 * 9, "each batch has 8 MB and more: {subjects:?}");
    let sink = scene.start_sink();
    let sealer = scene.start_sealer::<u64>().await;
    scene.wait_sealed("a").await;
    scene.assert_rows::<u64>(0..180, &[1]);
    assert_eq!(
        scene.up.ask("SELECT id, error FROM millstream.bulky_dead ORDER BY id FORMAT CSV"),
        [77, 177].map(dead_letter).concat()
    );
    assert_eq!(metrics.work_counts().dead, 2);
    wait_until("rows removed behind the seal", SOON, || match scene.nats.messages("bulky_rows") {
        0 => Ok(()),
        found => Err(format!("{found} messages")),
    });
    end([worker, sink, sealer]).await;
}

fn dead_letter(id: u64) -> String {
    // The pipeline's own columns: who computed it, where the noise ends, the noise.
    let size = 8 + 8 + (9 << 20);
    format!(
        "{id},\"row of {size} bytes is larger than a message may be (1048576 bytes): return less for one id, or raise \
         max_payload of nats-server\"\n"
    )
}

/// Ids whose order and whose quotes are easy to get wrong, and an insert whose answer is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_string_ids_are_asked_about_by_their_first_and_last() {
    let mut scene = Scene::new().await;
    let odd = ["'", "\\", "\"", "ü", "\u{10FFFF}", "%27", "x OR 1=1", "\t", "`", "Z", "a", "\u{FFFD}"];
    let ids: Vec<String> =
        (0..72).map(|number| format!("{}{number}", odd[number % odd.len()].repeat(1 + number % 3))).collect();
    let path = scene.host.path().join("ids.txt");
    fs::write(&path, ids.join("\n")).expect("a file");
    scene.publish::<String>("a", Input::lines(fs::File::open(path).expect("it is there"), "ids"), 72).await;
    let (worker, metrics) = scene.start_work(&scene.broker, Bulky::<String>::new(1));
    wait_done(&metrics, 1);
    scene.proxy.inserts_meet(&[Fate::LoseAnswer]);
    let sink = scene.start_sink_of::<String>(SinkPlan::default());
    // A sealer tells the sink to wait no longer, and it must have all parts by then.
    wait_until("an insert", SOON, || match scene.proxy.inserts().len() {
        0 => Err("none".to_owned()),
        _ => Ok(()),
    });
    let sealer = scene.start_sealer::<String>().await;
    scene.wait_sealed("a").await;
    scene.assert_rows::<String>(ids, &[1]);
    assert_eq!(scene.proxy.inserts().len(), 1, "inserted again what had landed");
    assert!(scene.proxy.count("BETWEEN") > 0, "no part was asked about");
    end([worker, sink, sealer]).await;
}

/// The first worker dies in the middle of its parts; the second finds the first's cut, and returns other rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_between_two_parts_and_another_that_returns_other_rows() {
    let mut scene = Scene::new().await;
    scene.publish::<u64>("a", range(100, 159), 60).await;
    let wall = Wall::before(&scene.nats_url, 3 << 20);
    let behind = stage::broker(&wall.url, Bulky::<u64>::NAME).await;
    let (dying, _) = scene.start_work(&behind, Bulky::<u64>::new(1));
    wait_until("the first worker cut off", SOON, || match wall.fallen() {
        true => Ok(()),
        false => Err(format!("{} bytes", wall.bytes())),
    });
    drop(dying);
    let before = scene.subjects();
    assert!((2..10).contains(&before.len()), "the cut and some parts: {before:?}");
    let (worker, metrics) = scene.start_work(&scene.broker, Bulky::<u64>::new(2));
    wait_done(&metrics, 1);
    let after = scene.subjects();
    assert!(after.len() > before.len() && before.iter().all(|subject| after.contains(subject)), "{after:?}");
    let sink = scene.start_sink();
    let sealer = scene.start_sealer::<u64>().await;
    scene.wait_sealed("a").await;
    scene.assert_rows::<u64>(100..160, &[1, 2]);
    let by = scene.up.ask("SELECT by FROM millstream.bulky_rows GROUP BY by ORDER BY by FORMAT CSV");
    assert_eq!(by, "1\n2\n");
    end([worker, sink, sealer]).await;
}

/// SIGKILL while the second INSERT is on its way: some parts of a batch are stored, some are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_killed_between_two_parts() {
    let mut scene = Scene::new().await;
    scene.publish::<u64>("a", range(200, 679), 120).await;
    let (worker, metrics) = scene.start_work(&scene.broker, Bulky::<u64>::new(0));
    wait_done(&metrics, 4);
    let (pid, inserts) = (Arc::new(AtomicU32::new(0)), AtomicU32::new(0));
    let (victim, clickhouse) = (pid.clone(), scene.up.clickhouse.clone());
    scene.proxy.rule(move |request| {
        if request.inserts_rows() && inserts.fetch_add(1, Ordering::SeqCst) == 1 {
            // Both may be on their way at once: the first has to land before the kill.
            wait_until("rows of the first insert", SOON, || {
                let rows = ask_clickhouse(&clickhouse, "SELECT count() FROM millstream.bulky_rows");
                match rows.as_deref().map(str::trim) {
                    Ok("0") => Err("none".to_owned()),
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }
            });
            signal(victim.load(Ordering::SeqCst), "KILL");
            return Fate::CutBody;
        }
        Fate::Pass
    });
    let host = Host::new(env!("CARGO_BIN_EXE_bulky"));
    let words = ["sink", "--nats", &scene.nats_url, "--clickhouse", &scene.proxy.url];
    let mut killed = host.start("sink-1", &words);
    pid.store(killed.pid(), Ordering::SeqCst);
    assert!(!killed.wait(SOON).success());
    let short = "SELECT count() FROM (SELECT batch FROM millstream.bulky_rows GROUP BY batch \
                 HAVING uniqExact(id) < any(batch_ids))";
    assert!(scene.up.number(short) > 0, "every batch that is stored is stored whole");
    let _another = host.start("sink-2", &words);
    scene.wait_sealed("a").await;
    scene.assert_rows::<u64>(200..680, &[0]);
    end([worker]).await;
}

/// ClickHouse and nats-server of one test, and the engine's connections to them.
struct Scene {
    host: Host,
    up: Up,
    _server: NatsServer,
    nats_url: String,
    nats: Nats,
    proxy: Proxy,
    broker: Broker,
    records: Records,
}

impl Scene {
    async fn new() -> Self {
        let host = Host::new(env!("CARGO_BIN_EXE_trial"));
        let up = host.up();
        let (server, nats_url) = NatsServer::start(&up, host.path());
        let proxy = Proxy::before(&up.clickhouse);
        let broker = stage::broker(&nats_url, Bulky::<u64>::NAME).await;
        broker.setup(&StreamLimits::default()).await.expect("streams");
        let records = broker.records().await.expect("bucket");
        let mut nats = Nats::connect(&nats_url);
        make_consumer(&mut nats, "bulky_rows", "sink", "bulky.rows.>");
        Self { host, up, _server: server, nats_url, nats, proxy, broker, records }
    }

    /// Makes the tables for ids of this type, and publishes a run.
    async fn publish<I: Id>(&mut self, run: &str, input: Input, batch: u32) {
        self.store::<I>().await.setup().await.expect("tables");
        // No merges, which would hide what is stored twice.
        self.up.ask(
            "ALTER TABLE millstream.bulky_rows MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1",
        );
        make_consumer(&mut self.nats, "bulky_ids", &format!("work-{run}-1"), &format!("bulky.ids.{run}.*"));
        let (survey, _) = input.survey::<I>().expect("ids");
        let submission = Submission {
            run: name(run),
            input,
            survey,
            batch_ids: Some(batch),
            chosen: None,
            priority: 0,
            rate: None,
            max_dead: None,
            metrics: Metrics::default(),
        };
        let stop = Stop::new();
        let session = self.session::<I>().await;
        submit::<I>(&session, &submission, &stop, |_| ()).await.expect("published");
    }

    async fn store<I: Id>(&self) -> Store {
        stage::store::<Bulky<I>>(&self.proxy.url).await
    }

    async fn session<I: Id>(&self) -> Session {
        Session::open(self.broker.clone(), self.store::<I>().await).await.expect("bucket")
    }

    fn start_work<I: Id>(&self, broker: &Broker, pipeline: Bulky<I>) -> (Service, Metrics) {
        let metrics = Metrics::default();
        let broker = broker.clone();
        let counted = metrics.clone();
        let function = Function::of(Arc::new(pipeline)).expect("sound");
        let plan = WorkPlan { threads: 2, drain: SOON, place: Place::Here, limits: Limits::DEFAULT };
        let service =
            Service::start(
                |stop| async move { Box::pin(work(function, &broker, &plan, counted, &stop)).await },
            );
        (service, metrics)
    }

    fn start_sink(&self) -> Service {
        self.start_sink_of::<u64>(SinkPlan::default())
    }

    fn start_sink_of<I: Id>(&self, plan: SinkPlan) -> Service {
        let (broker, url) = (self.broker.clone(), self.proxy.url.clone());
        Service::start(|stop| async move {
            sink(&broker, &stage::store::<Bulky<I>>(&url).await, plan, Arc::default(), &stop).await
        })
    }

    async fn start_sealer<I: Id>(&self) -> Service {
        let session = self.session::<I>().await;
        Service::start(|stop| async move { seal_passes::<I>(session, Arc::default(), &stop).await })
    }

    async fn wait_sealed(&self, run: &str) {
        let limit = Instant::now() + SOON;
        loop {
            let pass = self.records.pass(&name(run).pass(1)).await.expect("a bucket").expect("a pass").record;
            if pass.state == PassState::Sealed {
                return;
            }
            let stored =
                self.up.ask("SELECT batch, count(), uniqExact(id) FROM millstream.bulky_rows GROUP BY batch");
            assert!(Instant::now() < limit, "{pass:?}, stored: {stored}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Subjects of the messages in the rows stream.
    fn subjects(&mut self) -> Vec<String> {
        let found = self.nats.api("STREAM.INFO.bulky_rows", &json!({ "subjects_filter": ">" }));
        found["state"]["subjects"].as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default()
    }

    /// Exactly these ids are there, once, raw too, and each row is what one of these workers returns for it.
    fn assert_rows<I: Id>(&self, ids: impl IntoIterator<Item = I>, by: &[u64]) {
        let ids: Vec<I> = ids.into_iter().collect();
        let raw = self.up.number("SELECT count() FROM millstream.bulky_rows");
        assert_eq!(raw, ids.len() as u64, "raw rows");
        let alive: Vec<&I> = ids.iter().filter(|id| !id.to_string().ends_with("77")).collect();
        assert_eq!(self.up.number("SELECT count() FROM millstream.bulky"), alive.len() as u64);
        let stored = self.up.ask(
            "SELECT lower(hex(toString(id))), by, sipHash64(noise), length(noise) FROM millstream.bulky FORMAT TSV",
        );
        let stored: Vec<&str> = stored.lines().collect();
        for id in alive {
            let rows: Vec<String> = by.iter().map(|by| expected(id, *by)).collect();
            assert!(
                stored.iter().any(|row| rows.iter().any(|expected| expected == row)),
                "{id}: {}",
                rows[0]
            );
        }
    }
}

/// A row as ClickHouse is asked for it.
fn expected<I: Id>(id: &I, by: u64) -> String {
    let pipeline = Bulky::<I>::new(by);
    let row = pipeline.compute(id).or_else(|_| pipeline.compute(id)).expect("a row at the second attempt");
    let hex: String = id.to_string().bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}\t{by}\t{}\t{}", row.noise.sip_hash(), row.noise.len())
}

fn range(first: u64, last: u64) -> Input {
    Input::Range { first, last }
}

fn name(run: &str) -> RunName {
    run.parse().expect("a legal name")
}

/// A durable with a short `ack_wait`: made before anybody needs it, it is left as it is.
fn make_consumer(nats: &mut Nats, stream: &str, durable: &str, filter: &str) {
    nats.api(&format!("CONSUMER.DELETE.{stream}.{durable}"), &json!({}));
    let config = json!({
        "durable_name": durable, "filter_subject": filter, "ack_policy": "explicit", "ack_wait": ACK_WAIT.as_nanos() as u64,
        "max_deliver": -1, "deliver_policy": "all", "replay_policy": "instant", "max_ack_pending": 10_000,
    });
    let subject = format!("CONSUMER.DURABLE.CREATE.{stream}.{durable}");
    let answer = nats.api(&subject, &json!({ "stream_name": stream, "config": config }));
    assert!(answer["error"].is_null(), "{answer}");
}

fn wait_done(metrics: &Metrics, batches: u64) {
    wait_until("batches computed", SOON, || match metrics.work_counts().batches {
        found if found >= batches => Ok(()),
        found => Err(format!("{found} of {batches}")),
    });
}

async fn end<const N: usize>(services: [Service; N]) {
    for service in services {
        service.end().await;
    }
}

/// A nats-server as it is without any setting but JetStream: a message may have 1 MiB.
struct NatsServer(Child);

impl NatsServer {
    fn start(up: &Up, dir: &Path) -> (Self, String) {
        let pid = up.pids("nats-server.conf")[0];
        let binary = fs::read_link(format!("/proc/{pid}/exe")).expect("the stack's nats-server");
        let ports = dir.join("ports");
        fs::create_dir(&ports).expect("a directory");
        let log = fs::File::create(dir.join("own-nats.log")).expect("a log file");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(binary)
            .args(["--addr", "127.0.0.1", "--port", "-1", "--jetstream", "--store_dir"])
            .arg(dir.join("own-nats"))
            .arg("--ports_file_dir")
            .arg(&ports)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("nats-server starts");
        let url = wait_until("nats-server's port", SOON, || {
            let file = fs::read_dir(&ports).ok().and_then(|mut files| files.next()?.ok());
            let text = file.and_then(|file| fs::read_to_string(file.path()).ok()).unwrap_or_default();
            let ports: Value = serde_json::from_str(&text).map_err(|error| format!("{text}: {error}"))?;
            ports["nats"][0].as_str().map(str::to_owned).ok_or(text)
        });
        (Self(child), url)
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("it ends");
    }
}

/// Stands between a worker and NATS, and cuts them off for good once so many bytes went to the server.
struct Wall {
    url: String,
    passed: Arc<AtomicU64>,
    fallen: Arc<AtomicBool>,
}

impl Wall {
    fn before(nats: &str, limit: u64) -> Self {
        let upstream = nats.trim_start_matches("nats://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("nats://{}", listener.local_addr().expect("an address"));
        let wall = Self { url, passed: Arc::default(), fallen: Arc::default() };
        let (passed, fallen) = (wall.passed.clone(), wall.fallen.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if fallen.load(Ordering::SeqCst) {
                    continue;
                }
                let server = TcpStream::connect(&upstream).expect("NATS");
                let back = (server.try_clone().expect("a handle"), client.try_clone().expect("a handle"));
                let (passed, fallen) = (passed.clone(), fallen.clone());
                std::thread::spawn(move || copy(back.0, back.1, |_| true));
                std::thread::spawn(move || {
                    copy(client, server, |bytes| {
                        let passes = passed.fetch_add(bytes as u64, Ordering::SeqCst) < limit;
                        fallen.fetch_or(!passes, Ordering::SeqCst);
                        passes
                    });
                });
            }
        });
        wall
    }

    fn fallen(&self) -> bool {
        self.fallen.load(Ordering::SeqCst)
    }

    fn bytes(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }
}

/// Copies until one side ends, or this says no.
fn copy(mut from: TcpStream, mut to: TcpStream, mut passes: impl FnMut(usize) -> bool) {
    let mut bytes = vec![0; 1 << 14];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if !passes(count) || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    for side in [from, to] {
        // The other half may have closed it already.
        drop(side.shutdown(Shutdown::Both));
    }
}
