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
    /// Reads a moment of RFC 3339, or a [`duration`] before `now_ms`: `90s`, `10m`, `2h`, `3d`.
    pub fn parse(words: &str, now_ms: u64) -> Option<Self> {
        let at_ms = match duration(words) {
            Some(ago) => now_ms.saturating_sub(u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)),
            None => since_1970_ms(OffsetDateTime::parse(words, &Rfc3339).ok()?),
        };
        Some(Self { words: words.to_owned(), at_ms })
    }
}

/// Reads a duration, numbers with their units: `250ms`, `10m`, `1h30m`, `30d`. A number without a unit is none.
///
/// The grammar is `humantime`'s, for flags, the environment and the file alike, but for its months and years: they have no
/// one length, and `10M` is ten months there.
pub fn duration(text: &str) -> Option<Duration> {
    // Seconds that come to u64::MAX, and nanoseconds to a whole second, make `humantime` 2.4 panic in `Duration::new`. Five
    // numbers of eleven digits cannot come to that, even as years.
    const MOST_DIGITS: usize = 11;
    const UNITS: [&str; 8] = ["ms", "s", "sec", "m", "min", "h", "d", "w"];
    const LONGEST: usize = 60;
    let is_number = |symbol: char| symbol.is_ascii_digit() || symbol.is_whitespace();
    let too_large =
        text.split(|symbol: char| !is_number(symbol)).any(|number| number.trim().len() > MOST_DIGITS);
    let units = text.split(|symbol: char| !symbol.is_ascii_alphabetic()).filter(|unit| !unit.is_empty());
    let is_known = units.into_iter().all(|unit| UNITS.contains(&unit));
    if text.len() > LONGEST || too_large || !is_known || text.chars().all(is_number) {
        return None;
    }
    humantime::parse_duration(text).ok()
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

/// A length of time as [`duration`] reads it, in the largest unit that leaves no rest: `30d`, `90s`, `250ms`.
///
/// Not as `humantime` prints it: that counts months of 30.44 days, so that 45 days are `1month 14days 13h 26m 24s`. What
/// is below a millisecond is left out.
pub fn length(time: Duration) -> String {
    let millis = time.as_millis();
    if millis == 0 {
        return "0s".to_owned();
    }
    let (unit, name) = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")]
        .into_iter()
        .find(|(unit, _)| millis.is_multiple_of(*unit))
        .unwrap_or((1, "ms"));
    format!("{}{name}", millis / unit)
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
            ("10 m", Some(now - 600_000)),
            ("10", None),
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
    fn durations_have_units() {
        let seconds = Duration::from_secs;
        let table = [
            ("250ms", Some(Duration::from_millis(250))),
            ("0s", Some(Duration::ZERO)),
            ("1h30m", Some(seconds(5400))),
            ("1h 30min", Some(seconds(5400))),
            ("30d", Some(seconds(30 * 86400))),
            ("10 parsecs", None),
            // Months for `humantime`.
            ("10M", None),
            ("1y", None),
            ("10", None),
            ("0", None),
            ("", None),
            (" ", None),
            ("s", None),
            ("-1s", None),
            ("1.5h", Some(seconds(5400))),
            ("1.s", None),
            ("1e9y", None),
            ("1s1", None),
            ("99999999999999999999s", None),
            ("99999999999y 99999999999y 99999999999y 99999999999y 99999999999y", None),
            // humantime 2.4 alone would panic.
            ("18446744073709551615s1000ms", None),
            ("584542046090 y 7615615 s 1000 ms", None),
        ];
        for (text, time) in table {
            assert_eq!(duration(text), time, "{text}");
        }
    }

    #[test]
    fn what_is_printed_is_read_again() {
        let table = [
            (0, "0s"),
            (59_000, "59s"),
            (90_000, "90s"),
            (120_000, "2m"),
            (7_200_000, "2h"),
            (30 * 86_400_000, "30d"),
            (250, "250ms"),
            (1_500, "1500ms"),
        ];
        for (millis, text) in table {
            let time = Duration::from_millis(millis);
            assert_eq!((length(time).as_str(), duration(text)), (text, Some(time)));
        }
    }
}
