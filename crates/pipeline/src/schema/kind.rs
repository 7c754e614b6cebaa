//! The column types that rows can be written to.

use std::fmt;

/// A parsed ClickHouse type. `Display` spells it as ClickHouse does in `system.columns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnType {
    /// `Bool`.
    Bool,
    /// `Int8` to `UInt256`.
    Int(Int),
    /// `Float32`.
    Float32,
    /// `Float64`.
    Float64,
    /// `Decimal(P, S)`: a number multiplied by ten to the S, of the width that P digits need.
    Decimal {
        /// The total number of digits.
        precision: u8,
        /// The number of digits after the point.
        scale: u8,
    },
    /// `Date`: days since 1970 as UInt16.
    Date,
    /// `Date32`: days since 1970 as Int32.
    Date32,
    /// `DateTime`: seconds since 1970 as UInt32; with its time zone, if it has one.
    DateTime(Option<String>),
    /// `DateTime64(P)`: ticks of ten to the -P seconds as Int64; with its time zone, if it has one.
    DateTime64(u8, Option<String>),
    /// `Enum8` or `Enum16`.
    Enum(EnumType),
    /// `UUID`.
    Uuid,
    /// `IPv4`.
    Ipv4,
    /// `IPv6`.
    Ipv6,
    /// `String`.
    String,
    /// `FixedString(n)`.
    FixedString(usize),
    /// `Array(T)`.
    Array(Box<ColumnType>),
    /// `Nullable(T)`.
    Nullable(Box<ColumnType>),
    /// `LowCardinality(T)`.
    LowCardinality(Box<ColumnType>),
    /// `Tuple(T, ..)` or `Tuple(a T, ..)`: either all parts have names or none has.
    Tuple(Vec<Part>),
    /// `Map(K, V)`: the types of key and value.
    Map(Box<(ColumnType, ColumnType)>),
}

/// One part of a tuple.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The name of the part; empty in a tuple without names.
    pub name: String,
    /// The type of the part.
    pub kind: ColumnType,
}

/// The whole-number types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are ClickHouse's types of the same name")]
pub enum Int {
    U8,
    U16,
    U32,
    U64,
    U128,
    U256,
    I8,
    I16,
    I32,
    I64,
    I128,
    I256,
}

impl Int {
    const NAMES: [(Self, &'static str); 12] = [
        (Self::U8, "UInt8"),
        (Self::U16, "UInt16"),
        (Self::U32, "UInt32"),
        (Self::U64, "UInt64"),
        (Self::U128, "UInt128"),
        (Self::U256, "UInt256"),
        (Self::I8, "Int8"),
        (Self::I16, "Int16"),
        (Self::I32, "Int32"),
        (Self::I64, "Int64"),
        (Self::I128, "Int128"),
        (Self::I256, "Int256"),
    ];

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, spelled)| *spelled == name).map(|(int, _)| *int)
    }

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(int, _)| *int == self).map_or("", |(_, name)| name)
    }

    /// Whether the type has values below zero.
    pub fn is_signed(self) -> bool {
        matches!(self, Self::I8 | Self::I16 | Self::I32 | Self::I64 | Self::I128 | Self::I256)
    }

    /// The number of bytes of a value.
    pub fn width(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 => 4,
            Self::U64 | Self::I64 => 8,
            Self::U128 | Self::I128 => 16,
            Self::U256 | Self::I256 => 32,
        }
    }
}

/// The values of an Enum, ordered by number as ClickHouse keeps them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnumType {
    /// Whether the type is an `Enum16`.
    pub wide: bool,
    /// Names and numbers, at least one.
    pub values: Vec<(String, i16)>,
}

impl EnumType {
    /// The number of a name.
    pub fn number(&self, name: &str) -> Option<i16> {
        self.values.iter().find(|(known, _)| known == name).map(|(_, number)| *number)
    }

    /// Whether the Enum has this number.
    pub fn has(&self, number: i16) -> bool {
        self.values.binary_search_by_key(&number, |(_, known)| *known).is_ok()
    }

    /// The value with the smallest number, which is ClickHouse's default of the type.
    pub fn first(&self) -> i16 {
        self.values.first().map_or(0, |(_, number)| *number)
    }
}

impl ColumnType {
    /// The number of bytes of a value, for types with values of one width.
    pub fn width(&self) -> Option<usize> {
        Some(match self {
            Self::Bool => 1,
            Self::Int(int) => int.width(),
            Self::Date => 2,
            Self::Float32 | Self::Date32 | Self::DateTime(_) | Self::Ipv4 => 4,
            Self::Float64 | Self::DateTime64(..) => 8,
            Self::Uuid | Self::Ipv6 => 16,
            Self::Enum(values) => 1 + usize::from(values.wide),
            Self::Decimal { precision: ..=9, .. } => 4,
            Self::Decimal { precision: ..=18, .. } => 8,
            Self::Decimal { precision: ..=38, .. } => 16,
            Self::Decimal { .. } => 32,
            Self::FixedString(length) => *length,
            Self::LowCardinality(inner) => return inner.width(),
            Self::String | Self::Array(_) | Self::Nullable(_) | Self::Tuple(_) | Self::Map(_) => return None,
        })
    }

    /// The type inside `LowCardinality(T)`; any other type itself.
    pub fn plain(&self) -> &Self {
        match self {
            Self::LowCardinality(inner) => inner,
            other => other,
        }
    }
}

impl fmt::Display for ColumnType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("Bool"),
            Self::Int(int) => f.write_str(int.name()),
            Self::Float32 => f.write_str("Float32"),
            Self::Float64 => f.write_str("Float64"),
            Self::Decimal { precision, scale } => write!(f, "Decimal({precision}, {scale})"),
            Self::Date => f.write_str("Date"),
            Self::Date32 => f.write_str("Date32"),
            Self::DateTime(None) => f.write_str("DateTime"),
            Self::DateTime(Some(zone)) => write!(f, "DateTime({})", Quoted(zone)),
            Self::DateTime64(digits, None) => write!(f, "DateTime64({digits})"),
            Self::DateTime64(digits, Some(zone)) => write!(f, "DateTime64({digits}, {})", Quoted(zone)),
            Self::Enum(values) => values.fmt(f),
            Self::Uuid => f.write_str("UUID"),
            Self::Ipv4 => f.write_str("IPv4"),
            Self::Ipv6 => f.write_str("IPv6"),
            Self::String => f.write_str("String"),
            Self::FixedString(length) => write!(f, "FixedString({length})"),
            Self::Array(inner) => write!(f, "Array({inner})"),
            Self::Nullable(inner) => write!(f, "Nullable({inner})"),
            Self::LowCardinality(inner) => write!(f, "LowCardinality({inner})"),
            Self::Tuple(parts) => write_parts("Tuple", parts, f),
            Self::Map(pair) => write!(f, "Map({}, {})", pair.0, pair.1),
        }
    }
}

/// Writes `Tuple(a UInt8, b String)`; also `Nested(..)`.
pub(super) fn write_parts(name: &str, parts: &[Part], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{name}(")?;
    for (index, part) in parts.iter().enumerate() {
        f.write_str(if index == 0 { "" } else { ", " })?;
        match &part.name[..] {
            "" => write!(f, "{}", part.kind)?,
            name => write!(f, "{name} {}", part.kind)?,
        }
    }
    f.write_str(")")
}

impl fmt::Display for EnumType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.wide { "Enum16(" } else { "Enum8(" })?;
        for (index, (name, number)) in self.values.iter().enumerate() {
            write!(f, "{}{} = {number}", if index == 0 { "" } else { ", " }, Quoted(name))?;
        }
        f.write_str(")")
    }
}

/// A quoted literal in ClickHouse's syntax.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("'")?;
        for symbol in self.0.chars() {
            match symbol {
                '\'' => f.write_str("\\'")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                '\0' => f.write_str("\\0")?,
                '\x08' => f.write_str("\\b")?,
                '\x0C' => f.write_str("\\f")?,
                plain => write!(f, "{plain}")?,
            }
        }
        f.write_str("'")
    }
}
