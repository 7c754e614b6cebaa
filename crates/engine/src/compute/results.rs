//! Results of a batch so far: added as they arrive, and taken whenever the worker stores them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use millstream::Id;
use millstream::schema::Schema;
use tokio::sync::Notify;

use super::computed::Computed;
use crate::fleet::times::Load;
use crate::model::rows::MAX_INSERT_BYTES;

/// Rows of so many bytes are stored before the rest of their batch. A message may not have more, so keeping them longer
/// has no use.
pub(crate) const FULL: u64 = MAX_INSERT_BYTES;

/// The store for computed ids of a batch, from whichever process or thread.
#[derive(Debug)]
pub(crate) struct Results<I> {
    held: Mutex<Held<I>>,
    full: Notify,
    load: Option<Load>,
}

#[derive(Debug)]
struct Held<I> {
    /// Ids with rows, in pieces as they arrived. Ids of one piece are neighbours.
    done: Vec<Computed<I>>,
    again: Vec<(I, String)>,
    /// Bytes of the rows in the store.
    bytes: u64,
    /// Ids added so far, with or without a row, whether they are still in the store or not.
    answered: usize,
}

impl<I> Default for Results<I> {
    fn default() -> Self {
        let held = Held { done: Vec::new(), again: Vec::new(), bytes: 0, answered: 0 };
        Self { held: Mutex::new(held), full: Notify::new(), load: None }
    }
}

impl<I> Results<I> {
    /// An empty store that reports core time to `load`.
    pub(crate) fn counted(load: Load) -> Self {
        Self { load: Some(load), ..Self::default() }
    }

    fn held(&self) -> MutexGuard<'_, Held<I>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds finished ids, and ids that asked for another attempt.
    pub(super) fn put(&self, mut done: Computed<I>) {
        if let Some(load) = &self.load {
            load.spent(done.spent);
        }
        let mut held = self.held();
        held.answered += done.ids.len() + done.again.len();
        held.again.append(&mut done.again);
        held.bytes += done.rows.bytes() as u64;
        held.done.push(done);
        if held.bytes >= FULL {
            self.full.notify_one();
        }
    }

    /// Waits until the store has more rows than one message may carry: the worker must take some, whether the batch is
    /// finished or not.
    pub(crate) async fn full(&self) {
        while self.held().bytes < FULL {
            self.full.notified().await;
        }
    }

    /// Adds results of an isolated process.
    pub(super) fn put_alone(&self, done: Computed<I>) {
        if let Some(load) = &self.load {
            load.alone(done.spent.computing);
        }
        self.put(done);
    }

    /// Ids added so far.
    pub(crate) fn answered(&self) -> usize {
        self.held().answered
    }

    /// Takes the ids that asked for another attempt, with their reasons.
    pub(crate) fn take_again(&self) -> Vec<(I, String)> {
        std::mem::take(&mut self.held().again)
    }
}

impl<I: Id> Results<I> {
    /// Takes everything in the store.
    pub(super) fn take_all(&self, schema: &Schema) -> Computed<I> {
        let mut all = self.take(schema);
        all.again = self.take_again();
        all
    }

    /// Takes the ids that have rows: in order, except ids of later attempts.
    pub(crate) fn take(&self, schema: &Schema) -> Computed<I> {
        let mut done = {
            let mut held = self.held();
            held.bytes = 0;
            std::mem::take(&mut held.done)
        };
        done.sort_by(|one, next| one.ids.first().cmp(&next.ids.first()));
        done.into_iter().fold(Computed::none(schema), |mut whole, piece| {
            whole.append(piece);
            whole
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Serialize;

    use super::*;

    #[derive(Serialize)]
    struct Wide {
        text: String,
    }

    #[tokio::test]
    async fn rows_that_are_more_than_a_message_may_carry_are_to_be_taken() {
        let schema = Schema::parse(&[("text", "String")]).expect("sound");
        let results = Results::<u64>::default();
        let is_full = async || tokio::time::timeout(Duration::ZERO, results.full()).await.is_ok();
        let put = |id| {
            let mut done = Computed::none(&schema);
            done.ids.push(id);
            done.rows.ok(&schema, &Wide { text: "x".repeat(FULL as usize / 4) });
            results.put(done);
        };
        (0..3).for_each(put);
        assert!(!is_full().await, "three quarters");
        let full = async { tokio::join!(results.full(), async { put(3) }) };
        tokio::time::timeout(Duration::from_secs(60), full).await.expect("it is full");
        assert_eq!(results.take(&schema).ids, [0, 1, 2, 3]);
        assert!(!is_full().await, "all of it is taken");
    }
}
