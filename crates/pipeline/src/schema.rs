//! The row type against the columns, before anything is computed.
//!
//! A type's shape is read off its `Deserialize`: every field asks a recording deserializer for what it wants and gets
//! a blank. So no value is needed, and no macro of ours.

mod column;
mod shape;

use std::fmt;

use crate::names::{NameFault, Names};
use crate::{Id, Limits, Pipeline};

pub use column::{ColumnType, TypeFault};
pub use shape::Shape;

/// Columns that every rows table has before the pipeline's own, with their types; `id`'s is the id type's.
pub const OWN_COLUMNS: [(&str, &str); 11] = [
    ("run", "LowCardinality(String)"),
    ("pass", "UInt32"),
    ("batch", "UInt32"),
    ("batch_ids", "UInt32"),
    ("batch_digest", "UInt64"),
    ("id", ""),
    ("status", "Enum8('ok' = 1, 'dead' = 2)"),
    ("error", "String"),
    ("host", "LowCardinality(String)"),
    ("build", "LowCardinality(String)"),
    ("computed_at", "DateTime64(3, 'UTC')"),
];

/// One way in which a pipeline's declaration is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaFault {
    /// The pipeline's name cannot name streams and tables.
    #[error(transparent)]
    Name(#[from] NameFault),
    /// A column has a name that cannot be one.
    #[error("column `{0}`: a name is 1 to 64 of A-Z a-z 0-9 _, not beginning with a digit")]
    ColumnName(String),
    /// A column has the name of one of ours.
    #[error("column `{0}`: the name is taken by Millstream's own column")]
    Taken(&'static str),
    /// Two columns share a name.
    #[error("column `{0}` is declared twice")]
    Twice(&'static str),
    /// A column's type is none that can be written.
    #[error("column `{column}`: {fault}")]
    Type {
        /// The column.
        column: &'static str,
        /// What is wrong with the type.
        fault: TypeFault,
    },
    /// The field at a column's place has another name.
    #[error("column `{column}`: the row's field at this place is {}", named(.found))]
    Field {
        /// The column as declared.
        column: &'static str,
        /// The field found, if there is one.
        found: Option<&'static str>,
    },
    /// The row has a field that no column takes.
    #[error("field `{0}` of the row has no column")]
    NoColumn(&'static str),
    /// A field's Rust type does not write what the column reads.
    #[error("column `{column}` of type {declared} takes a {expected}, found a {found} in the row")]
    Mismatch {
        /// The column.
        column: &'static str,
        /// The field's shape in Rust terms.
        found: Shape,
        /// What would do.
        expected: String,
        /// The column's declared type.
        declared: &'static str,
    },
    /// A limit that no id could keep.
    #[error("LIMITS, {0}")]
    Limits(String),
    /// A summary of nothing.
    #[error("SUMMARY names no `{{rows}}`, which stands for the rows of the pass")]
    Summary,
    /// The row is no struct, or holds something that has no shape (an enum, a `char`, a self-describing value).
    #[error("the row type cannot be used: {0}")]
    Shape(#[from] shape::ShapeFault),
}

fn named(field: &Option<&'static str>) -> String {
    field.map_or_else(|| "missing".to_owned(), |name| format!("`{name}`"))
}

/// What a pipeline declares, found sound: all that code needs which does not compute.
#[derive(Debug, Clone)]
pub struct Spec {
    /// [`Pipeline::NAME`].
    pub name: &'static str,
    /// The ClickHouse type of the ids.
    pub id_type: &'static str,
    /// [`Pipeline::COLUMNS`].
    pub columns: &'static [(&'static str, &'static str)],
    /// Their types, read.
    pub types: Vec<ColumnType>,
    /// [`Pipeline::LIMITS`].
    pub limits: Limits,
    /// [`Pipeline::SUMMARY`].
    pub summary: Option<&'static str>,
}

/// Compares a pipeline's row type with its columns and checks its names.
///
/// # Errors
/// Every fault there is, not just the first.
pub fn check<P: Pipeline>() -> Result<Spec, Vec<SchemaFault>> {
    let mut faults: Vec<SchemaFault> = Names::new(P::NAME).err().map(SchemaFault::from).into_iter().collect();
    let types = check_columns(P::COLUMNS, &mut faults);
    match shape::fields_of::<P::Row>() {
        Ok(fields) => check_fields(P::COLUMNS, &types, &fields, &mut faults),
        Err(fault) => faults.push(fault.into()),
    }
    faults.extend(P::LIMITS.faults().into_iter().map(SchemaFault::Limits));
    if P::SUMMARY.is_some_and(|query| !query.contains("{rows}")) {
        faults.push(SchemaFault::Summary);
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    Ok(Spec {
        name: P::NAME,
        id_type: P::Id::CLICKHOUSE,
        columns: P::COLUMNS,
        types: types.into_iter().flatten().collect(),
        limits: P::LIMITS,
        summary: P::SUMMARY,
    })
}

fn check_columns(
    columns: &[(&'static str, &'static str)],
    faults: &mut Vec<SchemaFault>,
) -> Vec<Option<ColumnType>> {
    let mut types = Vec::with_capacity(columns.len());
    for (index, (name, text)) in columns.iter().enumerate() {
        if !is_column_name(name) {
            faults.push(SchemaFault::ColumnName((*name).to_owned()));
        } else if OWN_COLUMNS.iter().any(|(own, _)| own == name) {
            faults.push(SchemaFault::Taken(name));
        } else if columns[..index].iter().any(|(before, _)| before == name) {
            faults.push(SchemaFault::Twice(name));
        }
        let parsed = ColumnType::parse(text);
        types.push(parsed.map_err(|fault| faults.push(SchemaFault::Type { column: name, fault })).ok());
    }
    types
}

fn is_column_name(name: &str) -> bool {
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    begins && name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn check_fields(
    columns: &[(&'static str, &'static str)],
    types: &[Option<ColumnType>],
    fields: &[(&'static str, Shape)],
    faults: &mut Vec<SchemaFault>,
) {
    for (index, ((column, declared), wanted)) in columns.iter().zip(types).enumerate() {
        match fields.get(index) {
            Some((name, found)) if name == column => {
                if let Some(wanted) = wanted.as_ref().filter(|wanted| !wanted.takes(found)) {
                    let expected = wanted.expected();
                    faults.push(SchemaFault::Mismatch { column, found: found.clone(), expected, declared });
                }
            }
            found => faults.push(SchemaFault::Field { column, found: found.map(|(name, _)| *name) }),
        }
    }
    for (name, _) in fields.iter().filter(|(name, _)| !columns.iter().any(|(column, _)| column == name)) {
        faults.push(SchemaFault::NoColumn(name));
    }
}

/// Faults one below the other, as they are shown.
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
mod tests {
    use std::collections::HashMap;

    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::{Failure, Outcome};

    macro_rules! pipeline {
        ($type:ident, $row:ty, $columns:expr) => {
            struct $type;
            impl Pipeline for $type {
                const NAME: &'static str = "tea";
                const COLUMNS: &'static [(&'static str, &'static str)] = $columns;
                type Id = u64;
                type Row = $row;
                fn compute(&self, _: &u64) -> Outcome<$row> {
                    Err(Failure::reject("never called"))
                }
            }
        };
    }

    #[derive(Serialize, Deserialize)]
    struct Wide {
        steps: u32,
        peak: u128,
        factors: Vec<u64>,
        at: i64,
        note: Option<String>,
        pair: (u8, f64),
        tag: [u8; 4],
        map: HashMap<String, Vec<i32>>,
        flag: bool,
    }

    pipeline!(
        Good,
        Wide,
        &[
            ("steps", "UInt32"),
            ("peak", "UInt128"),
            ("factors", "Array(UInt64)"),
            ("at", "DateTime64(3, 'UTC')"),
            ("note", "LowCardinality(Nullable(String))"),
            ("pair", "Tuple(a UInt8, Float64)"),
            ("tag", "FixedString(4)"),
            ("map", "Map(String, Array(Int32))"),
            ("flag", "Bool"),
        ]
    );

    #[test]
    fn a_row_of_every_shape_fits_its_columns() {
        assert_eq!(check::<Good>().map(|spec| spec.types.len()), Ok(9));
    }

    #[derive(Serialize, Deserialize)]
    struct Small {
        steps: u32,
        peak: u64,
        extra: String,
    }

    #[test]
    fn every_fault_is_named_at_once() {
        pipeline!(
            Bad,
            Small,
            &[("steps", "Int32"), ("pick", "UInt64"), ("id", "String"), ("x", "Varchar"), ("steps", "UInt8")]
        );
        let faults = check::<Bad>().expect_err("five columns of faults");
        let text = Faults(&faults).to_string();
        for part in [
            "column `steps` of type Int32 takes a i32, found a u32 in the row",
            "column `pick`: the row's field at this place is `peak`",
            "column `id`: the name is taken by Millstream's own column",
            "column `x`: `Varchar` is not a column type that rows can be written to",
            "column `steps` is declared twice",
            "column `x`: the row's field at this place is missing",
            "field `extra` of the row has no column",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
    }

    #[test]
    fn a_row_that_is_no_struct_is_refused() {
        pipeline!(Number, u64, &[("n", "UInt64")]);
        assert_eq!(check::<Number>().expect_err("no struct").len(), 1);
    }
}
