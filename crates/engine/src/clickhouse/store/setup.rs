//! The existing tables of a pipeline, what is missing, and how they are changed.
//!
//! A table is accepted if our statements work on it. Columns, indexes, TTLs and views that operators add stay.

use std::collections::HashMap;

use clickhouse::Row;
use millstream::schema::Schema;
use serde::Deserialize;

use super::{ANSWER_WITHIN, HEAL_WITHIN, Store};
use crate::clickhouse::sql::{self, Column, NEWER_TABLE_SETTINGS, Tables, View, holds};
use crate::error::{Error, StoreFault};
use crate::model::moment::now_ms;

/// The engine of the rows table; in a cluster a prefix stands before it.
const ENGINE: &str = "ReplacingMergeTree";

/// The engine of our views.
const VIEW: &str = "View";

/// A pipeline's tables and views as the server lists them.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The engine, sorting key and partition key of each table, by name.
    tables: HashMap<String, [String; 3]>,
    /// The columns of each table in order, by table name.
    columns: HashMap<String, Vec<Column>>,
    /// The database and name of each materialized view that reads the rows table.
    fed: Vec<(String, String)>,
    rows_name: String,
}

impl Found {
    /// The columns of the rows table; empty if the table does not exist.
    pub fn rows(&self) -> &[Column] {
        self.columns(&self.rows_name)
    }

    fn columns(&self, table: &str) -> &[Column] {
        self.columns.get(table).map_or(&[], Vec::as_slice)
    }

    /// The materialized views that read the rows table.
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
    /// A column that is missing.
    Add(Column),
    /// A column whose type holds less than the pipeline's type.
    Widen {
        /// The column with its new type.
        column: Column,
        /// The type of the column today.
        from: String,
    },
}

/// The difference between a pipeline's tables and what it needs.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The missing tables and views.
    pub missing: Vec<String>,
    /// Changes of the rows table that lose nothing.
    pub changes: Vec<Change>,
    /// The differences that hinder inserts of this pipeline's rows and cannot be changed without loss.
    pub refused: Vec<String>,
    /// The views whose columns differ from their table's.
    pub stale: Vec<View>,
    /// Columns whose type is wider than the pipeline's: name, type.
    pub wider: Vec<(String, String)>,
    /// The operator's materialized views that read the rows table, quoted.
    pub fed: Vec<String>,
}

impl Store {
    /// Asks for the existing tables and views of the pipeline.
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

    /// The columns of the rows table as this version of the pipeline declares them, in the server's own
    /// spelling.
    ///
    /// # Errors
    /// [`Error::ColumnTypes`] lists each type that no table of the server can have, with the server's message;
    /// [`Error::Store`].
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

    /// The difference between the tables and what this pipeline needs.
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
                plan.refused.push(format!("{name} should be a view, but its engine is {engine}"));
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

    /// Refuses a table that does not accept the pipeline's rows.
    ///
    /// # Errors
    /// [`Error::TableColumns`] with every difference that hinders inserts.
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

    /// Creates the missing database, tables and views, and recreates views that differ from their table. If
    /// nothing is missing, it runs no statement that needs a right to create. First it asks the server about
    /// all types.
    ///
    /// # Errors
    /// [`Error::ColumnTypes`]; [`Error::TableColumns`] when the rows table exists and does not accept the
    /// pipeline's rows; [`Error::Store`].
    pub async fn setup(&self) -> Result<(), Error> {
        let plan = self.plan().await?;
        self.check(&plan)?;
        self.create(&plan).await
    }

    /// Creates what a plan lists as missing, and updates the views.
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

    /// Checks that what was created exists: over a detached table, CREATE … IF NOT EXISTS succeeds without an
    /// effect.
    async fn made(&self, names: &[String]) -> Result<(), Error> {
        let found = self.look().await?;
        let lacking = names.iter().filter(|name| !found.has(name)).map(|name| self.tables.full_name(name));
        match lacking.collect::<Vec<_>>() {
            none if none.is_empty() => Ok(()),
            names => Err(Error::NotMade { names }),
        }
    }

    /// Which of these missing tables and views are detached: quoted, with their database. Empty if the server
    /// does not list them, or not to this user.
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

    /// Refuses detached tables and views, because creating them again has no effect or a wrong one.
    ///
    /// # Errors
    /// [`Error::Detached`]; [`Error::Store`].
    pub async fn refuse_detached(&self, missing: Vec<String>) -> Result<(), Error> {
        match self.detached(&missing).await? {
            none if none.is_empty() => Ok(()),
            names => Err(Error::Detached { names }),
        }
    }

    /// Carries out a plan: the changes of the rows table, then everything that [`setup`](Self::setup) does.
    ///
    /// # Errors
    /// [`Error::TableColumns`] for a change that would lose data; [`Error::Store`].
    pub async fn change(&self, plan: &Plan) -> Result<(), Error> {
        if !plan.refused.is_empty() {
            return self.check(plan);
        }
        for change in &plan.changes {
            let statement = match change {
                Change::Add(column) => self.tables.add_column(column),
                Change::Widen { column, .. } => self.tables.modify_column(column),
            };
            // The server rewrites the stored values of a widened column.
            self.execute("change the rows table", &statement, HEAL_WITHIN).await?;
        }
        self.create(plan).await
    }

    /// Stores a version of the columns with the tables, unless it is known, because digests of rows cover them.
    /// If this process may not, or the table was dropped, another process will: the rows are stored all the
    /// same.
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

    /// The stored versions of the columns: number, and columns as text.
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
        self.write("store the schema version", &statement).await
    }

    /// The missing tables and views, quoted, with their database.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn missing(&self) -> Result<Vec<String>, Error> {
        let found = self.look().await?;
        Ok(self.tables.all_names().into_iter().filter(|name| !found.has(name)).collect())
    }

    /// The views whose columns differ from those of their table.
    pub(super) fn stale(&self, found: &Found) -> Vec<View> {
        let lags = |view: &View| {
            let name = self.tables.view_name(*view);
            let is = found.columns(&name).iter().map(|column| (&column.name, &column.kind));
            let wanted = self.tables.view_columns(*view, found.rows());
            // A table or materialized view in its place is not ours to replace.
            found.tables.get(&name).is_some_and(|[engine, ..]| engine == VIEW)
                && !is.eq(wanted.iter().map(|column| (&column.name, &column.kind)))
        };
        View::ALL.into_iter().filter(lags).collect()
    }
}

/// Whether a column of our own is read back or hashed as it is stored: a wider type would change the value.
fn is_read_as_it_is(name: &str) -> bool {
    ["pass", "batch", "batch_ids", "batch_digest", "id", "error"].contains(&name)
}

/// Whether two types differ at most in how they are stored.
fn is_alike(theirs: &str, ours: &str) -> bool {
    holds(theirs, ours) && holds(ours, theirs)
}
