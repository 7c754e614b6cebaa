//! Writes one number, text or byte string into a value of fixed width or a `String`.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::fault::{ValueFault, shown};
use super::moment::{self, DATE32_DAYS, DATETIME64_SECONDS, Moment};
use super::values::Values;
use super::wide::Wide;
use crate::schema::ColumnType;

const NANOS: i128 = 1_000_000_000;

/// Writes a whole number of any Rust type into a column of any number type.
pub(super) fn put_whole(
    kind: &ColumnType,
    values: &mut Values,
    number: Wide,
    text: &dyn Display,
) -> Result<(), ValueFault> {
    let within = |fits: bool| if fits { Ok(()) } else { Err(ValueFault::value(&text.to_string(), kind, "")) };
    let small = || number.small();
    match kind {
        ColumnType::Int(int) => within(number.fits(int.width(), int.is_signed()))?,
        ColumnType::Decimal { precision, .. } => within(number.has_digits(*precision))?,
        ColumnType::Date => within(number.fits(2, false))?,
        ColumnType::DateTime(_) | ColumnType::Ipv4 => within(number.fits(4, false))?,
        ColumnType::Date32 => within(small().is_some_and(|days| DATE32_DAYS.contains(&days)))?,
        ColumnType::DateTime64(digits, zone) => {
            within(small().is_some_and(|ticks| is_moment(ticks, *digits, zone.as_deref())))?;
        }
        ColumnType::Enum(known) => {
            let found = small().and_then(|number| i16::try_from(number).ok());
            within(found.is_some_and(|number| known.has(number)))?;
        }
        ColumnType::Float64 | ColumnType::Float32 => {
            let float = number.exact_float();
            let fits =
                float.is_some_and(|float| *kind == ColumnType::Float64 || f64::from(float as f32) == float);
            within(fits)?;
            return put_float(kind, values, float.unwrap_or_default());
        }
        _ => return Err(ValueFault::kind(format!("the number {}", shown(&text.to_string())), kind)),
    }
    put_fixed(values, &number.to_le_bytes());
    Ok(())
}

/// Whether a number of ticks is within the years that the server reads back.
pub(super) fn is_moment(ticks: i64, digits: u8, zone: Option<&str>) -> bool {
    is_read_back(ticks.div_euclid(10i64.pow(u32::from(digits))), zone)
}

/// The server limits the years in the column's own time zone, so one day less at both ends is safe in all
/// zones.
fn is_read_back(seconds: i64, zone: Option<&str>) -> bool {
    const DAY: i64 = 24 * 3600;
    let first = *DATETIME64_SECONDS.start();
    let last = *DATETIME64_SECONDS.end();
    if zone.is_some_and(|zone| !is_utc(zone)) {
        (first + DAY..=last - DAY).contains(&seconds)
    } else {
        (first..=last).contains(&seconds)
    }
}

/// Appends the first bytes of `bytes`, as many as a value of the column has.
fn put_fixed(values: &mut Values, bytes: &[u8]) {
    if let Values::Fixed { width, bytes: held } = values {
        held.extend_from_slice(&bytes[..*width as usize]);
    }
}

pub(super) fn put_bool(kind: &ColumnType, values: &mut Values, flag: bool) -> Result<(), ValueFault> {
    match kind {
        ColumnType::Bool => {
            put_fixed(values, &[u8::from(flag)]);
            Ok(())
        }
        _ => Err(ValueFault::kind(format!("the bool {flag}"), kind)),
    }
}

/// Writes a float, into a narrower column only if that loses nothing.
pub(super) fn put_float(kind: &ColumnType, values: &mut Values, float: f64) -> Result<(), ValueFault> {
    match kind {
        ColumnType::Float64 => put_fixed(values, &float.to_le_bytes()),
        ColumnType::Float32 if f64::from(float as f32) == float || float.is_nan() => {
            put_fixed(values, &(float as f32).to_le_bytes());
        }
        ColumnType::Float32 => {
            return Err(ValueFault::value(&float.to_string(), kind, "it would be rounded"));
        }
        _ => return Err(ValueFault::kind(format!("the float {float}"), kind)),
    }
    Ok(())
}

/// Writes a 128-bit number, which may also be a UUID or an IPv6 address.
pub(super) fn put_u128(kind: &ColumnType, values: &mut Values, number: u128) -> Result<(), ValueFault> {
    match kind {
        ColumnType::Uuid => put_fixed(values, &uuid_bytes(number)),
        ColumnType::Ipv6 => put_fixed(values, &number.to_be_bytes()),
        _ => return put_whole(kind, values, Wide::from(number), &number),
    }
    Ok(())
}

pub(super) fn put_bytes(kind: &ColumnType, values: &mut Values, found: &[u8]) -> Result<(), ValueFault> {
    match (kind, values) {
        (ColumnType::String, Values::Texts { ends, bytes }) => {
            bytes.extend_from_slice(found);
            ends.push(bytes.len() as u64);
            Ok(())
        }
        (ColumnType::FixedString(length), values) if *length == found.len() => {
            put_fixed(values, found);
            Ok(())
        }
        (ColumnType::FixedString(_), _) => Err(wrong_length(kind, found.len())),
        (ColumnType::Uuid | ColumnType::Ipv6, values) => match found.try_into() {
            Ok(octets) => put_u128(kind, values, u128::from_be_bytes(octets)),
            Err(_) => Err(wrong_length(kind, found.len())),
        },
        _ => Err(ValueFault::kind(format!("a byte string of {} bytes", found.len()), kind)),
    }
}

/// The fault of a value whose length differs from the column's.
pub(super) fn wrong_length(kind: &ColumnType, length: usize) -> ValueFault {
    let value = format!("a value of {length} byte{}", if length == 1 { "" } else { "s" });
    ValueFault::value(&value, kind, "its length must be exact")
}

/// Writes text, or parses it in the form that common crates use for the column's type.
pub(super) fn put_text(kind: &ColumnType, values: &mut Values, text: &str) -> Result<(), ValueFault> {
    let fault = |why: &str| ValueFault::value(&format!("`{}`", shown(text)), kind, why);
    match kind {
        ColumnType::String => put_bytes(kind, values, text.as_bytes())?,
        ColumnType::FixedString(length) if *length == text.len() => put_fixed(values, text.as_bytes()),
        ColumnType::FixedString(_) => {
            return Err(fault(&format!("it has {} bytes, and the length must be exact", text.len())));
        }
        ColumnType::Enum(known) => {
            put_fixed(values, &known.number(text).ok_or_else(|| fault(""))?.to_le_bytes());
        }
        ColumnType::Uuid => put_fixed(values, &uuid_bytes(parse_uuid(text).ok_or_else(|| fault(""))?)),
        ColumnType::Ipv4 => {
            let address: Ipv4Addr = text.parse().map_err(|_| fault(""))?;
            put_fixed(values, &address.to_bits().to_le_bytes());
        }
        ColumnType::Ipv6 => {
            let address = match text.parse().map_err(|_| fault(""))? {
                IpAddr::V6(address) => address,
                IpAddr::V4(address) => address.to_ipv6_mapped(),
            };
            put_fixed(values, &Ipv6Addr::octets(&address));
        }
        ColumnType::Decimal { precision, scale } => {
            let number = Wide::parse_decimal(text, *precision, *scale).map_err(fault)?;
            put_fixed(values, &number.to_le_bytes());
        }
        ColumnType::Int(int) if int.width() == 32 => {
            let number =
                Wide::parse(text).ok_or_else(|| fault("it is not a whole number of at most 256 bits"))?;
            put_whole(kind, values, number, &text)?;
        }
        ColumnType::Date | ColumnType::Date32 => {
            let days = moment::parse_date(text).ok_or_else(|| fault("a date is written as 2024-12-31"))?;
            put_days(kind, values, days).map_err(|()| fault(""))?;
        }
        ColumnType::DateTime(zone) | ColumnType::DateTime64(_, zone) => {
            let moment = moment::parse_moment(text)
                .ok_or_else(|| fault("a time is written as 2024-12-31T23:59:59.123+01:00"))?;
            if !moment.has_offset() && zone.as_deref().is_some_and(|zone| !is_utc(zone)) {
                return Err(fault("it has no offset from UTC, and the column's time zone is not UTC"));
            }
            put_moment(kind, values, moment).map_err(fault)?;
        }
        _ => return Err(ValueFault::kind(format!("the text `{}`", shown(text)), kind)),
    }
    Ok(())
}

fn is_utc(zone: &str) -> bool {
    matches!(zone, "UTC" | "Etc/UTC" | "GMT" | "Etc/GMT" | "Zulu")
}

fn put_days(kind: &ColumnType, values: &mut Values, days: i64) -> Result<(), ()> {
    match kind {
        ColumnType::Date => put_fixed(values, &u16::try_from(days).map_err(|_| ())?.to_le_bytes()),
        _ if DATE32_DAYS.contains(&days) => put_fixed(values, &days.to_le_bytes()),
        _ => return Err(()),
    }
    Ok(())
}

fn put_moment(kind: &ColumnType, values: &mut Values, moment: Moment) -> Result<(), &'static str> {
    const LOST: &str = "its seconds have more decimal places than the column";
    match kind {
        ColumnType::DateTime64(digits, zone) => {
            if !is_read_back(moment.seconds(), zone.as_deref()) {
                return Err("");
            }
            let unit = 10i128.pow(u32::from(9 - digits.min(&9)));
            let nanos = i128::from(moment.seconds()) * NANOS + i128::from(moment.nanos);
            if nanos % unit != 0 {
                return Err(LOST);
            }
            put_fixed(values, &i64::try_from(nanos / unit).map_err(|_| "")?.to_le_bytes());
        }
        _ if moment.nanos != 0 => return Err(LOST),
        _ => put_fixed(values, &u32::try_from(moment.seconds()).map_err(|_| "")?.to_le_bytes()),
    }
    Ok(())
}

/// A UUID's bytes as ClickHouse stores them: two little-endian words, the high one first.
fn uuid_bytes(number: u128) -> [u8; 16] {
    number.rotate_left(64).to_le_bytes()
}

/// Parses 32 hex digits, with all four hyphens of a UUID or without any.
fn parse_uuid(text: &str) -> Option<u128> {
    let text = text.as_bytes();
    let hyphens = [8, 13, 18, 23];
    let hyphenated = text.len() == 36 && hyphens.iter().all(|place| text[*place] == b'-');
    if !hyphenated && text.len() != 32 {
        return None;
    }
    let mut number = 0u128;
    for (place, symbol) in text.iter().enumerate() {
        if hyphenated && hyphens.contains(&place) {
            continue;
        }
        number = number << 4 | u128::from(char::from(*symbol).to_digit(16)?);
    }
    Some(number)
}
