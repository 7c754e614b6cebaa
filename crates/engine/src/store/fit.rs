//! Whether the rows table takes rows of a schema.

use millstream::schema::Schema;

use super::{Store, within};
use crate::error::StoreFault;

/// What the table says of a schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// It has every column with the same type.
    Exact,
    /// It has every column, some with a type that holds more values.
    Wider,
    /// It lacks columns, or has other types: one fault each.
    Unfit(Vec<String>),
}

impl Store {
    /// Compares the table with the columns of a schema.
    ///
    /// # Errors
    /// The fault when ClickHouse does not answer.
    pub async fn fit(&self, schema: &Schema) -> Result<Fit, StoreFault> {
        let question = self.tables.describe_rows();
        let found = within(super::ANSWER_WITHIN, self.client.query_raw(&question).fetch_all::<(String, String)>()).await?;
        let faults: Vec<String> = schema
            .columns()
            .iter()
            .filter(|column| !found.iter().any(|(name, kind)| *name == column.name && *kind == column.text))
            .map(|column| format!("column `{}` {}", column.name, column.text))
            .collect();
        Ok(if faults.is_empty() { Fit::Exact } else { Fit::Unfit(faults) })
    }
}
