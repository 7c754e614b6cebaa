//! The pipeline's own columns: their types, their text form, and their comparison with the row type before
//! anything is computed.

mod check;
mod kind;
mod parse;
mod record;
mod shape;
mod trace;

use std::fmt;
use std::hash::Hasher as _;

use siphasher::sip::SipHasher24;

use crate::columns::hash_arguments;
use crate::names::NameFault;

pub use check::{Spec, check};
pub use kind::{ColumnType, EnumType, Int, Part};
pub use parse::TypeFault;
pub use shape::Shape;

use parse::Parser;

/// The columns of every rows table before the pipeline's own, with their types; the type of `id` is the id
/// type's.
pub const OWN_COLUMNS: [(&str, &str); 12] = [
    ("run", "LowCardinality(String)"),
    ("pass", "UInt32"),
    ("batch", "UInt32"),
    ("batch_ids", "UInt32"),
    ("batch_digest", "UInt64"),
    ("schema", "UInt64"),
    ("id", ""),
    ("status", "Enum8('ok' = 1, 'dead' = 2)"),
    ("error", "String"),
    ("host", "LowCardinality(String)"),
    ("build", "LowCardinality(String)"),
    ("computed_at", "DateTime64(3, 'UTC')"),
];

/// The most columns that a schema may have.
pub const MAX_COLUMNS: usize = 1000;

/// The longest text form of a schema, in bytes.
pub const MAX_TEXT: usize = 256 << 10;

const MAX_NAME: usize = 64;

/// One way in which a pipeline's declaration is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaFault {
    /// The pipeline's name is not valid for streams and tables.
    #[error(transparent)]
    Name(#[from] NameFault),
    /// The name of a column is invalid.
    #[error("column `{0}`: a name is 1 to 64 of A-Z a-z 0-9 _, not beginning with a digit")]
    ColumnName(String),
    /// A column has the name of one of Millstream's own columns.
    #[error("column `{0}`: the name is taken by Millstream's own column")]
    Taken(String),
    /// Two columns share a name.
    #[error("column `{0}` is declared twice")]
    Twice(String),
    /// Rows cannot be written to the type of a column.
    #[error("column `{column}`: {fault}")]
    Type {
        /// The name of the column.
        column: String,
        /// What is wrong with the type.
        fault: TypeFault,
    },
    /// The text is not the text form of a schema.
    #[error("a schema cannot be read from `{0}`")]
    Text(String),
    /// The schema has too many columns.
    #[error("{0} columns are more than {MAX_COLUMNS}")]
    TooMany(usize),
    /// The row does not fill a column.
    #[error(
        "column `{0}`: the row has no field of that name (add one, or take the column out of COLUMNS; a field that is \
         only written, not read, cannot be seen here)"
    )]
    Missing(String),
    /// The row leaves a field out at times.
    #[error(
        "field `{0}`: the row leaves it out at times: remove the `skip_serializing_if`, because a column needs a value"
    )]
    Skipped(String),
    /// The row has a field that no column takes.
    #[error("field `{0}` of the row has no column: add it to COLUMNS, or mark the field `#[serde(skip)]`")]
    NoColumn(String),
    /// A field's Rust type does not fit its column.
    #[error("field `{field}`: its column is {declared} and takes {takes}, found {found} in the row")]
    Mismatch {
        /// The field, and the part in it.
        field: String,
        /// The Rust type that the row has.
        found: String,
        /// The Rust types that the column takes.
        takes: String,
        /// The type of the column.
        declared: String,
    },
    /// The column lacks a variant of a unit enum.
    #[error("field `{field}`: its variant `{variant}` is not a value of {declared}")]
    Variant {
        /// The field, and the part in it.
        field: String,
        /// The name of the variant, as it is serialized.
        variant: String,
        /// The type of the column.
        declared: String,
    },
    /// A limit that no id could meet.
    #[error("LIMITS, {0}")]
    Limits(String),
    /// The summary does not name the rows.
    #[error("SUMMARY names no `{{rows}}`, which stands for the rows of the pass")]
    Summary,
    /// The row type is not a struct.
    #[error("the row type cannot be used: it must be a struct with named fields, found {0}")]
    NoStruct(String),
}

/// A column of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// The name of the column; the columns of a `Nested` named `n` are `n.a`, `n.b`.
    pub name: String,
    /// The declared type as ClickHouse spells it in `system.columns`: `Decimal(18, 0)` for a `Decimal(18)`.
    pub text: String,
    /// The parsed type.
    pub kind: ColumnType,
}

/// The pipeline's own columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Schema {
    columns: Vec<Column>,
    /// The targets of the row's fields: a column, or the columns of a `Nested` as one `Array(Tuple(..))`.
    fields: Vec<Part>,
    /// Which of the fields are `Nested`.
    nested: Vec<bool>,
}

impl Schema {
    /// Parses declared columns: names and types.
    ///
    /// # Errors
    /// All faults, not only the first.
    pub fn parse(columns: &[(&str, &str)]) -> Result<Self, Vec<SchemaFault>> {
        let mut faults = Vec::new();
        let mut schema = Self { columns: Vec::new(), fields: Vec::new(), nested: Vec::new() };
        for (index, (name, text)) in columns.iter().enumerate() {
            if !is_column_name(name) {
                faults.push(SchemaFault::ColumnName(name.chars().take(80).collect()));
            } else if OWN_COLUMNS.iter().any(|(own, _)| own == name) {
                faults.push(SchemaFault::Taken((*name).to_owned()));
            } else if columns[..index].iter().any(|(before, _)| before == name) {
                faults.push(SchemaFault::Twice((*name).to_owned()));
            }
            match declared(text) {
                Ok((kind, nested)) => schema.add((*name).to_owned(), kind, nested),
                Err(fault) => faults.push(SchemaFault::Type { column: (*name).to_owned(), fault }),
            }
        }
        if schema.columns.len() > MAX_COLUMNS {
            faults.push(SchemaFault::TooMany(schema.columns.len()));
        }
        if faults.is_empty() { Ok(schema) } else { Err(faults) }
    }

    fn add(&mut self, name: String, kind: ColumnType, nested: bool) {
        match &kind {
            ColumnType::Array(held) if nested => {
                if let ColumnType::Tuple(parts) = &**held {
                    for part in parts {
                        let kind = ColumnType::Array(Box::new(part.kind.clone()));
                        let name = format!("{name}.{}", part.name);
                        self.columns.push(Column { name, text: kind.to_string(), kind });
                    }
                }
            }
            kind => {
                let name = name.clone();
                let text = kind.to_string();
                self.columns.push(Column { name, text, kind: kind.clone() });
            }
        }
        self.fields.push(Part { name, kind });
        self.nested.push(nested);
    }

    /// The columns of the table: a `Nested(a T, b U)` named `n` is `n.a Array(T)`, `n.b Array(U)`.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The targets of the row's fields.
    #[inline]
    pub(crate) fn fields(&self) -> &[Part] {
        &self.fields
    }

    /// Which of the fields are a `Nested`.
    pub(crate) fn nested(&self) -> &[bool] {
        &self.nested
    }

    /// A hash of names, types and order: SipHash-2-4 with a zero key of [`Self::to_text`].
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = SipHasher24::new();
        hasher.write(self.to_text().as_bytes());
        hasher.finish()
    }

    /// SQL of the values with which [`Columns::fold_hashes`](crate::columns::Columns::fold_hashes) continues a
    /// hash: one expression per column, to follow the first arguments of `cityHash64`.
    pub fn hash_arguments(&self) -> Vec<String> {
        self.hash_arguments_of(|column| format!("`{}`", column.name))
    }

    /// Like [`Self::hash_arguments`], for values in other expressions, for example of a table whose columns
    /// have wider types.
    pub fn hash_arguments_of(&self, value: impl Fn(&Column) -> String) -> Vec<String> {
        self.columns.iter().map(|column| hash_arguments(&value(column), &column.kind)).collect()
    }

    /// The columns as text, such as "`steps` UInt32, `peak` UInt128".
    pub fn to_text(&self) -> String {
        let columns: Vec<String> =
            self.columns.iter().map(|column| format!("`{}` {}", column.name, column.text)).collect();
        columns.join(", ")
    }

    /// Parses the text that [`Self::to_text`] wrote. The text may come from anywhere.
    ///
    /// # Errors
    /// [`SchemaFault`] for a text that is too long or has no columns, or for columns that a pipeline could not
    /// declare.
    pub fn from_text(text: &str) -> Result<Self, Vec<SchemaFault>> {
        let fault = || vec![SchemaFault::Text(text.chars().take(80).collect())];
        if text.len() > MAX_TEXT {
            return Err(fault());
        }
        let mut parser = Parser::new(text);
        let mut columns = Vec::new();
        while !parser.rest().is_empty() {
            let name = parser.name().map_err(|_| fault())?;
            let kind = parser.kind(0);
            columns.push((
                name,
                kind.map_err(|fault| vec![SchemaFault::Type { column: name.to_owned(), fault }])?,
            ));
            if columns.len() > MAX_COLUMNS || (!parser.rest().is_empty() && !parser.take(',')) {
                return Err(fault());
            }
        }
        let declared = grouped(columns).ok_or_else(fault)?;
        let declared: Vec<(&str, &str)> =
            declared.iter().map(|(name, kind)| (&name[..], &kind[..])).collect();
        Self::parse(&declared)
    }
}

/// Turns columns of a table into declarations: adjacent `n.a`, `n.b` become one `Nested`.
fn grouped(columns: Vec<(&str, ColumnType)>) -> Option<Vec<(String, String)>> {
    let mut declared: Vec<(String, String)> = Vec::new();
    let mut columns = columns.into_iter().peekable();
    while let Some((name, kind)) = columns.next() {
        let Some((outer, inner)) = name.split_once('.') else {
            declared.push((name.to_owned(), kind.to_string()));
            continue;
        };
        let mut parts = vec![nested_part(inner, &kind)?];
        while let Some((name, kind)) =
            columns.next_if(|(name, _)| name.split_once('.').is_some_and(|(next, _)| next == outer))
        {
            parts.push(nested_part(name.split_once('.')?.1, &kind)?);
        }
        declared.push((outer.to_owned(), format!("Nested({})", parts.join(", "))));
    }
    Some(declared)
}

fn nested_part(name: &str, kind: &ColumnType) -> Option<String> {
    match kind {
        ColumnType::Array(held) => Some(format!("{name} {held}")),
        _ => None,
    }
}

/// Parses a declared type, and returns whether it is a `Nested`.
fn declared(text: &str) -> Result<(ColumnType, bool), TypeFault> {
    let nested =
        text.trim_start().strip_prefix("Nested").is_some_and(|rest| rest.trim_start().starts_with('('));
    Ok((ColumnType::parse(text)?, nested))
}

pub(crate) fn is_column_name(name: &str) -> bool {
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    begins && name.len() <= MAX_NAME && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Displays faults one per line.
#[derive(Debug, Clone)]
pub struct Faults<'a>(pub &'a [SchemaFault]);

impl fmt::Display for Faults<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            write!(f, "{}{fault}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}
#[cfg(test)]
mod tests;
