//! The checker: it knows what was submitted, reads what is stored over plain HTTP, and names what is not as it should
//! be. No code of the engine takes part.

use std::time::Duration;

use tests::{SOON, ask_clickhouse, wait_until};

/// Ids that are named of each fault.
const NAMED: u64 = 5;

/// What was given to `produce` under a name: the ids `1..=last`. What their rows must hold, the checker computes itself.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// The run's name.
    pub run: String,
    /// Its last id.
    pub last: u64,
}

/// What is wrong with what is stored, in numbers of ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Submitted, and neither in the view nor, where it must be one, a dead letter.
    pub lost: u64,
    /// In the view more than once.
    pub doubled: u64,
    /// In the view, and never submitted; or a dead letter without a reason to be one.
    pub unexpected: u64,
    /// In the view with other values than the checker computes.
    pub wrong: u64,
    /// Rows in the table beyond the first of their id.
    pub raw_doubled: u64,
    /// Some of the ids, by fault.
    pub named: Vec<String>,
}

impl Found {
    /// Nothing lost, doubled, unexpected or wrong for a reader. Raw duplicates are another question.
    pub fn is_right(&self) -> bool {
        (self.lost, self.doubled, self.unexpected, self.wrong) == (0, 0, 0, 0)
    }

    /// Adds another run's.
    pub fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.unexpected += other.unexpected;
        self.wrong += other.wrong;
        self.raw_doubled += other.raw_doubled;
        self.named.extend(other.named);
    }
}

/// Reads the tables of one pipeline.
#[derive(Debug, Clone)]
pub struct Checker {
    url: String,
    pipeline: &'static str,
    /// Where its tables are.
    database: &'static str,
    /// Which ids must be dead letters, in SQL.
    dead: &'static str,
    /// When a row holds what it should, in SQL.
    right: &'static str,
}

impl Checker {
    /// Asks the ClickHouse at this address about pipeline `trial`, none of whose ids may die.
    pub fn new(url: &str) -> Self {
        let (pipeline, database) = ("trial", "millstream");
        Self { url: url.to_owned(), pipeline, database, dead: "0", right: "squared = id * id" }
    }

    /// The same about pipeline `rogue`.
    pub fn of_rogue(url: &str) -> Self {
        Self { pipeline: "rogue", dead: "id % 1000 BETWEEN 101 AND 106 OR id % 100 = 97", ..Self::new(url) }
    }

    /// The same pipeline where these ids must be dead letters, in SQL.
    pub fn with_dead(self, dead: &'static str) -> Self {
        Self { dead, ..self }
    }

    /// The same pipeline in another database, where a row is right when this is so, in SQL.
    pub fn of_database(self, database: &'static str, right: &'static str) -> Self {
        Self { database, right, ..self }
    }

    /// The same about pipeline `variant`, whose builds share columns `lo` and `hi`.
    pub fn of_bounds(url: &str) -> Self {
        Self { pipeline: "variant", right: "lo = id AND hi = id + 1000", ..Self::new(url) }
    }

    /// The same about build `kinds` of it: of ten ids, one has a number and one a name that its column does not have.
    pub fn of_kinds(url: &str) -> Self {
        let right = "kind = if(id % 2 = 0, 'low', 'high') AND name = 'high'";
        Self { pipeline: "variant", dead: "id % 10 IN (7, 8)", right, ..Self::new(url) }
    }

    /// What is wrong with a run as its readers see it, and as it lies in the table.
    pub fn look(&self, submitted: &Submitted) -> Found {
        let Submitted { run, last } = submitted;
        let Self { pipeline, database, dead, right, .. } = self;
        let view = format!("{database}.{pipeline} WHERE run = '{run}'");
        let letters = format!("SELECT id FROM {database}.{pipeline}_dead WHERE run = '{run}'");
        // Not `numbers(1, …)`: 18.16, on which two scenarios are played, knows one argument alone.
        let ids = format!("SELECT number + 1 AS id FROM system.numbers LIMIT {last}");
        let mut found = Found::default();
        let mut count = |fault: &str, which: String| {
            let ids = self.number(&format!("SELECT count() FROM ({which})"));
            if ids > 0 {
                let some = self.ask(&format!("SELECT id FROM ({which}) ORDER BY id LIMIT {NAMED}"));
                found.named.push(format!("run {run}: {ids} {fault}: {}", some.trim().replace('\n', ", ")));
            }
            ids
        };
        let lost = count(
            "lost",
            format!("SELECT id FROM ({ids}) WHERE NOT ({dead}) AND id NOT IN (SELECT id FROM {view})"),
        );
        let undead = count(
            "lost, which must be dead letters",
            format!("SELECT id FROM ({ids}) WHERE ({dead}) AND id NOT IN ({letters})"),
        );
        let doubled = count("doubled", format!("SELECT id FROM {view} GROUP BY id HAVING count() > 1"));
        let unexpected =
            count("unexpected", format!("SELECT id FROM {view} AND (id < 1 OR id > {last} OR {dead})"));
        let dead = count(
            "dead letters for no reason",
            format!("{letters} AND (id < 1 OR id > {last} OR NOT ({dead}))"),
        );
        let wrong = count("wrong", format!("SELECT id FROM {view} AND NOT ({right})"));
        let (lost, unexpected) = (lost + undead, unexpected + dead);
        Found { lost, doubled, unexpected, wrong, raw_doubled: self.raw_doubled(run), ..found }
    }

    /// Rows of a run in the table beyond the first of their id.
    pub fn raw_doubled(&self, run: &str) -> u64 {
        self.number(&format!(
            "SELECT count() - uniqExact(pass, id) FROM {} WHERE run = '{run}'",
            self.table()
        ))
    }

    /// Rows of a run in the table.
    pub fn rows(&self, run: &str) -> u64 {
        self.number(&format!("SELECT count() FROM {} WHERE run = '{run}'", self.table()))
    }

    /// Rows of all runs.
    pub fn all_rows(&self) -> u64 {
        self.number(&format!("SELECT count() FROM {}", self.table()))
    }

    /// Merges of ClickHouse's own would hide raw duplicates before they are counted.
    pub fn keep_raw_rows(&self) {
        self.ask(&format!(
            "ALTER TABLE {} MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1",
            self.table()
        ));
    }

    fn table(&self) -> String {
        format!("{}.{}_rows", self.database, self.pipeline)
    }

    /// Whether readers see the run.
    pub fn is_sealed(&self, run: &str) -> bool {
        let Self { pipeline, database, .. } = self;
        self.number(&format!("SELECT count() FROM {database}.{pipeline}_passes WHERE run = '{run}'")) > 0
    }

    /// What ClickHouse answers; waits for one that is away.
    pub fn ask(&self, query: &str) -> String {
        wait_until(&format!("an answer to {query}"), SOON + Duration::from_secs(60), || {
            ask_clickhouse(&self.url, query).map_err(|error| error.to_string())
        })
    }

    /// The same as a number.
    pub fn number(&self, query: &str) -> u64 {
        let answer = self.ask(query);
        answer.trim().parse().unwrap_or_else(|_| panic!("{query}: {answer}"))
    }
}
