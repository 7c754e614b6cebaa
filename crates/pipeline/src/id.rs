//! Id types: how an id is parsed from text, hashed for the digest, and packed.

use std::fmt;
use std::hash::{Hash, Hasher};

use siphasher::sip::SipHasher24;
use twox_hash::XxHash64;

use crate::block::{self, Block, BlockFault};
use crate::native;

/// The longest string id, in bytes, because an id travels in a message and appears in logs.
pub const MAX_STRING_ID: usize = 4096;

/// A type that can identify one piece of work: `u64` or `String`.
///
/// Sealed, because every codec and SQL type below is part of the stored format.
pub trait Id:
    Clone + Ord + Hash + fmt::Display + fmt::Debug + Send + Sync + Sized + sealed::Sealed + 'static
{
    /// The ClickHouse type of the `id` column; a run record names the id type by it too.
    const CLICKHOUSE: &'static str;

    /// Parses an id from one line or field of the user's input.
    ///
    /// # Errors
    /// [`IdFault`] with the text, and what would be accepted.
    fn parse(text: &str) -> Result<Self, IdFault>;

    /// The id for a number of a range.
    fn from_number(number: u64) -> Self;

    /// ClickHouse's `sipHash64(id)`: SipHash-2-4 with a zero key over the value's bytes
    /// (<https://clickhouse.com/docs/sql-reference/functions/hash-functions#siphash64>).
    fn sip_hash(&self) -> u64;

    /// Appends the column `id` of a Native block: its name, its type, and the ids ([`crate::native`]).
    fn write_native_column(ids: &[Self], out: &mut Vec<u8>);

    /// The bytes of the id for a child process ([`crate::child`]).
    fn to_bytes(&self) -> Vec<u8>;

    /// Reads the bytes that [`Self::to_bytes`] wrote; `None` for anything else.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;

    /// The id as an argument of ClickHouse's `cityHash64`: a number itself, otherwise its `xxHash64`.
    fn hash_argument(&self) -> u64;

    /// Packs sorted ids without repeats into the smallest block.
    fn pack(ids: &[Self]) -> Block;

    /// Unpacks a block of exactly `count` ids.
    ///
    /// # Errors
    /// [`BlockFault`] when the bytes are not such a block; nothing larger than `count` ids is allocated.
    fn unpack(codec: u8, bytes: &[u8], count: u32) -> Result<Vec<Self>, BlockFault>;

    /// The most bytes that the id takes in a message, for limiting a batch.
    fn wire_size(&self) -> usize;
}

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdFault {
    /// The text is not a decimal number of 64 bits.
    #[error("`{text}` is not a whole number from 0 to 18446744073709551615")]
    NotANumber {
        /// The text, shortened.
        text: String,
    },
    /// The text is empty.
    #[error("an id must not be empty")]
    Empty,
    /// The id is too long for a message.
    #[error("an id of {length} bytes is longer than the limit of {MAX_STRING_ID}")]
    TooLong {
        /// The length of the id in bytes.
        length: usize,
    },
}

impl Id for u64 {
    const CLICKHOUSE: &'static str = "UInt64";

    fn parse(text: &str) -> Result<Self, IdFault> {
        // Rust's own parser would accept a sign too.
        let digits = text.trim_matches(|symbol: char| symbol.is_ascii_whitespace());
        let number = if digits.starts_with('+') { None } else { digits.parse().ok() };
        number.ok_or_else(|| IdFault::NotANumber { text: shortened(text) })
    }

    fn from_number(number: u64) -> Self {
        number
    }

    fn sip_hash(&self) -> u64 {
        sip(&self.to_le_bytes())
    }

    fn write_native_column(ids: &[Self], out: &mut Vec<u8>) {
        native::begin_column(out, "id", Self::CLICKHOUSE);
        out.reserve(size_of_val(ids));
        ids.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
    }

    fn to_bytes(&self) -> Vec<u8> {
        self.to_le_bytes().into()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self::from_le_bytes)
    }

    fn hash_argument(&self) -> u64 {
        *self
    }

    fn pack(ids: &[Self]) -> Block {
        block::pack_u64(ids)
    }

    fn unpack(codec: u8, bytes: &[u8], count: u32) -> Result<Vec<Self>, BlockFault> {
        block::unpack_u64(codec, bytes, count)
    }

    fn wire_size(&self) -> usize {
        size_of::<u64>()
    }
}

impl Id for String {
    const CLICKHOUSE: &'static str = "String";

    fn parse(text: &str) -> Result<Self, IdFault> {
        match text.len() {
            0 => Err(IdFault::Empty),
            length if length > MAX_STRING_ID => Err(IdFault::TooLong { length }),
            _ => Ok(text.to_owned()),
        }
    }

    fn from_number(number: u64) -> Self {
        number.to_string()
    }

    fn sip_hash(&self) -> u64 {
        sip(self.as_bytes())
    }

    fn write_native_column(ids: &[Self], out: &mut Vec<u8>) {
        native::texts(out, "id", ids.iter().map(String::as_str));
    }

    fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().into()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    }

    fn hash_argument(&self) -> u64 {
        XxHash64::oneshot(0, self.as_bytes())
    }

    fn pack(ids: &[Self]) -> Block {
        block::pack_strings(ids)
    }

    fn unpack(codec: u8, bytes: &[u8], count: u32) -> Result<Vec<Self>, BlockFault> {
        block::unpack_strings(codec, bytes, count)
    }

    fn wire_size(&self) -> usize {
        // Two length bytes are enough up to MAX_STRING_ID.
        self.len() + 2
    }
}

/// The beginning of a foreign text for an error message, with invisible characters escaped.
pub fn shortened(text: &str) -> String {
    const SHOWN: usize = 80;
    let hidden = |symbol: char| {
        symbol.is_control() || symbol == '\u{feff}' || (symbol.is_whitespace() && symbol != ' ')
    };
    let mut shown = String::new();
    for symbol in text.chars().take(SHOWN) {
        if hidden(symbol) { shown.extend(symbol.escape_default()) } else { shown.push(symbol) }
    }
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

fn sip(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new();
    hasher.write(bytes);
    hasher.finish()
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u64 {}
    impl Sealed for String {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answers of ClickHouse 26.5 to `SELECT sipHash64(toUInt64(1)), sipHash64('a')`. The end-to-end test
    /// `proof_digest_is_clickhouses` compares many more with a live engine.
    #[test]
    fn the_digest_hash_is_siphash_2_4_with_a_zero_key() {
        assert_eq!(sip(b""), 0x1e92_4b9d_7377_00d7);
        assert_eq!(String::from("a").sip_hash(), sip(b"a"));
        assert_eq!(1u64.sip_hash(), sip(&[1, 0, 0, 0, 0, 0, 0, 0]));
    }

    #[test]
    fn text_that_is_no_number_is_named() {
        for text in [
            "",
            "-1",
            "+5",
            "1e3",
            "1_000",
            "0x10",
            "１２",
            "1.0",
            "1,000",
            "12a",
            "1 2",
            "18446744073709551616",
        ] {
            let fault = u64::parse(text).expect_err(text);
            assert!(fault.to_string().contains(&format!("`{text}`")), "{fault}");
        }
        assert_eq!(u64::parse("18446744073709551615"), Ok(u64::MAX));
        assert_eq!((u64::parse(" 7\t"), u64::parse("007")), (Ok(7), Ok(7)));
        let fault = u64::parse("7\u{a0}").expect_err("a blank that is none");
        assert!(fault.to_string().starts_with("`7\\u{a0}` is not"), "{fault}");
        assert_eq!(shortened(&"x".repeat(81)), "x".repeat(80) + "…");
    }

    #[test]
    fn ids_are_a_column_of_a_block() {
        let mut out = Vec::new();
        u64::write_native_column(&[7, u64::MAX], &mut out);
        String::write_native_column(&["ü".to_owned()], &mut out);
        let mut want = b"\x02id\x06UInt64\x07\0\0\0\0\0\0\0".to_vec();
        want.extend_from_slice(&[0xFF; 8]);
        want.extend_from_slice(b"\x02id\x06String\x02\xc3\xbc");
        assert_eq!(out, want);
    }

    #[test]
    fn string_ids_are_bounded() {
        assert_eq!(String::parse(""), Err(IdFault::Empty));
        assert_eq!(String::parse(&"x".repeat(4097)), Err(IdFault::TooLong { length: 4097 }));
        assert_eq!(String::parse("ü").as_deref(), Ok("ü"));
    }
}
