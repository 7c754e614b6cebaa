//! SQL of the proof of values.
//!
//! Each message's rows carry one `batch_digest`: the sum of their hashes as the worker computed them before it sent them,
//! and the fingerprint of the schema over whose columns the hashes go. The server computes the same from what is stored.

use std::collections::HashMap;

use millstream::Id;
use millstream::schema::Schema;

use super::{Tables, identifier, of_pass, string};

/// Aggregation spills to disk beyond this many bytes: a pass may have millions of batches.
const SPILL: &str = "max_bytes_before_external_group_by = 268435456";

/// Columns over which digests go, and where their values stand in the table of today.
#[derive(Debug, Clone)]
pub struct Digested {
    /// The columns as the rows were computed with.
    pub schema: Schema,
    /// Types, in the server's spelling, of those columns which have a wider type in the table: their values are as they were
    /// once they are converted back.
    pub widened: HashMap<String, String>,
}

impl Digested {
    /// The schema's columns as they stand, whatever the table has.
    pub fn plain(schema: &Schema) -> Self {
        Self { schema: schema.clone(), widened: HashMap::new() }
    }

    fn arguments(&self) -> Vec<String> {
        self.schema.hash_arguments_of(|column| match self.widened.get(&column.name) {
            Some(kind) => format!("CAST({}, {})", identifier(&column.name), string(kind)),
            None => identifier(&column.name),
        })
    }
}

impl Tables {
    /// The hash of a row over the columns of a schema, as workers compute it.
    fn row_hash(&self, digested: &Digested) -> String {
        let id = if self.id_type == String::CLICKHOUSE { "xxHash64(id)" } else { "id" };
        let own = [id, "toUInt8(status)", "xxHash64(error)"].map(str::to_owned);
        let arguments: Vec<String> = own.into_iter().chain(digested.arguments()).collect();
        format!("cityHash64({})", arguments.join(", "))
    }

    /// Whether the rows of one digest are not those that it was computed from. Which of the schemas they were computed over
    /// is in the digest alone.
    fn is_at_fault(&self, schemas: &[Digested]) -> String {
        let sum = |digested: &Digested| {
            format!("sum({}) + {}", self.row_hash(digested), digested.schema.fingerprint())
        };
        let sums: Vec<String> = schemas.iter().map(sum).collect();
        format!("batch_digest NOT IN ({})", sums.join(", "))
    }

    /// Rows of a pass by batch and digest, each row once: FINAL merges by the sorting key, `(run, pass, batch, id)`.
    fn by_digest(&self, run: &str, pass: u32, schemas: &[Digested]) -> String {
        let fault = if schemas.is_empty() { "0".to_owned() } else { self.is_at_fault(schemas) };
        format!(
            "SELECT batch, max(batch_ids) AS expected, count() AS found, sum(sipHash64(id)) AS digest, \
             countIf(status = 'dead') AS dead, {fault} AS fault FROM {} FINAL WHERE {} GROUP BY batch, batch_digest",
            self.rows(),
            of_pass(run, pass),
        )
    }

    /// What the proof needs of a pass: `(batches, ids, digest, dead, batches whose values are not those computed)`. Without
    /// schemas, values are not looked at.
    pub fn proof(&self, run: &str, pass: u32, schemas: &[Digested]) -> String {
        format!(
            "SELECT toUInt64(uniqExact(batch)), sum(found), sum(digest), sum(dead), toUInt64(uniqExactIf(batch, fault)) \
             FROM ({}) SETTINGS {SPILL}",
            self.by_digest(run, pass, schemas)
        )
    }

    /// Every batch of a pass in order: `(batch, distinct ids, ids it should have, digest, whether its values are not those
    /// computed)`.
    pub fn batches(&self, run: &str, pass: u32, schemas: &[Digested]) -> String {
        format!(
            "SELECT batch, sum(found), max(expected), sum(digest), toUInt8(max(fault)) FROM ({}) GROUP BY batch \
             ORDER BY batch SETTINGS {SPILL}",
            self.by_digest(run, pass, schemas)
        )
    }

    /// The digest of rows that are copied from one pass to another, as an expression over all copied rows of a batch.
    pub(super) fn copied_digest(&self, digested: &Digested) -> String {
        let fingerprint = digested.schema.fingerprint();
        format!("sum({}) OVER (PARTITION BY batch) + {fingerprint}", self.row_hash(digested))
    }
}
