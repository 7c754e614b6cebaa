//! Metrics of a sealer.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use super::{Metrics, Registering, level, of_work, seconds};
use crate::model::seal_step::Step;
use crate::telemetry::labels::By;

pub(super) struct Sealer {
    passes: Gauge,
    waiting: Gauge,
    took: Family<By<Step>, Histogram>,
    failed: Family<By<Step>, Counter>,
    sealed: Counter,
    sealed_rows: Counter,
    repairs: Counter,
    repaired: Counter,
}

impl Sealer {
    pub fn new(registry: &mut Registering) -> Self {
        Self {
            passes: registry.gauge("sealer_open_passes", "Passes that this sealer follows to their seal"),
            waiting: registry.gauge(
                "sealer_waiting_passes",
                "Passes that are not sealed because of something that an operator has to see to",
            ),
            took: registry.histograms("sealer_step", "Time of a step to a seal, by step", of_work),
            failed: registry.counters(
                "sealer_failed_steps",
                "Steps to a seal that failed or took too long, and are taken again, by step",
                None,
            ),
            sealed: registry.counter("sealer_sealed_passes", "Passes that this sealer sealed", None),
            sealed_rows: registry.counter(
                "sealer_sealed_rows",
                "Rows of passes that this sealer sealed",
                None,
            ),
            repairs: registry.counter("sealer_repairs", "Repairs that changed something", None),
            repaired: registry.counter(
                "sealer_repaired_batches",
                "Batches that repairs had computed or delivered again",
                None,
            ),
        }
    }
}

impl Metrics {
    /// Sets the number of passes that the sealer follows.
    pub fn following(&self, passes: usize) {
        self.0.sealer.passes.set(level(passes));
    }

    /// Sets the number of passes that wait for an operator.
    pub fn waiting(&self, passes: usize) {
        self.0.sealer.waiting.set(level(passes));
    }

    /// Counts a step. `failed` says that a server did not answer, or the step took too long.
    pub fn step_taken(&self, step: Step, failed: bool, took: Duration) {
        self.0.sealer.took.get_or_create(&By(step)).observe(seconds(took));
        if failed {
            self.0.sealer.failed.get_or_create(&By(step)).inc();
        }
    }

    /// Counts a sealed pass and its rows.
    pub fn sealed(&self, rows: u64) {
        self.0.sealer.sealed.inc();
        self.0.sealer.sealed_rows.inc_by(rows);
    }

    /// Counts a repair that changed something, and the batches that are computed or delivered again.
    pub fn repaired(&self, batches: u64) {
        self.0.sealer.repairs.inc();
        self.0.sealer.repaired.inc_by(batches);
    }
}
