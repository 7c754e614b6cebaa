//! Serializers for a whole row and for the names of its fields. Each accepts one kind of value and refuses all
//! others.

use serde::Serialize;
use serde::ser::{self, Impossible};

use super::compound::Named;
use super::fault::{Reason, ValueFault};
use super::values::Values;
use crate::schema::Part;

/// The columns that a row is written to.
pub(super) struct RowCells<'a> {
    pub(super) parts: &'a [Part],
    pub(super) values: &'a mut [Values],
    /// The number of finished rows.
    pub(super) rows: usize,
}

impl<'a> RowCells<'a> {
    #[cold]
    fn refusal(self, found: &'static str) -> ValueFault {
        ValueFault::new(Reason::NoStruct { found })
    }

    #[inline]
    fn fields(self) -> Named<'a> {
        Named::new(self.parts, self.values, Some(self.rows))
    }
}

/// Reads a field's name that comes as a map's key, and returns the index of its column.
pub(super) struct Key<'a, 'b>(pub(super) &'a mut Named<'b>);

impl Key<'_, '_> {
    #[cold]
    fn refusal(self, _: &'static str) -> ValueFault {
        ValueFault::new(Reason::Key)
    }
}

/// Refuses values that are neither text nor a field.
macro_rules! refused {
    ($($method:ident($($type:ty),*)),*) => {
        $(fn $method(self, $(_: $type),*) -> Result<Self::Ok, ValueFault> {
            Err(self.refusal("a single value"))
        })*
    };
}

/// Makes a serializer refuse scalars, because it accepts another kind of value.
macro_rules! refused_scalars {
    () => {
        refused!(
            serialize_bool(bool),
            serialize_u8(u8),
            serialize_u16(u16),
            serialize_u32(u32),
            serialize_u64(u64),
            serialize_u128(u128),
            serialize_i8(i8),
            serialize_i16(i16),
            serialize_i32(i32),
            serialize_i64(i64),
            serialize_i128(i128),
            serialize_f32(f32),
            serialize_f64(f64),
            serialize_char(char),
            serialize_bytes(&[u8]),
            serialize_none(),
            serialize_unit()
        );

        type SerializeSeq = Impossible<Self::Ok, ValueFault>;
        type SerializeTuple = Impossible<Self::Ok, ValueFault>;
        type SerializeTupleStruct = Impossible<Self::Ok, ValueFault>;
        type SerializeTupleVariant = Impossible<Self::Ok, ValueFault>;
        type SerializeStructVariant = Impossible<Self::Ok, ValueFault>;

        fn serialize_newtype_struct<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            value: &T,
        ) -> Result<Self::Ok, ValueFault> {
            value.serialize(self)
        }

        fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Self::Ok, ValueFault> {
            value.serialize(self)
        }

        fn serialize_newtype_variant<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: &T,
        ) -> Result<Self::Ok, ValueFault> {
            Err(self.refusal("an enum"))
        }

        fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, ValueFault> {
            Err(self.refusal("a list"))
        }

        fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, ValueFault> {
            Err(self.refusal("a tuple"))
        }

        fn serialize_tuple_struct(
            self,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeTupleStruct, ValueFault> {
            Err(self.refusal("a tuple"))
        }

        fn serialize_tuple_variant(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeTupleVariant, ValueFault> {
            Err(self.refusal("an enum"))
        }

        fn serialize_struct_variant(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeStructVariant, ValueFault> {
            Err(self.refusal("an enum"))
        }

        fn is_human_readable(&self) -> bool {
            true
        }
    };
}

impl<'a> ser::Serializer for RowCells<'a> {
    type Ok = ();
    type Error = ValueFault;
    type SerializeMap = Named<'a>;
    type SerializeStruct = Named<'a>;

    refused_scalars!();

    fn serialize_str(self, _: &str) -> Result<(), ValueFault> {
        Err(self.refusal("text"))
    }

    /// A row without columns.
    fn serialize_unit_struct(self, _: &'static str) -> Result<(), ValueFault> {
        self.fields().close()
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<(), ValueFault> {
        Err(self.refusal("an enum"))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Named<'a>, ValueFault> {
        Ok(self.fields())
    }

    #[inline]
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Named<'a>, ValueFault> {
        Ok(self.fields())
    }
}

impl ser::Serializer for Key<'_, '_> {
    type Ok = usize;
    type Error = ValueFault;
    type SerializeMap = Impossible<usize, ValueFault>;
    type SerializeStruct = Impossible<usize, ValueFault>;

    refused_scalars!();

    fn serialize_str(self, name: &str) -> Result<usize, ValueFault> {
        self.0.find(name)
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<usize, ValueFault> {
        Err(self.refusal("a unit"))
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
    ) -> Result<usize, ValueFault> {
        self.serialize_str(name)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, ValueFault> {
        Err(self.refusal("a map"))
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeStruct, ValueFault> {
        Err(self.refusal("a struct"))
    }
}
