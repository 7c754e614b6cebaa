//! Metrics of a producer.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::{Metrics, Registering, level};
use crate::telemetry::labels::{By, Origin};

pub(super) struct Producer {
    batches: Family<By<Origin>, Counter>,
    ids: Family<By<Origin>, Counter>,
    repeats: Counter,
    bad_lines: Counter,
    in_flight: Gauge,
}

impl Producer {
    pub fn new(registry: &mut Registering) -> Self {
        Self {
            batches: registry.counters("producer_batches", "Batches in the ids stream, by origin", None),
            ids: registry.counters("producer_ids", "Ids of batches in the ids stream, by origin", None),
            repeats: registry.counter(
                "producer_repeated_ids",
                "Ids given twice within a batch, and dropped",
                None,
            ),
            bad_lines: registry.counter("producer_bad_lines", "Lines of an open run that hold no id", None),
            in_flight: registry.gauge("producer_batches_in_flight", "Batches that are being published now"),
        }
    }
}

impl Metrics {
    /// Counts a batch of `ids` ids in the stream, and the repeats that were dropped from it.
    pub fn published(&self, origin: Origin, ids: u64, repeats: u64) {
        let producer = &self.0.producer;
        producer.batches.get_or_create(&By(origin)).inc();
        producer.ids.get_or_create(&By(origin)).inc_by(ids);
        producer.repeats.inc_by(repeats);
    }

    /// Counts a line of an open run that holds no id.
    pub fn bad_line(&self) {
        self.0.producer.bad_lines.inc();
    }

    /// Sets the number of batches that are being published.
    pub fn publishing(&self, batches: usize) {
        self.0.producer.in_flight.set(level(batches));
    }
}
