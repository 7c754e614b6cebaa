//! The only place that spells table names and SQL, and that quotes names and texts.

mod ask;
mod columns;
mod dead;
mod forget;
mod selected;
mod shape;
mod values;
mod views;

use std::sync::Arc;

use clickhouse::Row;
use millstream::names::{PassId, RunName};
use millstream::schema::{OWN_COLUMNS, Schema};
use millstream::{Id, Spec};
use serde::Deserialize;

use crate::environment::Environment;
use crate::model::build;
use crate::model::record::{Covers, Published, RunRecord, Sealed};

pub use ask::Count;
pub use columns::{Column, holds};
pub use shape::VIEW_FAULTS;
pub use values::{Digested, RowsRead};
pub use views::View;

/// The number of partitions. The rows of one run lie in one partition, so that deduplicating a run rewrites a
/// sixteenth of the table, and hundreds of runs do not make hundreds of partitions.
const PARTITIONS: u32 = 16;

/// Settings by name, each with its value.
pub type Settings = &'static [(&'static str, &'static str)];

/// Settings of our MergeTree tables. An acked batch survives power loss. Insert deduplication stays off,
/// because it loses rows.
const TABLE_SETTINGS: [(&str, &str); 5] = [
    ("fsync_after_insert", "1"),
    ("fsync_part_directory", "1"),
    ("min_rows_to_fsync_after_merge", "1"),
    ("min_compressed_bytes_to_fsync_after_merge", "1"),
    ("non_replicated_deduplication_window", "0"),
];

/// More table settings, for servers that list them: a server refuses a statement with an unknown setting, and
/// ClickHouse 24.8 may lack these. They keep merges from taking the cores while a run computes (figures in
/// `benches/README.md`). Column statistics, built at every merge, help no query over this sorting key. Parts
/// are large and hardly overlap, so sixteen are merged at once instead of five, and each row is rewritten half
/// as often.
pub const NEWER_TABLE_SETTINGS: Settings = &[("auto_statistics_types", "''"), ("merge_selector_base", "16")];

/// Settings of every INSERT: one block, one part, no buffering in the server, no tokens (**no-dedup-tokens**).
///
/// They also apply to what an operator's materialized views write in the same INSERT. So none of them limits
/// how many partitions a block may touch: our block touches one, because it carries one run, but a view's may
/// touch many.
pub const INSERT_SETTINGS: Settings = &[
    ("async_insert", "0"),
    ("insert_deduplicate", "0"),
    ("input_format_parallel_parsing", "0"),
    ("max_threads", "1"),
    ("max_insert_threads", "1"),
    // One block holds every row that one INSERT may carry.
    ("max_insert_block_size", "1048449"),
    ("min_insert_block_size_rows", "1048449"),
    ("min_insert_block_size_bytes", "536870912"),
    // The ids of one INSERT are unique and mostly sorted; deduplicating them again costs a third of the insert.
    ("optimize_on_insert", "0"),
    // The id index costs half of an insert's CPU. Merges build it; until then a lookup reads those few parts.
    ("materialize_skip_indexes_on_insert", "0"),
    ("wait_end_of_query", "1"),
    // A view without a target table cannot take rows, and would fail the INSERT for all others.
    ("ignore_materialized_views_with_dropped_target_table", "1"),
];

/// The setting `insert_deduplicate` as ClickHouse spells it since 26.2. It goes to servers that list it.
pub const NEWER_INSERT_SETTINGS: Settings = &[("deduplicate_insert", "disable")];

/// The setting that limits the run time of a statement, so that a hanging INSERT ends.
pub const TIME_LIMIT: &str = "max_execution_time";

/// A proven pass as readers see it: its row in the table of sealed passes.
#[derive(Debug, Clone, PartialEq, Eq, Row, Deserialize)]
pub struct SeenPass {
    /// The number of the pass.
    pub pass: u32,
    /// The number of batches in the run.
    pub batches: u32,
    /// The number of ids in the run.
    pub ids: u64,
    /// The number of rows, one for each id.
    pub rows: u64,
    /// The number of rows that are dead letters.
    pub dead: u64,
    /// Wrapping sum of `sipHash64(id)` over the ids.
    pub digest: u64,
    /// The number of ids that were given more than once, in different batches.
    pub repeated_ids: u64,
    /// The builds that computed the pass.
    pub builds: Vec<String>,
    /// When the pass was sealed, in milliseconds since 1970.
    pub at_ms: u64,
}

impl SeenPass {
    /// The row for a pass whose stored rows were proven to match what was published.
    pub fn of(pass: u32, published: &Published, sealed: &Sealed) -> Self {
        let Published { batches, ids, digest, .. } = *published;
        let Sealed { rows, dead, repeated_ids, at_ms, builds, .. } = sealed.clone();
        Self { pass, batches, ids, rows, dead, digest, repeated_ids, builds, at_ms }
    }

    /// The seal of the pass, as far as the row records it.
    pub fn sealed(self) -> Sealed {
        let Self { rows, dead, repeated_ids, at_ms, builds, .. } = self;
        Sealed { rows, dead, repeated_ids, at_ms, summary: None, summary_fault: None, builds }
    }
}

/// Builds every statement about one pipeline's tables in one database.
#[derive(Debug, Clone)]
pub struct Tables {
    database: String,
    /// The comment of each table, which names its environment.
    comment: String,
    pipeline: String,
    id_type: &'static str,
    build: String,
    schema: Arc<Schema>,
    columns: Vec<Column>,
    summary: Option<&'static str>,
}

impl Tables {
    /// The tables of a pipeline in an environment.
    pub fn of(spec: &Spec, environment: &Environment) -> Self {
        let own = spec.schema.columns().iter();
        let columns = own.map(|column| Column::plain(&column.name, &column.text)).collect();
        Self {
            database: environment.database.clone(),
            comment: environment.comment(),
            pipeline: spec.name.to_owned(),
            id_type: spec.id_type,
            build: build::of_this_program(spec.version),
            schema: spec.schema.clone(),
            columns,
            summary: spec.summary,
        }
    }

    /// The build of this program.
    pub fn build(&self) -> &str {
        &self.build
    }

    /// The pipeline's own columns.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The database.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// The rows table, quoted.
    pub fn rows(&self) -> String {
        self.table("_rows")
    }

    /// The table of sealed passes, quoted.
    pub fn passes(&self) -> String {
        self.table("_passes")
    }

    /// The table of run records, quoted.
    pub fn runs(&self) -> String {
        self.table("_runs")
    }

    /// The view that readers use, quoted.
    pub fn view(&self) -> String {
        self.table("")
    }

    fn table(&self, suffix: &str) -> String {
        format!("{}.{}", identifier(&self.database), identifier(&format!("{}{suffix}", self.pipeline)))
    }

    /// The name of the rows table without quotes, for queries about the table.
    pub fn rows_name(&self) -> String {
        format!("{}_rows", self.pipeline)
    }

    /// Every column of the rows table, in order.
    pub fn row_columns(&self) -> Vec<Column> {
        let own = OWN_COLUMNS
            .iter()
            .map(|(name, kind)| Column::plain(name, if *name == "id" { self.id_type } else { kind }));
        own.chain(self.columns.iter().cloned()).collect()
    }

    /// The pipeline's own columns as a select list, each after a comma.
    fn own_list(&self) -> String {
        self.columns.iter().map(|column| format!(", {}", identifier(&column.name))).collect()
    }

    /// Statements that create the missing tables. `newer` are the [`NEWER_TABLE_SETTINGS`] that the server has.
    pub fn create(&self, newer: &[(&str, &str)]) -> Vec<String> {
        let settings = TABLE_SETTINGS.iter().chain(newer);
        let settings: String = settings.map(|(name, value)| format!(", {name} = {value}")).collect();
        let columns: Vec<String> = self
            .row_columns()
            .iter()
            .map(|column| format!("{} {}", identifier(&column.name), column.kind))
            .collect();
        let table = |suffix: &str, columns: &str, engine: &str| {
            format!(
                "CREATE TABLE IF NOT EXISTS {} ({columns}) ENGINE = {engine} SETTINGS index_granularity = 8192{settings} \
                 COMMENT {}",
                self.table(suffix),
                string(&self.comment)
            )
        };
        vec![
            format!("CREATE DATABASE IF NOT EXISTS {}", identifier(&self.database)),
            table(
                "_rows",
                &format!(
                    "{}, INDEX by_id id TYPE bloom_filter(0.01) GRANULARITY 1, INDEX by_status status TYPE minmax \
                     GRANULARITY 1",
                    columns.join(", ")
                ),
                &format!(
                    "ReplacingMergeTree PARTITION BY {} ORDER BY ({})",
                    Self::partition_key(),
                    Self::sorting_key()
                ),
            ),
            table(
                "_passes",
                "run String, pass UInt32, batches UInt32, ids UInt64, rows UInt64, dead UInt64, digest UInt64, \
                 repeated_ids UInt64, builds Array(String), sealed_at DateTime64(3, 'UTC')",
                "ReplacingMergeTree(sealed_at) ORDER BY (run, pass)",
            ),
            table(
                "_runs",
                "run String, source String, fingerprint String, batch_ids UInt32, expected_ids UInt64, may_repeat UInt8, \
                 created_at DateTime64(3, 'UTC'), batches UInt32, ids UInt64, digest UInt64, dropped_repeats UInt64, \
                 published_at DateTime64(3, 'UTC')",
                "ReplacingMergeTree(published_at) ORDER BY run",
            ),
            table(
                "_schemas",
                "version UInt32, fingerprint UInt64, columns String, build String, created_at DateTime64(3, 'UTC')",
                "ReplacingMergeTree(created_at) ORDER BY fingerprint",
            ),
            table(
                "_view_faults",
                "run String, pass UInt32, batches Array(UInt32), view String, error String, at DateTime64(3, 'UTC')",
                "MergeTree ORDER BY (run, pass, view)",
            ),
        ]
    }

    /// An INSERT whose body is rows as workers encoded them: blocks with our own columns and those of `schema`.
    /// Columns of the table that `schema` lacks get their defaults.
    pub fn insert_rows(&self, schema: &Schema) -> String {
        let own = OWN_COLUMNS.iter().map(|(name, _)| *name);
        let names = own.chain(schema.columns().iter().map(|column| column.name.as_str()));
        let names: Vec<String> = names.map(identifier).collect();
        format!("INSERT INTO {} ({}) FORMAT Native", self.rows(), names.join(", "))
    }

    /// An id, given as text, converted to the type of the id column.
    fn id(&self, text: &str) -> String {
        format!("to{}({})", self.id_type, string(text))
    }

    /// Removes every row of these batches, and waits until they are gone.
    pub fn remove_batches(&self, pass: &PassId, batches: &[u32]) -> String {
        let rows = self.rows();
        format!("ALTER TABLE {rows} DELETE WHERE {} SETTINGS mutations_sync = 2", of_batches(pass, batches))
    }

    /// Counts the rows of these batches with raw duplicates: `(rows)`.
    pub fn count_batches(&self, pass: &PassId, batches: &[u32]) -> String {
        format!("SELECT count() FROM {} WHERE {}", self.rows(), of_batches(pass, batches))
    }

    /// Counts the rows of a pass as the parts hold them: `(rows)`. The primary key answers it, except at the
    /// edges of the range.
    pub fn raw_count(&self, pass: &PassId) -> String {
        format!("SELECT count() FROM {} WHERE {}", self.rows(), of_pass(pass))
    }

    /// The first batches with fewer rows than ids, raw duplicates counted: `(batch)`. Checks `batches`
    /// batches and returns `most`.
    pub fn lacking_batches(&self, pass: &PassId, batches: u32, most: usize) -> String {
        format!(
            "SELECT toUInt32(number) FROM numbers({batches}) WHERE toUInt32(number) NOT IN \
             (SELECT batch FROM {} WHERE {} GROUP BY batch HAVING count() >= max(batch_ids)) ORDER BY number LIMIT {most}",
            self.rows(),
            of_pass(pass),
        )
    }

    /// The number of ids that a pass has in more than one batch: `(repeats)`. Spills to disk beyond 256 MB.
    pub fn repeated(&self, pass: &PassId) -> String {
        format!(
            "SELECT toUInt64(sum(times - 1)) FROM (SELECT count() AS times FROM {} FINAL WHERE {} GROUP BY id) \
             SETTINGS max_bytes_before_external_group_by = 268435456",
            self.rows(),
            of_pass(pass),
        )
    }

    /// Merges a run's partition into one part, which removes its raw duplicates (OPTIMIZE FINAL).
    pub fn heal(&self, run: &RunName) -> String {
        format!("OPTIMIZE TABLE {} PARTITION {} FINAL", self.rows(), self.partition_of(run))
    }

    fn partition_of(&self, run: &RunName) -> u64 {
        run.to_string().sip_hash() % u64::from(PARTITIONS)
    }

    /// Makes a sealed pass of a run visible to readers.
    pub fn insert_pass(&self, run: &RunName, seen: &SeenPass) -> String {
        let SeenPass { pass, batches, ids, rows, dead, digest, repeated_ids, builds, at_ms } = seen;
        let builds = builds.iter().map(|build| string(build)).collect::<Vec<_>>().join(", ");
        format!(
            "INSERT INTO {} (run, pass, batches, ids, rows, dead, digest, repeated_ids, builds, sealed_at) SELECT {}, \
             {pass}, {batches}, {ids}, {rows}, {dead}, {digest}, {repeated_ids}, CAST([{builds}] AS Array(String)), {}",
            self.passes(),
            string(run.as_str()),
            moment(*at_ms),
        )
    }

    /// The pipeline's summary query about a pass, if it has one. It is the author's own SQL, on lines of its
    /// own.
    pub fn summary(&self, pass: &PassId) -> Option<String> {
        self.summary_of(&of_pass(pass))
    }

    /// The summary query over no rows, to check whether it is valid.
    pub fn empty_summary(&self) -> Option<String> {
        self.summary_of("0")
    }

    fn summary_of(&self, condition: &str) -> Option<String> {
        let rows = format!(
            "(SELECT id{} FROM {} FINAL WHERE {condition} AND status = 'ok')",
            self.own_list(),
            self.rows(),
        );
        self.summary.map(|query| query.trim().trim_end_matches(';').replace("{rows}", &rows))
    }

    /// Stores a run's record, because the proof needs ClickHouse alone. Until all ids are published the record
    /// has no batches; its later version replaces it.
    pub fn insert_run(&self, record: &RunRecord) -> String {
        let nothing = Published { batches: 0, ids: 0, digest: 0, dropped_repeats: 0, at_ms: 0 };
        let published = record.published.as_ref().unwrap_or(&nothing);
        format!(
            "INSERT INTO {} (run, source, fingerprint, batch_ids, expected_ids, may_repeat, created_at, batches, ids, \
             digest, dropped_repeats, published_at) \
             SELECT {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}",
            self.runs(),
            string(record.run.as_str()),
            string(&record.source),
            string(&record.fingerprint),
            record.batch_ids,
            record.expected_ids.unwrap_or(0),
            u8::from(record.may_repeat),
            moment(record.created_ms),
            published.batches,
            published.ids,
            published.digest,
            published.dropped_repeats,
            moment(published.at_ms),
        )
    }

    /// A run's stored record: `(source, fingerprint, batch_ids, expected_ids, may_repeat, created_ms, batches,
    /// ids, digest, dropped_repeats, published_ms)`.
    pub fn run_record(&self, run: &RunName) -> String {
        format!(
            "SELECT source, fingerprint, batch_ids, expected_ids, may_repeat, {} AS created_ms, batches, ids, digest, \
             dropped_repeats, {} AS published_ms FROM {} FINAL WHERE run = {}",
            millis("created_at"),
            millis("published_at"),
            self.runs(),
            string(run.as_str())
        )
    }

    /// Sealed passes of a run, in order: [`SeenPass`].
    pub fn sealed_passes(&self, run: &RunName) -> String {
        format!(
            "SELECT pass, batches, ids, rows, dead, digest, repeated_ids, builds, {} AS at_ms FROM {} FINAL WHERE run = {} \
             ORDER BY pass",
            millis("sealed_at"),
            self.passes(),
            string(run.as_str())
        )
    }
}

/// The settings of this list that the server has in `table`, one of `settings` and `merge_tree_settings`:
/// `(name)`.
pub fn known_settings(table: &str, settings: &[(&str, &str)]) -> String {
    let names = settings.iter().map(|(name, _)| string(name)).collect::<Vec<_>>().join(", ");
    format!("SELECT name FROM system.{table} WHERE name IN ({names})")
}

/// The number of databases of that name: `(databases)`.
pub fn databases(name: &str) -> String {
    format!("SELECT count() FROM system.databases WHERE name = {}", string(name))
}

/// The columns of a user's query: `(name, type)`.
///
/// The query is the user's own SQL, and the server runs it with the user's rights: it is the one text that is
/// not quoted. It stands on lines of its own, so that a comment at its end ends there. Positions in the
/// server's error are off by one line.
pub fn describe_query(query: &str) -> String {
    format!("DESCRIBE TABLE (\n{}\n)", query.trim().trim_end_matches(';'))
}

/// A user's query with one column of this name, sorted so that the order is the same each time.
pub fn ordered(query: &str, column: &str) -> String {
    format!("SELECT * FROM (\n{}\n) ORDER BY {}", query.trim().trim_end_matches(';'), identifier(column))
}

/// Ends a query and waits until it has ended.
pub fn kill(query_id: &str) -> String {
    format!("KILL QUERY WHERE query_id = {} SYNC", string(query_id))
}

/// The number of running queries of that id: `(queries)`.
pub fn running(query_id: &str) -> String {
    format!("SELECT count() FROM system.processes WHERE query_id = {}", string(query_id))
}

/// The number of queries whose ids have this prefix and that run longer than `seconds`: `(queries)`.
pub fn long_running(prefix: &str, seconds: u64) -> String {
    format!(
        "SELECT count() FROM system.processes WHERE startsWith(query_id, {}) AND elapsed > {seconds}",
        string(prefix)
    )
}

fn of_pass(pass: &PassId) -> String {
    let PassId { run, pass } = pass;
    format!("run = {} AND pass = {pass}", string(run.as_str()))
}

fn of_batches(pass: &PassId, batches: &[u32]) -> String {
    let list = batches.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    format!("{} AND batch IN ({list})", of_pass(pass))
}

/// A time as a `DateTime64(3)`.
fn moment(since_1970_ms: u64) -> String {
    format!("fromUnixTimestamp64Milli(toInt64({since_1970_ms}), 'UTC')")
}

/// A time in milliseconds since 1970.
fn millis(column: &str) -> String {
    format!("toUInt64(toUnixTimestamp64Milli({column}))")
}

/// A table or view with its database, in backticks.
pub fn full_name(database: &str, name: &str) -> String {
    format!("{}.{}", identifier(database), identifier(name))
}

/// A name in backticks.
fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}

/// A text in quotes, escaped.
pub fn string(text: &str) -> String {
    // A raw NUL would end the query.
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'").replace('\0', "\\0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::rows::Portion;
    use crate::model::selection::Letters;
    use crate::model::selection::Selection;

    #[test]
    fn quotes_cannot_be_left() {
        assert_eq!(string("it's \\ ok"), r"'it\'s \\ ok'");
        assert_eq!(string("\0"), r"'\0'");
        assert_eq!(identifier("a`b\\"), r"`a\`b\\`");
        assert_eq!(kill("x' OR 1=1 --"), r"KILL QUERY WHERE query_id = 'x\' OR 1=1 --' SYNC");
    }

    /// The SQL outside of quotes, as ClickHouse parses it: a backslash escapes, and a doubled quote does not
    /// end the text.
    fn outside_quotes(sql: &str) -> String {
        let mut outside = String::new();
        let mut within = None;
        let mut symbols = sql.chars().peekable();
        while let Some(symbol) = symbols.next() {
            match within {
                None if matches!(symbol, '\'' | '`' | '"') => within = Some(symbol),
                None => outside.push(symbol),
                Some(_) if symbol == '\\' => drop(symbols.next()),
                Some(quote) if symbol == quote && symbols.peek() == Some(&quote) => drop(symbols.next()),
                Some(quote) if symbol == quote => within = None,
                Some(_) => {}
            }
        }
        assert_eq!(within, None, "a quote is open at the end of {sql}");
        outside
    }

    /// Every statement, with `text` in place of each name or text that has no grammar of its own.
    fn statements_about(text: &str) -> Vec<String> {
        let run: RunName = "green".parse().expect("legal");
        let pass = run.pass(1);
        let schema = Arc::new(Schema::parse(&[("n", "UInt8")]).expect("sound"));
        let tables = Tables {
            build: "b".to_owned(),
            schema: schema.clone(),
            database: text.to_owned(),
            comment: text.to_owned(),
            pipeline: text.to_owned(),
            id_type: "String",
            columns: vec![Column::plain(text, "UInt8")],
            summary: Some("SELECT count() FROM {rows}"),
        };
        let record = crate::model::record::RunRecord {
            run: run.clone(),
            source: text.to_owned(),
            fingerprint: text.to_owned(),
            batch_ids: 1,
            expected_ids: None,
            may_repeat: false,
            created_ms: 0,
            published: None,
            timing: None,
            so_far: None,
        };
        let letters = Letters {
            error: Some(text.to_owned()),
            batch: Some(1),
            host: Some(text.to_owned()),
            build: Some(text.to_owned()),
        };
        let selection = Selection::Letters(letters.clone());
        let covers = crate::model::record::Covers {
            base: 1,
            selection,
            ranges: Vec::new(),
            selected: None,
            ids: None,
        };
        let part = Portion::between(1, 2, text, text);
        let digested = [Digested::plain(&schema)];
        let builds = vec![text.to_owned()];
        let seen = SeenPass {
            pass: 1,
            batches: 1,
            ids: 1,
            rows: 1,
            dead: 1,
            digest: 1,
            repeated_ids: 1,
            builds,
            at_ms: 1,
        };
        let of_run = [
            tables.ask_parts(&pass, &[&part], Count::Rows),
            tables.ask_parts(&pass, &[&part], Count::Ids),
            tables.newest_rows(&run),
            tables.selected(&run, &covers),
            tables.selected_batches(&run, &covers),
            tables.selected_ids(&run, &covers, &[1, 2]),
            tables.not_computed(&run.pass(2), &covers, [0, 9]),
            tables.take_over(&run.pass(2), &covers, [0, 9], &tables.row_columns(), &digested),
            tables.rows_of(&run, Some(1)),
            tables.remove_rows(&run, Some(1)),
            tables.hide(&pass),
            tables.forget_run(&run),
            tables.run_record(&run),
            tables.sealed_passes(&run),
            tables.ask(&pass, &[1, 2], Count::Rows),
            tables.ask(&pass, &[1, 2], Count::Ids),
            tables.remove_batches(&pass, &[1, 2]),
            tables.count_dead(&pass, &letters),
            tables.proof(&pass, None, RowsRead::Once),
            tables.proof(&pass, Some(&digested), RowsRead::All),
            tables.raw_count(&pass),
            tables.batches(&pass, Some(&digested)),
            tables.base_at_fault(&run, &covers, [0, 9], &tables.row_columns(), &digested),
            tables.schemas_of(&pass),
            tables.repeated(&pass),
            tables.insert_pass(&run, &seen),
            tables.newest_sealed(&run),
            tables.is_seen(&run, true),
            tables.is_seen(&run, false),
            tables.builds(&pass),
            tables.build_names(&pass),
            tables.insert_view_fault((&pass, &[[1, 2]]), (text, text), 1),
            tables.view_faults(Some(&run)),
            tables.refill("v", "SELECT 1"),
            tables.insert_run(&record),
            tables.dead(&pass, &letters, 1),
            tables.dead_by_error(&pass, &letters, 1),
        ];
        // This statement names only the run's partition, a number.
        let heal = tables.heal(&run);
        let summary = tables.summary(&pass).expect("there is one");
        let columns = tables.row_columns();
        let others = [
            summary,
            tables.insert_rows(&schema),
            tables.list_tables(),
            tables.list_columns(),
            heal,
            Tables::spell(&columns),
            tables.add_column(&columns[0]),
            tables.modify_column(&columns[0]),
            tables.schemas(),
            tables.insert_schema(1, &schema, text, 1),
            tables.mutations(),
            tables.kill_mutation(text, text),
            tables.count_sealed(&pass),
            tables.count_runs(&run),
            tables.count_batches(&pass, &[1, 2]),
            tables.forget_view_faults(&run, Some(1)),
            tables.acknowledge_view_faults([(text, 1, text, 1)].into_iter()),
            Tables::view_queries(&[(text.to_owned(), text.to_owned())]),
        ];
        let views = View::ALL.map(|view| tables.make_view(view, &columns, true));
        let server = [
            known_settings("settings", &[(text, "1"), (text, "2")]),
            databases(text),
            kill(text),
            running(text),
            long_running(text, 1),
        ];
        tables.create(&[]).into_iter().chain(views).chain(of_run).chain(others).chain(server).collect()
    }

    #[test]
    fn hostile_names_stay_within_their_quotes() {
        let plain: Vec<String> = statements_about("plain").iter().map(|sql| outside_quotes(sql)).collect();
        let hostile = [
            "'",
            "`",
            "\"",
            "\\",
            "\\'",
            "\\`",
            "''",
            "``",
            "a' OR 1 = 1 --",
            "a`; DROP TABLE b; --",
            "\\\\'",
            "?",
            "??",
            "{x:String}",
            "a\nb",
            "a\0b",
            "/*",
            "*/",
            "$a$",
            "\u{1b}[2J",
            "\u{2019}",
        ];
        for text in hostile {
            let found: Vec<String> = statements_about(text).iter().map(|sql| outside_quotes(sql)).collect();
            assert_eq!(found, plain, "{text}");
        }
    }
}
