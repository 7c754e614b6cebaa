//! The checker: it knows what was submitted, reads what is stored over plain HTTP, and names what is not as it should
//! be. No code of the engine takes part.

use std::time::Duration;

use tests::{SOON, ask_clickhouse, wait_until};

/// Ids that are named of each fault.
const NAMED: u64 = 5;

/// What was given to `produce` under a name: the ids `1..=last`, whose rows must hold their squares.
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
    /// Submitted, and not in the view.
    pub lost: u64,
    /// In the view more than once.
    pub doubled: u64,
    /// In the view, and never submitted.
    pub unexpected: u64,
    /// In the view with another result than their square.
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
    /// Which ids must be dead letters, in SQL.
    dead: &'static str,
}

impl Checker {
    /// Asks the ClickHouse at this address about pipeline `trial`, none of whose ids may die.
    pub fn new(url: &str) -> Self {
        Self { url: url.to_owned(), pipeline: "trial", dead: "0" }
    }

    /// The same about pipeline `rogue`.
    pub fn of_rogue(url: &str) -> Self {
        Self { pipeline: "rogue", dead: "id % 1000 BETWEEN 101 AND 106 OR id % 100 = 97", ..Self::new(url) }
    }

    /// What is wrong with a run as its readers see it, and as it lies in the table.
    pub fn look(&self, submitted: &Submitted) -> Found {
        let Submitted { run, last } = submitted;
        let Self { pipeline, dead, .. } = self;
        let view = format!("millstream.{pipeline} WHERE run = '{run}'");
        // `numbers()` has other arguments on old servers.
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
        let doubled = count("doubled", format!("SELECT id FROM {view} GROUP BY id HAVING count() > 1"));
        let unexpected =
            count("unexpected", format!("SELECT id FROM {view} AND (id < 1 OR id > {last} OR {dead})"));
        let wrong = count("wrong", format!("SELECT id FROM {view} AND squared != id * id"));
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
        format!("millstream.{}_rows", self.pipeline)
    }

    /// Whether readers see the run.
    pub fn is_sealed(&self, run: &str) -> bool {
        self.number(&format!("SELECT count() FROM millstream.{}_passes WHERE run = '{run}'", self.pipeline))
            > 0
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
