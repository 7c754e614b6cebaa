//! Ids that an isolated process received ahead, and which of them the worker has given to another process.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream::child::FORGET;

/// Frames received from the worker, as the reading and the computing thread both see them.
#[derive(Debug, Default)]
pub(super) struct Ahead(Mutex<Came>);

#[derive(Debug, Default)]
struct Came {
    /// Ids received so far.
    ids: u64,
    /// Numbers, from 0, of ids that need no answer unless they are begun.
    forgotten: Range<u64>,
}

impl Ahead {
    fn came(&self) -> MutexGuard<'_, Came> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a frame before the computing thread receives it.
    pub fn note(&self, kind: u8, body: &[u8]) {
        let mut came = self.came();
        match (kind, body.try_into()) {
            (FORGET, Ok(kept)) => came.forgotten = u64::from_le_bytes(kept)..came.ids,
            // The computing thread reports a malformed frame.
            (FORGET, Err(_)) => {}
            _ => came.ids += 1,
        }
    }

    /// Whether the id of this number, which is not begun, needs no answer.
    pub fn is_forgotten(&self, number: u64) -> bool {
        self.came().forgotten.contains(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: a process that was slow to begin its first id skipped it, and the worker blamed the id.
    #[test]
    fn the_id_in_flight_is_kept_though_it_is_not_begun() {
        let ahead = Ahead::default();
        let forgotten = |ahead: &Ahead| (0..6).map(|number| ahead.is_forgotten(number)).collect::<Vec<_>>();
        (0..4).for_each(|_| ahead.note(b'C', &[]));
        ahead.note(FORGET, &1u64.to_le_bytes());
        assert_eq!(forgotten(&ahead), [false, true, true, true, false, false]);
        // Later ids are computed.
        ahead.note(b'C', &[]);
        assert!(!ahead.is_forgotten(4));
    }
}
