//! The messages of both streams.

use millstream::envelope::{
    EnvelopeFault, IdBatch, Rows, VERSION, decode_ids, decode_rows, encode_cut, encode_ids, encode_rows,
};
use millstream::{Id, MAX_BATCH_IDS};

use crate::heap::bounded;

/// What one string id takes beyond its bytes: itself, and the least that an allocator hands out.
const STRING_ID: usize = 24 + 16;

/// What one number of a cut takes on the heap at most, where a list grows by doubling.
const CUT_NUMBER: usize = 3 * size_of::<u32>();

/// Reads the input as a message of ids of both types: as it stands, and as a body behind a header that is right.
pub fn ids(input: &[u8]) {
    for message in [input, &sealed(input)] {
        read_ids::<u64>(message, MAX_BATCH_IDS as usize * size_of::<u64>());
        read_ids::<String>(message, message.len() * (1 + STRING_ID));
    }
}

fn read_ids<I: Id>(message: &[u8], limit: usize) {
    let limit = limit + message.len();
    let Ok(batch) = bounded(limit, || decode_ids::<I>(message)) else { return };
    let IdBatch { run, batch: number, ids } = &batch;
    assert!((1..=MAX_BATCH_IDS as usize).contains(&ids.len()), "{} ids", ids.len());
    assert!(ids.is_sorted_by(|a, b| a < b), "ids out of order, or twice");
    let again = encode_ids(run, *number, ids);
    assert!(again.len() <= message.len(), "{} bytes say what {} do", message.len(), again.len());
    assert_eq!(decode_ids::<I>(&flipped(&again)).ok(), None, "damage goes unnoticed");
    assert_eq!(decode_ids::<I>(&again), Ok(batch));
}

/// Reads the input as a message of rows: as it stands, and as a body behind a header that is right.
pub fn rows(input: &[u8]) {
    for message in [input, &sealed(input)] {
        read_rows(message);
    }
}

fn read_rows(message: &[u8]) {
    // A cut has a number for each part, of a byte at least in the message.
    let Ok(batch) = bounded(message.len() * CUT_NUMBER, || decode_rows(message)) else { return };
    let (rows, again) = match &batch {
        Rows::Batch(batch) => (batch.rows, encode_rows(batch)),
        Rows::Cut(cut) => (&[][..], encode_cut(cut)),
    };
    let within = message.as_ptr_range();
    assert!(rows.is_empty() || within.contains(&rows.as_ptr()), "rows are copied");
    assert_eq!(decode_rows(&flipped(&again)).ok(), None, "damage goes unnoticed");
    assert_eq!(decode_rows(&again), Ok(batch));
}

/// The first byte as the codec and the rest as the body of a message, with the magic number, this version and the
/// checksum that they need: a fuzzer would not find those.
fn sealed(input: &[u8]) -> Vec<u8> {
    let (codec, body) = input.split_first().unwrap_or((&0, &[]));
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[VERSION, *codec]);
    hasher.update(body);
    let message = [b"MS", &[VERSION, *codec][..], &hasher.finalize().to_le_bytes(), body].concat();
    let unsealed = matches!(
        decode_rows(&message),
        Err(EnvelopeFault::Foreign { .. }
            | EnvelopeFault::NewerVersion { .. }
            | EnvelopeFault::Checksum { .. })
    );
    assert!(!unsealed, "the header is right");
    message
}

/// One bit of it is another, a different one for messages of different lengths.
fn flipped(message: &[u8]) -> Vec<u8> {
    let mut damaged = message.to_vec();
    let bit = message.len() * 7919 % (message.len() * 8);
    damaged[bit / 8] ^= 1 << (bit % 8);
    damaged
}
