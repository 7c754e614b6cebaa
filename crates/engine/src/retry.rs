//! Retries, and the waits between them.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use millstream::names::RunName;

use crate::error::{Error, full_cause};
use crate::stop::Stop;

/// Exponential waits with jitter, from `first` up to `most`, without an end.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    most: Duration,
}

impl Backoff {
    /// Waits that start near `first`, double each time, and stay near `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, first, most }
    }

    /// The wait before the next attempt: between half of the step and the whole, so that hosts which failed
    /// together do not retry together.
    pub fn wait(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.most);
        step / 2 + (step / 2).mul_f64(random_unit())
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// First and longest pause between requests to a broker that does not answer.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Repeats a request to the broker without a limit, because what the caller holds is stored nowhere else yet.
///
/// # Errors
/// [`Error::Stopped`]; any error that is not the broker's.
pub(crate) async fn patiently<T, F>(run: &RunName, stop: &Stop, ask: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut pause = Backoff::new(ASK_AGAIN.0, ASK_AGAIN.1);
    loop {
        match ask().await {
            Err(error @ (Error::Broker { .. } | Error::BrokerSilent { .. })) => {
                tracing::warn!(%run, error = full_cause(&error), "NATS did not answer, trying again");
            }
            answer => return answer,
        }
        if !stop.pause(pause.wait()).await {
            return Err(Error::Stopped);
        }
    }
}

/// A random number in 0..1. `RandomState` is seeded by the system and differs at each call, which is enough for
/// jitter.
pub(crate) fn random_unit() -> f64 {
    (RandomState::new().hash_one(0u8) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_reset() {
        let first = Duration::from_millis(100);
        let most = Duration::from_secs(1);
        let mut backoff = Backoff::new(first, most);
        let waits: Vec<Duration> = (0..20).map(|_| backoff.wait()).collect();
        assert!(waits[0] <= first && waits[0] >= first / 2, "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= most), "{waits:?}");
        assert!(waits[10] >= most / 2, "{waits:?}");
        backoff.reset();
        assert!(backoff.wait() <= first);
    }
}
