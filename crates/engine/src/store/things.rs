//! The tables and views of a pipeline, known by its name alone.

use clickhouse::Row;
use serde::Deserialize;

use super::{HEAL_WITHIN, Store};
use crate::error::Error;

/// A table or view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thing {
    /// Its name in quotes, with the database.
    pub name: String,
    /// Rows in it; 0 for a view.
    pub rows: u64,
    /// Bytes that they take.
    pub bytes: u64,
}

/// As [`Tables::things`](crate::tables::Tables::things) selects it.
#[derive(Row, Deserialize)]
struct Kept {
    name: String,
    engine: String,
    comment: String,
    rows: u64,
    bytes: u64,
}

impl Store {
    /// What there is under the names of a pipeline and was made by Millstream, views first. What others made under such a
    /// name is left out.
    ///
    /// # Errors
    /// [`Error::OtherEnvironment`] for tables of another environment; [`Error::Store`].
    pub async fn things_of(&self, pipeline: &str) -> Result<Vec<Thing>, Error> {
        let tables = self.tables.of_pipeline(pipeline);
        let kept: Vec<Kept> = self.all("look up tables", &tables.things()).await?;
        let environment = &self.address.environment;
        let is_ours = |kept: &Kept| kept.engine == "View" || environment.is_told(&kept.comment);
        let mut ours: Vec<Kept> = kept.into_iter().filter(is_ours).collect();
        // A view of that name alone may be anybody's.
        if ours.iter().all(|kept| kept.engine == "View") {
            return Ok(Vec::new());
        }
        ours.sort_by_key(|kept| kept.engine != "View");
        ours.into_iter()
            .map(|Kept { name, comment, rows, bytes, .. }| {
                let name = tables.full_name(&name);
                environment.check_table(&name, &comment)?;
                Ok(Thing { name, rows, bytes })
            })
            .collect()
    }

    /// Drops a table or view, given in quotes, and waits until its data is gone.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn drop_thing(&self, name: &str) -> Result<(), Error> {
        self.execute("drop a table", &format!("DROP TABLE IF EXISTS {name} SYNC"), HEAL_WITHIN).await
    }
}
