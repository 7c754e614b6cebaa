//! Rows on their way to the table: what they are called there, and how many go at once.

use millstream::names::PassId;

/// `status` of a row that holds a result.
pub const STATUS_OK: u8 = 1;
/// `status` of a dead letter.
pub const STATUS_DEAD: u8 = 2;

/// One INSERT carries no more than this, so that it stays one block and one part: a server cuts blocks at 1,048,449 rows
/// unless it is told otherwise, and one that does not know [`INSERT_SETTINGS`](crate::clickhouse::sql::INSERT_SETTINGS) is not told.
pub const MAX_INSERT_ROWS: u64 = 1_000_000;

pub(crate) const MAX_INSERT_BYTES: u64 = 128 << 20;

/// Ids of a batch that travel together: all of them, or those of one part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Portion {
    /// The batch.
    pub batch: u32,
    /// Ids that its message says it has in all: what `batch_ids` is in its rows.
    pub of: u32,
    /// The first and the last id, as text, of a part.
    pub ids: Option<(String, String)>,
}

impl Portion {
    /// A whole batch.
    pub fn all(batch: u32, of: u32) -> Self {
        Self { batch, of, ids: None }
    }

    /// The ids of a batch from one to another.
    pub fn between(batch: u32, of: u32, first: &str, last: &str) -> Self {
        Self { batch, of, ids: Some((first.to_owned(), last.to_owned())) }
    }
}

/// Which rows a sink draws.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drawn {
    /// Those of all passes, shared with all other sinks.
    Shared,
    /// All that the stream has of one pass, whichever sink drew them before.
    Pass(PassId),
}
