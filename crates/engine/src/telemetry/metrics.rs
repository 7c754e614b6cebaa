//! The metrics of a process: one handle, with a verb for each event.
//!
//! Each part of the process has a file with its metrics and verbs. Names follow the conventions of Prometheus
//! (<https://prometheus.io/docs/practices/naming/>): a unit in the name, `_total` at the end of counters. Every
//! series exists from the start, with 0, so that its rate is right from the first event on.

mod deliveries;
mod producer;
mod publishing;
mod sealer;
mod sink;
mod worker;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry, Unit};

use super::labels::Labels;

/// The prefix of every metric name.
const PREFIX: &str = "millstream";
/// Histogram bounds for answers of servers, in seconds: a healthy server answers in milliseconds, others within
/// the minutes of our time limits.
const ANSWERS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// Histogram bounds for work, in seconds: a batch takes about two, an id may take hours.
const WORK: [f64; 14] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0];
/// Histogram bounds for the rows of an insert, which has at most 1,000,000.
const ROWS: [f64; 8] = [100.0, 1e3, 1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6];

/// The metrics of a process. Clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Parts>);

struct Parts {
    registry: Registry,
    deliveries: deliveries::Deliveries,
    publishing: publishing::Publishing,
    producer: producer::Producer,
    worker: worker::Worker,
    sink: sink::Sink,
    sealer: sealer::Sealer,
}

impl Default for Metrics {
    /// Metrics in a registry of their own, all 0.
    fn default() -> Self {
        let mut registry = Registering(Registry::with_prefix(PREFIX));
        let deliveries = deliveries::Deliveries::new(&mut registry);
        let publishing = publishing::Publishing::new(&mut registry);
        let producer = producer::Producer::new(&mut registry);
        let worker = worker::Worker::new(&mut registry);
        let sink = sink::Sink::new(&mut registry);
        let sealer = sealer::Sealer::new(&mut registry);
        let Registering(registry) = registry;
        Self(Arc::new(Parts { registry, deliveries, publishing, producer, worker, sink, sealer }))
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// All metrics in Prometheus' text format, version 0.0.4.
    ///
    /// # Errors
    /// A gauge whose value the format cannot express.
    pub fn to_text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.0.registry)?;
        Ok(text)
    }
}

/// A counter of seconds.
type Seconds = Counter<f64, AtomicU64>;

/// Creates metrics and registers them.
struct Registering(Registry);

impl Registering {
    fn register(&mut self, name: &str, help: &str, unit: Option<Unit>, metric: impl Metric) {
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, metric),
            None => self.0.register(name, help, metric),
        }
    }

    /// A counter without labels. The suffix `_total` is added to its name.
    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>) -> Counter {
        let counter = Counter::default();
        self.register(name, help, unit, counter.clone());
        counter
    }

    /// A family of counters by labels.
    fn counters<S: Labels>(&mut self, name: &str, help: &str, unit: Option<Unit>) -> Family<S, Counter> {
        let counters: Family<S, Counter> = Family::default();
        S::all().iter().for_each(|labels| drop(counters.get_or_create(labels)));
        self.register(name, help, unit, counters.clone());
        counters
    }

    /// A family of counters of seconds by labels.
    fn seconds<S: Labels>(&mut self, name: &str, help: &str) -> Family<S, Seconds> {
        let counters: Family<S, Seconds> = Family::default();
        S::all().iter().for_each(|labels| drop(counters.get_or_create(labels)));
        self.register(name, help, Some(Unit::Seconds), counters.clone());
        counters
    }

    fn gauge(&mut self, name: &str, help: &str) -> Gauge {
        let gauge = Gauge::default();
        self.register(name, help, None, gauge.clone());
        gauge
    }

    fn gauges<S: Labels>(&mut self, name: &str, help: &str, unit: Option<Unit>) -> Family<S, Gauge> {
        let gauges: Family<S, Gauge> = Family::default();
        S::all().iter().for_each(|labels| drop(gauges.get_or_create(labels)));
        self.register(name, help, unit, gauges.clone());
        gauges
    }

    fn histogram(&mut self, name: &str, help: &str, unit: Option<Unit>, bounds: &[f64]) -> Histogram {
        let histogram = Histogram::new(bounds.iter().copied());
        self.register(name, help, unit, histogram.clone());
        histogram
    }

    /// A family of histograms of seconds by labels.
    fn histograms<S: Labels>(
        &mut self,
        name: &str,
        help: &str,
        make: fn() -> Histogram,
    ) -> Family<S, Histogram> {
        let histograms: Family<S, Histogram> = Family::new_with_constructor(make);
        S::all().iter().for_each(|labels| drop(histograms.get_or_create(labels)));
        self.register(name, help, Some(Unit::Seconds), histograms.clone());
        histograms
    }
}

fn of_answers() -> Histogram {
    Histogram::new(ANSWERS)
}

fn of_work() -> Histogram {
    Histogram::new(WORK)
}

/// A duration in seconds, for histograms.
fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

/// A number as a gauge value.
fn level(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
