//! What each process reports to the others: that it is alive, and where its time goes.

pub mod heartbeat;
pub(crate) mod times;
