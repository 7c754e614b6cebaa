//! Rows as RowBinary: the very bytes that ClickHouse ingests
//! (<https://clickhouse.com/docs/interfaces/formats/RowBinary>).
//!
//! A serde serializer that appends to a buffer. Fixed-width values are little-endian, strings and arrays carry a
//! varint length, an option is a byte (1 = NULL) and then its value. It has no idea of the table:
//! [`schema::check`](crate::check) has already compared the row type with the columns.

use serde::Serialize;
use serde::ser::{self, Impossible};

/// A value that RowBinary cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeFault {
    /// A serde type without a ClickHouse counterpart.
    #[error("a {0} has no RowBinary form")]
    Unsupported(&'static str),
    /// A sequence or map that does not know its length ahead.
    #[error("a sequence must know its length")]
    UnknownLength,
    /// A type's own `Serialize` refused.
    #[error("{0}")]
    Refused(String),
}

impl ser::Error for EncodeFault {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self::Refused(message.to_string())
    }
}

/// Appends `row` to `out`. On an error `out` is as it was.
///
/// # Errors
/// [`EncodeFault`], for values that the checked schema cannot rule out (a `Serialize` of the user's own that fails).
pub fn write_row<R: Serialize + ?Sized>(row: &R, out: &mut Vec<u8>) -> Result<(), EncodeFault> {
    let start = out.len();
    row.serialize(RowWriter { out: &mut *out }).inspect_err(|_| out.truncate(start))
}

/// Appends an LEB128 number, as lengths are written.
pub fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a String column's value.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    write_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

struct RowWriter<'a> {
    out: &'a mut Vec<u8>,
}

impl RowWriter<'_> {
    fn again(&mut self) -> RowWriter<'_> {
        RowWriter { out: self.out }
    }

    fn length(&mut self, length: Option<usize>) -> Result<(), EncodeFault> {
        write_varint(self.out, length.ok_or(EncodeFault::UnknownLength)? as u64);
        Ok(())
    }
}

macro_rules! little_endian {
    ($($method:ident $type:ty),*) => {
        $(fn $method(self, value: $type) -> Result<(), EncodeFault> {
            self.out.extend_from_slice(&value.to_le_bytes());
            Ok(())
        })*
    };
}

impl<'a> ser::Serializer for RowWriter<'a> {
    type Ok = ();
    type Error = EncodeFault;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Impossible<(), EncodeFault>;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Impossible<(), EncodeFault>;

    little_endian!(
        serialize_u8 u8, serialize_u16 u16, serialize_u32 u32, serialize_u64 u64, serialize_u128 u128,
        serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64, serialize_i128 i128,
        serialize_f32 f32, serialize_f64 f64
    );

    fn serialize_bool(self, value: bool) -> Result<(), EncodeFault> {
        self.serialize_u8(u8::from(value))
    }

    fn serialize_char(self, _: char) -> Result<(), EncodeFault> {
        Err(EncodeFault::Unsupported("char"))
    }

    fn serialize_str(self, value: &str) -> Result<(), EncodeFault> {
        write_string(self.out, value);
        Ok(())
    }

    fn serialize_bytes(mut self, value: &[u8]) -> Result<(), EncodeFault> {
        self.length(Some(value.len()))?;
        self.out.extend_from_slice(value);
        Ok(())
    }

    fn serialize_none(self) -> Result<(), EncodeFault> {
        self.serialize_u8(1)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), EncodeFault> {
        self.out.push(0);
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), EncodeFault> {
        Err(EncodeFault::Unsupported("unit"))
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), EncodeFault> {
        Ok(()) // a row type without columns
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<(), EncodeFault> {
        Err(EncodeFault::Unsupported("enum"))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), EncodeFault> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<(), EncodeFault> {
        Err(EncodeFault::Unsupported("enum"))
    }

    fn serialize_seq(mut self, length: Option<usize>) -> Result<Self, EncodeFault> {
        self.length(length)?;
        Ok(self)
    }

    fn serialize_tuple(self, _: usize) -> Result<Self, EncodeFault> {
        Ok(self)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self, EncodeFault> {
        Ok(self)
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, EncodeFault> {
        Err(EncodeFault::Unsupported("enum"))
    }

    fn serialize_map(mut self, length: Option<usize>) -> Result<Self, EncodeFault> {
        self.length(length)?;
        Ok(self)
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self, EncodeFault> {
        Ok(self)
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, EncodeFault> {
        Err(EncodeFault::Unsupported("enum"))
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}

macro_rules! plain_compound {
    ($($trait:ident $method:ident),*) => {
        $(impl ser::$trait for RowWriter<'_> {
            type Ok = ();
            type Error = EncodeFault;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), EncodeFault> {
                value.serialize(self.again())
            }

            fn end(self) -> Result<(), EncodeFault> {
                Ok(())
            }
        })*
    };
}

plain_compound!(SerializeSeq serialize_element, SerializeTuple serialize_element, SerializeTupleStruct serialize_field);

impl ser::SerializeMap for RowWriter<'_> {
    type Ok = ();
    type Error = EncodeFault;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), EncodeFault> {
        key.serialize(self.again())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), EncodeFault> {
        value.serialize(self.again())
    }

    fn end(self) -> Result<(), EncodeFault> {
        Ok(())
    }
}

impl ser::SerializeStruct for RowWriter<'_> {
    type Ok = ();
    type Error = EncodeFault;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        _: &'static str,
        value: &T,
    ) -> Result<(), EncodeFault> {
        value.serialize(self.again())
    }

    fn end(self) -> Result<(), EncodeFault> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Everything {
        flag: bool,
        small: u8,
        wide: u128,
        signed: i16,
        real: f64,
        text: &'static str,
        list: Vec<u16>,
        none: Option<u32>,
        some: Option<u32>,
        pair: (u8, u8),
        fixed: [u8; 3],
    }

    #[test]
    fn a_row_is_its_fields_in_order() {
        let row = Everything {
            flag: true,
            small: 7,
            wide: 1 << 64,
            signed: -2,
            real: 1.5,
            text: "hé",
            list: vec![1, 0x0203],
            none: None,
            some: Some(9),
            pair: (4, 5),
            fixed: *b"abc",
        };
        let mut out = vec![0xEE];
        write_row(&row, &mut out).expect("encodes");
        let mut want = vec![0xEE, 1, 7];
        want.extend([0; 8]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([0xFE, 0xFF]);
        want.extend(1.5f64.to_le_bytes());
        want.extend([3, b'h', 0xC3, 0xA9]);
        want.extend([2, 1, 0, 3, 2]);
        want.extend([1, 0, 9, 0, 0, 0, 4, 5, b'a', b'b', b'c']);
        assert_eq!(out, want);
    }

    #[test]
    fn a_row_that_cannot_be_encoded_leaves_nothing() {
        #[derive(Serialize)]
        struct Late {
            first: u64,
            second: char,
        }
        let mut out = vec![1, 2];
        let fault = write_row(&Late { first: 1, second: 'x' }, &mut out);
        assert_eq!((fault, out), (Err(EncodeFault::Unsupported("char")), vec![1, 2]));
    }

    #[test]
    fn lengths_are_leb128() {
        for (value, bytes) in [(0, &[0u8][..]), (127, &[127]), (128, &[0x80, 1]), (300, &[0xAC, 2])] {
            let mut out = Vec::new();
            write_varint(&mut out, value);
            assert_eq!(out, bytes);
        }
    }
}
