//! Which message of a batch comes next, and which messages are known to be stored: decided without I/O, so that tests
//! and the simulation run production decisions.

use std::ops::Range;

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::{EnvelopeFault, Rows, decode_rows};

use super::encoded::{Encoded, Has, MAX_PARTS, Message};

/// Ranges with rows that one round splits off while other ids of the batch are unfinished.
pub(crate) const EARLY_PARTS: usize = MAX_PARTS / 2 - 1;

/// Known messages of a batch.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Places of ids that no known message has.
    pub open: Vec<Range<u32>>,
    /// The manifests, by their subjects.
    pub cuts: Vec<(String, Bytes)>,
}

impl Known {
    /// Nothing is known yet of a batch of `ids` ids.
    pub fn nothing(ids: u32) -> Self {
        let all = 0..ids;
        Self { open: vec![all], cuts: Vec::new() }
    }

    /// Notes the message under the subject of these places; returns the ranges to read next.
    ///
    /// # Errors
    /// The fault of the message.
    pub fn note(
        &mut self,
        places: Range<u32>,
        subject: &str,
        found: Option<Bytes>,
    ) -> Result<Vec<Range<u32>>, EnvelopeFault> {
        let Some(found) = found else {
            self.open.push(places);
            return Ok(Vec::new());
        };
        let parts = parts_of(&found, &places)?;
        if !parts.is_empty() {
            self.cuts.push((subject.to_owned(), found));
        }
        Ok(parts)
    }
}

/// The ranges into which a message of the ids at these places divides them; none if it has their rows.
pub(crate) fn parts_of(message: &[u8], places: &Range<u32>) -> Result<Vec<Range<u32>>, EnvelopeFault> {
    let Rows::Cut(cut) = decode_rows(message)? else { return Ok(Vec::new()) };
    let parts: Vec<Range<u32>> = cut.ranges().collect();
    let covered = parts.first().zip(parts.last()).map(|(first, last)| first.start..last.end);
    if covered.as_ref() == Some(places) {
        Ok(parts)
    } else {
        Err(EnvelopeFault::Body { length: message.len() })
    }
}

/// One round of storing rows: all of them, or those of finished ids.
#[derive(Debug)]
pub(crate) struct Course {
    /// Places that no known message has and that this round has not visited, in reverse order.
    left: Vec<Range<u32>>,
    /// Ranges with rows that this round may still split off.
    early: usize,
    /// Places that get no message in this round.
    open: Vec<Range<u32>>,
}

/// The next message.
pub(crate) enum Next {
    /// The rows of all ids at these places, as far as one message may carry them.
    Rows(Range<u32>),
    /// A manifest of these places, because some of their ids have no rows.
    Cut(Range<u32>, Message),
}

impl Course {
    /// A round over places that no known message has; it splits off at most `early` ranges from unfinished ids.
    pub fn new(mut open: Vec<Range<u32>>, early: usize) -> Self {
        open.reverse();
        Self { left: open, early, open: Vec::new() }
    }

    /// What to store next; `None` at the end of the round.
    pub fn next<I: Id>(&mut self, rows: &Encoded<I>) -> Option<Next> {
        while let Some(places) = self.left.pop() {
            match rows.has(&places) {
                Has::All => return Some(Next::Rows(places)),
                Has::Some if self.early > 0 => {
                    let cut = rows.cut_around(&places, self.early);
                    self.early -= cut.parts.iter().filter(|part| rows.has(part) == Has::All).count();
                    return Some(Next::Cut(places, cut));
                }
                Has::Some | Has::None => self.open.push(places),
            }
        }
        None
    }

    /// Continues with the ranges of the stored message; or with the same places if no message is stored.
    pub fn follow(&mut self, parts: Vec<Range<u32>>) {
        self.left.extend(parts.into_iter().rev());
    }

    /// Places that no known message has, at the end of the round.
    pub fn open(self) -> Vec<Range<u32>> {
        let Self { left, mut open, .. } = self;
        open.extend(left.into_iter().rev());
        open
    }
}
