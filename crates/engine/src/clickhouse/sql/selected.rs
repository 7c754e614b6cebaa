//! The ids that a partial replay computes again, and the SQL about them.
//!
//! Every selection becomes one condition on the rows of the base pass. Each of those rows is either published
//! and computed, if it matches, or copied, if it does not.

use millstream::names::{PassId, RunName};

use super::{Column, Digested, Tables, identifier, of_batches, of_pass, string};
use crate::model::record::Covers;
use crate::model::selection::Selection;

impl Covers {
    /// The condition that selects the rows of the base pass whose ids are computed again. It is never NULL,
    /// because a row with NULL would be neither computed nor copied.
    fn condition(&self) -> String {
        match &self.selection {
            Selection::Letters(letters) => letters.condition(),
            Selection::Where(condition) => format!("ifNull({}, 0) != 0", on_own_lines(condition, ['(', ')'])),
            Selection::Batches { .. } | Selection::Published { .. } => of_ranges(&self.ranges),
        }
    }
}

/// Puts the user's condition on lines of its own, so that a comment at its end ends there. It is the one text
/// that is not quoted: the server runs it with the user's rights.
fn on_own_lines(condition: &str, [open, close]: [char; 2]) -> String {
    format!("{open}\n{}\n{close}", condition.trim())
}

fn of_ranges(ranges: &[[u32; 2]]) -> String {
    let ranges: Vec<String> =
        ranges.iter().map(|[first, end]| format!("(batch >= {first} AND batch < {end})")).collect();
    if ranges.is_empty() { "0".to_owned() } else { format!("({})", ranges.join(" OR ")) }
}

impl Tables {
    /// Statements that the server accepts only if the text is one condition on rows. They read no row.
    ///
    /// Injection check: text such as `1) OR (1` parses inside `(...)` but not inside `[...]`, so both must
    /// parse.
    pub fn check_condition(&self, condition: &str) -> [String; 2] {
        let rows = self.rows();
        let array = on_own_lines(condition, ['[', ']']);
        [
            format!("SELECT count() FROM {rows} WHERE 0 AND {}", on_own_lines(condition, ['(', ')'])),
            format!("SELECT count() FROM {rows} WHERE 0 AND length({array}) = 1"),
        ]
    }

    /// The newest pass of a run that has rows: `(pass)`. The end of the primary key answers it.
    pub fn newest_rows(&self, run: &RunName) -> String {
        format!(
            "SELECT pass FROM {} WHERE run = {} ORDER BY run DESC, pass DESC LIMIT 1",
            self.rows(),
            string(run.as_str())
        )
    }

    /// The selected ids of the base pass: `(ids, digest)`.
    pub fn selected(&self, run: &RunName, covers: &Covers) -> String {
        format!(
            "SELECT count(), sum(sipHash64(id)) FROM {} FINAL WHERE {} AND {}",
            self.rows(),
            of_pass(&covers.base_of(run)),
            covers.condition(),
        )
    }

    /// Batches of the base pass that have selected ids, in order: `(batch)`.
    pub fn selected_batches(&self, run: &RunName, covers: &Covers) -> String {
        format!(
            "SELECT DISTINCT batch FROM {} FINAL WHERE {} AND {} ORDER BY batch",
            self.rows(),
            of_pass(&covers.base_of(run)),
            covers.condition(),
        )
    }

    /// The selected ids of these batches, in order: `(batch, id as text)`.
    pub fn selected_ids(&self, run: &RunName, covers: &Covers, batches: &[u32]) -> String {
        format!(
            "SELECT batch, toString(id) FROM {} FINAL WHERE {} AND {} ORDER BY batch, id",
            self.rows(),
            of_batches(&covers.base_of(run), batches),
            covers.condition(),
        )
    }

    /// The number of selected ids of batches `first..end` that have no row in `pass`: `(ids)`.
    pub fn not_computed(&self, pass: &PassId, covers: &Covers, [first, end]: [u32; 2]) -> String {
        let rows = self.rows();
        let range = format!("batch >= {first} AND batch < {end}");
        format!(
            "SELECT count() FROM {rows} FINAL WHERE {} AND {range} AND {} AND (batch, id) NOT IN (SELECT batch, id \
             FROM {rows} WHERE {} AND {range})",
            of_pass(&covers.base_of(&pass.run)),
            covers.condition(),
            of_pass(pass),
        )
    }

    /// Copies the rows that `pass` lacks in batches `first..end` from the base pass, except the selected ids. A
    /// second call adds nothing. `table` has every column of the table, because another version of the pipeline
    /// may have added some.
    pub fn take_over(
        &self,
        pass: &PassId,
        covers: &Covers,
        [first, end]: [u32; 2],
        table: &[Column],
        schemas: &[Digested],
    ) -> String {
        let rows = self.rows();
        let range = format!("batch >= {first} AND batch < {end}");
        let others =
            format!("{} AND {range} AND NOT ({})", of_pass(&covers.base_of(&pass.run)), covers.condition());
        let lacking =
            format!("(batch, id) NOT IN (SELECT batch, id FROM {rows} WHERE {} AND {range})", of_pass(pass));
        let names = table.iter().filter(|column| column.is_insertable()).map(|column| column.name.as_str());
        let columns = names.clone().map(identifier).collect::<Vec<_>>().join(", ");
        let values = names.map(|name| match name {
            "pass" => format!("toUInt32({})", pass.pass),
            // The digest covers all rows that the pass copies of a batch, in this statement or an earlier one:
            // rows that are copied in two steps still have one digest.
            "batch_digest" => "`$copied`".to_owned(),
            name => identifier(name),
        });
        let values = values.collect::<Vec<_>>().join(", ");
        format!(
            "INSERT INTO {rows} ({columns}) SELECT {values} FROM (SELECT {columns} FROM {rows} FINAL WHERE {others} AND {lacking}) AS \
             `$rows` INNER JOIN ({}) AS `$digests` USING (batch, schema)",
            self.copied_digests(&others, schemas),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moment::Moment;
    use crate::model::selection::Letters;

    #[test]
    fn an_old_record_of_a_dead_letter_replay_still_parses() {
        let old = r#"{"base":1,"letters":{"error":"x","batch":null},"ids":7}"#;
        let covers: Covers = serde_json::from_str(old).expect("the form of the first version");
        let letters = Letters { error: Some("x".into()), ..Letters::default() };
        assert_eq!(covers.selection, Selection::Letters(letters));
        assert_eq!((covers.base, covers.ids, covers.selected, covers.ranges.len()), (1, Some(7), None, 0));
        let again = serde_json::to_value(&covers).expect("JSON");
        assert_eq!(again["letters"]["error"], "x");
    }

    #[test]
    fn every_selection_is_described_and_stored() {
        let moment = |words: &str| Moment::parse(words, 1000).expect("a moment");
        let table = [
            (Selection::Letters(Letters::default()), "dead letters"),
            (Selection::Where("steps > 1".into()), "ids where `steps > 1`"),
            (Selection::Batches { first: 3, end: 9 }, "batches 3..9"),
            (
                Selection::Published { since: Some(moment("10m")), until: Some(moment("1m")) },
                "batches published since 10m until 1m",
            ),
        ];
        for (selection, words) in table {
            assert_eq!(selection.to_string(), words);
            let covers = Covers { base: 1, selection, ranges: vec![[0, 4]], selected: None, ids: None };
            let kept = serde_json::to_string(&covers).expect("JSON");
            assert_eq!(serde_json::from_str::<Covers>(&kept).expect(&kept), covers);
        }
    }

    #[test]
    fn a_condition_is_one_expression_whatever_is_in_it() {
        let covers = |selection, ranges: &[[u32; 2]]| Covers {
            base: 1,
            selection,
            ranges: ranges.to_vec(),
            selected: None,
            ids: None,
        };
        let own = covers(Selection::Where(" steps > 1 -- many ".into()), &[]);
        assert_eq!(own.condition(), "ifNull((\nsteps > 1 -- many\n), 0) != 0");
        let batches = covers(Selection::Batches { first: 0, end: 9 }, &[[0, 4], [6, 9]]);
        assert_eq!(batches.condition(), "((batch >= 0 AND batch < 4) OR (batch >= 6 AND batch < 9))");
        assert_eq!(covers(Selection::Published { since: None, until: None }, &[]).condition(), "0");
    }
}
