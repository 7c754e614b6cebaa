//! What every step to a seal has: the servers, and the sink beside it.

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
    /// What keeps passes from their seal.
    pub fn waits(&self) -> &Waits {
        &self.state.waits
    }

    /// Where it is counted what this sealer does.
    pub fn metrics(&self) -> &Metrics {
        &self.state.metrics
    }
}
