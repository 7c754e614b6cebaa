//! What computing comes to: rows of a batch, and of the pieces that it is cut into.

use millstream::Id;
use millstream::names::PassId;
use millstream::schema::Schema;
use serde::{Deserialize, Serialize};

use super::row::Rows;
use crate::model::times::Spent;

/// A piece whose rows come to more than this is ended early.
pub(super) const PIECE_BYTES: usize = 4 << 20;

/// Which batch the ids belong to: what every one of its rows begins with.
#[derive(Debug, Clone)]
pub struct BatchKey {
    /// The pass that it is computed for.
    pub pass: PassId,
    /// The batch.
    pub batch: u32,
    /// Ids that the batch has in all.
    pub ids: u32,
}

/// What computing some ids of a batch came to.
#[derive(Debug)]
pub struct Computed<I> {
    /// The ids that have a row, in the order of the rows.
    pub ids: Vec<I>,
    /// Their rows.
    pub rows: Rows,
    /// Ids that asked to be tried again, with their reasons. They have no row yet.
    pub again: Vec<(I, String)>,
    /// What they took of the cores.
    pub spent: Spent,
}

impl<I> Computed<I> {
    /// No ids yet.
    pub fn none(schema: &Schema) -> Self {
        let rows = Rows::with_room(schema, 0);
        Self { ids: Vec::new(), rows, again: Vec::new(), spent: Spent::default() }
    }

    /// Appends other ids of the same batch.
    pub fn append(&mut self, mut more: Self) {
        self.ids.append(&mut more.ids);
        self.rows.append(more.rows);
        self.again.append(&mut more.again);
        self.spent += more.spent;
    }
}

impl<I: Id> Computed<I> {
    /// A piece of an order over these ids.
    pub(super) fn of(ids: &[I], piece: Piece) -> Self {
        let Piece { from, count, rows, again: asking, spent } = piece;
        let mut rest = &ids[from as usize..(from + count) as usize];
        let mut next = from;
        let mut ids = Vec::with_capacity(rest.len());
        let mut again = Vec::new();
        for (place, reason) in asking {
            let (before, from_it) = rest.split_at((place - next) as usize);
            ids.extend_from_slice(before);
            again.push((from_it[0].clone(), reason));
            (rest, next) = (&from_it[1..], place + 1);
        }
        ids.extend_from_slice(rest);
        Self { ids, rows, again, spent }
    }
}

/// Neighbouring ids that were computed together.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Piece {
    /// Place of the first among the ids of the order.
    pub from: u32,
    /// Ids that it covers, whether they have a row or not.
    pub count: u32,
    /// A row for each of them, but for those that are to be tried again.
    pub rows: Rows,
    /// Places within the order of ids that asked to be tried again, in order, and why.
    pub again: Vec<(u32, String)>,
    /// What they took of the cores.
    pub spent: Spent,
}

impl Piece {
    /// Whether a piece that another process sent is of an order of so many ids, with rows of these columns.
    pub fn is_sound(&self, schema: &Schema, ids: usize) -> bool {
        let places = self.from..self.from.saturating_add(self.count);
        let again = self.again.iter().map(|(at, _)| *at);
        let rows = (self.count as usize).checked_sub(self.again.len());
        places.end as usize <= ids
            && again.clone().is_sorted_by(|a, b| a < b)
            && again.clone().all(|at| places.contains(&at))
            && rows.is_some_and(|rows| self.rows.is_sound(schema, rows))
    }
}
