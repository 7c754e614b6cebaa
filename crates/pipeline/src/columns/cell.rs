//! A serializer for one value of one column.

use std::fmt::{self, Display, Write as _};

use serde::Serialize;
use serde::ser::{self, Impossible};

use super::compound::{Entries, Named, Sequence};
use super::fault::ValueFault;
use super::scalar;
use super::values::Values;
use super::wide::Wide;
use crate::schema::{ColumnType, Int};

/// The place that one value is written to.
pub(super) struct Cell<'a> {
    pub(super) kind: &'a ColumnType,
    pub(super) values: &'a mut Values,
}

impl<'a> Cell<'a> {
    /// The place of a present value: inside `LowCardinality` and `Nullable`.
    #[inline]
    pub(super) fn open(self) -> Self {
        let Self { mut kind, mut values } = self;
        loop {
            match (kind, values) {
                (ColumnType::LowCardinality(held), same) => (kind, values) = (held, same),
                (ColumnType::Nullable(held), Values::Nullable { nulls, values: inner }) => {
                    nulls.push(0);
                    (kind, values) = (held, inner);
                }
                (kind, values) => return Self { kind, values },
            }
        }
    }

    #[inline(never)]
    fn put_whole(self, number: Wide, text: &dyn Display) -> Result<(), ValueFault> {
        let Self { kind, values } = self.open();
        scalar::put_whole(kind, values, number, text)
    }

    #[inline(never)]
    fn put_none(self) -> Result<(), ValueFault> {
        match self.kind.plain() {
            ColumnType::Nullable(_) => {
                self.values.push_blank(self.kind);
                Ok(())
            }
            _ => Err(ValueFault::null(self.kind)),
        }
    }

    fn refuse<T>(self, found: impl Into<String>) -> Result<T, ValueFault> {
        Err(ValueFault::kind(found, self.open().kind))
    }
}

/// Numbers of exactly the column's type take a fast path.
macro_rules! numbers {
    ($($method:ident $type:ty, $kind:pat, $as:ty);*) => {
        $(#[inline]
        fn $method(self, value: $type) -> Result<(), ValueFault> {
            if let ($kind, Values::Fixed { bytes, .. }) = (self.kind, &mut *self.values) {
                bytes.extend_from_slice(&value.to_le_bytes());
                return Ok(());
            }
            self.put_whole(Wide::from(<$as>::from(value)), &value)
        })*
    };
}

impl<'a> ser::Serializer for Cell<'a> {
    type Ok = ();
    type Error = ValueFault;
    type SerializeSeq = Sequence<'a>;
    type SerializeTuple = Sequence<'a>;
    type SerializeTupleStruct = Sequence<'a>;
    type SerializeTupleVariant = Impossible<(), ValueFault>;
    type SerializeMap = Entries<'a>;
    type SerializeStruct = Named<'a>;
    type SerializeStructVariant = Impossible<(), ValueFault>;

    numbers!(
        serialize_u8 u8, ColumnType::Int(Int::U8), u128;
        serialize_u16 u16, ColumnType::Int(Int::U16) | ColumnType::Date, u128;
        serialize_u32 u32, ColumnType::Int(Int::U32) | ColumnType::DateTime(_), u128;
        serialize_u64 u64, ColumnType::Int(Int::U64), u128;
        serialize_i8 i8, ColumnType::Int(Int::I8), i128;
        serialize_i16 i16, ColumnType::Int(Int::I16), i128;
        serialize_i32 i32, ColumnType::Int(Int::I32), i128;
        serialize_i64 i64, ColumnType::Int(Int::I64), i128;
        serialize_i128 i128, ColumnType::Int(Int::I128), i128
    );

    #[inline]
    fn serialize_u128(self, value: u128) -> Result<(), ValueFault> {
        if let (ColumnType::Int(Int::U128), Values::Fixed { bytes, .. }) = (self.kind, &mut *self.values) {
            bytes.extend_from_slice(&value.to_le_bytes());
            return Ok(());
        }
        let Self { kind, values } = self.open();
        scalar::put_u128(kind, values, value)
    }

    #[inline]
    fn serialize_f64(self, value: f64) -> Result<(), ValueFault> {
        if let (ColumnType::Float64, Values::Fixed { bytes, .. }) = (self.kind, &mut *self.values) {
            bytes.extend_from_slice(&value.to_le_bytes());
            return Ok(());
        }
        let Self { kind, values } = self.open();
        scalar::put_float(kind, values, value)
    }

    #[inline]
    fn serialize_f32(self, value: f32) -> Result<(), ValueFault> {
        if let (ColumnType::Float32, Values::Fixed { bytes, .. }) = (self.kind, &mut *self.values) {
            bytes.extend_from_slice(&value.to_le_bytes());
            return Ok(());
        }
        let Self { kind, values } = self.open();
        scalar::put_float(kind, values, f64::from(value))
    }

    fn serialize_bool(self, value: bool) -> Result<(), ValueFault> {
        let Self { kind, values } = self.open();
        scalar::put_bool(kind, values, value)
    }

    fn serialize_char(self, value: char) -> Result<(), ValueFault> {
        self.serialize_str(value.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, value: &str) -> Result<(), ValueFault> {
        let Self { kind, values } = self.open();
        scalar::put_text(kind, values, value)
    }

    /// Values such as dates and addresses are formatted here, without a `String`.
    fn collect_str<T: Display + ?Sized>(self, value: &T) -> Result<(), ValueFault> {
        let mut text = ShortText { bytes: [0; 96], length: 0 };
        if write!(text, "{value}").is_ok()
            && let Ok(text) = std::str::from_utf8(&text.bytes[..text.length])
        {
            return self.serialize_str(text);
        }
        let mut text = String::new();
        write!(text, "{value}").map_err(ser::Error::custom)?;
        self.serialize_str(&text)
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<(), ValueFault> {
        let Self { kind, values } = self.open();
        match (kind, values) {
            (ColumnType::Array(held), Values::Array { ends, items })
                if **held == ColumnType::Int(Int::U8) =>
            {
                if let Values::Fixed { bytes, .. } = &mut **items {
                    bytes.extend_from_slice(value);
                    ends.push(bytes.len() as u64);
                }
                Ok(())
            }
            (kind, values) => scalar::put_bytes(kind, values, value),
        }
    }

    fn serialize_none(self) -> Result<(), ValueFault> {
        self.put_none()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), ValueFault> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), ValueFault> {
        self.put_none()
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), ValueFault> {
        self.put_none()
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
    ) -> Result<(), ValueFault> {
        self.serialize_str(variant)
    }

    #[inline]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), ValueFault> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: &T,
    ) -> Result<(), ValueFault> {
        self.refuse(variant_with_fields(variant))
    }

    fn serialize_seq(self, length: Option<usize>) -> Result<Sequence<'a>, ValueFault> {
        Sequence::begin(self.open(), length)
    }

    fn serialize_tuple(self, length: usize) -> Result<Sequence<'a>, ValueFault> {
        Sequence::begin(self.open(), Some(length))
    }

    fn serialize_tuple_struct(self, _: &'static str, length: usize) -> Result<Sequence<'a>, ValueFault> {
        Sequence::begin(self.open(), Some(length))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, ValueFault> {
        self.refuse(variant_with_fields(variant))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Entries<'a>, ValueFault> {
        Entries::begin(self.open())
    }

    fn serialize_struct(self, name: &'static str, _: usize) -> Result<Named<'a>, ValueFault> {
        match self.open() {
            Cell { kind: ColumnType::Tuple(parts), values: Values::Tuple(values) }
                if parts.iter().all(|part| !part.name.is_empty()) =>
            {
                Ok(Named::new(parts, values, None))
            }
            Cell { kind, .. } => Err(ValueFault::kind(format!("the struct `{name}`"), kind)),
        }
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, ValueFault> {
        self.refuse(variant_with_fields(variant))
    }

    /// Types with a text form write it, because columns parse text.
    fn is_human_readable(&self) -> bool {
        true
    }
}

fn variant_with_fields(variant: &str) -> String {
    format!("the enum variant `{variant}` with fields")
}

/// A text buffer on the stack.
struct ShortText {
    bytes: [u8; 96],
    length: usize,
}

impl fmt::Write for ShortText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let place = self.bytes.get_mut(self.length..self.length + text.len()).ok_or(fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}
