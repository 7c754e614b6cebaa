//! One row for one id, ok or dead: **every-id-yields-one-row**.
//!
//! Rows are columns from the start: each value goes into the builder of its column, which checks it. A row that does
//! not fit its columns becomes a dead letter of its id (**a-bad-value-costs-one-id**).

use std::ops::Range;
use std::time::{Duration, Instant};

use millstream::columns::Columns;
use millstream::schema::Schema;
use serde::{Deserialize, Serialize};

/// Bytes to which a dead letter's reason is cut.
const MAX_REASON: usize = 4096;
/// Most bytes of a row before compression: no server takes more in one message, and a frame between two processes
/// ([`millstream::child::MAX_FRAME`]) holds it behind the other rows of a piece.
const MAX_ROW: usize = 64 << 20;
/// One row in so many is timed while it is written: reading a clock costs as much as a light row.
const TIMED: usize = 128;

/// Rows of some ids of a batch, one for each, in the order of the ids.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rows {
    /// The pipeline's own columns; a dead letter has default values there.
    pub columns: Columns,
    /// Places of the dead letters, in order, with their reasons.
    pub dead: Vec<(u32, String)>,
    /// Time spent writing the timed rows, and their number.
    #[serde(skip)]
    writing: (Duration, u32),
}

impl Rows {
    /// No rows yet, with capacity for `rows` of them.
    pub fn with_room(schema: &Schema, rows: usize) -> Self {
        Self { columns: Columns::with_room(schema, rows), dead: Vec::new(), writing: Default::default() }
    }

    /// How many rows there are.
    pub fn count(&self) -> usize {
        self.columns.rows()
    }

    /// Size before compression, without the columns that all pipelines have.
    pub fn bytes(&self) -> usize {
        self.columns.bytes()
    }

    /// Appends the row of an id; a dead letter if the row does not fit its columns, or is too large.
    pub fn ok<R: Serialize>(&mut self, schema: &Schema, row: &R) {
        if !self.count().is_multiple_of(TIMED) {
            return self.write(schema, row);
        }
        let begun = Instant::now();
        self.write(schema, row);
        self.writing = (self.writing.0 + begun.elapsed(), self.writing.1 + 1);
    }

    fn write<R: Serialize>(&mut self, schema: &Schema, row: &R) {
        let rows = self.count();
        let before = self.bytes();
        match self.columns.push(schema, row) {
            Ok(()) if self.bytes() - before <= MAX_ROW => {}
            Ok(()) => {
                let length = self.bytes() - before;
                self.columns.truncate(rows);
                self.dead(
                    schema,
                    &format!("row of {length} bytes is larger than a row may be ({MAX_ROW} bytes)"),
                );
            }
            Err(fault) => self.dead(schema, &unfit(&fault)),
        }
    }

    /// Appends the row that an isolated process made.
    pub fn ok_columns(&mut self, row: Columns) {
        self.columns.append(row);
    }

    /// Appends the row of a dead letter.
    pub fn dead(&mut self, schema: &Schema, reason: &str) {
        self.dead.push((self.count() as u32, shortened(reason).to_owned()));
        self.columns.push_blank(schema);
    }

    /// Appends rows of the same columns.
    pub fn append(&mut self, more: Self) {
        let rows = self.count() as u32;
        self.dead.extend(more.dead.into_iter().map(|(at, reason)| (rows + at, reason)));
        self.columns.append(more.columns);
    }

    /// Copies the rows at these places.
    pub fn slice(&self, places: Range<usize>) -> Self {
        let start = places.start as u32;
        let end = places.end as u32;
        let dead = self.dead.iter().filter(|(at, _)| (start..end).contains(at));
        let dead = dead.map(|(at, reason)| (at - start, reason.clone())).collect();
        Self { columns: self.columns.slice(places), dead, writing: Default::default() }
    }

    /// Copies the rows in another order: the first one was at place `order[0]`.
    pub fn reordered(&self, order: &[u32]) -> Self {
        let mut reasons: Vec<Option<&str>> = vec![None; self.count()];
        for (at, reason) in &self.dead {
            reasons[*at as usize] = Some(reason);
        }
        let dead = (0..).zip(order).filter_map(|(new, old)| Some((new, reasons[*old as usize]?.to_owned())));
        let columns = self.columns.reordered(order);
        let dead = dead.collect();
        Self { columns, dead, writing: Default::default() }
    }

    /// Whether rows from another process are `rows` rows of these columns.
    pub fn is_sound(&self, schema: &Schema, rows: usize) -> bool {
        self.columns.is_sound(schema, rows)
            && self.dead.is_sorted_by(|(one, _), (next, _)| one < next)
            && self.dead.last().is_none_or(|(at, _)| (*at as usize) < rows)
    }

    /// Estimated time that writing all rows took.
    pub fn encoding(&self) -> Duration {
        let (time, rows) = self.writing;
        time.mul_f64(self.count() as f64 / f64::from(rows.max(1)))
    }
}

/// The dead letter's text for a row that does not fit its columns.
fn unfit(fault: &impl std::fmt::Display) -> String {
    format!("the row does not fit its columns: {fault}")
}

/// The dead letter's text for an id that asked for another attempt when none was left.
pub(super) fn gave_up(reason: &str) -> String {
    format!("gave up after every attempt: {reason}")
}

fn shortened(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(MAX_REASON)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Number {
        n: u64,
    }

    fn schema() -> Schema {
        Schema::parse(&[("n", "UInt32")]).expect("sound")
    }

    #[test]
    fn reasons_are_cut_between_characters() {
        assert_eq!(shortened(&"ü".repeat(4000)).len(), MAX_REASON);
    }

    #[test]
    fn a_value_that_its_column_cannot_hold_costs_one_id() {
        let (schema, mut rows) = (schema(), Rows::with_room(&schema(), 3));
        for n in [1, 1 << 40, 3] {
            rows.ok(&schema, &Number { n });
        }
        assert_eq!((rows.count(), rows.dead.len(), rows.dead[0].0), (3, 1, 1));
        let reason = &rows.dead[0].1;
        assert!(reason.contains("column `n`") && reason.contains("1099511627776"), "{reason}");
    }

    #[test]
    fn dead_letters_keep_their_place() {
        let (schema, mut rows) = (schema(), Rows::with_room(&schema(), 4));
        rows.ok(&schema, &Number { n: 1 });
        rows.dead(&schema, "second");
        let mut more = Rows::with_room(&schema, 2);
        more.dead(&schema, "third");
        more.ok(&schema, &Number { n: 4 });
        rows.append(more);
        assert!(rows.is_sound(&schema, 4) && !rows.is_sound(&schema, 5));
        let dead = |rows: &Rows| rows.dead.iter().map(|(at, why)| format!("{at} {why}")).collect::<Vec<_>>();
        assert_eq!(dead(&rows), ["1 second", "2 third"]);
        assert_eq!(dead(&rows.slice(2..4)), ["0 third"]);
        assert_eq!(dead(&rows.reordered(&[2, 0, 3, 1])), ["0 third", "3 second"]);
    }
}
