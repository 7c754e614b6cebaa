//! Which message of a batch comes next, and what is known of those that are stored: decided without I/O, so that tests and the
//! simulation play what runs.

use std::ops::Range;

use bytes::Bytes;
use millstream::Id;
use millstream::envelope::{EnvelopeFault, Rows, decode_rows};

use super::encoded::{Encoded, Has, MAX_PARTS, Message};

/// Parts with rows that are cut off at a time, while other ids of the batch are not done.
pub(crate) const EARLY_PARTS: usize = MAX_PARTS / 2 - 1;

/// What is known of the messages of a batch.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Places of ids that no message is known to have.
    pub open: Vec<Range<u32>>,
    /// The cuts, by their subjects.
    pub cuts: Vec<(String, Bytes)>,
}

impl Known {
    /// Nothing yet, of a batch of so many ids.
    pub fn nothing(ids: u32) -> Self {
        let all = 0..ids;
        Self { open: vec![all], cuts: Vec::new() }
    }

    /// Takes note of what the subject of these places holds: the parts that are to be looked at then.
    ///
    /// # Errors
    /// What is wrong with the message.
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

/// The parts into which a message of the ids at these places cuts them; none where it has their rows.
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

/// One round of storing rows, all or those of a batch's ids that are done.
#[derive(Debug)]
pub(crate) struct Course {
    /// Places that no message is known to have and that were not looked at, the first of them last.
    left: Vec<Range<u32>>,
    /// Parts with rows that may still be cut off.
    early: usize,
    /// Places that get no message in this round.
    open: Vec<Range<u32>>,
}

/// The message that comes next.
pub(crate) enum Next {
    /// The rows of all ids at these places, as far as a message may carry them.
    Rows(Range<u32>),
    /// A cut of these places, as not all of their ids have rows.
    Cut(Range<u32>, Message),
}

impl Course {
    /// A round over places that no message is known to have, in which at most `early` parts are cut off from ids that are not
    /// done.
    pub fn new(mut open: Vec<Range<u32>>, early: usize) -> Self {
        open.reverse();
        Self { left: open, early, open: Vec::new() }
    }

    /// What is to be stored next; `None` at the end of the round.
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

    /// Goes on with the parts for which the message stands that is stored now; or with the same places, where none is.
    pub fn follow(&mut self, parts: Vec<Range<u32>>) {
        self.left.extend(parts.into_iter().rev());
    }

    /// Places that no message is known to have, at the end.
    pub fn open(self) -> Vec<Range<u32>> {
        let Self { left, mut open, .. } = self;
        open.extend(left.into_iter().rev());
        open
    }
}
