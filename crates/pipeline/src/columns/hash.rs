//! A hash of each row's values that ClickHouse computes too.
//!
//! [`Columns::fold_hashes`](super::Columns::fold_hashes) continues ClickHouse's `cityHash64` of several
//! arguments; [`hash_arguments`] gives the further arguments as SQL. A value becomes one argument, a tuple one
//! for each part.
//!
//! | type | argument in SQL |
//! |---|---|
//! | `Bool`, integers of up to 64 bits, `Enum`, `Date`, `Date32`, `DateTime` | the value itself |
//! | all other types of fixed width, `String` | `xxHash64(x)` |
//! | `Nullable(T)` | a constant for NULL, else `cityHash64` of the value's arguments |
//! | `Array(T)` | `cityHash64` of its length and of the sum of each item's `cityHash64(place, …)` |
//! | `Map(K, V)` | `cityHash64` of its length and of the sum of each pair's `cityHash64(…)`: in any order |
//! | `Tuple(..)` | the arguments of its parts |

use twox_hash::XxHash64;

use super::values::{Values, range};
use crate::schema::{ColumnType, Part};

/// The hash that stands for NULL.
const NULL: u64 = 0x9E37_79B9_7F4A_7C15;

/// The `cityHash64` arguments of a column.
pub(crate) fn hash_arguments(column: &str, kind: &ColumnType) -> String {
    arguments(column, kind, 0)
}

fn arguments(value: &str, kind: &ColumnType, depth: usize) -> String {
    match kind.plain() {
        kind if is_number(kind) => value.to_owned(),
        ColumnType::Nullable(held) => {
            let held = arguments(&format!("assumeNotNull({value})"), held, depth);
            format!("if(isNull({value}), {NULL}, cityHash64({held}))")
        }
        ColumnType::Array(held) => {
            let item = arguments(&format!("v{depth}"), held, depth + 1);
            format!(
                "cityHash64(length({value}), arraySum((i{depth}, v{depth}) -> cityHash64(i{depth}, {item}), \
                 arrayEnumerate({value}), {value}))"
            )
        }
        ColumnType::Map(pair) => {
            let key = arguments(&format!("k{depth}"), &pair.0, depth + 1);
            let held = arguments(&format!("v{depth}"), &pair.1, depth + 1);
            format!(
                "cityHash64(length({value}), arraySum((k{depth}, v{depth}) -> cityHash64({key}, {held}), \
                 mapKeys({value}), mapValues({value})))"
            )
        }
        ColumnType::Tuple(parts) => {
            let part = |(index, part): (usize, &Part)| {
                arguments(&format!("tupleElement({value}, {})", index + 1), &part.kind, depth)
            };
            parts.iter().enumerate().map(part).collect::<Vec<_>>().join(", ")
        }
        _ => format!("xxHash64({value})"),
    }
}

/// Whether `cityHash64` takes the type as a number, by the bits of its width.
fn is_number(kind: &ColumnType) -> bool {
    match kind {
        ColumnType::Int(int) => int.width() <= 8,
        ColumnType::Bool
        | ColumnType::Enum(_)
        | ColumnType::Date
        | ColumnType::Date32
        | ColumnType::DateTime(_) => true,
        _ => false,
    }
}

/// Continues the hash of each row with the values of one column.
pub(super) fn fold(kind: &ColumnType, values: &Values, hashes: &mut [u64]) {
    let kind = kind.plain();
    match (kind, values) {
        (kind, Values::Fixed { width, bytes }) if is_number(kind) => match width {
            1 => fold_numbers::<1>(bytes, hashes),
            2 => fold_numbers::<2>(bytes, hashes),
            4 => fold_numbers::<4>(bytes, hashes),
            _ => fold_numbers::<8>(bytes, hashes),
        },
        _ => {
            for (row, hash) in hashes.iter_mut().enumerate() {
                *hash = fold_value(Some(*hash), kind, values, row);
            }
        }
    }
}

fn fold_numbers<const WIDTH: usize>(bytes: &[u8], hashes: &mut [u64]) {
    for (hash, value) in hashes.iter_mut().zip(bytes.as_chunks::<WIDTH>().0) {
        *hash = combine(*hash, int_hash(number(value)));
    }
}

/// Continues the hashes with one array of a `Nested`.
pub(super) fn fold_array(held: &ColumnType, ends: &[u64], items: &Values, hashes: &mut [u64]) {
    for (row, hash) in hashes.iter_mut().enumerate() {
        *hash = combine(*hash, int_hash(array(held, ends, items, row)));
    }
}

/// `cityHash64(before, arguments of the value)`; without `before`, of the arguments alone.
fn fold_value(before: Option<u64>, kind: &ColumnType, values: &Values, row: usize) -> u64 {
    let then = |argument| {
        let hash = int_hash(argument);
        before.map_or(hash, |before| combine(before, hash))
    };
    match (kind.plain(), values) {
        (ColumnType::Tuple(parts), Values::Tuple(columns)) => {
            let all = parts.iter().zip(columns);
            let fold =
                |before, (part, values): (&Part, &Values)| Some(fold_value(before, &part.kind, values, row));
            all.fold(before, fold).unwrap_or_default()
        }
        (kind, Values::Fixed { width, bytes }) => {
            let width = *width as usize;
            let value = &bytes[row * width..(row + 1) * width];
            then(if is_number(kind) { number(value) } else { XxHash64::oneshot(0, value) })
        }
        (_, Values::Texts { ends, bytes }) => then(XxHash64::oneshot(0, &bytes[range(ends, row)])),
        (ColumnType::Nullable(held), Values::Nullable { nulls, values }) => {
            then(if nulls[row] != 0 { NULL } else { fold_value(None, held, values, row) })
        }
        (ColumnType::Array(held), Values::Array { ends, items }) => then(array(held, ends, items, row)),
        (ColumnType::Map(pair), Values::Array { ends, items }) => then(map(pair, ends, items, row)),
        _ => {
            debug_assert!(false, "values of another type than their column's");
            then(0)
        }
    }
}

fn array(held: &ColumnType, ends: &[u64], items: &Values, row: usize) -> u64 {
    let places = range(ends, row);
    let item = |(index, place)| fold_value(Some(int_hash(index)), held, items, place);
    let sum = (1..).zip(places.clone()).map(item).fold(0, u64::wrapping_add);
    combine(int_hash(places.len() as u64), int_hash(sum))
}

fn map(pair: &(ColumnType, ColumnType), ends: &[u64], items: &Values, row: usize) -> u64 {
    let places = range(ends, row);
    let entry = |place| match items {
        Values::Tuple(parts) => match &parts[..] {
            [keys, values] => {
                fold_value(Some(fold_value(None, &pair.0, keys, place)), &pair.1, values, place)
            }
            _ => 0,
        },
        _ => 0,
    };
    let sum = places.clone().map(entry).fold(0, u64::wrapping_add);
    combine(int_hash(places.len() as u64), int_hash(sum))
}

fn number(value: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..value.len()].copy_from_slice(value);
    u64::from_le_bytes(bytes)
}

/// ClickHouse's `intHash64`, which is what `cityHash64` does with a number
/// (<https://github.com/ClickHouse/ClickHouse/blob/master/src/Functions/FunctionsHashing.h>).
pub(crate) fn int_hash(number: u64) -> u64 {
    let mut hash = number ^ 0x4CF2_D2BA_AE6D_A887;
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    hash ^ hash >> 33
}

/// Combines two hashes as `cityHash64` does for its arguments: CityHash's `Hash128to64`.
pub(crate) fn combine(before: u64, next: u64) -> u64 {
    const MULTIPLIER: u64 = 0x9DDF_EA08_EB38_2D69;
    let mut low = (before ^ next).wrapping_mul(MULTIPLIER);
    low ^= low >> 47;
    let mut high = (next ^ low).wrapping_mul(MULTIPLIER);
    high ^= high >> 47;
    high.wrapping_mul(MULTIPLIER)
}

/// `cityHash64` of numbers of up to 64 bits, for the arguments before the columns; signed ones by the bits of
/// their width.
pub fn city_hash_of_numbers(numbers: &[u64]) -> u64 {
    let hashes = numbers.iter().map(|number| int_hash(*number));
    hashes.reduce(combine).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of ClickHouse 26.5; `tests/tests/types.rs` asks a live engine for every type.
    #[test]
    fn numbers_hash_as_in_clickhouse() {
        assert_eq!(city_hash_of_numbers(&[5]), 15_228_578_409_069_794_350);
        assert_eq!(city_hash_of_numbers(&[u64::from(-5i32 as u32)]), 8_954_968_404_612_619_233);
        assert_eq!(city_hash_of_numbers(&[5, 6]), 10_790_318_008_068_292_761);
        assert_eq!(city_hash_of_numbers(&[1, 2, 3]), 5_148_486_779_656_494_228);
    }
}
