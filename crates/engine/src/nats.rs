//! Every request to NATS: streams, consumers, messages, and the bucket of records.
//!
//! Promises: each request has a time limit, and a message is written once ([`broker::Broker::write_once`]).
//! This layer knows nothing of ClickHouse, of computing, or of what a run needs next.

pub(crate) mod answer;
pub mod broker;
pub mod bucket;
pub(crate) mod delivery;
pub(crate) mod pass_watch;
pub(crate) mod quarantine;
