//! Writes columns in the Native format.

use std::collections::HashMap;

use super::values::{Values, last, range};
use crate::native::{
    IndexWidth, begin_column, begin_dictionary, begin_low_cardinality, write_text, write_varint,
};
use crate::schema::{ColumnType, Part};

/// The most distinct values of a `LowCardinality` column in a block. A column with more is sent as the type
/// inside, which the server converts.
const MAX_KEYS: usize = 65_536;

/// Appends one column of the table: its name, its type, its values.
pub(super) fn write_column(name: &str, kind: &ColumnType, values: &Values, out: &mut Vec<u8>) {
    let mut dictionaries = Vec::new();
    if has_low_cardinality(kind) && !collect(kind, values, &mut dictionaries) {
        let plain = without_low_cardinality(kind);
        begin_column(out, name, &plain.to_string());
        write_values(&plain, values, &mut [].into_iter(), out);
        return;
    }
    begin_column(out, name, &kind.to_string());
    dictionaries.iter().for_each(|_| begin_low_cardinality(out));
    write_values(kind, values, &mut dictionaries.into_iter(), out);
}

/// Appends the columns of a `Nested`, which share the ends of each row's values.
pub(super) fn write_nested(name: &str, parts: &[Part], values: &Values, out: &mut Vec<u8>) {
    let Values::Array { ends, items } = values else { return };
    let Values::Tuple(columns) = &**items else { return };
    for (part, items) in parts.iter().zip(columns) {
        write_part(&format!("{name}.{}", part.name), &part.kind, ends, items, out);
    }
}

/// Appends one array of a `Nested`; `held` is the type of its items.
fn write_part(name: &str, held: &ColumnType, ends: &[u64], items: &Values, out: &mut Vec<u8>) {
    let mut dictionaries = Vec::new();
    let plain;
    let held = if collect(held, items, &mut dictionaries) {
        held
    } else {
        dictionaries.clear();
        plain = without_low_cardinality(held);
        &plain
    };
    begin_column(out, name, &format!("Array({held})"));
    dictionaries.iter().for_each(|_| begin_low_cardinality(out));
    write_ends(ends, out);
    write_values(held, items, &mut dictionaries.into_iter(), out);
}

fn has_low_cardinality(kind: &ColumnType) -> bool {
    match kind {
        ColumnType::LowCardinality(_) => true,
        ColumnType::Array(held) => has_low_cardinality(held),
        ColumnType::Map(pair) => has_low_cardinality(&pair.0) || has_low_cardinality(&pair.1),
        ColumnType::Tuple(parts) => parts.iter().any(|part| has_low_cardinality(&part.kind)),
        _ => false,
    }
}

fn without_low_cardinality(kind: &ColumnType) -> ColumnType {
    match kind {
        ColumnType::LowCardinality(held) => (**held).clone(),
        ColumnType::Array(held) => ColumnType::Array(Box::new(without_low_cardinality(held))),
        ColumnType::Map(pair) => {
            ColumnType::Map(Box::new((without_low_cardinality(&pair.0), without_low_cardinality(&pair.1))))
        }
        ColumnType::Tuple(parts) => ColumnType::Tuple(
            parts
                .iter()
                .map(|part| Part { name: part.name.clone(), kind: without_low_cardinality(&part.kind) })
                .collect(),
        ),
        plain => plain.clone(),
    }
}

/// The distinct values of a `LowCardinality` column in a block, and the key of each row.
struct Dictionary<'a> {
    keys: Vec<&'a [u8]>,
    indexes: Vec<u16>,
}

/// Collects the dictionaries of all `LowCardinality` parts in the order in which they are written; `false` if
/// one has too many keys.
fn collect<'a>(kind: &ColumnType, values: &'a Values, found: &mut Vec<Dictionary<'a>>) -> bool {
    match (kind, values) {
        (ColumnType::LowCardinality(_), values) => {
            let dictionary = Dictionary::of(values);
            dictionary.map(|dictionary| found.push(dictionary)).is_some()
        }
        (ColumnType::Array(held), Values::Array { items, .. }) => collect(held, items, found),
        (ColumnType::Map(pair), Values::Array { items, .. }) => match &**items {
            Values::Tuple(parts) => match &parts[..] {
                [keys, values] => collect(&pair.0, keys, found) && collect(&pair.1, values, found),
                _ => true,
            },
            _ => true,
        },
        (ColumnType::Tuple(parts), Values::Tuple(columns)) => {
            parts.iter().zip(columns).all(|(part, values)| collect(&part.kind, values, found))
        }
        _ => true,
    }
}

impl<'a> Dictionary<'a> {
    fn of(values: &'a Values) -> Option<Self> {
        match values {
            Values::Nullable { nulls, values } => Self::of_values(values, Some(nulls)),
            values => Self::of_values(values, None),
        }
    }

    /// Builds a dictionary. With NULLs, the first key stands for NULL, whatever its value is.
    fn of_values(values: &'a Values, nulls: Option<&[u8]>) -> Option<Self> {
        let mut places: HashMap<&[u8], u16> = HashMap::new();
        let mut keys: Vec<&[u8]> = Vec::new();
        if nulls.is_some() {
            keys.push(blank(values));
        }
        let mut indexes = Vec::with_capacity(values.len());
        let mut before: Option<(&[u8], u16)> = None;
        for row in 0..values.len() {
            if nulls.is_some_and(|nulls| nulls[row] != 0) {
                indexes.push(0);
                continue;
            }
            let value = value_at(values, row);
            let index = match before {
                Some((same, index)) if same == value => index,
                _ => match places.get(value) {
                    Some(index) => *index,
                    None if keys.len() == MAX_KEYS => return None,
                    None => {
                        let index = keys.len() as u16;
                        keys.push(value);
                        places.insert(value, index);
                        index
                    }
                },
            };
            before = Some((value, index));
            indexes.push(index);
        }
        Some(Self { keys, indexes })
    }

    fn write(&self, text: bool, out: &mut Vec<u8>) {
        if self.indexes.is_empty() {
            return; // the server reads nothing here when there are no rows
        }
        let width = if self.keys.len() <= 256 { IndexWidth::One } else { IndexWidth::Two };
        begin_dictionary(out, width, self.keys.len());
        for key in &self.keys {
            if text {
                write_text(out, key);
            } else {
                out.extend_from_slice(key);
            }
        }
        out.extend_from_slice(&(self.indexes.len() as u64).to_le_bytes());
        match width {
            IndexWidth::One => out.extend(self.indexes.iter().map(|index| *index as u8)),
            IndexWidth::Two => {
                self.indexes.iter().for_each(|index| out.extend_from_slice(&index.to_le_bytes()))
            }
        }
    }
}

/// The key that stands for NULL, of the length that the type needs.
fn blank(values: &Values) -> &'static [u8] {
    static ZEROS: [u8; 256] = [0; 256];
    match values {
        Values::Fixed { width, .. } => &ZEROS[..(*width as usize).min(ZEROS.len())],
        _ => &[],
    }
}

fn value_at(values: &Values, row: usize) -> &[u8] {
    match values {
        Values::Fixed { width, bytes } => {
            let width = *width as usize;
            &bytes[row * width..(row + 1) * width]
        }
        Values::Texts { ends, bytes } => &bytes[range(ends, row)],
        _ => &[],
    }
}

fn write_values<'a>(
    kind: &ColumnType,
    values: &Values,
    dictionaries: &mut impl Iterator<Item = Dictionary<'a>>,
    out: &mut Vec<u8>,
) {
    match (kind, values) {
        (ColumnType::LowCardinality(_), values) => {
            if let Some(dictionary) = dictionaries.next() {
                dictionary.write(is_text(values), out);
            }
        }
        (_, Values::Fixed { bytes, .. }) => out.extend_from_slice(bytes),
        (_, Values::Texts { ends, bytes }) => write_texts(ends, bytes, out),
        (ColumnType::Array(held), Values::Array { ends, items }) => {
            write_ends(ends, out);
            write_values(held, items, dictionaries, out);
        }
        (ColumnType::Map(pair), Values::Array { ends, items }) => {
            write_ends(ends, out);
            if let Values::Tuple(parts) = &**items
                && let [keys, values] = &parts[..]
            {
                write_values(&pair.0, keys, dictionaries, out);
                write_values(&pair.1, values, dictionaries, out);
            }
        }
        (ColumnType::Nullable(held), Values::Nullable { nulls, values }) => {
            out.extend_from_slice(nulls);
            write_values(held, values, dictionaries, out);
        }
        (ColumnType::Tuple(parts), Values::Tuple(columns)) => {
            for (part, values) in parts.iter().zip(columns) {
                write_values(&part.kind, values, dictionaries, out);
            }
        }
        _ => debug_assert!(false, "values of another type than their column's"),
    }
}

fn is_text(values: &Values) -> bool {
    match values {
        Values::Nullable { values, .. } => is_text(values),
        values => matches!(values, Values::Texts { .. }),
    }
}

fn write_ends(ends: &[u64], out: &mut Vec<u8>) {
    out.reserve(size_of_val(ends));
    ends.iter().for_each(|end| out.extend_from_slice(&end.to_le_bytes()));
}

fn write_texts(ends: &[u64], bytes: &[u8], out: &mut Vec<u8>) {
    out.reserve(last(ends) + 2 * ends.len());
    let mut start = 0;
    for end in ends {
        let end = *end as usize;
        write_varint(out, (end - start) as u64);
        out.extend_from_slice(&bytes[start..end]);
        start = end;
    }
}
