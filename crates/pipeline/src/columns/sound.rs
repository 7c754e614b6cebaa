//! Checks that values from another process fit their columns.

use super::moment::DATE32_DAYS;
use super::scalar::is_moment;
use super::values::Values;
use super::wide::Wide;
use crate::schema::ColumnType;

/// Whether these are `rows` values of that type, so that every other function may index without checks.
pub(super) fn are_sound(kind: &ColumnType, values: &Values, rows: usize) -> bool {
    match (kind, values) {
        (ColumnType::LowCardinality(held), values) => are_sound(held, values, rows),
        (ColumnType::String, Values::Texts { ends, bytes }) => {
            ends.len() == rows && are_ends(ends, bytes.len())
        }
        (ColumnType::Array(held), Values::Array { ends, items }) => {
            ends.len() == rows
                && items_at(ends).is_some_and(|items_there| are_sound(held, items, items_there))
        }
        (ColumnType::Map(pair), Values::Array { ends, items }) => match &**items {
            Values::Tuple(parts) => match (&parts[..], items_at(ends)) {
                ([keys, values], Some(there)) => {
                    ends.len() == rows && are_sound(&pair.0, keys, there) && are_sound(&pair.1, values, there)
                }
                _ => false,
            },
            _ => false,
        },
        (ColumnType::Nullable(held), Values::Nullable { nulls, values }) => {
            nulls.len() == rows && nulls.iter().all(|null| *null <= 1) && are_sound(held, values, rows)
        }
        (ColumnType::Tuple(parts), Values::Tuple(columns)) => {
            parts.len() == columns.len()
                && parts.iter().zip(columns).all(|(part, values)| are_sound(&part.kind, values, rows))
        }
        (kind, Values::Fixed { width, bytes }) => {
            let wide = *width as usize;
            kind.width() == Some(wide)
                && rows.checked_mul(wide) == Some(bytes.len())
                && are_values(kind, bytes)
        }
        _ => false,
    }
}

fn are_ends(ends: &[u64], length: usize) -> bool {
    ends.is_sorted() && usize::try_from(ends.last().copied().unwrap_or(0)) == Ok(length)
}

/// The number of items that the ends describe.
fn items_at(ends: &[u64]) -> Option<usize> {
    usize::try_from(ends.last().copied().unwrap_or(0)).ok().filter(|length| are_ends(ends, *length))
}

/// Whether each value is one of its type: other values would break readers.
fn are_values(kind: &ColumnType, bytes: &[u8]) -> bool {
    match kind {
        ColumnType::Bool => bytes.iter().all(|flag| *flag <= 1),
        ColumnType::Enum(known) if known.wide => {
            bytes.as_chunks().0.iter().all(|number| known.has(i16::from_le_bytes(*number)))
        }
        ColumnType::Enum(known) => bytes.iter().all(|number| known.has(i16::from(*number as i8))),
        ColumnType::Date32 => {
            let days = |bytes: &[u8; 4]| i64::from(i32::from_le_bytes(*bytes));
            bytes.as_chunks().0.iter().all(|found| DATE32_DAYS.contains(&days(found)))
        }
        ColumnType::DateTime64(digits, zone) => {
            let is_sound = |ticks: &[u8; 8]| is_moment(i64::from_le_bytes(*ticks), *digits, zone.as_deref());
            bytes.as_chunks().0.iter().all(is_sound)
        }
        ColumnType::Decimal { precision, .. } => match kind.width() {
            Some(width) => {
                bytes.chunks_exact(width).all(|value| Wide::from_le_bytes(value).has_digits(*precision))
            }
            None => false,
        },
        _ => true,
    }
}
