//! Why a row does not fit its columns.

use std::fmt;

use serde::ser;

use crate::schema::ColumnType;

/// A value is shown up to here, in characters.
const SHOWN: usize = 80;
/// A type is shown up to here: an Enum may have thousands of values.
const SHOWN_TYPE: usize = 200;

/// A row that does not fit: the column, the value, and why. It becomes the reason of the id's dead letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", Place(&.0.path), .0.reason)]
pub struct ValueFault(Box<Fault>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    /// The column and the parts within it, as `at.lat` or `tags[3]`; empty for the row as a whole.
    path: String,
    reason: Reason,
}

/// What is wrong with a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Reason {
    /// The column holds other kinds of values.
    #[error("{found} does not go into {kind}, which takes {takes}")]
    Kind { found: String, kind: String, takes: String },
    /// The right kind of value, but outside of what the type holds.
    #[error("{value} is not a value of {kind}{why}")]
    Value { value: String, kind: String, why: String },
    /// `None` where the column knows no NULL.
    #[error("the value is None, and {kind} is not Nullable")]
    Null { kind: String },
    #[error("the row has no field of that name (a `skip_serializing_if`?)")]
    Missing,
    #[error("the row has a field of that name, and no column takes it")]
    NoColumn,
    #[error("the row has more than one field of that name")]
    Twice,
    #[error("the key of a field is no text")]
    Key,
    #[error("the row is {found}: it must be a struct with named fields")]
    NoStruct { found: &'static str },
    /// The value's own `Serialize` refused.
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

    /// `found` is an article and a kind of value, with the value where it is short.
    #[cold]
    pub(crate) fn kind(found: impl Into<String>, kind: &ColumnType) -> Self {
        let takes = super::takes(kind);
        Self::new(Reason::Kind { found: found.into(), kind: shown_type(kind), takes })
    }

    /// `value` is a number or text as is.
    #[cold]
    pub(crate) fn value(value: &str, kind: &ColumnType, why: &str) -> Self {
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        Self::new(Reason::Value { value: shown(value), kind: shown_type(kind), why })
    }

    #[cold]
    pub(crate) fn null(kind: &ColumnType) -> Self {
        Self::new(Reason::Null { kind: shown_type(kind) })
    }

    /// The same, in a part of `name`.
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

    /// The column and the parts within it that the fault is about; empty for the row as a whole.
    pub fn path(&self) -> &str {
        &self.0.path
    }
}

impl ser::Error for ValueFault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Reason::Custom(shortened(&message.to_string(), 4 * SHOWN)))
    }
}

/// Text as it is shown in a message: shortened, on one line.
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
