//! What is said of runs and machines to a person: status, what holds a run up, what a machine can do.

pub mod bottleneck;
pub mod status;
pub mod tune;
