//! What is computed of a batch so far: put down as it is done, and taken whenever there is a use for it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream::Id;
use millstream::schema::Schema;

use super::computed::Computed;
use crate::fleet::times::Load;

/// Where computed ids of a batch are put down, whichever process or thread had them.
#[derive(Debug)]
pub(crate) struct Tray<I> {
    on_it: Mutex<OnIt<I>>,
    load: Option<Load>,
}

#[derive(Debug)]
struct OnIt<I> {
    /// Ids with rows, in pieces as they came. Those of one piece are neighbours.
    done: Vec<Computed<I>>,
    again: Vec<(I, String)>,
    /// Ids that were put down, of either kind, whether they are still here or not.
    answered: usize,
}

impl<I> Default for Tray<I> {
    fn default() -> Self {
        Self { on_it: Mutex::new(OnIt { done: Vec::new(), again: Vec::new(), answered: 0 }), load: None }
    }
}

impl<I> Tray<I> {
    /// An empty one, which counts what is put down as time that cores were used.
    pub(crate) fn counted(load: Load) -> Self {
        Self { load: Some(load), ..Self::default() }
    }

    fn on_it(&self) -> MutexGuard<'_, OnIt<I>> {
        self.on_it.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts down what is done, and what is to be tried again.
    pub(super) fn put(&self, mut done: Computed<I>) {
        if let Some(load) = &self.load {
            load.spent(done.spent);
        }
        let mut on_it = self.on_it();
        on_it.answered += done.ids.len() + done.again.len();
        on_it.again.append(&mut done.again);
        on_it.done.push(done);
    }

    /// Puts down what a process did that has one id at a time.
    pub(super) fn put_alone(&self, done: Computed<I>) {
        if let Some(load) = &self.load {
            load.alone(done.spent.computing);
        }
        self.put(done);
    }

    /// Ids that were put down so far.
    pub(crate) fn answered(&self) -> usize {
        self.on_it().answered
    }

    /// Takes the ids that asked for another attempt, with their reasons.
    pub(crate) fn take_again(&self) -> Vec<(I, String)> {
        std::mem::take(&mut self.on_it().again)
    }
}

impl<I: Id> Tray<I> {
    /// Takes all that is on it.
    pub(super) fn take_all(&self, schema: &Schema) -> Computed<I> {
        let mut all = self.take(schema);
        all.again = self.take_again();
        all
    }

    /// Takes the ids that have rows: in their order, but for those of later attempts.
    pub(crate) fn take(&self, schema: &Schema) -> Computed<I> {
        let mut done = std::mem::take(&mut self.on_it().done);
        done.sort_by(|one, next| one.ids.first().cmp(&next.ids.first()));
        done.into_iter().fold(Computed::none(schema), |mut whole, piece| {
            whole.append(piece);
            whole
        })
    }
}
