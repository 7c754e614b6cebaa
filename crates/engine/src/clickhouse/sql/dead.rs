//! SQL about dead letters.

use millstream::names::PassId;

use super::{Tables, of_pass, string};
use crate::model::selection::Letters;

impl Letters {
    /// The condition on rows of a pass that selects these dead letters.
    pub(super) fn condition(&self) -> String {
        let error = self.error.as_ref().map(|text| format!(" AND position(error, {}) > 0", string(text)));
        let batch = self.batch.map(|batch| format!(" AND batch = {batch}"));
        let host = self.host.as_ref().map(|host| format!(" AND host = {}", string(host)));
        let build = self.build.as_ref().map(|build| format!(" AND build = {}", string(build)));
        let more: String = [error, batch, host, build].into_iter().flatten().collect();
        format!("status = 'dead'{more}")
    }
}

impl Tables {
    /// Counts the dead letters of a pass, raw duplicates included: `(rows)`. The status index skips granules
    /// without any.
    pub fn count_dead(&self, pass: &PassId, letters: &Letters) -> String {
        format!("SELECT count() FROM {} WHERE {} AND {}", self.rows(), of_pass(pass), letters.condition())
    }

    /// Counts the dead letters of a pass, each id once: `(ids)`.
    pub fn dead_ids(&self, pass: &PassId) -> String {
        format!("SELECT count() FROM {} FINAL WHERE {} AND status = 'dead'", self.rows(), of_pass(pass))
    }

    /// Dead letters of a pass, in order: `(batch, id as text, error, host, build)`.
    pub fn dead(&self, pass: &PassId, letters: &Letters, limit: u64) -> String {
        format!(
            "SELECT batch, toString(id), error, toString(host), toString(build) FROM {} FINAL WHERE {} AND {} \
             ORDER BY batch, id LIMIT {limit}",
            self.rows(),
            of_pass(pass),
            letters.condition(),
        )
    }

    /// Counts the dead letters of a pass by error text, ignoring numbers in the text: `(error, ids)`, the most
    /// frequent first.
    pub fn dead_by_error(&self, pass: &PassId, letters: &Letters, limit: u64) -> String {
        format!(
            "SELECT replaceRegexpAll(error, '[0-9]+', '#') AS kind, count() FROM {} FINAL \
             WHERE {} AND {} GROUP BY kind ORDER BY count() DESC, kind LIMIT {limit}",
            self.rows(),
            of_pass(pass),
            letters.condition(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_the_users_stays_a_text() {
        let letters = Letters { error: Some("it's' OR 1=1 --".into()), batch: Some(3), ..Letters::default() };
        assert_eq!(
            letters.condition(),
            r"status = 'dead' AND position(error, 'it\'s\' OR 1=1 --') > 0 AND batch = 3"
        );
        assert_eq!(Letters::default().condition(), "status = 'dead'");
    }
}
