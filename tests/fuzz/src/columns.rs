//! Rows as columns, as a pool process or a child sends them to its worker.

use std::sync::LazyLock;

use millstream::columns::Columns;
use millstream::schema::Schema;

use crate::heap::bounded;

/// What decoding may take at most for a length that it only believes: 1 MiB for each of the levels that it goes down.
const BELIEVED: usize = 41 << 20;
/// What one byte sent takes at most when it is decoded: a value without values, in a list that grows by doubling.
const BYTE: usize = 192;

/// Columns of every form that values are kept in, within each other.
static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let columns = [
        ("flag", "Bool"),
        ("number", "UInt64"),
        ("wide", "Int256"),
        ("money", "Decimal(9, 2)"),
        ("day", "Date32"),
        ("at", "DateTime64(3, 'UTC')"),
        ("level", "Enum8('low' = 1, 'high' = 2)"),
        ("text", "String"),
        ("code", "FixedString(3)"),
        ("maybe", "Nullable(String)"),
        ("tag", "LowCardinality(String)"),
        ("kind", "LowCardinality(Nullable(String))"),
        ("tags", "Array(LowCardinality(Nullable(String)))"),
        ("deep", "Array(Array(Nullable(UInt16)))"),
        ("pair", "Tuple(a UInt8, b Array(Tuple(String, Float32)))"),
        ("known", "Map(LowCardinality(String), Array(UInt8))"),
        ("steps", "Nested(name String, marks Array(Nullable(Int8)))"),
    ];
    Schema::parse(&columns).unwrap_or_else(|faults| panic!("{faults:?}"))
});

/// A few columns, which a fuzzer fills sooner.
static SMALL: LazyLock<Schema> = LazyLock::new(|| {
    let columns = [
        ("tags", "Array(LowCardinality(Nullable(String)))"),
        ("steps", "Nested(a UInt8, b Nullable(String))"),
    ];
    Schema::parse(&columns).unwrap_or_else(|faults| panic!("{faults:?}"))
});

/// Reads all but the first byte of the input as rows, as many as that byte says. Whatever is sound can be given to every
/// other function, and what those make of it agrees.
pub fn columns(input: &[u8]) {
    let Some((rows, bytes)) = input.split_first() else { return };
    let limit = bytes.len() * BYTE + BELIEVED;
    let Ok(columns) = bounded(limit, || postcard::from_bytes::<Columns>(bytes)) else { return };
    for schema in [&*SCHEMA, &*SMALL] {
        if columns.is_sound(schema, usize::from(*rows)) {
            used(schema, &columns);
        }
    }
}

fn used(schema: &Schema, columns: &Columns) {
    let rows = columns.rows();
    let sent = postcard::to_allocvec(columns).expect("numbers and bytes always fit a Vec");
    assert_eq!(postcard::from_bytes::<Columns>(&sent).as_ref(), Ok(columns));
    let (written, hashes) = (native(schema, columns), hashes(schema, columns));
    assert!(columns.bytes() <= 16 * sent.len(), "{} bytes of {} sent", columns.bytes(), sent.len());

    // In two pieces, and put together again.
    let middle = rows / 2;
    let (mut head, tail) = (columns.slice(0..middle), columns.slice(middle..rows));
    assert!(head.is_sound(schema, middle) && tail.is_sound(schema, rows - middle), "pieces are not sound");
    let apart: Vec<u64> = [self::hashes(schema, &head), self::hashes(schema, &tail)].concat();
    assert_eq!(apart, hashes);
    head.append(tail);
    assert_eq!(native(schema, &head), written, "put together again");
    head.truncate(middle);
    assert_eq!(native(schema, &head), native(schema, &columns.slice(0..middle)), "cut again");

    // Backwards, and back.
    let backwards: Vec<u32> = (0..rows as u32).rev().collect();
    let turned = columns.reordered(&backwards);
    assert!(turned.is_sound(schema, rows), "in another order it is not sound");
    let turned_hashes: Vec<u64> = hashes.iter().rev().copied().collect();
    assert_eq!(self::hashes(schema, &turned), turned_hashes);
    assert_eq!(native(schema, &turned.reordered(&backwards)), written, "and back");

    let mut more = columns.clone();
    more.push_blank(schema);
    assert!(more.is_sound(schema, rows + 1), "with a blank row it is not sound");
}

fn native(schema: &Schema, columns: &Columns) -> Vec<u8> {
    let mut out = Vec::new();
    columns.write_native(schema, &mut out);
    out
}

fn hashes(schema: &Schema, columns: &Columns) -> Vec<u64> {
    let mut hashes: Vec<u64> = (0..columns.rows() as u64).map(|_| 7).collect();
    columns.fold_hashes(schema, &mut hashes);
    hashes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Serialize;

    use super::*;

    #[derive(Serialize)]
    struct Every {
        flag: bool,
        number: u64,
        wide: &'static str,
        money: &'static str,
        day: &'static str,
        at: &'static str,
        level: &'static str,
        text: &'static str,
        code: [u8; 3],
        maybe: Option<&'static str>,
        tag: &'static str,
        kind: Option<&'static str>,
        tags: Vec<Option<&'static str>>,
        deep: Vec<Vec<Option<u16>>>,
        pair: Pair,
        known: BTreeMap<&'static str, Vec<u8>>,
        steps: Vec<Step>,
    }

    #[derive(Serialize)]
    struct Pair {
        a: u8,
        b: Vec<(&'static str, f32)>,
    }

    #[derive(Clone, Serialize)]
    struct Step {
        name: &'static str,
        marks: Vec<Option<i8>>,
    }

    fn every(number: u64) -> Every {
        let some = number % 2 == 1;
        Every {
            flag: some,
            number,
            wide: "-7",
            money: "12.50",
            day: "2024-12-31",
            at: "2024-12-31T23:59:59.123Z",
            level: if some { "high" } else { "low" },
            text: "text",
            code: *b"abc",
            maybe: some.then_some("m"),
            tag: if some { "one" } else { "two" },
            kind: some.then_some("k"),
            tags: vec![None, Some("t"), Some("")],
            deep: vec![vec![Some(1), None], vec![]],
            pair: Pair { a: 9, b: vec![("x", 0.5)] },
            known: BTreeMap::from([("k", vec![1, 2])]),
            steps: vec![Step { name: "s", marks: vec![None, Some(-1)] }; usize::from(some)],
        }
    }

    #[derive(Serialize)]
    struct Few {
        tags: Vec<Option<&'static str>>,
        steps: Vec<FewSteps>,
    }

    #[derive(Serialize)]
    struct FewSteps {
        a: u8,
        b: Option<&'static str>,
    }

    fn of<R: Serialize>(schema: &Schema, rows: impl Iterator<Item = R>) -> Vec<u8> {
        let mut columns = Columns::of(schema);
        rows.for_each(|row| columns.push(schema, &row).expect("a row"));
        assert!(columns.is_sound(schema, columns.rows()));
        let mut input = vec![columns.rows() as u8];
        input.extend(postcard::to_allocvec(&columns).expect("encodes"));
        input
    }

    /// Else the target would say of nothing that it holds.
    #[test]
    fn rows_of_both_schemas_are_used() {
        let few = |number: u8| Few {
            tags: vec![Some("a"), None],
            steps: vec![FewSteps { a: number, b: None }, FewSteps { a: 7, b: Some("b") }],
        };
        let inputs = [
            of(&SCHEMA, (0..1).map(every)),
            of(&SCHEMA, (0..4).map(every)),
            of(&SMALL, (0..1).map(few)),
            of(&SMALL, (0..3).map(few)),
            of(&SMALL, (0..0).map(few)),
        ];
        inputs.iter().for_each(|input| columns(input));
    }
}
