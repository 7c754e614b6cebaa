//! How long to wait before trying again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Exponential waits with jitter, from `first` up to `most`, for as long as it takes.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    most: Duration,
}

impl Backoff {
    /// Waits that begin near `first`, double each time, and stay near `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, first, most }
    }

    /// The wait before the next attempt: between half of the step and the whole of it, so that many hosts that failed
    /// together do not come back together.
    pub fn wait(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.most);
        step / 2 + (step / 2).mul_f64(random_unit())
    }

    /// Begins anew after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A number in 0..1. `RandomState` is seeded by the system and differs at each call, which is all that jitter needs.
fn random_unit() -> f64 {
    (RandomState::new().hash_one(0u8) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_begin_anew() {
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(first, most);
        let waits: Vec<Duration> = (0..20).map(|_| backoff.wait()).collect();
        assert!(waits[0] <= first && waits[0] >= first / 2, "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= most), "{waits:?}");
        assert!(waits[10] >= most / 2, "{waits:?}");
        backoff.reset();
        assert!(backoff.wait() <= first);
    }
}
