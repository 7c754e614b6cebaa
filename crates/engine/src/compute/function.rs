//! The user's function behind a type that knows its ids alone.
//!
//! What is compiled for each pipeline is in this file: the loop over a piece of ids, and one id by itself. All else is
//! compiled once for each type of ids, and a call through a pointer is made once for a piece.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use millstream::child::Answer;
use millstream::rowbinary::write_row;
use millstream::{Failure, Outcome, Pipeline, SchemaFault, Spec};

use super::row::{self, RowWriter, Rows};
use super::watch::Hand;
use super::{Computed, Order, PIECE_BYTES, Piece, Spent, guarded};

/// A pipeline's function over ids of this type, and what the pipeline declares. Clones are the same.
#[derive(Clone)]
pub struct Function<I> {
    spec: Arc<Spec>,
    /// What a dead letter holds in the pipeline's own columns.
    pub(crate) blank: Arc<[u8]>,
    pub(super) typed: Arc<dyn Typed<I>>,
}

/// A pipeline's function, whatever the type of its ids.
pub enum AnyFunction {
    /// Over numbers.
    Numbers(Function<u64>),
    /// Over texts.
    Texts(Function<String>),
}

impl<I> Function<I> {
    /// The function of `pipeline`.
    ///
    /// # Errors
    /// All that [`check`](millstream::check) finds wrong with its declaration.
    pub fn of<P: Pipeline<Id = I>>(pipeline: Arc<P>) -> Result<Self, Vec<SchemaFault>> {
        let spec = millstream::check::<P>()?;
        let mut blank = Vec::new();
        spec.types.iter().for_each(|column| column.write_blank(&mut blank));
        Ok(Self { spec: Arc::new(spec), blank: blank.into(), typed: pipeline })
    }

    /// What the pipeline declares.
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }
}

impl AnyFunction {
    /// The function of `pipeline`.
    ///
    /// # Errors
    /// All that [`check`](millstream::check) finds wrong with its declaration.
    pub fn of<P: Pipeline>(pipeline: P) -> Result<Self, Vec<SchemaFault>> {
        let function: Box<dyn Any> = Box::new(Function::of(Arc::new(pipeline))?);
        Ok(match function.downcast() {
            Ok(function) => Self::Numbers(*function),
            Err(function) => Self::Texts(*function.downcast().expect("`Id` is sealed: u64 or String")),
        })
    }

    /// What the pipeline declares.
    pub fn spec(&self) -> &Arc<Spec> {
        match self {
            Self::Numbers(function) => function.spec(),
            Self::Texts(function) => function.spec(),
        }
    }
}

/// What needs the types of the pipeline.
pub(super) trait Typed<I>: Send + Sync {
    /// Computes from the first of `ids` on, to the last, or until the rows are many bytes or nobody wants them. The first is
    /// at place `from` of the order.
    fn grind_some(
        &self,
        hand: &Hand,
        order: &Order<I>,
        rows: &RowWriter<'_>,
        from: u32,
        ids: &[I],
    ) -> Piece<I>;

    /// Computes one id, and appends the answer of a child to its worker.
    fn answer(&self, id: &I, out: &mut Vec<u8>);
}

impl<P: Pipeline> Typed<P::Id> for P {
    fn grind_some(
        &self,
        hand: &Hand,
        order: &Order<P::Id>,
        rows: &RowWriter<'_>,
        from: u32,
        ids: &[P::Id],
    ) -> Piece<P::Id> {
        let begun = Instant::now();
        let mut out = Rows::with_room(ids.len() * rows.usual_len());
        let mut piece = Piece { from, count: 0, computed: Computed::default(), again_at: Vec::new() };
        for id in ids {
            if order.is_off() {
                break;
            }
            let at = from + piece.count;
            hand.begin(at);
            match guarded(|| self.compute(id)) {
                Err(Failure::Retry(reason)) if !order.last => {
                    piece.again_at.push(at);
                    piece.computed.again.push((id.clone(), reason));
                }
                outcome => write::<P>(rows, id, outcome, &mut out),
            }
            piece.count += 1;
            if out.bytes >= PIECE_BYTES {
                break;
            }
        }
        out.frames.flush();
        // By the piece, not by the id: a look at the clock costs as much as a light id.
        let all = begun.elapsed();
        let encoding = out.encoding().min(all);
        piece.computed.take_rows(out);
        piece.computed.spent = Spent { computing: all - encoding, encoding };
        piece
    }

    fn answer(&self, id: &P::Id, out: &mut Vec<u8>) {
        let mut row = Vec::new();
        let outcome = guarded(|| self.compute(id));
        match outcome.map(|value| write_row(&value, &mut row)) {
            Ok(Ok(())) => Answer::Row(&row).write(out),
            Ok(Err(fault)) => Answer::Reject(&format!("row cannot be encoded: {fault}")).write(out),
            Err(Failure::Reject(reason)) => Answer::Reject(&reason).write(out),
            Err(Failure::Retry(reason)) => Answer::Again(&reason).write(out),
        }
    }
}

/// Appends the id's one row.
fn write<P: Pipeline>(rows: &RowWriter<'_>, id: &P::Id, outcome: Outcome<P::Row>, out: &mut Rows) {
    out.write(|out| match outcome {
        Ok(row) => rows.ok(id, |raw| write_row(&row, raw), out),
        Err(Failure::Reject(reason)) => rows.dead(id, &reason, out),
        Err(Failure::Retry(reason)) => rows.dead(id, &row::gave_up(&reason), out),
    });
}
