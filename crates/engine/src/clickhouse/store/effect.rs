//! Operations whose effect is looked at, not their answer (**success-is-looked-at**): merges and mutations.
//!
//! Merges can be stopped, and a mutation that cannot end holds up all that come after it; the server says neither in its answer,
//! or says it by waiting for ever. So what is to be gone is counted, and what stands in the way is named with the statement that
//! helps.

use std::time::Duration;

use clickhouse::Row;
use millstream::names::PassId;
use serde::{Deserialize, Serialize};

use super::{HEAL_WITHIN, Store};
use crate::error::{Error, StoreFault};

/// How often a mutation under way is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A fault of a mutation counts once it has stood for so many looks: a merge may be tried again.
const FAILS: u32 = 3;
/// A mutation of which nothing is done, and that nothing works on, for so many looks waits for a person.
const STILL: u32 = 20;

/// A mutation as [`Tables::mutations`](crate::clickhouse::sql::Tables::mutations) selects it.
#[derive(Row, Deserialize)]
struct Mutation {
    table: String,
    id: String,
    command: String,
    parts: i64,
    running: u64,
    reason: String,
}

/// A mutation that is not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StuckMutation {
    /// The table, in quotes.
    pub table: String,
    /// The mutation.
    pub id: String,
    /// What it is to do.
    pub command: String,
    /// Parts that it has not rewritten.
    pub parts: i64,
    /// Merges and mutations of our tables that run now.
    pub running: u64,
    /// Why it failed the last time; empty where it did not.
    pub reason: String,
    /// The statement that ends it.
    pub kill: String,
}

impl StuckMutation {
    /// What it is and what helps, in one sentence.
    pub fn told(&self) -> String {
        let Self { table, id, command, reason, kill, .. } = self;
        if reason.is_empty() {
            return format!(
                "mutation `{id}` of {table} ({command}) does not go on: `SYSTEM START MERGES {table}` lets ClickHouse work on it"
            );
        }
        format!("mutation `{id}` of {table} ({command}) cannot end: {reason}; `{kill}` ends it")
    }
}

impl Store {
    /// Merges a run's rows until the pass, of which `ids` are distinct, has no raw duplicates.
    ///
    /// # Errors
    /// [`Error::NotMerged`] when they are there still, whatever the server answered; [`Error::Store`].
    pub async fn merge_away(&self, pass: &PassId, ids: u64) -> Result<(), Error> {
        let merged =
            self.execute("merge raw duplicates away", &self.tables.heal(&pass.run), HEAL_WITHIN).await;
        let rows = self.raw_rows(pass).await?.saturating_sub(ids);
        let table = self.tables.rows();
        match merged {
            _ if rows == 0 => Ok(()),
            Ok(()) => Err(Error::NotMerged { table, rows, source: None }),
            Err(Error::Store { source: source @ StoreFault::Exception { .. }, .. }) => {
                Err(Error::NotMerged { table, rows, source: Some(source) })
            }
            Err(error) => Err(error),
        }
    }

    /// Removes every row of these batches, and returns when they are gone.
    ///
    /// # Errors
    /// [`Error::Mutation`], [`Error::NotRemoved`]; [`Error::Store`].
    pub async fn remove_batches(&self, pass: &PassId, batches: &[u32]) -> Result<(), Error> {
        let statement = self.tables.remove_batches(pass, batches);
        let left = self.tables.count_batches(pass, batches);
        self.remove("remove the rows of wrong batches", &statement, &left).await
    }

    /// Executes a mutation that removes rows, and looks whether they are gone.
    ///
    /// # Errors
    /// [`Error::Mutation`] when it cannot end, with what stands in the way; [`Error::NotRemoved`] when it has ended and some are
    /// there still; [`Error::Store`].
    pub(super) async fn remove(&self, doing: &str, statement: &str, left: &str) -> Result<(), Error> {
        let because = |stuck: StuckMutation| Error::Mutation { doing: doing.to_owned(), why: stuck.told() };
        let removed = tokio::select! {
            removed = self.execute(doing, statement, HEAL_WITHIN) => removed,
            stuck = self.until_stuck() => return Err(because(stuck)),
        };
        if let Err(error) = removed {
            // The server names a mutation that failed by a number alone.
            let found = self.mutations().await.unwrap_or_default();
            let stuck = found.into_iter().find(|found| !found.reason.is_empty());
            return Err(stuck.map_or(error, because));
        }
        match self.one::<u64>(doing, left).await? {
            0 => Ok(()),
            rows => Err(Error::NotRemoved { doing: doing.to_owned(), rows }),
        }
    }

    /// Resolves when a mutation of our tables fails again and again, or is not worked on.
    async fn until_stuck(&self) -> StuckMutation {
        let mut fails = 0;
        let mut still = 0;
        let mut before = Vec::new();
        loop {
            tokio::time::sleep(LOOK).await;
            // Without an answer, or the right to ask, the mutation itself says how it ends.
            let Ok(found) = self.mutations().await else { continue };
            let failing = found.iter().find(|mutation| !mutation.reason.is_empty());
            fails = if failing.is_some() { fails + 1 } else { 0 };
            let is_still = !found.is_empty() && found == before && found[0].running == 0;
            still = if is_still { still + 1 } else { 0 };
            if let Some(failing) = failing.filter(|_| fails >= FAILS) {
                return failing.clone();
            }
            if still >= STILL {
                return found[0].clone();
            }
            before = found;
        }
    }

    /// Mutations of our tables that are not done, the oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn mutations(&self) -> Result<Vec<StuckMutation>, Error> {
        let found: Vec<Mutation> = self.all("look at mutations", &self.tables.mutations()).await?;
        let named = |found: Mutation| {
            let Mutation { table, id, command, parts, running, reason } = found;
            let kill = self.tables.kill_mutation(&table, &id);
            StuckMutation { table: self.tables.full_name(&table), id, command, parts, running, reason, kill }
        };
        Ok(found.into_iter().map(named).collect())
    }

    /// What stands in the way of mutations of our tables, in sentences that say what helps. Nothing where this user may not ask.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn hindrances(&self) -> Result<Vec<String>, Error> {
        match self.mutations().await {
            Ok(found) => {
                Ok(found.iter().filter(|found| !found.reason.is_empty()).map(StuckMutation::told).collect())
            }
            Err(Error::Store { source, .. }) if source.is_denied() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}
