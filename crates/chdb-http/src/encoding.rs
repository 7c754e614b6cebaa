//! Bodies that a client compressed for HTTP (`Content-Encoding`), in the codings that ClickHouse's own server takes
//! (<https://clickhouse.com/docs/interfaces/http#compression>). `clickhouse-connect` and others do so unasked.

use std::io::{self, BufRead, BufReader, Read, Write};

use brotli_decompressor::{BrotliDecompressStream, BrotliResult, BrotliState, StandardAlloc};
use flate2::bufread::MultiGzDecoder;
use flate2::{Decompress, FlushDecompress, Status};
use lz4_flex::frame::FrameDecoder;
use ruzstd::decoding::StreamingDecoder;

use crate::body::{MemoryFile, refused};
use crate::exception::{Exception, code};
use crate::frames::Fault;

/// Bytes that are decompressed at once.
const PIECE: usize = 16 << 10;

/// A way in which a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Brotli,
    Deflate,
    Gzip,
    Lz4,
    Zstd,
}

impl Encoding {
    /// What a header says; `None` for a body that is as it is.
    pub(crate) fn named(header: &str) -> Result<Option<Self>, Exception> {
        Ok(Some(match header.trim().to_ascii_lowercase().as_str() {
            "" | "identity" => return Ok(None),
            "br" => Self::Brotli,
            "deflate" => Self::Deflate,
            "gzip" | "x-gzip" => Self::Gzip,
            "lz4" => Self::Lz4,
            "zstd" => Self::Zstd,
            _ => {
                return Err(Exception::new(
                    code::NOT_IMPLEMENTED,
                    &format!(
                        "Content-Encoding {header} is not supported by the local engine; br, deflate, gzip, lz4 and zstd are"
                    ),
                ));
            }
        }))
    }

    /// What `body` was made from. An empty body is one, whatever its header says: clients send it with a GET.
    pub(crate) fn decoded(self, body: MemoryFile) -> Result<MemoryFile, Exception> {
        if body.len() == 0 {
            return Ok(body);
        }
        let mut plain = MemoryFile::new().map_err(|error| Exception::io("make room for the body", &error))?;
        self.decode(BufReader::with_capacity(PIECE, Reader { body: &body, at: 0 }), &mut plain).map_err(
            |fault| match fault {
                Stop::Damaged(error) => Exception::new(
                    code::CANNOT_DECOMPRESS,
                    &format!("the body is not whole, or not compressed as its Content-Encoding says ({self:?}): {error}"),
                ),
                Stop::NoRoom(error) => refused(Fault::Write(error)),
            },
        )?;
        Ok(plain)
    }

    fn decode(self, mut body: impl BufRead, plain: &mut impl Write) -> Result<(), Stop> {
        // Compressors may be run several times over parts of one body.
        while !body.fill_buf().map_err(Stop::Damaged)?.is_empty() {
            match self {
                Self::Brotli => unbrotli(&mut body, plain)?,
                Self::Deflate => inflate(&mut body, plain)?,
                Self::Gzip => copy(&mut MultiGzDecoder::new(&mut body), plain)?,
                Self::Lz4 => {
                    let mut body = Whole { body: &mut body, is_over: false };
                    copy(&mut FrameDecoder::new(&mut body), plain)?;
                    if body.is_over {
                        return Err(Stop::Damaged(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
                Self::Zstd => {
                    let mut decoder = StreamingDecoder::new(&mut body).map_err(damaged)?;
                    copy(&mut decoder, plain)?;
                }
            }
        }
        Ok(())
    }
}

/// Why a body was not decompressed.
enum Stop {
    Damaged(io::Error),
    NoRoom(io::Error),
}

fn damaged(error: impl std::error::Error + Send + Sync + 'static) -> Stop {
    Stop::Damaged(io::Error::other(error))
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<(), Stop> {
    let mut piece = vec![0; PIECE];
    loop {
        let read = from.read(&mut piece).map_err(Stop::Damaged)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&piece[..read]).map_err(Stop::NoRoom)?;
    }
}

/// A zlib stream. The library's own reader takes a stream that is cut for one that ends.
fn inflate(body: &mut impl BufRead, plain: &mut impl Write) -> Result<(), Stop> {
    let mut stream = Decompress::new(true);
    let mut piece = vec![0; PIECE];
    loop {
        let input = body.fill_buf().map_err(Stop::Damaged)?;
        let is_over = input.is_empty();
        let before_in = stream.total_in();
        let before_out = stream.total_out();
        let status = stream.decompress(input, &mut piece, FlushDecompress::None).map_err(damaged)?;
        body.consume((stream.total_in() - before_in) as usize);
        let made = (stream.total_out() - before_out) as usize;
        plain.write_all(&piece[..made]).map_err(Stop::NoRoom)?;
        match status {
            Status::StreamEnd => return Ok(()),
            Status::Ok | Status::BufError if is_over && made == 0 => {
                return Err(Stop::Damaged(io::ErrorKind::UnexpectedEof.into()));
            }
            Status::Ok | Status::BufError => {}
        }
    }
}

/// A brotli stream. The library's own reader swallows what follows the stream.
fn unbrotli(body: &mut impl BufRead, plain: &mut impl Write) -> Result<(), Stop> {
    let [a, b, c] = std::array::from_fn(|_| StandardAlloc::default());
    let mut stream = BrotliState::new(a, b, c);
    let mut piece = vec![0; PIECE];
    let mut total = 0;
    loop {
        let input = body.fill_buf().map_err(Stop::Damaged)?;
        let is_over = input.is_empty();
        let mut left = input.len();
        let mut taken = 0;
        let mut room = PIECE;
        let mut made = 0;
        let result = BrotliDecompressStream(
            &mut left,
            &mut taken,
            input,
            &mut room,
            &mut made,
            &mut piece,
            &mut total,
            &mut stream,
        );
        body.consume(taken);
        plain.write_all(&piece[..made]).map_err(Stop::NoRoom)?;
        match result {
            BrotliResult::ResultSuccess => return Ok(()),
            BrotliResult::ResultFailure => return Err(Stop::Damaged(io::ErrorKind::InvalidData.into())),
            BrotliResult::NeedsMoreInput if is_over => {
                return Err(Stop::Damaged(io::ErrorKind::UnexpectedEof.into()));
            }
            BrotliResult::NeedsMoreInput | BrotliResult::NeedsMoreOutput => {}
        }
    }
}

/// Notices a reader that goes beyond the end: where a frame is whole, there is no need to. The library takes the end of the
/// body for that of the frame.
struct Whole<R> {
    body: R,
    is_over: bool,
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer)?;
        self.is_over |= read == 0 && !buffer.is_empty();
        Ok(read)
    }
}

struct Reader<'a> {
    body: &'a MemoryFile,
    at: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read_at(self.at, buffer)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use lz4_flex::frame::FrameEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    const TEXT: &[u8] = b"INSERT INTO t FORMAT TSV\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n";

    /// The text by `brotli` 1.1.
    const BROTLI: &[u8] = &[
        27, 56, 0, 232, 29, 9, 118, 44, 206, 144, 11, 207, 55, 73, 13, 18, 227, 52, 37, 147, 168, 232, 90,
        225, 137, 202, 74, 210, 65, 8, 45, 113, 86, 56, 100, 74, 182, 96, 250, 30, 17,
    ];

    fn encoded(encoding: Encoding) -> Vec<u8> {
        match encoding {
            Encoding::Brotli => BROTLI.to_vec(),
            Encoding::Deflate => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(TEXT).expect("in memory");
                encoder.finish().expect("in memory")
            }
            Encoding::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(TEXT).expect("in memory");
                encoder.finish().expect("in memory")
            }
            Encoding::Lz4 => {
                let mut encoder = FrameEncoder::new(Vec::new());
                encoder.write_all(TEXT).expect("in memory");
                encoder.finish().expect("in memory")
            }
            Encoding::Zstd => compress_to_vec(TEXT, CompressionLevel::Fastest),
        }
    }

    fn decoded(encoding: Encoding, bytes: &[u8]) -> Result<Vec<u8>, u32> {
        let mut body = MemoryFile::new().expect("a memory file");
        body.write_all(bytes).expect("room");
        let plain = encoding.decoded(body).map_err(|exception| exception.code)?;
        Ok(plain.head(usize::MAX).expect("readable"))
    }

    #[test]
    fn every_coding_comes_back_and_a_cut_is_noticed() {
        for name in ["br", "deflate", "GZIP", "lz4", "zstd"] {
            let encoding = Encoding::named(name).expect("known").expect("a coding");
            let bytes = encoded(encoding);
            assert_eq!(decoded(encoding, &bytes).as_deref(), Ok(TEXT), "{name}");
            let twice = decoded(encoding, &[&bytes[..], &bytes].concat());
            assert_eq!(twice, Ok([TEXT, TEXT].concat()), "{name} twice");
            for cut in 1..bytes.len() {
                assert_eq!(
                    decoded(encoding, &bytes[..cut]),
                    Err(code::CANNOT_DECOMPRESS),
                    "{name} cut at {cut}"
                );
            }
            assert_eq!(decoded(encoding, b""), Ok(Vec::new()), "{name}");
            assert_eq!(decoded(encoding, TEXT), Err(code::CANNOT_DECOMPRESS), "{name} of text");
        }
        assert_eq!(Encoding::named("identity").expect("known"), None);
        assert_eq!(Encoding::named("snappy").map_err(|exception| exception.code), Err(code::NOT_IMPLEMENTED));
    }
}
