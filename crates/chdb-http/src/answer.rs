//! The body of an answer: all there, or as the engine writes it.
//!
//! An error after the first bytes cannot change the status any more. It is told as ClickHouse 25.11 and later do: a
//! tail with the exception between tags, whose tag a header announced, and then a broken transfer, for clients that do
//! not know of tails.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncReadExt, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Sleep, sleep};

use crate::body::MemoryFile;
use crate::exception::Exception;
use crate::execute::Done;
use crate::running::Reader;

/// What is read from the engine at once.
const PIECE: usize = 1 << 18;
/// As much of a result is held back, so that an early error still has a status of its own.
const HELD: usize = 1 << 18;
/// How long the tail of a failed answer has to leave before the connection is broken: what a client has not read by then,
/// up to half a MB, is lost with it.
const TAIL_LEAVES: Duration = Duration::from_secs(2);

/// The outcome of a statement that runs on a blocking thread.
pub(crate) type Outcome = JoinHandle<Result<Done, Exception>>;

/// Kills the query when its client is gone before the answer is whole.
pub(crate) struct Abandon {
    query_id: Option<String>,
    to: mpsc::Sender<String>,
}

impl Abandon {
    pub(crate) fn new(query_id: String, to: mpsc::Sender<String>) -> Self {
        Self { query_id: Some(query_id), to }
    }

    pub(crate) fn disarm(&mut self) {
        self.query_id = None;
    }
}

impl Drop for Abandon {
    fn drop(&mut self) {
        if let Some(query_id) = self.query_id.take()
            && self.to.try_send(query_id).is_err()
        {
            tracing::debug!("too many abandoned queries at once; one runs on");
        }
    }
}

pub(crate) enum Answer {
    Whole(Option<Bytes>),
    File { file: Arc<MemoryFile>, at: u64 },
    Stream(Box<Stream>),
}

impl Answer {
    pub(crate) fn whole(data: impl Into<Bytes>) -> Self {
        Self::Whole(Some(data.into()))
    }
}

/// A result that outgrew [`HELD`].
pub(crate) struct Stream {
    held: Option<Bytes>,
    reader: Reader,
    outcome: Option<Outcome>,
    broken: Option<Pin<Box<Sleep>>>,
    abandon: Abandon,
    tag: String,
    version: Arc<str>,
}

/// What came of waiting for a result's start.
pub(crate) enum Begun {
    Over(Bytes),
    /// The start of a longer one.
    More(Bytes),
}

/// Reads a result to its end, or until it is too large to be held.
pub(crate) async fn begin(pipe: &mut pipe::Receiver) -> io::Result<Begun> {
    let mut held = Vec::new();
    while held.len() < HELD {
        held.reserve(HELD);
        if pipe.read_buf(&mut held).await? == 0 {
            return Ok(Begun::Over(held.into()));
        }
    }
    Ok(Begun::More(held.into()))
}

impl Stream {
    pub(crate) fn new(
        held: Bytes,
        reader: Reader,
        outcome: Outcome,
        abandon: Abandon,
        version: Arc<str>,
    ) -> Self {
        let tag = tag();
        Self { held: Some(held), reader, outcome: Some(outcome), broken: None, abandon, tag, version }
    }

    /// The value of `X-ClickHouse-Exception-Tag`.
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if let Some(held) = self.held.take() {
            return Poll::Ready(Some(Ok(held)));
        }
        if let Some(broken) = &mut self.broken {
            ready!(broken.as_mut().poll(context));
            return Poll::Ready(Some(Err(io::ErrorKind::BrokenPipe.into())));
        }
        let Some(outcome) = &mut self.outcome else { return Poll::Ready(None) };
        let mut piece = vec![0; PIECE];
        let mut buffer = ReadBuf::new(&mut piece);
        let read = ready!(self.reader.poll_read(context, &mut buffer));
        let length = buffer.filled().len();
        if read.is_ok() && length > 0 {
            piece.truncate(length);
            return Poll::Ready(Some(Ok(piece.into())));
        }
        let exception = match ready!(Pin::new(outcome).poll(context)) {
            // What was read is not all, even if the engine believes so.
            Ok(Ok(_)) => read.err(),
            Ok(Err(exception)) => Some(exception),
            Err(panic) => Some(Exception::io("run the query", &io::Error::other(panic))),
        };
        self.outcome = None;
        self.abandon.disarm();
        Poll::Ready(exception.map(|exception| {
            self.broken = Some(Box::pin(sleep(TAIL_LEAVES)));
            Ok(tail(&exception.line(&self.version), &self.tag).into())
        }))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let data = match self.get_mut() {
            Self::Whole(data) => data.take().filter(|data| !data.is_empty()).map(Ok),
            Self::File { file, at } => next_of_file(file, at).transpose(),
            Self::Stream(stream) => ready!(stream.poll_data(context)),
        };
        Poll::Ready(data.map(|data| data.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(data) => {
                SizeHint::with_exact(data.as_ref().map_or(0, |data| u64::try_from(data.len()).unwrap_or(0)))
            }
            Self::File { .. } | Self::Stream(_) => SizeHint::default(),
        }
    }
}

fn next_of_file(file: &MemoryFile, at: &mut u64) -> io::Result<Option<Bytes>> {
    let mut piece = vec![0; PIECE];
    let length = file.read_at(*at, &mut piece)?;
    *at += u64::try_from(length).unwrap_or_default();
    piece.truncate(length);
    Ok((length > 0).then(|| piece.into()))
}

/// `\r\n__exception__\r\n<tag>\r\n<line, with its end><its length> <tag>\r\n__exception__\r\n`:
/// <https://github.com/ClickHouse/ClickHouse/blob/master/src/Server/HTTP/WriteBufferFromHTTPServerResponse.cpp>.
fn tail(line: &str, tag: &str) -> String {
    format!("\r\n__exception__\r\n{tag}\r\n{line}{} {tag}\r\n__exception__\r\n", line.len())
}

/// Sixteen letters that data does not contain by chance.
fn tag() -> String {
    use std::hash::{BuildHasher, RandomState};

    let random = [RandomState::new().hash_one(0), RandomState::new().hash_one(1)];
    let letters = random.iter().flat_map(|number| number.to_le_bytes());
    letters.map(|byte| char::from(b'a' + byte % 26)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_says_how_long_its_text_is() {
        assert_eq!(tail("ab\n", "t"), "\r\n__exception__\r\nt\r\nab\n3 t\r\n__exception__\r\n");
    }

    #[test]
    fn tags_differ() {
        assert_eq!(tag().len(), 16);
        assert_ne!(tag(), tag());
    }
}
