//! Operations that are checked by their effect, not by their answer (**success-is-looked-at**): merges and
//! mutations.
//!
//! Merges can be stopped, and a stuck mutation blocks all later ones. The server's answer does not say so, or
//! never comes. So the remaining rows are counted, and the error names what blocks them and the statement that
//! helps.

use std::time::Duration;

use clickhouse::Row;
use millstream::names::PassId;
use serde::{Deserialize, Serialize};

use super::{HEAL_WITHIN, Store};
use crate::error::{Error, StoreFault};

/// Interval between checks of a running mutation.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// A failed mutation is reported after this many checks with the failure, because ClickHouse may retry it.
const FAILED_CHECKS: u32 = 3;
/// A mutation without progress is reported after this many checks, because an operator has to act.
const IDLE_CHECKS: u32 = 20;

/// A mutation, as [`Tables::mutations`](crate::clickhouse::sql::Tables::mutations) selects it.
#[derive(Row, Deserialize)]
struct Mutation {
    table: String,
    id: String,
    command: String,
    parts: i64,
    running: u64,
    reason: String,
}

/// A mutation that is not finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StuckMutation {
    /// The table, quoted.
    pub table: String,
    /// The mutation's id.
    pub id: String,
    /// The command of the mutation.
    pub command: String,
    /// The number of parts that the mutation has not rewritten.
    pub parts: i64,
    /// Running merges and mutations of our tables.
    pub running: u64,
    /// The reason of the last failure; empty if the mutation has not failed.
    pub reason: String,
    /// The statement that ends the mutation.
    pub kill: String,
}

impl StuckMutation {
    /// Describes the mutation and what helps, in one sentence.
    pub fn told(&self) -> String {
        let Self { table, id, command, reason, kill, .. } = self;
        if reason.is_empty() {
            return format!(
                "mutation `{id}` of {table} ({command}) makes no progress: `SYSTEM START MERGES {table}` lets ClickHouse work on it"
            );
        }
        format!("mutation `{id}` of {table} ({command}) cannot end: {reason}; `{kill}` ends it")
    }
}

impl Store {
    /// Deduplicates a run's rows until the pass, which has `ids` distinct ids, has no raw duplicates.
    ///
    /// # Errors
    /// [`Error::NotMerged`] when duplicates are left, whatever the server answered; [`Error::Store`].
    pub async fn merge_away(&self, pass: &PassId, ids: u64) -> Result<(), Error> {
        let merged = self.execute("deduplicate rows", &self.tables.heal(&pass.run), HEAL_WITHIN).await;
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

    /// Executes a mutation that removes rows, and checks that they are gone.
    ///
    /// # Errors
    /// [`Error::Mutation`] when it is stuck, with the cause; [`Error::NotRemoved`] when it has finished and
    /// rows are left; [`Error::Store`].
    pub(super) async fn remove(&self, doing: &str, statement: &str, left: &str) -> Result<(), Error> {
        let because = |stuck: StuckMutation| Error::Mutation { doing: doing.to_owned(), why: stuck.told() };
        let removed = tokio::select! {
            removed = self.execute(doing, statement, HEAL_WITHIN) => removed,
            stuck = self.until_stuck() => return Err(because(stuck)),
        };
        if let Err(error) = removed {
            // The server names a failed mutation only by a number.
            let found = self.mutations().await.unwrap_or_default();
            let stuck = found.into_iter().find(|found| !found.reason.is_empty());
            return Err(stuck.map_or(error, because));
        }
        match self.one::<u64>(doing, left).await? {
            0 => Ok(()),
            rows => Err(Error::NotRemoved { doing: doing.to_owned(), rows }),
        }
    }

    /// Resolves when a mutation of our tables keeps failing, or makes no progress.
    async fn until_stuck(&self) -> StuckMutation {
        let mut fails = 0;
        let mut still = 0;
        let mut before = Vec::new();
        loop {
            tokio::time::sleep(CHECK_EVERY).await;
            // If this cannot be asked, the answer to the mutation itself will say how it ended.
            let Ok(found) = self.mutations().await else { continue };
            let failing = found.iter().find(|mutation| !mutation.reason.is_empty());
            fails = if failing.is_some() { fails + 1 } else { 0 };
            let is_still = !found.is_empty() && found == before && found[0].running == 0;
            still = if is_still { still + 1 } else { 0 };
            if let Some(failing) = failing.filter(|_| fails >= FAILED_CHECKS) {
                return failing.clone();
            }
            if still >= IDLE_CHECKS {
                return found[0].clone();
            }
            before = found;
        }
    }

    /// Unfinished mutations of our tables, the oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn mutations(&self) -> Result<Vec<StuckMutation>, Error> {
        let found: Vec<Mutation> = self.all("list mutations", &self.tables.mutations()).await?;
        let named = |found: Mutation| {
            let Mutation { table, id, command, parts, running, reason } = found;
            let kill = self.tables.kill_mutation(&table, &id);
            StuckMutation { table: self.tables.full_name(&table), id, command, parts, running, reason, kill }
        };
        Ok(found.into_iter().map(named).collect())
    }

    /// Describes what blocks the mutations of our tables, each with what helps. Empty if this user may not ask.
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
