//! The pipeline's own summary query about a pass.

use std::time::Duration;

use millstream::names::PassId;
use serde_json::Value;

use super::users::answered;
use super::{ANSWER_LATER, ANSWER_WITHIN, Store};
use crate::clickhouse::sql::{TIME_LIMIT, describe_query};
use crate::error::{Error, StoreFault};

/// The largest answer, because it is stored in a record.
const SUMMARY_BYTES: usize = 64 << 10;
/// The server's time limit for the summary: no seal waits longer for it.
const SUMMARY_LIMIT: Duration = Duration::from_secs(300);

impl Store {
    /// Asks ClickHouse whether the pipeline's summary is a valid query, before a pass needs it.
    ///
    /// # Errors
    /// [`Error::Summary`] with ClickHouse's message; [`Error::Store`].
    pub async fn check_summary(&self) -> Result<(), Error> {
        let Some(query) = self.tables.empty_summary() else { return Ok(()) };
        let query = self.in_database().await?.query_raw(&describe_query(&query));
        let asked = answered(query, ANSWER_WITHIN, "TSV", &mut drop).await;
        asked.map_err(|source| Error::Summary { source })
    }

    /// The answer to the pipeline's summary of a pass: its rows as objects; `None` without a summary.
    ///
    /// # Errors
    /// [`Error::Summary`], also when the answer is too large for a record; [`Error::Store`].
    pub async fn summary(&self, pass: &PassId) -> Result<Option<Vec<Value>>, Error> {
        let Some(query) = self.tables.summary(pass) else { return Ok(None) };
        let query = self.in_database().await?.query_raw(&query);
        let query = query.with_setting(TIME_LIMIT, SUMMARY_LIMIT.as_secs().to_string());
        let mut answer = Vec::new();
        let mut keep = |bytes: bytes::Bytes| {
            if answer.len() <= SUMMARY_BYTES {
                answer.extend_from_slice(&bytes);
            }
        };
        let asked = answered(query, SUMMARY_LIMIT + ANSWER_LATER, "JSONEachRow", &mut keep).await;
        asked.map_err(|source| Error::Summary { source })?;
        let failed = |text: String| Error::Summary { source: StoreFault::Exception { code: 0, text } };
        if answer.len() > SUMMARY_BYTES {
            return Err(failed(format!("its answer is more than {SUMMARY_BYTES} bytes")));
        }
        let lines = answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let rows = lines.map(serde_json::from_slice).collect::<Result<_, _>>();
        rows.map(Some).map_err(|fault| failed(fault.to_string()))
    }
}
