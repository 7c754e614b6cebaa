//! SQL about existing tables, their columns, and the versions of the pipeline's columns.

use millstream::names::{PassId, RunName};
use millstream::schema::Schema;

use super::forget::delete;
use super::{Column, PARTITIONS, Tables, View, identifier, millis, moment, string};

/// Settings under which the server spells a type on one line, and lists no more of a column than its type.
const BRIEFLY: &str =
    "describe_compact_output = 1, describe_include_subcolumns = 0, print_pretty_type_names = 0";

/// The most view faults (run, pass and view) that are listed at once.
pub const VIEW_FAULTS: usize = 100;

impl Tables {
    /// The tables that every query about a run needs.
    pub fn needed_names(&self) -> Vec<String> {
        ["_rows", "_passes", "_runs"].map(|suffix| format!("{}{suffix}", self.pipeline)).into()
    }

    /// All tables of this pipeline.
    pub fn table_names(&self) -> Vec<String> {
        ["_rows", "_passes", "_runs", "_schemas", "_view_faults"]
            .map(|suffix| format!("{}{suffix}", self.pipeline))
            .into()
    }

    /// The names of all tables and views of this pipeline.
    pub fn all_names(&self) -> Vec<String> {
        let views = View::ALL.map(|view| self.view_name(view));
        self.table_names().into_iter().chain(views).collect()
    }

    /// A table or view of that name in quotes, with its database.
    pub fn full_name(&self, name: &str) -> String {
        super::full_name(&self.database, name)
    }

    /// Asks the server how it spells the types of these columns: `(name, type)`. It refuses types that no table
    /// can have, as it would when the table is created.
    pub fn spell(columns: &[Column]) -> String {
        let structure: Vec<String> =
            columns.iter().map(|column| format!("{} {}", identifier(&column.name), column.kind)).collect();
        format!("DESCRIBE TABLE null({}) SETTINGS {BRIEFLY}", string(&structure.join(", ")))
    }

    /// Which of this pipeline's tables and views exist, and which views an INSERT fills: `(name, engine,
    /// sorting key, partition key, databases, names)`.
    pub fn list_tables(&self) -> String {
        format!(
            "SELECT name, engine, sorting_key AS sorted, partition_key AS partitioned, dependencies_database AS fed_databases, \
             dependencies_table AS fed, comment FROM system.tables WHERE {}",
            self.among("name")
        )
    }

    /// The detached tables and views of this pipeline: `(name)`. Older servers have no such system table.
    pub fn list_detached(&self) -> String {
        format!("SELECT table FROM system.detached_tables WHERE {} ORDER BY table", self.among("table"))
    }

    /// The disks of the rows table, or those that it would use: `(name, path, free bytes)`. Space that an
    /// operator reserved is not free.
    pub fn disks(&self) -> String {
        let policy = format!(
            "SELECT storage_policy FROM system.tables WHERE database = {} AND name = {}",
            string(&self.database),
            string(&self.rows_name())
        );
        format!(
            "SELECT name, path, toUInt64(greatest(toInt128(least(free_space, unreserved_space)) - toInt128(keep_free_space), 0)) AS free \
             FROM system.disks WHERE name IN (SELECT arrayJoin(disks) FROM system.storage_policies WHERE policy_name = \
             ifNull(nullIf(({policy}), ''), 'default')) ORDER BY name"
        )
    }

    /// Drops a constraint that an operator added to the rows table.
    pub fn drop_constraint(&self, name: &str) -> String {
        format!("ALTER TABLE {} DROP CONSTRAINT {}", self.rows(), identifier(name))
    }

    /// Every existing table and view of this pipeline, and its size: `(name, engine, comment, rows, bytes)`.
    pub fn things(&self) -> String {
        format!(
            "SELECT name, engine, comment, toUInt64(ifNull(total_rows, 0)) AS rows, toUInt64(ifNull(total_bytes, 0)) AS bytes \
             FROM system.tables WHERE {} ORDER BY name",
            self.among("name")
        )
    }

    /// The tables of another pipeline in the same environment.
    pub fn of_pipeline(&self, pipeline: &str) -> Self {
        Self { pipeline: pipeline.to_owned(), ..self.clone() }
    }

    /// The columns of all tables and views, in order: `(table, name, type, kind of default)`.
    pub fn list_columns(&self) -> String {
        format!(
            "SELECT table, name, type, toString(default_kind) FROM system.columns WHERE {} ORDER BY table, position",
            self.among("table")
        )
    }

    fn among(&self, column: &str) -> String {
        let names = self.all_names().iter().map(|name| string(name)).collect::<Vec<_>>().join(", ");
        format!("database = {} AND {column} IN ({names})", string(&self.database))
    }

    /// The sorting key of the rows table: **ask-before-ack** and the proof rest on it.
    pub fn sorting_key() -> &'static str {
        "run, pass, batch, id"
    }

    /// The partition key of the rows table: **one-insert-one-part** and the deduplication of a run rest on it.
    pub fn partition_key() -> String {
        format!("sipHash64(run) % {PARTITIONS}")
    }

    /// Adds a column to the rows table.
    pub fn add_column(&self, column: &Column) -> String {
        format!(
            "ALTER TABLE {} ADD COLUMN IF NOT EXISTS {} {}",
            self.rows(),
            identifier(&column.name),
            column.kind
        )
    }

    /// Changes the type of a column of the rows table.
    pub fn modify_column(&self, column: &Column) -> String {
        format!("ALTER TABLE {} MODIFY COLUMN {} {}", self.rows(), identifier(&column.name), column.kind)
    }

    /// Turns a computed column into one that stores what is inserted.
    pub fn make_plain(&self, column: &Column) -> String {
        format!(
            "ALTER TABLE {} MODIFY COLUMN {} REMOVE {}",
            self.rows(),
            identifier(&column.name),
            column.default_kind
        )
    }

    /// The versions of the columns that were in use: `(version, columns)`.
    pub fn schemas(&self) -> String {
        format!("SELECT version, columns FROM {} FINAL ORDER BY version", self.table("_schemas"))
    }

    /// Stores a version of the columns.
    pub fn insert_schema(&self, version: u32, schema: &Schema, build: &str, at_ms: u64) -> String {
        format!(
            "INSERT INTO {} (version, fingerprint, columns, build, created_at) SELECT {version}, toUInt64({}), {}, {}, {}",
            self.table("_schemas"),
            string(&schema.fingerprint().to_string()),
            string(&schema.to_text()),
            string(build),
            moment(at_ms),
        )
    }

    /// The newest sealed pass of a run: `(pass)`; 0 if there is none.
    pub fn newest_sealed(&self, run: &RunName) -> String {
        format!("SELECT max(pass) FROM {} WHERE run = {}", self.passes(), string(run.as_str()))
    }

    /// The number of a run's rows in the readers' view; without `all`, whether there are any: `(0 or 1)`.
    pub fn is_seen(&self, run: &RunName, all: bool) -> String {
        let limit = if all { "" } else { " LIMIT 1" };
        format!(
            "SELECT count() FROM (SELECT 1 FROM {} WHERE run = {}{limit})",
            self.view(),
            string(run.as_str())
        )
    }

    /// The builds that computed rows of a pass: `(build)`. Costs a quarter of counting their rows.
    pub fn build_names(&self, pass: &PassId) -> String {
        format!(
            "SELECT toString(build) AS by FROM (SELECT DISTINCT build FROM {} WHERE {} LIMIT 100) ORDER BY by",
            self.rows(),
            super::of_pass(pass),
        )
    }

    /// The rows of a pass by the build that computed them: `(build, rows, hosts)`, the most rows first. Raw
    /// duplicates count.
    pub fn builds(&self, pass: &PassId) -> String {
        format!(
            "SELECT toString(by) AS build, sum(counted) AS rows, arraySort(groupArray(toString(host))) AS hosts FROM (SELECT build AS by, \
             host, count() AS counted FROM {} WHERE {} GROUP BY build, host) GROUP BY build ORDER BY rows DESC, build LIMIT 100",
            self.rows(),
            super::of_pass(pass),
        )
    }
}

/// SQL about rows that an operator's materialized view did not receive.
impl Tables {
    /// Stores a view fault. Its batches are half-open ranges.
    pub fn insert_view_fault(
        &self,
        (pass, ranges): (&PassId, &[[u32; 2]]),
        (view, error): (&str, &str),
        at_ms: u64,
    ) -> String {
        let ranges: Vec<String> =
            ranges.iter().map(|[first, end]| format!("range(toUInt32({first}), toUInt32({end}))")).collect();
        let batches = ranges.join(", ");
        format!(
            "INSERT INTO {} (run, pass, batches, view, error, at) SELECT {}, {}, arrayFlatten([{batches}]), {}, {}, {}",
            self.table("_view_faults"),
            string(pass.run.as_str()),
            pass.pass,
            string(view),
            string(error),
            moment(at_ms),
        )
    }

    /// View faults of one run or of all: `(run, pass, view, error, batches, at)`, the newest first.
    pub fn view_faults(&self, run: Option<&RunName>) -> String {
        let run = run.map(|run| format!("WHERE run = {} ", string(run.as_str())));
        format!(
            "SELECT run, pass, view, argMax(error, at) AS error, toUInt64(length(groupUniqArrayArray(batches))) AS batches, {} AS at_ms \
             FROM {} {}GROUP BY run, pass, view ORDER BY max(at) DESC, view LIMIT {VIEW_FAULTS}",
            millis("max(at)"),
            self.table("_view_faults"),
            run.unwrap_or_default(),
        )
    }

    /// Removes these view faults, `(run, pass, view, at)`, but not those recorded later.
    pub fn acknowledge_view_faults<'a>(
        &self,
        seen: impl Iterator<Item = (&'a str, u32, &'a str, u64)>,
    ) -> String {
        let seen: Vec<String> = seen
            .map(|(run, pass, view, at_ms)| {
                let run = string(run);
                let view = string(view);
                let at = moment(at_ms);
                format!("run = {run} AND pass = {pass} AND view = {view} AND at <= {at}")
            })
            .collect();
        delete(&self.table("_view_faults"), &seen.join(" OR "))
    }

    /// The SELECT of each materialized view: `(database, name, query)`.
    pub fn view_queries(names: &[(String, String)]) -> String {
        let names: Vec<String> = names
            .iter()
            .map(|(database, name)| format!("({}, {})", string(database), string(name)))
            .collect();
        format!(
            "SELECT database, name, as_select FROM system.tables WHERE (database, name) IN ({})",
            names.join(", ")
        )
    }

    /// Reads no row of a view; it fails if the view cannot be read.
    pub fn probe(view: &str) -> String {
        format!("SELECT toUInt8(1) FROM {view} LIMIT 0")
    }

    /// Makes a materialized view read again the rows that it did not receive.
    pub fn refill(&self, view: &str, query: &str) -> String {
        let table = format!("{}.{}", self.database, self.rows_name());
        let lacking = format!(
            "(run, pass, batch) IN (SELECT run, pass, arrayJoin(batches) FROM {} WHERE view = {})",
            self.table("_view_faults"),
            string(view),
        );
        format!(
            "INSERT INTO {view} {query} SETTINGS additional_table_filters = {{{}: {}}}",
            string(&table),
            string(&lacking)
        )
    }
}
