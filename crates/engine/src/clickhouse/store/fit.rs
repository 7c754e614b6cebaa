//! Whether the rows table accepts rows of a schema, and which columns the digests of its rows cover.

use std::collections::HashMap;

use millstream::names::PassId;
use millstream::schema::Schema;

use super::{Change, Found, Plan, Store};
use crate::clickhouse::sql::{Column, Digested};
use crate::error::{Error, StoreFault};

/// How the table fits a schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// The table has every column, with the same types.
    Exact,
    /// The table has every column, some with a wider type.
    Wider,
    /// The table lacks columns, or has other types; one text for each.
    Unfit(Vec<String>),
}

impl Store {
    /// Compares the table with the schema of some rows. A schema that fits is stored with the tables, so that
    /// the proof knows which columns the digests of those rows cover.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn fit(&self, schema: &Schema, build: &str) -> Result<Fit, Error> {
        let plan = match self.plan_of(schema, &self.look().await?).await {
            Ok(plan) => plan,
            Err(source @ StoreFault::Exception { .. }) => return Ok(Fit::Unfit(vec![source.to_string()])),
            Err(fault) => return Err(self.failed("ask about the types of columns", fault)),
        };
        let changes = plan.changes.iter().map(|change| match change {
            Change::Add(column) => format!("the table has no column `{}` ({})", column.name, column.kind),
            Change::Widen { column, from } => {
                format!("column `{}`: the table has {from}, the rows have {}", column.name, column.kind)
            }
        });
        let faults: Vec<String> = plan.refused.iter().cloned().chain(changes).collect();
        if !faults.is_empty() {
            return Ok(Fit::Unfit(faults));
        }
        self.keep_schema(schema, build).await?;
        Ok(if plan.wider.is_empty() { Fit::Exact } else { Fit::Wider })
    }

    /// The schemas of a pass's rows whose values can be proven: those that are known, and whose columns the
    /// table has.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub(super) async fn digested(&self, pass: &PassId, found: &Found) -> Result<Vec<Digested>, Error> {
        let there: Vec<u64> = self.long("look up the schemas of rows", &self.tables.schemas_of(pass)).await?;
        let own = self.tables.schema();
        let mut known = vec![own.clone()];
        if there.iter().any(|fingerprint| *fingerprint != own.fingerprint()) {
            let kept = self.kept_schemas().await;
            let kept = match kept {
                // If schemas cannot be asked for, they count as unknown, and their rows are not proven.
                Err(Error::Store { source, .. }) if source.is_denied() || source.is_missing() => Vec::new(),
                kept => kept?,
            };
            let others = kept.iter().filter_map(|(_, columns)| Schema::from_text(columns).ok());
            known.extend(others.filter(|schema| schema != own));
        }
        let mut digested = Vec::new();
        for schema in known.into_iter().filter(|schema| there.contains(&schema.fingerprint())) {
            match self.plan_of(&schema, found).await {
                Ok(plan) if plan.changes.is_empty() && plan.refused.is_empty() => {
                    digested.push(self.widened(schema, found, there.len() == 1).await?);
                }
                Ok(_) | Err(StoreFault::Exception { .. }) => {}
                Err(fault) => return Err(self.failed("ask about the types of columns", fault)),
            }
        }
        Ok(digested)
    }

    async fn widened(&self, schema: Schema, found: &Found, is_all: bool) -> Result<Digested, Error> {
        let spelled = self.spell(&columns_of(&schema)).await;
        let spelled = spelled.map_err(|fault| self.failed("ask about the types of columns", fault))?;
        let is_other = |column: &Column| {
            found.rows().iter().any(|has| has.name == column.name && has.kind != column.kind)
        };
        let widened: HashMap<String, String> =
            spelled.into_iter().filter(is_other).map(|column| (column.name, column.kind)).collect();
        Ok(Digested { schema, widened, is_all })
    }

    async fn plan_of(&self, schema: &Schema, found: &Found) -> Result<Plan, StoreFault> {
        let mut plan = Plan::default();
        for column in self.spell(&columns_of(schema)).await? {
            self.compare_column(&column, found.rows(), &mut plan);
        }
        Ok(plan)
    }
}

fn columns_of(schema: &Schema) -> Vec<Column> {
    schema.columns().iter().map(|column| Column::plain(&column.name, &column.text)).collect()
}
