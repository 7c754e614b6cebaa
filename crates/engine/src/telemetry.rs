//! Metrics and traces for operators.
//!
//! This module owns the metrics of a process, with every name, help text and label, and the trace context that
//! travels with a batch. Counting costs a few atomic additions per batch or insert, never per id, and the
//! number of series is fixed. There is no server and no exporter here:
//! [`Metrics::to_text`](metrics::Metrics::to_text) is the text that one would serve.

pub mod labels;
pub mod metrics;
pub mod trace;
