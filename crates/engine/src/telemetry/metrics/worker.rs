//! What a worker does.

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
    /// A worker begins, on so many cores.
    pub fn working(&self, cores: usize) {
        self.0.worker.cores.set(level(cores));
    }

    /// The ids of a batch were computed, in so long.
    pub fn computed(&self, took: Duration) {
        self.0.worker.computing.observe(seconds(took));
    }

    /// Rows of so many ids are in the stream, so many of them dead letters. They took so much of the cores.
    pub fn stored(&self, ids: u32, dead: u32, spent: Spent) {
        let Worker { ids: stored, used, .. } = &self.0.worker;
        stored.get_or_create(&By(Fate::Ok)).inc_by(u64::from(ids.saturating_sub(dead)));
        stored.get_or_create(&By(Fate::Dead)).inc_by(u64::from(dead));
        used.get_or_create(&By(Activity::Computing)).inc_by(seconds(spent.computing));
        used.get_or_create(&By(Activity::Encoding)).inc_by(seconds(spent.encoding));
    }

    /// All rows of a batch are in the stream.
    pub fn finished(&self) {
        self.0.worker.batches.inc();
    }

    /// A delivery of a batch ended before it was finished.
    pub fn unfinished(&self, reason: Unfinished) {
        self.0.worker.unfinished.get_or_create(&By(reason)).inc();
    }

    /// Cores without an id waited, so much core time.
    pub fn idled(&self, waits_for: WaitsFor, core_time: Duration) {
        self.0.worker.idle.get_or_create(&By(waits_for)).inc_by(seconds(core_time));
    }

    /// So many ids ask for another attempt.
    pub fn asked_again(&self, ids: u64) {
        self.0.worker.again.inc_by(ids);
    }

    /// An id is beyond its soft limit.
    pub fn id_is_slow(&self) {
        self.0.worker.slow.inc();
    }

    /// Ids of a batch are computed one at a time.
    pub fn isolated(&self) {
        self.0.worker.isolated.inc();
    }

    /// An id ended its process.
    pub fn id_crashed(&self) {
        self.0.worker.crashed.inc();
    }

    /// What the worker did so far.
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
