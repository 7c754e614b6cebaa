//! Rows as columns by name: the form of a batch's rows between the user's function and ClickHouse.
//!
//! [`Columns::push`] serializes each field of a row into the column of its name, and checks it there. If the
//! column cannot hold or read back a value, the result is a [`ValueFault`] and nothing of the row stays. Values
//! are kept in the form of the Native format, so that [`Columns::write_native`] only copies them.
//!
//! # Which Rust value goes into which type
//!
//! Fields are matched by name at every level: those of the row, and those of a struct in it into a `Tuple` or
//! `Nested` with names; their order is free. A value counts as what it serializes as, whatever its type and
//! attributes are. Types with a text form are serialized as text, and the column parses it.
//!
//! | ClickHouse | Rust |
//! |---|---|
//! | `Bool` | `bool` |
//! | `UInt8`, `UInt16`, `UInt32`, `UInt64`, `UInt128` | the unsigned integer of that width, or a smaller one |
//! | `Int8`, `Int16`, `Int32`, `Int64`, `Int128` | the signed integer of that width, or a smaller one |
//! | `UInt256`, `Int256` | any smaller integer, or text: decimal or `0x…`, as `ethnum`, `ruint` and `primitive-types` write it |
//! | `Float32`, `Float64` | `f32`; `f64` into `Float64`; NaN and infinities too |
//! | `Decimal(18, 4)` | `rust_decimal::Decimal` or other text without rounding; an integer is taken as scaled: 15000 is 1.5 |
//! | `Date`, `Date32` | `chrono::NaiveDate`, `jiff::civil::Date`, other text like `2024-12-31`; days since 1970 as `u16`, `i32` |
//! | `DateTime`, `DateTime64(3, 'UTC')` | `chrono::DateTime`, `jiff::Timestamp`, `jiff::Zoned`, `time::OffsetDateTime` with `time::serde::rfc3339`, other RFC 3339 text; seconds since 1970 as `u32`, ticks as `i64` |
//! | `Enum8('low' = 1)`, `Enum16('low' = 1)` | a unit enum or text by name, an integer by number |
//! | `UUID` | `uuid::Uuid`, other text, `[u8; 16]`, `u128` |
//! | `IPv4` | `Ipv4Addr`, other text, `u32` |
//! | `IPv6` | `Ipv6Addr`, `IpAddr`, other text, `[u8; 16]`, `u128` |
//! | `String` | `String`, `&str`, `char`, unit enums, all with a text form; bytes through `serde_bytes` |
//! | `FixedString(16)` | `[u8; 16]`, text or bytes of exactly that length |
//! | `Nullable(UInt8)` | `Option<T>`, or a `T` that is always there |
//! | `LowCardinality(String)` | what the type within takes: `String`, `FixedString`, `UUID`, or `Nullable` of them |
//! | `Array(UInt8)` | `Vec<T>`, `[T; N]`, sets; bytes through `serde_bytes` into `Array(UInt8)` |
//! | `Tuple(UInt8, String)` | a tuple, by place |
//! | `Tuple(a UInt8, b String)` | a struct by the names of its fields, or a tuple by place |
//! | `Map(String, UInt8)` | `HashMap<K, V>`, `BTreeMap<K, V>` |
//! | `Nested(a UInt8, b String)` | `Vec<T>` of a struct: one field fills the columns `n.a`, `n.b` |
//!
//! Nothing is rounded, cut or wrapped. A time without an offset counts as UTC, and a column with another time
//! zone refuses it. `Date32` and `DateTime64` hold the years 1900 to 2299. An integer or a float goes into a
//! narrower column if its value fits exactly. If the row's type shows that some values may not fit, the check at
//! the start refuses the column. `None` needs a `Nullable` column. A dead letter has blanks, like ClickHouse's
//! defaults: zeros, empty values, NULLs, and the value of an Enum with the smallest number.
//!
//! # What is refused, and what to use instead
//!
//! | ClickHouse | instead |
//! |---|---|
//! | `JSON` | String |
//! | `Variant(String, UInt8)` | a Nullable column for each type |
//! | `Dynamic` | String |
//! | `Time` | Int32 |
//! | `Time64(3)` | Int64 |
//! | `Point` | Tuple(Float64, Float64) |
//! | `Ring`, `LineString` | Array(Tuple(Float64, Float64)) |
//! | `Polygon`, `MultiLineString` | Array(Array(Tuple(Float64, Float64))) |
//! | `AggregateFunction(sum, UInt8)`, `SimpleAggregateFunction(sum, UInt64)` | the value itself |
//! | `BFloat16` | Float32 |
//! | `QBit(Float32, 3)` | Array(Float32) |
//! | `IntervalDay` | Int64 |
//! | `LowCardinality(UInt64)` | leave it away |
//! | `Nullable(Array(UInt8))`, `Nullable(Tuple(UInt8))` | an empty one stands for none |
//! | `FixedString(300)` | use String |
//!
//! Enums with fields (`Kind::Known { .. }`) have no column: give the row a field for each part, or one text. A
//! struct does not go into a tuple without names, because its fields are matched by name. `Vec<u8>` is a list of
//! numbers; for a `String` column serialize it as bytes.

mod cell;
mod compound;
mod fault;
mod hash;
mod moment;
mod row;
mod scalar;
mod sound;
mod values;
mod wide;
mod write;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::schema::{ColumnType, Schema};

pub use fault::ValueFault;
pub(crate) use fault::shown;
pub use hash::city_hash_of_numbers;
pub(crate) use hash::hash_arguments;
use row::RowCells;
use values::Values;

/// Rows of a pipeline's own columns. Postcard carries them between processes; rows from another process must
/// pass [`is_sound`](Self::is_sound) before anything else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Columns {
    rows: usize,
    /// One entry for each field of the schema: a `Nested` is one field.
    values: Vec<Values>,
}

impl Columns {
    /// Columns without rows.
    pub fn of(schema: &Schema) -> Self {
        Self::with_room(schema, 0)
    }

    /// Columns without rows, with capacity for `rows`.
    pub fn with_room(schema: &Schema, rows: usize) -> Self {
        Self { rows: 0, values: schema.fields().iter().map(|part| Values::of(&part.kind, rows)).collect() }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The bytes that the rows' values take in memory.
    pub fn bytes(&self) -> usize {
        self.values.iter().map(Values::bytes).sum()
    }

    /// Appends a row, each field to the column of its name. After an error, or a panic in the row's
    /// `Serialize`, nothing of the row stays.
    ///
    /// # Errors
    /// [`ValueFault`]: a field that is missing, has no column, or holds what its column cannot.
    #[inline]
    pub fn push<R: Serialize + ?Sized>(&mut self, schema: &Schema, row: &R) -> Result<(), ValueFault> {
        let rows = self.rows;
        let unfinished = Unfinished { columns: self };
        row.serialize(RowCells { parts: schema.fields(), values: &mut unfinished.columns.values, rows })?;
        unfinished.columns.rows += 1;
        std::mem::forget(unfinished);
        Ok(())
    }

    /// Appends the row of a dead letter, which has blanks: zeros, empty values, NULLs, and the first value of
    /// an Enum.
    pub fn push_blank(&mut self, schema: &Schema) {
        for (values, part) in self.values.iter_mut().zip(schema.fields()) {
            values.push_blank(&part.kind);
        }
        self.rows += 1;
    }

    /// Removes all but the first `rows` rows.
    pub fn truncate(&mut self, rows: usize) {
        self.rows = self.rows.min(rows);
        self.values.iter_mut().for_each(|values| values.truncate(rows));
    }

    /// Appends the rows of `other`, which has the same schema.
    pub fn append(&mut self, other: Self) {
        self.rows += other.rows;
        self.values.iter_mut().zip(other.values).for_each(|(values, more)| values.append(more));
    }

    /// A copy of some consecutive rows.
    ///
    /// # Panics
    /// When there are not that many rows.
    pub fn slice(&self, rows: Range<usize>) -> Self {
        let values = self.values.iter().map(|values| values.slice(rows.clone())).collect();
        Self { rows: rows.len(), values }
    }

    /// The rows at the positions in `order`, in that order.
    ///
    /// # Panics
    /// When a position is beyond the last row.
    pub fn reordered(&self, order: &[u32]) -> Self {
        let order: Vec<usize> = order.iter().map(|place| *place as usize).collect();
        Self { rows: order.len(), values: self.values.iter().map(|values| values.gather(&order)).collect() }
    }

    /// Whether these are `rows` rows of that schema, each with valid values for its columns. Sound columns can
    /// be passed to every other function.
    pub fn is_sound(&self, schema: &Schema, rows: usize) -> bool {
        let fields = schema.fields();
        self.rows == rows
            && self.values.len() == fields.len()
            && fields
                .iter()
                .zip(&self.values)
                .all(|(part, values)| sound::are_sound(&part.kind, values, rows))
    }

    /// Continues each row's hash with the row's values, as ClickHouse's `cityHash64` does: with
    /// [`Schema::hash_arguments`] as further arguments the server computes the same hashes. `hashes` has one hash
    /// per row.
    pub fn fold_hashes(&self, schema: &Schema, hashes: &mut [u64]) {
        debug_assert_eq!(hashes.len(), self.rows);
        for ((part, nested), values) in schema.fields().iter().zip(schema.nested()).zip(&self.values) {
            match (&part.kind, values) {
                (ColumnType::Array(held), Values::Array { ends, items }) if *nested => {
                    if let (ColumnType::Tuple(parts), Values::Tuple(columns)) = (&**held, &**items) {
                        let arrays = parts.iter().zip(columns);
                        arrays.for_each(|(part, items)| hash::fold_array(&part.kind, ends, items, hashes));
                    }
                }
                (kind, values) => hash::fold(kind, values, hashes),
            }
        }
    }

    /// Appends name, type and values of each column. A block's header goes before the first column
    /// ([`native::begin_block`](crate::native::begin_block)).
    pub fn write_native(&self, schema: &Schema, out: &mut Vec<u8>) {
        for ((part, nested), values) in schema.fields().iter().zip(schema.nested()).zip(&self.values) {
            match &part.kind {
                ColumnType::Array(held) if *nested => {
                    if let ColumnType::Tuple(parts) = &**held {
                        write::write_nested(&part.name, parts, values, out);
                    }
                }
                kind => write::write_column(&part.name, kind, values, out),
            }
        }
    }
}

/// Removes the unfinished row when dropped, also after a panic in the user's `Serialize`.
struct Unfinished<'a> {
    columns: &'a mut Columns,
}

impl Drop for Unfinished<'_> {
    #[cold]
    fn drop(&mut self) {
        let rows = self.columns.rows;
        self.columns.values.iter_mut().for_each(|values| values.truncate(rows));
    }
}

/// Whether a text is a value of the type.
pub(crate) fn reads_text(kind: &ColumnType, text: &str) -> bool {
    scalar::put_text(kind, &mut Values::of(kind, 0), text).is_ok()
}

/// Describes the Rust values that a column takes.
pub(crate) fn takes(kind: &ColumnType) -> String {
    match kind {
        ColumnType::Bool => "a bool".to_owned(),
        ColumnType::Int(int) if int.width() == 32 => "text such as 0x2a or 42, or an integer".to_owned(),
        ColumnType::Int(int) => {
            let sign = if int.is_signed() { 'i' } else { 'u' };
            format!("a {sign}{} or smaller", int.width() * 8)
        }
        ColumnType::Float32 => "a f32".to_owned(),
        ColumnType::Float64 => "a f64 or f32".to_owned(),
        ColumnType::Decimal { .. } => "text such as 12.50, or an integer scaled as the column is".to_owned(),
        ColumnType::Date => "text such as 2024-12-31, or a u16 with the days".to_owned(),
        ColumnType::Date32 => "text such as 2024-12-31, or an i32 with the days".to_owned(),
        ColumnType::DateTime(_) => "text such as 2024-12-31T23:59:59Z, or a u32 with the seconds".to_owned(),
        ColumnType::DateTime64(..) => {
            "text such as 2024-12-31T23:59:59.123Z, or an i64 with the ticks".to_owned()
        }
        ColumnType::Enum(_) => "a unit variant or text with a value's name, or its number".to_owned(),
        ColumnType::Uuid => {
            "text such as 67e55044-10b1-426f-9247-bb680e5fe0c8, 16 bytes, or a u128".to_owned()
        }
        ColumnType::Ipv4 => "text such as 127.0.0.1, or a u32".to_owned(),
        ColumnType::Ipv6 => "text such as ::1, 16 bytes, or a u128".to_owned(),
        ColumnType::String => "text or a byte string".to_owned(),
        ColumnType::FixedString(length) => {
            format!("a [u8; {length}], or text or a byte string of {length} bytes")
        }
        ColumnType::Array(held) => format!("a list, each item {}", takes(held)),
        ColumnType::Nullable(held) => format!("an Option of {}", takes(held)),
        ColumnType::LowCardinality(held) => takes(held),
        ColumnType::Tuple(parts) if parts.iter().any(|part| !part.name.is_empty()) => {
            let names: Vec<&str> = parts.iter().map(|part| &part.name[..]).collect();
            format!("a struct with the fields {}, or a tuple of {}", names.join(", "), parts.len())
        }
        ColumnType::Tuple(parts) => format!("a tuple of {}", parts.len()),
        ColumnType::Map(pair) => format!("a map, each key {}, each value {}", takes(&pair.0), takes(&pair.1)),
    }
}

#[cfg(test)]
mod tests;
