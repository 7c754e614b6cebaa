//! Bodies in ClickHouse's own compressed frames ([`millstream::frame`], `decompress=1`).
//!
//! A body of frames is stored decompressed, or still compressed as a file that the engine decompresses while it reads: an LZ4
//! frame file has the very blocks that our frames have, between other headers
//! (<https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md>). So an INSERT's rows are not written and read once more.

use std::io::{self, Write};

use millstream::frame::{self, Block, FrameFault};

use crate::body::MAX_BODY;
use crate::exception::{Exception, code};

/// Begins an LZ4 frame file: its magic number, version 1 with independent blocks and no checksums, blocks of [`LZ4_BLOCK`] at most,
/// and the checksum of those two bytes.
const LZ4_HEAD: [u8; 7] = [0x04, 0x22, 0x4d, 0x18, 0x60, 0x70, 0x73];
/// Ends one.
const LZ4_END: [u8; 4] = [0; 4];
/// The most that one block of an LZ4 frame file decompresses to.
const LZ4_BLOCK: usize = 4 << 20;
/// The bit in a block's size which says that its bytes are not compressed.
const LZ4_PLAIN: u32 = 1 << 31;

/// Takes a body's frames apart as its bytes arrive, in pieces of any size.
#[derive(Default)]
pub(crate) struct Decoder {
    pending: Vec<u8>,
    plain: Vec<u8>,
    /// Whether blocks stay compressed, as an LZ4 frame file.
    packs: bool,
    /// Bytes that all blocks so far make at most.
    raw: u64,
}

/// Why a body could not be stored.
pub(crate) enum Fault {
    Frame(Exception),
    Write(io::Error),
}

impl From<FrameFault> for Fault {
    fn from(fault: FrameFault) -> Self {
        let code = match fault {
            FrameFault::Cut { .. } => code::UNEXPECTED_END_OF_FILE,
            FrameFault::Checksum => code::CHECKSUM_DOESNT_MATCH,
            FrameFault::Method { .. } => code::UNKNOWN_COMPRESSION_METHOD,
            FrameFault::Size { .. } => code::TOO_LARGE_SIZE_COMPRESSED,
            FrameFault::Block { .. } => code::CANNOT_DECOMPRESS,
        };
        let text = match fault {
            // ClickHouse's own words, which clients may look for.
            FrameFault::Checksum => {
                "Checksum doesn't match: corrupted data, or not a compressed body".to_owned()
            }
            fault => format!("Cannot decompress a frame: {fault}"),
        };
        Self::Frame(Exception::new(code, &text))
    }
}

impl Decoder {
    /// One that leaves blocks compressed.
    pub(crate) fn packing() -> Self {
        Self { packs: true, ..Self::default() }
    }

    /// Whether what was written is an LZ4 frame file. Nothing at all is none.
    pub(crate) fn has_packed(&self) -> bool {
        self.packs && self.raw > 0
    }

    /// Writes the data of every frame that `bytes` completes to `sink`.
    pub(crate) fn push(&mut self, bytes: &[u8], sink: &mut impl Write) -> Result<(), Fault> {
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        while let Some(length) = frame::frame_len(&self.pending[done..])? {
            let Some(whole) = self.pending.get(done..done + length) else { break };
            self.plain.clear();
            if self.packs {
                pack(whole, &mut self.raw, &mut self.plain)?;
            } else {
                frame::decompress(whole, &mut self.plain)?;
            }
            sink.write_all(&self.plain).map_err(Fault::Write)?;
            done += length;
        }
        self.pending.drain(..done);
        Ok(())
    }

    /// Ends the file, or says that the body ended within a frame.
    pub(crate) fn finish(&self, sink: &mut impl Write) -> Result<(), Fault> {
        if self.pending.is_empty() {
            let end: &[u8] = if self.has_packed() { &LZ4_END } else { &[] };
            return sink.write_all(end).map_err(Fault::Write);
        }
        Err(Fault::Frame(Exception::new(
            code::UNEXPECTED_END_OF_FILE,
            &format!("the body ends {} bytes into a compressed frame", self.pending.len()),
        )))
    }
}

/// Appends a frame's block as one of an LZ4 frame file, behind that file's head if it is the first that has anything. What is too
/// large for one block goes uncompressed.
fn pack(frame: &[u8], raw: &mut u64, out: &mut Vec<u8>) -> Result<(), Fault> {
    let mut apart = Vec::new();
    let block = match frame::open(frame)? {
        Block::Lz4 { packed, size } if size.max(packed.len()) > LZ4_BLOCK => {
            frame::decompress(frame, &mut apart)?;
            Block::Plain(&apart)
        }
        block => block,
    };
    // The size in a frame's header is not believed: this is the most that its block makes.
    let size = match block {
        Block::Lz4 { packed, .. } => LZ4_BLOCK.min(packed.len().saturating_mul(frame::LZ4_MOST)),
        Block::Plain(plain) => plain.len(),
    } as u64;
    if size == 0 || matches!(block, Block::Lz4 { size: 0, .. }) {
        return Ok(());
    }
    // Where the file as it would be uncompressed has no room, it has none compressed.
    if *raw + size > MAX_BODY {
        return Err(Fault::Write(io::ErrorKind::FileTooLarge.into()));
    }
    if *raw == 0 {
        out.extend_from_slice(&LZ4_HEAD);
    }
    *raw += size;
    let mut block_of = |bytes: &[u8], flag: u32| {
        out.extend_from_slice(&(bytes.len() as u32 | flag).to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match block {
        Block::Lz4 { packed, .. } => block_of(packed, 0),
        Block::Plain(plain) => plain.chunks(LZ4_BLOCK).for_each(|chunk| block_of(chunk, LZ4_PLAIN)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use lz4_flex::frame::FrameDecoder;

    use super::*;

    fn decode(bytes: &[u8], piece: usize) -> Result<Vec<u8>, u32> {
        let plain = run(Decoder::default(), bytes, piece);
        // Packed, it is refused in the same way, or is the same once it is decompressed.
        let packed = run(Decoder::packing(), bytes, piece);
        match (&plain, &packed) {
            (Ok(plain), Ok(packed)) if packed.is_empty() => assert!(plain.is_empty()),
            (Ok(plain), Ok(packed)) => {
                let mut back = Vec::new();
                FrameDecoder::new(&packed[..]).read_to_end(&mut back).expect("an LZ4 frame file");
                assert!(back == *plain, "{} bytes are not {}", back.len(), plain.len());
            }
            (plain, packed) => assert_eq!(plain, packed),
        }
        plain
    }

    fn run(mut decoder: Decoder, bytes: &[u8], piece: usize) -> Result<Vec<u8>, u32> {
        let code = |fault| match fault {
            Fault::Frame(exception) => exception.code,
            Fault::Write(error) => panic!("{error}"),
        };
        let mut out = Vec::new();
        bytes.chunks(piece).try_for_each(|part| decoder.push(part, &mut out)).map_err(code)?;
        decoder.finish(&mut out).map_err(code)?;
        Ok(out)
    }

    /// What one frame of a client's holds.
    const FRAME_DATA: usize = 1 << 20;

    fn encode(data: &[u8], out: &mut Vec<u8>) {
        data.chunks(FRAME_DATA).for_each(|block| frame::compress(block, out));
    }

    fn sample(length: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from(i * i % 251).expect("below 251")).collect()
    }

    #[test]
    fn frames_survive_the_round_trip_in_pieces_of_any_size() {
        for length in [0, 1, 1000, FRAME_DATA, 2 * FRAME_DATA + 5] {
            let data = sample(length);
            let mut framed = Vec::new();
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
    fn a_block_larger_than_a_file_of_lz4_takes_goes_uncompressed() {
        for data in [sample(LZ4_BLOCK), sample(LZ4_BLOCK + 1), vec![7; 3 * LZ4_BLOCK + 5]] {
            let mut framed = Vec::new();
            frame::compress(&data, &mut framed);
            frame::compress(b"more", &mut framed);
            assert_eq!(decode(&framed, usize::MAX), Ok([&data[..], b"more"].concat()));
        }
    }

    #[test]
    fn a_cut_body_and_absurd_sizes_are_refused() {
        let mut framed = Vec::new();
        encode(&sample(300), &mut framed);
        assert_eq!(decode(&framed[..framed.len() - 1], usize::MAX), Err(code::UNEXPECTED_END_OF_FILE));
        framed[17..21].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&framed, usize::MAX), Err(code::TOO_LARGE_SIZE_COMPRESSED));
    }
}
