//! View faults: rows that an operator's materialized views did not receive, recorded in a table until the
//! operator acknowledges them.
//!
//! ClickHouse fills such views in the same INSERT, after our own part is stored. If a view fails, the INSERT
//! fails too, but the rows are stored: that view never sees them, and other views may not either. Inserting
//! again would give the rows twice to the views that have them. So the fault is recorded with a statement that
//! fills the view.

use clickhouse::Row;
use millstream::names::{PassId, RunName};
use serde::{Deserialize, Serialize};

use super::{HEAL_WITHIN, Store};
use crate::clickhouse::sql::{Tables, full_name};
use crate::error::{Error, StoreFault};
use crate::model::moment::now_ms;

/// Ranges of batches per statement: a server reads at most 256 KiB of SQL.
const RANGES: usize = 2000;

/// Rows of a pass that a view did not receive.
#[derive(Debug, Clone, PartialEq, Eq, Row, Serialize, Deserialize)]
pub struct ViewFault {
    /// The run.
    pub run: String,
    /// The pass.
    pub pass: u32,
    /// The view, quoted.
    pub view: String,
    /// The server's last error.
    pub error: String,
    /// The number of batches with such rows.
    pub batches: u64,
    /// The time of the last fault, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Store {
    /// Records that an insert of these batches (half-open ranges) failed with `fault` although the rows are
    /// stored. The view that the fault names did not receive them, and other views may not have. Returns the
    /// names of those views.
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
            // A view that reads another view does not read the rows table.
            let view = fed.iter().find(|view| is_named(view)).cloned();
            views.push((view.unwrap_or_else(|| named.to_owned()), fault.to_string()));
        }
        for view in fed.iter().filter(|view| !is_named(view)) {
            let error = match named {
                Some(named) => {
                    format!("the same insert failed in view {named}: this view may lack these rows")
                }
                None => format!("the insert failed, so this view may lack these rows: {fault}"),
            };
            views.push((view.clone(), error));
        }
        for (view, error) in &views {
            for ranges in ranges.chunks(RANGES) {
                let statement = self.tables.insert_view_fault((pass, ranges), (view, error), now_ms());
                self.write("record a view fault", &statement).await?;
            }
        }
        Ok(views.into_iter().map(|(view, _)| view).collect())
    }

    /// View faults of one run or of all, the newest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn view_faults(&self, run: Option<&RunName>) -> Result<Vec<ViewFault>, Error> {
        match self.answer(&self.tables.view_faults(run)).await {
            // Without such a table no fault was recorded.
            Err(fault) if fault.is_missing() => Ok(Vec::new()),
            answer => answer.map_err(|fault| self.failed("look up view faults", fault)),
        }
    }

    /// Statements that fill each of these views with the rows that it lacks, all at once. A view that is gone,
    /// or that reads another view, has none.
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

    /// Removes these view faults, which the operator has seen. Faults recorded later stay.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn acknowledge(&self, faults: &[ViewFault]) -> Result<(), Error> {
        if faults.is_empty() {
            return Ok(());
        }
        let seen = faults.iter().map(|fault| (&*fault.run, fault.pass, &*fault.view, fault.at_ms));
        let statement = self.tables.acknowledge_view_faults(seen);
        self.execute("remove acknowledged view faults", &statement, HEAL_WITHIN).await
    }

    /// Removes the view faults of a run, or of one pass.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn forget_view_faults(&self, run: &RunName, pass: Option<u32>) -> Result<(), Error> {
        let faults = self.view_faults(Some(run)).await?;
        if !faults.iter().any(|fault| pass.is_none_or(|pass| pass == fault.pass)) {
            return Ok(());
        }
        let statement = self.tables.forget_view_faults(run, pass);
        self.execute("remove view faults", &statement, HEAL_WITHIN).await
    }
}

/// Joins batches, given in order, into half-open ranges.
pub(crate) fn in_ranges(batches: impl IntoIterator<Item = u32>) -> Vec<[u32; 2]> {
    let mut ranges: Vec<[u32; 2]> = Vec::new();
    for batch in batches {
        match ranges.last_mut() {
            // Split messages of one batch follow each other.
            Some([first, end]) if (*first..=*end).contains(&batch) => {
                *end = (*end).max(batch.saturating_add(1))
            }
            _ => ranges.push([batch, batch.saturating_add(1)]),
        }
    }
    ranges
}

/// A name without its quotes, because not every text of the server has them.
fn unquoted(name: &str) -> String {
    name.replace('`', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_joined_into_ranges() {
        assert_eq!(in_ranges([]), [[0; 2]; 0]);
        assert_eq!(in_ranges([3]), [[3, 4]]);
        assert_eq!(in_ranges([3, 3, 4, 5, 7, 9, 9, 10]), [[3, 6], [7, 8], [9, 11]]);
    }
}
