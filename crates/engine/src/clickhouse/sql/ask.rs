//! Queries about what is stored of batches.

use millstream::names::PassId;

use super::{Tables, of_batches, of_pass};
use crate::model::rows::Portion;

/// The way in which the rows of a batch are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Counts rows. It equals the number of ids if the rows lie in one part. An INSERT is atomic and has no id
    /// twice (`sink/group.rs`), and a merge leaves one row per id.
    Rows,
    /// Counts distinct ids, which takes more than twice the time.
    Ids,
}

impl Count {
    fn expression(self) -> &'static str {
        match self {
            Self::Rows => "count(), toUInt8(min(_part_index) = max(_part_index))",
            Self::Ids => "uniqExact(id), toUInt8(1)",
        }
    }
}

impl Tables {
    /// What is stored of each of these batches: `(batch, expected ids, found, whether each is another id)`.
    ///
    /// In a partial replay, a batch has copied rows and rows from a message, and the two record different
    /// numbers of expected ids. So only rows of one message are counted together.
    pub fn ask(&self, pass: &PassId, batches: &[u32], count: Count) -> String {
        format!(
            "SELECT batch, batch_ids, {} FROM {} WHERE {} GROUP BY batch, batch_ids",
            count.expression(),
            self.rows(),
            of_batches(pass, batches)
        )
    }

    /// What is stored of each of these split messages: `(index in the list, found, whether each is another
    /// id)`.
    pub fn ask_parts(&self, pass: &PassId, parts: &[&Portion], count: Count) -> String {
        let ask = |(place, part): (usize, &&Portion)| {
            let Portion { batch, of, ids } = part;
            let within = ids
                .as_ref()
                .map(|(first, last)| format!(" AND id BETWEEN {} AND {}", self.id(first), self.id(last)));
            format!(
                "SELECT toUInt32({place}), {} FROM {} WHERE {} AND batch = {batch} AND batch_ids = {of}{}",
                count.expression(),
                self.rows(),
                of_pass(pass),
                within.unwrap_or_default(),
            )
        };
        parts.iter().enumerate().map(ask).collect::<Vec<_>>().join(" UNION ALL ")
    }
}
