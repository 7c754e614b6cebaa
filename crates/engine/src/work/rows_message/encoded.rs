//! The rows of a batch as messages: one message, split messages, or the finished rows only.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::{RowBatch, RowCut, encode_cut, encode_rows};
use millstream::names::PassId;
use millstream::schema::Schema;

use crate::compute::block::{Head, Packed, pack};
use crate::compute::{self, BatchKey, Computed, Maker};
use crate::model::moment::now_ms;
use crate::model::rows::MAX_INSERT_BYTES;

/// Bytes of a message's headers, which count toward the server's limit.
pub(super) const HEADERS: usize = 4 << 10;
/// Most ranges of one manifest; where more are needed, a range is divided again.
pub(super) const MAX_PARTS: usize = 1000;

/// A message to store.
pub(crate) struct Message {
    pub(crate) bytes: Bytes,
    /// The ranges that the message lists, if it is a manifest.
    pub(crate) parts: Vec<Range<u32>>,
    /// Whether the message is one row that was too large and became a dead letter.
    pub(super) too_large: bool,
}

impl Message {
    fn rows(bytes: Vec<u8>) -> Self {
        Self { bytes: bytes.into(), parts: Vec::new(), too_large: false }
    }
}

/// How many of some ids have rows here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Has {
    /// None of the ids.
    None,
    /// Some of the ids: a manifest separates them from the others.
    Some,
    /// All of the ids.
    All,
}

/// The rows of a batch, or its finished rows, in the order of the ids.
pub(crate) struct Encoded<I> {
    key: BatchKey,
    ids: Vec<I>,
    rows: compute::Rows,
    schema: Arc<Schema>,
    columns: String,
    maker: Arc<Maker>,
    computed_ms: u64,
    max_payload: usize,
    /// Places of the ids within the batch, as ranges of neighbours.
    places: Vec<Range<u32>>,
    /// Number of rows before each of these ranges, and in total.
    before: Vec<u32>,
}

impl<I: Id> Encoded<I> {
    /// Rows of all ids of a batch.
    pub(crate) fn new(
        key: &BatchKey,
        computed: Computed<I>,
        schema: Arc<Schema>,
        maker: Arc<Maker>,
        max_payload: usize,
    ) -> Self {
        let (ids, rows) = in_order(computed);
        let columns = schema.to_text();
        let computed_ms = now_ms();
        let all = 0..key.ids;
        let places = vec![all];
        let before = vec![0, key.ids];
        let key = key.clone();
        Self { key, ids, rows, schema, columns, maker, computed_ms, max_payload, places, before }
    }

    /// Rows of some ids of a batch whose ids are `all`, in order.
    pub(crate) fn some(
        key: &BatchKey,
        all: &[I],
        computed: Computed<I>,
        schema: Arc<Schema>,
        maker: Arc<Maker>,
        max_payload: usize,
    ) -> Self {
        let mut some = Self::new(key, computed, schema, maker, max_payload);
        some.places = places_of(all, &some.ids);
        some.before = std::iter::once(0)
            .chain(some.places.iter().scan(0, |rows, own| {
                *rows += own.len() as u32;
                Some(*rows)
            }))
            .collect();
        some
    }

    /// How many ids the batch has.
    #[cfg(test)]
    pub(crate) fn ids_in_all(&self) -> u32 {
        self.key.ids
    }

    /// How many of the rows are dead letters.
    pub(crate) fn dead(&self) -> usize {
        self.rows.dead.len()
    }

    /// For how many of the ids at these places rows exist.
    pub(crate) fn has(&self, places: &Range<u32>) -> Has {
        let mut within = self.within(places);
        match within.next() {
            None => Has::None,
            Some(first) if first == *places => Has::All,
            Some(_) => Has::Some,
        }
    }

    /// The parts of these places for which rows exist, in order.
    fn within(&self, places: &Range<u32>) -> impl Iterator<Item = Range<u32>> {
        let first = self.places.partition_point(|own| own.end <= places.start);
        let start = places.start;
        let end = places.end;
        let own = self.places[first..].iter().take_while(move |own| own.start < end);
        own.map(move |own| own.start.max(start)..own.end.min(end))
    }

    /// Index of the row of the id at this place, which must have one.
    fn at(&self, place: u32) -> usize {
        let range = self.places.partition_point(|own| own.end <= place);
        let within = self.places.get(range).map_or(0, |own| place - own.start);
        (self.before[range] + within) as usize
    }

    /// Indexes of the rows of the ids at these places, which must all have one.
    fn rows_at(&self, places: &Range<u32>) -> Range<usize> {
        let start = self.at(places.start);
        start..start + places.len()
    }

    /// Copies the rows of ids at these places, as far as they exist.
    pub(crate) fn rest(&self, open: &[Range<u32>]) -> Computed<I> {
        let mut rest = Computed::none(&self.schema);
        for places in open.iter().flat_map(|places| self.within(places)) {
            let at = self.rows_at(&places);
            rest.ids.extend_from_slice(&self.ids[at.clone()]);
            rest.rows.append(self.rows.slice(at));
        }
        rest
    }

    /// A manifest that separates ids with rows from ids without. At most `most` ranges have rows: the longest ones;
    /// everything between them stays together, for a later manifest.
    pub(crate) fn cut_around(&self, places: &Range<u32>, most: usize) -> Message {
        let mut done: Vec<Range<u32>> = self.within(places).collect();
        if done.len() > most {
            done.sort_unstable_by_key(|own| std::cmp::Reverse(own.len()));
            done.truncate(most.max(1));
            done.sort_unstable_by_key(|own| own.start);
        }
        let mut parts = Vec::new();
        let mut next = places.start;
        for own in done {
            parts.extend((next < own.start).then_some(next..own.start));
            next = own.end;
            parts.push(own);
        }
        parts.extend((next < places.end).then_some(next..places.end));
        self.cut_into(parts)
    }

    fn limit(&self) -> usize {
        self.max_payload.saturating_sub(HEADERS)
    }

    /// The rows of the ids at these places; a manifest if they are too large; a dead letter if it is a single row.
    pub(crate) fn message(&self, places: &Range<u32>) -> Message {
        let ids = self.ids(places);
        let range = self.rows_at(places);
        let some = (range != (0..self.ids.len())).then(|| self.rows.slice(range));
        let rows = some.as_ref().unwrap_or(&self.rows);
        let raw_bytes = rows.bytes() as u64;
        if raw_bytes > MAX_INSERT_BYTES && places.len() > 1 {
            return self.cut(places, 0, raw_bytes);
        }
        let packed = self.pack(ids, rows);
        let message = self.encode(places, &packed);
        if message.len() <= self.limit() && packed.raw_bytes <= MAX_INSERT_BYTES {
            return Message::rows(message);
        }
        if places.len() > 1 {
            return self.cut(places, message.len(), packed.raw_bytes);
        }
        let reason = format!(
            "row of {} bytes is larger than a message may be ({} bytes): return less for one id, or raise max_payload \
             of nats-server",
            rows.bytes(),
            self.max_payload
        );
        let mut dead = compute::Rows::with_room(&self.schema, 1);
        dead.dead(&self.schema, &reason);
        Message { too_large: true, ..Message::rows(self.encode(places, &self.pack(ids, &dead))) }
    }

    fn ids(&self, places: &Range<u32>) -> &[I] {
        &self.ids[self.rows_at(places)]
    }

    fn pack(&self, ids: &[I], rows: &compute::Rows) -> Packed {
        let head = Head { key: &self.key, maker: &self.maker, computed_ms: self.computed_ms };
        pack(&head, &self.schema, ids, rows)
    }

    /// Ranges of equal numbers of ids, whose rows take half of a message's limit, because another worker's rows may be
    /// larger.
    fn cut(&self, places: &Range<u32>, bytes: usize, raw_bytes: u64) -> Message {
        let half = (self.limit() as u64 / 2).max(1);
        let parts = (bytes as u64).div_ceil(half).max(raw_bytes.div_ceil(MAX_INSERT_BYTES / 2));
        let parts = parts.clamp(2, MAX_PARTS as u64).min(places.len() as u64);
        let at = |part| places.start + (places.len() as u64 * part / parts) as u32;
        self.cut_into((0..parts).map(|part| at(part)..at(part + 1)).collect())
    }

    /// A manifest of these ranges, which follow each other.
    fn cut_into(&self, parts: Vec<Range<u32>>) -> Message {
        let from = parts.first().map_or(0, |part| part.start);
        let BatchKey { pass: PassId { run, pass }, batch, .. } = &self.key;
        let ids = parts.iter().map(|part| part.len() as u32).collect();
        let cut = RowCut { run: run.as_str(), pass: *pass, batch: *batch, from, parts: ids };
        Message { bytes: encode_cut(&cut).into(), parts, too_large: false }
    }

    fn encode(&self, places: &Range<u32>, packed: &Packed) -> Vec<u8> {
        let whole = *places == (0..self.key.ids);
        let ids = self.ids(places);
        let text = |id: Option<&I>| id.filter(|_| !whole).map(ToString::to_string).unwrap_or_default();
        encode_rows(&RowBatch {
            run: self.key.pass.run.as_str(),
            pass: self.key.pass.pass,
            batch: self.key.batch,
            batch_ids: self.key.ids,
            from: places.start,
            ids: places.len() as u32,
            first: &text(ids.first()),
            last: &text(ids.last()),
            dead: packed.dead,
            raw_bytes: packed.raw_bytes,
            schema: self.schema.fingerprint(),
            columns: &self.columns,
            build: &self.maker.build,
            rows: &packed.frames,
        })
    }
}

/// Ids and rows, sorted by id. They nearly always are: only ids of later attempts come last.
fn in_order<I: Id>(computed: Computed<I>) -> (Vec<I>, compute::Rows) {
    let Computed { ids, rows, .. } = computed;
    if ids.is_sorted() {
        return (ids, rows);
    }
    let mut order: Vec<(I, u32)> = ids.into_iter().zip(0..).collect();
    order.sort_unstable();
    let (ids, places): (Vec<I>, Vec<u32>) = order.into_iter().unzip();
    let rows = rows.reordered(&places);
    (ids, rows)
}

/// The places of these ids among `all`, as ranges of neighbours. Both are in order, and `all` contains each id.
fn places_of<I: Id>(all: &[I], ids: &[I]) -> Vec<Range<u32>> {
    let (mut places, mut next): (Vec<Range<u32>>, usize) = (Vec::new(), 0);
    for id in ids {
        next += all[next..].partition_point(|other| other < id);
        let place = next as u32;
        match places.last_mut() {
            Some(last) if last.end == place => last.end += 1,
            _ => places.push(place..place + 1),
        }
        next += 1;
    }
    places
}
