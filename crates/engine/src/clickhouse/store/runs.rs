//! Records of runs and passes in ClickHouse, because NATS is never the only truth.

use clickhouse::Row;
use millstream::names::RunName;
use serde::Deserialize;

use super::Store;
use crate::clickhouse::sql::{SeenPass, View, long_running};
use crate::error::Error;
use crate::model::record::{Published, RunRecord};

/// A run's record, as [`Tables::run_record`](crate::clickhouse::sql::Tables::run_record) selects it.
#[derive(Row, Deserialize)]
struct KeptRun {
    source: String,
    fingerprint: String,
    batch_ids: u32,
    expected_ids: u64,
    may_repeat: u8,
    created_ms: u64,
    batches: u32,
    ids: u64,
    digest: u64,
    dropped_repeats: u64,
    published_ms: u64,
}

/// The prefix of the query ids of a pipeline's INSERTs in one database.
pub(crate) fn insert_prefix(database: &str, pipeline: &str) -> String {
    format!("millstream-{database}.{pipeline}-")
}

impl KeptRun {
    fn record(self, run: &RunName) -> RunRecord {
        let published = Published {
            batches: self.batches,
            ids: self.ids,
            digest: self.digest,
            dropped_repeats: self.dropped_repeats,
            at_ms: self.published_ms,
        };
        RunRecord {
            run: run.to_owned(),
            source: self.source,
            fingerprint: self.fingerprint,
            batch_ids: self.batch_ids,
            expected_ids: Some(self.expected_ids),
            may_repeat: self.may_repeat != 0,
            created_ms: self.created_ms,
            // A published run has at least one batch.
            published: (self.batches > 0).then_some(published),
            timing: None,
            so_far: None,
        }
    }
}

impl Store {
    /// A run's record in ClickHouse, for when NATS has lost it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn run_record(&self, run: &RunName) -> Result<Option<RunRecord>, Error> {
        let kept: Vec<KeptRun> = self.all("look up a run", &self.tables.run_record(run)).await?;
        Ok(kept.into_iter().next().map(|kept| kept.record(run)))
    }

    /// Stores a run's record, unless it is already stored.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn keep_run(&self, record: &RunRecord) -> Result<(), Error> {
        match self.run_record(&record.run).await? {
            Some(kept) if kept.published.is_some() || record.published.is_none() => Ok(()),
            _ => self.write("store the run's record", &self.tables.insert_run(record)).await,
        }
    }

    /// Whether any process's sink INSERT runs longer than `seconds`; `None` if this user may not ask.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn has_long_inserts(&self, seconds: u64) -> Result<Option<bool>, Error> {
        let question = long_running(
            &insert_prefix(self.tables.database(), &self.tables.view_name(View::Sealed)),
            seconds,
        );
        match self.answer::<u64>(&question).await {
            Ok(found) => Ok(Some(found.iter().any(|queries| *queries > 0))),
            Err(fault) if fault.is_denied() => Ok(None),
            Err(fault) => Err(self.failed("look for running inserts", fault)),
        }
    }

    /// The runs whose records ClickHouse has, the newest first; empty if the table does not exist.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn kept_runs(&self) -> Result<Vec<RunName>, Error> {
        match self.answer::<String>(&self.tables.kept_runs()).await {
            Err(fault) if fault.is_missing() => Ok(Vec::new()),
            answer => {
                let names = answer.map_err(|fault| self.failed("look up runs", fault))?;
                Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
            }
        }
    }

    /// The passes of a run that readers may see, in order.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sealed_passes(&self, run: &RunName) -> Result<Vec<SeenPass>, Error> {
        self.all("look up sealed passes", &self.tables.sealed_passes(run)).await
    }
}
