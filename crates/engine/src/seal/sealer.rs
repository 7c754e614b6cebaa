//! What every step to a seal has: the servers, and the sink beside it.

use std::sync::Arc;

use crate::session::Session;
use crate::sink::{SinkCounts, Waits};

#[derive(Clone)]
pub(super) struct Sealer {
    pub session: Session,
    pub counts: Arc<SinkCounts>,
}

impl Sealer {
    /// What keeps passes from their seal.
    pub fn waits(&self) -> &Waits {
        &self.counts.waits
    }
}
