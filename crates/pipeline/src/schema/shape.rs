//! A Rust type's shape on the wire, read off its `Deserialize` by handing it blanks and recording what it asks for.

use std::fmt;

use serde::de::{self, DeserializeOwned, DeserializeSeed, Visitor};

/// What a field writes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the Rust types of the same name")]
pub enum Shape {
    Bool,
    U8,
    U16,
    U32,
    U64,
    U128,
    I8,
    I16,
    I32,
    I64,
    I128,
    F32,
    F64,
    /// `String`.
    Text,
    /// `Vec<T>`.
    List(Box<Shape>),
    /// `Option<T>`.
    Optional(Box<Shape>),
    /// A tuple, an array of fixed length, or a nested struct.
    Tuple(Vec<Shape>),
    /// `HashMap<K, V>` or `BTreeMap<K, V>`.
    Map(Box<Shape>, Box<Shape>),
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("String"),
            Self::List(inner) => write!(f, "Vec<{inner}>"),
            Self::Optional(inner) => write!(f, "Option<{inner}>"),
            Self::Map(key, value) => write!(f, "HashMap<{key}, {value}>"),
            Self::Tuple(parts) if parts.len() > 1 && parts.windows(2).all(|pair| pair[0] == pair[1]) => {
                write!(f, "[{}; {}]", parts[0], parts.len())
            }
            Self::Tuple(parts) => {
                let parts: Vec<String> = parts.iter().map(Self::to_string).collect();
                write!(f, "({})", parts.join(", "))
            }
            plain => f.write_str(&format!("{plain:?}").to_lowercase()),
        }
    }
}

/// A type whose shape cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeFault {
    /// The row is something else than a struct with named fields.
    #[error("a row is a struct with named fields")]
    NotAStruct,
    /// A serde type without a counterpart among columns.
    #[error("a {0} has no column type")]
    Unsupported(&'static str),
    /// The type's own `Deserialize` refused a blank value.
    #[error("its Deserialize refused a blank value: {0}")]
    Refused(String),
}

impl de::Error for ShapeFault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Refused(message.to_string())
    }
}

/// The fields of a row type in order, with their shapes.
///
/// # Errors
/// [`ShapeFault`] when it is no struct or holds what no column takes.
pub fn fields_of<R: DeserializeOwned>() -> Result<Vec<(&'static str, Shape)>, ShapeFault> {
    let mut recorder = Recorder { names: None, shape: None, outermost: true };
    R::deserialize(&mut recorder)?;
    match (recorder.names, recorder.shape) {
        (Some(names), Some(Shape::Tuple(shapes))) => Ok(names.iter().copied().zip(shapes).collect()),
        _ => Err(ShapeFault::NotAStruct),
    }
}

struct Recorder {
    names: Option<&'static [&'static str]>,
    shape: Option<Shape>,
    outermost: bool,
}

impl Recorder {
    fn inner() -> Self {
        Self { names: None, shape: None, outermost: false }
    }
}

/// Shapes of the elements that a visitor asked for, each given a blank.
struct Elements {
    left: usize,
    seen: Vec<Shape>,
}

impl Elements {
    fn take<'de, S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ShapeFault> {
        let mut recorder = Recorder::inner();
        let value = seed.deserialize(&mut recorder)?;
        self.left -= 1;
        self.seen.push(recorder.shape.ok_or(ShapeFault::Unsupported("unit"))?);
        Ok(value)
    }
}

impl<'de> de::SeqAccess<'de> for &mut Elements {
    type Error = ShapeFault;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, ShapeFault> {
        if self.left == 0 { Ok(None) } else { self.take(seed).map(Some) }
    }
}

impl<'de> de::MapAccess<'de> for &mut Elements {
    type Error = ShapeFault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ShapeFault> {
        if self.left == 0 { Ok(None) } else { self.take(seed).map(Some) }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ShapeFault> {
        self.take(seed)
    }
}

macro_rules! blanks {
    ($($method:ident $visit:ident $shape:ident $blank:expr),*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeFault> {
            self.shape = Some(Shape::$shape);
            visitor.$visit($blank)
        })*
    };
}

macro_rules! unsupported {
    ($($method:ident $what:literal),*) => {
        $(fn $method<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ShapeFault> {
            Err(ShapeFault::Unsupported($what))
        })*
    };
}

impl<'de> de::Deserializer<'de> for &mut Recorder {
    type Error = ShapeFault;

    blanks!(
        deserialize_bool visit_bool Bool false, deserialize_str visit_str Text "", deserialize_string visit_str Text "",
        deserialize_u8 visit_u8 U8 0, deserialize_u16 visit_u16 U16 0, deserialize_u32 visit_u32 U32 0,
        deserialize_u64 visit_u64 U64 0, deserialize_u128 visit_u128 U128 0,
        deserialize_i8 visit_i8 I8 0, deserialize_i16 visit_i16 I16 0, deserialize_i32 visit_i32 I32 0,
        deserialize_i64 visit_i64 I64 0, deserialize_i128 visit_i128 I128 0,
        deserialize_f32 visit_f32 F32 0.0, deserialize_f64 visit_f64 F64 0.0
    );

    unsupported!(
        deserialize_char "char", deserialize_unit "unit", deserialize_bytes "byte string",
        deserialize_byte_buf "byte string", deserialize_any "self-describing value",
        deserialize_identifier "identifier", deserialize_ignored_any "ignored value"
    );

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeFault> {
        let mut inner = Recorder::inner();
        let value = visitor.visit_some(&mut inner)?;
        self.shape = inner.shape.map(|shape| Shape::Optional(Box::new(shape)));
        Ok(value)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeFault> {
        let mut elements = Elements { left: 1, seen: Vec::new() };
        let value = visitor.visit_seq(&mut elements)?;
        self.shape = elements.seen.pop().map(|shape| Shape::List(Box::new(shape)));
        Ok(value)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeFault> {
        let mut elements = Elements { left: 2, seen: Vec::new() };
        let value = visitor.visit_map(&mut elements)?;
        if let [key, value] = &elements.seen[..] {
            self.shape = Some(Shape::Map(Box::new(key.clone()), Box::new(value.clone())));
        }
        Ok(value)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, ShapeFault> {
        let mut elements = Elements { left: length, seen: Vec::new() };
        let value = visitor.visit_seq(&mut elements)?;
        self.shape = Some(Shape::Tuple(elements.seen));
        Ok(value)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, ShapeFault> {
        self.deserialize_tuple(length, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ShapeFault> {
        if self.outermost {
            self.names = Some(fields);
        }
        self.deserialize_tuple(fields.len(), visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ShapeFault> {
        if self.outermost {
            self.names = Some(&[]);
        }
        self.shape = Some(Shape::Tuple(Vec::new()));
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ShapeFault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, ShapeFault> {
        Err(ShapeFault::Unsupported("enum"))
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}
