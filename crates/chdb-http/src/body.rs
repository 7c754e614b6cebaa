//! A request's body, whole or not at all: in memory that the engine can read as a file.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::time::timeout;

use crate::encoding::Encoding;
use crate::exception::{Exception, code};
use crate::frames::{Decoder, Fault};

/// The most that one body may hold once decompressed.
pub(crate) const MAX_BODY: u64 = 1 << 30;
/// How long a client may be silent within its body; ClickHouse's `http_receive_timeout`.
const SILENCE: Duration = Duration::from_secs(30);

/// A file without a name, in memory.
pub(crate) struct MemoryFile {
    file: File,
    length: u64,
    /// How what is in it is compressed, by the engine's word for it.
    compression: Option<&'static str>,
}

/// How a body is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coming {
    /// As it comes.
    AsItIs,
    /// Frames, each decompressed.
    Frames,
    /// Frames whose blocks stay compressed, for the engine to decompress as it reads.
    Packed,
}

impl MemoryFile {
    pub(crate) fn new() -> io::Result<Self> {
        let file = memfd_create("chdb-http", MFdFlags::MFD_CLOEXEC)?;
        Ok(Self { file: File::from(file), length: 0, compression: None })
    }

    /// Where others in this process, the engine above all, find it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// How what is in it is compressed, by the engine's word for it.
    pub(crate) fn compression(&self) -> Option<&'static str> {
        self.compression
    }

    /// At most the first `limit` bytes.
    pub(crate) fn head(&self, limit: usize) -> io::Result<Vec<u8>> {
        let mut head = vec![0; usize::try_from(self.length).unwrap_or(limit).min(limit)];
        self.file.read_exact_at(&mut head, 0)?;
        Ok(head)
    }

    /// Bytes from `at` on; none at the end. What another wrote into the file counts.
    pub(crate) fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buffer, at)
    }

    /// A new file with `before` and what is in this one from `at` on.
    pub(crate) fn tail(&self, before: &[u8], at: u64) -> io::Result<Self> {
        let mut tail = Self::new()?;
        tail.write_all(before)?;
        let mut source = File::open(self.path())?;
        source.seek(io::SeekFrom::Start(at))?;
        tail.length += io::copy(&mut source, &mut tail.file)?;
        Ok(tail)
    }
}

impl Write for MemoryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.length + u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_BODY {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let written = self.file.write(bytes)?;
        self.length += u64::try_from(written).unwrap_or_default();
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A body on its way in, piece by piece.
pub(crate) struct Receiving {
    file: MemoryFile,
    decoder: Option<Decoder>,
    encoding: Option<Encoding>,
}

impl Receiving {
    pub(crate) fn new(coming: Coming, encoding: Option<Encoding>) -> Result<Self, Exception> {
        let file = MemoryFile::new().map_err(|error| Exception::io("make room for the body", &error))?;
        let decoder = match coming {
            Coming::AsItIs => None,
            Coming::Frames => Some(Decoder::default()),
            Coming::Packed => Some(Decoder::packing()),
        };
        Ok(Self { file, decoder, encoding })
    }

    /// Blocks for as long as a frame that ends in `bytes` takes to decompress, and one may hold a lot.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), Exception> {
        let stored = match &mut self.decoder {
            Some(decoder) => decoder.push(bytes, &mut self.file),
            None => self.file.write_all(bytes).map_err(Fault::Write),
        };
        stored.map_err(refused)
    }

    /// What was received, decompressed. Blocks for as long as that takes.
    pub(crate) fn finish(mut self) -> Result<MemoryFile, Exception> {
        if let Some(decoder) = self.decoder {
            decoder.finish(&mut self.file).map_err(refused)?;
            self.file.compression = decoder.has_packed().then_some("lz4");
        }
        match self.encoding {
            Some(encoding) => encoding.decoded(self.file),
            None => Ok(self.file),
        }
    }
}

/// Reads `body` to its end. An error means that nothing of it may be executed.
pub(crate) async fn receive(
    mut body: Incoming,
    coming: Coming,
    encoding: Option<Encoding>,
) -> Result<MemoryFile, Exception> {
    let mut receiving = Receiving::new(coming, encoding)?;
    while let Some(frame) = timeout(SILENCE, body.frame()).await.map_err(|_| silent())? {
        let frame = frame.map_err(cut)?;
        let Ok(bytes) = frame.into_data() else { continue };
        match coming {
            Coming::AsItIs => receiving.push(&bytes)?,
            Coming::Frames | Coming::Packed => tokio::task::block_in_place(|| receiving.push(&bytes))?,
        }
    }
    match encoding {
        Some(_) => tokio::task::block_in_place(|| receiving.finish()),
        None => receiving.finish(),
    }
}

/// Why a body could not be stored, as a client is told.
pub(crate) fn refused(fault: Fault) -> Exception {
    match fault {
        Fault::Frame(exception) => exception,
        Fault::Write(error) if error.kind() == io::ErrorKind::FileTooLarge => Exception::new(
            code::QUERY_IS_TOO_LARGE,
            &format!("the body is larger than {MAX_BODY} bytes; send it in several INSERTs"),
        ),
        Fault::Write(error) => Exception::io("store the body", &error),
    }
}

fn silent() -> Exception {
    let message = format!("Timeout exceeded while reading the body: nothing for {} s", SILENCE.as_secs());
    Exception::new(code::SOCKET_TIMEOUT, &message)
}

fn cut(error: hyper::Error) -> Exception {
    Exception::new(code::UNEXPECTED_END_OF_FILE, &format!("the body is not whole: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_file_is_read_by_its_path_and_cut() {
        let mut file = MemoryFile::new().expect("a memory file");
        file.write_all(b"INSERT 12345").expect("room");
        assert_eq!(std::fs::read(file.path()).expect("by path"), b"INSERT 12345");
        assert_eq!(file.head(6).expect("its head"), b"INSERT");
        let tail = file.tail(b"0", 7).expect("its tail");
        assert_eq!((tail.len(), tail.head(100).expect("its head")), (6, b"012345".to_vec()));
    }
}
