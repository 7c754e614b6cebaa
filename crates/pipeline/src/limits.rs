//! What a pipeline allows each of its ids: attempts, time, memory.

use std::time::Duration;

/// What each id of a pipeline may use, and whether ids are computed in isolated processes.
///
/// Written as a constant over [`Limits::DEFAULT`]; `[work]` in `millstream.toml` overrides it for one installation:
///
/// ```
/// # use millstream::Limits;
/// # use std::time::Duration;
/// const LIMITS: Limits =
///     Limits { hard: Some(Duration::from_secs(30)), memory: Some(512 << 20), ..Limits::DEFAULT };
/// # assert_eq!(LIMITS.faults(), Vec::<String>::new());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most attempts of an id that answers [`Failure::Retry`](crate::Failure::Retry), the first included.
    pub attempts: u32,
    /// The shortest time for which an id is tried, from its first attempt on, whatever `attempts` says: a
    /// service that it needs may be down for a while. With `attempts` 1 the id is not tried again.
    pub retry_for: Duration,
    /// The pause before the second attempt; it doubles for each further one, with jitter.
    pub first_pause: Duration,
    /// The longest pause between two attempts.
    pub longest_pause: Duration,
    /// The soft limit: an id that takes longer is logged and counted.
    pub soft: Option<Duration>,
    /// The hard limit: an id that takes longer is killed and becomes a dead letter.
    pub hard: Option<Duration>,
    /// The memory limit in bytes: an id that uses more is killed and becomes a dead letter. Without it the
    /// limit is one core's share of the host's memory.
    pub memory: Option<u64>,
    /// How long [`Pipeline::start`](crate::Pipeline::start) may take.
    pub start_within: Duration,
    /// The longest time that finished rows wait for the rest of their batch. After it they are stored in
    /// several messages, and a worker that receives the batch after a restart computes only what is left.
    pub rows_wait: Duration,
    /// Whether ids are always computed in isolated processes, one per core: for functions that crash often, or
    /// whose threads, global state or native libraries do not tolerate others.
    pub isolate: bool,
}

/// The smallest memory limit: an idle process needs about this much.
pub const LEAST_MEMORY: u64 = 16 << 20;

/// The shortest `rows_wait`, because each wait splits a batch into more messages.
pub const LEAST_ROWS_WAIT: Duration = Duration::from_secs(1);

impl Limits {
    /// Five attempts and at least a minute of them, a warning after a minute, ten minutes to start, and no
    /// other limit; rows wait for a minute.
    pub const DEFAULT: Self = Self {
        attempts: 5,
        retry_for: Duration::from_secs(60),
        first_pause: Duration::from_millis(200),
        longest_pause: Duration::from_secs(30),
        soft: Some(Duration::from_secs(60)),
        hard: None,
        memory: None,
        start_within: Duration::from_secs(600),
        rows_wait: Duration::from_secs(60),
        isolate: false,
    };

    /// Lists the faults of the limits.
    pub fn faults(&self) -> Vec<String> {
        let zero = Some(Duration::ZERO);
        let checks = [
            (self.attempts == 0, "attempts: an id needs at least one".to_owned()),
            (
                self.first_pause > self.longest_pause,
                format!("first_pause: {:?} is longer than longest_pause", self.first_pause),
            ),
            (
                self.soft == zero || self.hard == zero,
                "soft, hard: a limit must be greater than zero".to_owned(),
            ),
            (self.start_within.is_zero(), "start_within: the limit must be greater than zero".to_owned()),
            (
                self.rows_wait < LEAST_ROWS_WAIT,
                format!("rows_wait: {:?} is less than {LEAST_ROWS_WAIT:?}", self.rows_wait),
            ),
            (
                self.memory.is_some_and(|bytes| bytes < LEAST_MEMORY),
                format!("memory: {} bytes are less than {LEAST_MEMORY}", self.memory.unwrap_or(0)),
            ),
        ];
        checks.into_iter().filter_map(|(wrong, fault)| wrong.then_some(fault)).collect()
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_listed() {
        let limits = Limits {
            attempts: 0,
            first_pause: Duration::from_secs(60),
            hard: Some(Duration::ZERO),
            memory: Some(1),
            start_within: Duration::ZERO,
            rows_wait: Duration::from_millis(999),
            ..Limits::DEFAULT
        };
        assert_eq!(limits.faults().len(), 6, "{:?}", limits.faults());
        assert!(Limits::DEFAULT.faults().is_empty());
    }
}
