//! What is inserted together: rows as messages bring them, in groups of one pass and one schema.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millstream::envelope::{EnvelopeFault, RowBatch, Rows, decode_rows};
use millstream::frame;
use millstream::names::{Names, PassId, RunName};

use crate::model::rows::{MAX_INSERT_BYTES, MAX_INSERT_ROWS, Portion};
use crate::nats::delivery::Delivery;

/// What rows of one INSERT have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pub pass: PassId,
    /// The fingerprint of their columns: an INSERT names its columns once.
    pub schema: u64,
}

/// The rows of one computed batch, or of a part of one, as a message brings them. The bytes share the message's.
pub(super) struct MessageRows {
    pub portion: Portion,
    /// Places of its ids within the batch.
    places: Range<u32>,
    pub ids: u64,
    raw_bytes: u64,
    /// The columns, as the message names them.
    pub columns: Bytes,
    /// The build that computed it.
    pub build: Bytes,
    pub body: Bytes,
}

/// Such rows in our hands.
pub(super) struct Item {
    pub delivery: Delivery,
    pub rows: MessageRows,
}

#[derive(Default)]
pub(super) struct Group {
    pub items: Vec<Item>,
    /// Places that it has of each batch.
    places: HashMap<u32, Vec<Range<u32>>>,
    pub rows: u64,
    bytes: u64,
    oldest: Option<Instant>,
}

impl Group {
    pub fn is_old(&self, age: Duration) -> bool {
        self.oldest.is_some_and(|oldest| oldest.elapsed() >= age)
    }

    pub fn has_room_for(&self, rows: &MessageRows) -> bool {
        self.items.is_empty()
            || (self.rows + rows.ids <= MAX_INSERT_ROWS
                && self.bytes + rows.raw_bytes <= MAX_INSERT_BYTES
                && !self.overlaps(rows))
    }

    /// Whether it has rows of some of these ids already, as when one worker cut a batch otherwise than another. The ask takes
    /// rows in one part of the table for as many ids: no INSERT may have an id twice.
    fn overlaps(&self, rows: &MessageRows) -> bool {
        let mut of_batch = self.places.get(&rows.portion.batch).into_iter().flatten();
        of_batch.any(|own| own.start < rows.places.end && rows.places.start < own.end)
    }

    pub fn add(&mut self, item: Item) {
        let Item { delivery, rows } = &item;
        self.rows += rows.ids;
        self.bytes += rows.raw_bytes;
        self.places.entry(rows.portion.batch).or_default().push(rows.places.clone());
        self.oldest.get_or_insert_with(|| delivery.received());
        self.items.push(item);
    }
}

/// The rows of a message, if it is one that has rows.
pub(super) fn read_rows(
    names: &Names,
    subject: &str,
    payload: &Bytes,
) -> Result<Option<(GroupKey, MessageRows)>, EnvelopeFault> {
    let Rows::Batch(rows) = decode_rows(payload)? else { return Ok(None) };
    let foreign = || EnvelopeFault::Foreign { length: payload.len() };
    let portion = if rows.is_whole() {
        Portion::all(rows.batch, rows.batch_ids)
    } else {
        Portion::between(rows.batch, rows.batch_ids, rows.first, rows.last)
    };
    let places = rows.from..rows.from.saturating_add(rows.ids);
    let RowBatch { pass, ids, raw_bytes, schema, columns, build, rows: body, .. } = rows;
    let run = rows.run.parse::<RunName>().map_err(|_| foreign())?;
    let pass = run.pass(pass);
    if !names.is_rows_subject(subject, &pass, portion.batch) {
        return Err(foreign());
    }
    // Behind each other in one INSERT, a body that ends early would take bytes of the next for its own.
    if frame::raw_len(body) != Some(raw_bytes) {
        return Err(EnvelopeFault::Body { length: payload.len() });
    }
    let [columns, build] = [columns, build].map(|text| payload.slice_ref(text.as_bytes()));
    let body = payload.slice_ref(body);
    let rows = MessageRows { portion, places, ids: u64::from(ids), raw_bytes, columns, build, body };
    Ok(Some((GroupKey { pass, schema }, rows)))
}
