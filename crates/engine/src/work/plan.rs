//! A worker's settings.

use std::time::Duration;

use millstream::Limits;

use crate::compute::Place;

/// A worker's settings.
#[derive(Debug, Clone)]
pub struct WorkPlan {
    /// Compute threads.
    pub threads: usize,
    /// Which process computes.
    pub place: Place,
    /// Limits for each id.
    pub limits: Limits,
    /// How long held batches may take to finish after a stop.
    pub drain: Duration,
}
