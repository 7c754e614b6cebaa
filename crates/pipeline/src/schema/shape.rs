//! What a row's field writes, in Rust terms, and whether its column accepts it.

use std::fmt;

use super::SchemaFault;
use crate::columns::{reads_text, shown, takes};
use crate::schema::{ColumnType, Int, Part};

/// What a field writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// A `bool`.
    Bool,
    /// A whole number of this type.
    Int(Int),
    /// An `f32`.
    F32,
    /// An `f64`.
    F64,
    /// `String`, `char`, and everything that serializes as text; with the text of a blank.
    Text(String),
    /// A unit variant of an enum, by its serialized name.
    Variant(String),
    /// A byte string.
    Bytes,
    /// `None` or `()`.
    None,
    /// `Some(..)`.
    Some(Box<Shape>),
    /// A list, with the shape of its items if one was seen.
    List(Option<Box<Shape>>),
    /// A tuple or an array of fixed length.
    Tuple(Vec<Shape>),
    /// A struct: its fields with their names.
    Struct(Vec<(String, Shape)>),
    /// A map, with the keys and values that were seen; also a struct with `flatten`.
    Map(Vec<(Shape, Shape)>),
    /// A variant of an enum with fields, by its name.
    Fields(String),
    /// Unknown without a real value: judged at each id.
    Unknown,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("a bool"),
            Self::Int(int) => {
                let (article, sign) = if int.is_signed() { ("an", 'i') } else { ("a", 'u') };
                write!(f, "{article} {sign}{}", int.width() * 8)
            }
            Self::F32 => f.write_str("an f32"),
            Self::F64 => f.write_str("an f64"),
            Self::Text(text) if text.is_empty() => f.write_str("text"),
            Self::Text(text) => write!(f, "text such as `{}`", shown(text)),
            Self::Variant(name) => write!(f, "the enum variant `{name}`"),
            Self::Bytes => f.write_str("a byte string"),
            Self::None => f.write_str("an Option that is None"),
            Self::Some(inner) => write!(f, "an Option of {inner}"),
            Self::List(None) => f.write_str("a list"),
            Self::List(Some(item)) => write!(f, "a list of {item}"),
            Self::Tuple(parts) => write!(f, "a tuple of {}", parts.len()),
            Self::Struct(fields) => {
                let names: Vec<&str> = fields.iter().map(|(name, _)| &name[..]).collect();
                write!(f, "a struct with the fields {}", names.join(", "))
            }
            Self::Map(_) => f.write_str("a map"),
            Self::Fields(name) => write!(f, "the enum variant `{name}` with fields"),
            Self::Unknown => f.write_str("something"),
        }
    }
}

impl Shape {
    /// The fields of a struct, also of one that serializes as a map; `None` for shapes without names.
    pub(super) fn fields(&self) -> Option<Vec<(&str, &Self)>> {
        match self {
            Self::Struct(fields) => Some(fields.iter().map(|(name, shape)| (&name[..], shape)).collect()),
            Self::Map(entries) => entries
                .iter()
                .map(|(key, value)| match key {
                    Self::Text(name) | Self::Variant(name) => Some((&name[..], value)),
                    _ => None,
                })
                .collect(),
            _ => None,
        }
    }
}

/// The field of a row, or part of a field, that is compared.
pub(super) struct Compared<'a> {
    /// The path of the field and the part in it.
    pub(super) path: &'a str,
    /// Whether the field's type accepts any value, so that the width of a seen number means nothing.
    pub(super) any: bool,
}

impl Compared<'_> {
    /// All faults of values of this shape in the column.
    pub(super) fn faults(&self, kind: &ColumnType, shape: &Shape) -> Vec<SchemaFault> {
        let kind = kind.plain();
        match (kind, shape) {
            (_, Shape::Unknown) => Vec::new(),
            (ColumnType::Nullable(_), Shape::None) => Vec::new(),
            (ColumnType::Nullable(held), Shape::Some(inner)) => self.faults(held, inner),
            (ColumnType::Nullable(held), shape) => self.faults(held, shape),
            (ColumnType::Enum(known), Shape::Variant(name)) if known.number(name).is_none() => {
                let declared = kind.to_string();
                vec![SchemaFault::Variant { field: self.path.to_owned(), variant: name.clone(), declared }]
            }
            (ColumnType::Array(held), Shape::List(item)) => self.part("[]", held, item.as_deref()),
            (ColumnType::Array(held), Shape::Tuple(items)) => {
                items.first().map_or_else(Vec::new, |item| self.part("[]", held, Some(item)))
            }
            (ColumnType::Map(pair), Shape::Map(seen)) => {
                let faults = |(key, value): &(Shape, Shape)| {
                    let key = self.part("[key]", &pair.0, Some(key));
                    [key, self.part("[value]", &pair.1, Some(value))].concat()
                };
                seen.iter().flat_map(faults).collect()
            }
            (ColumnType::Tuple(parts), Shape::Tuple(items)) if parts.len() == items.len() => {
                let pairs = parts.iter().zip(items).enumerate();
                pairs
                    .flat_map(|(index, (part, item))| {
                        self.part(&format!("[{index}]"), &part.kind, Some(item))
                    })
                    .collect()
            }
            (ColumnType::Tuple(parts), Shape::Struct(_) | Shape::Map(_))
                if parts.iter().all(|part| !part.name.is_empty()) =>
            {
                shape.fields().map_or_else(Vec::new, |fields| self.named_faults(parts, &fields))
            }
            (kind, Shape::Text(text)) if !self.any && never_reads(kind, text) => self.mismatch(kind, shape),
            (kind, shape) if takes_plain(kind, shape, self.any) => Vec::new(),
            (kind, shape) => self.mismatch(kind, shape),
        }
    }

    fn mismatch(&self, kind: &ColumnType, shape: &Shape) -> Vec<SchemaFault> {
        vec![SchemaFault::Mismatch {
            field: self.path.to_owned(),
            found: shape.to_string(),
            takes: takes(kind),
            declared: kind.to_string(),
        }]
    }

    fn part(&self, step: &str, kind: &ColumnType, shape: Option<&Shape>) -> Vec<SchemaFault> {
        let path = format!("{}{step}", self.path);
        let compared = Compared { path: &path, any: self.any };
        shape.map_or_else(Vec::new, |shape| compared.faults(kind, shape))
    }

    fn named_faults(&self, parts: &[Part], fields: &[(&str, &Shape)]) -> Vec<SchemaFault> {
        let mut faults = Vec::new();
        for part in parts {
            let path = format!("{}.{}", self.path, part.name);
            match fields.iter().find(|(name, _)| *name == part.name) {
                Some((_, shape)) => {
                    faults.extend(Compared { path: &path, any: self.any }.faults(&part.kind, shape));
                }
                None => faults.push(SchemaFault::Missing(path)),
            }
        }
        for (name, _) in fields.iter().filter(|(name, _)| !parts.iter().any(|part| part.name == *name)) {
            faults.push(SchemaFault::NoColumn(format!("{}.{name}", self.path)));
        }
        faults
    }
}

/// Whether a blank's text proves that the field is written in another form than the column's. The check offers
/// a field the column's form first, so a field that can have it does.
fn never_reads(kind: &ColumnType, text: &str) -> bool {
    let one_form = matches!(
        kind,
        ColumnType::Uuid
            | ColumnType::Ipv4
            | ColumnType::Ipv6
            | ColumnType::Date
            | ColumnType::Date32
            | ColumnType::DateTime(_)
            | ColumnType::DateTime64(..)
    );
    one_form && !text.is_empty() && !reads_text(kind, text)
}

/// Compares values without parts. The content of a text is judged at its id.
fn takes_plain(kind: &ColumnType, shape: &Shape, any: bool) -> bool {
    match shape {
        Shape::Bool => *kind == ColumnType::Bool,
        Shape::Int(found) => takes_int(kind, *found, any),
        Shape::F32 => matches!(kind, ColumnType::Float32 | ColumnType::Float64),
        Shape::F64 => *kind == ColumnType::Float64 || (any && *kind == ColumnType::Float32),
        Shape::Text(_) => match kind {
            ColumnType::Int(int) => int.width() == 32,
            ColumnType::Bool | ColumnType::Float32 | ColumnType::Float64 => false,
            kind => !matches!(kind, ColumnType::Array(_) | ColumnType::Map(_) | ColumnType::Tuple(_)),
        },
        Shape::Variant(_) => {
            matches!(kind, ColumnType::String | ColumnType::FixedString(_) | ColumnType::Enum(_))
        }
        Shape::Bytes => match kind {
            ColumnType::Array(held) => **held == ColumnType::Int(Int::U8),
            kind => is_octets(kind) || *kind == ColumnType::String,
        },
        Shape::Tuple(parts) => {
            let length = match kind {
                ColumnType::FixedString(length) => *length,
                _ => 16,
            };
            let octet = |part: &Shape| *part == Shape::Int(Int::U8) || *part == Shape::Unknown;
            is_octets(kind) && parts.len() == length && parts.iter().all(octet)
        }
        Shape::Some(inner) => any && takes_plain(kind, inner, any),
        _ => false,
    }
}

fn is_octets(kind: &ColumnType) -> bool {
    matches!(kind, ColumnType::FixedString(_) | ColumnType::Uuid | ColumnType::Ipv6)
}

/// Accepts only types whose every value fits; numbers that stand for something else need the exact type.
fn takes_int(kind: &ColumnType, found: Int, any: bool) -> bool {
    let number = matches!(
        kind,
        ColumnType::Int(_)
            | ColumnType::Decimal { .. }
            | ColumnType::Date
            | ColumnType::Date32
            | ColumnType::DateTime(_)
            | ColumnType::DateTime64(..)
            | ColumnType::Enum(_)
            | ColumnType::Float32
            | ColumnType::Float64
    );
    if any && number {
        return true;
    }
    match kind {
        ColumnType::Int(wanted) => holds(*wanted, found),
        ColumnType::Float32 => found.width() <= 2,
        ColumnType::Float64 => found.width() <= 4,
        ColumnType::Date => holds(Int::U16, found),
        ColumnType::Date32 => holds(Int::I32, found),
        ColumnType::DateTime(_) | ColumnType::Ipv4 => holds(Int::U32, found),
        ColumnType::DateTime64(..) => holds(Int::I64, found),
        // An Enum has fewer values than its number type anyway: each is judged at its id.
        ColumnType::Enum(values) => found.width() <= 1 + usize::from(values.wide),
        ColumnType::Decimal { .. } => kind.width().is_some_and(|width| found.width() <= width),
        ColumnType::Uuid | ColumnType::Ipv6 => found == Int::U128,
        _ => false,
    }
}

fn holds(wanted: Int, found: Int) -> bool {
    match (wanted.is_signed(), found.is_signed()) {
        (true, false) => wanted.width() > found.width(),
        (false, true) => false,
        _ => wanted.width() >= found.width(),
    }
}
