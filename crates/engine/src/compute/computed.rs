//! Results of computing: the rows of a batch, and of the pieces of an order.

use millstream::Id;
use millstream::names::PassId;
use millstream::schema::Schema;
use serde::{Deserialize, Serialize};

use super::row::Rows;
use crate::model::times::Spent;

/// A piece ends early once its rows exceed this size.
pub(super) const PIECE_BYTES: usize = 4 << 20;

/// The batch that ids belong to; every row begins with these values.
#[derive(Debug, Clone)]
pub struct BatchKey {
    /// The pass that the worker computes.
    pub pass: PassId,
    /// The batch.
    pub batch: u32,
    /// Ids of the whole batch.
    pub ids: u32,
}

/// The result of computing some ids of a batch.
#[derive(Debug)]
pub struct Computed<I> {
    /// Ids that have a row, in the order of the rows.
    pub ids: Vec<I>,
    /// The rows of `ids`.
    pub rows: Rows,
    /// Ids that asked for another attempt, with their reasons. They have no row yet.
    pub again: Vec<(I, String)>,
    /// Core time that the ids took.
    pub spent: Spent,
}

impl<I> Computed<I> {
    /// An empty result.
    pub fn none(schema: &Schema) -> Self {
        let rows = Rows::with_room(schema, 0);
        Self { ids: Vec::new(), rows, again: Vec::new(), spent: Spent::default() }
    }

    /// Appends the result of other ids of the same batch.
    pub fn append(&mut self, mut more: Self) {
        self.ids.append(&mut more.ids);
        self.rows.append(more.rows);
        self.again.append(&mut more.again);
        self.spent += more.spent;
    }
}

impl<I: Id> Computed<I> {
    /// The result of a piece of an order over `ids`.
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

/// Neighbouring ids that a thread computed together.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Piece {
    /// Place of the piece's first id within the order.
    pub from: u32,
    /// Ids that the piece covers, with or without a row.
    pub count: u32,
    /// A row for each id, except ids that asked for another attempt.
    pub rows: Rows,
    /// Places, within the order, of ids that asked for another attempt, in order, with their reasons.
    pub again: Vec<(u32, String)>,
    /// Core time that the ids took.
    pub spent: Spent,
}

impl Piece {
    /// Whether a piece from another process fits an order of `ids` ids and rows of these columns.
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
