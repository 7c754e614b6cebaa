//! How the ids of one batch are packed into bytes: a range, sorted deltas, plain u64, or strings.
//!
//! The producer uses the smallest form that fits. Codec numbers are part of the stored format: none is ever
//! reused.

use crate::MAX_BATCH_IDS;
use crate::id::MAX_STRING_ID;
use crate::native::write_varint;

/// Consecutive numbers: the first as varint.
pub const RANGE: u8 = 1;
/// Sorted numbers: the first, then each distance minus one, all as varints.
pub const DELTA: u8 = 2;
/// Numbers of eight bytes each, little-endian.
pub const PLAIN: u8 = 3;
/// Strings, each after its length as varint.
pub const STRINGS: u8 = 4;

/// Packed ids: the codec byte of the envelope, and the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// One of [`RANGE`], [`DELTA`], [`PLAIN`], [`STRINGS`].
    pub codec: u8,
    /// The bytes that [`Id::unpack`](crate::Id::unpack) reads.
    pub bytes: Vec<u8>,
}

/// Why bytes are not a block of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockFault {
    /// The codec byte is unknown for this id type.
    #[error("codec {codec} does not hold ids of this type")]
    Codec {
        /// The codec byte.
        codec: u8,
    },
    /// The batch claims no ids, or more than a batch may hold.
    #[error("a batch of {count} ids is outside 1..={MAX_BATCH_IDS}")]
    Count {
        /// The number that the batch claims.
        count: u32,
    },
    /// The block ends before the last id, has bytes after it, or contains an invalid id.
    #[error("the block of {length} bytes does not hold {count} ids")]
    Malformed {
        /// The number of bytes in the block.
        length: usize,
        /// The number of ids that the block should hold.
        count: u32,
    },
}

/// Packs sorted numbers without repeats.
pub fn pack_u64(ids: &[u64]) -> Block {
    debug_assert!(ids.is_sorted_by(|a, b| a < b), "ids of a batch are sorted and unique");
    let (Some(first), Some(last)) = (ids.first(), ids.last()) else {
        return Block { codec: RANGE, bytes: Vec::new() };
    };
    let mut bytes = Vec::new();
    write_varint(&mut bytes, *first);
    if last - first == ids.len() as u64 - 1 {
        return Block { codec: RANGE, bytes };
    }
    for pair in ids.windows(2) {
        write_varint(&mut bytes, pair[1] - pair[0] - 1);
    }
    if bytes.len() <= size_of_val(ids) {
        return Block { codec: DELTA, bytes };
    }
    Block { codec: PLAIN, bytes: ids.iter().flat_map(|id| id.to_le_bytes()).collect() }
}

/// Unpacks the numbers that [`pack_u64`] packed.
///
/// # Errors
/// [`BlockFault`] for anything else.
pub fn unpack_u64(codec: u8, bytes: &[u8], count: u32) -> Result<Vec<u64>, BlockFault> {
    let malformed = BlockFault::Malformed { length: bytes.len(), count };
    check_count(count)?;
    match codec {
        RANGE => {
            let (first, rest) = read_varint(bytes).ok_or(malformed)?;
            let last =
                first.checked_add(u64::from(count) - 1).filter(|_| rest.is_empty()).ok_or(malformed)?;
            Ok((first..=last).collect())
        }
        DELTA if bytes.len() >= count as usize => unpack_deltas(bytes, count).ok_or(malformed),
        PLAIN if bytes.len() == count as usize * size_of::<u64>() => {
            let ids: Vec<u64> = bytes.as_chunks().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect();
            ids.is_sorted_by(|a, b| a < b).then_some(ids).ok_or(malformed)
        }
        DELTA | PLAIN => Err(malformed),
        _ => Err(BlockFault::Codec { codec }),
    }
}

fn unpack_deltas(bytes: &[u8], count: u32) -> Option<Vec<u64>> {
    let mut ids = Vec::with_capacity(count as usize);
    let (mut id, mut rest) = read_varint(bytes)?;
    ids.push(id);
    for _ in 1..count {
        let (distance, after) = read_varint(rest)?;
        id = id.checked_add(distance)?.checked_add(1)?;
        ids.push(id);
        rest = after;
    }
    rest.is_empty().then_some(ids)
}

/// Packs sorted strings without repeats.
pub fn pack_strings(ids: &[String]) -> Block {
    debug_assert!(ids.is_sorted_by(|a, b| a < b), "ids of a batch are sorted and unique");
    let mut bytes = Vec::with_capacity(ids.iter().map(|id| id.len() + 2).sum());
    for id in ids {
        write_varint(&mut bytes, id.len() as u64);
        bytes.extend_from_slice(id.as_bytes());
    }
    Block { codec: STRINGS, bytes }
}

/// Unpacks the strings that [`pack_strings`] packed.
///
/// # Errors
/// [`BlockFault`] for anything else.
pub fn unpack_strings(codec: u8, bytes: &[u8], count: u32) -> Result<Vec<String>, BlockFault> {
    check_count(count)?;
    if codec != STRINGS {
        return Err(BlockFault::Codec { codec });
    }
    let malformed = BlockFault::Malformed { length: bytes.len(), count };
    if bytes.len() < count as usize {
        return Err(malformed);
    }
    let mut ids: Vec<String> = Vec::with_capacity(count as usize);
    let mut rest = bytes;
    for _ in 0..count {
        let (id, after) = read_string(rest).ok_or(malformed)?;
        if ids.last().is_some_and(|before| before.as_str() >= id) {
            return Err(malformed);
        }
        ids.push(id.to_owned());
        rest = after;
    }
    rest.is_empty().then_some(ids).ok_or(malformed)
}

fn check_count(count: u32) -> Result<(), BlockFault> {
    if (1..=MAX_BATCH_IDS).contains(&count) { Ok(()) } else { Err(BlockFault::Count { count }) }
}

/// Reads a string id, and returns it with the bytes after it.
pub(crate) fn read_string(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = read_varint(bytes)?;
    let length = usize::try_from(length).ok().filter(|length| (1..=MAX_STRING_ID).contains(length))?;
    let (text, rest) = rest.split_at_checked(length)?;
    Some((std::str::from_utf8(text).ok()?, rest))
}

/// Reads an LEB128 number of at most 64 bits, and returns it with the bytes after it.
fn read_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        let part = u64::from(byte & 0x7f);
        // The tenth byte holds only the 64th bit.
        if index == 9 && part > 1 {
            return None;
        }
        value |= part << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_of_ids_takes_its_smallest_codec() {
        let sparse: Vec<u64> = (0..10).map(|i| i << 60).collect();
        let table: [(&[u64], u8, usize); 4] = [
            (&[5], RANGE, 1),
            (&[1_000_000, 1_000_001, 1_000_002], RANGE, 3),
            (&[3, 5, 9, 200], DELTA, 5),
            (&sparse, PLAIN, 80),
        ];
        for (ids, codec, size) in table {
            let block = pack_u64(ids);
            assert_eq!((block.codec, block.bytes.len()), (codec, size), "{ids:?}");
        }
    }

    #[test]
    fn a_range_to_the_last_u64_comes_back() {
        let ids = [u64::MAX - 1, u64::MAX];
        let block = pack_u64(&ids);
        assert_eq!(unpack_u64(block.codec, &block.bytes, 2), Ok(ids.to_vec()));
        assert!(unpack_u64(block.codec, &block.bytes, 3).is_err(), "one past the end must not wrap");
    }

    #[test]
    fn a_claim_of_too_many_ids_is_refused_before_anything_is_allocated() {
        for count in [0, MAX_BATCH_IDS + 1, u32::MAX] {
            assert_eq!(unpack_u64(RANGE, &[1], count), Err(BlockFault::Count { count }));
            assert_eq!(unpack_strings(STRINGS, &[1], count), Err(BlockFault::Count { count }));
        }
    }

    #[test]
    fn unsorted_or_repeated_ids_are_refused() {
        let bytes: Vec<u8> = [7u64, 7].iter().flat_map(|id| id.to_le_bytes()).collect();
        assert!(unpack_u64(PLAIN, &bytes, 2).is_err());
        assert!(unpack_strings(STRINGS, &[1, b'b', 1, b'a'], 2).is_err());
    }

    proptest! {
        #[test]
        fn numbers_come_back(ids in btree_set(any::<u64>(), 1..300)) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let block = pack_u64(&ids);
            prop_assert!(block.bytes.len() <= ids.len() * 8 + 2);
            prop_assert_eq!(unpack_u64(block.codec, &block.bytes, ids.len() as u32), Ok(ids));
        }

        #[test]
        fn close_numbers_come_back(first in any::<u32>(), gaps in vec(1u64..1000, 1..300)) {
            let ids: Vec<u64> = gaps.iter().scan(u64::from(first), |at, gap| { *at += gap; Some(*at) }).collect();
            let block = pack_u64(&ids);
            prop_assert!(block.bytes.len() <= ids.len() * 2 + 5);
            prop_assert_eq!(unpack_u64(block.codec, &block.bytes, ids.len() as u32), Ok(ids));
        }

        #[test]
        fn strings_come_back(ids in btree_set("\\PC{1,20}", 1..100)) {
            let ids: Vec<String> = ids.into_iter().collect();
            let block = pack_strings(&ids);
            prop_assert_eq!(unpack_strings(block.codec, &block.bytes, ids.len() as u32), Ok(ids));
        }

        #[test]
        fn random_bytes_never_panic(codec in 0u8..6, bytes in vec(any::<u8>(), 0..200), count in any::<u32>()) {
            let _numbers = unpack_u64(codec, &bytes, count);
            let _strings = unpack_strings(codec, &bytes, count);
            let _small = unpack_u64(codec, &bytes, count % 64);
        }
    }
}
