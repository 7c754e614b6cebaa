//! The messages of both streams, byte for byte.
//!
//! ```text
//! 'M' 'S' | version u8 | codec u8 | crc32 u32 LE, of version, codec and body | body: one postcard struct
//! ```
//! There is one struct per version, and a shipped one is never edited: postcard is not self-describing, so a field
//! added would break what is stored. A version that this build does not know is not corrupt: a newer producer wrote it,
//! and a newer worker will read it.
//!
//! | version | codec | body |
//! |---|---|---|
//! | 1 | those of [`crate::block`] | the ids of a batch |
//! | 2 | [`END`] | [`encode_end`]: no ids, an open run ends before this batch |
//! | 1 | [`ROWS_LZ4`] | [`RowBatch`]: all rows of a batch |
//! | 2 | [`ROWS_LZ4`] | [`RowPart`]: the rows of some of its ids, where all are more than a message may carry |
//! | 2 | [`CUT`] | [`RowCut`]: in which parts they come |

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::block::{Block, BlockFault};
use crate::{Id, MAX_BATCH_IDS};

const MAGIC: [u8; 2] = *b"MS";
/// Ids of a batch; all its rows.
const V1: u8 = 1;
/// Rows in parts; the end of an open run.
const V2: u8 = 2;
const HEADER: usize = 8;

/// Rows as ClickHouse's compressed frames ([`crate::frame`]) of a Native block. Codecs below 16 are those of ids
/// ([`crate::block`]).
pub const ROWS_LZ4: u8 = 16;
/// No rows, but the parts that they come in.
pub const CUT: u8 = 17;
/// No ids, but the end of an open run.
pub const END: u8 = 18;

/// One message of the ids stream: the ids of one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdBatch<I> {
    /// The run's name.
    pub run: String,
    /// Number of the batch within the run, from 0.
    pub batch: u32,
    /// Its ids, sorted and without repeats, at least one.
    pub ids: Vec<I>,
}

/// One message of the rows stream: the encoded rows of one computed batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowBatch<'a> {
    /// The run's name.
    pub run: &'a str,
    /// The pass that computed it, from 1.
    pub pass: u32,
    /// Number of the batch within the run.
    pub batch: u32,
    /// Ids of the batch: also the number of rows, as every id yields one.
    pub ids: u32,
    /// How many of the rows are dead letters.
    pub dead: u32,
    /// Size of the rows before compression, in bytes.
    pub raw_bytes: u64,
    /// The rows, ready to be sent to ClickHouse.
    pub rows: &'a [u8],
}

/// One message of the rows stream: the encoded rows of some ids of a computed batch, which are neighbours in its order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowPart<'a> {
    /// The run's name.
    pub run: &'a str,
    /// The pass that computed it, from 1.
    pub pass: u32,
    /// Number of the batch within the run.
    pub batch: u32,
    /// Ids that the batch has in all.
    pub batch_ids: u32,
    /// Place of the first id among the batch's, from 0.
    pub from: u32,
    /// Ids of the part: also the number of rows.
    pub ids: u32,
    /// The first id as text.
    pub first: &'a str,
    /// The last id as text.
    pub last: &'a str,
    /// How many of the rows are dead letters.
    pub dead: u32,
    /// Size of the rows before compression, in bytes.
    pub raw_bytes: u64,
    /// The rows, ready to be sent to ClickHouse.
    pub rows: &'a [u8],
}

/// One message of the rows stream that stands for rows: it says in which parts they come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCut<'a> {
    /// The run's name.
    pub run: &'a str,
    /// The pass, from 1.
    pub pass: u32,
    /// Number of the batch within the run.
    pub batch: u32,
    /// Place of the first id among the batch's, from 0.
    pub from: u32,
    /// Ids of each part, in order; two parts at least.
    pub parts: Vec<u32>,
}

impl RowCut<'_> {
    /// Places of the ids of each part.
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

/// What the rows stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows<'a> {
    /// All rows of a batch.
    Batch(RowBatch<'a>),
    /// Those of some of its ids.
    Part(RowPart<'a>),
    /// None, but how they are cut.
    Cut(RowCut<'a>),
}

#[derive(Serialize)]
struct EndV2<'a> {
    run: &'a str,
    batch: u32,
}

#[derive(Serialize, Deserialize)]
struct IdsV1<'a> {
    run: &'a str,
    batch: u32,
    count: u32,
    block: &'a [u8],
}

/// Bytes that are not a message which this build can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeFault {
    /// Not ours at all.
    #[error("the message of {length} bytes does not begin with Millstream's magic number")]
    Foreign {
        /// Bytes in the message.
        length: usize,
    },
    /// Ours, from a later build: to be kept for one that knows it.
    #[error("the message has format version {version}, this build knows {V2}")]
    NewerVersion {
        /// The version found.
        version: u8,
    },
    /// Damaged on the way or in storage.
    #[error("the message's checksum is {found:08x}, its bytes have {computed:08x}")]
    Checksum {
        /// What the header says.
        found: u32,
        /// What the bytes have.
        computed: u32,
    },
    /// The other stream's kind of message.
    #[error("codec {codec} is not one that belongs in this stream")]
    Codec {
        /// The codec byte found.
        codec: u8,
    },
    /// The checksum is right and the body is not: written by a faulty build.
    #[error("the body of {length} bytes is malformed")]
    Body {
        /// Bytes in the body.
        length: usize,
    },
    /// The ids inside are malformed.
    #[error(transparent)]
    Block(#[from] BlockFault),
}

/// Writes a message of the ids stream. `ids` are sorted and without repeats.
pub fn encode_ids<I: Id>(run: &str, batch: u32, ids: &[I]) -> Vec<u8> {
    let Block { codec, bytes } = I::pack(ids);
    seal(V1, codec, &IdsV1 { run, batch, count: ids.len() as u32, block: &bytes }, bytes.len())
}

/// Reads a message of the ids stream.
///
/// # Errors
/// [`EnvelopeFault`]; nothing larger than [`crate::MAX_BATCH_IDS`] ids is ever allocated.
pub fn decode_ids<I: Id>(message: &[u8]) -> Result<IdBatch<I>, EnvelopeFault> {
    let (version, codec, body) = open(message)?;
    if version != V1 || codec == ROWS_LZ4 {
        return Err(EnvelopeFault::Codec { codec });
    }
    let v1: IdsV1 = read(body)?;
    Ok(IdBatch { run: v1.run.to_owned(), batch: v1.batch, ids: I::unpack(codec, v1.block, v1.count)? })
}

/// Writes the message of the ids stream that stands in the place of a batch which an open run does not have: the run
/// ends before it. It is the same for whoever writes it.
pub fn encode_end(run: &str, batch: u32) -> Vec<u8> {
    seal(V2, END, &EndV2 { run, batch }, run.len())
}

/// Whether a message of the ids stream says that this run ends before this batch.
pub fn is_end(message: &[u8], run: &str, batch: u32) -> bool {
    message == encode_end(run, batch)
}

/// Writes a message of the rows stream: all rows of a batch.
pub fn encode_rows(batch: &RowBatch<'_>) -> Vec<u8> {
    seal(V1, ROWS_LZ4, batch, batch.rows.len())
}

/// Writes a message of the rows stream: the rows of some ids of a batch.
pub fn encode_part(part: &RowPart<'_>) -> Vec<u8> {
    seal(V2, ROWS_LZ4, part, part.first.len() + part.last.len() + part.rows.len())
}

/// Writes a message of the rows stream: how its rows are cut.
pub fn encode_cut(cut: &RowCut<'_>) -> Vec<u8> {
    seal(V2, CUT, cut, 5 * cut.parts.len())
}

/// Reads a message of the rows stream, without copying the rows.
///
/// # Errors
/// [`EnvelopeFault`].
pub fn decode_rows(message: &[u8]) -> Result<Rows<'_>, EnvelopeFault> {
    let (version, codec, body) = open(message)?;
    let malformed = EnvelopeFault::Body { length: body.len() };
    match (version, codec) {
        (V1, ROWS_LZ4) => read(body).map(Rows::Batch),
        (V2, ROWS_LZ4) => read(body).map(Rows::Part),
        (V2, CUT) => {
            read(body).and_then(|cut: RowCut<'_>| cut.is_sound().then_some(Rows::Cut(cut)).ok_or(malformed))
        }
        _ => Err(EnvelopeFault::Codec { codec }),
    }
}

fn seal<B: Serialize>(version: u8, codec: u8, body: &B, payload: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(payload + 128);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&[version, codec, 0, 0, 0, 0]);
    let mut message =
        postcard::to_extend(body, message).expect("strings, numbers and bytes always fit a Vec");
    let crc = checksum(&message);
    message[4..HEADER].copy_from_slice(&crc.to_le_bytes());
    message
}

/// Version, codec and body.
fn open(message: &[u8]) -> Result<(u8, u8, &[u8]), EnvelopeFault> {
    let (header, body) = message
        .split_first_chunk::<HEADER>()
        .filter(|(header, _)| header.starts_with(&MAGIC))
        .ok_or(EnvelopeFault::Foreign { length: message.len() })?;
    let [_, _, version, codec, crc @ ..] = *header;
    if version > V2 {
        // A newer format may place its checksum elsewhere, so it is not looked at.
        return Err(EnvelopeFault::NewerVersion { version });
    }
    let (found, computed) = (u32::from_le_bytes(crc), checksum(message));
    if found != computed || !(V1..=V2).contains(&version) {
        return Err(EnvelopeFault::Checksum { found, computed });
    }
    Ok((version, codec, body))
}

fn checksum(message: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&message[2..4]);
    hasher.update(&message[HEADER..]);
    hasher.finalize()
}

fn read<'a, B: Deserialize<'a>>(body: &'a [u8]) -> Result<B, EnvelopeFault> {
    match postcard::take_from_bytes(body) {
        // `from_bytes` would let trailing bytes pass.
        Ok((value, [])) => Ok(value),
        _ => Err(EnvelopeFault::Body { length: body.len() }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// What version 1 looks like on the wire, for ever.
    #[test]
    fn golden_bytes_of_version_1() {
        let ids: Vec<u64> = (1000..1008).collect();
        let range = encode_ids("tea", 3, &ids);
        assert_eq!(hex(&range), "4d530101167329c703746561030802e807");
        let strings = encode_ids("tea", 300, &["a".to_owned(), "bc".to_owned()]);
        assert_eq!(hex(&strings), "4d53010405764d4b03746561ac0202050161026263");
        let rows =
            RowBatch { run: "tea", pass: 2, batch: 3, ids: 8, dead: 1, raw_bytes: 500, rows: &[9, 8, 7] };
        assert_eq!(hex(&encode_rows(&rows)), "4d5301104e72a6eb0374656102030801f40303090807");
    }

    /// What version 2 looks like on the wire, for ever.
    #[test]
    fn golden_bytes_of_version_2() {
        assert_eq!(
            hex(&encode_part(&part())),
            "4d530210eb8b5597037465610203ac020408016102626301f40303090807"
        );
        let message = encode_cut(&cut(5, &[300, 1]));
        assert_eq!(hex(&message), "4d5302111ba7d1720374656102030502ac0201");
        assert_eq!(decode_rows(&message), Ok(Rows::Cut(cut(5, &[300, 1]))));
    }

    fn part() -> RowPart<'static> {
        let (first, last) = ("a", "bc");
        RowPart {
            run: "tea",
            pass: 2,
            batch: 3,
            batch_ids: 300,
            from: 4,
            ids: 8,
            first,
            last,
            dead: 1,
            raw_bytes: 500,
            rows: &[9, 8, 7],
        }
    }

    fn cut(from: u32, parts: &[u32]) -> RowCut<'static> {
        RowCut { run: "tea", pass: 2, batch: 3, from, parts: parts.to_vec() }
    }

    #[test]
    fn a_part_comes_back() {
        assert_eq!(decode_rows(&encode_part(&part())), Ok(Rows::Part(part())));
    }

    #[test]
    fn a_cut_says_which_ids_each_part_has() {
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
        assert_eq!(hex(&end), "4d5302124b22e34c0374656103");
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
    fn a_newer_version_is_told_from_damage() {
        let mut message = encode_ids("tea", 3, &[1u64]);
        message[2] = 3;
        assert_eq!(decode_ids::<u64>(&message), Err(EnvelopeFault::NewerVersion { version: 3 }));
        assert_eq!(decode_rows(&message), Err(EnvelopeFault::NewerVersion { version: 3 }));
    }

    #[test]
    fn the_streams_do_not_take_each_others_messages() {
        let ids = encode_ids("tea", 3, &[1u64]);
        assert_eq!(decode_rows(&ids), Err(EnvelopeFault::Codec { codec: crate::block::RANGE }));
        let rows = RowBatch { run: "tea", pass: 1, batch: 3, ids: 1, dead: 0, raw_bytes: 0, rows: &[] };
        assert_eq!(decode_ids::<u64>(&encode_rows(&rows)), Err(EnvelopeFault::Codec { codec: ROWS_LZ4 }));
        assert_eq!(decode_ids::<u64>(&encode_part(&part())), Err(EnvelopeFault::Codec { codec: ROWS_LZ4 }));
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

        /// Random bodies behind a right header and checksum: what a faulty build could write.
        #[test]
        fn random_bodies_never_panic(version in V1..=V2, codec in 0u8..20, body in vec(any::<u8>(), 0..300)) {
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
