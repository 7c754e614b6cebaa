use std::collections::HashMap;
use std::num::NonZeroU32;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::Faults;
use super::*;

/// The faults of a row type, one per line.
fn faults<R: Serialize + serde::de::DeserializeOwned>(columns: &[(&str, &str)]) -> String {
    let schema = Schema::parse(columns).expect("columns");
    Faults(&check_row::<R>(&schema)).to_string()
}

#[derive(Serialize, Deserialize)]
struct One<T> {
    x: T,
}

fn one<T: Serialize + serde::de::DeserializeOwned>(kind: &str) -> String {
    faults::<One<T>>(&[("x", kind)])
}

#[derive(Serialize, Deserialize)]
struct Wide {
    flag: bool,
    steps: u32,
    peak: u128,
    factors: Vec<u64>,
    at: i64,
    note: Option<String>,
    pair: (u8, f64),
    tag: [u8; 4],
    map: HashMap<String, Vec<i32>>,
}

#[test]
fn fields_in_any_order_fit_their_columns() {
    let columns = [
        ("steps", "UInt32"),
        ("peak", "UInt128"),
        ("factors", "Array(UInt64)"),
        ("at", "DateTime64(3, 'UTC')"),
        ("note", "LowCardinality(Nullable(String))"),
        ("pair", "Tuple(a UInt8, b Float64)"),
        ("tag", "FixedString(4)"),
        ("map", "Map(String, Array(Int32))"),
        ("flag", "Bool"),
    ];
    assert_eq!(faults::<Wide>(&columns), "");
}

#[test]
fn widening_is_taken_and_narrowing_refused() {
    assert_eq!(one::<u8>("UInt32"), "");
    assert_eq!(one::<u8>("Int16"), "");
    assert_eq!(one::<u32>("Float64"), "");
    assert_eq!(one::<f32>("Float64"), "");
    assert_eq!(one::<u64>("UInt256"), "");
    let text = one::<u64>("UInt32");
    assert_eq!(text, "field `x`: its column is UInt32 and takes a u32 or smaller, found a u64 in the row");
    for (text, found) in [
        (one::<u8>("Int8"), "a u8"),
        (one::<i8>("UInt64"), "an i8"),
        (one::<f64>("Float32"), "an f64"),
        (one::<String>("UInt32"), "text"),
        (one::<u32>("String"), "a u32"),
        (one::<Option<u32>>("UInt32"), "an Option"),
        (one::<Vec<u8>>("String"), "a list"),
        (one::<i64>("Date32"), "an i64"),
        (one::<Vec<u64>>("Array(UInt32)"), "field `x[]`: its column is UInt32"),
        (one::<HashMap<String, Option<u8>>>("Map(String, UInt8)"), "field `x[value]`"),
        (one::<[u8; 3]>("FixedString(4)"), "a tuple of 3"),
        (one::<One<u8>>("Tuple(UInt8)"), "a struct with the fields x"),
    ] {
        assert!(text.contains(found), "`{found}` is not in `{text}`");
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Low,
    Mid,
    VeryHigh,
}

#[test]
fn variants_of_unit_enums_are_compared_with_the_column() {
    assert_eq!(one::<Level>("Enum('low', 'mid', 'very_high', 'other')"), "");
    assert_eq!(one::<Option<Level>>("Nullable(Enum('low', 'mid', 'very_high'))"), "");
    assert_eq!(one::<Level>("String"), "");
    assert_eq!(
        one::<Vec<Level>>("Array(Enum('low', 'VeryHigh'))"),
        "field `x[]`: its variant `mid` is not a value of Enum8('low' = 1, 'VeryHigh' = 2)\n\
         field `x[]`: its variant `very_high` is not a value of Enum8('low' = 1, 'VeryHigh' = 2)"
    );
}

#[derive(Serialize, Deserialize)]
struct Skipping {
    a: u8,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    b: Option<u8>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    c: Vec<u8>,
    #[serde(skip)]
    _d: u8,
}

#[test]
fn fields_that_are_left_out_at_times_are_refused_by_name() {
    let text = faults::<Skipping>(&[("a", "UInt8"), ("b", "Nullable(UInt8)"), ("c", "Array(UInt8)")]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains("field `b`") && lines[1].contains("field `c`"), "{text}");
    assert!(text.contains("skip_serializing_if"), "{text}");
}

#[test]
fn missing_and_further_fields_are_named() {
    let text = faults::<Skipping>(&[("a", "UInt8"), ("_d", "UInt8")]);
    for part in ["column `_d`: the row has no field of that name", "field `b` of the row has no column"] {
        assert!(text.contains(part), "`{part}` is not in `{text}`");
    }
}

#[derive(Serialize, Deserialize)]
struct Renamed {
    #[serde(rename = "steps", alias = "count", alias = "n")]
    number: u32,
    #[serde(rename(serialize = "written", deserialize = "read"))]
    other: u8,
}

#[test]
fn renamed_fields_go_by_the_name_that_is_written() {
    assert_eq!(faults::<Renamed>(&[("written", "UInt8"), ("steps", "UInt32")]), "");
}

#[derive(Serialize, Deserialize)]
struct Flat {
    a: u8,
    #[serde(flatten)]
    rest: Rest,
}

#[derive(Serialize, Deserialize)]
struct Rest {
    b: String,
    c: f64,
}

#[test]
fn flattened_fields_go_by_name() {
    assert_eq!(faults::<Flat>(&[("c", "Float64"), ("b", "String"), ("a", "UInt8")]), "");
    let text = faults::<Flat>(&[("a", "UInt8"), ("b", "UInt8"), ("c", "Float64")]);
    assert!(text.contains("field `b`: its column is UInt8"), "{text}");
    assert_eq!(one::<Flat>("Tuple(b String, a UInt8, c Float64)"), "");
}

#[derive(Serialize, Deserialize)]
struct Dressed {
    #[serde(serialize_with = "as_text")]
    number: u64,
    #[serde(with = "as_days")]
    day: String,
}

fn as_text<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

mod as_days {
    use super::*;

    pub(super) fn serialize<S: Serializer>(day: &str, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(day.len() as u16)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
        Ok("x".repeat(usize::from(u16::deserialize(deserializer)?)))
    }
}

#[test]
fn fields_are_judged_by_what_they_write() {
    assert_eq!(faults::<Dressed>(&[("number", "String"), ("day", "Date")]), "");
    let text = faults::<Dressed>(&[("number", "UInt64"), ("day", "String")]);
    for part in ["field `number`: its column is UInt64", "field `day`: its column is String"] {
        assert!(text.contains(part), "`{part}` is not in `{text}`");
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Either {
    Number(u64),
    Text(String),
}

#[derive(Serialize)]
struct Never;

impl<'de> Deserialize<'de> for Never {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("never"))
    }
}

#[derive(Serialize, Deserialize)]
struct Stubborn {
    never: Never,
    steps: u64,
    name: String,
}

#[test]
fn types_that_take_anything_or_nothing_are_judged_at_their_ids() {
    assert_eq!(one::<Either>("UInt32"), "");
    assert_eq!(one::<Either>("String"), "");
    assert_eq!(one::<Never>("String"), "");
    let columns = [("never", "UInt8"), ("name", "String"), ("steps", "UInt32")];
    assert_eq!(
        faults::<Stubborn>(&columns),
        "field `steps`: its column is UInt32 and takes a u32 or smaller, found a u64 in the row"
    );
}

#[test]
fn types_that_refuse_some_blanks_are_given_others() {
    assert_eq!(one::<NonZeroU32>("UInt32"), "");
    assert_eq!(one::<std::net::Ipv4Addr>("IPv4"), "");
    assert_eq!(one::<std::net::IpAddr>("IPv6"), "");
    assert_eq!(one::<std::net::SocketAddr>("String"), "");
    assert_eq!(one::<Vec<std::net::Ipv6Addr>>("Array(IPv6)"), "");
    assert_eq!(one::<char>("String"), "");
    assert!(one::<NonZeroU32>("UInt16").contains("found a u32"));
    assert!(one::<std::net::Ipv4Addr>("UInt32").contains("found text"));
}

/// A number of a small set, as `serde_repr` serializes it.
struct Stars(u8);

impl Serialize for Stars {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.0)
    }
}

impl<'de> Deserialize<'de> for Stars {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u8::deserialize(deserializer)? {
            stars @ 20..=22 => Ok(Self(stars)),
            _ => Err(serde::de::Error::custom("not so many")),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Starred {
    stars: Stars,
    #[serde(serialize_with = "as_text")]
    number: u64,
}

#[test]
fn numbers_of_a_small_set_are_found_among_the_columns_own() {
    assert_eq!(faults::<Starred>(&[("stars", "Enum8('some' = 20, 'more' = 21)"), ("number", "String")]), "");
    let text = faults::<Starred>(&[("stars", "Enum8('some' = 20)"), ("number", "UInt64")]);
    assert!(text.contains("field `number`: its column is UInt64"), "{text}");
}

#[test]
fn types_of_the_standard_library_are_what_they_write() {
    use std::borrow::Cow;
    use std::collections::{BTreeSet, VecDeque};
    use std::num::Wrapping;
    use std::time::{Duration, SystemTime};

    assert_eq!(one::<BTreeSet<u16>>("Array(UInt16)"), "");
    assert_eq!(one::<VecDeque<String>>("Array(LowCardinality(String))"), "");
    assert_eq!(one::<Cow<'static, str>>("LowCardinality(String)"), "");
    assert_eq!(one::<std::path::PathBuf>("String"), "");
    assert_eq!(one::<Wrapping<u32>>("UInt32"), "");
    assert_eq!(one::<usize>("UInt64"), "");
    assert_eq!(one::<Box<Option<i8>>>("Nullable(Int8)"), "");
    assert_eq!(one::<std::ops::Range<u32>>("Tuple(start UInt32, end UInt32)"), "");
    assert_eq!(one::<Duration>("Tuple(secs UInt64, nanos UInt32)"), "");
    assert_eq!(one::<HashMap<u32, [f32; 2]>>("Map(UInt32, Array(Float32))"), "");
    assert!(one::<SystemTime>("DateTime64(3)").contains("secs_since_epoch"));
    assert!(one::<Option<Vec<u8>>>("Array(UInt8)").contains("an Option of a list"));
    assert!(one::<Result<u8, u8>>("UInt8").contains("the enum variant `Ok` with fields"));
}

#[test]
fn text_of_another_form_is_refused() {
    let text = one::<std::net::SocketAddr>("IPv4");
    assert!(text.contains("found text such as `127.0.0.1:80`"), "{text}");
    assert_eq!(one::<String>("IPv4"), "");
    assert_eq!(one::<String>("Date"), "");
    assert_eq!(one::<Option<String>>("Nullable(UUID)"), "");
    assert_eq!(one::<String>("Enum('low', 'high')"), "");
    assert_eq!(one::<String>("Decimal(9, 2)"), "");
    assert_eq!(one::<String>("FixedString(3)"), "");
}

#[test]
fn nested_fields_go_by_name() {
    #[derive(Serialize, Deserialize)]
    struct Place {
        lat: f64,
        lon: f64,
    }
    assert_eq!(one::<Place>("Tuple(lon Float64, lat Float64)"), "");
    assert_eq!(one::<Vec<Place>>("Nested(lon Float64, lat Float64)"), "");
    let text = one::<Option<Place>>("Tuple(lng Float64, lat Float64)");
    assert!(text.contains("an Option"), "{text}");
    let text = one::<Place>("Tuple(lng Float64, lat Float64)");
    assert!(
        text.contains("column `x.lng`: the row has no field") && text.contains("field `x.lon`"),
        "{text}"
    );
}

#[test]
fn a_row_that_is_no_struct_is_refused() {
    #[derive(Serialize, Deserialize)]
    struct Nothing;
    assert!(faults::<u64>(&[("n", "UInt64")]).contains("found a number"));
    assert!(faults::<(u8, u8)>(&[("n", "UInt64")]).contains("found a tuple"));
    assert_eq!(faults::<Nothing>(&[]), "");
    assert_eq!(faults::<HashMap<String, u32>>(&[("n", "UInt32")]), "");
}

#[derive(Serialize, Deserialize)]
struct Tree {
    children: Vec<Tree>,
    next: Option<Box<Tree>>,
    by_name: HashMap<String, Tree>,
}

#[test]
fn types_that_hold_themselves_end() {
    let columns = [("children", "String"), ("next", "String"), ("by_name", "String")];
    let text = faults::<Tree>(&columns);
    let lines = text.lines().filter(|line| line.contains("is String and takes text"));
    assert_eq!(lines.count(), 3, "{text}");
}

#[derive(Serialize, Deserialize)]
enum Kind {
    Plain,
    One(u8),
    Two(u8, u8),
    Named { a: u8 },
}

#[test]
fn variants_with_fields_are_refused() {
    assert_eq!(one::<Kind>("Enum('Plain')").lines().count(), 1);
    let text = one::<Kind>("Enum('Plain', 'One', 'Two', 'Named')");
    assert!(
        text.contains("field `x`: ") && text.contains("found the enum variant `One` with fields"),
        "{text}"
    );
}
