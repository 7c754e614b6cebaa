use serde::Serialize;

use super::*;

#[derive(Serialize)]
struct Peak {
    steps: u32,
    peak: u128,
}

fn schema(columns: &[(&str, &str)]) -> Schema {
    Schema::parse(columns).expect("columns")
}

fn peaks() -> Schema {
    schema(&[("steps", "UInt32"), ("peak", "UInt128")])
}

#[test]
fn golden_bytes_of_two_rows() {
    let schema = peaks();
    let mut columns = Columns::of(&schema);
    columns.push(&schema, &Peak { steps: 7, peak: 1 << 64 }).expect("a row");
    columns.push_blank(&schema);
    let mut out = Vec::new();
    columns.write_native(&schema, &mut out);
    let mut want = b"\x05steps\x06UInt32\x07\0\0\0\0\0\0\0\x04peak\x07UInt128".to_vec();
    want.extend_from_slice(&(1u128 << 64).to_le_bytes());
    want.extend_from_slice(&[0; 16]);
    assert_eq!(out, want);
    assert!(columns.is_sound(&schema, 2));
    assert_eq!((columns.rows(), columns.bytes()), (2, 40));
}

/// A row whose fields are in another order than its columns; one field can be left out.
#[derive(Serialize)]
struct Shuffled {
    c: u8,
    a: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<u8>,
}

fn three() -> Schema {
    schema(&[("a", "UInt8"), ("b", "UInt8"), ("c", "UInt8")])
}

#[test]
fn fields_go_by_name_in_any_order() {
    let mut columns = Columns::of(&three());
    for number in 0..3 {
        let row = Shuffled { c: number + 20, a: number, b: Some(number + 10) };
        columns.push(&three(), &row).expect("a row");
    }
    let mut out = Vec::new();
    columns.write_native(&three(), &mut out);
    assert_eq!(out, b"\x01a\x05UInt8\0\x01\x02\x01b\x05UInt8\x0a\x0b\x0c\x01c\x05UInt8\x14\x15\x16");
}

fn fault(schema: &Schema, row: &impl Serialize) -> String {
    let mut columns = Columns::of(schema);
    columns.push_blank(schema);
    let before = columns.clone();
    let fault = columns.push(schema, row).expect_err("a fault").to_string();
    assert_eq!(columns, before, "nothing of the row stays");
    fault
}

#[test]
fn rows_that_do_not_fit_by_name_are_refused() {
    let text = fault(&three(), &Shuffled { c: 0, a: 0, b: None });
    assert_eq!(text, "column `b`: the row has no field of that name (a `skip_serializing_if`?)");
    let text = fault(&peaks(), &Shuffled { c: 0, a: 0, b: None });
    assert_eq!(text, "column `c`: the row has a field of that name, and no column takes it");
    assert_eq!(fault(&peaks(), &7u8), "the row is a single value: it must be a struct with named fields");
    assert_eq!(fault(&peaks(), &(7u8, 8u8)), "the row is a tuple: it must be a struct with named fields");
}

/// Serializes fields by hand: names may come twice, and errors are ignored.
struct ByHand<'a>(&'a [(&'static str, Hand)]);

enum Hand {
    Number(u64),
    List(Vec<u64>),
    Panic,
}

impl Serialize for Hand {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => number.serialize(serializer),
            Self::List(list) => list.serialize(serializer),
            Self::Panic => panic!("in Serialize"),
        }
    }
}

impl Serialize for ByHand<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let mut row = serializer.serialize_struct("ByHand", self.0.len())?;
        for (name, value) in self.0 {
            let _passed_over = row.serialize_field(name, value);
        }
        row.end()
    }
}

#[test]
fn a_serialize_that_passes_over_faults_stores_nothing() {
    let text =
        fault(&three(), &ByHand(&[("a", Hand::Number(1)), ("b", Hand::Number(999)), ("c", Hand::Number(1))]));
    assert!(text.contains("ignored the error"), "{text}");
    let lists = schema(&[("a", "UInt8"), ("b", "Array(UInt8)")]);
    let text = fault(&lists, &ByHand(&[("a", Hand::Number(1)), ("b", Hand::List(vec![1, 999, 2]))]));
    assert!(text.contains("ignored the error"), "{text}");
    let twice =
        [("a", Hand::Number(1)), ("a", Hand::Number(2)), ("b", Hand::Number(1)), ("c", Hand::Number(1))];
    assert!(fault(&three(), &ByHand(&twice)).contains("ignored the error"));
    let late =
        [("c", Hand::Number(1)), ("a", Hand::Number(2)), ("b", Hand::Number(1)), ("c", Hand::Number(1))];
    assert!(fault(&three(), &ByHand(&late)).contains("ignored the error"));
}

#[test]
fn a_serialize_that_panics_leaves_nothing() {
    let schema = three();
    let mut columns = Columns::of(&schema);
    let row = ByHand(&[("a", Hand::Number(1)), ("b", Hand::Panic)]);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| columns.push(&schema, &row)));
    assert!(caught.is_err());
    assert_eq!(columns, Columns::of(&schema));
}

#[test]
fn values_in_messages_are_short_and_on_one_line() {
    let text = fault(&schema(&[("x", "UUID")]), &serde_text("x", &"a\n\u{1b}[31m".repeat(100)));
    assert!(text.starts_with("column `x`: `a\\n\\u{1b}[31m"), "{text}");
    assert!(text.contains('…') && text.len() < 200 && !text.contains('\n'), "{text}");
}

fn serde_text<'a>(name: &'a str, text: &'a str) -> std::collections::BTreeMap<&'a str, &'a str> {
    [(name, text)].into()
}

/// A row with a value of every form.
#[derive(Debug, Clone, Serialize)]
struct Row {
    number: u32,
    level: u8,
    text: String,
    maybe: Option<String>,
    lists: Vec<Vec<u16>>,
    pair: (Option<u8>, String),
    map: std::collections::BTreeMap<String, Option<u8>>,
    nested: Vec<Item>,
    fixed: [u8; 3],
}

#[derive(Debug, Clone, Serialize)]
struct Item {
    a: u8,
    b: Vec<String>,
}

fn every_form() -> Schema {
    schema(&[
        ("nested", "Nested(a UInt8, b Array(LowCardinality(String)))"),
        ("number", "UInt32"),
        ("level", "Enum8('a' = 1, 'b' = 2, 'c' = 3)"),
        ("text", "LowCardinality(String)"),
        ("maybe", "LowCardinality(Nullable(String))"),
        ("lists", "Array(Array(UInt16))"),
        ("pair", "Tuple(x Nullable(UInt8), y String)"),
        ("map", "Map(String, Nullable(UInt8))"),
        ("fixed", "FixedString(3)"),
    ])
}

mod random {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        "[a-cü]{0,3}"
    }

    fn item() -> impl Strategy<Value = Item> {
        (any::<u8>(), vec(text(), 0..3)).prop_map(|(a, b)| Item { a, b })
    }

    fn row() -> impl Strategy<Value = Row> {
        let first = (any::<u32>(), 1u8..4, text(), proptest::option::of(text()));
        let lists = vec(vec(any::<u16>(), 0..3), 0..3);
        let pair = (proptest::option::of(any::<u8>()), text());
        let rest =
            (lists, pair, btree_map(text(), any::<Option<u8>>(), 0..3), vec(item(), 0..3), any::<[u8; 3]>());
        (first, rest).prop_map(|((number, level, text, maybe), (lists, pair, map, nested, fixed))| Row {
            number,
            level,
            text,
            maybe,
            lists,
            pair,
            map,
            nested,
            fixed,
        })
    }

    fn of(rows: &[Row]) -> Columns {
        let mut columns = Columns::of(&every_form());
        rows.iter().for_each(|row| columns.push(&every_form(), row).expect("a row"));
        columns
    }

    proptest! {
        #[test]
        fn parts_put_together_are_the_whole(rows in vec(row(), 0..8), cut in 0usize..9) {
            let schema = every_form();
            let cut = cut.min(rows.len());
            let whole = of(&rows);
            prop_assert!(whole.is_sound(&schema, rows.len()));
            let mut joined = whole.slice(0..cut);
            prop_assert_eq!(&joined, &of(&rows[..cut]));
            prop_assert_eq!(&whole.slice(cut..rows.len()), &of(&rows[cut..]));
            joined.append(whole.slice(cut..rows.len()));
            prop_assert_eq!(&joined, &whole);
            joined.truncate(cut);
            prop_assert_eq!(&joined, &of(&rows[..cut]));
        }

        #[test]
        fn rows_are_gathered_in_any_order(rows in vec(row(), 1..6), order in vec(0usize..5, 0..8)) {
            let order: Vec<usize> = order.iter().map(|place| place % rows.len()).collect();
            let places: Vec<u32> = order.iter().map(|place| *place as u32).collect();
            let wanted: Vec<Row> = order.iter().map(|place| rows[*place].clone()).collect();
            let gathered = of(&rows).reordered(&places);
            prop_assert!(gathered.is_sound(&every_form(), order.len()));
            prop_assert_eq!(gathered, of(&wanted));
        }

        #[test]
        fn hashes_are_those_of_each_row_alone(rows in vec(row(), 1..6)) {
            let schema = every_form();
            let mut all: Vec<u64> = (0..rows.len() as u64).collect();
            of(&rows).fold_hashes(&schema, &mut all);
            for (index, row) in rows.iter().enumerate() {
                let mut alone = [index as u64];
                of(std::slice::from_ref(row)).fold_hashes(&schema, &mut alone);
                prop_assert_eq!(alone[0], all[index]);
            }
        }

        #[test]
        fn columns_come_back_from_postcard(rows in vec(row(), 0..6)) {
            let bytes = postcard::to_allocvec(&of(&rows)).expect("encodes");
            prop_assert_eq!(postcard::from_bytes::<Columns>(&bytes), Ok(of(&rows)));
        }

        /// Bytes of a real value with some of them changed: they are used if sound, and otherwise only refused.
        #[test]
        fn damaged_columns_are_refused_or_harmless(
            rows in vec(row(), 1..4),
            damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut bytes = postcard::to_allocvec(&of(&rows)).expect("encodes");
            for (place, value) in damage {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            use_if_sound(&bytes, rows.len());
        }

        #[test]
        fn random_bytes_are_refused_or_harmless(bytes in vec(any::<u8>(), 0..200)) {
            use_if_sound(&bytes, 1);
        }
    }

    fn use_if_sound(bytes: &[u8], rows: usize) {
        let schema = every_form();
        let Ok(mut columns) = postcard::from_bytes::<Columns>(bytes) else { return };
        if !columns.is_sound(&schema, rows) {
            return;
        }
        columns.write_native(&schema, &mut Vec::new());
        columns.fold_hashes(&schema, &mut vec![0; rows]);
        columns.append(columns.reordered(&[0]));
        columns.push_blank(&schema);
        columns = columns.slice(1..rows + 2);
        columns.truncate(1);
        assert!(columns.is_sound(&schema, 1));
    }
}

/// A million nested values would overflow the decoder's stack.
#[test]
fn values_nested_too_deep_are_refused() {
    let mut bytes = vec![1, 1];
    bytes.extend([2, 0].repeat(1_000_000));
    assert!(postcard::from_bytes::<Columns>(&bytes).is_err());
}

#[test]
fn values_that_their_type_does_not_have_are_not_sound() {
    let lows = [("Enum8('a' = 1)", "UInt8", 2u64), ("Bool", "UInt8", 2), ("Date32", "UInt32", 1 << 20)];
    let wide = [
        ("Enum16('a' = 1)", "UInt16", 2),
        ("DateTime64(3)", "UInt64", 1 << 60),
        ("Decimal(3, 0)", "UInt32", 1000),
    ];
    for (kind, raw, number) in lows.into_iter().chain(wide) {
        let kind = schema(&[("x", kind)]);
        let raw = schema(&[("x", raw)]);
        let mut columns = Columns::of(&raw);
        columns.push(&raw, &ByHand(&[("x", Hand::Number(number))])).expect("a row");
        assert!(columns.is_sound(&raw, 1) && !columns.is_sound(&kind, 1), "{kind:?}");
        assert!(!columns.is_sound(&raw, 2));
        let mut blank = Columns::of(&kind);
        blank.push_blank(&kind);
        assert!(blank.is_sound(&kind, 1), "{kind:?}");
    }
}
