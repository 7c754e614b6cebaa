//! What a child process that computes writes to its stdout.

use millstream::child::{Answer, ChildFault, Frame, frame, split};

use crate::heap::bounded;

/// Frames by kind and body, and the fault that ended them.
type Stream = (Vec<(u8, Vec<u8>)>, Option<ChildFault>);

/// Reads all but the first byte of the input as a stream of frames: whole, and in pieces as long as that byte says.
pub fn child(input: &[u8]) {
    let (piece, bytes) = input.split_first().unwrap_or((&0, &[]));
    let whole = stream(bytes.chunks(bytes.len().max(1)));
    let pieces = stream(bytes.chunks(usize::from(*piece).max(1)));
    assert_eq!(whole, pieces);
    written_again(&whole.0, bytes);
}

/// As a worker reads it.
fn stream<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Stream {
    let (mut frames, mut pending) = (Vec::new(), Vec::new());
    for piece in pieces {
        pending.extend_from_slice(piece);
        let mut done = 0;
        loop {
            match bounded(0, || split(&pending[done..])) {
                Ok(Some(Frame { kind, body, taken })) => {
                    frames.push((kind, body.to_vec()));
                    done += taken;
                }
                Ok(None) => break,
                Err(fault) => return (frames, Some(fault)),
            }
        }
        pending.drain(..done);
    }
    (frames, None)
}

/// Frames and answers have one form.
fn written_again(frames: &[(u8, Vec<u8>)], bytes: &[u8]) {
    let mut out = Vec::new();
    for (kind, body) in frames {
        let start = out.len();
        frame(*kind, body, &mut out);
        match bounded(0, || Answer::read(*kind, body)) {
            Ok(answer) => {
                let mut again = Vec::new();
                answer.write(&mut again);
                assert_eq!(again, out[start..]);
            }
            Err(ChildFault::Kind { kind }) => assert!(!b"HRJA".contains(&kind)),
            Err(ChildFault::Body { .. }) => assert_ne!(*kind, b'R', "any bytes are a row"),
            Err(fault @ ChildFault::Length { .. }) => panic!("{fault}"),
        }
    }
    assert!(bytes.starts_with(&out));
}
