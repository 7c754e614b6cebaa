//! Materialized views of the operator's that did not get rows: kept in a table until the operator has seen it.
//!
//! ClickHouse fills such views in the same INSERT, after our own part is there. If one of them fails, so does the INSERT,
//! and the rows are found to be stored: the view never sees them, and neither may the other views. Inserting once more
//! would bring the rows twice to those that did. So it is written down, with a statement that fills the view.

use clickhouse::Row;
use millstream::names::{PassId, RunName};
use serde::{Deserialize, Serialize};

use super::{HEAL_WITHIN, Store};
use crate::clickhouse::sql::{Tables, full_name};
use crate::error::{Error, StoreFault};
use crate::model::moment::now_ms;

/// Ranges of batches in one statement: a server reads no more than 256 KiB of text.
const RANGES: usize = 2000;

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
    /// Keeps that an insert of these batches, ranges of a first one and the one after the last, failed with `fault` although they are stored: the view that it names did not
    /// get them, and other views may not have. The names of those views.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn note_view_fault(
        &self,
        pass: &PassId,
        ranges: &[[u32; 2]],
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
            for ranges in ranges.chunks(RANGES) {
                let statement = self.tables.insert_view_fault((pass, ranges), (view, error), now_ms());
                self.write("keep a fault of a view", &statement).await?;
            }
        }
        Ok(views.into_iter().map(|(view, _)| view).collect())
    }

    /// Faults of views, of one run or of all, the newest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn view_faults(&self, run: Option<&RunName>) -> Result<Vec<ViewFault>, Error> {
        match self.answer(&self.tables.view_faults(run)).await {
            // Without such a table none was kept.
            Err(fault) if fault.is_missing() => Ok(Vec::new()),
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

    /// Forgets these faults, which the operator has seen; of each of them what was noted since stays.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn acknowledge(&self, faults: &[ViewFault]) -> Result<(), Error> {
        if faults.is_empty() {
            return Ok(());
        }
        let seen = faults.iter().map(|fault| (&*fault.run, fault.pass, &*fault.view, fault.at_ms));
        let statement = self.tables.acknowledge_view_faults(seen);
        self.execute("forget faults of views", &statement, HEAL_WITHIN).await
    }

    /// Removes the faults of a run or of one of its passes.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn forget_view_faults(&self, run: &RunName, pass: Option<u32>) -> Result<(), Error> {
        let faults = self.view_faults(Some(run)).await?;
        if !faults.iter().any(|fault| pass.is_none_or(|pass| pass == fault.pass)) {
            return Ok(());
        }
        let statement = self.tables.forget_view_faults(run, pass);
        self.execute("remove faults of views", &statement, HEAL_WITHIN).await
    }
}

/// Batches in order as ranges of a first one and the one after the last.
pub(crate) fn in_ranges(batches: impl IntoIterator<Item = u32>) -> Vec<[u32; 2]> {
    let mut ranges: Vec<[u32; 2]> = Vec::new();
    for batch in batches {
        match ranges.last_mut() {
            // Parts of one batch come behind each other.
            Some([first, end]) if (*first..=*end).contains(&batch) => {
                *end = (*end).max(batch.saturating_add(1))
            }
            _ => ranges.push([batch, batch.saturating_add(1)]),
        }
    }
    ranges
}

/// A name without the quotes that not every text of the server has.
fn unquoted(name: &str) -> String {
    name.replace('`', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_told_as_ranges() {
        assert_eq!(in_ranges([]), [[0; 2]; 0]);
        assert_eq!(in_ranges([3]), [[3, 4]]);
        assert_eq!(in_ranges([3, 3, 4, 5, 7, 9, 9, 10]), [[3, 6], [7, 8], [9, 11]]);
    }
}
