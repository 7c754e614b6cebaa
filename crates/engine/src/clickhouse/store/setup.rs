//! What there is of a pipeline's tables, what it lacks, and how it is changed.
//!
//! A table is judged by whether our statements work on it. Columns, indexes, TTLs and views that others add are theirs.

use std::collections::HashMap;

use clickhouse::Row;
use millstream::schema::Schema;
use serde::Deserialize;

use super::{ANSWER_WITHIN, HEAL_WITHIN, Store};
use crate::clickhouse::sql::{self, Column, NEWER_TABLE_SETTINGS, Tables, View, holds};
use crate::error::{Error, StoreFault};
use crate::model::moment::now_ms;

/// The engine of the rows table, whatever comes before it in a cluster.
const ENGINE: &str = "ReplacingMergeTree";

/// The engine of our views.
const VIEW: &str = "View";

/// A pipeline's tables and views as the server has them.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// By name: engine, sorting key, partition key.
    tables: HashMap<String, [String; 3]>,
    /// By table, in order.
    columns: HashMap<String, Vec<Column>>,
    /// Materialized views that read the rows table: database and name.
    fed: Vec<(String, String)>,
    rows_name: String,
}

impl Found {
    /// The columns of the rows table; none where there is no such table.
    pub fn rows(&self) -> &[Column] {
        self.columns(&self.rows_name)
    }

    fn columns(&self, table: &str) -> &[Column] {
        self.columns.get(table).map_or(&[], Vec::as_slice)
    }

    /// Materialized views that read the rows table.
    pub fn fed(&self) -> &[(String, String)] {
        &self.fed
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tables.contains_key(name)
    }
}

/// A table as [`Tables::list_tables`] selects it.
#[derive(Row, Deserialize)]
struct KeptTable {
    name: String,
    engine: String,
    sorted: String,
    partitioned: String,
    fed_databases: Vec<String>,
    fed: Vec<String>,
    comment: String,
}

/// A change of the rows table that loses nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A column that is not there yet.
    Add(Column),
    /// A column with a type that holds less than the pipeline's.
    Widen {
        /// The column as it will be.
        column: Column,
        /// Its type today.
        from: String,
    },
}

/// What a pipeline's tables lack.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Tables and views that are not there.
    pub missing: Vec<String>,
    /// Changes of the rows table that lose nothing.
    pub changes: Vec<Change>,
    /// What stands against rows of this pipeline in that table, and cannot be changed without loss.
    pub refused: Vec<String>,
    /// Views that lag behind their table.
    pub stale: Vec<View>,
    /// Columns that hold more than the pipeline's: name, type.
    pub wider: Vec<(String, String)>,
    /// Materialized views of the operator's that read the rows table, in quotes.
    pub fed: Vec<String>,
}

impl Store {
    /// What there is of the pipeline's tables and views.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`]; [`Error::Store`].
    pub async fn look(&self) -> Result<Found, Error> {
        let tables: Vec<KeptTable> = self.all("look up tables", &self.tables.list_tables()).await?;
        let columns: Vec<(String, String, String, String)> =
            self.all("look up columns", &self.tables.list_columns()).await?;
        let mut found = Found { rows_name: self.tables.rows_name(), ..Found::default() };
        for KeptTable { name, engine, sorted, partitioned, fed_databases, fed, comment } in tables {
            if name == found.rows_name {
                self.address.environment.check_table(&self.tables.rows(), &comment)?;
                found.fed = fed_databases.into_iter().zip(fed).collect();
                found.fed.sort();
            }
            found.tables.insert(name, [engine, sorted, partitioned]);
        }
        for (table, name, kind, default_kind) in columns {
            found.columns.entry(table).or_default().push(Column { name, kind, default_kind });
        }
        self.note_fed(!found.fed.is_empty());
        Ok(found)
    }

    /// The rows table's columns as this version of the pipeline declares them, in the server's own spelling.
    ///
    /// # Errors
    /// [`Error::ColumnTypes`] names each type that the server lets no table have, with its own words; [`Error::Store`].
    pub async fn spelled(&self) -> Result<Vec<Column>, Error> {
        let columns = self.tables.row_columns();
        let fault = match self.spell(&columns).await {
            Ok(spelled) => return Ok(spelled),
            Err(fault @ StoreFault::Exception { .. }) => fault,
            Err(fault) => return Err(self.failed("ask about the column types", fault)),
        };
        let mut faults = Vec::new();
        for column in columns {
            if let Err(StoreFault::Exception { text, .. }) = self.spell(std::slice::from_ref(&column)).await {
                faults.push((column.name, column.kind, text));
            }
        }
        match faults[..] {
            [] => Err(self.failed("ask about the column types", fault)),
            _ => Err(Error::ColumnTypes { faults }),
        }
    }

    pub(super) async fn spell(&self, columns: &[Column]) -> Result<Vec<Column>, StoreFault> {
        let spelled: Vec<(String, String)> = self.answer(&Tables::spell(columns)).await?;
        Ok(spelled.iter().map(|(name, kind)| Column::plain(name, kind)).collect())
    }

    /// What the tables lack for rows of this pipeline.
    ///
    /// # Errors
    /// [`Error::ColumnTypes`]; [`Error::Store`].
    pub async fn plan(&self) -> Result<Plan, Error> {
        let declared = self.spelled().await?;
        let found = self.look().await?;
        Ok(self.compare(&declared, &found))
    }

    fn compare(&self, declared: &[Column], found: &Found) -> Plan {
        let tables = &self.tables;
        let mut plan = Plan {
            missing: tables.all_names().into_iter().filter(|name| !found.has(name)).collect(),
            fed: found.fed.iter().map(|(database, name)| sql::full_name(database, name)).collect(),
            ..Plan::default()
        };
        for name in View::ALL.map(|view| tables.view_name(view)) {
            if let Some([engine, ..]) = found.tables.get(&name).filter(|[engine, ..]| engine != VIEW) {
                let name = tables.full_name(&name);
                plan.refused.push(format!("{name}, where a view of its rows belongs, is of engine {engine}"));
            }
        }
        let Some([engine, sorted, partitioned]) = found.tables.get(&found.rows_name) else { return plan };
        plan.stale = self.stale(found);
        if !engine.ends_with(ENGINE) {
            plan.refused
                .push(format!("its engine is {engine}, which does not replace rows: {ENGINE} is needed"));
        }
        for (what, is, wanted) in [
            ("sorted by", sorted, Tables::sorting_key()),
            ("partitioned by", partitioned, &Tables::partition_key()),
        ] {
            if is != wanted {
                plan.refused.push(format!("it is {what} `{is}`, not by `{wanted}`"));
            }
        }
        for column in declared {
            self.compare_column(column, found.rows(), &mut plan);
        }
        plan
    }

    pub(super) fn compare_column(&self, ours: &Column, table: &[Column], plan: &mut Plan) {
        let name = &ours.name;
        let is_key = Tables::sorting_key().split(", ").any(|key| key == name);
        match table.iter().find(|column| column.name == *name) {
            None if is_key => plan.refused.push(format!("column `{name}` is missing, and the table is sorted by it")),
            None => plan.changes.push(Change::Add(ours.clone())),
            Some(theirs) if !theirs.is_insertable() => plan.refused.push(format!(
                "column `{name}` is {}: rows cannot be inserted into it; `{}` changes that",
                theirs.default_kind,
                self.tables.make_plain(theirs),
            )),
            Some(theirs) if is_alike(&theirs.kind, &ours.kind) => {}
            Some(theirs) if is_read_as_it_is(name) => {
                plan.refused.push(format!(
                    "column `{name}` is Millstream's own and has type {}, it must be {}",
                    theirs.kind, ours.kind
                ));
            }
            Some(theirs) if holds(&theirs.kind, &ours.kind) => {
                plan.wider.push((name.clone(), theirs.kind.clone()));
            }
            Some(theirs) if holds(&ours.kind, &theirs.kind) => {
                plan.changes.push(Change::Widen { column: ours.clone(), from: theirs.kind.clone() });
            }
            Some(theirs) => plan.refused.push(format!(
                "column `{name}`: the table has {}, a row takes {}; `{}` converts what is stored, as far as it can be",
                theirs.kind,
                ours.kind,
                self.tables.modify_column(ours)
            )),
        }
    }

    /// Refuses a table that does not take the pipeline's rows.
    ///
    /// # Errors
    /// [`Error::TableColumns`] with every difference that hinders.
    pub fn check(&self, plan: &Plan) -> Result<(), Error> {
        let changes = plan.changes.iter().map(|change| match change {
            Change::Add(Column { name, kind, .. }) => {
                format!("column `{name}` is missing: `setup --yes` adds it, as {kind}")
            }
            Change::Widen { column: Column { name, kind, .. }, from } => {
                format!("column `{name}`: the table has {from}, a row takes {kind}: `setup --yes` widens it")
            }
        });
        let faults: Vec<String> = plan.refused.iter().cloned().chain(changes).collect();
        match faults[..] {
            [] => Ok(()),
            _ => Err(Error::TableColumns {
                table: self.tables.rows(),
                faults,
                mendable: plan.refused.is_empty(),
            }),
        }
    }

    /// Creates the database, tables and views that are missing, and makes views anew that lag behind their table; with all
    /// as it should be, nothing is executed that needs a right to create. The server is asked about all types first.
    ///
    /// # Errors
    /// [`Error::ColumnTypes`]; [`Error::TableColumns`] when the rows table is there and does not take the pipeline's rows;
    /// [`Error::Store`].
    pub async fn setup(&self) -> Result<(), Error> {
        let plan = self.plan().await?;
        self.check(&plan)?;
        self.create(&plan).await
    }

    /// Creates what a plan misses, and has views follow their table.
    async fn create(&self, plan: &Plan) -> Result<(), Error> {
        self.refuse_detached(plan.missing.clone()).await?;
        let tables = self.tables.table_names();
        if tables.iter().any(|name| plan.missing.contains(name)) {
            let newer = self
                .known_settings("look up table settings", "merge_tree_settings", NEWER_TABLE_SETTINGS)
                .await?;
            for statement in self.tables.create(&newer) {
                self.execute("create the tables", &statement, ANSWER_WITHIN).await?;
            }
            self.made(&tables).await?;
        }
        self.follow_views().await?;
        if !plan.missing.is_empty() {
            self.made(&plan.missing).await?;
        }
        self.keep_schema(self.tables.schema(), self.tables.build()).await
    }

    /// Looks whether what was created is there: over a table that is detached, CREATE … IF NOT EXISTS says yes and does nothing.
    async fn made(&self, names: &[String]) -> Result<(), Error> {
        let found = self.look().await?;
        let lacking = names.iter().filter(|name| !found.has(name)).map(|name| self.tables.full_name(name));
        match lacking.collect::<Vec<_>>() {
            none if none.is_empty() => Ok(()),
            names => Err(Error::NotMade { names }),
        }
    }

    /// Which of these tables and views, that are not there, are detached: in quotes, with their database. None where the server
    /// does not say it, or not to this user.
    ///
    /// # Errors
    /// [`Error::Store`] when the server does not answer.
    pub async fn detached(&self, missing: &[String]) -> Result<Vec<String>, Error> {
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        let listed: Vec<String> = match self.answer(&self.tables.list_detached()).await {
            Err(StoreFault::Exception { .. }) => Vec::new(),
            listed => listed.map_err(|fault| self.failed("look up detached tables", fault))?,
        };
        let ours = listed.iter().filter(|name| missing.contains(name));
        Ok(ours.map(|name| self.tables.full_name(name)).collect())
    }

    /// Refuses tables and views that are detached: what would be made in their place has no effect, or another one.
    ///
    /// # Errors
    /// [`Error::Detached`]; [`Error::Store`].
    pub async fn refuse_detached(&self, missing: Vec<String>) -> Result<(), Error> {
        match self.detached(&missing).await? {
            none if none.is_empty() => Ok(()),
            names => Err(Error::Detached { names }),
        }
    }

    /// Does what a plan says: changes of the rows table, then all that [`setup`](Self::setup) does.
    ///
    /// # Errors
    /// [`Error::TableColumns`] for what cannot be done without loss; [`Error::Store`].
    pub async fn change(&self, plan: &Plan) -> Result<(), Error> {
        if !plan.refused.is_empty() {
            return self.check(plan);
        }
        for change in &plan.changes {
            let statement = match change {
                Change::Add(column) => self.tables.add_column(column),
                Change::Widen { column, .. } => self.tables.modify_column(column),
            };
            // What is stored of a column that is widened is written anew.
            self.execute("change the rows table", &statement, HEAL_WITHIN).await?;
        }
        self.create(plan).await
    }

    /// Keeps a version of the columns with the tables, unless it is known: digests of rows go over them. A process that may
    /// not, or that has outlived their table, leaves it to others: rows are stored all the same.
    pub(super) async fn keep_schema(&self, schema: &Schema, build: &str) -> Result<(), Error> {
        match self.try_keep_schema(schema, build).await {
            Err(Error::Store { source, .. }) if source.is_denied() || source.is_missing() => {
                tracing::warn!(
                    %source,
                    hint = "grant SELECT and INSERT on the table of schemas, or run `setup` of this build as a user who may",
                    "the schema version is not kept: other versions of the pipeline cannot prove the values of these rows"
                );
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Versions of the columns that are kept with the tables: number, and columns as text.
    pub(super) async fn kept_schemas(&self) -> Result<Vec<(u32, String)>, Error> {
        self.all("look up schema versions", &self.tables.schemas()).await
    }

    async fn try_keep_schema(&self, schema: &Schema, build: &str) -> Result<(), Error> {
        let known = self.kept_schemas().await?;
        let text = schema.to_text();
        if known.iter().any(|(_, columns)| *columns == text) {
            return Ok(());
        }
        let version = known.iter().map(|(version, _)| *version).max().unwrap_or(0) + 1;
        let statement = self.tables.insert_schema(version, schema, build, now_ms());
        self.write("keep the schema version", &statement).await
    }

    /// Names of tables and views that are not there, in quotes with their database.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn missing(&self) -> Result<Vec<String>, Error> {
        let found = self.look().await?;
        Ok(self.tables.all_names().into_iter().filter(|name| !found.has(name)).collect())
    }

    /// Views whose columns are not those that their table gives.
    pub(super) fn stale(&self, found: &Found) -> Vec<View> {
        let lags = |view: &View| {
            let name = self.tables.view_name(*view);
            let is = found.columns(&name).iter().map(|column| (&column.name, &column.kind));
            let wanted = self.tables.view_columns(*view, found.rows());
            // What is no view is not ours to replace.
            found.tables.get(&name).is_some_and(|[engine, ..]| engine == VIEW)
                && !is.eq(wanted.iter().map(|column| (&column.name, &column.kind)))
        };
        View::ALL.into_iter().filter(lags).collect()
    }
}

/// Columns of our own whose values are read back or hashed as they lie in the table: a wider type would be another value.
fn is_read_as_it_is(name: &str) -> bool {
    ["pass", "batch", "batch_ids", "batch_digest", "id", "error"].contains(&name)
}

/// Whether two types differ at most in how they are stored.
fn is_alike(theirs: &str, ours: &str) -> bool {
    holds(theirs, ours) && holds(ours, theirs)
}
