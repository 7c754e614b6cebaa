//! SQL about dead letters, and about the pass that computes them again.

use serde::{Deserialize, Serialize};

use super::{Tables, of_batches, of_pass, string};

/// Which of a pass's dead letters are meant: all of them, or those that fit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letters {
    /// Only those whose error holds this text.
    pub error: Option<String>,
    /// Only those of this batch.
    pub batch: Option<u32>,
}

impl Letters {
    /// The condition that a row of a pass must fulfil.
    fn condition(&self) -> String {
        let error = self.error.as_ref().map(|text| format!(" AND position(error, {}) > 0", string(text)));
        let batch = self.batch.map(|batch| format!(" AND batch = {batch}"));
        format!("status = 'dead'{}{}", error.unwrap_or_default(), batch.unwrap_or_default())
    }
}

impl Tables {
    /// Dead letters of a pass: `(rows)`. Raw duplicates count. Granules without one are skipped by their index.
    pub fn count_dead(&self, run: &str, pass: u32, letters: &Letters) -> String {
        format!(
            "SELECT count() FROM {} WHERE {} AND {}",
            self.rows(),
            of_pass(run, pass),
            letters.condition()
        )
    }

    /// Dead letters of a pass, in order: `(batch, id as text, error)`.
    pub fn dead(&self, run: &str, pass: u32, letters: &Letters, limit: u64) -> String {
        format!(
            "SELECT batch, toString(id), error FROM {} FINAL WHERE {} AND {} ORDER BY batch, id LIMIT {limit}",
            self.rows(),
            of_pass(run, pass),
            letters.condition(),
        )
    }

    /// Dead letters of a pass by their error, numbers in it aside: `(error, ids)`, the commonest first.
    pub fn dead_by_error(&self, run: &str, pass: u32, letters: &Letters, limit: u64) -> String {
        format!(
            "SELECT replaceRegexpAll(error, '[0-9]+', '#') AS kind, count() FROM {} FINAL \
             WHERE {} AND {} GROUP BY kind ORDER BY count() DESC, kind LIMIT {limit}",
            self.rows(),
            of_pass(run, pass),
            letters.condition(),
        )
    }

    /// Batches of a pass that have dead letters, in order: `(batch)`.
    pub fn dead_batches(&self, run: &str, pass: u32, letters: &Letters) -> String {
        format!(
            "SELECT DISTINCT batch FROM {} FINAL WHERE {} AND {} ORDER BY batch",
            self.rows(),
            of_pass(run, pass),
            letters.condition(),
        )
    }

    /// Ids of these batches that are dead letters of a pass, in order: `(batch, id as text)`.
    pub fn dead_ids(&self, run: &str, pass: u32, letters: &Letters, batches: &[u32]) -> String {
        format!(
            "SELECT batch, toString(id) FROM {} FINAL WHERE {} AND {} ORDER BY batch, id",
            self.rows(),
            of_batches(run, pass, batches),
            letters.condition(),
        )
    }

    /// How many of the base pass's dead letters have a row in `pass`: `(ids)`. Memory grows with the dead letters.
    pub fn computed_again(&self, run: &str, pass: u32, base: u32, letters: &Letters) -> String {
        let rows = self.rows();
        format!(
            "SELECT uniqExact(batch, id) FROM {rows} WHERE {} AND (batch, id) IN (SELECT batch, id FROM {rows} FINAL \
             WHERE {} AND {})",
            of_pass(run, pass),
            of_pass(run, base),
            letters.condition(),
        )
    }

    /// Copies what `pass` lacks of the batches from `first` to below `end` from the base pass, except the dead letters
    /// that were computed again. Done twice it adds nothing.
    pub fn take_over(
        &self,
        run: &str,
        pass: u32,
        base: u32,
        letters: &Letters,
        [first, end]: [u32; 2],
    ) -> String {
        let rows = self.rows();
        let range = format!("batch >= {first} AND batch < {end}");
        let columns = self.column_list();
        let own: String = self.own_list();
        format!(
            "INSERT INTO {rows} ({columns}) SELECT run, toUInt32({pass}), batch, batch_ids, id, status, error{own} \
             FROM {rows} FINAL WHERE {} AND {range} AND NOT ({}) AND (batch, id) NOT IN (SELECT batch, id FROM {rows} \
             WHERE {} AND {range})",
            of_pass(run, base),
            letters.condition(),
            of_pass(run, pass),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_the_users_stays_a_text() {
        let letters = Letters { error: Some("it's' OR 1=1 --".into()), batch: Some(3) };
        assert_eq!(
            letters.condition(),
            r"status = 'dead' AND position(error, 'it\'s\' OR 1=1 --') > 0 AND batch = 3"
        );
        assert_eq!(Letters::default().condition(), "status = 'dead'");
    }
}
