//! What each process tells the others of itself: where its time goes, and that it is alive.

pub mod heartbeat;
pub(crate) mod times;
