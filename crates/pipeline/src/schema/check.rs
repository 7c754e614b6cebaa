//! Compares the row type with the columns.
//!
//! The check makes blank rows and serializes them, so it judges each field by what the field really writes,
//! whatever its attributes. If a type refuses blanks, only what its `Deserialize` asks for is known. The check
//! reports only certain faults; everything else is judged when a row goes into its columns.

use std::sync::Arc;

use super::record::{BlankFault, Blanks, Style};
use super::shape::{Compared, Shape};
use super::trace::shape_of;
use super::{Schema, SchemaFault};
use crate::names::Names;
use crate::{Id, Limits, Pipeline};

/// The most variants of an enum that are checked; further ones are judged at their ids.
const MAX_VARIANTS: usize = 1_000;

/// The checked declaration of a pipeline: everything that code needs which does not compute.
#[derive(Debug, Clone)]
pub struct Spec {
    /// [`Pipeline::NAME`].
    pub name: &'static str,
    /// [`Pipeline::VERSION`].
    pub version: &'static str,
    /// The ClickHouse type of the ids.
    pub id_type: &'static str,
    /// [`Pipeline::COLUMNS`], parsed.
    pub schema: Arc<Schema>,
    /// [`Pipeline::LIMITS`].
    pub limits: Limits,
    /// [`Pipeline::SUMMARY`].
    pub summary: Option<&'static str>,
}

/// Compares a pipeline's row type with its columns, and checks its names.
///
/// # Errors
/// All faults, not only the first.
pub fn check<P: Pipeline>() -> Result<Spec, Vec<SchemaFault>> {
    let mut faults: Vec<SchemaFault> =
        Names::new(P::NAME, None).err().map(SchemaFault::from).into_iter().collect();
    let schema = Schema::parse(P::COLUMNS).map_err(|found| faults.extend(found)).ok();
    if let Some(schema) = &schema {
        faults.extend(check_row::<P::Row>(schema));
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

fn check_row<R: serde::Serialize + serde::de::DeserializeOwned>(schema: &Schema) -> Vec<SchemaFault> {
    let mut blanks = Blanks::new(schema.fields());
    let mut written = Vec::new();
    let mut variant = 0;
    loop {
        let filled = blanks.row::<R>(Style::Filled { variant });
        if let Err(BlankFault::NoStruct(found)) = filled {
            return vec![SchemaFault::NoStruct(found.to_owned())];
        }
        variant += 1;
        let refused = filled.is_err();
        written.extend(filled.map(|row| shape_of(&row)));
        if refused || variant >= blanks.variants.min(MAX_VARIANTS) {
            break;
        }
    }
    written.extend(blanks.row::<R>(Style::Empty).map(|row| shape_of(&row)));
    if written.is_empty() {
        return unwritten_faults::<R>(schema, &mut blanks);
    }
    let mut distinct: Vec<SchemaFault> = Vec::new();
    for fault in written_faults(schema, &blanks.any, &written) {
        if !distinct.iter().any(|before| is_same(before, &fault)) {
            distinct.push(fault);
        }
    }
    distinct
}

/// Whether two rounds have found the same fault, even if one saw `None` and the other a value.
fn is_same(one: &SchemaFault, other: &SchemaFault) -> bool {
    match (one, other) {
        (SchemaFault::Mismatch { field, .. }, SchemaFault::Mismatch { field: same, .. }) => field == same,
        _ => one == other,
    }
}

/// The faults of blank rows that were serialized.
fn written_faults(schema: &Schema, any: &[String], written: &[Shape]) -> Vec<SchemaFault> {
    let mut faults = Vec::new();
    let mut rows = Vec::new();
    for shape in written {
        match shape.fields() {
            Some(fields) => rows.push(fields),
            None if *shape == Shape::None && schema.fields().is_empty() => {}
            None if *shape == Shape::Unknown => {}
            None => faults.push(SchemaFault::NoStruct(shape.to_string())),
        }
    }
    for part in schema.fields() {
        let seen = |row: &&Vec<(&str, &Shape)>| row.iter().any(|(name, _)| *name == part.name);
        match rows.iter().filter(seen).count() {
            _ if rows.is_empty() => {}
            0 => faults.push(SchemaFault::Missing(part.name.clone())),
            some if some < rows.len() => faults.push(SchemaFault::Skipped(part.name.clone())),
            _ => {}
        }
        let compared = Compared { path: &part.name, any: any.contains(&part.name) };
        for (_, shape) in rows.iter().flatten().filter(|(name, _)| *name == part.name) {
            faults.extend(compared.faults(&part.kind, shape));
        }
    }
    for (name, _) in rows.iter().flatten() {
        if !schema.fields().iter().any(|part| part.name == *name) {
            faults.push(SchemaFault::NoColumn((*name).to_owned()));
        }
    }
    faults
}

/// The faults of a type that refuses blanks, by what its `Deserialize` asks for.
fn unwritten_faults<R: serde::de::DeserializeOwned>(
    schema: &Schema,
    blanks: &mut Blanks<'_>,
) -> Vec<SchemaFault> {
    let Some(fields) = blanks.fields() else { return Vec::new() };
    let mut faults = Vec::new();
    for part in schema.fields() {
        let Some(field) = fields.iter().find(|field| **field == part.name) else {
            faults.push(SchemaFault::Missing(part.name.clone()));
            continue;
        };
        let shape = blanks.field::<R>(field);
        let any = blanks.any.contains(&part.name);
        faults.extend(Compared { path: &part.name, any }.faults(&part.kind, &shape));
    }
    for field in fields {
        if !schema.fields().iter().any(|part| part.name == field) {
            faults.push(SchemaFault::NoColumn(field.to_owned()));
        }
    }
    faults
}

#[cfg(test)]
mod tests;
