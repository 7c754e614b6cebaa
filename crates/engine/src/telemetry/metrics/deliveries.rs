//! Metrics of the messages that a worker or sink holds.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use super::{Metrics, Registering, level, of_work, seconds};
use crate::telemetry::labels::{Arrival, By, End, Stage};

pub(super) struct Deliveries {
    arrived: Family<(By<Stage>, By<Arrival>), Counter>,
    ended: Family<(By<Stage>, By<End>), Counter>,
    set_aside: Family<By<Stage>, Counter>,
    unreported: Family<By<Stage>, Counter>,
    held: Family<By<Stage>, Gauge>,
    held_bytes: Family<By<Stage>, Gauge>,
    lasted: Family<By<Stage>, Histogram>,
}

impl Deliveries {
    pub fn new(registry: &mut Registering) -> Self {
        Self {
            arrived: registry.counters("deliveries", "Messages that arrived, by stage and arrival", None),
            ended: registry.counters("ended_deliveries", "Deliveries that ended, by stage and end", None),
            set_aside: registry.counters(
                "quarantined_messages",
                "Messages that are no batch of this pipeline and were copied into the quarantine stream",
                None,
            ),
            unreported: registry.counters(
                "progress_failures",
                "Failures to report progress, after which held messages may be redelivered",
                None,
            ),
            held: registry.gauges("held_deliveries", "Deliveries that are held now", None),
            held_bytes: registry.gauges(
                "held_message",
                "Bytes of the messages that are held now",
                Some(Unit::Bytes),
            ),
            lasted: registry.histograms("delivery", "Time from the arrival of a message to its end", of_work),
        }
    }
}

impl Metrics {
    /// Counts a message of `bytes` bytes that arrived for the `deliveries`th time.
    pub fn arrived(&self, stage: Stage, deliveries: i64, bytes: usize) {
        let Deliveries { arrived, held, held_bytes, .. } = &self.0.deliveries;
        let arrival = if deliveries > 1 { Arrival::Again } else { Arrival::First };
        arrived.get_or_create(&(By(stage), By(arrival))).inc();
        held.get_or_create(&By(stage)).inc();
        held_bytes.get_or_create(&By(stage)).inc_by(level(bytes));
    }

    /// Counts a delivery of `bytes` bytes that ended `after` its arrival.
    pub fn ended(&self, stage: Stage, end: End, bytes: usize, after: Duration) {
        let Deliveries { ended, held, held_bytes, lasted, .. } = &self.0.deliveries;
        ended.get_or_create(&(By(stage), By(end))).inc();
        held.get_or_create(&By(stage)).dec();
        held_bytes.get_or_create(&By(stage)).dec_by(level(bytes));
        lasted.get_or_create(&By(stage)).observe(seconds(after));
    }

    /// Counts a message that was put into quarantine.
    pub fn set_aside(&self, stage: Stage) {
        self.0.deliveries.set_aside.get_or_create(&By(stage)).inc();
    }

    /// Counts a failed progress report of held deliveries.
    pub fn progress_failed(&self, stage: Stage) {
        self.0.deliveries.unreported.get_or_create(&By(stage)).inc();
    }

    /// The number of redeliveries to a stage.
    pub(super) fn redelivered(&self, stage: Stage) -> u64 {
        self.0.deliveries.arrived.get_or_create(&(By(stage), By(Arrival::Again))).get()
    }

    /// The number of messages that a stage has put into quarantine.
    pub(super) fn quarantined(&self, stage: Stage) -> u64 {
        self.0.deliveries.set_aside.get_or_create(&By(stage)).get()
    }
}
