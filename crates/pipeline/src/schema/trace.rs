//! Reads the shape of a value from what its `Serialize` really writes.

use std::fmt;

use serde::Serialize;
use serde::ser;

use super::kind::Int;
use super::shape::Shape;

/// The shape of a value; [`Shape::Unknown`] if its `Serialize` fails.
pub(super) fn shape_of<T: Serialize + ?Sized>(value: &T) -> Shape {
    value.serialize(Tracer).unwrap_or(Shape::Unknown)
}

/// The error of a value whose own `Serialize` failed.
#[derive(Debug)]
pub(super) struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for Refused {}

impl ser::Error for Refused {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

#[derive(Clone, Copy)]
struct Tracer;

/// The parts of a value so far.
struct Parts {
    items: Vec<Shape>,
    names: Vec<String>,
    form: Form,
}

enum Form {
    List,
    Tuple,
    Struct,
    Map,
    /// A variant of an enum that fits no column, whatever it holds.
    Variant(&'static str),
}

impl Parts {
    fn new(form: Form) -> Result<Self, Refused> {
        Ok(Self { items: Vec::new(), names: Vec::new(), form })
    }

    fn close(mut self) -> Shape {
        match self.form {
            Form::List => Shape::List(self.items.pop().map(Box::new)),
            Form::Tuple => Shape::Tuple(self.items),
            Form::Variant(name) => Shape::Fields(name.to_owned()),
            Form::Struct => Shape::Struct(self.names.into_iter().zip(self.items).collect()),
            Form::Map => {
                let mut items = self.items.into_iter();
                Shape::Map(std::iter::from_fn(|| items.next().zip(items.next())).collect())
            }
        }
    }
}

macro_rules! ints {
    ($($method:ident $type:ty, $int:ident);*) => {
        $(fn $method(self, _: $type) -> Result<Shape, Refused> {
            Ok(Shape::Int(Int::$int))
        })*
    };
}

impl ser::Serializer for Tracer {
    type Ok = Shape;
    type Error = Refused;
    type SerializeSeq = Parts;
    type SerializeTuple = Parts;
    type SerializeTupleStruct = Parts;
    type SerializeTupleVariant = Parts;
    type SerializeMap = Parts;
    type SerializeStruct = Parts;
    type SerializeStructVariant = Parts;

    ints!(
        serialize_u8 u8, U8; serialize_u16 u16, U16; serialize_u32 u32, U32; serialize_u64 u64, U64;
        serialize_u128 u128, U128; serialize_i8 i8, I8; serialize_i16 i16, I16; serialize_i32 i32, I32;
        serialize_i64 i64, I64; serialize_i128 i128, I128
    );

    fn serialize_bool(self, _: bool) -> Result<Shape, Refused> {
        Ok(Shape::Bool)
    }

    fn serialize_f32(self, _: f32) -> Result<Shape, Refused> {
        Ok(Shape::F32)
    }

    fn serialize_f64(self, _: f64) -> Result<Shape, Refused> {
        Ok(Shape::F64)
    }

    fn serialize_char(self, value: char) -> Result<Shape, Refused> {
        Ok(Shape::Text(value.to_string()))
    }

    fn serialize_str(self, value: &str) -> Result<Shape, Refused> {
        Ok(Shape::Text(value.to_owned()))
    }

    fn serialize_bytes(self, _: &[u8]) -> Result<Shape, Refused> {
        Ok(Shape::Bytes)
    }

    fn serialize_none(self) -> Result<Shape, Refused> {
        Ok(Shape::None)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Shape, Refused> {
        Ok(Shape::Some(Box::new(value.serialize(self)?)))
    }

    fn serialize_unit(self) -> Result<Shape, Refused> {
        Ok(Shape::None)
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<Shape, Refused> {
        Ok(Shape::None)
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, name: &'static str) -> Result<Shape, Refused> {
        Ok(Shape::Variant(name.to_owned()))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<Shape, Refused> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
        _: &T,
    ) -> Result<Shape, Refused> {
        Ok(Shape::Fields(name.to_owned()))
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Parts, Refused> {
        Parts::new(Form::List)
    }

    fn serialize_tuple(self, _: usize) -> Result<Parts, Refused> {
        Parts::new(Form::Tuple)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Parts, Refused> {
        Parts::new(Form::Tuple)
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
        _: usize,
    ) -> Result<Parts, Refused> {
        Parts::new(Form::Variant(name))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Parts, Refused> {
        Parts::new(Form::Map)
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Parts, Refused> {
        Parts::new(Form::Struct)
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
        _: usize,
    ) -> Result<Parts, Refused> {
        Parts::new(Form::Variant(name))
    }

    fn is_human_readable(&self) -> bool {
        true
    }
}

macro_rules! parts {
    ($($trait:ident $method:ident),*) => {
        $(impl ser::$trait for Parts {
            type Ok = Shape;
            type Error = Refused;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
                self.items.push(shape_of(value));
                Ok(())
            }

            fn end(self) -> Result<Shape, Refused> {
                Ok(self.close())
            }
        })*
    };
}

parts!(
    SerializeSeq serialize_element, SerializeTuple serialize_element, SerializeTupleStruct serialize_field,
    SerializeTupleVariant serialize_field
);

macro_rules! named_parts {
    ($($trait:ident),*) => {
        $(impl ser::$trait for Parts {
            type Ok = Shape;
            type Error = Refused;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), Refused> {
                self.names.push(name.to_owned());
                self.items.push(shape_of(value));
                Ok(())
            }

            fn end(self) -> Result<Shape, Refused> {
                Ok(self.close())
            }
        })*
    };
}

named_parts!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for Parts {
    type Ok = Shape;
    type Error = Refused;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Refused> {
        self.items.push(shape_of(key));
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
        self.items.push(shape_of(value));
        Ok(())
    }

    fn end(self) -> Result<Shape, Refused> {
        Ok(self.close())
    }
}
