//! Durations and sizes, within bounds: one grammar for flags, the environment and the file, and for the bounds that are printed.

use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;
use millstream_engine::model::moment::{duration, length};

/// What is wrong with a duration or a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UnitFault {
    /// A bare number where a duration is wanted.
    #[error("`{0}` has no unit: write \"{0}s\", or a duration such as \"250ms\", \"10m\" or \"1h30m\"")]
    BareDuration(String),
    /// No duration.
    #[error("`{0}` is not a duration such as \"250ms\", \"10m\" or \"1h30m\"")]
    Duration(String),
    /// A bare number where a size is wanted.
    #[error("`{0}` has no unit: write \"{0}B\", or a size such as \"32MiB\" or \"16GiB\"")]
    BareSize(String),
    /// No size.
    #[error("`{0}` is not a size such as \"32MiB\" or \"16GiB\"")]
    Size(String),
    /// Beyond the bounds.
    #[error("`{given}` is outside {bounds}")]
    Outside {
        /// What was given.
        given: String,
        /// What is taken, in the same grammar.
        bounds: String,
    },
}

/// Durations that are taken, both bounds included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Durations {
    pub least: Duration,
    pub most: Duration,
    /// Whether zero is taken too, and stands for "not at all".
    pub or_none: bool,
}

/// Sizes in bytes that are taken, both bounds included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub least: u64,
    pub most: u64,
}

impl Durations {
    /// From so long to so long.
    pub const fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, or_none: false }
    }

    /// Reads one.
    ///
    /// # Errors
    /// Why it is not taken, and the right form.
    pub fn read(&self, text: &str) -> Result<Duration, UnitFault> {
        let given = || text.to_owned();
        let time = duration(text).ok_or_else(|| {
            if is_bare(text) { UnitFault::BareDuration(given()) } else { UnitFault::Duration(given()) }
        })?;
        let fits = (self.least..=self.most).contains(&time) || (self.or_none && time.is_zero());
        if fits { Ok(time) } else { Err(UnitFault::Outside { given: given(), bounds: self.to_string() }) }
    }
}

impl Sizes {
    /// Reads one, as a number of bytes.
    ///
    /// # Errors
    /// Why it is not taken, and the right form.
    pub fn read(&self, text: &str) -> Result<u64, UnitFault> {
        let given = || text.to_owned();
        if is_bare(text) {
            return Err(UnitFault::BareSize(given()));
        }
        // What is too large for 64 bits becomes the largest number, which no bounds take.
        let ByteSize(bytes) = text.parse().map_err(|_| UnitFault::Size(given()))?;
        let fits = (self.least..=self.most).contains(&bytes);
        if fits { Ok(bytes) } else { Err(UnitFault::Outside { given: given(), bounds: self.to_string() }) }
    }
}

impl fmt::Display for Durations {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = if self.or_none { ", and 0s" } else { "" };
        write!(out, "{} to {}{or_none}", length(self.least), length(self.most))
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} to {}", size(self.least), size(self.most))
    }
}

/// Bytes as [`Sizes`] reads them: `32 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    format!("{:.0}", ByteSize(bytes).display().iec())
}

fn is_bare(text: &str) -> bool {
    let text = text.trim();
    !text.is_empty() && text.chars().all(|symbol| symbol.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Durations = Durations::new(Duration::from_secs(1), Duration::from_secs(3600));
    const SIZES: Sizes = Sizes { least: 1 << 20, most: 1 << 50 };

    #[test]
    fn durations_are_read_within_their_bounds() {
        for (text, millis) in
            [("1s", 1000), ("1500ms", 1500), ("1.5s", 1500), ("10 min", 600_000), ("1h", 3_600_000)]
        {
            assert_eq!(TIMES.read(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        let kept = Durations { or_none: true, ..TIMES };
        assert_eq!((kept.read("0s"), kept.read("2s")), (Ok(Duration::ZERO), Ok(Duration::from_secs(2))));
    }

    #[test]
    fn sizes_are_read_within_their_bounds() {
        let table = [("16GiB", 16 << 30), ("5 MB", 5_000_000), ("1.5MiB", 3 << 19), ("1PiB", 1 << 50)];
        for (text, bytes) in table {
            assert_eq!(SIZES.read(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_taken_is_refused_by_name_with_the_right_form() {
        let table = [
            ("10 parsecs", "`10 parsecs` is not a duration such as \"250ms\", \"10m\" or \"1h30m\""),
            ("10", "`10` has no unit: write \"10s\", or a duration such as \"250ms\", \"10m\" or \"1h30m\""),
            ("", "`` is not a duration"),
            ("-1s", "`-1s` is not a duration"),
            ("1e9y", "`1e9y` is not a duration"),
            ("1.", "`1.` is not a duration"),
            ("99999999999999999999s", "`99999999999999999999s` is not a duration"),
            ("18446744073709551615s1000ms", "`18446744073709551615s1000ms` is not a duration"),
            ("61m", "`61m` is outside 1s to 1h"),
            ("0s", "`0s` is outside 1s to 1h"),
            ("10M", "`10M` is not a duration"),
            ("99999999999w", "`99999999999w` is outside 1s to 1h"),
        ];
        for (text, says) in table {
            let fault = TIMES.read(text).expect_err(text).to_string();
            assert!(fault.starts_with(says), "{fault}");
        }
        let table = [
            ("12 parsecs", "`12 parsecs` is not a size such as \"32MiB\" or \"16GiB\""),
            (
                "1048576",
                "`1048576` has no unit: write \"1048576B\", or a size such as \"32MiB\" or \"16GiB\"",
            ),
            ("", "`` is not a size"),
            ("-1MiB", "`-1MiB` is not a size"),
            ("1e9GB", "`1e9GB` is not a size"),
            ("MiB", "`MiB` is not a size"),
            ("5KB", "`5KB` is outside 1 MiB to 1 PiB"),
            ("99999999999999999999PB", "`99999999999999999999PB` is outside 1 MiB to 1 PiB"),
        ];
        for (text, says) in table {
            let fault = SIZES.read(text).expect_err(text).to_string();
            assert!(fault.starts_with(says), "{fault}");
        }
    }
}
