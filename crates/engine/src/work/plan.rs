//! How a worker works.

use std::time::Duration;

use millstream::Limits;

use crate::compute::Place;

/// How a worker works.
#[derive(Debug, Clone)]
pub struct WorkPlan {
    /// Compute threads.
    pub threads: usize,
    /// Which process computes.
    pub place: Place,
    /// What each id may take.
    pub limits: Limits,
    /// How long held batches may take to finish after a stop.
    pub drain: Duration,
}
