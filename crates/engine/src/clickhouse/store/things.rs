//! The tables and views of a pipeline, found by the pipeline's name alone.

use clickhouse::Row;
use serde::Deserialize;

use super::{HEAL_WITHIN, Store, within};
use crate::error::Error;

/// A table or view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thing {
    /// The name, quoted, with the database.
    pub name: String,
    /// The number of rows; 0 for a view.
    pub rows: u64,
    /// The bytes of the rows.
    pub bytes: u64,
}

/// A table or view, as [`Tables::things`](crate::clickhouse::sql::Tables::things) selects it.
#[derive(Row, Deserialize)]
struct Kept {
    name: String,
    engine: String,
    comment: String,
    rows: u64,
    bytes: u64,
}

impl Store {
    /// The tables and views that match a pipeline's names and were made by Millstream, views first; and the
    /// quoted names of matching tables without Millstream's mark.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`] for tables of another environment; [`Error::Store`].
    pub async fn things_of(&self, pipeline: &str) -> Result<(Vec<Thing>, Vec<String>), Error> {
        let tables = self.tables.of_pipeline(pipeline);
        let kept: Vec<Kept> = self.all("look up tables", &tables.things()).await?;
        let environment = &self.address.environment;
        let mut ours = Vec::new();
        let mut unmarked = Vec::new();
        for Kept { name, engine, comment, rows, bytes } in kept {
            let name = tables.full_name(&name);
            let is_view = engine == "View";
            if !is_view && !environment.is_told(&comment) {
                unmarked.push(name);
                continue;
            }
            environment.check_table(&name, &comment)?;
            ours.push((is_view, Thing { name, rows, bytes }));
        }
        // A view that matches without any table may belong to another program.
        if ours.iter().all(|(is_view, _)| *is_view) {
            unmarked.extend(ours.drain(..).map(|(_, thing)| thing.name));
        }
        ours.sort_by_key(|(is_view, _)| !is_view);
        Ok((ours.into_iter().map(|(_, thing)| thing).collect(), unmarked))
    }

    /// Drops a table or view, given in quotes, and waits until its data is gone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn drop_thing(&self, name: &str) -> Result<(), Error> {
        // The operator named this table, so a large one is dropped too.
        let statement = format!("DROP TABLE IF EXISTS {name} SYNC");
        let drop = self.client.query_raw(&statement).with_setting("max_table_size_to_drop", "0").execute();
        within(HEAL_WITHIN, drop).await.map_err(|fault| self.failed("drop a table", fault))
    }
}
