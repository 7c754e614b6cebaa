//! What the table says of the columns that rows came with: **rows-name-their-schema**.
//!
//! Rows of another version of the pipeline are stored like its own, if the table has each of their columns with a type
//! that holds the values. Else they are left to other sinks, or to a later moment: the table may change.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use millstream::schema::Schema;

use super::group::Item;
use crate::clickhouse::store::{Fit, Store};
use crate::error::{Code, Error};

/// How long an answer of the table's holds: an operator may alter it.
const HOLDS: Duration = Duration::from_secs(60);

/// Schemas that rows came with, and whether the table takes them.
#[derive(Default)]
pub(super) struct Schemas(Mutex<HashMap<u64, (Instant, Known)>>);

/// A schema, and what the table says of it.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// The columns; `None` when the message's own text of them cannot be read.
    pub schema: Option<Arc<Schema>>,
    pub fit: Fit,
}

impl Schemas {
    /// Whether the table takes rows of these columns, as asked a moment ago.
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
                let fault = format!("their columns are told in a way that this build cannot read: {text}");
                Known { schema: None, fit: Fit::Unfit(vec![fault]) }
            }
        };
        if let Fit::Unfit(faults) = &known.fit {
            tracing::error!(
                columns = %text,
                faults = faults.join("; "),
                hint = "run `setup` of the build that computed them, which shows what the table lacks; the rows wait",
                code = %Code::RowsOfOtherSchema,
                "rows of another schema are not stored: the table does not take their columns"
            );
        }
        self.known().insert(fingerprint, (Instant::now(), known.clone()));
        Ok(known)
    }

    /// The table is asked again before the next rows of this schema: it refused some.
    pub fn doubt(&self, fingerprint: u64) {
        self.known().remove(&fingerprint);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<u64, (Instant, Known)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
