//! Which columns the table takes: **rows-name-their-schema**.
//!
//! The sink stores rows of another pipeline version like its own. The table must have each of their columns, with a
//! type that holds the values. Otherwise the sink leaves the rows to other sinks, or to later, because the table may
//! change.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream::schema::Schema;

use super::group::Item;
use crate::clickhouse::store::{Fit, Store};
use crate::error::{Code, Error};

/// How long the table's answer is valid, because an operator may alter the table.
const HOLDS: Duration = Duration::from_secs(60);

/// Schemas of received rows, and whether the table takes them.
#[derive(Default)]
pub(super) struct Schemas(Mutex<HashMap<u64, (Instant, Known)>>);

/// A schema, and whether the table takes it.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// The columns; `None` when the message's column list cannot be parsed.
    pub schema: Option<Arc<Schema>>,
    pub fit: Fit,
}

impl Schemas {
    /// Whether the table takes rows of these columns, by a recent answer.
    pub async fn judge(&self, store: &Store, fingerprint: u64, item: &Item) -> Result<Known, Error> {
        let fresh = self.known().get(&fingerprint).filter(|(asked, _)| asked.elapsed() < HOLDS).cloned();
        if let Some((_, known)) = fresh {
            return Ok(known);
        }
        let text = String::from_utf8_lossy(&item.rows.columns);
        let known = match Schema::from_text(&text).ok().filter(|schema| schema.fingerprint() == fingerprint) {
            Some(schema) => Known {
                fit: store.fit(&schema, &String::from_utf8_lossy(&item.rows.build)).await?,
                schema: Some(Arc::new(schema)),
            },
            None => {
                let fault = format!("this build cannot parse their column list: {text}");
                Known { schema: None, fit: Fit::Unfit(vec![fault]) }
            }
        };
        if let Fit::Unfit(faults) = &known.fit {
            tracing::error!(
                columns = %text,
                faults = faults.join("; "),
                hint = "run `setup` with the build that computed the rows: it shows the missing columns; the rows wait in the stream",
                code = %Code::RowsOfOtherSchema,
                "rows of another schema are not stored: the table does not take their columns"
            );
        }
        self.known().insert(fingerprint, (Instant::now(), known.clone()));
        Ok(known)
    }

    /// Makes the sink ask the table again before the next rows of this schema, because it refused some.
    pub fn doubt(&self, fingerprint: u64) {
        self.known().remove(&fingerprint);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<u64, (Instant, Known)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
