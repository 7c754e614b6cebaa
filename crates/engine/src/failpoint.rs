//! Places where the fault suite kills or stops its own process. Compiled in only with the feature `failpoints`.
//!
//! `MILLSTREAM_FAIL=sink-after-insert=kill@3,work-after-publish=stop` kills the process at the third passage of
//! the first place, and stops it (SIGSTOP) at the first passage of the second. In any other build a place
//! compiles to nothing.

/// Passes a place. Its name says which step is done and which is not: `sink-after-insert`.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn pass(_place: &'static str) {}

#[cfg(feature = "failpoints")]
pub use armed::pass;

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use nix::sys::signal::{Signal, raise};

    const VARIABLE: &str = "MILLSTREAM_FAIL";

    struct Trap {
        place: String,
        signal: Signal,
        passes: AtomicU64,
        springs_at: u64,
    }

    /// Passes a place, unless `MILLSTREAM_FAIL` sets a trap for this passage.
    ///
    /// # Panics
    /// When `MILLSTREAM_FAIL` cannot be parsed: a suite whose traps are not set would prove nothing.
    pub fn pass(place: &'static str) {
        static TRAPS: OnceLock<Vec<Trap>> = OnceLock::new();
        let traps = TRAPS.get_or_init(|| {
            let text = std::env::var(VARIABLE).unwrap_or_default();
            text.split(',').filter(|part| !part.is_empty()).map(read).collect()
        });
        for trap in traps.iter().filter(|trap| trap.place == place) {
            if trap.passes.fetch_add(1, Ordering::SeqCst) + 1 == trap.springs_at {
                tracing::warn!(place, signal = trap.signal.as_str(), "failpoint");
                // To this thread: another thread could receive a signal to the process, and this thread would
                // run on meanwhile.
                raise(trap.signal).expect("a process may signal itself");
            }
        }
    }

    fn read(text: &str) -> Trap {
        let (place, action) =
            text.split_once('=').unwrap_or_else(|| panic!("{VARIABLE}: `{text}` has no action"));
        let (action, at) = action.split_once('@').unwrap_or((action, "1"));
        let signal = match action {
            "kill" => Signal::SIGKILL,
            "stop" => Signal::SIGSTOP,
            _ => panic!("{VARIABLE}: `{action}` is neither kill nor stop"),
        };
        let springs_at = at.parse().unwrap_or_else(|_| panic!("{VARIABLE}: `{at}` is not a number"));
        Trap { place: place.to_owned(), signal, passes: AtomicU64::new(0), springs_at }
    }
}
