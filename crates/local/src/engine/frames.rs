//! ClickHouse's own compressed frames ([`millstream::frame`]), for `decompress=1` bodies and `compress=1` answers.

use std::io::{self, Write};

use millstream::frame::{self, FrameFault};

use super::errors::{Exception, code};

/// What one frame of an answer holds at most.
const FRAME_DATA: usize = 1 << 20;

/// Appends `data` to `out` as frames.
pub(super) fn encode(data: &[u8], out: &mut Vec<u8>) {
    for block in data.chunks(FRAME_DATA) {
        frame::compress(block, out);
    }
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
    /// Writes the data of every frame that `bytes` completes to `sink`.
    pub(super) fn push(&mut self, bytes: &[u8], sink: &mut impl Write) -> Result<(), Fault> {
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        while let Some(length) = frame::frame_len(&self.pending[done..])? {
            let Some(whole) = self.pending.get(done..done + length) else { break };
            self.plain.clear();
            frame::decompress(whole, &mut self.plain)?;
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
    fn a_cut_body_and_absurd_sizes_are_refused() {
        let mut framed = Vec::new();
        encode(&sample(300), &mut framed);
        assert_eq!(decode(&framed[..framed.len() - 1], usize::MAX), Err(code::UNEXPECTED_END_OF_FILE));
        framed[17..21].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&framed, usize::MAX), Err(code::TOO_LARGE_SIZE_COMPRESSED));
    }
}
