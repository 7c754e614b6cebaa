//! What a worker and its pool process say to each other: frames as in [`millstream::child`], of other kinds. Both ends
//! are the same build, so this is no format that anybody stores.

use std::time::Duration;

use millstream::Id;
use millstream::block::Block;
use millstream::child::frame;
use serde::{Deserialize, Serialize};

use super::{BatchKey, Computed, Piece};

/// The first argument that makes a pipeline's binary a pool process; threads, soft and hard limit in milliseconds follow.
pub(super) const ARGUMENT: &str = "__compute-pool";

/// Worker: compute these ids.
pub(super) const ORDER: u8 = b'O';
/// Worker: nobody waits for this order any more.
pub(super) const CALL_OFF: u8 = b'X';
/// Pool: some ids of an order are done.
pub(super) const PIECE: u8 = b'P';
/// Pool: for so long its threads had an id since it last said so, summed over them.
pub(super) const BUSY: u8 = b'U';
/// Pool: an id takes long.
pub(super) const OVERDUE: u8 = b'L';

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OrderFrame<'a> {
    /// Tells orders apart, from 1.
    pub order: u64,
    pub run: &'a str,
    pub pass: u32,
    pub batch: u32,
    /// Ids of the whole batch.
    pub batch_ids: u32,
    pub last: bool,
    pub codec: u8,
    /// Ids of this order.
    pub count: u32,
    pub block: &'a [u8],
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PieceFrame<'a> {
    pub order: u64,
    /// Place of the piece's first id within the order.
    pub from: u32,
    /// Ids that the piece covers.
    pub count: u32,
    pub raw_bytes: u64,
    pub dead: u32,
    /// Places within the order, and reasons.
    #[serde(borrow)]
    pub again: Vec<(u32, &'a str)>,
    pub frames: &'a [u8],
    pub lengths: Vec<u32>,
    pub spent: [Duration; 2],
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OverdueFrame {
    pub order: u64,
    pub at: u32,
    pub hard: bool,
}

/// A frame of this kind.
pub(super) fn encode<B: Serialize>(kind: u8, body: &B) -> Vec<u8> {
    let body = postcard::to_allocvec(body).expect("numbers, strings and bytes always fit a Vec");
    let mut out = Vec::with_capacity(body.len() + 8);
    frame(kind, &body, &mut out);
    out
}

/// The frame that orders these ids, which are sorted and without repeats.
pub(super) fn encode_order<I: Id>(order: u64, key: &BatchKey, ids: &[I], last: bool) -> Vec<u8> {
    let Block { codec, bytes } = I::pack(ids);
    let (run, count) = (key.run.as_str(), ids.len() as u32);
    let BatchKey { pass, batch, ids: batch_ids, .. } = *key;
    encode(ORDER, &OrderFrame { order, run, pass, batch, batch_ids, last, codec, count, block: &bytes })
}

/// The frame that brings a piece.
pub(super) fn encode_piece<I>(order: u64, piece: &Piece<I>) -> Vec<u8> {
    let Computed { frames, lengths, raw_bytes, dead, spent, .. } = &piece.computed;
    let again = piece.again_at.iter().zip(&piece.computed.again).map(|(at, (_, why))| (*at, why.as_str()));
    encode(
        PIECE,
        &PieceFrame {
            order,
            from: piece.from,
            count: piece.count,
            raw_bytes: *raw_bytes,
            dead: *dead,
            again: again.collect(),
            frames,
            lengths: lengths.clone(),
            spent: [spent.computing, spent.encoding],
        },
    )
}
