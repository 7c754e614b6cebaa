//! What workers and sinks did since their start, as their logs tell it.

/// What a worker did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkCounts {
    /// Batches all of whose rows are stored in the stream.
    pub batches: u64,
    /// Ids whose rows are stored in the stream.
    pub ids: u64,
    /// Dead letters among them.
    pub dead: u64,
    /// Arrivals of batches after the first.
    pub redelivered: u64,
    /// Ids that took longer than their soft limit.
    pub slow: u64,
    /// Batches, or parts of them, that were computed one id at a time.
    pub isolated: u64,
    /// Ids that ended their process, or had to be ended with it.
    pub crashed: u64,
    /// Messages that are no batch of ours, kept apart.
    pub set_aside: u64,
}

/// What a sink did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SinkCounts {
    /// Rows confirmed by ClickHouse.
    pub rows: u64,
    /// Messages of rows that were acked because of that.
    pub messages: u64,
    /// Inserts made.
    pub inserts: u64,
    /// Inserts that failed or whose outcome was unknown.
    pub failed_inserts: u64,
    /// Arrivals of messages after the first.
    pub redelivered: u64,
    /// Messages that are no batch of ours, kept apart.
    pub set_aside: u64,
}
