//! Metrics of a worker.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use super::{Metrics, Registering, Seconds, WORK, level, seconds};
use crate::model::counts::WorkCounts;
use crate::model::times::Spent;
use crate::telemetry::labels::{Activity, By, Fate, Stage, Unfinished, WaitsFor};

pub(super) struct Worker {
    batches: Counter,
    ids: Family<By<Fate>, Counter>,
    unfinished: Family<By<Unfinished>, Counter>,
    computing: Histogram,
    cores: Gauge,
    used: Family<By<Activity>, Seconds>,
    idle: Family<By<WaitsFor>, Seconds>,
    again: Counter,
    slow: Counter,
    isolated: Counter,
    crashed: Counter,
}

impl Worker {
    pub fn new(registry: &mut Registering) -> Self {
        Self {
            batches: registry.counter(
                "worker_batches",
                "Batches all of whose rows are in the rows stream",
                None,
            ),
            ids: registry.counters("worker_ids", "Ids whose rows are in the rows stream, by status", None),
            unfinished: registry.counters(
                "worker_unfinished_batches",
                "Deliveries of batches that this worker did not finish, by reason",
                None,
            ),
            computing: registry.histogram(
                "worker_compute",
                "Time in which the ids of a batch are computed, with pauses before other attempts",
                Some(Unit::Seconds),
                &WORK,
            ),
            cores: registry.gauge("worker_cores", "Cores that this worker computes on"),
            used: registry.seconds("worker_core", "Core time that was used for batches, by activity"),
            idle: registry.seconds("worker_idle_core", "Core time without an id, by what the core waits for"),
            again: registry.counter(
                "worker_retried_ids",
                "Ids that asked for another attempt, once an attempt",
                None,
            ),
            slow: registry.counter("worker_slow_ids", "Ids that took longer than their soft limit", None),
            isolated: registry.counter(
                "worker_isolated_batches",
                "Batches, or parts of them, that were computed in isolated processes, one id at a time",
                None,
            ),
            crashed: registry.counter(
                "worker_crashed_ids",
                "Ids that ended their process, or had to be ended with it, and are dead letters",
                None,
            ),
        }
    }
}

impl Metrics {
    /// Sets the number of cores of a worker that starts.
    pub fn working(&self, cores: usize) {
        self.0.worker.cores.set(level(cores));
    }

    /// Counts the time in which the ids of a batch were computed.
    pub fn computed(&self, took: Duration) {
        self.0.worker.computing.observe(seconds(took));
    }

    /// Counts ids whose rows are in the stream, the dead letters among them, and the core time that they took.
    pub fn stored(&self, ids: u32, dead: u32, spent: Spent) {
        let Worker { ids: stored, used, .. } = &self.0.worker;
        stored.get_or_create(&By(Fate::Ok)).inc_by(u64::from(ids.saturating_sub(dead)));
        stored.get_or_create(&By(Fate::Dead)).inc_by(u64::from(dead));
        used.get_or_create(&By(Activity::Computing)).inc_by(seconds(spent.computing));
        used.get_or_create(&By(Activity::Encoding)).inc_by(seconds(spent.encoding));
    }

    /// Counts a batch whose rows are all in the stream.
    pub fn finished(&self) {
        self.0.worker.batches.inc();
    }

    /// Counts a delivery of a batch that ended unfinished.
    pub fn unfinished(&self, reason: Unfinished) {
        self.0.worker.unfinished.get_or_create(&By(reason)).inc();
    }

    /// Counts core time without an id to compute.
    pub fn idled(&self, waits_for: WaitsFor, core_time: Duration) {
        self.0.worker.idle.get_or_create(&By(waits_for)).inc_by(seconds(core_time));
    }

    /// Counts ids that wait for another attempt.
    pub fn asked_again(&self, ids: u64) {
        self.0.worker.again.inc_by(ids);
    }

    /// Counts an id that exceeded its soft limit.
    pub fn id_is_slow(&self) {
        self.0.worker.slow.inc();
    }

    /// Counts a batch whose ids are computed one at a time.
    pub fn isolated(&self) {
        self.0.worker.isolated.inc();
    }

    /// Counts an id that ended its process.
    pub fn id_crashed(&self) {
        self.0.worker.crashed.inc();
    }

    /// The worker's counts since its start.
    pub fn work_counts(&self) -> WorkCounts {
        let Worker { batches, ids, slow, isolated, crashed, .. } = &self.0.worker;
        let ok = ids.get_or_create(&By(Fate::Ok)).get();
        let dead = ids.get_or_create(&By(Fate::Dead)).get();
        WorkCounts {
            batches: batches.get(),
            ids: ok + dead,
            dead,
            redelivered: self.redelivered(Stage::Worker),
            slow: slow.get(),
            isolated: isolated.get(),
            crashed: crashed.get(),
            set_aside: self.quarantined(Stage::Worker),
        }
    }
}
