//! The protocol between a worker and a child process that computes for it, byte for byte.
//!
//! The child has /dev/null as its stdin, and a pipe into the worker's log as stdout and stderr, so its code may
//! print anything. It connects to a socket whose abstract name is its second argument. The third argument is
//! the inode of that pipe. If its stdout or stderr still is that pipe, the child writes [`mark`] and a line end
//! into it before each id, so that the worker knows which id printed what. Frames in both directions:
//!
//! ```text
//! length u32 LE, of what follows, 1..=MAX_FRAME | kind u8 | body
//! ```
//! | kind | from | body |
//! |---|---|---|
//! | `H` hello | child, once, first | protocol version u8, then the pipeline's name |
//! | `S` started | child, once | nothing: the pipeline's `start` has returned, and ids can be computed |
//! | `N` not started | child, once | UTF-8: why this process can never compute an id |
//! | `C` compute | worker | one id: eight bytes LE for `UInt64`, the text itself for `String` |
//! | `R` row | child | the id's row: [`Columns`](crate::columns::Columns) of one row, as postcard |
//! | `J` reject | child | UTF-8: why the id becomes a dead letter |
//! | `A` again | child | UTF-8: why the id needs another attempt |
//! | `P` panicked | child | UTF-8: a panic's message and place, sent before unwinding; if the process aborts, this is the reason |
//! | `F` forget | worker | u64 LE: how many of all earlier ids the child keeps; it answers the others only if it has begun them, because another child has them |
//! | `F` forgotten | child | nothing: the child holds none of the ids that it was told to forget |
//! | `B` beat | child | nothing: the child is alive; sent every second while it starts or computes |
//!
//! A child computes ids in the order in which they came, and answers each with one frame before it begins the
//! next. So the first id without an answer is the one in flight. When the child dies or exceeds its time limit,
//! that id is to blame. A worker may send ids ahead. The end of the connection tells the child to exit, with
//! every process that it started.
//!
//! `Pipeline` binaries use this protocol when started with [`ARGUMENT`]; other programs should not. The body of
//! a row is `Columns` in a private layout, which may change with [`VERSION`]. Worker and child are the same
//! program file.

/// The version of this protocol.
pub const VERSION: u8 = 5;

/// The first argument that makes a pipeline's binary run as a child.
pub const ARGUMENT: &str = "__compute-child";

/// The kind of a heartbeat frame: its sender is alive.
pub const BEAT: u8 = b'B';

/// The kind of a frame that tells a child to forget ids, and of the child's answer.
pub const FORGET: u8 = b'F';

/// The longest frame: longer than any row that a message can carry.
pub const MAX_FRAME: usize = 80 << 20;

const LENGTH: usize = 4;

/// The first frame of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The kind of the frame.
    pub kind: u8,
    /// The bytes after the kind.
    pub body: &'a [u8],
    /// The number of bytes that the frame takes.
    pub taken: usize,
}

/// A frame that a child sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The child is connected, with this protocol version and pipeline.
    Hello {
        /// The version of the protocol.
        version: u8,
        /// The name of the pipeline.
        pipeline: &'a str,
    },
    /// The child can compute ids.
    Started,
    /// The child can never compute an id, for this reason.
    NotStarted(&'a str),
    /// The row of the id in flight.
    Row(&'a [u8]),
    /// The id in flight is a dead letter.
    Reject(&'a str),
    /// The id in flight is to be tried again.
    Again(&'a str),
    /// The id in flight panicked. Its answer follows, unless the process aborts.
    Panicked(&'a str),
    /// The child holds no id any more that it was told to forget.
    Forgotten,
}

/// Why bytes are not a frame of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChildFault {
    /// The length is zero or beyond the limit.
    #[error("a frame of {length} bytes is outside 1..={MAX_FRAME}")]
    Length {
        /// The length that was read.
        length: usize,
    },
    /// A child never sends a frame of this kind.
    #[error("a frame of kind {kind:#04x} is not one that a child sends")]
    Kind {
        /// The kind that was read.
        kind: u8,
    },
    /// A text is not UTF-8, or a hello has no version.
    #[error("the body of a frame of kind `{kind}` is malformed")]
    Body {
        /// The kind that was read.
        kind: char,
    },
}

/// The line, without its end, that a child writes into its output before each id. It is made from the name of
/// its socket, which no other process knows.
pub fn mark(address: &str) -> String {
    format!("\0{address}")
}

/// Appends a frame of `kind` whose body is `body`.
pub fn frame(kind: u8, body: &[u8], out: &mut Vec<u8>) {
    let length = body.len() as u32 + 1;
    out.extend_from_slice(&length.to_le_bytes());
    out.push(kind);
    out.extend_from_slice(body);
}

/// The first frame of `bytes`; `None` while it is not all there.
///
/// # Errors
/// [`ChildFault::Length`].
pub fn split(bytes: &[u8]) -> Result<Option<Frame<'_>>, ChildFault> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else { return Ok(None) };
    let length = u32::from_le_bytes(*length) as usize;
    if !(1..=MAX_FRAME).contains(&length) {
        return Err(ChildFault::Length { length });
    }
    Ok(rest.get(..length).map(|frame| Frame { kind: frame[0], body: &frame[1..], taken: LENGTH + length }))
}

impl<'a> Answer<'a> {
    /// Parses the body of a frame that [`split`] found.
    ///
    /// # Errors
    /// [`ChildFault::Kind`] and [`ChildFault::Body`].
    pub fn read(kind: u8, body: &'a [u8]) -> Result<Self, ChildFault> {
        let text =
            |bytes| std::str::from_utf8(bytes).map_err(|_| ChildFault::Body { kind: char::from(kind) });
        match kind {
            b'H' => match body.split_first() {
                Some((version, name)) => Ok(Self::Hello { version: *version, pipeline: text(name)? }),
                None => Err(ChildFault::Body { kind: 'H' }),
            },
            b'S' => Ok(Self::Started),
            b'N' => Ok(Self::NotStarted(text(body)?)),
            b'P' => Ok(Self::Panicked(text(body)?)),
            b'R' => Ok(Self::Row(body)),
            b'J' => Ok(Self::Reject(text(body)?)),
            b'A' => Ok(Self::Again(text(body)?)),
            FORGET => Ok(Self::Forgotten),
            _ => Err(ChildFault::Kind { kind }),
        }
    }

    /// Appends the answer as a frame.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello { version, pipeline } => {
                let mut body = vec![*version];
                body.extend_from_slice(pipeline.as_bytes());
                frame(b'H', &body, out);
            }
            Self::Started => frame(b'S', &[], out),
            Self::NotStarted(reason) => frame(b'N', reason.as_bytes(), out),
            Self::Panicked(reason) => frame(b'P', reason.as_bytes(), out),
            Self::Row(row) => frame(b'R', row, out),
            Self::Reject(reason) => frame(b'J', reason.as_bytes(), out),
            Self::Again(reason) => frame(b'A', reason.as_bytes(), out),
            Self::Forgotten => frame(FORGET, &[], out),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_bytes_of_version_5() {
        let mut out = Vec::new();
        Answer::Hello { version: VERSION, pipeline: "tea" }.write(&mut out);
        Answer::Started.write(&mut out);
        frame(b'C', &7u64.to_le_bytes(), &mut out);
        Answer::Panicked("ah").write(&mut out);
        Answer::Row(&[1, 2]).write(&mut out);
        Answer::Reject("no").write(&mut out);
        Answer::Again("later").write(&mut out);
        Answer::Forgotten.write(&mut out);
        assert_eq!(
            out,
            b"\x05\0\0\0H\x05tea\x01\0\0\0S\x09\0\0\0C\x07\0\0\0\0\0\0\0\x03\0\0\0Pah\x03\0\0\0R\x01\x02\x03\0\0\0Jno\x06\0\0\0Alater\x01\0\0\0F"
        );
    }

    #[test]
    fn a_frame_is_read_once_all_of_it_is_there() {
        let mut out = Vec::new();
        Answer::Reject("because").write(&mut out);
        for cut in 0..out.len() {
            assert_eq!(split(&out[..cut]), Ok(None), "{cut}");
        }
        out.extend_from_slice(b"more");
        assert_eq!(split(&out), Ok(Some(Frame { kind: b'J', body: b"because", taken: 12 })));
        assert_eq!(Answer::read(b'J', b"because"), Ok(Answer::Reject("because")));
    }

    #[test]
    fn what_no_child_sends_is_refused() {
        assert_eq!(split(&[0; 4]), Err(ChildFault::Length { length: 0 }));
        assert_eq!(split(&[255; 4]), Err(ChildFault::Length { length: u32::MAX as usize }));
        assert_eq!(Answer::read(b'C', &[]), Err(ChildFault::Kind { kind: b'C' }));
        assert_eq!(Answer::read(b'H', &[]), Err(ChildFault::Body { kind: 'H' }));
        assert_eq!(Answer::read(b'J', &[255]), Err(ChildFault::Body { kind: 'J' }));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..100)) {
            if let Ok(Some(Frame { kind, body, taken })) = split(&bytes) {
                prop_assert!(taken <= bytes.len());
                let _answer = Answer::read(kind, body);
            }
        }
    }
}
