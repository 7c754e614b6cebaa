//! Parses dates and times as text: RFC 3339, and the forms that common crates write.

use std::ops::RangeInclusive;

const DAY: i64 = 86_400;

/// The days of `Date32`: 1900-01-01 to 2299-12-31
/// (<https://clickhouse.com/docs/sql-reference/data-types/date32>).
pub(crate) const DATE32_DAYS: RangeInclusive<i64> = -25_567..=120_529;

/// The seconds of `DateTime64`, for the same years as `Date32`.
pub(crate) const DATETIME64_SECONDS: RangeInclusive<i64> = -25_567 * DAY..=120_530 * DAY - 1;

/// A local date and time, with its offset from UTC if the text had one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// Seconds since 1970 in local time.
    local: i64,
    /// Nanoseconds of the second.
    pub(crate) nanos: u32,
    /// The offset from UTC in seconds.
    offset: Option<i64>,
}

impl Moment {
    /// Seconds since 1970 in UTC: a text without an offset counts as UTC.
    pub(crate) fn seconds(&self) -> i64 {
        self.local - self.offset.unwrap_or(0)
    }

    pub(crate) fn has_offset(&self) -> bool {
        self.offset.is_some()
    }
}

/// Parses a date such as `2024-02-29` into days since 1970; `None` for other text.
pub(crate) fn parse_date(text: &str) -> Option<i64> {
    let mut reader = Reader(text.as_bytes());
    reader.date().filter(|_| reader.0.is_empty())
}

/// Parses `2024-02-29T12:34:56.789+01:00`. A `T` or a blank separates date and time. Seconds, their fraction
/// and the offset may be missing. The offset is `Z`, `UTC`, `+01`, `+0100`, `+01:00` or `+01:00:00`, and a time
/// zone in brackets may follow.
pub(crate) fn parse_moment(text: &str) -> Option<Moment> {
    let mut reader = Reader(text.as_bytes());
    let days = reader.date()?;
    if !(reader.take(b'T') || reader.take(b't') || reader.take(b' ')) {
        return None;
    }
    let hour = reader.digits(1, 2)?;
    let minute = if reader.take(b':') { reader.digits(2, 2)? } else { return None };
    let second = if reader.take(b':') { reader.digits(2, 2)? } else { 0 };
    let nanos = if reader.take(b'.') { reader.fraction()? } else { 0 };
    if hour > 23 || minute > 59 || second > 59 {
        return None; // a column cannot hold a leap second
    }
    let offset = reader.offset()?;
    let zoned = reader.brackets();
    if !reader.0.is_empty() || (zoned && offset.is_none()) {
        return None;
    }
    Some(Moment { local: days * DAY + hour * 3600 + minute * 60 + second, nanos, offset })
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, symbol: u8) -> bool {
        match self.0.split_first() {
            Some((first, rest)) if *first == symbol => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    /// Parses a number of `least` to `most` digits.
    fn digits(&mut self, least: usize, most: usize) -> Option<i64> {
        let there = self.0.iter().take(most).take_while(|symbol| symbol.is_ascii_digit()).count();
        let (digits, rest) = self.0.split_at(there);
        self.0 = rest;
        (there >= least).then(|| digits.iter().fold(0, |number, digit| number * 10 + i64::from(digit - b'0')))
    }

    fn date(&mut self) -> Option<i64> {
        let year = self.digits(4, 4)?;
        let month = if self.take(b'-') { self.digits(2, 2)? } else { return None };
        let day = if self.take(b'-') { self.digits(2, 2)? } else { return None };
        (1..=12).contains(&month).then_some(())?;
        (1..=days_in(year, month)).contains(&day).then(|| days_since_1970(year, month, day))
    }

    /// Parses the digits after the point as nanoseconds; more than nine digits only if the rest are zeros.
    fn fraction(&mut self) -> Option<u32> {
        let there = self.0.iter().take_while(|symbol| symbol.is_ascii_digit()).count();
        let (digits, rest) = self.0.split_at(there);
        self.0 = rest;
        let lost = digits.iter().skip(9).any(|digit| *digit != b'0');
        let padded = digits.iter().copied().chain(std::iter::repeat(b'0')).take(9);
        let nanos = padded.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
        (there > 0 && !lost).then_some(nanos)
    }

    /// Parses an offset: `Some(None)` if there is none, `None` for other text.
    fn offset(&mut self) -> Option<Option<i64>> {
        self.take(b' ');
        if self.take(b'Z') || self.take(b'z') {
            return Some(Some(0));
        }
        if let Some(rest) = self.0.strip_prefix(b"UTC") {
            self.0 = rest;
            return Some(Some(0));
        }
        let sign = match () {
            () if self.take(b'+') => 1,
            () if self.take(b'-') => -1,
            () => return Some(None),
        };
        let hours = self.digits(2, 2)?;
        let (minutes, seconds) = match self.0.first() {
            Some(b':') => {
                (self.colon_digits()?, if self.0.first() == Some(&b':') { self.colon_digits()? } else { 0 })
            }
            Some(b'0'..=b'9') => (self.digits(2, 2)?, 0),
            _ => (0, 0),
        };
        (hours <= 25 && minutes <= 59 && seconds <= 59)
            .then_some(Some(sign * (hours * 3600 + minutes * 60 + seconds)))
    }

    fn colon_digits(&mut self) -> Option<i64> {
        if self.take(b':') { self.digits(2, 2) } else { None }
    }

    /// Skips a time zone in brackets, such as `[Europe/Berlin]`.
    fn brackets(&mut self) -> bool {
        let mut any = false;
        while self.0.first() == Some(&b'[')
            && let Some(end) = self.0.iter().position(|symbol| *symbol == b']')
        {
            self.0 = &self.0[end + 1..];
            any = true;
        }
        any
    }
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01, from years that begin in March
/// (<https://howardhinnant.github.io/date_algorithms.html>).
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_days_since_1970() {
        let table = [
            ("1970-01-01", Some(0)),
            ("1969-12-31", Some(-1)),
            ("2000-02-29", Some(11_016)),
            ("1900-01-01", Some(*DATE32_DAYS.start())),
            ("2299-12-31", Some(*DATE32_DAYS.end())),
            ("1900-02-29", None),
            ("2024-13-01", None),
            ("2024-1-1", None),
            ("2024-01-01T00:00:00Z", None),
        ];
        for (text, days) in table {
            assert_eq!(parse_date(text), days, "{text}");
        }
    }

    #[test]
    fn moments_are_read_as_the_usual_crates_write_them() {
        let table = [
            ("1970-01-01T00:00:01Z", Some((1, 0))),
            ("1970-01-01T00:00:01.5+00:00", Some((1, 500_000_000))),
            ("1970-01-01T01:00:00+01:00", Some((0, 0))),
            ("1969-12-31T19:00:00-05:00[America/New_York]", Some((0, 0))),
            ("1970-01-01 0:00:00.0 +00:00:00", Some((0, 0))),
            ("1970-01-01 00:00:00 UTC", Some((0, 0))),
            ("1970-01-01T00:00:00.000000001", Some((0, 1))),
            ("1970-01-01T00:00:00.0000000010Z", Some((0, 1))),
            ("1970-01-01T00:00:00.0000000001Z", None),
            ("1970-01-01T00:00:00[Europe/Berlin]", None),
            ("1970-01-01T23:59:60Z", None),
            ("1970-01-01", None),
            ("1970-01-01T00:00:00Z and more", None),
        ];
        for (text, want) in table {
            let found = parse_moment(text).map(|moment| (moment.seconds(), moment.nanos));
            assert_eq!(found, want, "{text}");
        }
    }
}
