//! The user's function behind a type that knows only its id type.
//!
//! The compiler repeats only this file for each pipeline: the loop over a piece of ids, and one id by itself. All other
//! code is compiled once for each id type, and calls this file through a pointer once for each piece.

use std::any::Any;
use std::sync::Arc;

use millstream::child::Answer;
use millstream::schema::Schema;
use millstream::{Failure, Outcome, Pipeline, SchemaFault, Spec};

use super::guard::guarded;
use super::order::Order;
use super::piece_slot::{AT_ONCE, Open, PieceSlot};
use super::row::{self, Rows};
use super::watch::Hand;

/// A pipeline's function over ids of type `I`, and what the pipeline declares. Clones share it.
#[derive(Clone)]
pub struct Function<I> {
    spec: Arc<Spec>,
    pub(super) typed: Arc<dyn Typed<I>>,
}

/// A pipeline's function, whatever its id type.
pub enum AnyFunction {
    /// A function over numbers.
    Numbers(Function<u64>),
    /// A function over texts.
    Texts(Function<String>),
}

impl<I> Function<I> {
    /// The function of `pipeline`.
    ///
    /// # Errors
    /// All faults that [`check`](millstream::check) finds in the declaration.
    pub fn of<P: Pipeline<Id = I>>(pipeline: Arc<P>) -> Result<Self, Vec<SchemaFault>> {
        let spec = millstream::check::<P>()?;
        let typed = Arc::new(WithSchema { pipeline, schema: spec.schema.clone() });
        Ok(Self { spec: Arc::new(spec), typed })
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
    /// All faults that [`check`](millstream::check) finds in the declaration.
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

/// Code that needs the pipeline's types.
pub(super) trait Typed<I>: Send + Sync {
    /// Prepares the pipeline for computing; an error says why this process cannot compute.
    fn start(&self) -> Result<(), String>;

    /// Computes the piece in the slot, to its end or until its order is called off.
    fn grind(&self, hand: &Hand, slot: &PieceSlot<I>, order: &Order<I>);

    /// Computes one id, and appends the isolated process's answer to `out`.
    fn answer(&self, id: &I, out: &mut Vec<u8>);
}

/// Outcomes of ids, by their places.
type Outcomes<R> = Vec<(u32, Outcome<R>)>;

/// A pipeline with the columns of its rows.
struct WithSchema<P> {
    pipeline: Arc<P>,
    schema: Arc<Schema>,
}

impl<P: Pipeline> WithSchema<P> {
    /// Appends the outcomes of some ids. The row's `Serialize` is the user's code too, so it may panic.
    fn write(&self, open: &mut Open<P::Id>, outcomes: &mut Outcomes<P::Row>, last: bool) {
        let mut outcomes = outcomes.drain(..);
        loop {
            let written = guarded(|| {
                for (at, outcome) in &mut outcomes {
                    let done = open.done();
                    match outcome {
                        Ok(row) => done.rows.ok(&self.schema, &row),
                        Err(Failure::Retry(reason)) if !last => done.again.push((at, reason)),
                        Err(Failure::Reject(reason)) => done.rows.dead(&self.schema, &reason),
                        Err(Failure::Retry(reason)) => done.rows.dead(&self.schema, &row::gave_up(&reason)),
                    }
                    open.count();
                }
                Ok(())
            });
            let Err(Failure::Reject(panic) | Failure::Retry(panic)) = written else { return };
            open.done().rows.dead(&self.schema, &panic);
            open.count();
        }
    }
}

impl<P: Pipeline> Typed<P::Id> for WithSchema<P> {
    fn start(&self) -> Result<(), String> {
        let started = guarded(|| self.pipeline.start().map_err(Failure::reject));
        started.map_err(|failure| format!("the pipeline's `start` failed: {failure}"))
    }

    fn grind(&self, hand: &Hand, slot: &PieceSlot<P::Id>, order: &Order<P::Id>) {
        let mut outcomes = Vec::with_capacity(AT_ONCE);
        let mut taken = slot.next(|_| {});
        while !taken.is_empty() {
            for at in taken {
                if order.is_off() {
                    return;
                }
                hand.begin(at);
                let id = &order.ids[at as usize];
                outcomes.push((at, guarded(|| self.pipeline.compute(id))));
            }
            taken = slot.next(|open| self.write(open, &mut outcomes, order.last));
        }
    }

    fn answer(&self, id: &P::Id, out: &mut Vec<u8>) {
        let mut rows = Rows::with_room(&self.schema, 1);
        match guarded(|| self.pipeline.compute(id).map(|row| rows.ok(&self.schema, &row))) {
            Ok(()) => match rows.dead.first() {
                Some((_, reason)) => Answer::Reject(reason).write(out),
                None => {
                    let row = postcard::to_allocvec(&rows.columns).expect("columns always fit a Vec");
                    Answer::Row(&row).write(out);
                }
            },
            Err(Failure::Reject(reason)) => Answer::Reject(&reason).write(out),
            Err(Failure::Retry(reason)) => Answer::Again(&reason).write(out),
        }
    }
}
