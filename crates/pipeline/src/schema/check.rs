//! The row type against the columns.

use std::sync::Arc;

use super::shape;
use super::{Schema, SchemaFault};
use crate::names::Names;
use crate::{Id, Limits, Pipeline};

/// What a pipeline declares, found sound: all that code needs which does not compute.
#[derive(Debug, Clone)]
pub struct Spec {
    /// [`Pipeline::NAME`].
    pub name: &'static str,
    /// [`Pipeline::VERSION`].
    pub version: &'static str,
    /// The ClickHouse type of the ids.
    pub id_type: &'static str,
    /// [`Pipeline::COLUMNS`], read.
    pub schema: Arc<Schema>,
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
    let schema = Schema::parse(P::COLUMNS).map_err(|found| faults.extend(found)).ok();
    if let Some(schema) = &schema {
        faults.extend(check_row::<P>(schema));
    }
    faults.extend(P::LIMITS.faults().into_iter().map(SchemaFault::Limits));
    if P::SUMMARY.is_some_and(|query| !query.contains("{rows}")) {
        faults.push(SchemaFault::Summary);
    }
    match schema {
        Some(schema) if faults.is_empty() => Ok(Spec {
            name: P::NAME,
            version: P::VERSION,
            id_type: P::Id::CLICKHOUSE,
            schema: Arc::new(schema),
            limits: P::LIMITS,
            summary: P::SUMMARY,
        }),
        _ => Err(faults),
    }
}

fn check_row<P: Pipeline>(schema: &Schema) -> Vec<SchemaFault> {
    let fields = match shape::fields_of::<P::Row>() {
        Ok(fields) => fields,
        Err(fault) => return vec![SchemaFault::NoStruct(fault.to_string())],
    };
    let mut faults = Vec::new();
    for column in schema.fields() {
        if !fields.iter().any(|(name, _)| *name == column.name) {
            faults.push(SchemaFault::Missing(column.name.clone()));
        }
    }
    for (name, _) in fields {
        if !schema.fields().iter().any(|column| column.name == name) {
            faults.push(SchemaFault::NoColumn(name.to_owned()));
        }
    }
    faults
}
