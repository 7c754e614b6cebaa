//! Reading frames, in the process that started the child.

use std::io;

use bytes::{Bytes, BytesMut};
use millstream::child::{Frame, split};
use tokio::io::{AsyncRead, AsyncReadExt};

const READ_AT_ONCE: usize = 256 << 10;

/// Reads frames from a child's socket.
#[derive(Debug)]
pub(super) struct Frames<R> {
    from: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    pub fn new(from: R) -> Self {
        Self { from, buffer: BytesMut::new() }
    }

    /// The next frame's kind and body; `None` at the end. Cancel safe: bytes already read are kept.
    ///
    /// # Errors
    /// Errors of the socket; `InvalidData` for malformed frames.
    pub async fn next(&mut self) -> io::Result<Option<(u8, Bytes)>> {
        loop {
            let found =
                split(&self.buffer).map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))?;
            if let Some(Frame { kind, body, taken }) = found {
                let start = taken - body.len();
                return Ok(Some((kind, self.buffer.split_to(taken).freeze().slice(start..))));
            }
            self.buffer.reserve(READ_AT_ONCE);
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}
