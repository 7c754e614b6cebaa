//! Metrics of publishing messages into a stream.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use super::{Metrics, Registering, of_answers, seconds};
use crate::telemetry::labels::{By, Stream, Unconfirmed};

pub(super) struct Publishing {
    bytes: Family<By<Stream>, Counter>,
    took: Family<By<Stream>, Histogram>,
    unconfirmed: Family<(By<Stream>, By<Unconfirmed>), Counter>,
}

impl Publishing {
    pub fn new(registry: &mut Registering) -> Self {
        Self {
            bytes: registry.counters(
                "published",
                "Bytes of messages that were stored, by stream",
                Some(Unit::Bytes),
            ),
            took: registry.histograms(
                "publish",
                "Time until a message is stored, or found to be, with every attempt and pause",
                of_answers,
            ),
            unconfirmed: registry.counters(
                "unconfirmed_publishes",
                "Attempts to publish that were not confirmed and are made again, by stream and reason",
                None,
            ),
        }
    }
}

impl Metrics {
    /// Counts a message of `bytes` bytes that is in its stream. `is_first` says that this writer's bytes were
    /// stored, not an earlier writer's.
    pub fn wrote(&self, stream: Stream, is_first: bool, bytes: usize, took: Duration) {
        let Publishing { bytes: stored, took: times, .. } = &self.0.publishing;
        if is_first {
            stored.get_or_create(&By(stream)).inc_by(bytes as u64);
        }
        times.get_or_create(&By(stream)).observe(seconds(took));
    }

    /// Counts an attempt to publish that was not confirmed, and is made again.
    pub fn not_confirmed(&self, stream: Stream, reason: Unconfirmed) {
        self.0.publishing.unconfirmed.get_or_create(&(By(stream), By(reason))).inc();
    }
}
