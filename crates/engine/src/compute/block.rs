//! The rows of a message as one Native block: the exact bytes that ClickHouse ingests, columns with names and types.
//!
//! Columns that all pipelines have come first, then the pipeline's own columns, then the build. A value that all rows
//! of a message share is written as a repeated value and compresses to almost nothing.

use millstream::columns::{Columns, city_hash_of_numbers};
use millstream::schema::{OWN_COLUMNS, Schema};
use millstream::{Id, frame, native};
use twox_hash::XxHash64;

use super::computed::BatchKey;
use super::row::Rows;
use crate::model::rows::{STATUS_DEAD, STATUS_OK};

/// Bytes before compression of one frame. ClickHouse reads frames one by one.
const FRAME: usize = 1 << 20;

/// The last column. ClickHouse checks its form: a version, a dictionary, a number of rows. So it refuses a block with
/// fewer values than the block announces, even if another block follows in the INSERT. After a column of numbers the
/// server would take the next block's first bytes for the missing values.
const LAST: &str = "build";

/// Bytes of a row that all rows of a message share: numbers, a moment, an index each for three texts, a status.
const REPEATED: usize = 3 * 4 + 3 * 8 + 3 + 1;

/// Which host and build compute, as rows record them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maker {
    /// The host's name.
    pub host: String,
    /// The build: the pipeline's version and a hash of the program.
    pub build: String,
}

/// Values that all rows of a message share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    pub key: &'a BatchKey,
    pub maker: &'a Maker,
    /// When the worker computed the batch, in milliseconds since 1970.
    pub computed_ms: u64,
}

/// Compressed rows.
pub(crate) struct Packed {
    pub frames: Vec<u8>,
    /// Size before compression, in bytes.
    pub raw_bytes: u64,
    /// Dead letters among the rows.
    pub dead: u32,
}

/// Packs the rows of these ids, at least one, into one block.
pub(crate) fn pack<I: Id>(head: &Head<'_>, schema: &Schema, ids: &[I], rows: &Rows) -> Packed {
    let mut raw = Vec::with_capacity(rows.bytes() + ids.len() * 64 + 2048);
    write(head, schema, ids, rows, &mut raw);
    let mut frames = Vec::new();
    raw.chunks(FRAME).for_each(|chunk| frame::compress(chunk, &mut frames));
    Packed { frames, raw_bytes: raw.len() as u64, dead: rows.dead.len() as u32 }
}

/// Size of these rows, before and after compression, without the fixed cost of a block.
pub(crate) fn sizes<I: Id>(schema: &Schema, ids: &[I], rows: &Rows) -> (u64, u64) {
    let mut raw = Vec::new();
    let mut frames = Vec::new();
    Columns::of(schema).write_native(schema, &mut raw);
    let names = raw.len();
    raw.clear();
    I::write_native_column(ids, &mut raw);
    native::texts(&mut raw, "error", errors(rows));
    rows.columns.write_native(schema, &mut raw);
    raw.chunks(FRAME).for_each(|chunk| frame::compress(chunk, &mut frames));
    let repeated = ids.len() * REPEATED;
    (frames.len().saturating_sub(names) as u64, (raw.len().saturating_sub(names) + repeated) as u64)
}

fn write<I: Id>(head: &Head<'_>, schema: &Schema, ids: &[I], rows: &Rows, out: &mut Vec<u8>) {
    let Head { key, maker, computed_ms } = head;
    let count = ids.len();
    let statuses = statuses(rows);
    let digest = digest(schema, ids, &statuses, rows);
    native::begin_block(out, OWN_COLUMNS.len() + schema.columns().len(), count);
    for (name, kind) in OWN_COLUMNS {
        let repeated = |out: &mut Vec<u8>, value: &[u8]| native::repeated(out, name, kind, value, count);
        match name {
            "run" => native::repeated_text(out, name, key.pass.run.as_str(), count),
            "pass" => repeated(out, &key.pass.pass.to_le_bytes()),
            "batch" => repeated(out, &key.batch.to_le_bytes()),
            "batch_ids" => repeated(out, &key.ids.to_le_bytes()),
            "batch_digest" => repeated(out, &digest.to_le_bytes()),
            "schema" => repeated(out, &schema.fingerprint().to_le_bytes()),
            "id" => I::write_native_column(ids, out),
            "status" => native::fixed(out, name, kind, &statuses),
            "error" => native::texts(out, name, errors(rows)),
            "host" => native::repeated_text(out, name, &maker.host, count),
            LAST => {}
            "computed_at" => repeated(out, &computed_ms.to_le_bytes()),
            _ => unreachable!("every own column has its value here: {name}"),
        }
    }
    rows.columns.write_native(schema, out);
    native::repeated_text(out, LAST, &maker.build, count);
}

fn statuses(rows: &Rows) -> Vec<u8> {
    let mut statuses = vec![STATUS_OK; rows.count()];
    for (at, _) in &rows.dead {
        statuses[*at as usize] = STATUS_DEAD;
    }
    statuses
}

/// The error of each row; empty for an ok row.
fn errors(rows: &Rows) -> impl Iterator<Item = &str> {
    let mut dead = rows.dead.iter().peekable();
    (0..rows.count() as u32).map(move |row| match dead.next_if(|(at, _)| *at == row) {
        Some((_, reason)) => reason,
        None => "",
    })
}

/// The digest of a message's values: the wrapping sum of each row's hash over its id, status, error and the pipeline's
/// own columns. ClickHouse computes the same sum (`clickhouse/sql/values.rs`).
fn digest<I: Id>(schema: &Schema, ids: &[I], statuses: &[u8], rows: &Rows) -> u64 {
    let heads = ids.iter().zip(statuses).zip(errors(rows));
    let hash = |((id, status), error): ((&I, &u8), &str)| {
        city_hash_of_numbers(&[
            id.hash_argument(),
            u64::from(*status),
            XxHash64::oneshot(0, error.as_bytes()),
        ])
    };
    let mut hashes: Vec<u64> = heads.map(hash).collect();
    rows.columns.fold_hashes(schema, &mut hashes);
    hashes.into_iter().fold(0, u64::wrapping_add)
}

/// Reads our own blocks back, independently of the code that writes them, for tests.
#[cfg(test)]
pub(crate) mod read {
    use std::collections::HashMap;

    use millstream::frame;

    /// The values of a column: numbers, or texts.
    #[derive(Debug, Clone, PartialEq)]
    pub enum Values {
        Numbers(Vec<u128>),
        Texts(Vec<Vec<u8>>),
    }

    impl Values {
        pub fn number(&self, row: usize) -> u128 {
            let Self::Numbers(numbers) = self else { panic!("texts: {self:?}") };
            numbers[row]
        }

        pub fn text(&self, row: usize) -> String {
            let Self::Texts(texts) = self else { panic!("numbers: {self:?}") };
            String::from_utf8(texts[row].clone()).expect("UTF-8")
        }
    }

    /// The single block in these frames: its number of rows, and its columns by name.
    pub fn block(mut frames: &[u8]) -> (usize, HashMap<String, Values>) {
        let mut raw = Vec::new();
        while let Some(length) = frame::frame_len(frames).expect("frames") {
            frame::decompress(&frames[..length], &mut raw).expect("a sound frame");
            frames = &frames[length..];
        }
        assert!(frames.is_empty(), "{} bytes after the last frame", frames.len());
        let rest = &mut &raw[..];
        let columns = varint(rest);
        let rows = varint(rest);
        let mut found = HashMap::new();
        for _ in 0..columns {
            let name = text(rest);
            let kind = text(rest);
            let values = values(rest, std::str::from_utf8(&kind).expect("a type"), rows);
            found.insert(String::from_utf8(name).expect("a name"), values);
        }
        assert!(rest.is_empty(), "{} bytes after the last column", rest.len());
        (rows, found)
    }

    fn values(rest: &mut &[u8], kind: &str, rows: usize) -> Values {
        let width = match kind {
            "String" => return Values::Texts((0..rows).map(|_| text(rest)).collect()),
            "LowCardinality(String)" => {
                let [version, flags, keys] = [0; 3].map(|_| number(rest, 8) as u64);
                assert_eq!((version, flags & 0xff), (1, 0), "one byte an index");
                let keys: Vec<Vec<u8>> = (0..keys).map(|_| text(rest)).collect();
                assert_eq!(number(rest, 8), rows as u128);
                return Values::Texts((0..rows).map(|_| keys[number(rest, 1) as usize].clone()).collect());
            }
            "UInt8" => 1,
            "UInt32" => 4,
            "UInt64" => 8,
            "UInt128" => 16,
            _ if kind.starts_with("Enum8") => 1,
            _ if kind.starts_with("DateTime64") => 8,
            _ => panic!("this reader does not know type {kind}"),
        };
        Values::Numbers((0..rows).map(|_| number(rest, width)).collect())
    }

    fn number(rest: &mut &[u8], width: usize) -> u128 {
        rest.split_off(..width)
            .expect("all bytes")
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u128::from(*byte))
    }

    fn text(rest: &mut &[u8]) -> Vec<u8> {
        let length = varint(rest);
        rest.split_off(..length).expect("all bytes").to_vec()
    }

    fn varint(rest: &mut &[u8]) -> usize {
        let mut value = 0;
        let mut shift = 0;
        loop {
            let byte = *rest.split_off_first().expect("a byte");
            value |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use millstream::names::PassId;

    use super::*;
    use serde::Serialize;

    #[derive(Serialize)]
    struct Number {
        n: u32,
    }

    #[test]
    fn a_block_has_every_column_by_name() {
        let schema = Schema::parse(&[("n", "UInt32")]).expect("sound");
        let mut rows = Rows::with_room(&schema, 3);
        rows.ok(&schema, &Number { n: 7 });
        rows.dead(&schema, "no");
        rows.ok(&schema, &Number { n: 9 });
        let key = BatchKey { pass: PassId { run: "r".parse().expect("legal"), pass: 2 }, batch: 5, ids: 10 };
        let maker = Maker { host: "h".into(), build: "1+ab".into() };
        let head = Head { key: &key, maker: &maker, computed_ms: 1_700_000_000_000 };
        let packed = pack(&head, &schema, &[3u64, 4, 5], &rows);
        let (count, columns) = read::block(&packed.frames);
        assert_eq!((count, columns.len(), packed.dead), (3, OWN_COLUMNS.len() + 1, 1));
        for row in 0..3 {
            assert_eq!((columns["run"].text(row).as_str(), columns["host"].text(row).as_str()), ("r", "h"));
            assert_eq!(columns["build"].text(row), "1+ab");
            let numbers = ["pass", "batch", "batch_ids", "id"].map(|name| columns[name].number(row));
            assert_eq!(numbers, [2, 5, 10, 3 + row as u128]);
            assert_eq!(columns["computed_at"].number(row), 1_700_000_000_000);
            assert_eq!(columns["n"].number(row), [7, 0, 9][row]);
            assert_eq!(columns["status"].number(row), [1, 2, 1][row]);
            assert_eq!(columns["error"].text(row), ["", "no", ""][row]);
        }
    }
}
