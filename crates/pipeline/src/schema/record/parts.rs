//! The parts of blank values: fields, items, variants.

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};

use super::value::Recorder;
use super::{BlankFault, Blanks};
use crate::schema::shape::Shape;
use crate::schema::{ColumnType, Part};

/// The fields of a struct, by name.
pub(super) struct Given<'r, 'a> {
    pub(super) blanks: &'r mut Blanks<'a>,
    pub(super) depth: usize,
    pub(super) parts: &'a [Part],
    pub(super) fields: &'static [&'static str],
    pub(super) names: &'r [&'static str],
    pub(super) next: usize,
    pub(super) shapes: &'r mut [Shape],
    pub(super) is_row: bool,
}

impl<'de> de::MapAccess<'de> for Given<'_, '_> {
    type Error = BlankFault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, BlankFault> {
        let Some(name) = self.names.get(self.next).copied() else { return Ok(None) };
        self.blanks.given = Some((self.fields, name));
        if self.is_row {
            self.blanks.field = Some(name);
        }
        seed.deserialize(BorrowedStrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, BlankFault> {
        let name = self.names[self.next];
        let kind = self.parts.iter().find(|part| part.name == name).map(|part| &part.kind);
        let mut shape = Shape::Unknown;
        let recorder = Recorder {
            blanks: &mut *self.blanks,
            kind,
            is_row: false,
            depth: self.depth,
            shape: Some(&mut shape),
        };
        let value = seed.deserialize(recorder)?;
        self.shapes[self.next] = shape.clone();
        if self.is_row && self.blanks.only.is_some() {
            self.blanks.shape = Some(shape);
        }
        self.next += 1;
        Ok(value)
    }
}

/// Values by the names of columns or parts, for types that do not list their fields.
pub(super) struct ByName<'r, 'a> {
    pub(super) blanks: &'r mut Blanks<'a>,
    pub(super) depth: usize,
    pub(super) names: Vec<(String, Option<&'a ColumnType>)>,
    pub(super) next: usize,
}

impl<'de> de::MapAccess<'de> for ByName<'_, '_> {
    type Error = BlankFault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, BlankFault> {
        match self.names.get(self.next) {
            Some((name, _)) => seed.deserialize(name.as_str().into_deserializer()).map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, BlankFault> {
        let (name, kind) = &self.names[self.next];
        if !self.blanks.any.contains(name) {
            self.blanks.any.push(name.clone());
        }
        self.next += 1;
        seed.deserialize(Recorder {
            blanks: &mut *self.blanks,
            kind: *kind,
            is_row: false,
            depth: self.depth,
            shape: None,
        })
    }
}

/// Items in order.
pub(super) struct Elements<'r, 'a, 's> {
    pub(super) blanks: &'r mut Blanks<'a>,
    pub(super) depth: usize,
    pub(super) kinds: Vec<Option<&'a ColumnType>>,
    pub(super) next: usize,
    pub(super) shapes: Vec<&'s mut Shape>,
}

impl Elements<'_, '_, '_> {
    fn take<'de, S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, BlankFault> {
        let kind = self.kinds[self.next];
        let mut shape = Shape::Unknown;
        let recorder = Recorder {
            blanks: &mut *self.blanks,
            kind,
            is_row: false,
            depth: self.depth,
            shape: Some(&mut shape),
        };
        let value = seed.deserialize(recorder)?;
        if let Some(place) = self.shapes.get_mut(self.next) {
            **place = shape;
        }
        self.next += 1;
        Ok(value)
    }
}

impl<'de> de::SeqAccess<'de> for Elements<'_, '_, '_> {
    type Error = BlankFault;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, BlankFault> {
        if self.next < self.kinds.len() { self.take(seed).map(Some) } else { Ok(None) }
    }
}

impl<'de> de::MapAccess<'de> for Elements<'_, '_, '_> {
    type Error = BlankFault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, BlankFault> {
        if self.next < self.kinds.len() { self.take(seed).map(Some) } else { Ok(None) }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, BlankFault> {
        self.take(seed)
    }
}

/// One variant of an enum.
pub(super) struct Variant<'r, 'a>(pub(super) Recorder<'r, 'a>, pub(super) &'static str);

impl<'de, 'r, 'a> de::EnumAccess<'de> for Variant<'r, 'a> {
    type Error = BlankFault;
    type Variant = Recorder<'r, 'a>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), BlankFault> {
        Ok((seed.deserialize(BorrowedStrDeserializer::new(self.1))?, self.0))
    }
}

impl<'de> de::VariantAccess<'de> for Recorder<'_, '_> {
    type Error = BlankFault;

    fn unit_variant(self) -> Result<(), BlankFault> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, BlankFault> {
        seed.deserialize(Recorder { shape: None, ..self })
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, BlankFault> {
        Recorder { shape: None, ..self }.tuple(length, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, BlankFault> {
        Recorder { shape: None, ..self }.fields(fields, visitor)
    }
}
