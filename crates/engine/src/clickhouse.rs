//! Every request to ClickHouse: [`sql`] builds the SQL, [`store`] sends it.
//!
//! Promises: each request has a time limit, and an error says whether the statement may have had an effect.
//! This layer knows nothing of NATS.

pub mod sql;
pub mod store;
