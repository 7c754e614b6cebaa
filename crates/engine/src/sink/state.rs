//! State that the sink and the sealer of one process share.

use super::bells::Bells;
use super::left::Left;
use super::waits::Waits;
use crate::telemetry::metrics::Metrics;

/// State that the sink and the sealer of one process share.
#[derive(Debug, Default)]
pub struct SinkState {
    /// The metrics of both.
    pub metrics: Metrics,
    /// Rows that the table does not take, and why.
    pub left: Left,
    /// Passes that the sealer cannot seal, and why.
    pub waits: Waits,
    /// Signals between the two.
    pub(crate) bells: Bells,
}

impl SinkState {
    /// Empty state with these metrics.
    pub fn counted_by(metrics: Metrics) -> Self {
        Self { metrics, ..Self::default() }
    }
}
