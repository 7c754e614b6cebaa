//! Serializers for values with parts: lists, tuples, maps, structs.

use serde::Serialize;
use serde::ser;

use super::cell::Cell;
use super::fault::{Reason, ValueFault};
use super::row::Key;
use super::scalar::{self, wrong_length};
use super::values::{Values, last};
use crate::schema::{ColumnType, Int, Part};

/// The type of the bytes of a `FixedString`, a UUID or an address that are written one by one.
static BYTE: ColumnType = ColumnType::Int(Int::U8);

/// A list, an array or a tuple on its way into a column.
pub(super) struct Sequence<'a> {
    place: Place<'a>,
    taken: usize,
    failed: bool,
}

enum Place<'a> {
    Array { kind: &'a ColumnType, ends: &'a mut Vec<u64>, items: &'a mut Values },
    Tuple { kind: &'a ColumnType, parts: &'a [Part], values: &'a mut [Values] },
    Bytes { kind: &'a ColumnType, values: &'a mut Values, held: Values },
}

impl<'a> Sequence<'a> {
    /// Begins a sequence; `cell` must be open.
    #[inline]
    pub(super) fn begin(cell: Cell<'a>, length: Option<usize>) -> Result<Self, ValueFault> {
        let place = match (cell.kind, cell.values) {
            (ColumnType::Array(kind), Values::Array { ends, items }) => Place::Array { kind, ends, items },
            (kind @ ColumnType::Tuple(parts), Values::Tuple(values)) => Place::Tuple { kind, parts, values },
            (kind @ (ColumnType::FixedString(_) | ColumnType::Uuid | ColumnType::Ipv6), values) => {
                let held =
                    Values::Fixed { width: 1, bytes: Vec::with_capacity(length.unwrap_or(0).min(256)) };
                Place::Bytes { kind, values, held }
            }
            (kind, _) => {
                let length = length.map_or_else(String::new, |length| format!(" of {length}"));
                return Err(ValueFault::kind(format!("a list{length}"), kind));
            }
        };
        Ok(Self { place, taken: 0, failed: false })
    }

    #[inline]
    fn put<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ValueFault> {
        let index = self.taken;
        self.taken += 1;
        let (kind, values) = match &mut self.place {
            Place::Array { kind, items, .. } => (*kind, &mut **items),
            Place::Bytes { held, .. } => (&BYTE, held),
            Place::Tuple { kind, parts, values } => match (parts.get(index), values.get_mut(index)) {
                (Some(part), Some(values)) => (&part.kind, values),
                _ => {
                    self.failed = true;
                    return Err(wrong_count(kind, parts.len(), "more"));
                }
            },
        };
        match value.serialize(Cell { kind, values }) {
            Ok(()) => Ok(()),
            Err(fault) => {
                self.failed = true; // if the caller ignores the fault, no half value may be stored
                Err(fault.at_index(index as u64))
            }
        }
    }

    fn close(self) -> Result<(), ValueFault> {
        if self.failed {
            return Err(passed_over());
        }
        match self.place {
            Place::Array { ends, .. } => {
                ends.push((last(ends) + self.taken) as u64);
                Ok(())
            }
            Place::Tuple { kind, parts, .. } if parts.len() != self.taken => {
                Err(wrong_count(kind, parts.len(), "fewer"))
            }
            Place::Tuple { .. } => Ok(()),
            Place::Bytes { kind, values, held: Values::Fixed { bytes, .. } } => {
                scalar::put_bytes(kind, values, &bytes)
            }
            Place::Bytes { kind, .. } => Err(wrong_length(kind, 0)),
        }
    }
}

#[cold]
fn wrong_count(kind: &ColumnType, parts: usize, than: &str) -> ValueFault {
    ValueFault::kind(format!("a tuple of {than} than {parts}"), kind)
}

#[cold]
fn passed_over() -> ValueFault {
    ValueFault::new(Reason::Custom("the row's Serialize ignored the error of a part".to_owned()))
}

macro_rules! sequences {
    ($($trait:ident $method:ident),*) => {
        $(impl ser::$trait for Sequence<'_> {
            type Ok = ();
            type Error = ValueFault;

            #[inline]
            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ValueFault> {
                self.put(value)
            }

            fn end(self) -> Result<(), ValueFault> {
                self.close()
            }
        })*
    };
}

sequences!(SerializeSeq serialize_element, SerializeTuple serialize_element, SerializeTupleStruct serialize_field);

/// A map on its way into a `Map`, or a struct that serializes as a map (`flatten`) into a named `Tuple`.
pub(super) enum Entries<'a> {
    Map(Pairs<'a>),
    Named(Named<'a>),
}

/// The pairs of a `Map`.
pub(super) struct Pairs<'a> {
    kinds: &'a (ColumnType, ColumnType),
    ends: &'a mut Vec<u64>,
    keys: &'a mut Values,
    values: &'a mut Values,
    taken: [usize; 2],
    failed: bool,
}

impl<'a> Entries<'a> {
    /// Begins the pairs of a map; `cell` must be open.
    #[inline]
    pub(super) fn begin(cell: Cell<'a>) -> Result<Self, ValueFault> {
        match (cell.kind, cell.values) {
            (kind @ ColumnType::Map(kinds), Values::Array { ends, items }) => match &mut **items {
                Values::Tuple(parts) => match &mut parts[..] {
                    [keys, values] => {
                        Ok(Self::Map(Pairs { kinds, ends, keys, values, taken: [0; 2], failed: false }))
                    }
                    _ => Err(ValueFault::kind("a map", kind)),
                },
                _ => Err(ValueFault::kind("a map", kind)),
            },
            (ColumnType::Tuple(parts), Values::Tuple(values))
                if parts.iter().all(|part| !part.name.is_empty()) =>
            {
                Ok(Self::Named(Named::new(parts, values, None)))
            }
            (kind, _) => Err(ValueFault::kind("a map", kind)),
        }
    }
}

impl ser::SerializeMap for Entries<'_> {
    type Ok = ();
    type Error = ValueFault;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), ValueFault> {
        match self {
            Self::Named(named) => named.serialize_key(key),
            Self::Map(pairs) => {
                pairs.taken[0] += 1;
                let found = key.serialize(Cell { kind: &pairs.kinds.0, values: pairs.keys });
                found.inspect_err(|_| pairs.failed = true).map_err(|fault| fault.within("[key]"))
            }
        }
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ValueFault> {
        match self {
            Self::Named(named) => named.serialize_value(value),
            Self::Map(pairs) => {
                pairs.taken[1] += 1;
                let found = value.serialize(Cell { kind: &pairs.kinds.1, values: pairs.values });
                found.inspect_err(|_| pairs.failed = true).map_err(|fault| fault.within("[value]"))
            }
        }
    }

    fn end(self) -> Result<(), ValueFault> {
        match self {
            Self::Named(named) => named.close(),
            Self::Map(pairs) if pairs.failed || pairs.taken[0] != pairs.taken[1] => Err(passed_over()),
            Self::Map(pairs) => {
                pairs.ends.push((last(pairs.ends) + pairs.taken[0]) as u64);
                Ok(())
            }
        }
    }
}

/// A struct on its way into columns, or into the parts of a tuple, each field by name.
///
/// A field in the order of the columns costs one comparison; others need a search.
pub(super) struct Named<'a> {
    parts: &'a [Part],
    values: &'a mut [Values],
    /// The number of values in each part before this one, if it was needed yet.
    before: Option<usize>,
    /// The part for a field in the order of the columns.
    next: usize,
    taken: usize,
    in_order: bool,
    /// The part whose name a map's key gave.
    keyed: Option<usize>,
    failed: bool,
}

impl<'a> Named<'a> {
    #[inline]
    pub(super) fn new(parts: &'a [Part], values: &'a mut [Values], before: Option<usize>) -> Self {
        Self { parts, values, before, next: 0, taken: 0, in_order: true, keyed: None, failed: false }
    }

    #[inline]
    fn put<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), ValueFault> {
        let index = match self.parts.get(self.next) {
            Some(part) if self.in_order && part.name == name => self.next,
            _ => self.find(name)?,
        };
        self.put_at(index, value)
    }

    #[inline]
    fn put_at<T: Serialize + ?Sized>(&mut self, index: usize, value: &T) -> Result<(), ValueFault> {
        let (Some(part), Some(values)) = (self.parts.get(index), self.values.get_mut(index)) else {
            return Err(passed_over());
        };
        self.next = index + 1;
        self.taken += 1;
        match value.serialize(Cell { kind: &part.kind, values }) {
            Ok(()) => Ok(()),
            Err(fault) => {
                self.failed = true;
                Err(fault.within(&part.name))
            }
        }
    }

    /// The part of that name, if it has no value yet.
    #[inline(never)]
    pub(super) fn find(&mut self, name: &str) -> Result<usize, ValueFault> {
        let before = self.rows_before();
        self.in_order = false;
        let start = self.next.min(self.parts.len());
        let mut places = (start..self.parts.len()).chain(0..start);
        let found = places.find(|place| self.parts[*place].name == name);
        let reason = match found {
            Some(place) if self.values[place].len() == before => return Ok(place),
            Some(_) => Reason::Twice,
            None => Reason::NoColumn,
        };
        self.failed = true;
        Err(ValueFault::new(reason).within(name))
    }

    fn rows_before(&mut self) -> usize {
        // As long as fields come in order, the first part has the new value if and only if any part has.
        let first = || self.values.first().map_or(0, Values::len) - usize::from(self.next > 0);
        *self.before.get_or_insert_with(first)
    }

    #[inline]
    pub(super) fn close(self) -> Result<(), ValueFault> {
        if !self.failed && self.taken == self.parts.len() { Ok(()) } else { Err(self.unfinished()) }
    }

    #[cold]
    fn unfinished(mut self) -> ValueFault {
        if self.failed {
            return passed_over();
        }
        let before = self.rows_before();
        let missing = self.parts.iter().zip(&*self.values).find(|(_, values)| values.len() == before);
        let name = missing.map_or("", |(part, _)| &part.name);
        ValueFault::new(Reason::Missing).within(name)
    }
}

impl ser::SerializeStruct for Named<'_> {
    type Ok = ();
    type Error = ValueFault;

    #[inline]
    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), ValueFault> {
        self.put(name, value)
    }

    #[inline]
    fn end(self) -> Result<(), ValueFault> {
        self.close()
    }
}

impl ser::SerializeMap for Named<'_> {
    type Ok = ();
    type Error = ValueFault;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), ValueFault> {
        let found = key.serialize(Key(self));
        self.failed |= found.is_err();
        self.keyed = Some(found?);
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ValueFault> {
        let index = self.keyed.take().ok_or_else(passed_over)?;
        self.put_at(index, value)
    }

    fn end(self) -> Result<(), ValueFault> {
        self.close()
    }
}
