//! What a pipeline allows each of its ids: attempts, time, memory.

use std::time::Duration;

/// What each id of a pipeline may take, and whether it is computed alone.
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
    /// How often an id is tried that answers [`Failure::Retry`](crate::Failure::Retry), the first time included.
    pub attempts: u32,
    /// For how long an id is tried at least, from its first attempt on, whatever `attempts` says: a service that it needs
    /// may be away for a while. With one attempt it is not tried again.
    pub retry_for: Duration,
    /// The pause before the second attempt; it doubles for each further one, with jitter.
    pub first_pause: Duration,
    /// The longest pause between two attempts.
    pub longest_pause: Duration,
    /// An id that takes longer is warned about and counted.
    pub soft: Option<Duration>,
    /// An id that takes longer is ended and becomes a dead letter.
    pub hard: Option<Duration>,
    /// An id that takes more bytes of memory is ended and becomes a dead letter. Without a limit, a core's share of the
    /// host's memory is what ends it.
    pub memory: Option<u64>,
    /// How long [`Pipeline::start`](crate::Pipeline::start) may take.
    pub start_within: Duration,
    /// Rows that are done wait no longer than this for the rest of their batch: then they are stored in parts, again and
    /// again, and a worker that draws the batch after a restart computes what is left.
    pub rows_wait: Duration,
    /// Whether ids are always computed alone, one child process a core: for functions that crash often, or whose
    /// threads, global state or native libraries do not stand company.
    pub isolate: bool,
}

/// The smallest memory limit: below it an idle process has no room.
pub const LEAST_MEMORY: u64 = 16 << 20;

/// The shortest wait of rows: each time, a batch is cut into more messages.
pub const LEAST_ROWS_WAIT: Duration = Duration::from_secs(1);

impl Limits {
    /// Five attempts and a minute of them at least, a warning after a minute, ten minutes to start, no other limit; rows wait
    /// for a minute.
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

    /// What is wrong with them, one entry a fault.
    pub fn faults(&self) -> Vec<String> {
        let zero = Some(Duration::ZERO);
        let checks = [
            (self.attempts == 0, "attempts: an id needs at least one".to_owned()),
            (
                self.first_pause > self.longest_pause,
                format!("first_pause: {:?} is longer than longest_pause", self.first_pause),
            ),
            (self.soft == zero || self.hard == zero, "soft, hard: no id takes no time".to_owned()),
            (self.start_within.is_zero(), "start_within: no start takes no time".to_owned()),
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
    fn every_fault_is_told() {
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
