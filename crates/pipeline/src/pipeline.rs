//! The trait that a pipeline's author implements, and the outcomes of one id.

use serde::{Serialize, de::DeserializeOwned};

use crate::{Id, Limits};

/// The outcome of one id: a row, or a [`Failure`] that says whether another attempt may help.
pub type Outcome<R> = Result<R, Failure>;

/// Why an id yielded no row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A transient failure: the id is tried again after a pause, a limited number of times, and then becomes a
    /// dead letter.
    #[error("{0}")]
    Retry(String),
    /// A final failure: the id becomes a dead letter at once, with this reason.
    #[error("{0}")]
    Reject(String),
}

impl Failure {
    /// A transient failure. `reason` is the text of the dead letter if every attempt fails.
    pub fn retry(reason: impl ToString) -> Self {
        Self::Retry(reason.to_string())
    }

    /// A final failure: no further attempt is made.
    pub fn reject(reason: impl ToString) -> Self {
        Self::Reject(reason.to_string())
    }
}

/// One CPU-heavy function over many ids, with the table for its rows.
///
/// The function runs on a rayon pool, many ids at once, so `self` is shared: build its content once, in `main`
/// or in [`Self::start`]. The function may use rayon itself, threads and programs. It finds no signal blocked
/// and /dev/null as its standard input, and its output goes into the worker's log. What it starts ends with its
/// process.
///
/// A panic becomes the id's dead letter. The function may also crash its process, or exceed [`Self::LIMITS`]:
/// ids are computed in separate processes, and only that id becomes a dead letter. So `main` runs in each of
/// these processes, and must have no effect but building `self` before it reaches the command line. The
/// function should not block for long on anything but the CPU.
pub trait Pipeline: Send + Sync + 'static {
    /// Names the streams and tables: `[a-z][a-z0-9_]*`, at most 32 characters.
    const NAME: &'static str;

    /// The version of the function, for operators: each row carries it beside a hash of the program.
    /// `env!("CARGO_PKG_VERSION")` is a good value.
    const VERSION: &'static str = "";

    /// The ClickHouse columns of [`Self::Row`]: name and type. A field goes into the column of its name;
    /// [`columns`](crate::columns) lists which Rust value goes into which type.
    ///
    /// [`check`](crate::check) compares them with the row type before any id is computed; a value that does not fit makes
    /// its id a dead letter. The names in [`OWN_COLUMNS`](crate::schema::OWN_COLUMNS) are taken.
    const COLUMNS: &'static [(&'static str, &'static str)];

    /// What each id may use: attempts, time, memory; and whether ids are computed in isolated processes.
    const LIMITS: Limits = Limits::DEFAULT;

    /// A query that runs once when a pass is sealed, over its ok rows: `{rows}` stands for a table of `id` and
    /// the pipeline's own columns. The answer, a few rows, is shown with the run and stored with the pass.
    ///
    /// ```
    /// # const SUMMARY: Option<&str> =
    /// Some("SELECT max(steps) AS longest, argMax(id, steps) AS id FROM {rows}");
    /// ```
    const SUMMARY: Option<&'static str> = None;

    /// The id type: `u64` or `String`.
    type Id: Id;

    /// A struct with a field per column. `Deserialize` is required so that the check can make blank rows.
    type Row: Serialize + DeserializeOwned + Send;

    /// Prepares the process: loads what takes long and all ids need, such as a model or a dictionary.
    ///
    /// Called once in each computing process, before its first id, and never in others. It has its own limit,
    /// [`Limits::start_within`]; its time and memory count for no id. Put the result into a field of `self`
    /// behind a [`OnceLock`](std::sync::OnceLock).
    ///
    /// # Errors
    /// Why this host cannot compute. The host reports it, takes no ids, and tries again later; no id is to
    /// blame.
    fn start(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    /// Computes one id.
    ///
    /// # Errors
    /// [`Failure::Retry`] for a transient failure, [`Failure::Reject`] for a final one.
    fn compute(&self, id: &Self::Id) -> Outcome<Self::Row>;
}
