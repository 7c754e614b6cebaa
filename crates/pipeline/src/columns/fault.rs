//! Why a row does not fit its columns.

use std::fmt;

use serde::ser;

use crate::schema::ColumnType;

/// The most characters of a value in a message.
const SHOWN: usize = 80;
/// The most characters of a type in a message: an Enum may have thousands of values.
const SHOWN_TYPE: usize = 200;

/// Why a row does not fit: the column, the value, and the reason. It becomes the reason of the id's dead
/// letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", Place(&.0.path), .0.reason)]
pub struct ValueFault(Box<Fault>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    /// The column and the part in it, as `at.lat` or `tags[3]`; empty for the whole row.
    path: String,
    reason: Reason,
}

/// What is wrong with a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Reason {
    /// The column holds values of another kind.
    #[error("{found} does not go into {kind}, which takes {takes}")]
    Kind { found: String, kind: String, takes: String },
    /// The value is of the right kind, but outside of the type's range.
    #[error("{value} is not a value of {kind}{why}")]
    Value { value: String, kind: String, why: String },
    /// The value is `None`, and the column has no NULL.
    #[error("the value is None, and {kind} is not Nullable")]
    Null { kind: String },
    #[error("the row has no field of that name (a `skip_serializing_if`?)")]
    Missing,
    #[error("the row has a field of that name, and no column takes it")]
    NoColumn,
    #[error("the row has more than one field of that name")]
    Twice,
    #[error("the key of a field is not text")]
    Key,
    #[error("the row is {found}: it must be a struct with named fields")]
    NoStruct { found: &'static str },
    /// The value's own `Serialize` failed.
    #[error("{0}")]
    Custom(String),
}

struct Place<'a>(&'a str);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "column `{}`: ", self.0) }
    }
}

impl ValueFault {
    #[cold]
    pub(crate) fn new(reason: Reason) -> Self {
        Self(Box::new(Fault { path: String::new(), reason }))
    }

    /// A fault about the kind of a value. `found` is an article and a kind, with the value if it is short.
    #[cold]
    pub(crate) fn kind(found: impl Into<String>, kind: &ColumnType) -> Self {
        let takes = super::takes(kind);
        Self::new(Reason::Kind { found: found.into(), kind: shown_type(kind), takes })
    }

    /// A fault about a value, which is a number or text as it is.
    #[cold]
    pub(crate) fn value(value: &str, kind: &ColumnType, why: &str) -> Self {
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        Self::new(Reason::Value { value: shown(value), kind: shown_type(kind), why })
    }

    #[cold]
    pub(crate) fn null(kind: &ColumnType) -> Self {
        Self::new(Reason::Null { kind: shown_type(kind) })
    }

    /// This fault, in a part of `name`.
    #[cold]
    pub(crate) fn within(mut self, name: &str) -> Self {
        let joint = if self.0.path.is_empty() || self.0.path.starts_with('[') { "" } else { "." };
        self.0.path = format!("{}{joint}{}", shown(name), self.0.path);
        self
    }

    #[cold]
    pub(crate) fn at_index(self, index: u64) -> Self {
        self.within(&format!("[{index}]"))
    }

    /// The column and the part in it that the fault is about; empty for the whole row.
    pub fn path(&self) -> &str {
        &self.0.path
    }
}

impl ser::Error for ValueFault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Reason::Custom(shortened(&message.to_string(), 4 * SHOWN)))
    }
}

/// Text for a message: shortened, on one line.
pub(crate) fn shown(text: &str) -> String {
    shortened(text, SHOWN)
}

fn shown_type(kind: &ColumnType) -> String {
    shortened(&kind.to_string(), SHOWN_TYPE)
}

fn shortened(text: &str, limit: usize) -> String {
    let mut symbols = text.chars();
    let mut shown = String::new();
    for symbol in symbols.by_ref().take(limit) {
        if symbol.is_control() {
            shown.extend(symbol.escape_default());
        } else {
            shown.push(symbol);
        }
    }
    if symbols.next().is_some() {
        shown.push('…');
    }
    shown
}
