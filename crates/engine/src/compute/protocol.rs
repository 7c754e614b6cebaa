//! The protocol between a worker and its pool process: frames as in [`millstream::child`], of other kinds. Both ends
//! are one build, so the format is never stored.

use millstream::Id;
use millstream::block::Block;
use millstream::child::frame;
use serde::{Deserialize, Serialize};

use super::computed::Piece;

/// The first argument that makes a pipeline's binary a pool process; threads, soft and hard limit in milliseconds
/// follow.
pub(super) const ARGUMENT: &str = "__compute-pool";

/// Worker → pool: compute these ids.
pub(super) const ORDER: u8 = b'O';
/// Worker → pool: this order has no use any more.
pub(super) const CALL_OFF: u8 = b'X';
/// Pool → worker: some ids of an order are finished.
pub(super) const PIECE: u8 = b'P';
/// Pool → worker: busy thread time since the previous BUSY frame, summed over threads.
pub(super) const BUSY: u8 = b'U';
/// Pool → worker: an id takes long.
pub(super) const OVERDUE: u8 = b'L';

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OrderFrame<'a> {
    /// Identifies the order, from 1.
    pub order: u64,
    pub last: bool,
    pub codec: u8,
    /// Ids of this order.
    pub count: u32,
    pub block: &'a [u8],
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
pub(super) fn encode_order<I: Id>(order: u64, ids: &[I], last: bool) -> Vec<u8> {
    let Block { codec, bytes } = I::pack(ids);
    encode(ORDER, &OrderFrame { order, last, codec, count: ids.len() as u32, block: &bytes })
}

/// The frame that carries a piece: the number of its order, and the piece.
pub(super) fn encode_piece(order: u64, piece: &Piece) -> Vec<u8> {
    encode(PIECE, &(order, piece))
}
