//! All that is asked of ClickHouse: [`sql`] spells it, [`store`] asks it.
//!
//! Promises: each answer has a time limit, and a fault says whether the statement may have had an effect. Knows nothing of NATS.

pub mod sql;
pub mod store;
