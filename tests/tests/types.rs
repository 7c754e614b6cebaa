//! Which Rust value goes into which ClickHouse type: pushed through `Columns`, sent as one Native block, read back from
//! the real engine, and hashed on both sides.
//!
//! The table is in the documentation of `millstream::columns`; `the_table_of_types_is_covered` holds it to these tests.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use millstream::columns::{Columns, city_hash_of_numbers};
use millstream::schema::{Faults, Schema};
use millstream::{Failure, Outcome, Pipeline, native};
use millstream_local::{ClickHouse, Progress};
use serde::ser::{Serialize, SerializeStruct, Serializer};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);

/// A ClickHouse engine in a child process; ended when dropped.
struct Engine {
    child: Child,
    _stdin: ChildStdin,
    port: u16,
    tables: AtomicU32,
    _dir: TempDir,
}

fn library() -> PathBuf {
    if let Some(library) = std::env::var_os("MILLSTREAM_TEST_LIBCHDB") {
        return library.into();
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let progress: Progress = Arc::new(|_| {});
    match runtime.block_on(millstream_local::find_clickhouse(&progress)).expect("a ClickHouse") {
        ClickHouse::Library(library) => library,
        ClickHouse::Server(binary) => {
            panic!("`{}` is on PATH: name libchdb.so in MILLSTREAM_TEST_LIBCHDB", binary.display())
        }
    }
}

impl Engine {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut child = Command::new(env!("CARGO_BIN_EXE_probe"))
            .arg("__local-engine")
            .arg("--lib")
            .arg(library())
            .arg("--path")
            .arg(dir.path().join("data"))
            .args(["--port", "0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the probe starts");
        let stdin = child.stdin.take().expect("piped");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        let ready: serde_json::Value = serde_json::from_str(&line).expect("one JSON line when ready");
        let port = ready["port"].as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
        Self { child, _stdin: stdin, port, tables: AtomicU32::new(0), _dir: dir }
    }

    fn post(&self, query: &str, body: &[u8]) -> Result<String, String> {
        let query: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let head =
            format!("POST /?query={query} HTTP/1.0\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.write_all(&[head.as_bytes(), body].concat()).expect("the request is taken");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let answer = String::from_utf8_lossy(&answer);
        let (head, text) = answer.split_once("\r\n\r\n").expect("a head");
        if head.lines().next().is_some_and(|line| line.contains(" 200")) {
            Ok(text.to_owned())
        } else {
            Err(text.to_owned())
        }
    }

    fn ask(&self, sql: &str) -> String {
        self.post(sql, b"").unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// The first column of the answer, as text.
    fn texts(&self, sql: &str) -> Vec<String> {
        let text = self.ask(&format!("{sql} FORMAT JSONCompactEachRow"));
        let value = |line: &str| {
            let row: Vec<String> = serde_json::from_str(line).unwrap_or_else(|_| panic!("{sql}: {line}"));
            row.into_iter().next().expect("a value")
        };
        text.lines().map(value).collect()
    }

    fn new_table(&self, columns: &str) -> String {
        let name = format!("t{}", self.tables.fetch_add(1, Ordering::Relaxed));
        self.ask(&format!("CREATE TABLE {name} ({columns}) ENGINE = MergeTree ORDER BY n"));
        name
    }

    fn insert(&self, table: &str, body: &[u8]) {
        let insert = format!("INSERT INTO {table} FORMAT Native");
        self.post(&insert, body).unwrap_or_else(|error| panic!("{table}: {error}"));
    }

    /// Stores the values in a column of that type, reads them back with `read` (an expression over `x`), and compares
    /// the hashes of both sides.
    fn holds_as<T: Serialize>(&self, kind: &str, read: &str, values: &[(T, &str)]) {
        let schema = parsed(kind);
        let table = self.new_table(&format!("n UInt32, x {kind}"));
        self.holds_in(&table, &schema, read, values);
        let stored = self.ask(&format!(
            "SELECT type FROM system.columns WHERE database = currentDatabase() AND table = '{table}' \
             AND name != 'n' ORDER BY position FORMAT TSVRaw"
        ));
        let spelled: Vec<&str> = schema.columns().iter().map(|column| &column.text[..]).collect();
        assert_eq!(stored.lines().collect::<Vec<_>>(), spelled, "{kind} as the server spells it");
    }

    fn holds_in<T: Serialize>(&self, table: &str, schema: &Schema, read: &str, values: &[(T, &str)]) {
        let kind = schema.to_text();
        let mut columns = Columns::of(schema);
        for (value, wanted) in values {
            let row = Row { x: value };
            columns.push(schema, &row).unwrap_or_else(|fault| panic!("{kind}: {wanted}: {fault}"));
        }
        assert!(columns.is_sound(schema, values.len()), "{kind}");
        self.insert(table, &block(schema, &columns, 0));
        let found = self.texts(&format!("SELECT {read} FROM {table} ORDER BY n"));
        let wanted: Vec<&str> = values.iter().map(|(_, wanted)| *wanted).collect();
        assert_eq!(found, wanted, "{kind}");
        self.same_hashes(table, schema, &columns);
    }

    fn same_hashes(&self, table: &str, schema: &Schema, columns: &Columns) {
        let arguments = schema.hash_arguments().join(", ");
        let theirs =
            self.texts(&format!("SELECT toString(cityHash64(n, n, {arguments})) FROM {table} ORDER BY n"));
        let numbers = 0..columns.rows() as u64;
        let mut ours: Vec<u64> = numbers.map(|n| city_hash_of_numbers(&[n, n])).collect();
        columns.fold_hashes(schema, &mut ours);
        let ours: Vec<String> = ours.iter().map(u64::to_string).collect();
        assert_eq!(ours, theirs, "hashes of {}", schema.to_text());
    }

    fn holds<T: Serialize>(&self, kind: &str, values: &[(T, &str)]) {
        self.holds_as(kind, "ifNull(toString(x), 'NULL')", values);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn parsed(kind: &str) -> Schema {
    Schema::parse(&[("x", kind)]).unwrap_or_else(|faults| panic!("{kind}: {faults:?}"))
}

/// A row of one column.
struct Row<T> {
    x: T,
}

impl<T: Serialize> Serialize for Row<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut row = serializer.serialize_struct("Row", 1)?;
        row.serialize_field("x", &self.x)?;
        row.end()
    }
}

/// One block: numbers as `n`, then the columns.
fn block(schema: &Schema, columns: &Columns, first: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let rows = columns.rows();
    native::begin_block(&mut out, 1 + schema.columns().len(), rows);
    let numbers: Vec<u8> = (first..first + rows as u32).flat_map(u32::to_le_bytes).collect();
    native::fixed(&mut out, "n", "UInt32", &numbers);
    columns.write_native(schema, &mut out);
    out
}

fn columns_of<T: Serialize>(schema: &Schema, rows: &[T]) -> Columns {
    let mut columns = Columns::of(schema);
    rows.iter().for_each(|row| columns.push(schema, row).expect("a row"));
    columns
}

/// What a value of `kind` is refused with.
#[track_caller]
fn refused<T: Serialize>(kind: &str, value: T, parts: &[&str]) {
    let schema = Schema::parse(&[("x", kind)]).expect("a type");
    let mut columns = Columns::of(&schema);
    let fault = columns.push(&schema, &Row { x: value }).expect_err(kind).to_string();
    for part in parts.iter().chain(&["column `x"]) {
        assert!(fault.contains(part), "{kind}: `{part}` is not in `{fault}`");
    }
    assert_eq!(columns, Columns::of(&schema), "nothing of the row stays");
}

/// Bytes, as `serde_bytes` gives them.
struct Bytes<'a>(&'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

#[derive(serde::Serialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Level {
    Low,
    High,
}

#[derive(serde::Serialize)]
struct Place {
    lat: f64,
    lon: f64,
}

#[derive(serde::Serialize)]
struct Step {
    name: String,
    tags: Vec<String>,
    #[serde(rename = "n")]
    number: u8,
}

fn step(name: &str, tags: &[&str], number: u8) -> Step {
    Step { name: name.to_owned(), tags: tags.iter().map(|tag| (*tag).to_owned()).collect(), number }
}

#[test]
fn numbers_are_read_back() {
    let engine = Engine::start();
    engine.holds("UInt8", &[(0u8, "0"), (u8::MAX, "255")]);
    engine.holds("UInt16", &[(0u16, "0"), (u16::MAX, "65535")]);
    engine.holds("UInt32", &[(0u32, "0"), (u32::MAX, "4294967295")]);
    engine.holds("UInt64", &[(0u64, "0"), (u64::MAX, "18446744073709551615")]);
    engine.holds("UInt128", &[(0u128, "0"), (u128::MAX, "340282366920938463463374607431768211455")]);
    engine.holds("Int8", &[(i8::MIN, "-128"), (-1, "-1"), (i8::MAX, "127")]);
    engine.holds("Int16", &[(i16::MIN, "-32768"), (i16::MAX, "32767")]);
    engine.holds("Int32", &[(i32::MIN, "-2147483648"), (i32::MAX, "2147483647")]);
    engine.holds("Int64", &[(i64::MIN, "-9223372036854775808"), (i64::MAX, "9223372036854775807")]);
    engine.holds("Int128", &[(i128::MIN, "-170141183460469231731687303715884105728"), (7, "7")]);
    let highest = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
    let lowest = "-57896044618658097711785492504343953926634992332820282019728792003956564819968";
    engine.holds("UInt256", &[(highest, highest), ("0x2a", "42"), ("0", "0")]);
    engine.holds("UInt256", &[(u128::MAX, "340282366920938463463374607431768211455")]);
    engine.holds("Int256", &[(lowest, lowest), ("-0x2A", "-42"), ("7", "7")]);
    engine.holds("Int256", &[(-5i8, "-5")]);
    engine.holds("Bool", &[(false, "false"), (true, "true")]);
    engine.holds(
        "Float32",
        &[(f32::MIN, "-3.4028235e38"), (f32::NAN, "nan"), (f32::INFINITY, "inf"), (0.5, "0.5")],
    );
    engine.holds(
        "Float64",
        &[(f64::MAX, "1.7976931348623157e308"), (f64::NAN, "nan"), (-0.0, "-0"), (5e-324, "5e-324")],
    );
    // Into wider ones, and into narrower ones when nothing is lost.
    engine.holds("UInt64", &[(7u8, "7")]);
    engine.holds("Int16", &[(300u64, "300")]);
    engine.holds("Float64", &[(0.1f32, "0.10000000149011612")]);
    engine.holds("Float32", &[(0.25f64, "0.25"), (f64::NAN, "nan")]);
}

#[test]
fn decimals_are_read_back() {
    use rust_decimal::Decimal;
    let engine = Engine::start();
    let decimal = |text: &str| text.parse::<Decimal>().expect("a decimal");
    engine.holds(
        "Decimal(9, 2)",
        &[(decimal("9999999.99"), "9999999.99"), (decimal("-0.5"), "-0.5"), (Decimal::ZERO, "0")],
    );
    engine.holds(
        "Decimal(18)",
        &[(decimal("-999999999999999999"), "-999999999999999999"), (decimal("1.000"), "1")],
    );
    engine.holds("Decimal(38, 10)", &[(decimal("1234567890.0123456789"), "1234567890.0123456789")]);
    let digits = "9".repeat(76);
    engine.holds("Decimal(76, 0)", &[(&digits[..], &digits[..]), ("-1e3", "-1000")]);
    engine.holds(
        "Decimal(76, 76)",
        &[(format!("0.{}1", "0".repeat(75)), &format!("0.{}1", "0".repeat(75))[..])],
    );
    // Integers are scaled as the column is.
    engine.holds("Decimal(9, 2)", &[(999_999_999i32, "9999999.99"), (-5, "-0.05")]);
    engine.holds("Decimal(18, 4)", &[(15_000i64, "1.5")]);
    engine.holds("Decimal32(3)", &[(1500u16, "1.5")]);
}

#[derive(serde::Serialize)]
struct Stamped(#[serde(with = "time::serde::rfc3339")] time::OffsetDateTime);

#[test]
fn dates_and_times_are_read_back() {
    let engine = Engine::start();
    let date = |text: &str| text.parse::<chrono::NaiveDate>().expect("a date");
    engine.holds("Date", &[(date("1970-01-01"), "1970-01-01"), (date("2149-06-06"), "2149-06-06")]);
    engine.holds("Date", &[(0u16, "1970-01-01"), (u16::MAX, "2149-06-06")]);
    engine.holds("Date32", &[(date("1900-01-01"), "1900-01-01"), (date("2299-12-31"), "2299-12-31")]);
    engine.holds("Date32", &[(-25_567i32, "1900-01-01"), (120_529, "2299-12-31")]);
    engine.holds("Date32", &[(jiff::civil::date(1960, 2, 29), "1960-02-29")]);

    let at = |text: &str| text.parse::<chrono::DateTime<chrono::Utc>>().expect("a time");
    let last = "2106-02-07 06:28:15";
    engine.holds(
        "DateTime('UTC')",
        &[(at("1970-01-01T00:00:00Z"), "1970-01-01 00:00:00"), (at("2106-02-07T06:28:15Z"), last)],
    );
    engine.holds("DateTime('UTC')", &[(0u32, "1970-01-01 00:00:00"), (u32::MAX, last)]);
    engine.holds(
        "DateTime64(3, 'UTC')",
        &[
            (at("1900-01-01T00:00:00Z"), "1900-01-01 00:00:00.000"),
            (at("1969-12-31T23:59:59.999Z"), "1969-12-31 23:59:59.999"),
            (at("2299-12-31T23:59:59.999Z"), "2299-12-31 23:59:59.999"),
        ],
    );
    engine.holds(
        "DateTime64(9, 'UTC')",
        &[
            (at("1900-01-01T00:00:00Z"), "1900-01-01 00:00:00.000000000"),
            (at("2262-04-11T23:47:16.854775807Z"), "2262-04-11 23:47:16.854775807"),
        ],
    );
    engine.holds(
        "DateTime64(0, 'UTC')",
        &[(-1i64, "1969-12-31 23:59:59"), (10_413_791_999, "2299-12-31 23:59:59")],
    );
    let other = Stamped(time::OffsetDateTime::UNIX_EPOCH + time::Duration::nanoseconds(1_500_000_000));
    engine.holds("DateTime64(9, 'UTC')", &[(other, "1970-01-01 00:00:01.500000000")]);
    let local: chrono::DateTime<chrono::FixedOffset> = "2024-06-19T15:22:45.5+02:00".parse().expect("a time");
    engine.holds("DateTime64(3, 'Europe/Berlin')", &[(local, "2024-06-19 15:22:45.500")]);
    engine.holds("DateTime64(6, 'UTC')", &[(local.naive_utc(), "2024-06-19 13:22:45.500000")]);
    let stamp: jiff::Timestamp = "2024-06-19T15:22:45.123456789Z".parse().expect("a time");
    engine.holds("DateTime64(9, 'UTC')", &[(stamp, "2024-06-19 15:22:45.123456789")]);
    let zoned = stamp.to_zoned(jiff::tz::TimeZone::fixed(jiff::tz::offset(-4)));
    engine.holds("DateTime64(9, 'UTC')", &[(zoned, "2024-06-19 15:22:45.123456789")]);
    engine.holds(
        "DateTime64(3, 'UTC')",
        &[(jiff::civil::date(2024, 1, 2).at(3, 4, 5, 0), "2024-01-02 03:04:05.000")],
    );
}

#[test]
fn texts_bytes_and_names_are_read_back() {
    let engine = Engine::start();
    let long = "ü".repeat(100_000);
    engine.holds("String", &[("", ""), ("a\nb\0\t'", "a\nb\0\t'"), ("日本 🦀", "日本 🦀"), (&long, &long)]);
    engine.holds("String", &[('x', "x"), ('🦀', "🦀")]);
    engine.holds("String", &[(Level::High, "high")]);
    engine.holds_as("String", "hex(x)", &[(Bytes(&[0, 0xFF, 0xC3]), "00FFC3"), (Bytes(&[]), "")]);
    engine.holds_as("FixedString(3)", "hex(x)", &[([0u8, 0xFF, 7], "00FF07")]);
    engine.holds("FixedString(3)", &[("abc", "abc"), ("ü!", "ü!")]);
    engine.holds_as("FixedString(2)", "hex(x)", &[(Bytes(&[1, 0]), "0100")]);
    engine.holds("FixedString(256)", &[("x".repeat(256), &"x".repeat(256)[..])]);
    engine.holds("Enum8('low' = -128, 'high' = 127)", &[(Level::Low, "low"), (Level::High, "high")]);
    engine.holds("Enum('low', 'high')", &[("high", "high"), ("low", "low")]);
    engine.holds(
        "Enum16('high' = 32767, 'low' = -32768, 'it\\'s' = 0)",
        &[(-32768i64, "low"), (0, "it's"), (32767, "high")],
    );
    let id = uuid::Uuid::from_u128(0x67e5_5044_10b1_426f_9247_bb68_0e5f_e0c8);
    let text = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    engine.holds(
        "UUID",
        &[
            (id, text),
            (uuid::Uuid::nil(), &uuid::Uuid::nil().to_string()),
            (uuid::Uuid::max(), "ffffffff-ffff-ffff-ffff-ffffffffffff"),
        ],
    );
    engine.holds("UUID", &[(id.simple().to_string(), text)]);
    engine.holds("UUID", &[(id.as_u128(), text)]);
    engine.holds("UUID", &[(*id.as_bytes(), text)]);
    engine.holds("IPv4", &[(Ipv4Addr::new(1, 2, 3, 4), "1.2.3.4"), (Ipv4Addr::BROADCAST, "255.255.255.255")]);
    engine.holds("IPv4", &[(0x0102_0304u32, "1.2.3.4")]);
    engine.holds(
        "IPv6",
        &[(Ipv6Addr::LOCALHOST, "::1"), ("2001:db8::7".parse().expect("an address"), "2001:db8::7")],
    );
    engine.holds("IPv6", &[(IpAddr::from([1, 2, 3, 4]), "::ffff:1.2.3.4")]);
    engine.holds("IPv6", &[(1u128, "::1")]);
    engine.holds("IPv6", &[(Ipv6Addr::LOCALHOST.octets(), "::1")]);
}

#[test]
fn nullable_and_low_cardinality_are_read_back() {
    let engine = Engine::start();
    engine.holds("Nullable(UInt8)", &[(Some(0u8), "0"), (None, "NULL"), (Some(255), "255")]);
    engine.holds("Nullable(UInt8)", &[(7u8, "7")]);
    engine.holds("Nullable(String)", &[(Some(""), ""), (None, "NULL"), (Some("ü"), "ü")]);
    engine.holds("Nullable(FixedString(2))", &[(Some("ab"), "ab"), (None, "NULL")]);
    engine.holds("Nullable(Decimal(9, 2))", &[(Some("1.5"), "1.5"), (None, "NULL")]);
    engine.holds("Nullable(Enum8('low' = 1, 'high' = 2))", &[(None, "NULL"), (Some(Level::High), "high")]);
    engine.holds(
        "Nullable(UUID)",
        &[(None, "NULL"), (Some(uuid::Uuid::nil()), &uuid::Uuid::nil().to_string())],
    );
    engine
        .holds("Nullable(DateTime64(3, 'UTC'))", &[(Some(0i64), "1970-01-01 00:00:00.000"), (None, "NULL")]);
    engine.holds("LowCardinality(String)", &[("a", "a"), ("", ""), ("a", "a"), ("b", "b")]);
    engine.holds("LowCardinality(FixedString(2))", &[("ab", "ab"), ("cd", "cd"), ("ab", "ab")]);
    engine.holds("LowCardinality(UUID)", &[(uuid::Uuid::nil(), &uuid::Uuid::nil().to_string()[..])]);
    engine.holds(
        "LowCardinality(Nullable(String))",
        &[(None, "NULL"), (Some(""), ""), (Some("a"), "a"), (None, "NULL")],
    );
    engine.holds("LowCardinality(Nullable(String))", &[(None::<&str>, "NULL")]);
    engine.holds("LowCardinality(Nullable(FixedString(1)))", &[(Some("a"), "a"), (None, "NULL")]);
    let many: Vec<(String, String)> = (0..300).map(|n| (format!("v{n}"), format!("v{n}"))).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(value, text)| (&value[..], &text[..])).collect();
    engine.holds("LowCardinality(String)", &many);
}

#[test]
fn lists_maps_tuples_and_nested_are_read_back() {
    let engine = Engine::start();
    engine.holds("Array(UInt64)", &[(vec![], "[]"), (vec![1u64, u64::MAX], "[1,18446744073709551615]")]);
    engine.holds("Array(Float32)", &[([0.5f32, 1.5], "[0.5,1.5]")]);
    engine.holds("Array(UInt8)", &[(Bytes(&[1, 2]), "[1,2]"), (Bytes(&[]), "[]")]);
    engine.holds("Array(Array(String))", &[(vec![], "[]"), (vec![vec![], vec!["a", ""]], "[[],['a','']]")]);
    engine.holds("Array(Nullable(Int8))", &[(vec![Some(-1i8), None], "[-1,NULL]"), (vec![], "[]")]);
    engine.holds("Array(LowCardinality(String))", &[(vec!["a", "b", "a"], "['a','b','a']"), (vec![], "[]")]);
    engine.holds("Array(LowCardinality(String))", &[(Vec::<&str>::new(), "[]")]);
    engine.holds("Array(LowCardinality(Nullable(String)))", &[(vec![Some("a"), None], "['a',NULL]")]);
    engine.holds("Array(UUID)", &[(vec![uuid::Uuid::nil()], "['00000000-0000-0000-0000-000000000000']")]);
    engine.holds("Tuple(UInt8, String)", &[((1u8, "a"), "(1,'a')")]);
    engine.holds("Tuple(UInt8)", &[((7u8,), "(7)")]);
    engine.holds("Tuple(lon Float64, lat Float64)", &[(Place { lat: 1.5, lon: -2.5 }, "(-2.5,1.5)")]);
    engine.holds(
        "Tuple(a LowCardinality(String), b Array(LowCardinality(String)))",
        &[(("x", vec!["y", "x"]), "('x',['y','x'])")],
    );
    engine.holds(
        "Tuple(a Tuple(b Nullable(UInt8), c UInt8), d String)",
        &[(((None::<u8>, 1u8), "z"), "((NULL,1),'z')")],
    );
    engine.holds(
        "Array(Tuple(n UInt8, name String, tags Array(String)))",
        &[
            (vec![step("a", &["x", "y"], 1), step("b", &[], 2)], "[(1,'a',['x','y']),(2,'b',[])]"),
            (vec![], "[]"),
        ],
    );
    engine.holds(
        "Map(String, UInt64)",
        &[(BTreeMap::from([("a", 1u64), ("b", 2)]), "{'a':1,'b':2}"), (BTreeMap::new(), "{}")],
    );
    engine.holds(
        "Map(LowCardinality(String), Array(Nullable(Int32)))",
        &[(HashMap::from([("k", vec![Some(1), None])]), "{'k':[1,NULL]}")],
    );
    engine.holds(
        "Map(UInt8, Map(String, LowCardinality(String)))",
        &[(
            BTreeMap::from([(1u8, BTreeMap::from([("a", "b")])), (2, BTreeMap::new())]),
            "{1:{'a':'b'},2:{}}",
        )],
    );
    engine.holds(
        "Map(UUID, Date)",
        &[(
            BTreeMap::from([(uuid::Uuid::nil(), 1u16)]),
            "{'00000000-0000-0000-0000-000000000000':'1970-01-02'}",
        )],
    );
    engine.holds_as(
        "Nested(n UInt8, name LowCardinality(String), tags Array(String))",
        "toString((`x.n`, `x.name`, `x.tags`))",
        &[
            (vec![], "([],[],[])"),
            (
                vec![step("a", &["t"], 1), step("b", &[], 2), step("a", &["u", "v"], 3)],
                "([1,2,3],['a','b','a'],[['t'],[],['u','v']])",
            ),
        ],
    );
    // The server would spell the inner one `Array(Nested(c UInt8))`, which is the same.
    let schema = parsed("Nested(a UInt8, b Nested(c UInt8))");
    let table = engine.new_table("n UInt32, x Nested(a UInt8, b Nested(c UInt8))");
    let value = vec![Outer { a: 1, b: vec![Inner { c: 2 }, Inner { c: 3 }] }];
    engine.holds_in(&table, &schema, "toString((`x.a`, `x.b`))", &[(value, "([1],[[(2),(3)]])")]);
}

#[derive(serde::Serialize)]
struct Outer {
    a: u8,
    b: Vec<Inner>,
}

#[derive(serde::Serialize)]
struct Inner {
    c: u8,
}

#[test]
fn values_out_of_range_are_refused_by_column_and_value() {
    refused("UInt8", 256u16, &["256 is not a value of UInt8"]);
    refused("UInt64", -1i8, &["-1 is not a value of UInt64"]);
    refused("Int8", 128u64, &["128"]);
    refused("Int64", u64::MAX, &["18446744073709551615"]);
    refused("Int128", u128::MAX, &["Int128"]);
    refused("UInt256", "-1", &["-1 is not a value of UInt256"]);
    refused("UInt256", "1.5", &["not a whole number"]);
    refused("UInt32", "7", &["the text `7` does not go into UInt32"]);
    refused("UInt8", 1.0f64, &["the float 1"]);
    refused("Float32", 0.1f64, &["rounded"]);
    refused("Float64", u64::MAX, &["18446744073709551615"]);
    refused("Bool", 1u8, &["the number 1 does not go into Bool"]);
    refused("Decimal(9, 2)", "10000000", &["more digits than"]);
    refused("Decimal(9, 2)", "0.001", &["more decimal places"]);
    refused("Decimal(9, 2)", 1_000_000_000i32, &["1000000000"]);
    refused("Decimal(9, 2)", 0.5f64, &["the float 0.5"]);
    refused("Date", "2149-06-07", &["`2149-06-07` is not a value of Date"]);
    refused("Date", "2024-02-30", &["2024-02-30"]);
    refused("Date", "2024-01-01T00:00:00Z", &["a date is written as"]);
    refused("Date32", "1899-12-31", &["Date32"]);
    refused("Date32", 120_530i32, &["120530"]);
    refused("DateTime", "2106-02-07T06:28:16Z", &["DateTime"]);
    refused("DateTime", "2024-01-01T00:00:00.5Z", &["more decimal places"]);
    refused("DateTime", "1969-12-31T23:59:59Z", &["DateTime"]);
    refused("DateTime64(3)", "2300-01-01T00:00:00Z", &["2300"]);
    refused("DateTime64(3)", "2024-01-01T00:00:00.1234Z", &["more decimal places"]);
    refused("DateTime64(9)", "2262-04-11T23:47:16.854775808Z", &["2262"]);
    refused("DateTime64(3)", i64::MAX, &["9223372036854775807"]);
    refused("DateTime64(3, 'Europe/Berlin')", "2024-01-01T00:00:00", &["no offset from UTC"]);
    refused("Enum8('low' = 1, 'high' = 2)", 9u8, &["9 is not a value of Enum8('low' = 1, 'high' = 2)"]);
    refused("Enum8('low' = 1, 'mid' = 2)", Level::High, &["`high` is not a value of Enum8"]);
    refused("FixedString(3)", "ab", &["it has 2 bytes"]);
    refused("FixedString(3)", [1u8; 4], &["4 bytes"]);
    refused("UUID", "67e55044", &["UUID"]);
    refused("IPv4", "::1", &["IPv4"]);
    refused("IPv4", "1.2.3", &["IPv4"]);
    refused("String", None::<&str>, &["the value is None, and String is not Nullable"]);
    refused("String", 7u8, &["the number 7 does not go into String"]);
    refused("String", vec![1u8, 2], &["a list of 2 does not go into String"]);
    refused("Array(UInt8)", vec![1u16, 300], &["column `x[1]`", "300"]);
    refused("Tuple(UInt8, UInt8)", (1, 2, 3), &["a tuple of more than 2"]);
    refused("Tuple(UInt8, UInt8)", Place { lat: 1.0, lon: 2.0 }, &["the struct `Place`"]);
    refused(
        "Tuple(lat Float64, lng Float64)",
        Place { lat: 1.0, lon: 2.0 },
        &["column `x.lon`", "no column takes it"],
    );
    refused(
        "Tuple(lat Float64, lon Float64, h Float64)",
        Place { lat: 1.0, lon: 2.0 },
        &["column `x.h`", "no field"],
    );
    refused("Map(String, UInt8)", HashMap::from([("a", 300)]), &["column `x[value]`", "300"]);
    refused("Map(String, UInt8)", vec![("a", 1u8)], &["a list of 1"]);
    refused("UInt256", "x\n".repeat(300), &["`x\\nx\\n", "…"]);
}

#[test]
fn blocks_behind_each_other_keep_their_own_dictionaries() {
    #[derive(serde::Serialize)]
    struct Word {
        word: String,
    }
    let engine = Engine::start();
    let schema = Schema::parse(&[("word", "LowCardinality(String)")]).expect("a type");
    let table = engine.new_table("n UInt32, word LowCardinality(String)");
    let few = |from: u32| {
        (from..from + 10).map(|n| Word { word: format!("w{}", n % 3 + from) }).collect::<Vec<_>>()
    };
    // Too many for a dictionary: that block says String.
    let many: Vec<Word> = (0..70_000).map(|n| Word { word: format!("m{n}") }).collect();
    let mut body = Vec::new();
    let mut next = 0;
    let blocks = [few(0), many, few(100)].map(|rows| columns_of(&schema, &rows));
    for columns in &blocks {
        body.extend(block(&schema, columns, next));
        next += columns.rows() as u32;
    }
    engine.insert(&table, &body);
    let found = engine.texts(&format!("SELECT word FROM {table} WHERE n < 4 OR n >= 70016 ORDER BY n"));
    assert_eq!(found, ["w0", "w1", "w2", "w0", "w101", "w102", "w100", "w101"]);
    assert_eq!(engine.ask(&format!("SELECT count(), uniqExact(word) FROM {table}")).trim(), "70020\t70006");
    let [mut all, second, third] = blocks;
    all.append(second);
    all.append(third);
    engine.same_hashes(&table, &schema, &all);
}

#[test]
fn a_block_with_millstreams_own_columns_is_stored() {
    #[derive(serde::Serialize)]
    struct Peak {
        peak: u128,
        steps: u32,
    }
    let engine = Engine::start();
    let schema = Schema::parse(&[("steps", "UInt32"), ("peak", "UInt128")]).expect("types");
    let table = engine.new_table(
        "run LowCardinality(String), pass UInt32, n UInt32, id String, status Enum8('ok' = 1, 'dead' = 2), \
         steps UInt32, peak UInt128, note String DEFAULT 'none'",
    );
    let rows: Vec<Peak> = (0..300).map(|n| Peak { peak: u128::from(n) << 70, steps: n }).collect();
    let mut columns = columns_of(&schema, &rows);
    columns.push_blank(&schema);
    let ids: Vec<String> = (0..301).map(|n| format!("ü{n}")).collect();
    let numbers: Vec<u8> = (0..301u32).flat_map(u32::to_le_bytes).collect();
    let mut body = Vec::new();
    native::begin_block(&mut body, 7, 301);
    native::repeated_text(&mut body, "run", "grün", 301);
    native::repeated(&mut body, "pass", "UInt32", &2u32.to_le_bytes(), 301);
    native::repeated(&mut body, "status", "Enum8('ok' = 1, 'dead' = 2)", &[2], 301);
    native::fixed(&mut body, "n", "UInt32", &numbers);
    <String as millstream::Id>::write_native_column(&ids, &mut body);
    columns.write_native(&schema, &mut body);
    engine.insert(&table, &body);
    let sums = "SELECT count(), any(run), uniqExact(run), sum(pass), any(status), sum(steps), \
                max(peak) = bitShiftLeft(toUInt128(299), 70), any(note), uniqExact(id) FROM ";
    assert_eq!(engine.ask(&format!("{sums}{table}")).trim(), "301\tgrün\t1\t602\tdead\t44850\t1\tnone\t301");
    engine.same_hashes(&table, &schema, &columns);
}

/// A row type with the usual crates' types.
#[derive(serde::Serialize, serde::Deserialize)]
struct Usual {
    id_of: uuid::Uuid,
    day: chrono::NaiveDate,
    at: chrono::DateTime<chrono::Utc>,
    naive: chrono::NaiveDateTime,
    #[serde(with = "chrono::serde::ts_milliseconds")]
    ticks: chrono::DateTime<chrono::Utc>,
    stamp: jiff::Timestamp,
    zoned: jiff::Zoned,
    civil: Option<jiff::civil::Date>,
    price: rust_decimal::Decimal,
    from: Ipv4Addr,
    to: IpAddr,
    level: Answer,
    places: Vec<(String, Option<uuid::Uuid>)>,
}

#[derive(serde::Serialize, serde::Deserialize)]
enum Answer {
    Yes,
    No,
}

const USUAL: &[(&str, &str)] = &[
    ("id_of", "UUID"),
    ("day", "Date"),
    ("at", "DateTime64(3, 'UTC')"),
    ("naive", "DateTime"),
    ("ticks", "DateTime64(3, 'Europe/Berlin')"),
    ("stamp", "DateTime64(9)"),
    ("zoned", "DateTime64(6)"),
    ("civil", "Nullable(Date32)"),
    ("price", "Decimal(18, 4)"),
    ("from", "IPv4"),
    ("to", "IPv6"),
    ("level", "Enum('Yes', 'No')"),
    ("places", "Array(Tuple(String, Nullable(UUID)))"),
];

struct UsualRows;
struct WrongRows;

impl Pipeline for UsualRows {
    const NAME: &'static str = "usual";
    const COLUMNS: &'static [(&'static str, &'static str)] = USUAL;
    type Id = u64;
    type Row = Usual;
    fn compute(&self, _: &u64) -> Outcome<Usual> {
        Err(Failure::reject("never called"))
    }
}

impl Pipeline for WrongRows {
    const NAME: &'static str = "wrong";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[
        ("id_of", "UInt64"),
        ("day", "Float64"),
        ("at", "Bool"),
        ("naive", "Array(UInt8)"),
        ("ticks", "UInt32"),
        ("stamp", "UInt128"),
        ("zoned", "Int8"),
        ("civil", "Date32"),
        ("price", "Float64"),
        ("from", "UInt32"),
        ("to", "Tuple(String, UInt16)"),
        ("level", "Enum('Yes')"),
        ("places", "Map(String, UUID)"),
    ];
    type Id = u64;
    type Row = Usual;
    fn compute(&self, _: &u64) -> Outcome<Usual> {
        Err(Failure::reject("never called"))
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Dates {
    day: chrono::NaiveDate,
    time: chrono::DateTime<chrono::Utc>,
    naive: chrono::NaiveDateTime,
    id_of: uuid::Uuid,
}

struct OtherForms;

impl Pipeline for OtherForms {
    const NAME: &'static str = "forms";
    const COLUMNS: &'static [(&'static str, &'static str)] =
        &[("day", "DateTime"), ("time", "Date"), ("naive", "DateTime('Europe/Berlin')"), ("id_of", "IPv6")];
    type Id = u64;
    type Row = Dates;
    fn compute(&self, _: &u64) -> Outcome<Dates> {
        Err(Failure::reject("never called"))
    }
}

#[test]
fn texts_that_a_column_never_reads_are_refused_at_the_start() {
    let faults = millstream::check::<OtherForms>().expect_err("every column is wrong");
    let text = Faults(&faults).to_string();
    for (name, _) in OtherForms::COLUMNS {
        assert!(text.contains(&format!("field `{name}`: ")), "`{name}` is not in\n{text}");
    }
}

#[test]
fn the_check_at_the_start_knows_the_usual_crates() {
    let spec = millstream::check::<UsualRows>().unwrap_or_else(|faults| panic!("{}", Faults(&faults)));
    assert_eq!(spec.schema.columns().len(), USUAL.len());
    let faults = millstream::check::<WrongRows>().expect_err("every column is wrong");
    let text = Faults(&faults).to_string();
    for (name, _) in USUAL {
        assert!(text.contains(&format!("field `{name}`: ")), "`{name}` is not in\n{text}");
    }
}

/// The cells of a table in the documentation of `millstream::columns`, below a heading.
fn table_rows(heading: &str) -> Vec<(Vec<&'static str>, &'static str)> {
    const DOCUMENTATION: &str = include_str!("../../crates/pipeline/src/columns.rs");
    let (_, table) = DOCUMENTATION.split_once(heading).expect("the table is there");
    let lines = table.lines().map(|line| line.trim_start_matches("//! "));
    let table = lines.skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let rows = table.filter(|line| line.contains('`'));
    rows.map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').splitn(2, " | ").collect();
        (cells[0].split('`').skip(1).step_by(2).collect(), cells[1].trim())
    })
    .collect()
}

/// This very file has values for each of them.
#[test]
fn the_table_of_types_is_covered() {
    let tests: String = include_str!("types.rs").split_whitespace().collect();
    let rows = table_rows("# Which Rust value goes into which type");
    assert!(rows.len() > 15, "{rows:?}");
    for kind in rows.iter().flat_map(|(kinds, _)| kinds) {
        parsed(kind);
        let family = kind.split_inclusive('(').next().expect("a name");
        let used = |call: &str| tests.contains(&format!("{call}(\"{family}"));
        assert!(used("holds") || used("holds_as"), "no test has values for {kind}");
    }
}

#[test]
fn what_the_table_refuses_is_refused_with_what_to_use() {
    let rows = table_rows("# What is refused");
    assert!(rows.len() > 10, "{rows:?}");
    for (kinds, instead) in rows {
        for kind in kinds {
            let faults = Schema::parse(&[("x", kind)]).expect_err(kind);
            let text = faults[0].to_string();
            assert!(
                text.contains("column `x`") && text.contains(instead),
                "{kind}: `{instead}` is not in `{text}`"
            );
        }
    }
}

/// What the server says to the types that are refused for its sake: each is one that it does refuse.
#[test]
fn types_that_the_server_refuses_are_refused_here() {
    let engine = Engine::start();
    for kind in [
        "Nullable(Array(UInt8))",
        "Nullable(Map(String, UInt8))",
        "Nullable(Tuple(UInt8))",
        "Nullable(Nullable(UInt8))",
        "Nullable(LowCardinality(String))",
        "LowCardinality(UInt64)",
        "LowCardinality(Date)",
        "LowCardinality(Enum('a'))",
        "DateTime64(10)",
        "FixedString(0)",
        "FixedString(257)",
        "Enum8('a' = 1, 'a' = 2)",
        "Enum8('a' = 1, 'b' = 1)",
        "Enum8()",
        "Decimal(18, 30)",
        "Decimal(77, 0)",
        "Decimal(0)",
        "Decimal32(10)",
        "Map(Nullable(UInt8), UInt8)",
        "Map(LowCardinality(Nullable(String)), UInt8)",
        "Tuple(a UInt8, UInt8)",
        "Tuple(a UInt8, a UInt8)",
        "uint8",
        "Array(UInt8",
    ] {
        let create = format!("CREATE TABLE no (x {kind}) ENGINE = MergeTree ORDER BY tuple()");
        assert!(engine.post(&create, b"").is_err(), "{kind} is taken by the server");
        assert!(Schema::parse(&[("x", kind)]).is_err(), "{kind} is taken here");
    }
}
