//! SQL of the proof of values.
//!
//! The rows of a message carry one `batch_digest`: the sum of their hashes, computed by the worker before it
//! sent them. They also carry the fingerprint of the schema whose columns are hashed. The server computes the
//! sums again from the stored rows. Rows of an unknown schema, or whose columns the table has lost, are
//! reported as unproven, not as wrong.

use std::collections::HashMap;

use millstream::Id;
use millstream::names::{PassId, RunName};
use millstream::schema::Schema;

use super::{Column, Covers, Tables, identifier, of_pass, string};

/// Aggregation spills to disk beyond this many bytes, because a pass may have millions of batches. With several
/// schemas, each hash is computed only for the rows of its own schema, because values of other rows may not fit
/// its types.
const SETTINGS: &str =
    "max_bytes_before_external_group_by = 268435456, short_circuit_function_evaluation = 'force_enable'";

/// The columns that digests cover, and their place in the table of today.
#[derive(Debug, Clone)]
pub struct Digested {
    /// The schema that the rows were computed with.
    pub schema: Schema,
    /// The types, in the server's spelling, of those columns that have a wider type in the table. Converted
    /// back to them, the values are as they were.
    pub widened: HashMap<String, String>,
    /// Whether all rows of the query have this schema.
    pub is_all: bool,
}

/// How often a row with raw duplicates is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowsRead {
    /// Once: FINAL merges by the sorting key, `(run, pass, batch, id)`.
    Once,
    /// As often as the parts hold it, in half the time.
    All,
}

impl RowsRead {
    fn modifier(self) -> &'static str {
        match self {
            Self::Once => " FINAL",
            Self::All => "",
        }
    }
}

impl Digested {
    /// The columns of the schema with their own types, whatever the table has.
    pub fn plain(schema: &Schema) -> Self {
        Self { schema: schema.clone(), widened: HashMap::new(), is_all: false }
    }

    fn arguments(&self) -> Vec<String> {
        self.schema.hash_arguments_of(|column| match self.widened.get(&column.name) {
            Some(kind) => format!("CAST({}, {})", identifier(&column.name), string(kind)),
            None => identifier(&column.name),
        })
    }
}

impl Tables {
    /// The schemas of a pass's rows, with raw duplicates: `(fingerprint)`.
    pub fn schemas_of(&self, pass: &PassId) -> String {
        format!("SELECT DISTINCT schema FROM {} WHERE {}", self.rows(), of_pass(pass))
    }

    /// The hash of a row as workers compute it, over the columns of the row's own schema.
    fn row_hash(&self, schemas: &[Digested]) -> String {
        let id = if self.id_type == String::CLICKHOUSE { "xxHash64(id)" } else { "id" };
        let hash = |digested: &Digested| {
            let own = [id, "toUInt8(status)", "xxHash64(error)"].map(str::to_owned);
            let arguments: Vec<String> = own.into_iter().chain(digested.arguments()).collect();
            format!("cityHash64({})", arguments.join(", "))
        };
        let of_schema =
            |digested: &Digested| format!("schema = {}, {}", digested.schema.fingerprint(), hash(digested));
        match schemas {
            [] => "toUInt64(0)".to_owned(),
            // A decision per row costs three times the hash.
            [only] if only.is_all => hash(only),
            schemas => {
                let each: Vec<String> = schemas.iter().map(of_schema).collect();
                format!("multiIf({}, toUInt64(0))", each.join(", "))
            }
        }
    }

    /// Groups the rows that a condition selects by batch and digest. Without `schemas`, values are not checked.
    /// `more` adds expressions. No pipeline column may have the name of one of these aliases, because the
    /// server would take the alias for the column.
    fn by_digest(&self, rows: RowsRead, condition: &str, schemas: Option<&[Digested]>, more: &str) -> String {
        let (keys, unproven) = match schemas {
            None => ("batch", "0".to_owned()),
            Some([only]) if only.is_all => ("batch, batch_digest", "0".to_owned()),
            // An empty list is not valid SQL.
            Some([]) => ("batch, batch_digest, schema", "1".to_owned()),
            Some(schemas) => {
                let known: Vec<String> =
                    schemas.iter().map(|digested| digested.schema.fingerprint().to_string()).collect();
                ("batch, batch_digest, schema", format!("schema NOT IN ({})", known.join(", ")))
            }
        };
        let fault = match schemas {
            None => "0".to_owned(),
            Some(schemas) => {
                format!("NOT `$unproven` AND sum({}) != batch_digest", self.row_hash(schemas))
            }
        };
        let values = format!("{unproven} AS `$unproven`, {fault} AS `$fault`");
        format!(
            "SELECT batch, max(batch_ids) AS `$expected`, count() AS `$found`, sum(sipHash64(id)) AS `$digest`, \
             countIf(status = 'dead') AS `$dead`, {values}{more} FROM {}{} WHERE {condition} GROUP BY {keys}",
            self.rows(),
            rows.modifier(),
        )
    }

    /// The figures of a pass's proof: `(batches, ids, digest, dead, batches with wrong values, batches with
    /// unproven values)`. Without schemas, values are not checked.
    pub fn proof(&self, pass: &PassId, schemas: Option<&[Digested]>, rows: RowsRead) -> String {
        let by = |what: &str| format!("toUInt64(uniqExactIf(batch, {what}))");
        format!(
            "SELECT toUInt64(uniqExact(batch)), sum(`$found`), sum(`$digest`), sum(`$dead`), {}, {} FROM ({}) SETTINGS {SETTINGS}",
            by("`$fault`"),
            by("`$unproven`"),
            self.by_digest(rows, &of_pass(pass), schemas, "")
        )
    }

    /// Every batch of a pass in order: `(batch, distinct ids, expected ids, digest, whether its values are
    /// wrong)`.
    pub fn batches(&self, pass: &PassId, schemas: Option<&[Digested]>) -> String {
        format!(
            "SELECT batch, sum(`$found`), max(`$expected`), sum(`$digest`), toUInt8(max(`$fault`)) FROM ({}) GROUP BY batch \
             ORDER BY batch SETTINGS {SETTINGS}",
            self.by_digest(RowsRead::Once, &of_pass(pass), schemas, "")
        )
    }

    /// Counts the base pass's batches with wrong values in a half-open range, and the bytes of its rows:
    /// `(batches, bytes)`.
    pub fn base_at_fault(
        &self,
        run: &RunName,
        covers: &Covers,
        [first, end]: [u32; 2],
        table: &[Column],
        schemas: &[Digested],
    ) -> String {
        let columns = table.iter().filter(|column| column.is_insertable());
        let columns: Vec<String> = columns.map(|column| identifier(&column.name)).collect();
        let bytes = format!(", sum(byteSize({})) AS `$bytes`", columns.join(", "));
        let condition = format!("{} AND batch >= {first} AND batch < {end}", of_pass(&covers.base_of(run)));
        format!(
            "SELECT toUInt64(uniqExactIf(batch, `$fault`)), toUInt64(sum(`$bytes`)) FROM ({}) SETTINGS {SETTINGS}",
            self.by_digest(RowsRead::Once, &condition, Some(schemas), &bytes)
        )
    }

    /// The digests of rows that are copied from one pass to another: `(batch, schema, $copied)`.
    pub(super) fn copied_digests(&self, condition: &str, schemas: &[Digested]) -> String {
        format!(
            "SELECT batch, schema, sum({}) AS `$copied` FROM {} FINAL WHERE {condition} GROUP BY batch, schema",
            self.row_hash(schemas),
            self.rows(),
        )
    }
}
