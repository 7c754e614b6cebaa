//! The column types that rows can be written to.

use super::Shape;

/// A parsed ClickHouse type, as far as writing it needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnType {
    /// One value of fixed width: the Rust type that writes it, and its width in bytes.
    Fixed(Shape, usize),
    /// `Enum8` or `Enum16`: written as its number; the blank is the first value's.
    Enum(Shape, i16),
    /// `String`.
    String,
    /// `FixedString(n)`.
    FixedString(usize),
    /// `Array(T)`.
    Array(Box<ColumnType>),
    /// `Nullable(T)`.
    Nullable(Box<ColumnType>),
    /// `Tuple(..)`.
    Tuple(Vec<ColumnType>),
    /// `Map(K, V)`.
    Map(Box<ColumnType>, Box<ColumnType>),
}

/// A type that rows cannot be written to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a column type that rows can be written to")]
pub struct TypeFault(pub String);

impl ColumnType {
    /// Reads a type as ClickHouse spells it.
    ///
    /// # Errors
    /// [`TypeFault`] naming the part that is not known.
    pub fn parse(text: &str) -> Result<Self, TypeFault> {
        let text = text.trim();
        let fault = || TypeFault(text.to_owned());
        let (name, arguments) = match text.split_once('(') {
            Some((name, rest)) => (name.trim(), split_arguments(rest.strip_suffix(')').ok_or_else(fault)?)),
            None => (text, Vec::new()),
        };
        let one = || match arguments[..] {
            [inner] => Self::parse(inner),
            _ => Err(fault()),
        };
        Ok(match name {
            "String" => Self::String,
            "FixedString" => match arguments[..] {
                [length] => Self::FixedString(length.parse().map_err(|_| fault())?),
                _ => return Err(fault()),
            },
            "LowCardinality" => one()?,
            "Array" => Self::Array(Box::new(one()?)),
            "Nullable" => Self::Nullable(Box::new(one()?)),
            "Tuple" => Self::Tuple(
                arguments.iter().map(|part| Self::parse(unnamed(part))).collect::<Result<_, _>>()?,
            ),
            "Map" => match arguments[..] {
                [key, value] => Self::Map(Box::new(Self::parse(key)?), Box::new(Self::parse(value)?)),
                _ => return Err(fault()),
            },
            "Enum8" => Self::Enum(Shape::I8, first_enum_value(&arguments).ok_or_else(fault)?),
            "Enum16" => Self::Enum(Shape::I16, first_enum_value(&arguments).ok_or_else(fault)?),
            "Decimal" => decimal(&arguments).ok_or_else(fault)?,
            _ => plain(name).ok_or_else(fault)?,
        })
    }

    /// Whether values of this Rust shape write what the column reads.
    pub fn takes(&self, found: &Shape) -> bool {
        match (self, found) {
            (Self::Fixed(wanted, _) | Self::Enum(wanted, _), _) => wanted == found,
            (Self::String, found) => matches!(found, Shape::Text),
            (Self::FixedString(length), Shape::Tuple(parts)) => {
                parts.len() == *length && parts.iter().all(|part| *part == Shape::U8)
            }
            (Self::Array(inner), Shape::List(found)) | (Self::Nullable(inner), Shape::Optional(found)) => {
                inner.takes(found)
            }
            (Self::Tuple(wanted), Shape::Tuple(found)) => {
                wanted.len() == found.len()
                    && wanted.iter().zip(found).all(|(wanted, found)| wanted.takes(found))
            }
            (Self::Map(key, value), Shape::Map(found_key, found_value)) => {
                key.takes(found_key) && value.takes(found_value)
            }
            _ => false,
        }
    }

    /// The Rust type that [`takes`](Self::takes) asks for, in words.
    pub fn expected(&self) -> String {
        match self {
            Self::Fixed(shape, _) | Self::Enum(shape, _) => shape.to_string(),
            Self::String => Shape::Text.to_string(),
            Self::FixedString(length) => format!("[u8; {length}]"),
            Self::Array(inner) => format!("Vec<{}>", inner.expected()),
            Self::Nullable(inner) => format!("Option<{}>", inner.expected()),
            Self::Tuple(parts) => {
                format!("({})", parts.iter().map(Self::expected).collect::<Vec<_>>().join(", "))
            }
            Self::Map(key, value) => format!("HashMap<{}, {}>", key.expected(), value.expected()),
        }
    }

    /// Appends a blank value as RowBinary: what a dead letter's row holds in this column.
    pub fn write_blank(&self, out: &mut Vec<u8>) {
        match self {
            Self::Fixed(_, width) => out.resize(out.len() + width, 0),
            Self::FixedString(length) => out.resize(out.len() + length, 0),
            Self::Enum(Shape::I8, first) => out.push(*first as u8),
            Self::Enum(_, first) => out.extend_from_slice(&first.to_le_bytes()),
            Self::String | Self::Array(_) | Self::Map(..) => out.push(0),
            Self::Nullable(_) => out.push(1),
            Self::Tuple(parts) => parts.iter().for_each(|part| part.write_blank(out)),
        }
    }
}

fn plain(name: &str) -> Option<ColumnType> {
    let (shape, width) = match name {
        "UInt8" => (Shape::U8, 1),
        "UInt16" | "Date" => (Shape::U16, 2),
        "UInt32" | "DateTime" | "IPv4" => (Shape::U32, 4),
        "UInt64" => (Shape::U64, 8),
        "UInt128" => (Shape::U128, 16),
        "Int8" => (Shape::I8, 1),
        "Int16" => (Shape::I16, 2),
        "Int32" | "Date32" => (Shape::I32, 4),
        "Int64" | "DateTime64" => (Shape::I64, 8),
        "Int128" => (Shape::I128, 16),
        "Float32" => (Shape::F32, 4),
        "Float64" => (Shape::F64, 8),
        "Bool" => (Shape::Bool, 1),
        _ => return None,
    };
    Some(ColumnType::Fixed(shape, width))
}

/// `Decimal(P, S)` is an integer of the width that P digits need, scaled by ten to the S
/// (<https://clickhouse.com/docs/sql-reference/data-types/decimal>).
fn decimal(arguments: &[&str]) -> Option<ColumnType> {
    let digits: u32 = arguments.first()?.parse().ok()?;
    let (shape, width) = match digits {
        1..=9 => (Shape::I32, 4),
        10..=18 => (Shape::I64, 8),
        19..=38 => (Shape::I128, 16),
        _ => return None,
    };
    Some(ColumnType::Fixed(shape, width))
}

fn first_enum_value(arguments: &[&str]) -> Option<i16> {
    arguments.first()?.rsplit_once('=')?.1.trim().parse().ok()
}

/// A tuple's part without its name: `a UInt8` and `UInt8` are the same on the wire.
fn unnamed(part: &str) -> &str {
    match part.split_once(' ') {
        Some((name, rest)) if !name.contains(['(', ',', '\'']) => rest.trim(),
        _ => part,
    }
}

/// Splits at the commas outside of parentheses and quotes.
fn split_arguments(text: &str) -> Vec<&str> {
    let (mut depth, mut quoted, mut start, mut parts) = (0u32, false, 0, Vec::new());
    for (at, symbol) in text.char_indices() {
        match symbol {
            '\'' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth = depth.saturating_sub(1),
            ',' if !quoted && depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_read_as_clickhouse_spells_them() {
        let table = [
            ("UInt128", "u128"),
            ("LowCardinality(String)", "String"),
            ("DateTime64(3, 'Europe/Berlin')", "i64"),
            ("DateTime('UTC')", "u32"),
            ("Decimal(18, 4)", "i64"),
            ("Array(Nullable(Float32))", "Vec<Option<f32>>"),
            ("Tuple(name String, at Array(Tuple(Int8, Int16)))", "(String, Vec<(i8, i16)>)"),
            ("Map(String, UInt8)", "HashMap<String, u8>"),
            ("FixedString(16)", "[u8; 16]"),
            ("Enum8('a,b' = -1, 'c' = 2)", "i8"),
        ];
        for (text, expected) in table {
            assert_eq!(
                ColumnType::parse(text).map(|found| found.expected()),
                Ok(expected.to_owned()),
                "{text}"
            );
        }
        for text in
            ["", "uint8", "Array", "Array(UInt8", "Map(String)", "FixedString(x)", "JSON", "Array(Varchar)"]
        {
            assert!(ColumnType::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn blanks_have_the_width_of_their_type() {
        let table: [(&str, &[u8]); 6] = [
            ("UInt32", &[0; 4]),
            ("Array(UInt64)", &[0]),
            ("Nullable(UInt64)", &[1]),
            ("Tuple(UInt8, String, Nullable(UInt8))", &[0, 0, 1]),
            ("Enum8('a' = -1, 'b' = 2)", &[0xFF]),
            ("Enum16('a' = 258)", &[2, 1]),
        ];
        for (text, blank) in table {
            let mut out = Vec::new();
            ColumnType::parse(text).expect(text).write_blank(&mut out);
            assert_eq!(out, blank, "{text}");
        }
    }
}
