//! The values of one column, in the form of the Native format.

use std::cell::Cell;
use std::ops::Range;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::schema::ColumnType;

/// The deepest nesting of values that are decoded from another process's bytes: twice what a schema can
/// declare.
const MAX_DEPTH: usize = 40;

/// The values of one column, or of one part of a column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub(crate) enum Values {
    /// Values of `width` bytes each.
    Fixed {
        width: u32,
        #[serde(with = "raw")]
        bytes: Vec<u8>,
    },
    /// Values of any length: the end of each, and all bytes.
    Texts {
        ends: Vec<u64>,
        #[serde(with = "raw")]
        bytes: Vec<u8>,
    },
    /// An `Array`, or a `Map` as an array of tuples: the end of each among the items.
    Array { ends: Vec<u64>, items: Box<Values> },
    /// One byte for each value (1 = NULL), and the values, blank where NULL.
    Nullable {
        #[serde(with = "raw")]
        nulls: Vec<u8>,
        values: Box<Values>,
    },
    /// The parts of a `Tuple`.
    Tuple(Vec<Values>),
}

// `remote = "Self"` makes the derived code inherent, so that this code can limit the depth of decoding.
impl Serialize for Values {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let _level = Level::enter().ok_or_else(|| serde::de::Error::custom("values are nested too deep"))?;
        Self::deserialize(deserializer)
    }
}

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// One level of nesting during decoding on this thread.
struct Level;

impl Level {
    fn enter() -> Option<Self> {
        let depth = DEPTH.get();
        (depth < MAX_DEPTH).then(|| {
            DEPTH.set(depth + 1);
            Self
        })
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Serializes byte vectors as one piece, not byte by byte.
mod raw {
    use std::fmt;

    use serde::de::{self, Deserializer, Visitor};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

impl Values {
    /// An empty column of this type, with capacity for `rows`.
    pub(crate) fn of(kind: &ColumnType, rows: usize) -> Self {
        if let Some(width) = kind.width() {
            return Self::Fixed { width: width as u32, bytes: Vec::with_capacity(width * rows) };
        }
        let inner = |kind| Box::new(Self::of(kind, 0));
        match kind {
            ColumnType::Array(held) => Self::Array { ends: Vec::with_capacity(rows), items: inner(held) },
            ColumnType::Map(pair) => {
                let items = Box::new(Self::Tuple(vec![Self::of(&pair.0, 0), Self::of(&pair.1, 0)]));
                Self::Array { ends: Vec::with_capacity(rows), items }
            }
            ColumnType::Nullable(held) => {
                Self::Nullable { nulls: Vec::with_capacity(rows), values: Box::new(Self::of(held, rows)) }
            }
            ColumnType::Tuple(parts) => {
                Self::Tuple(parts.iter().map(|part| Self::of(&part.kind, rows)).collect())
            }
            ColumnType::LowCardinality(held) => Self::of(held, rows),
            // Only `String` is left: the one type without a width.
            _ => Self::Texts { ends: Vec::with_capacity(rows), bytes: Vec::new() },
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Fixed { width, bytes } => bytes.len() / (*width).max(1) as usize,
            Self::Texts { ends, .. } | Self::Array { ends, .. } => ends.len(),
            Self::Nullable { nulls, .. } => nulls.len(),
            Self::Tuple(parts) => parts.first().map_or(0, Self::len),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Fixed { bytes, .. } => bytes.len(),
            Self::Texts { ends, bytes } => ends.len() * 8 + bytes.len(),
            Self::Array { ends, items } => ends.len() * 8 + items.bytes(),
            Self::Nullable { nulls, values } => nulls.len() + values.bytes(),
            Self::Tuple(parts) => parts.iter().map(Self::bytes).sum(),
        }
    }

    /// Removes all but the first `rows` values, and unfinished values.
    pub(crate) fn truncate(&mut self, rows: usize) {
        match self {
            Self::Fixed { width, bytes } => bytes.truncate(rows * *width as usize),
            Self::Texts { ends, bytes } => {
                ends.truncate(rows);
                bytes.truncate(last(ends));
            }
            Self::Array { ends, items } => {
                ends.truncate(rows);
                items.truncate(last(ends));
            }
            Self::Nullable { nulls, values } => {
                nulls.truncate(rows);
                values.truncate(rows);
            }
            Self::Tuple(parts) => parts.iter_mut().for_each(|part| part.truncate(rows)),
        }
    }

    /// Appends the values of `other`, which has the same type.
    pub(crate) fn append(&mut self, other: Self) {
        match (self, other) {
            (Self::Fixed { bytes, .. }, Self::Fixed { bytes: more, .. }) => join(bytes, more),
            (Self::Texts { ends, bytes }, Self::Texts { ends: more_ends, bytes: more }) => {
                join_ends(ends, more_ends, bytes.len() as u64);
                join(bytes, more);
            }
            (Self::Array { ends, items }, Self::Array { ends: more_ends, items: more }) => {
                join_ends(ends, more_ends, items.len() as u64);
                items.append(*more);
            }
            (Self::Nullable { nulls, values }, Self::Nullable { nulls: more_nulls, values: more }) => {
                join(nulls, more_nulls);
                values.append(*more);
            }
            (Self::Tuple(parts), Self::Tuple(more)) => {
                parts.iter_mut().zip(more).for_each(|(part, more)| part.append(more));
            }
            _ => debug_assert!(false, "values of two types are appended"),
        }
    }

    pub(crate) fn slice(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Fixed { width, bytes } => {
                let wide = *width as usize;
                Self::Fixed { width: *width, bytes: bytes[rows.start * wide..rows.end * wide].to_vec() }
            }
            Self::Texts { ends, bytes } => {
                let (ends, held) = slice_ends(ends, rows);
                Self::Texts { ends, bytes: bytes[held].to_vec() }
            }
            Self::Array { ends, items } => {
                let (ends, held) = slice_ends(ends, rows);
                Self::Array { ends, items: Box::new(items.slice(held)) }
            }
            Self::Nullable { nulls, values } => {
                Self::Nullable { nulls: nulls[rows.clone()].to_vec(), values: Box::new(values.slice(rows)) }
            }
            Self::Tuple(parts) => Self::Tuple(parts.iter().map(|part| part.slice(rows.clone())).collect()),
        }
    }

    /// The values at the positions in `order`, in that order.
    pub(crate) fn gather(&self, order: &[usize]) -> Self {
        match self {
            Self::Fixed { width, bytes } => {
                Self::Fixed { width: *width, bytes: gather_fixed(bytes, *width as usize, order) }
            }
            Self::Texts { ends, bytes } => {
                let mut gathered = Vec::with_capacity(bytes.len());
                let ends = order.iter().map(|&index| {
                    gathered.extend_from_slice(&bytes[range(ends, index)]);
                    gathered.len() as u64
                });
                Self::Texts { ends: ends.collect(), bytes: gathered }
            }
            Self::Array { ends, items } => {
                let mut gathered: Vec<usize> = Vec::new();
                let new_ends = order.iter().map(|&index| {
                    gathered.extend(range(ends, index));
                    gathered.len() as u64
                });
                Self::Array { ends: new_ends.collect(), items: Box::new(items.gather(&gathered)) }
            }
            Self::Nullable { nulls, values } => {
                let nulls = order.iter().map(|&index| nulls[index]).collect();
                Self::Nullable { nulls, values: Box::new(values.gather(order)) }
            }
            Self::Tuple(parts) => Self::Tuple(parts.iter().map(|part| part.gather(order)).collect()),
        }
    }

    /// Appends a blank: zero, empty, NULL, or the first value of an Enum.
    pub(crate) fn push_blank(&mut self, kind: &ColumnType) {
        match (self, kind.plain()) {
            (Self::Fixed { bytes, .. }, ColumnType::Enum(values)) => {
                let width = 1 + usize::from(values.wide);
                bytes.extend_from_slice(&values.first().to_le_bytes()[..width]);
            }
            (Self::Fixed { width, bytes }, _) => bytes.resize(bytes.len() + *width as usize, 0),
            (Self::Texts { ends, .. } | Self::Array { ends, .. }, _) => ends.push(last(ends) as u64),
            (Self::Nullable { nulls, values }, ColumnType::Nullable(held)) => {
                nulls.push(1);
                values.push_blank(held);
            }
            (Self::Tuple(values), ColumnType::Tuple(parts)) => {
                values.iter_mut().zip(parts).for_each(|(values, part)| values.push_blank(&part.kind));
            }
            _ => debug_assert!(false, "values of another type"),
        }
    }
}

/// The position of the value at `index`.
pub(crate) fn range(ends: &[u64], index: usize) -> Range<usize> {
    let start = if index == 0 { 0 } else { ends[index - 1] as usize };
    start..ends[index] as usize
}

/// The end of the last value.
pub(crate) fn last(ends: &[u64]) -> usize {
    ends.last().map_or(0, |end| *end as usize)
}

fn join(bytes: &mut Vec<u8>, more: Vec<u8>) {
    if bytes.is_empty() {
        *bytes = more;
    } else {
        bytes.extend_from_slice(&more);
    }
}

fn join_ends(ends: &mut Vec<u64>, more: Vec<u64>, base: u64) {
    if ends.is_empty() && base == 0 {
        *ends = more;
    } else {
        ends.extend(more.into_iter().map(|end| end + base));
    }
}

fn slice_ends(ends: &[u64], rows: Range<usize>) -> (Vec<u64>, Range<usize>) {
    let base = if rows.start == 0 { 0 } else { ends[rows.start - 1] };
    let ends: Vec<u64> = ends[rows].iter().map(|end| end - base).collect();
    let held = base as usize..base as usize + last(&ends);
    (ends, held)
}

fn gather_fixed(bytes: &[u8], width: usize, order: &[usize]) -> Vec<u8> {
    let mut gathered = Vec::with_capacity(order.len() * width);
    match width {
        1 => gathered.extend(order.iter().map(|&index| bytes[index])),
        4 => gather_words::<4>(bytes, order, &mut gathered),
        8 => gather_words::<8>(bytes, order, &mut gathered),
        16 => gather_words::<16>(bytes, order, &mut gathered),
        _ => order.iter().for_each(|&index| {
            gathered.extend_from_slice(&bytes[index * width..(index + 1) * width]);
        }),
    }
    gathered
}

/// With a constant width the compiler copies each value with one instruction.
fn gather_words<const WIDTH: usize>(bytes: &[u8], order: &[usize], gathered: &mut Vec<u8>) {
    let (words, _) = bytes.as_chunks::<WIDTH>();
    order.iter().for_each(|&index| gathered.extend_from_slice(&words[index]));
}
