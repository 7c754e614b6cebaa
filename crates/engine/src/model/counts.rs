//! What a worker counts.

use std::sync::atomic::AtomicU64;

/// What a worker did, counted since its start.
#[derive(Debug, Default)]
pub struct WorkCounts {
    /// Batches whose rows are stored in the stream.
    pub batches: AtomicU64,
    /// Ids in them.
    pub ids: AtomicU64,
    /// Dead letters among their rows.
    pub dead: AtomicU64,
    /// Arrivals after the first.
    pub redelivered: AtomicU64,
    /// Ids that took longer than their soft limit.
    pub slow: AtomicU64,
    /// Batches, or parts of them, that were computed one id at a time.
    pub alone: AtomicU64,
    /// Ids that ended their process, or had to be ended with it.
    pub ended: AtomicU64,
    /// Messages that are no batch of ours, kept apart.
    pub set_aside: AtomicU64,
}
