//! Constants and names of rows on their way to the table.

use millstream::names::PassId;

/// `status` of a row that holds a result.
pub const STATUS_OK: u8 = 1;
/// `status` of a dead letter.
pub const STATUS_DEAD: u8 = 2;

/// Most rows of one INSERT, so that it stays one block and one part. By default a server cuts blocks at 1,048,449 rows,
/// and one that does not know [`INSERT_SETTINGS`](crate::clickhouse::sql::INSERT_SETTINGS) keeps that default.
pub const MAX_INSERT_ROWS: u64 = 1_000_000;

pub(crate) const MAX_INSERT_BYTES: u64 = 128 << 20;

/// Ids of a batch that travel in one message: all of them, or one range of a split rows message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Portion {
    /// The batch.
    pub batch: u32,
    /// Ids that the batch has in all, by its message: `batch_ids` of its rows.
    pub of: u32,
    /// The first and the last id, as text, of a split rows message; `None` for a whole batch.
    pub ids: Option<(String, String)>,
}

impl Portion {
    /// A whole batch.
    pub fn all(batch: u32, of: u32) -> Self {
        Self { batch, of, ids: None }
    }

    /// The ids of a batch from `first` to `last`.
    pub fn between(batch: u32, of: u32, first: &str, last: &str) -> Self {
        Self { batch, of, ids: Some((first.to_owned(), last.to_owned())) }
    }
}

/// Which rows a sink pulls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drawn {
    /// Rows of all passes, shared with all other sinks.
    Shared,
    /// All rows that the stream has of one pass, whichever sink pulled them before.
    Pass(PassId),
}
