//! What an operator reads about runs and machines: status, the bottleneck of a run, the capacity of a machine.

pub mod bottleneck;
pub mod status;
pub mod tune;
