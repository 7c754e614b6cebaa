//! Moments and lengths of time, as an operator writes and reads them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}

/// A moment that an operator named.
///
/// Two moments are equal when their words are: a command that repeats `10m` a minute later is still the same request,
/// so it can continue what the first one began.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The operator's words.
    pub words: String,
    /// What the words meant when the operator gave them, in milliseconds since 1970.
    pub at_ms: u64,
}

impl PartialEq for Moment {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl Moment {
    /// Parses a moment of RFC 3339, or a length of time before `now_ms`: `90s`, `10m`, `2h`, `3d`.
    pub fn parse(words: &str, now_ms: u64) -> Option<Self> {
        let at_ms = match ago(words) {
            Some(ago) => now_ms.saturating_sub(ago),
            None => since_1970_ms(OffsetDateTime::parse(words, &Rfc3339).ok()?),
        };
        Some(Self { words: words.to_owned(), at_ms })
    }
}

/// The milliseconds of a length such as `10m`.
fn ago(words: &str) -> Option<u64> {
    let number = words.trim_end_matches(|symbol: char| symbol.is_ascii_alphabetic());
    let unit: u64 = match &words[number.len()..] {
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 3600 * 1000,
        "d" => 86400 * 1000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// Milliseconds since 1970; 0 for an earlier moment.
pub(crate) fn since_1970_ms(moment: OffsetDateTime) -> u64 {
    u64::try_from(moment.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}

/// The moment in the type that NATS takes; 1970 if it is beyond the calendar.
pub(crate) fn calendar(at_ms: u64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// The moment as text, to the second: `2026-11-25T18:03:00Z`.
pub fn shown(at_ms: u64) -> String {
    let seconds = calendar(at_ms / 1000 * 1000);
    seconds.format(&Rfc3339).unwrap_or_else(|_| format!("{at_ms} ms after 1970"))
}

/// The length of time as text, in the largest unit that divides it: `30 d`, `90 s`.
pub fn length(time: Duration) -> String {
    let seconds = time.as_secs();
    let (unit, name) = [(86400, "d"), (3600, "h"), (60, "min")]
        .into_iter()
        .find(|(unit, _)| seconds > 0 && seconds.is_multiple_of(*unit))
        .unwrap_or((1, "s"));
    format!("{} {name}", seconds / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_operators_write_them() {
        let now = 1_795_621_875_015;
        let table = [
            ("90s", Some(now - 90_000)),
            ("10m", Some(now - 600_000)),
            ("2h", Some(now - 7_200_000)),
            ("3d", Some(now - 259_200_000)),
            ("99999999d", Some(0)),
            ("2026-11-25T15:51:15.015Z", Some(now)),
            ("2026-11-25T16:51:15.015+01:00", Some(now)),
            ("1950-01-01T00:00:00Z", Some(0)),
            ("2026-11-25", None),
            ("yesterday", None),
            ("m", None),
            ("-1m", None),
            ("10 m", None),
            ("ü", None),
            ("", None),
        ];
        for (words, at_ms) in table {
            assert_eq!(Moment::parse(words, now).map(|moment| moment.at_ms), at_ms, "{words}");
        }
        assert_eq!(shown(now), "2026-11-25T15:51:15Z");
        assert_eq!(Moment::parse("10m", now), Moment::parse("10m", now + 5));
    }

    #[test]
    fn lengths_are_shown_in_their_largest_unit() {
        let table =
            [(0, "0 s"), (59, "59 s"), (90, "90 s"), (120, "2 min"), (7200, "2 h"), (30 * 86400, "30 d")];
        for (seconds, text) in table {
            assert_eq!(length(Duration::from_secs(seconds)), text);
        }
    }
}
