//! ClickHouse's own compressed frames, for `decompress=1` bodies and `compress=1` answers.
//!
//! A frame is a CityHash128 (1.0.2) of the rest, a method byte, the compressed size including these nine header bytes,
//! the size when decompressed, and the data:
//! <https://clickhouse.com/docs/reference/interfaces/specs/NativeFormat#frame-format>.

use std::io::{self, Write};

use super::errors::{Exception, code};

const CHECKSUM: usize = 16;
const HEADER: usize = 9;
const METHOD_NONE: u8 = 0x02;
const METHOD_LZ4: u8 = 0x82;
/// ClickHouse's DBMS_MAX_COMPRESSED_SIZE. Also bounds what a hostile frame can make us allocate.
const MAX_FRAME: usize = 1 << 30;
/// What one frame of an answer holds at most.
const FRAME_DATA: usize = 1 << 20;

/// Appends `data` to `out` as frames.
pub(super) fn encode(data: &[u8], out: &mut Vec<u8>) {
    for block in data.chunks(FRAME_DATA) {
        encode_frame(block, out);
    }
}

fn encode_frame(block: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    let mut compressed = vec![0; lz4_flex::block::get_maximum_output_size(block.len())];
    let fitted = lz4_flex::block::compress_into(block, &mut compressed);
    let (method, data) = match fitted {
        Ok(length) => (METHOD_LZ4, &compressed[..length]),
        Err(_) => (METHOD_NONE, block),
    };
    out.extend_from_slice(&[0; CHECKSUM]);
    out.push(method);
    out.extend_from_slice(&size(HEADER + data.len()).to_le_bytes());
    out.extend_from_slice(&size(block.len()).to_le_bytes());
    out.extend_from_slice(data);
    let checksum = checksum(&out[start + CHECKSUM..]);
    out[start..start + CHECKSUM].copy_from_slice(&checksum);
}

/// A frame holds no more than [`FRAME_DATA`] and its overhead.
fn size(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// The low half first, each half little-endian.
fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    cityhash_rs::cityhash_102_128(bytes).rotate_left(64).to_le_bytes()
}

/// Takes a body's frames apart as its bytes arrive, in pieces of any size.
#[derive(Default)]
pub(super) struct Decoder {
    pending: Vec<u8>,
    plain: Vec<u8>,
}

/// Why a body could not be stored.
pub(super) enum Fault {
    Frame(Exception),
    Write(io::Error),
}

impl Decoder {
    /// Writes the data of every frame that `bytes` completes to `sink`.
    pub(super) fn push(&mut self, bytes: &[u8], sink: &mut impl Write) -> Result<(), Fault> {
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        while let Some(length) = frame_length(&self.pending[done..]).map_err(Fault::Frame)? {
            let frame = &self.pending[done..done + length];
            decode_frame(frame, &mut self.plain).map_err(Fault::Frame)?;
            sink.write_all(&self.plain).map_err(Fault::Write)?;
            done += length;
        }
        self.pending.drain(..done);
        Ok(())
    }

    /// Says whether the body ended between two frames.
    pub(super) fn finish(&self) -> Result<(), Exception> {
        if self.pending.is_empty() {
            return Ok(());
        }
        Err(Exception::new(
            code::UNEXPECTED_END_OF_FILE,
            &format!("the body ends {} bytes into a compressed frame", self.pending.len()),
        ))
    }
}

/// The length of the frame that `bytes` starts with, once it is there whole.
fn frame_length(bytes: &[u8]) -> Result<Option<usize>, Exception> {
    let Some(compressed) = size_at(bytes, CHECKSUM + 1) else {
        return Ok(None);
    };
    if !(HEADER..=MAX_FRAME).contains(&compressed) {
        return Err(Exception::new(
            code::TOO_LARGE_SIZE_COMPRESSED,
            &format!(
                "a frame's compressed size is {compressed}, which is not within {HEADER} and {MAX_FRAME}"
            ),
        ));
    }
    let length = CHECKSUM + compressed;
    Ok((bytes.len() >= length).then_some(length))
}

fn decode_frame(frame: &[u8], plain: &mut Vec<u8>) -> Result<(), Exception> {
    let (expected, body) = frame.split_at(CHECKSUM);
    let found = checksum(body);
    if found != expected {
        return Err(Exception::new(
            code::CHECKSUM_DOESNT_MATCH,
            "Checksum doesn't match: corrupted data, or not a compressed body",
        ));
    }
    let data = &body[HEADER..];
    let length = size_at(body, 5).filter(|length| *length <= MAX_FRAME).ok_or_else(|| {
        Exception::new(code::TOO_LARGE_SIZE_COMPRESSED, "a frame's decompressed size is too large")
    })?;
    plain.clear();
    match body[0] {
        METHOD_NONE if data.len() == length => plain.extend_from_slice(data),
        METHOD_LZ4 => {
            plain.resize(length, 0);
            let written = lz4_flex::block::decompress_into(data, plain).map_err(cannot_decompress)?;
            if written != length {
                return Err(cannot_decompress(format!("{written} bytes instead of {length}")));
            }
        }
        METHOD_NONE => return Err(cannot_decompress("sizes differ")),
        method => {
            return Err(Exception::new(
                code::UNKNOWN_COMPRESSION_METHOD,
                &format!("compression method 0x{method:02x} is not LZ4 (0x82) or NONE (0x02)"),
            ));
        }
    }
    Ok(())
}

fn cannot_decompress(why: impl std::fmt::Display) -> Exception {
    Exception::new(code::CANNOT_DECOMPRESS, &format!("Cannot decompress a frame: {why}"))
}

fn size_at(bytes: &[u8], at: usize) -> Option<usize> {
    let size = bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(size)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8], piece: usize) -> Result<Vec<u8>, u32> {
        let (mut decoder, mut out) = (Decoder::default(), Vec::new());
        for part in bytes.chunks(piece) {
            decoder.push(part, &mut out).map_err(|fault| match fault {
                Fault::Frame(exception) => exception.code,
                Fault::Write(error) => panic!("{error}"),
            })?;
        }
        decoder.finish().map_err(|exception| exception.code)?;
        Ok(out)
    }

    fn sample(length: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from(i * i % 251).expect("below 251")).collect()
    }

    #[test]
    fn frames_survive_the_round_trip_in_pieces_of_any_size() {
        for length in [0, 1, 1000, FRAME_DATA, 2 * FRAME_DATA + 5] {
            let (data, mut framed) = (sample(length), Vec::new());
            encode(&data, &mut framed);
            for piece in [1000, 65_536, usize::MAX] {
                assert_eq!(decode(&framed, piece).as_deref(), Ok(&data[..]), "{length} bytes by {piece}");
            }
        }
        let mut framed = Vec::new();
        encode(&sample(100), &mut framed);
        assert_eq!(decode(&framed, 1), Ok(sample(100)));
    }

    #[test]
    fn a_frame_that_clickhouse_made_is_read() {
        // `SELECT 1 FORMAT TSV` with compress=1, and the same under METHOD_NONE, have two bytes of data.
        let mut none = vec![0; CHECKSUM];
        none.extend_from_slice(&[METHOD_NONE, 11, 0, 0, 0, 2, 0, 0, 0, b'1', b'\n']);
        let sum = checksum(&none[CHECKSUM..]);
        none[..CHECKSUM].copy_from_slice(&sum);
        assert_eq!(decode(&none, 7), Ok(b"1\n".to_vec()));
    }

    #[test]
    fn every_flipped_byte_is_refused() {
        let mut framed = Vec::new();
        encode(&sample(300), &mut framed);
        for at in 0..framed.len() {
            let mut broken = framed.clone();
            broken[at] ^= 0x41;
            assert!(decode(&broken, usize::MAX).is_err(), "byte {at}");
        }
        framed[CHECKSUM + HEADER + 3] ^= 1;
        assert_eq!(decode(&framed, usize::MAX), Err(code::CHECKSUM_DOESNT_MATCH));
    }

    #[test]
    fn a_cut_body_and_absurd_sizes_are_refused() {
        let mut framed = Vec::new();
        encode(&sample(300), &mut framed);
        assert_eq!(decode(&framed[..framed.len() - 1], usize::MAX), Err(code::UNEXPECTED_END_OF_FILE));
        framed[CHECKSUM + 1..CHECKSUM + 5].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&framed, usize::MAX), Err(code::TOO_LARGE_SIZE_COMPRESSED));
    }

    #[test]
    fn an_unknown_method_is_named() {
        let mut framed = Vec::new();
        encode(b"data", &mut framed);
        framed[CHECKSUM] = 0x90;
        let sum = checksum(&framed[CHECKSUM..]);
        framed[..CHECKSUM].copy_from_slice(&sum);
        assert_eq!(decode(&framed, usize::MAX), Err(code::UNKNOWN_COMPRESSION_METHOD));
    }
}
