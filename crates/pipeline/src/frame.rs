//! ClickHouse's compressed frames, as its native protocol and `decompress=1` take them: a CityHash128 (of version
//! 1.0.2) over what follows, the method byte, two sizes, an LZ4 block
//! (<https://github.com/ClickHouse/ClickHouse/blob/master/src/Compression/CompressedReadBufferBase.cpp>).
//!
//! Frames follow each other without anything between, so bodies that were compressed apart are sent together as they
//! are: workers pay for compression, the sink only concatenates.

use std::time::{Duration, Instant};

use lz4_flex::block;

const METHOD_LZ4: u8 = 0x82;
const METHOD_NONE: u8 = 0x02;
const CHECKSUM: usize = 16;
const HEADER: usize = 9;

/// The largest frame that is read, in bytes before and after decompression: a sane reader does not trust a length.
pub const MAX_FRAME: usize = 128 << 20;

/// Rows are put into one frame until it has this many bytes before compression.
const FRAME: usize = 1 << 20;
/// LZ4 makes at most this much of one byte: a length goes on by 255 a byte
/// (<https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md>). So no size is believed, and no memory taken for it,
/// that the block could not have.
const LZ4_MOST: usize = 255;

/// Bytes that are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameFault {
    /// Fewer bytes than the header or the sizes in it ask for.
    #[error("the frame is cut: {found} of {wanted} bytes")]
    Cut {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        wanted: usize,
    },
    /// The bytes were damaged.
    #[error("the frame's checksum does not match its bytes")]
    Checksum,
    /// A method that this code does not read.
    #[error("compression method {method:#04x} is neither LZ4 (0x82) nor none (0x02)")]
    Method {
        /// The method byte found.
        method: u8,
    },
    /// A size beyond [`MAX_FRAME`] or smaller than the header.
    #[error("a frame of {size} bytes is outside {HEADER}..={MAX_FRAME}")]
    Size {
        /// The size claimed.
        size: usize,
    },
    /// The LZ4 block is malformed.
    #[error("the LZ4 block does not decompress to {size} bytes")]
    Block {
        /// The size claimed.
        size: usize,
    },
}

/// Rows on their way into frames. A row lies in one frame, whatever its size.
#[derive(Debug, Default)]
pub struct FrameWriter {
    /// Where rows are appended.
    pub raw: Vec<u8>,
    frames: Vec<u8>,
    raw_bytes: u64,
    compressing: Duration,
}

impl FrameWriter {
    /// A row ends here: a frame may.
    pub fn end_row(&mut self) {
        if self.raw.len() >= FRAME {
            self.end_frame();
        }
    }

    /// Time that has gone into compression so far.
    pub fn compressing(&self) -> Duration {
        self.compressing
    }

    /// Ends the last frame.
    pub fn flush(&mut self) {
        if !self.raw.is_empty() {
            self.end_frame();
        }
    }

    /// The frames, and the size of what is in them.
    pub fn finish(mut self) -> (Vec<u8>, u64) {
        self.flush();
        (self.frames, self.raw_bytes)
    }

    fn end_frame(&mut self) {
        let begun = Instant::now();
        compress(&self.raw, &mut self.frames);
        self.compressing += begun.elapsed();
        self.raw_bytes += self.raw.len() as u64;
        self.raw.clear();
    }
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

/// How many bytes the frame at the head of `bytes` has; `None` while its header is not yet complete.
///
/// # Errors
/// [`FrameFault::Size`] for a size that no sane writer produces.
pub fn frame_len(bytes: &[u8]) -> Result<Option<usize>, FrameFault> {
    let Some(header) = bytes.get(CHECKSUM..CHECKSUM + HEADER) else { return Ok(None) };
    let packed = read_size(&header[1..5]);
    if !(HEADER..=MAX_FRAME).contains(&packed) {
        return Err(FrameFault::Size { size: packed });
    }
    Ok(Some(CHECKSUM + packed))
}

/// Appends what the one frame that `bytes` holds was made from.
///
/// # Errors
/// [`FrameFault`]; `out` is then as it was.
pub fn decompress(bytes: &[u8], out: &mut Vec<u8>) -> Result<(), FrameFault> {
    let wanted = frame_len(bytes)?.unwrap_or(CHECKSUM + HEADER);
    if bytes.len() != wanted {
        return Err(FrameFault::Cut { found: bytes.len(), wanted });
    }
    let (checksum, body) = bytes.split_at(CHECKSUM);
    if hash(body) != checksum {
        return Err(FrameFault::Checksum);
    }
    let (method, size, packed) = (body[0], read_size(&body[5..9]), &body[HEADER..]);
    if size > MAX_FRAME {
        return Err(FrameFault::Size { size });
    }
    let start = out.len();
    match method {
        METHOD_NONE if packed.len() == size => out.extend_from_slice(packed),
        METHOD_LZ4 if size <= packed.len().saturating_mul(LZ4_MOST) => {
            out.resize(start + size, 0);
            if !block::decompress_into(packed, &mut out[start..]).is_ok_and(|written| written == size) {
                out.truncate(start);
                return Err(FrameFault::Block { size });
            }
        }
        METHOD_NONE | METHOD_LZ4 => return Err(FrameFault::Block { size }),
        _ => return Err(FrameFault::Method { method }),
    }
    Ok(())
}

fn read_size(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |size, byte| size << 8 | usize::from(*byte))
}

/// Both halves of the hash, the low one first: as ClickHouse compares it.
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

    /// Found by fuzzing: 30 bytes made a server take 128 MiB before it looked at the block.
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
        let (mut frame, mut back) = (Vec::new(), Vec::new());
        compress(&raw, &mut frame);
        assert_eq!(decompress(&frame, &mut back), Ok(()));
        assert!(back == raw);
    }

    #[test]
    fn rows_lie_in_one_frame_each() {
        let mut writer = FrameWriter::default();
        let rows: Vec<Vec<u8>> = [10, FRAME - 10, FRAME - 1, 3 * FRAME, 5].map(|size| vec![7; size]).into();
        for row in &rows {
            writer.raw.extend_from_slice(row);
            writer.end_row();
        }
        let (frames, raw_bytes) = writer.finish();
        let (mut rest, mut sizes) = (&frames[..], Vec::new());
        while let Some(length) = frame_len(rest).expect("frames") {
            let mut raw = Vec::new();
            decompress(&rest[..length], &mut raw).expect("sound");
            sizes.push(raw.len());
            rest = &rest[length..];
        }
        assert_eq!(sizes, [FRAME, 4 * FRAME - 1, 5]);
        assert_eq!(raw_bytes, sizes.iter().sum::<usize>() as u64);
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
