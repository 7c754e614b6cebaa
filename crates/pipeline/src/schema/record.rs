//! Blank rows: a row type's `Deserialize` gets what it asks for, so that its fields are known without a real
//! value.
//!
//! If a type refuses a blank (a `NonZeroU8`, a date as text), the row is begun again with the next candidate.
//! Candidates that suit the column come first.

mod parts;
mod value;

use std::fmt;

use serde::de::{self, DeserializeOwned};

use super::kind::Part;
use super::shape::Shape;
use value::Recorder;

/// The most attempts at a row before its type counts as one that refuses blanks.
const MAX_ATTEMPTS: usize = 2_000;

/// Why a blank row could not be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlankFault {
    /// The type is not a struct.
    NoStruct(&'static str),
    /// A field was given twice: by its name and by an alias.
    Alias,
    /// The type's own `Deserialize` refused the blank.
    Refused,
}

impl fmt::Display for BlankFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for BlankFault {}

impl de::Error for BlankFault {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self::Refused
    }

    fn duplicate_field(_: &'static str) -> Self {
        Self::Alias
    }
}

/// The blanks that are tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// `None`, empty lists, zeros.
    Empty,
    /// `Some`, lists of one item, ones, and the variant with this number of each enum.
    Filled {
        /// The number of the variant, modulo the number of variants.
        variant: usize,
    },
}

/// A struct's list of field names, and one of them.
type Name = (&'static [&'static str], &'static str);

/// Blank rows of one type.
pub(super) struct Blanks<'a> {
    parts: &'a [Part],
    style: Style,
    /// The only field that is given, to learn its type although others refuse blanks.
    only: Option<&'static str>,
    /// For each choice, the candidate that was taken and the number of candidates.
    choices: Vec<(usize, usize)>,
    asked: usize,
    /// Names in a struct's list of fields that are aliases of other fields.
    aliases: Vec<Name>,
    /// The row's field that is being given.
    field: Option<&'static str>,
    /// The name that was given last, at any level.
    given: Option<Name>,
    fields: Option<&'static [&'static str]>,
    /// Fields whose type accepts any value.
    pub(super) any: Vec<String>,
    /// The largest number of variants of an enum.
    pub(super) variants: usize,
    /// The shape of the field that is given alone.
    shape: Option<Shape>,
}

impl<'a> Blanks<'a> {
    pub(super) fn new(parts: &'a [Part]) -> Self {
        Self {
            parts,
            style: Style::Empty,
            only: None,
            choices: Vec::new(),
            asked: 0,
            aliases: Vec::new(),
            field: None,
            given: None,
            fields: None,
            any: Vec::new(),
            variants: 0,
            shape: None,
        }
    }

    /// Makes a blank row.
    pub(super) fn row<R: DeserializeOwned>(&mut self, style: Style) -> Result<R, BlankFault> {
        (self.style, self.only) = (style, None);
        self.attempt(|blanks| R::deserialize(Recorder::row(blanks)))
    }

    /// What a field asks for, of a type whose blank rows cannot be made.
    pub(super) fn field<R: DeserializeOwned>(&mut self, field: &'static str) -> Shape {
        (self.style, self.only, self.shape) = (Style::Filled { variant: 0 }, Some(field), None);
        // The row itself fails, because the other fields are missing.
        let _row = self.attempt(|blanks| {
            let row = R::deserialize(Recorder::row(blanks));
            if blanks.shape.is_some() { Ok(()) } else { row.map(|_| ()) }
        });
        self.shape.take().unwrap_or(Shape::Unknown)
    }

    fn attempt<T>(
        &mut self,
        mut run: impl FnMut(&mut Self) -> Result<T, BlankFault>,
    ) -> Result<T, BlankFault> {
        self.choices.clear();
        for _ in 0..MAX_ATTEMPTS {
            self.asked = 0;
            let fault = match run(self) {
                Ok(row) => return Ok(row),
                Err(fault) => fault,
            };
            match (&fault, self.given) {
                (BlankFault::NoStruct(_), _) => return Err(fault),
                (BlankFault::Alias, Some(alias)) if !self.is_alias(alias) => {
                    self.aliases.push(alias);
                    self.choices.clear();
                }
                _ if self.next_choice() => {}
                _ => return Err(fault),
            }
        }
        Err(BlankFault::Refused)
    }

    /// Moves the last choice with untried candidates to its next one.
    fn next_choice(&mut self) -> bool {
        self.choices.truncate(self.asked);
        while let Some((taken, count)) = self.choices.pop() {
            if taken + 1 < count {
                self.choices.push((taken + 1, count));
                return true;
            }
        }
        false
    }

    /// The candidate to take here, out of `count`.
    fn choose(&mut self, count: usize) -> usize {
        if self.asked == self.choices.len() {
            self.choices.push((0, count));
        }
        let (taken, _) = self.choices[self.asked];
        self.asked += 1;
        taken
    }

    fn is_alias(&self, (fields, name): Name) -> bool {
        self.aliases.iter().any(|(known, alias)| std::ptr::eq(*known, fields) && *alias == name)
    }

    /// The fields that the type lists, each by its main name; `None` if it lists none.
    pub(super) fn fields(&self) -> Option<Vec<&'static str>> {
        let fields = self.fields?;
        Some(fields.iter().copied().filter(|name| !self.is_alias((fields, name))).collect())
    }

    fn is_filled(&self) -> bool {
        self.style != Style::Empty
    }
}
