//! Blank rows: a row type's `Deserialize` is given what it asks for, so that its fields are known without a value.
//!
//! Where a type refuses a blank (a `NonZeroU8`, a date as text), the row is begun again with the next candidate. Candidates
//! that suit the column come first.

mod parts;
mod value;

use std::fmt;

use serde::de::{self, DeserializeOwned};

use super::kind::Part;
use super::shape::Shape;
use value::Recorder;

/// Attempts at a row before its type counts as one that refuses blanks.
const MAX_ATTEMPTS: usize = 2_000;

/// Why no row came of a blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlankFault {
    /// The type is no struct.
    NoStruct(&'static str),
    /// A field was given twice: under its name and under an alias.
    Alias,
    /// The type's own `Deserialize` refused.
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

/// Which blanks are tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// `None`, empty lists, zeros.
    Empty,
    /// `Some`, lists of one, ones, and of each enum the variant of this number.
    Filled {
        /// Counted round when an enum has fewer.
        variant: usize,
    },
}

/// A struct's list of fields, and one of them.
type Name = (&'static [&'static str], &'static str);

/// Blank rows of one type.
pub(super) struct Blanks<'a> {
    parts: &'a [Part],
    style: Style,
    /// The only field that is given, to learn about it though others refuse.
    only: Option<&'static str>,
    /// The candidate taken at each place where there are several, and how many there are.
    choices: Vec<(usize, usize)>,
    asked: usize,
    /// Names in a struct's list of fields that are further names of another.
    aliases: Vec<Name>,
    /// The row's field that is being given.
    field: Option<&'static str>,
    /// The name given last, anywhere.
    given: Option<Name>,
    fields: Option<&'static [&'static str]>,
    /// Fields whose type takes any value.
    pub(super) any: Vec<String>,
    /// The most variants of an enum.
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

    /// A row of blanks.
    pub(super) fn row<R: DeserializeOwned>(&mut self, style: Style) -> Result<R, BlankFault> {
        (self.style, self.only) = (style, None);
        self.attempt(|blanks| R::deserialize(Recorder::row(blanks)))
    }

    /// What a field reads, of a type whose rows cannot be made.
    pub(super) fn field<R: DeserializeOwned>(&mut self, field: &'static str) -> Shape {
        (self.style, self.only, self.shape) = (Style::Filled { variant: 0 }, Some(field), None);
        // The row itself fails for the fields that are not given.
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

    /// Moves the last place that has candidates left to its next one.
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

    /// The candidate to take at this place, of `count`.
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

    /// The fields that the type says it has, each under its first name; `None` when it does not say.
    pub(super) fn fields(&self) -> Option<Vec<&'static str>> {
        let fields = self.fields?;
        Some(fields.iter().copied().filter(|name| !self.is_alias((fields, name))).collect())
    }

    fn is_filled(&self) -> bool {
        self.style != Style::Empty
    }
}
