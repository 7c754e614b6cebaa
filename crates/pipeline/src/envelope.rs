//! The messages of both streams, byte for byte.
//!
//! ```text
//! 'M' 'S' | version u8 | codec u8 | crc32 u32 LE, of version, codec and body | body: one postcard struct
//! ```
//! Each version and codec has one struct, and a released struct is never edited: postcard is not
//! self-describing, so an added field would break stored messages. A message of an unknown version is not
//! corrupt: a newer producer wrote it, and a newer worker will read it.
//!
//! | codec | body |
//! |---|---|
//! | those of [`crate::block`] | the ids of a batch |
//! | [`END`] | [`encode_end`]: no ids, but the end of an open run |
//! | [`ROWS_LZ4`] | [`RowBatch`]: the rows of a batch, or of consecutive ids if all rows exceed one message |
//! | [`CUT`] | [`RowCut`]: a manifest of the messages that hold the rows of a batch |

use std::ops::Range;

use serde::{Deserialize, Serialize, Serializer};

use crate::block::{Block, BlockFault};
use crate::{Id, MAX_BATCH_IDS};

const MAGIC: [u8; 2] = *b"MS";
/// The version of the format.
pub const VERSION: u8 = 1;
const HEADER: usize = 8;

/// The codec of rows: ClickHouse's compressed frames ([`crate::frame`]) of one Native block. Codecs below 16
/// are those of ids ([`crate::block`]).
pub const ROWS_LZ4: u8 = 16;
/// The codec of a manifest: no rows, but the list of their split messages.
pub const CUT: u8 = 17;
/// The codec of an end marker: no ids, but the end of an open run.
pub const END: u8 = 18;

/// One message of the ids stream: the ids of one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdBatch<I> {
    /// The name of the run.
    pub run: String,
    /// The number of the batch in the run, from 0.
    pub batch: u32,
    /// The ids of the batch, sorted and without repeats, at least one.
    pub ids: Vec<I>,
}

/// One message of the rows stream: the rows of a computed batch, all of them or those of consecutive ids. The
/// message names the schema of its rows (**rows-name-their-schema**), so that a sink knows without decoding
/// whether its table accepts them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowBatch<'a> {
    /// The name of the run.
    pub run: &'a str,
    /// The pass that computed the rows, from 1.
    pub pass: u32,
    /// The number of the batch in the run.
    pub batch: u32,
    /// The number of ids in the whole batch.
    pub batch_ids: u32,
    /// The position of the first id in the batch, from 0.
    pub from: u32,
    /// The number of ids in this message; also the number of rows, because every id yields one.
    pub ids: u32,
    /// The first id as text; empty if the message has all ids of the batch.
    pub first: &'a str,
    /// The last id as text; empty if the message has all ids of the batch.
    pub last: &'a str,
    /// The number of rows that are dead letters.
    pub dead: u32,
    /// The size of the rows before compression, in bytes.
    pub raw_bytes: u64,
    /// The fingerprint of the columns ([`Schema::fingerprint`](crate::schema::Schema::fingerprint)).
    pub schema: u64,
    /// The pipeline's own columns with their types ([`Schema::to_text`](crate::schema::Schema::to_text)).
    pub columns: &'a str,
    /// The build that computed the rows: a version and a hash of the program.
    pub build: &'a str,
    /// The rows, ready to be sent to ClickHouse.
    #[serde(serialize_with = "whole")]
    pub rows: &'a [u8],
}

/// Serializes bytes as one piece, which is faster than serde's list of bytes; the message is the same.
fn whole<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

impl RowBatch<'_> {
    /// Whether the message has all rows of the batch.
    pub fn is_whole(&self) -> bool {
        self.ids == self.batch_ids
    }
}

/// A manifest in the rows stream: the list of the split messages that hold a batch's rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCut<'a> {
    /// The name of the run.
    pub run: &'a str,
    /// The pass, from 1.
    pub pass: u32,
    /// The number of the batch in the run.
    pub batch: u32,
    /// The position of the first id in the batch, from 0.
    pub from: u32,
    /// The number of ids in each split message, in order; at least two messages.
    pub parts: Vec<u32>,
}

impl RowCut<'_> {
    /// The positions of the ids of each split message.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u32>> {
        let mut next = self.from;
        self.parts.iter().map(move |ids| {
            let start = next;
            next += ids;
            start..next
        })
    }

    fn is_sound(&self) -> bool {
        let sum = self.parts.iter().try_fold(self.from, |sum, ids| sum.checked_add(*ids));
        self.parts.len() > 1 && !self.parts.contains(&0) && sum.is_some_and(|sum| sum <= MAX_BATCH_IDS)
    }
}

/// A message of the rows stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows<'a> {
    /// All rows of a batch, or those of some of its ids.
    Batch(RowBatch<'a>),
    /// A manifest, without rows.
    Cut(RowCut<'a>),
}

#[derive(Serialize)]
struct End<'a> {
    run: &'a str,
    batch: u32,
}

#[derive(Serialize, Deserialize)]
struct Ids<'a> {
    run: &'a str,
    batch: u32,
    count: u32,
    block: &'a [u8],
}

/// Why this build cannot use the bytes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeFault {
    /// The message is not Millstream's.
    #[error("the message of {length} bytes does not begin with Millstream's magic number")]
    Foreign {
        /// The number of bytes in the message.
        length: usize,
    },
    /// The message is from a newer build, and has to wait for one that knows its version.
    #[error("the message has format version {version}, this build knows {VERSION}")]
    NewerVersion {
        /// The version that was found.
        version: u8,
    },
    /// The message was damaged on the way or in storage.
    #[error("the message's checksum is {found:08x}, its bytes have {computed:08x}")]
    Checksum {
        /// The checksum in the header.
        found: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// The message belongs into the other stream.
    #[error("codec {codec} is not one that belongs in this stream")]
    Codec {
        /// The codec byte that was found.
        codec: u8,
    },
    /// The checksum is right and the body is malformed: a faulty build wrote the message.
    #[error("the body of {length} bytes is malformed")]
    Body {
        /// The number of bytes in the body.
        length: usize,
    },
    /// The ids inside are malformed.
    #[error(transparent)]
    Block(#[from] BlockFault),
}

/// Encodes a message of the ids stream. `ids` are sorted and without repeats.
pub fn encode_ids<I: Id>(run: &str, batch: u32, ids: &[I]) -> Vec<u8> {
    let Block { codec, bytes } = I::pack(ids);
    seal(codec, &Ids { run, batch, count: ids.len() as u32, block: &bytes }, bytes.len())
}

/// Decodes a message of the ids stream.
///
/// # Errors
/// [`EnvelopeFault`]; nothing larger than [`crate::MAX_BATCH_IDS`] ids is ever allocated.
pub fn decode_ids<I: Id>(message: &[u8]) -> Result<IdBatch<I>, EnvelopeFault> {
    let (codec, body) = open(message)?;
    if codec >= ROWS_LZ4 {
        return Err(EnvelopeFault::Codec { codec });
    }
    let Ids { run, batch, count, block } = read(body)?;
    Ok(IdBatch { run: run.to_owned(), batch, ids: I::unpack(codec, block, count)? })
}

/// Encodes the end marker of an open run. It takes the place of the first batch that the run does not have, and
/// is the same for every writer.
pub fn encode_end(run: &str, batch: u32) -> Vec<u8> {
    seal(END, &End { run, batch }, run.len())
}

/// Whether a message of the ids stream is the end marker of this run, in place of this batch.
pub fn is_end(message: &[u8], run: &str, batch: u32) -> bool {
    message == encode_end(run, batch)
}

/// Encodes a message with rows of a batch.
pub fn encode_rows(batch: &RowBatch<'_>) -> Vec<u8> {
    let texts = [batch.run, batch.first, batch.last, batch.columns, batch.build];
    seal(ROWS_LZ4, batch, batch.rows.len() + texts.map(str::len).iter().sum::<usize>())
}

/// Encodes a manifest.
pub fn encode_cut(cut: &RowCut<'_>) -> Vec<u8> {
    seal(CUT, cut, 5 * cut.parts.len())
}

/// Decodes a message of the rows stream, without copying the rows.
///
/// # Errors
/// [`EnvelopeFault`].
pub fn decode_rows(message: &[u8]) -> Result<Rows<'_>, EnvelopeFault> {
    let (codec, body) = open(message)?;
    let malformed = EnvelopeFault::Body { length: body.len() };
    match codec {
        ROWS_LZ4 => {
            let batch: RowBatch<'_> = read(body)?;
            let end = batch.from.checked_add(batch.ids).filter(|end| *end <= batch.batch_ids);
            let sound = batch.ids > 0 && batch.batch_ids <= MAX_BATCH_IDS && end.is_some();
            sound.then_some(Rows::Batch(batch)).ok_or(malformed)
        }
        CUT => {
            let cut: RowCut<'_> = read(body)?;
            cut.is_sound().then_some(Rows::Cut(cut)).ok_or(malformed)
        }
        _ => Err(EnvelopeFault::Codec { codec }),
    }
}

fn seal<B: Serialize>(codec: u8, body: &B, payload: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(payload + 128);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&[VERSION, codec, 0, 0, 0, 0]);
    let mut message =
        postcard::to_extend(body, message).expect("strings, numbers and bytes always fit a Vec");
    let crc = checksum(&message);
    message[4..HEADER].copy_from_slice(&crc.to_le_bytes());
    message
}

/// Checks the header, and returns codec and body.
fn open(message: &[u8]) -> Result<(u8, &[u8]), EnvelopeFault> {
    let (header, body) = message
        .split_first_chunk::<HEADER>()
        .filter(|(header, _)| header.starts_with(&MAGIC))
        .ok_or(EnvelopeFault::Foreign { length: message.len() })?;
    let [_, _, version, codec, crc @ ..] = *header;
    if version > VERSION {
        // The checksum is not checked, because a newer format may have it elsewhere.
        return Err(EnvelopeFault::NewerVersion { version });
    }
    let found = u32::from_le_bytes(crc);
    let computed = checksum(message);
    if found != computed || version != VERSION {
        return Err(EnvelopeFault::Checksum { found, computed });
    }
    Ok((codec, body))
}

fn checksum(message: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&message[2..4]);
    hasher.update(&message[HEADER..]);
    hasher.finalize()
}

fn read<'a, B: Deserialize<'a>>(body: &'a [u8]) -> Result<B, EnvelopeFault> {
    match postcard::take_from_bytes(body) {
        // `from_bytes` would accept trailing bytes.
        Ok((value, [])) => Ok(value),
        _ => Err(EnvelopeFault::Body { length: body.len() }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The bytes of version 1, which never change.
    #[test]
    fn golden_bytes_of_version_1() {
        let ids: Vec<u64> = (1000..1008).collect();
        let range = encode_ids("tea", 3, &ids);
        assert_eq!(hex(&range), "4d530101167329c703746561030802e807");
        let strings = encode_ids("tea", 300, &["a".to_owned(), "bc".to_owned()]);
        assert_eq!(hex(&strings), "4d53010405764d4b03746561ac0202050161026263");
        let body = "03746561020380080408016102626301f403070a606e602055496e743332013903090807";
        let rows = encode_rows(&some_rows());
        assert_eq!((hex(&rows[..4]), hex(&rows[HEADER..])), ("4d530110".into(), body.into()));
        let message = encode_cut(&cut(5, &[300, 1]));
        assert_eq!(
            (hex(&message[..4]), hex(&message[HEADER..])),
            ("4d530111".into(), "0374656102030502ac0201".into())
        );
        assert_eq!(decode_rows(&message), Ok(Rows::Cut(cut(5, &[300, 1]))));
    }

    fn some_rows() -> RowBatch<'static> {
        RowBatch {
            run: "tea",
            pass: 2,
            batch: 3,
            batch_ids: 1024,
            from: 4,
            ids: 8,
            first: "a",
            last: "bc",
            dead: 1,
            raw_bytes: 500,
            schema: 7,
            columns: "`n` UInt32",
            build: "9",
            rows: &[9, 8, 7],
        }
    }

    fn cut(from: u32, parts: &[u32]) -> RowCut<'static> {
        RowCut { run: "tea", pass: 2, batch: 3, from, parts: parts.to_vec() }
    }

    #[test]
    fn rows_come_back() {
        assert_eq!(decode_rows(&encode_rows(&some_rows())), Ok(Rows::Batch(some_rows())));
        assert!(!some_rows().is_whole());
        for faulty in [
            RowBatch { ids: 0, ..some_rows() },
            RowBatch { from: 1020, ..some_rows() },
            RowBatch { from: u32::MAX, ..some_rows() },
            RowBatch { batch_ids: MAX_BATCH_IDS + 1, ..some_rows() },
        ] {
            let message = encode_rows(&faulty);
            assert!(matches!(decode_rows(&message), Err(EnvelopeFault::Body { .. })), "{faulty:?}");
        }
    }

    #[test]
    fn a_manifest_lists_the_ids_of_each_message() {
        let ranges: Vec<Range<u32>> = cut(5, &[300, 1, 2]).ranges().collect();
        assert_eq!(ranges, [5..305, 305..306, 306..308]);
        for (from, parts) in
            [(0, &[][..]), (0, &[7]), (0, &[7, 0]), (1, &[MAX_BATCH_IDS, 1]), (9, &[u32::MAX, 1])]
        {
            let message = encode_cut(&cut(from, parts));
            assert!(matches!(decode_rows(&message), Err(EnvelopeFault::Body { .. })), "{from} {parts:?}");
        }
    }

    #[test]
    fn an_end_is_of_one_run_and_one_batch_and_nothing_else() {
        let end = encode_end("tea", 3);
        assert_eq!((hex(&end[..4]), hex(&end[HEADER..])), ("4d530112".into(), "0374656103".into()));
        assert!(is_end(&end, "tea", 3));
        assert!(!is_end(&end, "tea", 4) && !is_end(&end, "te", 3));
        assert_eq!(decode_ids::<u64>(&end), Err(EnvelopeFault::Codec { codec: END }));
        assert_eq!(decode_rows(&end), Err(EnvelopeFault::Codec { codec: END }));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let message = encode_ids("tea", 3, &[1u64, 5, 9]);
        for bit in 0..message.len() * 8 {
            let mut damaged = message.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_ids::<u64>(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_version_is_distinguished_from_damage() {
        let mut message = encode_ids("tea", 3, &[1u64]);
        message[2] = 2;
        assert_eq!(decode_ids::<u64>(&message), Err(EnvelopeFault::NewerVersion { version: 2 }));
        assert_eq!(decode_rows(&message), Err(EnvelopeFault::NewerVersion { version: 2 }));
    }

    #[test]
    fn the_streams_do_not_take_each_others_messages() {
        let ids = encode_ids("tea", 3, &[1u64]);
        assert_eq!(decode_rows(&ids), Err(EnvelopeFault::Codec { codec: crate::block::RANGE }));
        let rows = encode_rows(&some_rows());
        assert_eq!(decode_ids::<u64>(&rows), Err(EnvelopeFault::Codec { codec: ROWS_LZ4 }));
        assert_eq!(
            decode_ids::<u64>(&encode_cut(&cut(0, &[1, 1]))),
            Err(EnvelopeFault::Codec { codec: CUT })
        );
        assert!(matches!(decode_ids::<String>(&ids), Err(EnvelopeFault::Block(BlockFault::Codec { .. }))));
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused(bytes in vec(any::<u8>(), 0..300)) {
            prop_assert!(decode_ids::<u64>(&bytes).is_err());
            prop_assert!(decode_rows(&bytes).is_err());
        }

        /// Random bodies after a valid header and checksum: what a faulty build could write.
        #[test]
        fn random_bodies_never_panic(version in 0..=VERSION, codec in 0u8..20, body in vec(any::<u8>(), 0..300)) {
            let mut message = vec![b'M', b'S', version, codec, 0, 0, 0, 0];
            message.extend(body);
            let crc = checksum(&message);
            message[4..HEADER].copy_from_slice(&crc.to_le_bytes());
            let _numbers = decode_ids::<u64>(&message);
            let _strings = decode_ids::<String>(&message);
            let _rows = decode_rows(&message);
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
