//! One id's one row, ok or dead, as the bytes that ClickHouse ingests: **every-id-yields-one-row**.

use millstream::Id;
use millstream::rowbinary::write_string;

use super::BatchKey;
use crate::tables::{STATUS_DEAD, STATUS_OK};

/// A dead letter's reason is cut to this many bytes.
const MAX_REASON: usize = 4096;

/// Writes rows of one batch.
pub(super) struct RowWriter<'a> {
    /// The columns before `id`, alike in all rows of a batch.
    prefix: Vec<u8>,
    /// What a dead letter holds in the pipeline's own columns.
    blank: &'a [u8],
}

impl<'a> RowWriter<'a> {
    pub fn new(key: &BatchKey, blank: &'a [u8]) -> Self {
        let mut prefix = Vec::new();
        write_string(&mut prefix, key.run.as_str());
        for number in [key.pass, key.batch, key.ids] {
            prefix.extend_from_slice(&number.to_le_bytes());
        }
        Self { prefix, blank }
    }

    /// Bytes that a row of ordinary columns takes, for reserving room.
    pub fn usual_len(&self) -> usize {
        self.prefix.len() + 64
    }

    /// Appends the row of an id whose own columns `body` writes.
    ///
    /// # Errors
    /// What `body` says; nothing is appended then.
    pub fn ok<I: Id, E>(
        &self,
        id: &I,
        body: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        raw: &mut Vec<u8>,
    ) -> Result<(), E> {
        let start = raw.len();
        self.begin(id, raw);
        begin_ok(raw);
        body(raw).inspect_err(|_| raw.truncate(start))
    }

    /// Appends the row of an id whose own columns are encoded already.
    pub fn ready<I: Id>(&self, id: &I, body: &[u8], raw: &mut Vec<u8>) {
        self.begin(id, raw);
        begin_ok(raw);
        raw.extend_from_slice(body);
    }

    /// Appends the row of a dead letter.
    pub fn dead<I: Id>(&self, id: &I, reason: &str, raw: &mut Vec<u8>) {
        self.begin(id, raw);
        raw.push(STATUS_DEAD);
        write_string(raw, shortened(reason));
        raw.extend_from_slice(self.blank);
    }

    fn begin<I: Id>(&self, id: &I, raw: &mut Vec<u8>) {
        raw.extend_from_slice(&self.prefix);
        id.write_rowbinary(raw);
    }
}

fn begin_ok(raw: &mut Vec<u8>) {
    raw.push(STATUS_OK);
    write_string(raw, "");
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
    fn a_row_that_cannot_be_written_leaves_nothing() {
        let key = BatchKey { run: "r".parse().expect("legal"), pass: 1, batch: 0, ids: 1 };
        let mut raw = vec![7];
        assert_eq!(RowWriter::new(&key, &[]).ok(&1u64, |_| Err("no"), &mut raw), Err("no"));
        assert_eq!(raw, [7]);
    }
}
