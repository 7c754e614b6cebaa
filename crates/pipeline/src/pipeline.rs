//! The trait that a pipeline's author implements, and what one id can come to.

use serde::{Serialize, de::DeserializeOwned};

use crate::{Id, Limits};

/// What computing one id came to: a row, or a [`Failure`] that says whether trying again may help.
pub type Outcome<R> = Result<R, Failure>;

/// Why an id yielded no row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Transient: the id is tried again after a pause, a bounded number of times, then becomes a dead letter.
    #[error("{0}")]
    Retry(String),
    /// Final: the id becomes a dead letter at once, with this reason.
    #[error("{0}")]
    Reject(String),
}

impl Failure {
    /// A transient failure. `reason` is what the dead letter says should every attempt fail.
    pub fn retry(reason: impl ToString) -> Self {
        Self::Retry(reason.to_string())
    }

    /// A final failure: no further attempt is made.
    pub fn reject(reason: impl ToString) -> Self {
        Self::Reject(reason.to_string())
    }
}

/// One CPU-heavy function over many ids, with the table its rows go to.
///
/// The function runs on a rayon pool, many ids at once, so `self` is shared: what it holds is built once in `main`, or in
/// [`Self::start`]. It may use rayon itself, threads, programs; it finds no signal blocked and /dev/null as its standard
/// input, and what it prints goes into the worker's log. What it started ends with its process.
///
/// It may panic: the panic becomes that id's dead letter. It may crash its process, or overrun [`Self::LIMITS`]: ids are
/// computed in processes of their own, and only that id becomes a dead letter. So `main` runs in each of them, and its
/// way to the command line must have no effect but building `self`. The function should not block for long on anything
/// but the CPU.
pub trait Pipeline: Send + Sync + 'static {
    /// Names the streams and tables: `[a-z][a-z0-9_]*`, at most 32 characters.
    const NAME: &'static str;

    /// The version of the function, for people: rows carry it beside a hash of the program. `env!("CARGO_PKG_VERSION")` is
    /// a good one.
    const VERSION: &'static str = "";

    /// The ClickHouse columns of [`Self::Row`]: name and type. A field goes into the column of its name; which Rust value
    /// goes into which type is in [`columns`](crate::columns).
    ///
    /// [`check`](crate::check) compares them with the row type before any id is computed; a value that does not fit makes
    /// its id a dead letter. The names in [`OWN_COLUMNS`](crate::schema::OWN_COLUMNS) are taken.
    const COLUMNS: &'static [(&'static str, &'static str)];

    /// What each id may take: attempts, time, memory; and whether ids are computed alone.
    const LIMITS: Limits = Limits::DEFAULT;

    /// A query that is run once when a pass is sealed, over its ok rows, which `{rows}` stands for: a table of `id` and the
    /// pipeline's own columns. Its answer, a few rows, is shown with the run and kept with the pass.
    ///
    /// ```
    /// # const SUMMARY: Option<&str> =
    /// Some("SELECT max(steps) AS longest, argMax(id, steps) AS id FROM {rows}");
    /// ```
    const SUMMARY: Option<&'static str> = None;

    /// The id type: `u64` or `String`.
    type Id: Id;

    /// A struct with a field per column. `Deserialize` is asked for so that the check can make blank rows of it.
    type Row: Serialize + DeserializeOwned + Send;

    /// Gets ready to compute: what takes long and is needed by all ids, a model or a dictionary, is loaded here.
    ///
    /// Called once in each process that computes, before its first id, and never in others; [`Limits::start_within`] is
    /// its own limit, and none of its time or memory counts as an id's. What it makes goes into a field of `self` behind a
    /// [`OnceLock`](std::sync::OnceLock).
    ///
    /// # Errors
    /// Why this host cannot compute. It says so, takes no ids, and tries again later; no id is to blame.
    fn start(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    /// Computes one id.
    ///
    /// # Errors
    /// [`Failure::Retry`] for what may pass, [`Failure::Reject`] for what will not.
    fn compute(&self, id: &Self::Id) -> Outcome<Self::Row>;
}
