//! Blocks of ClickHouse's Native format, as they go over HTTP (revision 0: no block info, default serializations).
//!
//! ```text
//! varint columns | varint rows | for each column: name | type | values
//! ```
//! A name or type is a varint length and that many bytes. Blocks may follow each other in one body. A block
//! without columns or rows must never be written: the server takes it for the end of the stream, and ignores
//! the rest without an error.

/// Appends a block's header. `columns` and `rows` are above zero.
pub fn begin_block(out: &mut Vec<u8>, columns: usize, rows: usize) {
    debug_assert!(columns > 0 && rows > 0, "a block without columns or rows ends the stream");
    write_varint(out, columns as u64);
    write_varint(out, rows as u64);
}

/// Appends a column's name and type; its values have to follow.
pub fn begin_column(out: &mut Vec<u8>, name: &str, kind: &str) {
    write_text(out, name.as_bytes());
    write_text(out, kind.as_bytes());
}

/// Appends a column with values of fixed width, which `bytes` holds.
pub fn fixed(out: &mut Vec<u8>, name: &str, kind: &str, bytes: &[u8]) {
    begin_column(out, name, kind);
    out.extend_from_slice(bytes);
}

/// Appends a column with the same value of fixed width in all rows.
pub fn repeated(out: &mut Vec<u8>, name: &str, kind: &str, value: &[u8], rows: usize) {
    begin_column(out, name, kind);
    match value {
        [byte] => out.resize(out.len() + rows, *byte),
        value => {
            out.reserve(value.len() * rows);
            (0..rows).for_each(|_| out.extend_from_slice(value));
        }
    }
}

/// Appends a `String` column with a text for each row.
pub fn texts<'a>(out: &mut Vec<u8>, name: &str, texts: impl Iterator<Item = &'a str>) {
    begin_column(out, name, "String");
    texts.for_each(|text| write_text(out, text.as_bytes()));
}

/// Appends a `LowCardinality(String)` column with the same text in all rows: a dictionary of one key, and an
/// index of one byte for each row.
pub fn repeated_text(out: &mut Vec<u8>, name: &str, text: &str, rows: usize) {
    begin_column(out, name, "LowCardinality(String)");
    begin_low_cardinality(out);
    begin_dictionary(out, IndexWidth::One, 1);
    write_text(out, text.as_bytes());
    out.extend_from_slice(&(rows as u64).to_le_bytes());
    out.resize(out.len() + rows, 0);
}

/// Appends an LEB128 number, the format of lengths.
pub fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a value of a `String` column.
pub fn write_text(out: &mut Vec<u8>, text: &[u8]) {
    write_varint(out, text.len() as u64);
    out.extend_from_slice(text);
}

/// The number of bytes of an index into a dictionary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IndexWidth {
    One = 0,
    Two = 1,
}

/// Appends the prefix of a `LowCardinality` column, before any value of the column around it: the version of
/// its format, "shared dictionaries with additional keys".
pub(crate) fn begin_low_cardinality(out: &mut Vec<u8>) {
    out.extend_from_slice(&1u64.to_le_bytes());
}

/// Appends a dictionary's header: the block has keys of its own (bit 9), and replaces earlier ones (bit 10).
/// The keys follow, then the number of rows as u64 and their indexes.
pub(crate) fn begin_dictionary(out: &mut Vec<u8>, index: IndexWidth, keys: usize) {
    let flags = (1u64 << 9) | (1 << 10) | index as u64;
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(&(keys as u64).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_leb128() {
        for (value, bytes) in [(0, &[0u8][..]), (127, &[127]), (128, &[0x80, 1]), (300, &[0xAC, 2])] {
            let mut out = Vec::new();
            write_varint(&mut out, value);
            assert_eq!(out, bytes);
        }
    }

    #[test]
    fn golden_bytes_of_a_block() {
        let mut out = Vec::new();
        begin_block(&mut out, 4, 2);
        fixed(&mut out, "n", "UInt16", &[1, 0, 2, 0]);
        repeated(&mut out, "p", "UInt16", &[7, 0], 2);
        texts(&mut out, "t", ["", "ü"].into_iter());
        repeated_text(&mut out, "r", "run", 2);
        let mut want =
            b"\x04\x02\x01n\x06UInt16\x01\0\x02\0\x01p\x06UInt16\x07\0\x07\0\x01t\x06String\0\x02\xc3\xbc"
                .to_vec();
        want.extend_from_slice(b"\x01r\x16LowCardinality(String)\x01\0\0\0\0\0\0\0\0\x06\0\0\0\0\0\0");
        want.extend_from_slice(b"\x01\0\0\0\0\0\0\0\x03run\x02\0\0\0\0\0\0\0\0\0");
        assert_eq!(out, want);
    }
}
