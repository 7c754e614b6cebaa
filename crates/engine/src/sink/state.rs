//! What the sink and the sealer of one process share.

use super::bells::Bells;
use super::left::Left;
use super::waits::Waits;
use crate::telemetry::metrics::Metrics;

/// What the sink and the sealer of one process share.
#[derive(Debug, Default)]
pub struct SinkState {
    /// Where both count what they do.
    pub metrics: Metrics,
    /// Rows that the table does not take, and why.
    pub left: Left,
    /// Passes that the sealer cannot seal, and why.
    pub waits: Waits,
    /// What the two tell each other.
    pub(crate) bells: Bells,
}

impl SinkState {
    /// Nothing is left and nothing waits yet; what is done is counted here.
    pub fn counted_by(metrics: Metrics) -> Self {
        Self { metrics, ..Self::default() }
    }
}
