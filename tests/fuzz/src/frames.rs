//! ClickHouse's compressed frames.

use millstream::frame::{FrameFault, compress, decompress, frame_len};

use crate::heap::bounded;

const CHECKSUM: usize = 16;
/// LZ4 cannot make more than this of one byte.
const LZ4_MOST: usize = 255;

/// Reads the input as a frame, as it stands and behind a checksum that is right, and as what a frame is made from.
pub fn frames(input: &[u8]) {
    read(input);
    read(&sealed(input));
    let mut frame = Vec::new();
    compress(input, &mut frame);
    assert_eq!(raw(&frame).as_deref(), Ok(input));
    cut(&frame, input.len());
}

fn read(frame: &[u8]) {
    match raw(frame) {
        Ok(data) => {
            assert_eq!(frame_len(frame), Ok(Some(frame.len())));
            let mut again = Vec::new();
            compress(&data, &mut again);
            assert_eq!(raw(&again), Ok(data));
        }
        Err(fault) => assert!(!fault.to_string().is_empty()),
    }
}

/// What a frame was made from, behind a byte that must stay.
fn raw(frame: &[u8]) -> Result<Vec<u8>, FrameFault> {
    let mut out = vec![7];
    let read = bounded(frame.len() * LZ4_MOST + 1, || decompress(frame, &mut out));
    assert_eq!(out.first(), Some(&7));
    assert!(read.is_ok() || out.len() == 1, "a fault left {} bytes behind", out.len() - 1);
    read.map(|()| out.split_off(1))
}

/// A frame that is not all there is no frame.
fn cut(frame: &[u8], at: usize) {
    let part = &frame[..at % frame.len()];
    assert!(matches!(frame_len(part), Ok(None)) || frame_len(part) == Ok(Some(frame.len())));
    assert!(matches!(raw(part), Err(FrameFault::Cut { .. })));
}

/// The input as method, sizes and block, behind the checksum of them: a fuzzer would not find it. The first size is
/// made that of the frame, or most inputs would end there.
fn sealed(input: &[u8]) -> Vec<u8> {
    let mut body = input.to_vec();
    if let Some(size) = body.get_mut(1..5) {
        size.copy_from_slice(&(input.len() as u32).to_le_bytes());
    }
    // Both halves, the low one first.
    let checksum = cityhash_rs::cityhash_102_128(&body).rotate_left(64).to_le_bytes();
    debug_assert_eq!(checksum.len(), CHECKSUM);
    [&checksum[..], &body].concat()
}
