//! What workers and sinks did since their start, as they log it.

/// What a worker did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkCounts {
    /// Batches whose rows are all stored in the stream.
    pub batches: u64,
    /// Ids whose rows are stored in the stream.
    pub ids: u64,
    /// Dead letters among these ids.
    pub dead: u64,
    /// Redeliveries: arrivals of batches after the first.
    pub redelivered: u64,
    /// Ids that took longer than their soft limit.
    pub slow: u64,
    /// Batches, or split rows messages of them, that were computed one id at a time.
    pub isolated: u64,
    /// Ids that crashed their process, or whose process the worker had to kill.
    pub crashed: u64,
    /// Messages in quarantine, because they are no batch of this pipeline.
    pub set_aside: u64,
}

/// What a sink did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SinkCounts {
    /// Rows confirmed by ClickHouse.
    pub rows: u64,
    /// Rows messages that the sink acked, because ClickHouse confirmed their rows.
    pub messages: u64,
    /// Inserts made.
    pub inserts: u64,
    /// Inserts that failed or whose outcome was unknown.
    pub failed_inserts: u64,
    /// Redeliveries: arrivals of messages after the first.
    pub redelivered: u64,
    /// Messages in quarantine, because they are no rows of this pipeline.
    pub set_aside: u64,
}
