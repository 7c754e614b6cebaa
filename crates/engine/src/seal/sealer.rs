//! What every step to a seal uses: the servers, and the sink of this process.

use std::sync::Arc;

use crate::session::Session;
use crate::sink::{SinkState, Waits};
use crate::telemetry::metrics::Metrics;

#[derive(Clone)]
pub(super) struct Sealer {
    pub session: Session,
    pub state: Arc<SinkState>,
}

impl Sealer {
    /// The reasons that keep passes from their seal.
    pub fn waits(&self) -> &Waits {
        &self.state.waits
    }

    /// The metrics of this sealer.
    pub fn metrics(&self) -> &Metrics {
        &self.state.metrics
    }
}
