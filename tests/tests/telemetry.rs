//! What an operator graphs and traces: every figure of a small run, the names that dashboards rest on, and the trace of a batch.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use millstream::names::RunName;
use millstream::{Failure, Limits, Outcome, Pipeline};
use millstream_engine::compute::{Function, Place};
use millstream_engine::produce::input::Input;
use millstream_engine::produce::publish::{Submission, submit};
use millstream_engine::seal::seal_passes;
use millstream_engine::sink::{SinkPlan, SinkState, sink};
use millstream_engine::work::{WorkPlan, work};
use millstream_engine::{Broker, Metrics, Session, Stop, Store, StreamLimits};
use tests::nats::Nats;
use tests::stage::{self, Service};
use tests::{Host, SOON, Squared, Trial, Up, wait_until};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

const IDS: u64 = 1000;
const BATCH: u32 = 250;
const BATCHES: u64 = 4;
/// Batches that are handed back before a worker has them.
const HANDED_BACK: u64 = 2;

/// Squares; one id of a hundred is rejected.
struct Picky;

impl Pipeline for Picky {
    const NAME: &'static str = Trial::NAME;
    const COLUMNS: &'static [(&'static str, &'static str)] = Trial::COLUMNS;
    type Id = u64;
    type Row = Squared;

    fn compute(&self, id: &u64) -> Outcome<Squared> {
        if id % 100 == 7 { Err(Failure::reject("seven")) } else { Ok(Squared { squared: id * id }) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_say_exactly_what_a_run_came_to() {
    let mut scene = Scene::new().await;
    let metrics = Metrics::default();
    scene.publish("a", &metrics).await;
    scene.hand_back("a", HANDED_BACK);
    scene.drive(&metrics).await;
    let figures = Figures::of(&metrics);
    let dead = IDS / 100;
    for (series, figure) in [
        ("producer_batches_total{origin=\"published\"}", BATCHES),
        ("producer_batches_total{origin=\"found\"}", 0),
        ("producer_ids_total{origin=\"published\"}", IDS),
        ("producer_batches_in_flight", 0),
        ("publish_seconds_count{stream=\"ids\"}", BATCHES),
        ("publish_seconds_count{stream=\"rows\"}", BATCHES),
        ("deliveries_total{stage=\"worker\",arrival=\"first\"}", BATCHES - HANDED_BACK),
        ("deliveries_total{stage=\"worker\",arrival=\"redelivery\"}", HANDED_BACK),
        ("ended_deliveries_total{stage=\"worker\",end=\"acked\"}", BATCHES),
        ("held_deliveries{stage=\"worker\"}", 0),
        ("worker_batches_total", BATCHES),
        ("worker_ids_total{status=\"ok\"}", IDS - dead),
        ("worker_ids_total{status=\"dead\"}", dead),
        ("worker_compute_seconds_count", BATCHES),
        ("worker_cores", 2),
        ("deliveries_total{stage=\"sink\",arrival=\"first\"}", BATCHES),
        ("ended_deliveries_total{stage=\"sink\",end=\"acked\"}", BATCHES),
        ("delivery_seconds_count{stage=\"sink\"}", BATCHES),
        ("held_message_bytes{stage=\"sink\"}", 0),
        ("sink_inserted_rows_total", IDS),
        ("sink_insert_rows_sum", IDS),
        ("sink_confirmed_rows_total", IDS),
        ("sink_confirmed_messages_total", BATCHES),
        ("sink_inserts_total{outcome=\"refused\"}", 0),
        ("sink_waiting_inserts", 0),
        ("sealer_sealed_passes_total", 1),
        ("sealer_sealed_rows_total", IDS),
        ("sealer_failed_steps_total{step=\"prove\"}", 0),
        ("sealer_repairs_total", 0),
    ] {
        assert_eq!(figures.get(series), figure as f64, "{series} in {}", figures.text);
    }
    let inserts = figures.get("sink_inserts_total{outcome=\"accepted\"}");
    assert!((1.0..=BATCHES as f64).contains(&inserts), "{inserts} inserts");
    assert_eq!(figures.get("sink_insert_seconds_count{outcome=\"accepted\"}"), inserts);
    for series in [
        "published_bytes_total{stream=\"ids\"}",
        "published_bytes_total{stream=\"rows\"}",
        "sink_inserted_bytes_total",
        "worker_core_seconds_total{activity=\"computing\"}",
        "sealer_step_seconds_count{step=\"prove\"}",
        "sink_ask_seconds_count",
    ] {
        assert!(figures.get(series) > 0.0, "{series} in {}", figures.text);
    }
}

/// Dashboards and alerts rest on these: whoever renames one sees it here.
#[test]
fn names_kinds_and_help_of_metrics_are_known() {
    let text = Metrics::default().to_text().expect("text");
    let described: Vec<&str> = text.lines().filter(|line| line.starts_with("# ")).collect();
    insta::assert_snapshot!("metrics", described.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_has_one_trace_from_the_producer_to_the_sink() {
    let spans = Spans::default();
    let subscriber = tracing_subscriber::registry().with(spans.clone());
    tracing::subscriber::set_global_default(subscriber).expect("no other test of this binary sets one");
    let mut scene = Scene::new().await;
    let metrics = Metrics::default();
    scene.publish("traced", &metrics).await;
    scene.hand_back("traced", 1);
    scene.drive(&metrics).await;
    let published: BTreeMap<String, String> =
        spans.of("publish", "traced").map(|span| (span["batch"].clone(), span["trace_id"].clone())).collect();
    let traces: BTreeSet<String> = published.values().cloned().collect();
    assert_eq!((published.len(), traces.len()), (BATCHES as usize, BATCHES as usize), "{published:?}");
    let delivered: Vec<Fields> = spans.of("delivery", "traced").collect();
    assert_eq!(delivered.len(), BATCHES as usize, "{delivered:?}");
    for span in &delivered {
        assert_eq!(Some(&span["trace_id"]), published.get(&span["batch"]), "{span:?}");
        assert_eq!(span["pass"], "1");
    }
    let again = delivered.iter().filter(|span| span["delivery"] == "2").count();
    assert_eq!(again, 1, "{delivered:?}");
    let inserted: Vec<Fields> = spans.of("insert", "traced").collect();
    let in_inserts: BTreeSet<String> =
        inserted.iter().flat_map(|span| span["traces"].split(',').map(str::to_owned)).collect();
    assert_eq!(in_inserts, traces, "{inserted:?}");
    let rows: u64 = inserted.iter().map(|span| span["rows"].parse::<u64>().expect("a number")).sum();
    assert_eq!(rows, IDS, "{inserted:?}");
    assert!(inserted.iter().all(|span| span["query_id"].starts_with("millstream-")), "{inserted:?}");
}

/// Servers of one test, and the engine's connections to them.
struct Scene {
    _host: Host,
    up: Up,
    nats: Nats,
    broker: Broker,
    store: Store,
}

impl Scene {
    async fn new() -> Self {
        let host = Host::new(env!("CARGO_BIN_EXE_trial"));
        let up = host.up();
        let broker = stage::broker(&up.nats, Picky::NAME).await;
        broker.setup(&StreamLimits::default()).await.expect("streams");
        let store = stage::store::<Picky>(&up.clickhouse).await;
        store.setup().await.expect("tables");
        let nats = Nats::connect(&up.nats);
        Self { _host: host, up, nats, broker, store }
    }

    async fn session(&self) -> Session {
        Session::open(self.broker.clone(), self.store.clone()).await.expect("bucket")
    }

    async fn publish(&self, run: &str, metrics: &Metrics) {
        let input = Input::Range { first: 1, last: IDS };
        let (survey, _) = input.survey::<u64>().expect("ids");
        let submission = Submission {
            run: name(run),
            input,
            survey,
            batch_ids: Some(BATCH),
            chosen: None,
            priority: 0,
            max_dead: None,
            rate: None,
            metrics: metrics.clone(),
        };
        let session = self.session().await;
        submit::<u64>(&session, &submission, &Stop::new(), |_| ()).await.expect("published");
    }

    /// Some batches are drawn and handed back: their next delivery is not their first.
    fn hand_back(&mut self, run: &str, batches: u64) {
        let consumer = format!("work-{run}-1");
        let drawn: Vec<_> = (0..batches)
            .map(|_| {
                let pull = || self.nats.pull("trial_ids", &consumer).ok_or_else(String::new);
                wait_until("a batch", SOON, pull)
            })
            .collect();
        drawn.iter().for_each(|message| self.nats.nak(message));
    }

    /// A worker, then a sink with a sealer, until the run is sealed and all have ended.
    async fn drive(&self, metrics: &Metrics) {
        let function = Function::of(Arc::new(Picky)).expect("sound");
        let plan = WorkPlan { threads: 2, drain: SOON, place: Place::Here, limits: Limits::DEFAULT };
        let (broker, counted) = (self.broker.clone(), metrics.clone());
        let working =
            Service::start(
                |stop| async move { Box::pin(work(function, &broker, &plan, counted, &stop)).await },
            );
        wait_until("all batches computed", SOON, || match metrics.work_counts().batches {
            BATCHES => Ok(()),
            batches => Err(format!("{batches} batches")),
        });
        working.end().await;
        let state = Arc::new(SinkState::counted_by(metrics.clone()));
        let (broker, store, shared) = (self.broker.clone(), self.store.clone(), state.clone());
        let sinking =
            Service::start(
                |stop| async move { sink(&broker, &store, SinkPlan::default(), shared, &stop).await },
            );
        let session = self.session().await;
        let sealing = Service::start(|stop| async move { seal_passes::<u64>(session, state, &stop).await });
        wait_until("a seal", SOON, || {
            if Figures::of(metrics).get("sealer_sealed_passes_total") > 0.0 {
                return Ok(());
            }
            Err(self.up.ask("SELECT run, count() FROM millstream.trial_rows GROUP BY run"))
        });
        sealing.end().await;
        sinking.end().await;
    }
}

fn name(run: &str) -> RunName {
    run.parse().expect("a legal name")
}

/// What a registry says, by series.
struct Figures {
    text: String,
    by_series: BTreeMap<String, f64>,
}

impl Figures {
    fn of(metrics: &Metrics) -> Self {
        let text = metrics.to_text().expect("text");
        let series = text.lines().filter(|line| !line.starts_with('#'));
        let figure = |line: &str| {
            let (series, figure) = line.rsplit_once(' ').expect("a figure");
            (series.to_owned(), figure.parse().expect("a number"))
        };
        let by_series = series.map(figure).collect();
        Self { text, by_series }
    }

    fn get(&self, series: &str) -> f64 {
        let found = self.by_series.get(&format!("millstream_{series}"));
        *found.unwrap_or_else(|| panic!("no series {series} in {}", self.text))
    }
}

type Fields = BTreeMap<String, String>;

/// The engine's spans, with their fields as text.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<BTreeMap<u64, (&'static str, Fields)>>>);

impl Spans {
    /// The spans of this name, of this run.
    fn of(&self, name: &str, run: &str) -> impl Iterator<Item = Fields> {
        let spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted =
            |(span, fields): &&(&str, Fields)| *span == name && fields.get("run").is_some_and(|of| of == run);
        spans.values().filter(wanted).map(|(_, fields)| fields.clone()).collect::<Vec<_>>().into_iter()
    }
}

struct Reading<'a>(&'a mut Fields);

impl Visit for Reading<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

/// A number for each span: the registry uses ids of spans that are closed again.
struct Number(u64);

impl<S: tracing::Subscriber + for<'span> LookupSpan<'span>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let (metadata, Some(span)) = (attributes.metadata(), context.span(id)) else { return };
        if !metadata.target().starts_with("millstream_engine") {
            return;
        }
        let mut fields = Fields::new();
        attributes.record(&mut Reading(&mut fields));
        let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = spans.len() as u64;
        spans.insert(number, (metadata.name(), fields));
        span.extensions_mut().insert(Number(number));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Number(number)) = span.extensions().get::<Number>()
            && let Some((_, fields)) = spans.get_mut(number)
        {
            values.record(&mut Reading(fields));
        }
    }
}
