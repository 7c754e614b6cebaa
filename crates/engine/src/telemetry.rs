//! What an operator graphs and traces.
//!
//! Owns the metrics of a process, with every name, help text and label, and the trace context that travels with a batch.
//! Promises that counting costs a few atomic additions a batch or insert, never one an id, and that the number of series is
//! fixed. Lacks a server and an exporter: [`Metrics::to_text`](metrics::Metrics::to_text) is what one would serve.

pub mod labels;
pub mod metrics;
pub mod trace;
