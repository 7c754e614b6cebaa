//! One id's one row, ok or dead, as the bytes that ClickHouse ingests: **every-id-yields-one-row**.

use std::fmt::Display;
use std::time::{Duration, Instant};

use millstream::Id;
use millstream::frame::FrameWriter;
use millstream::rowbinary::write_string;

use super::BatchKey;
use crate::records::now_ms;
use crate::tables::{STATUS_DEAD, STATUS_OK};

/// A dead letter's reason is cut to this many bytes.
const MAX_REASON: usize = 4096;
/// A row has at most this many bytes before compression: what no server takes in one message, and what a frame holds
/// with room to spare.
const MAX_ROW: usize = 64 << 20;

/// One row in so many is timed while it is written: a look at the clock costs as much as a light row.
const TIMED: usize = 128;

/// Rows as they are written, with what has to be known of them.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub frames: FrameWriter,
    /// Size of each.
    pub lengths: Vec<u32>,
    /// How many are dead letters.
    pub dead: u32,
    /// Size of all of them.
    pub bytes: usize,
    /// How long some of them were written, without compression, and how many of them.
    writing: (Duration, u32),
}

impl Rows {
    /// None yet, with room for this many bytes.
    pub fn with_room(bytes: usize) -> Self {
        let mut rows = Self::default();
        rows.frames.raw.reserve(bytes);
        rows
    }

    /// Has one row written, and times it if it is its turn.
    pub fn write(&mut self, row: impl FnOnce(&mut Self)) {
        if !self.lengths.len().is_multiple_of(TIMED) {
            return row(self);
        }
        let (begun, before) = (Instant::now(), self.frames.compressing());
        row(self);
        let compressing = self.frames.compressing() - before;
        let (time, rows) = self.writing;
        self.writing = (time + begun.elapsed().saturating_sub(compressing), rows + 1);
    }

    /// Time that went into writing and compressing all of them.
    pub fn encoding(&self) -> Duration {
        let (time, rows) = self.writing;
        self.frames.compressing() + time.mul_f64(self.lengths.len() as f64 / f64::from(rows.max(1)))
    }

    fn end_row(&mut self, start: usize) {
        let length = self.frames.raw.len() - start;
        self.lengths.push(length as u32);
        self.bytes += length;
        self.frames.end_row();
    }
}

/// Writes rows of one batch.
pub(super) struct RowWriter<'a> {
    prefix: Vec<u8>,
    blank: &'a [u8],
}

impl<'a> RowWriter<'a> {
    /// `blank` is what a dead letter holds in the pipeline's own columns.
    pub fn new(key: &BatchKey, blank: &'a [u8]) -> Self {
        Self { prefix: row_prefix(key), blank }
    }

    /// Bytes that a row of ordinary columns takes, for reserving room.
    pub fn usual_len(&self) -> usize {
        self.prefix.len() + 64
    }

    /// Appends the row of an id whose own columns `body` writes; a dead letter if it cannot, or if it is too large.
    pub fn ok<I: Id, E: Display>(
        &self,
        id: &I,
        body: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        out: &mut Rows,
    ) {
        let raw = &mut out.frames.raw;
        let start = raw.len();
        self.begin(id, raw);
        raw.push(STATUS_OK);
        write_string(raw, "");
        write_origin(raw);
        let written = body(raw);
        let length = raw.len() - start;
        let reason = match written {
            Ok(()) if length <= MAX_ROW => return out.end_row(start),
            Ok(()) => format!("row of {length} bytes is larger than a row may be ({MAX_ROW} bytes)"),
            Err(fault) => format!("row cannot be encoded: {fault}"),
        };
        raw.truncate(start);
        self.dead(id, &reason, out);
    }

    /// Appends the row of a dead letter.
    pub fn dead<I: Id>(&self, id: &I, reason: &str, out: &mut Rows) {
        let start = out.frames.raw.len();
        self.begin(id, &mut out.frames.raw);
        write_dead(reason, self.blank, &mut out.frames.raw);
        out.dead += 1;
        out.end_row(start);
    }

    fn begin<I: Id>(&self, id: &I, raw: &mut Vec<u8>) {
        raw.extend_from_slice(&self.prefix);
        id.write_rowbinary(raw);
    }
}

/// The columns before `id`, alike in all rows of a batch.
pub(crate) fn row_prefix(key: &BatchKey) -> Vec<u8> {
    let mut prefix = Vec::new();
    write_string(&mut prefix, key.run.as_str());
    for number in [key.pass, key.batch, key.ids] {
        prefix.extend_from_slice(&number.to_le_bytes());
    }
    prefix.extend_from_slice(&0u64.to_le_bytes());
    prefix
}

/// Appends host, build and moment.
fn write_origin(raw: &mut Vec<u8>) {
    write_string(raw, host());
    write_string(raw, crate::build::build());
    raw.extend_from_slice(&(now_ms() as i64).to_le_bytes());
}

fn host() -> &'static str {
    static HOST: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    HOST.get_or_init(crate::broker::host_name)
}

/// Appends all that follows the id in the row of a dead letter.
pub(crate) fn write_dead(reason: &str, blank: &[u8], raw: &mut Vec<u8>) {
    raw.push(STATUS_DEAD);
    write_string(raw, shortened(reason));
    write_origin(raw);
    raw.extend_from_slice(blank);
}

/// What a dead letter says of an id that asked for another attempt for the last time.
pub(super) fn gave_up(reason: &str) -> String {
    format!("gave up after every attempt: {reason}")
}

fn shortened(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(MAX_REASON)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_cut_between_characters() {
        assert_eq!(shortened(&"ü".repeat(4000)).len(), MAX_REASON);
    }

    #[test]
    fn a_row_that_cannot_be_written_becomes_a_dead_letter() {
        let key = BatchKey { run: "r".parse().expect("legal"), pass: 1, batch: 0, ids: 1 };
        let (mut broken, mut dead) = (Rows::default(), Rows::default());
        let rows = RowWriter::new(&key, &[7]);
        rows.ok(
            &1u64,
            |raw| {
                raw.push(9);
                Err("no")
            },
            &mut broken,
        );
        rows.dead(&1u64, "row cannot be encoded: no", &mut dead);
        assert_eq!((broken.dead, &broken.lengths), (1, &dead.lengths));
        assert_eq!(broken.frames.finish(), dead.frames.finish());
    }
}
