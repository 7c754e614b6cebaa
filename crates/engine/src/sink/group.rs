//! Rows that are inserted together: groups of messages of one pass and one schema.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millstream::envelope::{EnvelopeFault, RowBatch, Rows, decode_rows};
use millstream::frame;
use millstream::names::{Names, PassId, RunName};

use crate::model::rows::{MAX_INSERT_BYTES, MAX_INSERT_ROWS, Portion};
use crate::nats::delivery::Delivery;

/// What the rows of one INSERT have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pub pass: PassId,
    /// The fingerprint of the rows' columns: an INSERT names its columns once.
    pub schema: u64,
}

/// The rows of a batch, or of one split message, sharing the message's bytes.
pub(super) struct MessageRows {
    pub portion: Portion,
    /// Places of the ids within the batch.
    places: Range<u32>,
    pub ids: u64,
    raw_bytes: u64,
    /// The columns, as the message names them.
    pub columns: Bytes,
    /// The build that computed the rows.
    pub build: Bytes,
    pub body: Bytes,
}

/// Rows that the sink holds, with their delivery.
pub(super) struct Item {
    pub delivery: Delivery,
    pub rows: MessageRows,
}

#[derive(Default)]
pub(super) struct Group {
    pub items: Vec<Item>,
    /// Places that the group has of each batch.
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

    /// Whether the group already has rows of some of these ids, as when two workers split a batch differently. The ask
    /// relies on it: within one part of the table, rows count as ids, so no INSERT may have an id twice.
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

/// The rows of a message; `None` for a manifest.
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
    // In a joined INSERT, a body that is too short would take bytes of the next one.
    if frame::raw_len(body) != Some(raw_bytes) {
        return Err(EnvelopeFault::Body { length: payload.len() });
    }
    let [columns, build] = [columns, build].map(|text| payload.slice_ref(text.as_bytes()));
    let body = payload.slice_ref(body);
    let rows = MessageRows { portion, places, ids: u64::from(ids), raw_bytes, columns, build, body };
    Ok(Some((GroupKey { pass, schema }, rows)))
}
