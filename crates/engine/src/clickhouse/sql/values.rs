//! SQL of the proof of values.
//!
//! The rows of a message carry one `batch_digest`, the sum of their hashes as the worker computed them before it sent the
//! rows, and the fingerprint of the schema over whose columns the hashes go. The server computes the same sums from what is
//! stored. Rows whose schema is not known, or whose columns the table has lost, cannot be proven: that is told apart from
//! rows that are not what was computed.

use std::collections::HashMap;

use millstream::Id;
use millstream::names::{PassId, RunName};
use millstream::schema::Schema;

use super::{Column, Covers, Tables, identifier, of_pass, string};

/// Aggregation spills to disk beyond this many bytes: a pass may have millions of batches. Where there are several schemas, a
/// hash is computed of the rows of its own alone: the values of others may be none that its types have.
const SETTINGS: &str =
    "max_bytes_before_external_group_by = 268435456, short_circuit_function_evaluation = 'force_enable'";

/// Columns over which digests go, and where their values stand in the table of today.
#[derive(Debug, Clone)]
pub struct Digested {
    /// The columns as the rows were computed with.
    pub schema: Schema,
    /// Types, in the server's spelling, of those columns which have a wider type in the table: their values are as they were
    /// once they are converted back.
    pub widened: HashMap<String, String>,
    /// Whether all rows that are asked about are of this schema.
    pub is_all: bool,
}

/// Which rows are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowsRead {
    /// Each once: FINAL merges by the sorting key, `(run, pass, batch, id)`.
    Once,
    /// All that lie there, raw duplicates too, in half the time.
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
    /// The schema's columns as they stand, whatever the table has.
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
    /// The schemas of a pass's rows, raw duplicates counted: `(fingerprint)`.
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
            // What is decided for each row costs three times the hash.
            [only] if only.is_all => hash(only),
            schemas => {
                let each: Vec<String> = schemas.iter().map(of_schema).collect();
                format!("multiIf({}, toUInt64(0))", each.join(", "))
            }
        }
    }

    /// Rows that a condition selects by batch and digest. Without `schemas`, values are not looked at. No column of a pipeline's can
    /// have the name of one of these aliases: the server would take the alias for the column. `more` is selected besides.
    fn by_digest(&self, rows: RowsRead, condition: &str, schemas: Option<&[Digested]>, more: &str) -> String {
        let (keys, unproven) = match schemas {
            None => ("batch", "0".to_owned()),
            Some([only]) if only.is_all => ("batch, batch_digest", "0".to_owned()),
            // An empty list is no SQL.
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

    /// What the proof needs of a pass: `(batches, ids, digest, dead, batches whose values are not those computed, batches whose
    /// values cannot be proven)`. Without schemas, values are not looked at.
    pub fn proof(&self, pass: &PassId, schemas: Option<&[Digested]>, rows: RowsRead) -> String {
        let by = |what: &str| format!("toUInt64(uniqExactIf(batch, {what}))");
        format!(
            "SELECT toUInt64(uniqExact(batch)), sum(`$found`), sum(`$digest`), sum(`$dead`), {}, {} FROM ({}) SETTINGS {SETTINGS}",
            by("`$fault`"),
            by("`$unproven`"),
            self.by_digest(rows, &of_pass(pass), schemas, "")
        )
    }

    /// Every batch of a pass in order: `(batch, distinct ids, ids it should have, digest, whether its values are not those
    /// computed)`.
    pub fn batches(&self, pass: &PassId, schemas: Option<&[Digested]>) -> String {
        format!(
            "SELECT batch, sum(`$found`), max(`$expected`), sum(`$digest`), toUInt8(max(`$fault`)) FROM ({}) GROUP BY batch \
             ORDER BY batch SETTINGS {SETTINGS}",
            self.by_digest(RowsRead::Once, &of_pass(pass), schemas, "")
        )
    }

    /// How many batches of the base pass, from the first to below the second, hold other values than those computed, and how many
    /// bytes its rows are: `(batches, bytes)`.
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
