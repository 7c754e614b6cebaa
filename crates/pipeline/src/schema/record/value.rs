//! Makes one blank value of any type that asks for it.

use serde::de::{self, Visitor};

use super::parts::{ByName, Elements, Given, Variant};
use super::{BlankFault, Blanks, Style};
use crate::schema::shape::Shape;
use crate::schema::{ColumnType, Int, Part};

/// The depth from which recursive types get empty values.
const MAX_DEPTH: usize = 8;

/// Texts for types that parse only one form.
const TEXTS: [&str; 17] = [
    "",
    "a",
    "0",
    "1",
    "67e55044-10b1-426f-9247-bb680e5fe0c8",
    "1970-01-02",
    "1970-01-02T00:00:01Z",
    "1970-01-02T00:00:01",
    "1970-01-02T00:00:01+00:00[UTC]",
    "1970-01-02T00:00:01+00:00[+00:00]", // needs no time zone database
    "00:00:01",
    "127.0.0.1",
    "::1",
    "127.0.0.1:80",
    "http://localhost/",
    "UTC",
    "PT1S",
];

/// Numbers for types that accept few.
const FURTHER_NUMBERS: [i16; 9] = [2, 3, 4, 5, 10, 50, 100, -1, 1000];

/// Lengths of byte strings, for types that accept few.
const LENGTHS: [usize; 8] = [0, 1, 4, 8, 16, 20, 32, 64];

/// Gives one value that suits the column.
pub(super) struct Recorder<'r, 'a> {
    pub(super) blanks: &'r mut Blanks<'a>,
    pub(super) kind: Option<&'a ColumnType>,
    pub(super) is_row: bool,
    pub(super) depth: usize,
    pub(super) shape: Option<&'r mut Shape>,
}

impl<'r, 'a> Recorder<'r, 'a> {
    pub(super) fn row(blanks: &'r mut Blanks<'a>) -> Self {
        Self { blanks, kind: None, is_row: true, depth: 0, shape: None }
    }

    /// The type of the values, without `LowCardinality` and `Nullable`.
    fn kind(&self) -> Option<&'a ColumnType> {
        let plain = self.kind.map(ColumnType::plain);
        match plain {
            Some(ColumnType::Nullable(held)) => Some(held.plain()),
            other => other,
        }
    }

    fn found(&mut self, shape: Shape) {
        if let Some(place) = &mut self.shape {
            **place = shape;
        }
    }

    /// Records a value. A row is a struct; every other answer is a value within one.
    fn scalar(&mut self, what: &'static str, shape: Shape) -> Result<(), BlankFault> {
        if self.is_row {
            return Err(BlankFault::NoStruct(what));
        }
        self.found(shape);
        Ok(())
    }

    fn text(&mut self) -> &'a str {
        let suited: &[&'static str] = match self.kind() {
            Some(ColumnType::Uuid) => &["67e55044-10b1-426f-9247-bb680e5fe0c8"],
            Some(ColumnType::Ipv4) => &["127.0.0.1"],
            Some(ColumnType::Ipv6) => &["::1", "127.0.0.1"],
            Some(ColumnType::Date | ColumnType::Date32) => &["1970-01-02"],
            Some(ColumnType::DateTime(_) | ColumnType::DateTime64(..)) => {
                &["1970-01-02T00:00:01Z", "1970-01-02T00:00:01"]
            }
            Some(ColumnType::Decimal { .. } | ColumnType::Int(_)) => &["0", "1"],
            _ if self.blanks.is_filled() => &["a"],
            _ => &[""],
        };
        let names: &'a [(String, i16)] = match self.kind() {
            Some(ColumnType::Enum(known)) => &known.values,
            _ => &[],
        };
        let taken = self.blanks.choose(names.len() + suited.len() + TEXTS.len());
        let names = names.iter().map(|(name, _)| &name[..]);
        names.chain(suited.iter().copied()).chain(TEXTS).nth(taken).unwrap_or_default()
    }

    fn bytes(&mut self) -> Vec<u8> {
        let suited = match self.kind() {
            Some(ColumnType::FixedString(length)) => *length,
            Some(ColumnType::Uuid | ColumnType::Ipv6) => 16,
            _ => usize::from(self.blanks.is_filled()),
        };
        let taken = self.blanks.choose(1 + LENGTHS.len());
        vec![0; std::iter::once(suited).chain(LENGTHS).nth(taken).unwrap_or_default()]
    }

    /// 0 or 1, the one of the style first.
    fn bit(&mut self) -> bool {
        let taken = self.blanks.choose(2);
        (taken == 1) != self.blanks.is_filled()
    }

    /// A number: one of the column's Enum, 0 or 1, and then others for types that refuse these.
    fn number(&mut self) -> i16 {
        let of_enum: &[(String, i16)] = match self.kind() {
            Some(ColumnType::Enum(known)) => &known.values,
            _ => &[],
        };
        let small = if self.blanks.is_filled() { [1, 0] } else { [0, 1] };
        let taken = self.blanks.choose(of_enum.len() + small.len() + FURTHER_NUMBERS.len());
        let known = of_enum.iter().map(|(_, number)| *number);
        known.chain(small).chain(FURTHER_NUMBERS).nth(taken).unwrap_or_default()
    }

    /// Whether an option or list holds a value.
    fn holds(&mut self) -> bool {
        self.depth < MAX_DEPTH && self.bit()
    }

    fn part(&mut self, index: usize) -> Option<&'a ColumnType> {
        match self.kind() {
            Some(ColumnType::Tuple(parts)) => parts.get(index).map(|part| &part.kind),
            Some(ColumnType::Array(held)) => Some(held),
            _ => None,
        }
    }

    /// A value for a type that accepts any: the column's kind of value first.
    fn anything<'de, V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        if self.is_row {
            return self.map_by_columns(visitor);
        }
        if let Some(field) = self.blanks.field
            && !self.blanks.any.iter().any(|known| known == field)
        {
            self.blanks.any.push(field.to_owned());
        }
        let kind = self.kind();
        // A value that suits the column, then text, a number, a float, a bool, and none.
        match (self.blanks.choose(6), kind) {
            (0, Some(ColumnType::Array(_))) => self.list(visitor),
            (0, Some(ColumnType::Map(_))) => self.pairs(visitor),
            (0, Some(ColumnType::Tuple(parts))) => self.tuple_by_names(parts, visitor),
            (0, Some(ColumnType::Bool)) => visitor.visit_bool(self.bit()),
            (0, Some(ColumnType::Float32 | ColumnType::Float64)) => visitor.visit_f64(0.5),
            (0, Some(ColumnType::Int(int))) if int.width() <= 16 => visitor.visit_u64(u64::from(self.bit())),
            (0 | 1, _) => visitor.visit_str(self.text()),
            (2, _) => visitor.visit_u64(u64::from(self.bit())),
            (3, _) => visitor.visit_f64(0.5),
            (4, _) => visitor.visit_bool(false),
            _ => visitor.visit_unit(),
        }
    }

    fn list<'de, V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        let length = usize::from(self.holds());
        let mut item = Shape::Unknown;
        let kind = self.part(0);
        let elements = Elements {
            blanks: self.blanks,
            depth: self.depth + 1,
            kinds: vec![kind; length],
            next: 0,
            shapes: vec![&mut item],
        };
        let value = visitor.visit_seq(elements)?;
        self.shape.into_iter().for_each(|place| *place = Shape::List(Some(Box::new(item.clone()))));
        Ok(value)
    }

    fn pairs<'de, V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        let length = 2 * usize::from(self.holds());
        let kinds = match self.kind() {
            Some(ColumnType::Map(pair)) => [Some(&pair.0), Some(&pair.1)],
            _ => [None, None],
        };
        let mut key = Shape::Unknown;
        let mut held = Shape::Unknown;
        let shapes = vec![&mut key, &mut held];
        let elements = Elements {
            blanks: self.blanks,
            depth: self.depth + 1,
            kinds: kinds[..length].to_vec(),
            next: 0,
            shapes,
        };
        let value = visitor.visit_map(elements)?;
        self.shape.into_iter().for_each(|place| *place = Shape::Map(vec![(key.clone(), held.clone())]));
        Ok(value)
    }

    pub(super) fn tuple<'de, V: Visitor<'de>>(
        mut self,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        let kinds: Vec<_> = (0..length).map(|index| self.part(index)).collect();
        let mut found = vec![Shape::Unknown; length];
        let shapes = found.iter_mut().collect();
        let value = visitor.visit_seq(Elements {
            blanks: self.blanks,
            depth: self.depth + 1,
            kinds,
            next: 0,
            shapes,
        })?;
        self.shape.into_iter().for_each(|place| *place = Shape::Tuple(found.clone()));
        Ok(value)
    }

    /// A value for a type that accepts any and a tuple with names.
    fn tuple_by_names<'de, V: Visitor<'de>>(
        self,
        parts: &'a [Part],
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        if parts.iter().any(|part| part.name.is_empty()) {
            return self.tuple(parts.len(), visitor);
        }
        let names = parts.iter().map(|part| (part.name.clone(), Some(&part.kind))).collect();
        visitor.visit_map(ByName { blanks: self.blanks, depth: self.depth + 1, names, next: 0 })
    }

    /// A map with each column's name, for a row that does not list its fields.
    fn map_by_columns<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        let parts = self.blanks.parts;
        let names = parts.iter().map(|part| (part.name.clone(), Some(&part.kind))).collect();
        visitor.visit_map(ByName { blanks: self.blanks, depth: self.depth + 1, names, next: 0 })
    }

    pub(super) fn fields<'de, V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        let parts: &'a [Part] = match self.kind() {
            _ if self.is_row => self.blanks.parts,
            Some(ColumnType::Tuple(parts)) => parts,
            _ => &[],
        };
        if self.is_row {
            self.blanks.fields = Some(fields);
        }
        let only = if self.is_row { self.blanks.only } else { None };
        let blanks = &self.blanks;
        let names: Vec<&'static str> = fields
            .iter()
            .copied()
            .filter(|name| !blanks.is_alias((fields, name)) && only.is_none_or(|only| only == *name))
            .collect();
        let mut shapes = vec![Shape::Unknown; names.len()];
        let given = Given {
            blanks: self.blanks,
            depth: self.depth + 1,
            parts,
            fields,
            names: &names,
            next: 0,
            shapes: &mut shapes,
            is_row: self.is_row,
        };
        let value = visitor.visit_map(given);
        self.shape.into_iter().for_each(|place| {
            *place = Shape::Struct(names.iter().map(|name| (*name).to_owned()).zip(shapes.clone()).collect());
        });
        value
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $int:ident $type:ty),*) => {
        $(fn $method<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
            self.scalar("a number", Shape::Int(Int::$int))?;
            visitor.$visit(<$type>::try_from(self.number()).map_err(|_| BlankFault::Refused)?)
        })*
    };
}

impl<'de> de::Deserializer<'de> for Recorder<'_, '_> {
    type Error = BlankFault;

    numbers!(
        deserialize_u8 visit_u8 U8 u8, deserialize_u16 visit_u16 U16 u16, deserialize_u32 visit_u32 U32 u32,
        deserialize_u64 visit_u64 U64 u64, deserialize_u128 visit_u128 U128 u128,
        deserialize_i8 visit_i8 I8 i8, deserialize_i16 visit_i16 I16 i16, deserialize_i32 visit_i32 I32 i32,
        deserialize_i64 visit_i64 I64 i64, deserialize_i128 visit_i128 I128 i128
    );

    fn deserialize_bool<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a bool", Shape::Bool)?;
        visitor.visit_bool(self.bit())
    }

    fn deserialize_f32<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a number", Shape::F32)?;
        visitor.visit_f32(if self.bit() { 1.0 } else { 0.0 })
    }

    fn deserialize_f64<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a number", Shape::F64)?;
        visitor.visit_f64(if self.bit() { 1.0 } else { 0.0 })
    }

    fn deserialize_char<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a char", Shape::Text(String::new()))?;
        visitor.visit_char('a')
    }

    fn deserialize_str<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("text", Shape::Text(String::new()))?;
        visitor.visit_str(self.text())
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a byte string", Shape::Bytes)?;
        visitor.visit_byte_buf(self.bytes())
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_unit<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a unit", Shape::None)?;
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        if self.is_row {
            self.blanks.fields = Some(&[]);
        }
        self.found(Shape::None);
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_option<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("an Option", Shape::None)?;
        if !self.holds() {
            return visitor.visit_none();
        }
        let mut inner = Shape::Unknown;
        let recorder = Recorder {
            blanks: self.blanks,
            kind: self.kind,
            is_row: false,
            depth: self.depth + 1,
            shape: Some(&mut inner),
        };
        let value = visitor.visit_some(recorder)?;
        self.shape.into_iter().for_each(|place| *place = Shape::Some(Box::new(inner.clone())));
        Ok(value)
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, BlankFault> {
        self.scalar("a list", Shape::List(None))?;
        self.list(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        mut self,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        self.scalar("a tuple", Shape::Unknown)?;
        self.tuple(length, visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        self.deserialize_tuple(length, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        match self.kind() {
            _ if self.is_row => self.map_by_columns(visitor),
            // A struct with `flatten` does not list its fields.
            Some(ColumnType::Tuple(parts)) => self.tuple_by_names(parts, visitor),
            _ => self.pairs(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        self.fields(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        self.scalar("an enum", Shape::Unknown)?;
        self.blanks.variants = self.blanks.variants.max(variants.len());
        let first = if let Style::Filled { variant } = self.blanks.style { variant } else { 0 };
        let taken = self.blanks.choose(variants.len()) + first;
        match variants.get(taken % variants.len().max(1)) {
            Some(variant) => visitor.visit_enum(Variant(self, variant)),
            None => Err(BlankFault::Refused),
        }
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        self.anything(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        self.anything(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, BlankFault> {
        visitor.visit_unit()
    }
}
