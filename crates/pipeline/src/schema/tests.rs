use proptest::prelude::*;

use super::*;

fn text_of(kind: &str) -> Result<String, String> {
    ColumnType::parse(kind).map(|kind| kind.to_string()).map_err(|fault| fault.to_string())
}

/// Spellings of ClickHouse 26.5 in `system.columns`.
#[test]
fn types_are_spelled_as_clickhouse_does() {
    let table = [
        ("Decimal", "Decimal(10, 0)"),
        ("Decimal(18)", "Decimal(18, 0)"),
        ("Decimal64( 4 )", "Decimal(18, 4)"),
        ("DateTime64", "DateTime64(3)"),
        ("DateTime()", "DateTime"),
        ("DateTime64(3,'Europe/Berlin')", "DateTime64(3, 'Europe/Berlin')"),
        ("Enum('a','b')", "Enum8('a' = 1, 'b' = 2)"),
        ("Enum8('b'=2,'a'=1)", "Enum8('a' = 1, 'b' = 2)"),
        ("Enum('a'=5,'b')", "Enum8('a' = 5, 'b' = 6)"),
        ("Enum('a'=300)", "Enum16('a' = 300)"),
        (
            r"Enum8('it''s'=-1,'tab\t'=2,'back\\slash'=3)",
            r"Enum8('it\'s' = -1, 'tab\t' = 2, 'back\\slash' = 3)",
        ),
        ("Array( Nullable(Float32) )", "Array(Nullable(Float32))"),
        ("Tuple(a UInt8,`b` Array(Tuple(Int8)))", "Tuple(a UInt8, b Array(Tuple(Int8)))"),
        ("Map(LowCardinality(String),Array(UInt8))", "Map(LowCardinality(String), Array(UInt8))"),
        ("FixedString(16)", "FixedString(16)"),
        ("Array(Nested(a UInt8))", "Array(Array(Tuple(a UInt8)))"),
    ];
    for (declared, spelled) in table {
        assert_eq!(text_of(declared), Ok(spelled.to_owned()), "{declared}");
        assert_eq!(text_of(spelled), Ok(spelled.to_owned()), "{spelled}");
    }
}

#[test]
fn wrong_types_are_refused_with_a_reason() {
    let table = [
        ("", "a type is missing"),
        ("uint8", "`uint8` is not a column type that rows can be written to (`UInt8` is)"),
        ("Varchar", "`Varchar` is not a column type"),
        ("Array", "`(` is missing"),
        ("Array(UInt8", "`)` is missing"),
        ("Array(UInt8))", "the end is missing"),
        ("JSON", "`JSON` is not supported: use String"),
        ("Nullable(Array(UInt8))", "`Nullable(Array(UInt8))` is refused by ClickHouse: Array, Map and Tuple"),
        ("Array(Nullable(Nullable(UInt8)))", "`Nullable(Nullable(UInt8))`"),
        ("LowCardinality(UInt64)", "`LowCardinality(UInt64)`"),
        ("DateTime64(10)", "at most 9 digits"),
        ("DateTime(UTC)", "a time zone in quotes is missing"),
        ("FixedString(0)", "its length is 1 or more"),
        ("FixedString(x)", "a length is missing"),
        ("Decimal(18,30)", "`Decimal(18,30)` is refused by ClickHouse: the scale is larger"),
        ("Enum8('a'=1,'a'=2)", "`a` is there twice"),
        ("Enum8('a'=1,'b'=1)", "`a` and `b` have the same number 1"),
        ("Enum8('a'=128)", "128 is outside of -128 to 127"),
        (r"Enum8('\x41')", "a value in quotes is missing"),
        ("Enum8('a)", "a value in quotes is missing"),
        ("Enum8()", "an Enum needs a value"),
        ("Map(Nullable(UInt8),UInt8)", "the key of a Map cannot be Nullable"),
        ("Tuple()", "holds no value"),
        ("Tuple(a UInt8, UInt8)", "either all parts have names or none has"),
        ("Tuple(a UInt8, a UInt8)", "the name `a` is there twice"),
        ("Nested(UInt8)", "each of its columns needs a name"),
    ];
    for (declared, reason) in table {
        let fault = text_of(declared).expect_err(declared);
        assert!(fault.contains(reason), "{declared}: `{reason}` is not in `{fault}`");
    }
    let deep = format!("{}UInt8{}", "Array(".repeat(40), ")".repeat(40));
    assert!(text_of(&deep).expect_err("deep").contains("16 deep"));
}

#[test]
fn every_fault_of_the_columns_is_reported() {
    let columns = [("1st", "UInt8"), ("id", "String"), ("a", "UInt8"), ("a", "UInt8"), ("b", "Varchar")];
    let faults = Schema::parse(&columns).expect_err("faults");
    let text = Faults(&faults).to_string();
    for part in [
        "column `1st`: a name is",
        "column `id`: the name is taken",
        "column `a` is declared twice",
        "column `b`",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    assert_eq!(faults.len(), 4);
}

#[test]
fn a_nested_is_its_arrays_in_the_table() {
    let schema =
        Schema::parse(&[("a", "UInt8"), ("n", "Nested(x UInt8, y Array(String))"), ("m", "Nested(x Date)")]);
    let schema = schema.expect("columns");
    let text = "`a` UInt8, `n.x` Array(UInt8), `n.y` Array(Array(String)), `m.x` Array(Date)";
    assert_eq!(schema.to_text(), text);
    assert_eq!(Schema::from_text(text), Ok(schema));
}

#[test]
fn the_fingerprint_is_of_names_types_and_order() {
    let of = |columns: &[(&str, &str)]| Schema::parse(columns).expect("columns").fingerprint();
    let one = of(&[("a", "UInt8"), ("b", "Decimal(18)")]);
    assert_eq!(one, 7_853_006_248_041_327_480); // stays the same between builds
    assert_eq!(one, of(&[("a", " UInt8 "), ("b", "Decimal64(0)")]));
    assert_ne!(one, of(&[("b", "Decimal(18)"), ("a", "UInt8")]));
    assert_ne!(one, of(&[("a", "UInt8"), ("c", "Decimal(18)")]));
    assert_ne!(one, of(&[("a", "UInt16"), ("b", "Decimal(18)")]));
}

#[test]
fn text_that_is_no_schema_is_refused() {
    for text in [
        "x",
        "`a`",
        "`a` UInt8,, `b` UInt8",
        "`a` UInt8 `b` UInt8",
        "`n.a` UInt8",
        "`id` UInt8",
        "`a.b.c` Array(UInt8)",
    ] {
        assert!(Schema::from_text(text).is_err(), "{text}");
    }
    assert!(Schema::from_text(&"`a` UInt8, ".repeat(100_000)).is_err());
    let many: Vec<String> = (0..=MAX_COLUMNS).map(|n| format!("`c{n}` UInt8")).collect();
    assert!(Schema::from_text(&many.join(", ")).is_err());
    assert_eq!(Schema::from_text(""), Schema::parse(&[]));
}

fn kind() -> impl Strategy<Value = String> {
    let leaf = prop::sample::select(vec![
        "UInt8",
        "Int256",
        "String",
        "Nullable(Float64)",
        "LowCardinality(String)",
        "Decimal(76, 3)",
        "Bool",
        "DateTime64(3, 'UTC')",
        "Enum8('a\\'b' = -1, 'c' = 2)",
        "FixedString(7)",
        "IPv6",
        "UUID",
        "Date32",
    ]);
    let key = prop::sample::select(vec!["String", "UInt8", "LowCardinality(String)"]);
    leaf.prop_map(str::to_owned).prop_recursive(4, 16, 3, move |inner| {
        prop_oneof![
            inner.clone().prop_map(|held| format!("Array({held})")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("Tuple({a}, {b})")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("Tuple(a {a}, b_2 {b})")),
            (key.clone(), inner).prop_map(|(key, value)| format!("Map({key}, {value})")),
        ]
    })
}

proptest! {
    #[test]
    fn schemas_come_back_from_their_text(kinds in prop::collection::vec(kind(), 0..6)) {
        let columns: Vec<(String, String)> =
            kinds.into_iter().enumerate().map(|(index, kind)| (format!("c{index}"), kind)).collect();
        let columns: Vec<(&str, &str)> = columns.iter().map(|(name, kind)| (&name[..], &kind[..])).collect();
        let schema = Schema::parse(&columns).expect("columns");
        prop_assert_eq!(Schema::from_text(&schema.to_text()), Ok(schema));
    }

    #[test]
    fn random_text_never_panics(text in "[`a-cAETUIint(),'=\\\\ 0-9.é]{0,60}") {
        let _schema = Schema::from_text(&text);
        let _kind = ColumnType::parse(&text);
        let _prefixed = Schema::from_text(&format!("`a` {text}"));
    }
}
