//! ClickHouse's compressed frames, as its native protocol and `decompress=1` use them: a CityHash128 (of
//! version 1.0.2) of the rest, the method byte, two sizes, an LZ4 block
//! (<https://github.com/ClickHouse/ClickHouse/blob/master/src/Compression/CompressedReadBufferBase.cpp>).
//!
//! Frames follow each other directly, so the sink can concatenate bodies that workers compressed separately.

use lz4_flex::block;

const METHOD_LZ4: u8 = 0x82;
const METHOD_NONE: u8 = 0x02;
const CHECKSUM: usize = 16;
const HEADER: usize = 9;

/// The largest frame that is read, in bytes before and after decompression, because a length in the input may
/// be wrong.
pub const MAX_FRAME: usize = 128 << 20;

/// The most bytes that LZ4 makes of one byte, because each byte of a length adds at most 255
/// (<https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md>). So memory is allocated only for a size that
/// the block can have.
pub const LZ4_MOST: usize = 255;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameFault {
    /// There are fewer bytes than the header or its sizes require.
    #[error("the frame is cut: {found} of {wanted} bytes")]
    Cut {
        /// The number of bytes found.
        found: usize,
        /// The number of bytes required.
        wanted: usize,
    },
    /// The bytes were damaged.
    #[error("the frame's checksum does not match its bytes")]
    Checksum,
    /// The compression method is unknown.
    #[error("compression method {method:#04x} is neither LZ4 (0x82) nor none (0x02)")]
    Method {
        /// The method byte that was found.
        method: u8,
    },
    /// The size is beyond [`MAX_FRAME`] or smaller than the header.
    #[error("a frame of {size} bytes is outside {HEADER}..={MAX_FRAME}")]
    Size {
        /// The size that the frame claims.
        size: usize,
    },
    /// The LZ4 block is malformed.
    #[error("the LZ4 block does not decompress to {size} bytes")]
    Block {
        /// The size that the frame claims.
        size: usize,
    },
}

/// Appends `raw` to `out` as one LZ4 frame.
pub fn compress(raw: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    let room = block::get_maximum_output_size(raw.len());
    out.resize(start + CHECKSUM + HEADER + room, 0);
    let packed = block::compress_into(raw, &mut out[start + CHECKSUM + HEADER..])
        .expect("the buffer has the size that the compressor asked for");
    out.truncate(start + CHECKSUM + HEADER + packed);
    let body = &mut out[start + CHECKSUM..];
    body[0] = METHOD_LZ4;
    body[1..5].copy_from_slice(&((HEADER + packed) as u32).to_le_bytes());
    body[5..9].copy_from_slice(&(raw.len() as u32).to_le_bytes());
    let checksum = hash(body);
    out[start..start + CHECKSUM].copy_from_slice(&checksum);
}

/// The number of bytes of the first frame in `bytes`; `None` while its header is incomplete.
///
/// # Errors
/// [`FrameFault::Size`] for a size outside of the limits.
pub fn frame_len(bytes: &[u8]) -> Result<Option<usize>, FrameFault> {
    let Some(header) = bytes.get(CHECKSUM..CHECKSUM + HEADER) else { return Ok(None) };
    let packed = read_size(&header[1..5]);
    if !(HEADER..=MAX_FRAME).contains(&packed) {
        return Err(FrameFault::Size { size: packed });
    }
    Ok(Some(CHECKSUM + packed))
}

/// The size of these frames before compression, by their headers alone; `None` if the bytes are not complete
/// frames that follow each other.
pub fn raw_len(mut frames: &[u8]) -> Option<u64> {
    let mut sum = 0;
    while !frames.is_empty() {
        let length = frame_len(frames).ok()??;
        let frame = frames.split_off(..length)?;
        sum += read_size(&frame[CHECKSUM + 5..CHECKSUM + HEADER]) as u64;
    }
    Some(sum)
}

/// The content of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block<'a> {
    /// An LZ4 block.
    Lz4 {
        /// The bytes of the block.
        packed: &'a [u8],
        /// The size after decompression that the frame claims; the block can have it.
        size: usize,
    },
    /// Uncompressed bytes.
    Plain(&'a [u8]),
}

/// The content of the one frame in `bytes`, after its checksum was verified. It is not decompressed.
///
/// # Errors
/// [`FrameFault`].
pub fn open(bytes: &[u8]) -> Result<Block<'_>, FrameFault> {
    let wanted = frame_len(bytes)?.unwrap_or(CHECKSUM + HEADER);
    if bytes.len() != wanted {
        return Err(FrameFault::Cut { found: bytes.len(), wanted });
    }
    let (checksum, body) = bytes.split_at(CHECKSUM);
    if hash(body) != checksum {
        return Err(FrameFault::Checksum);
    }
    let method = body[0];
    let size = read_size(&body[5..9]);
    let packed = &body[HEADER..];
    if size > MAX_FRAME {
        return Err(FrameFault::Size { size });
    }
    match method {
        METHOD_NONE if packed.len() == size => Ok(Block::Plain(packed)),
        METHOD_LZ4 if size <= packed.len().saturating_mul(LZ4_MOST) => Ok(Block::Lz4 { packed, size }),
        METHOD_NONE | METHOD_LZ4 => Err(FrameFault::Block { size }),
        _ => Err(FrameFault::Method { method }),
    }
}

/// Decompresses the one frame in `bytes`, and appends the result.
///
/// # Errors
/// [`FrameFault`]; then `out` is unchanged.
pub fn decompress(bytes: &[u8], out: &mut Vec<u8>) -> Result<(), FrameFault> {
    match open(bytes)? {
        Block::Plain(plain) => out.extend_from_slice(plain),
        Block::Lz4 { packed, size } => {
            let start = out.len();
            out.resize(start + size, 0);
            if !block::decompress_into(packed, &mut out[start..]).is_ok_and(|written| written == size) {
                out.truncate(start);
                return Err(FrameFault::Block { size });
            }
        }
    }
    Ok(())
}

fn read_size(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |size, byte| size << 8 | usize::from(*byte))
}

/// Both halves of the hash, the low one first, as ClickHouse compares it.
fn hash(bytes: &[u8]) -> [u8; CHECKSUM] {
    cityhash_rs::cityhash_102_128(bytes).rotate_left(64).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out(raw in vec(0u8..4, 0..5000)) {
            let mut frame = Vec::new();
            compress(&raw, &mut frame);
            prop_assert_eq!(frame_len(&frame), Ok(Some(frame.len())));
            let mut back = vec![9];
            prop_assert_eq!(decompress(&frame, &mut back), Ok(()));
            prop_assert_eq!(&back[1..], &raw[..]);
        }

        #[test]
        fn random_bytes_are_refused(bytes in vec(any::<u8>(), 0..100)) {
            let mut out = Vec::new();
            prop_assert!(decompress(&bytes, &mut out).is_err());
            prop_assert!(out.is_empty());
        }
    }

    /// Regression, found by fuzzing: 30 bytes made a server allocate 128 MiB before it read the block.
    #[test]
    fn a_size_that_the_block_cannot_have_takes_no_memory() {
        let mut frame = Vec::new();
        compress(&[7; 1000], &mut frame);
        let body = &mut frame[CHECKSUM..];
        body[5..9].copy_from_slice(&(MAX_FRAME as u32).to_le_bytes());
        let checksum = hash(body);
        frame[..CHECKSUM].copy_from_slice(&checksum);
        let mut out = Vec::new();
        assert_eq!(decompress(&frame, &mut out), Err(FrameFault::Block { size: MAX_FRAME }));
        assert_eq!(out.capacity(), 0);
    }

    #[test]
    fn the_longest_run_of_one_byte_comes_back() {
        let raw = vec![7; 8 << 20];
        let mut frame = Vec::new();
        let mut back = Vec::new();
        compress(&raw, &mut frame);
        assert_eq!(decompress(&frame, &mut back), Ok(()));
        assert!(back == raw);
    }

    #[test]
    fn the_size_of_what_frames_hold_is_in_their_headers() {
        let mut frames = Vec::new();
        [10usize, 70_000, 1].iter().for_each(|size| compress(&vec![7; *size], &mut frames));
        assert_eq!(raw_len(&frames), Some(70_011));
        assert_eq!(raw_len(&[]), Some(0));
        for cut in 1..frames.len() {
            assert_ne!(raw_len(&frames[..cut]), Some(70_011), "{cut}");
        }
        assert_eq!(raw_len(&frames[..frames.len() - 1]), None);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut frame = Vec::new();
        compress(b"some rows, some rows, some rows", &mut frame);
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decompress(&damaged, &mut Vec::new()).is_err(), "bit {bit}");
        }
    }
}
