//! Metrics of a sink.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use super::{ANSWERS, Metrics, ROWS, Registering, of_answers, seconds};
use crate::error::Class;
use crate::model::counts::SinkCounts;
use crate::model::host::Cause;
use crate::telemetry::labels::{By, Label, Outcome, Stage};

pub(super) struct Sink {
    inserts: Family<By<Outcome>, Counter>,
    took: Family<By<Outcome>, Histogram>,
    rows: Counter,
    bytes: Counter,
    sizes: Histogram,
    asks: Histogram,
    confirmed_rows: Counter,
    confirmed_messages: Counter,
    not_taken: Family<By<Cause>, Counter>,
    lacking_views: Counter,
    waiting: Gauge,
}

impl Sink {
    pub fn new(registry: &mut Registering) -> Self {
        Self {
            inserts: registry.counters("sink_inserts", "Inserts into the rows table, by outcome", None),
            took: registry.histograms("sink_insert", "Time until ClickHouse answers an insert", of_answers),
            rows: registry.counter("sink_inserted_rows", "Rows of inserts that ClickHouse accepted", None),
            bytes: registry.counter(
                "sink_inserted",
                "Compressed bytes of inserts that ClickHouse accepted",
                Some(Unit::Bytes),
            ),
            sizes: registry.histogram(
                "sink_insert_rows",
                "Rows of an insert that ClickHouse accepted",
                None,
                &ROWS,
            ),
            asks: registry.histogram(
                "sink_ask",
                "Time until ClickHouse says which rows of a group are stored",
                Some(Unit::Seconds),
                &ANSWERS,
            ),
            confirmed_rows: registry.counter(
                "sink_confirmed_rows",
                "Rows that ClickHouse said are stored, and whose messages are acked",
                None,
            ),
            confirmed_messages: registry.counter(
                "sink_confirmed_messages",
                "Messages whose rows ClickHouse said are stored, and which are acked",
                None,
            ),
            not_taken: registry.counters(
                "sink_refused_messages",
                "Messages that ended with a nak because the table does not accept their rows, by cause",
                None,
            ),
            lacking_views: registry.counter(
                "sink_view_faults",
                "Materialized views that may lack rows which are stored, once a view and insert",
                None,
            ),
            waiting: registry.gauge("sink_waiting_inserts", "Groups of rows that wait for an insert to end"),
        }
    }
}

impl Metrics {
    /// Counts an insert that ClickHouse accepted.
    pub fn inserted(&self, rows: u64, bytes: u64, took: Duration) {
        let sink = &self.0.sink;
        self.answered(Outcome::Accepted, took);
        sink.rows.inc_by(rows);
        sink.bytes.inc_by(bytes);
        sink.sizes.observe(rows as f64);
    }

    /// Counts an insert that failed, or whose outcome is unknown.
    pub fn insert_failed(&self, class: Class, took: Duration) {
        self.answered(class.into(), took);
    }

    fn answered(&self, outcome: Outcome, took: Duration) {
        self.0.sink.inserts.get_or_create(&By(outcome)).inc();
        self.0.sink.took.get_or_create(&By(outcome)).observe(seconds(took));
    }

    /// Counts an answer of ClickHouse about the stored rows of a group.
    pub fn asked(&self, took: Duration) {
        self.0.sink.asks.observe(seconds(took));
    }

    /// Counts a message whose rows are stored, as ClickHouse answered.
    pub fn confirmed(&self, rows: u64) {
        self.0.sink.confirmed_rows.inc_by(rows);
        self.0.sink.confirmed_messages.inc();
    }

    /// Counts messages that the sink naks because the table does not accept their rows.
    pub fn not_taken(&self, cause: Cause, messages: usize) {
        self.0.sink.not_taken.get_or_create(&By(cause)).inc_by(messages as u64);
    }

    /// Counts materialized views that may lack rows of an insert.
    pub fn views_lack_rows(&self, views: usize) {
        self.0.sink.lacking_views.inc_by(views as u64);
    }

    /// A group of rows waits for its insert.
    pub fn group_waits(&self) {
        self.0.sink.waiting.inc();
    }

    /// The insert of a waiting group begins.
    pub fn group_begins(&self) {
        self.0.sink.waiting.dec();
    }

    /// The sink's counts since its start.
    pub fn sink_counts(&self) -> SinkCounts {
        let sink = &self.0.sink;
        let inserts = |outcome: &Outcome| sink.inserts.get_or_create(&By(*outcome)).get();
        let accepted = inserts(&Outcome::Accepted);
        let all: u64 = Outcome::ALL.iter().map(inserts).sum();
        SinkCounts {
            rows: sink.confirmed_rows.get(),
            messages: sink.confirmed_messages.get(),
            inserts: all,
            failed_inserts: all - accepted,
            redelivered: self.redelivered(Stage::Sink),
            set_aside: self.quarantined(Stage::Sink),
        }
    }
}
