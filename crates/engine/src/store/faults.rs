//! Materialized views of the operator's that did not get rows: kept in a table until the operator has seen it.
//!
//! ClickHouse fills such views in the same INSERT, after our own part is there. If one of them fails, so does the INSERT,
//! and the rows are found to be stored: the view never sees them, and neither may the other views. Inserting once more
//! would bring the rows twice to those that did. So it is written down, with a statement that fills the view.

use clickhouse::Row;
use serde::{Deserialize, Serialize};

use super::{ANSWER_WITHIN, Store, within};
use crate::error::{Error, StoreFault};
use crate::records::now_ms;
use crate::tables::{Tables, full_name};

/// ClickHouse's codes for a table and a database that are not there.
const UNKNOWN: [u32; 2] = [60, 81];

/// Rows of a pass that a view did not get.
#[derive(Debug, Clone, PartialEq, Eq, Row, Serialize, Deserialize)]
pub struct ViewFault {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// The view, in quotes.
    pub view: String,
    /// What the server said, the last time.
    pub error: String,
    /// How many batches of that pass they are in.
    pub batches: u64,
    /// Milliseconds since 1970 of the last time.
    pub at_ms: u64,
}

impl Store {
    /// Keeps that an insert of these batches failed with `fault` although they are stored: the view that it names did not
    /// get them, and other views may not have. The names of those views.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn note_view_fault(
        &self,
        run: &str,
        pass: u32,
        batches: &[u32],
        fault: &StoreFault,
    ) -> Result<Vec<String>, Error> {
        let named = fault.view();
        let fed = self.look_at_views().await?;
        let is_named = |view: &String| named.is_some_and(|named| unquoted(view) == unquoted(named));
        let mut views: Vec<(String, String)> = Vec::new();
        if let Some(named) = named {
            // A view that reads another view is none that reads the rows table.
            let view = fed.iter().find(|view| is_named(view)).cloned();
            views.push((view.unwrap_or_else(|| named.to_owned()), fault.to_string()));
        }
        for view in fed.iter().filter(|view| !is_named(view)) {
            let error = match named {
                Some(named) => {
                    format!("the same insert failed in view {named}: these rows may not have come here")
                }
                None => format!("the insert had no good end, so these rows may not have come here: {fault}"),
            };
            views.push((view.clone(), error));
        }
        for (view, error) in &views {
            let statement = self.tables.insert_view_fault((run, pass, batches), (view, error), now_ms());
            self.write("keep a fault of a view", &statement).await?;
        }
        Ok(views.into_iter().map(|(view, _)| view).collect())
    }

    /// Faults of views, of one run or of all, the newest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn view_faults(&self, run: Option<&str>) -> Result<Vec<ViewFault>, Error> {
        match self.answer(&self.tables.view_faults(run)).await {
            // Without such a table none was kept.
            Err(StoreFault::Exception { code, .. }) if UNKNOWN.contains(&code) => Ok(Vec::new()),
            answer => answer.map_err(|fault| self.failed("look up faults of views", fault)),
        }
    }

    /// Statements that have each of these views see the rows that it lacks, all at once; of a view that is gone, or that
    /// reads another view, there is none.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn refills(&self, faults: &[ViewFault]) -> Result<Vec<String>, Error> {
        let found = self.look().await?;
        if found.fed().is_empty() {
            return Ok(Vec::new());
        }
        let queries: Vec<(String, String, String)> =
            self.all("look up what views select", &Tables::view_queries(found.fed())).await?;
        let refill = |(database, name, query): &(String, String, String)| {
            let view = full_name(database, name);
            faults.iter().any(|fault| fault.view == view).then(|| self.tables.refill(&view, query))
        };
        Ok(queries.iter().filter_map(refill).collect())
    }

    /// Forgets all faults of views.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn forget_view_faults(&self) -> Result<(), Error> {
        let statement = self.tables.forget_view_faults();
        let forgotten = within(ANSWER_WITHIN, self.client.query_raw(&statement).execute()).await;
        forgotten.map_err(|fault| self.failed("forget faults of views", fault))
    }
}

/// A name without the quotes that not every text of the server has.
fn unquoted(name: &str) -> String {
    name.replace('`', "")
}
