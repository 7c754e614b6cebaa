//! The local ClickHouse engine, as clients see it: in a child process, over HTTP.
//!
//! Needs `libchdb.so`: from `MILLSTREAM_TEST_LIBCHDB`, or where `millstream_local::find_clickhouse` has it.

mod clients;
mod engine;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clickhouse::{Compression, Row};
use flate2::write::GzEncoder;
use lz4_flex::frame::FrameEncoder;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use engine::{DEADLINE, ENDLESS, Engine, coded, command, escaped, library, post, read, seen, served};

#[derive(Debug, Clone, PartialEq, Row, Serialize, Deserialize)]
struct Typed {
    id: u64,
    word: String,
    wide: u128,
    steps: Vec<u64>,
    maybe: Option<i32>,
    ratio: f64,
}

fn typed(id: u64) -> Typed {
    Typed {
        id,
        word: format!("word {}", id % 3),
        wide: u128::MAX - u128::from(id),
        steps: (0..id % 5).collect(),
        maybe: id.is_multiple_of(2).then_some(-5),
        ratio: 0.25,
    }
}

const TYPED: &str = "CREATE TABLE typed (id UInt64, word LowCardinality(String), wide UInt128, steps Array(UInt64), \
    maybe Nullable(Int32), ratio Float64, extra String DEFAULT 'x') ENGINE = MergeTree ORDER BY id";

#[tokio::test]
async fn typed_rows_survive_with_and_without_validation_and_compression() {
    let (_dir, engine) = served();
    engine.must(TYPED);
    let rows: Vec<Typed> = (0..2000).map(typed).collect();
    for validation in [true, false] {
        for compression in [Compression::None, Compression::Lz4] {
            engine.must("TRUNCATE TABLE typed");
            let client = engine.client().with_validation(validation).with_compression(compression);
            let mut insert = client.insert::<Typed>("typed").await.expect("an insert");
            for row in &rows {
                insert.write(row).await.expect("a row");
            }
            insert.end().await.expect("inserted");
            let query = client.query("SELECT ?fields FROM typed WHERE id < ? ORDER BY id").bind(2000);
            let found = query.fetch_all::<Typed>().await.expect("selected");
            assert_eq!(found, rows);
            let one: u64 = client
                .query("SELECT count() FROM typed WHERE extra = {x: String}")
                .param("x", "x")
                .fetch_one()
                .await
                .expect("counted");
            assert_eq!(one, 2000, "an omitted column gets its DEFAULT");
        }
    }
}

#[tokio::test]
async fn rows_encoded_elsewhere_are_inserted_as_they_are() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64, word String) ENGINE = MergeTree ORDER BY id");
    let mut bytes = Vec::new();
    for id in 0..100_000_u64 {
        bytes.extend_from_slice(&id.to_le_bytes());
        bytes.extend_from_slice(b"\x02ab");
    }
    for compression in [Compression::None, Compression::Lz4] {
        let client = engine.client().with_compression(compression).with_setting("async_insert", "0");
        let sql = "INSERT INTO t (id, word) FORMAT RowBinary";
        let mut insert = client.insert_formatted_with(sql).buffered_with_capacity(1 << 18);
        insert.write_all(&bytes).await.expect("written");
        insert.end().await.expect("inserted");
    }
    assert_eq!(
        engine.must("SELECT count(), uniqExact(id), max(id), any(word) FROM t"),
        "200000\t100000\t99999\tab"
    );
}

#[test]
fn one_insert_is_one_part() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64, word String) ENGINE = MergeTree ORDER BY id");
    engine.must("SYSTEM STOP MERGES t");
    let wide = vec![b'x'; 230];
    for (rows, word) in [(1_000_000_u64, &b"ab"[..]), (1_000_000, &wide[..])] {
        let mut body = Vec::new();
        for id in 0..rows {
            body.extend_from_slice(&id.to_le_bytes());
            let mut length = word.len();
            while length >= 0x80 {
                body.push(u8::try_from(length & 0x7f).expect("seven bits") | 0x80);
                length >>= 7;
            }
            body.push(u8::try_from(length).expect("seven bits"));
            body.extend_from_slice(word);
        }
        // What a client may have set for its own reasons does not split it.
        let parameters = format!(
            "max_insert_block_size=1000&max_threads=8&query={}",
            escaped("INSERT INTO t (id, word) FORMAT RowBinary")
        );
        let (status, text) = engine.ask(&parameters, body);
        assert_eq!(status, 200, "{text}");
    }
    let parts = engine.must("SELECT rows FROM system.parts WHERE table = 't' AND active ORDER BY name");
    assert_eq!(parts, "1000000\n1000000");
}

/// `clickhouse-connect` compresses what it inserts without being asked, the statement with the rows.
#[test]
fn a_body_may_be_compressed_for_http() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
    let mut gzip = GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(b"INSERT INTO t FORMAT TSV\n1\n2\n").expect("in memory");
    let gzip = gzip.finish().expect("in memory");
    let mut lz4 = FrameEncoder::new(Vec::new());
    lz4.write_all(b"3\n4\n5\n").expect("in memory");
    let lz4 = lz4.finish().expect("in memory");
    let insert = format!("query={}", escaped("INSERT INTO t FORMAT TSV"));
    for request in [coded("gzip", "", &gzip), coded("lz4", &insert, &lz4), coded("identity", &insert, b"6\n")]
    {
        let answer = engine.send(&request);
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(engine.must("SELECT count(), sum(id) FROM t"), "6\t21");
    for (coding, body, code) in
        [("gzip", &gzip[..gzip.len() - 3], "271"), ("zstd", b"7\n", "271"), ("snappy", b"7\n", "48")]
    {
        let answer = engine.send(&coded(coding, &insert, body));
        assert_eq!(answer.header("X-ClickHouse-Exception-Code"), Some(code), "{coding}: {answer:?}");
    }
    assert_eq!(engine.must("SELECT count() FROM t"), "6", "nothing of a body that is refused");
}

/// Each would be answered with 200, and forgotten before the client's next request.
#[test]
fn what_needs_a_session_is_refused() {
    let (_dir, engine) = served();
    let session = "session_id=a&session_timeout=60";
    for sql in ["SET max_threads = 1", "USE system", "CREATE TEMPORARY TABLE t (id UInt64)"] {
        let (status, text) = engine.ask(session, sql);
        assert_eq!(status, 501, "{sql}: {text}");
        assert!(text.contains("the local engine keeps no sessions"), "{text}");
    }
    assert_eq!(engine.ask(session, "SELECT 1"), (200, "1\n".to_owned()), "clients name one unasked");
    let (status, text) = engine.ask("session_id=a&session_check=1", "SELECT 1");
    assert!(status == 500 && text.contains("SESSION_NOT_FOUND"), "{status} {text}");
}

#[test]
fn errors_show_the_clients_own_statement() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64, kind Enum8('a' = 1)) ENGINE = MergeTree ORDER BY id");
    let cases = [
        ("SELECT 1 FORM x y", "failed at position 15 (x): x y. Expected"),
        ("SELECT * FROM t WHERE", "(end of query)"),
        ("SELECT toUInt8(id) FROM t WHERE (1", "Unmatched parentheses"),
        ("SELECT nope FROM system.processes", "`nope` in scope SELECT nope FROM system.processes"),
        ("INSERT INTO t FORMAT CSV\n1,zz\n", "Unknown element 'zz'"),
    ];
    for (sql, part) in cases {
        let (status, text) = engine.ask("", sql);
        assert_ne!(status, 200, "{sql}");
        assert!(text.contains(part), "{sql}: {text}");
        for ours in ["OUTFILE '", "/proc/self/fd", "chdb-http-query-id"] {
            assert!(!text.contains(ours), "{sql}: {text}");
        }
    }
}

#[test]
fn every_format_finds_the_columns_and_their_defaults() {
    let (_dir, engine) = served();
    engine.must(
        "CREATE TABLE t (id UInt64, word String DEFAULT concat('w', toString(id)), twice UInt64 MATERIALIZED id * 2, \
         `odd name` Nullable(Int8) DEFAULT 7) ENGINE = MergeTree ORDER BY id",
    );
    for (sql, body) in [
        ("INSERT INTO t FORMAT JSONEachRow", "{\"id\":1}\n{\"id\":2,\"word\":\"b\",\"odd name\":null}\n"),
        ("INSERT INTO t (id, `odd name`) FORMAT CSV", "3,\n4,9\n"),
        ("INSERT INTO default.t (word, id) FORMAT TSV", "it's\t5\n"),
        ("INSERT INTO t VALUES", "(6, 'a;b', 1), (7, upper('x'), NULL)"),
        ("INSERT INTO t (id) SETTINGS input_format_allow_errors_num = 1 FORMAT CSV", "8\nnonsense\n"),
    ] {
        let (status, text) = engine.ask(&format!("query={}", escaped(sql)), body);
        assert_eq!(status, 200, "{sql}: {text}");
    }
    // The same with all of it in the body, and with all of it in the URL.
    engine.must("INSERT INTO t (id) FORMAT JSONEachRow {\"id\":9}");
    engine.must("INSERT INTO t (id, word) VALUES (10, 'ten')");
    let in_url = format!("query={}", escaped("INSERT INTO t (id, word) VALUES (11, 'eleven')"));
    assert_eq!(engine.ask(&in_url, "").0, 200);
    engine.must("INSERT INTO t (id) SELECT 12");
    let native = engine.send(&post("", b"SELECT toUInt64(13) AS id, 'native' AS word FORMAT Native"));
    let (status, text) =
        engine.ask(&format!("query={}", escaped("INSERT INTO t FORMAT Native")), native.bytes);
    assert_eq!(status, 200, "{text}");
    let rows = engine.must("SELECT * FROM t ORDER BY id FORMAT CSV");
    let expected = "1,\"w1\",7\n2,\"b\",\\N\n3,\"w3\",7\n4,\"w4\",9\n5,\"it's\",7\n6,\"a;b\",1\n7,\"X\",\\N\n8,\"w8\",7\n\
        9,\"w9\",7\n10,\"ten\",7\n11,\"eleven\",7\n12,\"w12\",7\n13,\"native\",7";
    assert_eq!(rows, expected);
    assert_eq!(engine.must("SELECT sum(twice) FROM t"), "182");
}

#[test]
fn a_body_that_is_cut_or_damaged_inserts_nothing() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
    let query = escaped("INSERT INTO t FORMAT RowBinary");
    let head = format!("POST /?query={query} HTTP/1.1\r\nHost: x\r\n");
    // Both end at a row's end: only the transfer tells that there was more.
    for request in [
        format!("{head}Transfer-Encoding: chunked\r\n\r\n8\r\n12345678\r\n"),
        format!("{head}Content-Length: 16\r\n\r\n12345678"),
    ] {
        let mut stream = engine.connect();
        stream.write_all(request.as_bytes()).expect("taken");
        stream.shutdown(std::net::Shutdown::Write).expect("cut");
        assert_ne!(read(stream).status, 200);
    }
    let mut frame = vec![0; 16];
    frame.extend_from_slice(&[0x02, 17, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let (status, text) = engine.ask(&format!("decompress=1&query={query}"), &frame);
    assert!(status == 500 && text.starts_with("Code: 40. DB::Exception: Checksum"), "{text}");
    let (status, text) = engine.ask(&format!("decompress=1&query={query}"), &frame[..20]);
    assert!(status == 500 && text.starts_with("Code: 3. "), "{text}");
    for no_sql in [&b"\0SELECT 1"[..], b"\x1f\x8b\x08\0\0\0\0\0\0\x03SELECT 1"] {
        let (status, text) = engine.ask("", no_sql);
        assert!(status == 400 && text.contains("Content-Encoding"), "{status}: {text}");
    }
    let (status, text) = engine.ask(&format!("query={query}"), &b"123456789"[..]);
    assert!(status == 500 && text.starts_with("Code: 33. "), "{text}");
    assert_eq!(engine.must("SELECT count() FROM t"), "0");
}

#[test]
fn errors_have_clickhouses_codes_and_statuses() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
    for (parameters, sql, status, code) in [
        ("", "SELECT * FROM nosuch", 404, 60),
        ("", "INSERT INTO nosuch FORMAT CSV\n1", 404, 60),
        ("", "INSERT INTO t (nosuch) FORMAT CSV\n1", 500, 16),
        ("", "SELECT nosuch", 404, 47),
        ("", "SELEKT 1", 400, 62),
        ("", "1 + 1", 400, 62),
        ("", "SELECT 1; SELECT 2", 400, 62),
        ("", "", 400, 62),
        ("database=nosuch", "SELECT 1", 404, 81),
        ("nosuch=1", "SELECT 1", 404, 115),
        ("max_threads=many", "SELECT 1", 400, 27),
        ("", "SELECT 1 FORMAT Nosuch", 404, 73),
        ("readonly=1", "CREATE TABLE x (a UInt8) ENGINE = Memory", 500, 164),
        ("", "SELECT throwIf(1)", 500, 395),
        (
            "max_execution_time=0.1",
            "SELECT count() FROM numbers(100000000000) WHERE sipHash64(number) = 1",
            408,
            159,
        ),
        ("", "INSERT INTO t FORMAT CSV\nx", 400, 117),
    ] {
        let answer = engine.send(&post(parameters, sql.as_bytes()));
        assert_eq!(answer.status, status, "{sql}: {}", answer.text);
        assert_eq!(answer.header("X-ClickHouse-Exception-Code"), Some(code.to_string().as_str()), "{sql}");
        assert!(answer.text.starts_with(&format!("Code: {code}. DB::Exception: ")), "{}", answer.text);
        assert!(answer.text.trim_end().ends_with(" (chdb build))"), "{}", answer.text);
    }
    let get = |sql: &str| {
        let request =
            format!("GET /?query={} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", escaped(sql));
        engine.send(request.as_bytes())
    };
    assert_eq!(get("SELECT 1").text, "1\n");
    assert!(get("INSERT INTO t VALUES (1)").text.starts_with("Code: 164. "));
    assert!(get("DROP TABLE t").text.starts_with("Code: 164. "));
    assert_eq!(engine.send(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").text, "Ok.\n");
}

#[tokio::test]
async fn an_error_after_the_first_rows_reaches_the_client() {
    let (_dir, engine) = served();
    let sql = "SELECT throwIf(number = 5000000) + number AS n FROM numbers(10000000)";
    for compression in [Compression::None, Compression::Lz4] {
        let client = engine.client().with_compression(compression);
        let mut cursor = client.query(sql).fetch::<u64>().expect("a cursor");
        let error = loop {
            match cursor.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ends as if all were well"),
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains("Code: 395. DB::Exception"), "{error}");
    }
    let answer = engine.send(&post("wait_end_of_query=1", sql.as_bytes()));
    assert_eq!(answer.status, 500);
}

#[test]
fn results_are_whole_in_every_format() {
    let (_dir, engine) = served();
    let sql = "SELECT number, toString(number) AS s FROM numbers(300000) ORDER BY number";
    let answer = engine.send(&post("default_format=CSVWithNames&wait_end_of_query=1", sql.as_bytes()));
    assert_eq!(answer.header("X-ClickHouse-Format"), Some("CSVWithNames"));
    assert_eq!(answer.text.matches("\"number\",\"s\"").count(), 1, "one header for all blocks");
    let json = engine.must("SELECT number FROM numbers(200000) FORMAT JSON");
    // Chunked: the sizes of chunks are in between.
    assert_eq!((json.matches("\"rows\": 200000").count(), json.matches("\"meta\"").count()), (1, 1));
    assert_eq!(engine.must("SELECT 1 AS a WHERE 0 FORMAT TSVWithNames"), "a");
    let totals = "SELECT number % 2 AS k, count() FROM numbers(4) GROUP BY k WITH TOTALS ORDER BY k";
    assert_eq!(engine.must(totals), "0\t2\n1\t2\n\n0\t4");
    assert_eq!(engine.must("SHOW DATABASES LIKE 'default' FORMAT CSV"), "\"default\"");
    assert_eq!(engine.must("EXISTS TABLE nosuch"), "0");
}

#[test]
fn nothing_of_a_request_is_left_for_the_next() {
    let (_dir, engine) = served();
    engine.must("CREATE DATABASE other");
    engine.must("CREATE TABLE other.t (id UInt64) ENGINE = MergeTree ORDER BY id");
    let sql = "SELECT currentDatabase(), getSetting('max_block_size'), {x: String}";
    let first = engine.ask("database=other&max_block_size=77&param_x=a%5Ctb%27", sql);
    assert_eq!(first, (200, "other\t77\ta\\tb\\'\n".to_owned()));
    let plain = "SELECT currentDatabase(), getSetting('max_block_size')";
    assert_eq!(engine.must(plain), "default\t65409");
    assert!(engine.ask("", sql).1.starts_with("Code: 456. "), "the parameter is not set");
    let insert = format!("database=other&query={}", escaped("INSERT INTO t FORMAT CSV"));
    assert_eq!(engine.ask(&insert, "1\n2\n").0, 200);
    assert_eq!(engine.must("SELECT count() FROM other.t"), "2");
    let header = "POST / HTTP/1.1\r\nHost: x\r\nX-ClickHouse-Database: other\r\nX-ClickHouse-User: u\r\n\
        X-ClickHouse-Key: k\r\nX-ClickHouse-Format: JSONEachRow\r\nConnection: close\r\nContent-Length: 27\r\n\r\n\
        SELECT count() AS n FROM  t";
    assert_eq!(engine.send(header.as_bytes()).text, "{\"n\":2}\n");
}

#[test]
fn a_query_id_is_one_requests_until_it_is_over_and_kill_waits_for_that() {
    let (_dir, engine) = served();
    std::thread::scope(|scope| {
        let endless = scope.spawn(|| engine.ask("query_id=a'b", ENDLESS));
        engine.until(&seen("a\\'b"), "1");
        let (status, text) = engine.ask("query_id=a'b", "SELECT 1");
        assert!(status == 500 && text.starts_with("Code: 216. "), "{text}");
        let killed = engine.must("KILL QUERY WHERE query_id = 'a\\'b' SYNC FORMAT JSONEachRow");
        assert!(
            killed.starts_with("{\"kill_status\":\"finished\",\"query_id\":\"a'b\",\"user\":\"default\""),
            "{killed}"
        );
        assert_eq!(engine.must(seen("a\\'b")), "0");
        assert_eq!(engine.ask("query_id=a'b", "SELECT 1"), (200, "1\n".to_owned()));
        let (status, text) = endless.join().expect("an answer");
        assert!(status == 500 && text.starts_with("Code: 394. "), "{text}");
        assert_eq!(engine.must("KILL QUERY WHERE query_id = 'nosuch' SYNC"), "");
        let other = scope.spawn(|| engine.ask("query_id=other", ENDLESS));
        engine.until(&seen("other"), "1");
        let (status, text) = engine.ask("", "KILL QUERY WHERE query_id LIKE 'oth%' ASYNC");
        assert!(status == 501 && text.starts_with("Code: 48. "), "{text}");
        engine.must("KILL QUERY WHERE query_id = 'other'");
        assert_eq!(other.join().expect("an answer").0, 500);
    });
}

#[test]
fn a_killed_insert_inserts_nothing_even_while_its_body_is_on_the_way() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
    let query = escaped("INSERT INTO t FORMAT RowBinary");
    let mut stream = engine.connect();
    let head = format!(
        "POST /?query_id=slow&query={query} HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n12345678"
    );
    stream.write_all(head.as_bytes()).expect("taken");
    let start = Instant::now();
    // The request is known from the moment its head is read.
    while engine.must("KILL QUERY WHERE query_id = 'slow' SYNC").is_empty() {
        assert!(start.elapsed() < DEADLINE, "the request is never seen");
    }
    stream.write_all(b"12345678").unwrap_or_default();
    assert_eq!(engine.must("SELECT count() FROM t"), "0");
    assert_eq!(engine.ask(&format!("query_id=slow&query={query}"), "12345678").0, 200);
    assert_eq!(engine.must("SELECT count() FROM t"), "1");
}

#[test]
fn what_a_client_that_is_gone_was_reading_is_killed() {
    let (_dir, engine) = served();
    let mut stream = engine.connect();
    stream.write_all(&post("query_id=gone", ENDLESS.as_bytes())).expect("taken");
    engine.until(&seen("gone"), "1");
    drop(stream);
    engine.until(&seen("gone"), "0");
}

#[test]
fn more_requests_than_slots_all_get_their_answers() {
    let (_dir, engine) = served();
    engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
    let query = format!("query={}", escaped("INSERT INTO t FORMAT CSV"));
    std::thread::scope(|scope| {
        for thread in 0..40_u64 {
            let (engine, query) = (&engine, &query);
            scope.spawn(move || {
                for round in 0..5 {
                    let body: String =
                        (0..100).map(|row| format!("{}\n", (thread * 5 + round) * 100 + row)).collect();
                    let (status, text) = engine.ask(query, body);
                    assert_eq!(status, 200, "{text}");
                    assert_eq!(engine.must("SELECT count() % 100 FROM t"), "0");
                }
            });
        }
    });
    assert_eq!(engine.must("SELECT count(), uniqExact(id), max(id) FROM t"), "20000\t20000\t19999");
}

#[test]
fn a_kill_9_in_mid_insert_leaves_whole_inserts_only() {
    const ROWS: u64 = 100_000;
    let dir = tempfile::tempdir().expect("a directory");
    let mut acked = 0;
    for round in 0..4_u64 {
        let mut engine = Engine::start(&dir);
        engine.must(
            "CREATE TABLE IF NOT EXISTS t (batch UInt64, id UInt64) ENGINE = MergeTree ORDER BY (batch, id) \
             SETTINGS fsync_after_insert = 1, fsync_part_directory = 1",
        );
        assert_eq!(
            engine.must("SELECT count() FROM (SELECT batch FROM t GROUP BY batch HAVING count() != 100000)"),
            "0"
        );
        let kept: u64 = engine.must("SELECT uniqExact(batch) FROM t").parse().expect("a number");
        assert!(kept >= acked, "{kept} batches are left of {acked}");
        let query = format!("query={}", escaped("INSERT INTO t FORMAT RowBinary"));
        let port = engine.port;
        let landed = AtomicU64::new(0);
        let sent = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2_u64)
                .map(|writer| {
                    let (query, landed, first) = (&query, &landed, (round * 2 + writer) * 1000);
                    scope.spawn(move || insert_until_it_fails(port, query, first, ROWS, landed))
                })
                .collect();
            let begun = Instant::now();
            while landed.load(Ordering::Relaxed) == 0 && begun.elapsed() < tests::SOON {
                std::thread::sleep(Duration::from_millis(10));
            }
            std::thread::sleep(Duration::from_millis(300 + 170 * round));
            engine.child.kill().expect("killed");
            engine.wait();
            writers.into_iter().map(|writer| writer.join().expect("a writer")).sum::<u64>()
        });
        acked = kept + sent;
    }
    let engine = Engine::start(&dir);
    let kept: u64 = engine.must("SELECT uniqExact(batch) FROM t").parse().expect("a number");
    assert!(kept >= acked && acked > 0, "{kept} batches are left of {acked}");
    assert_eq!(
        engine.must("SELECT count() FROM (SELECT batch FROM t GROUP BY batch HAVING count() != 100000)"),
        "0"
    );
    assert_eq!(engine.must("SELECT count() - uniqExact(batch, id) FROM t"), "0");
}

/// How many of the batches from `first` on were acknowledged before the server went away.
fn insert_until_it_fails(port: u16, query: &str, first: u64, rows: u64, landed: &AtomicU64) -> u64 {
    for batch in first.. {
        let body: Vec<u8> = (0..rows).flat_map(|id| [batch, id]).flat_map(u64::to_le_bytes).collect();
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return batch - first };
        let mut answer = Vec::new();
        let sent = stream.write_all(&post(query, &body)).and_then(|()| stream.read_to_end(&mut answer));
        if sent.is_err() || !answer.starts_with(b"HTTP/1.1 200") {
            return batch - first;
        }
        landed.fetch_add(1, Ordering::Relaxed);
    }
    unreachable!("the server is killed")
}

#[test]
fn it_ends_with_its_parent_and_on_sigterm_and_keeps_its_data() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut engine = Engine::start(&dir);
    engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
    engine.must("INSERT INTO t SELECT number FROM numbers(10)");
    drop(engine.stdin.take());
    assert_eq!(engine.wait().code(), Some(0));
    let mut engine = Engine::start(&dir);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| engine.ask("query_id=slow", "SELECT sleep(2), count() FROM t"));
        engine.until(&seen("slow"), "1");
        engine.terminate();
        assert_eq!(slow.join().expect("an answer"), (200, "0\t10\n".to_owned()), "what runs may end");
    });
    assert_eq!(engine.wait().code(), Some(0));
}

#[test]
fn what_cannot_be_opened_is_told_in_one_message() {
    let (dir, engine) = served();
    let told = |lib: &Path, path: &Path| {
        let output = command(lib, path).stderr(Stdio::piped()).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let second = told(&library(), &dir.path().join("data"));
    assert!(second.starts_with("error: failed to open the ClickHouse data at `"), "{second}");
    assert!(second.contains("another process has it open\nhint: "), "{second}");
    let unloadable = told(Path::new("/dev/null"), &dir.path().join("other"));
    assert!(
        unloadable.starts_with("error: failed to load the ClickHouse engine `/dev/null`\n  "),
        "{unloadable}"
    );
    assert!(unloadable.contains("\nhint: "), "{unloadable}");
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("a file");
    let no_directory = told(&library(), &file);
    assert!(no_directory.starts_with("error: failed to use the directory `"), "{no_directory}");
    drop(engine);
}

#[test]
fn the_tables_that_millstream_makes_work() {
    let (_dir, engine) = served();
    engine.must(
        "CREATE TABLE t (run LowCardinality(String), batch UInt64, id UInt64, v UInt64) \
         ENGINE = ReplacingMergeTree PARTITION BY sipHash64(run) % 4 ORDER BY (run, batch, id) \
         SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, min_rows_to_fsync_after_merge = 1",
    );
    let synced = || -> u64 {
        let sql = "SELECT sum(value) FROM system.events WHERE event IN ('FileSync', 'DirectorySync')";
        engine.must(sql).parse().expect("a number")
    };
    let before = synced();
    for _ in 0..2 {
        engine.must("INSERT INTO t SELECT 'r', number % 10, number, 1 FROM numbers(10000)");
    }
    assert!(synced() > before, "inserts are synced");
    assert_eq!(engine.must("SELECT count() FROM t FINAL"), "10000");
    let in_order = "SELECT count(), sum(n) FROM (SELECT batch, id, count() AS n FROM t GROUP BY run, batch, id) \
        SETTINGS optimize_aggregation_in_order = 1";
    assert_eq!(engine.must(in_order), "10000\t20000");
    let partition = engine.must("SELECT DISTINCT partition FROM system.parts WHERE table = 't' AND active");
    engine.must(format!("OPTIMIZE TABLE t PARTITION {partition} FINAL"));
    assert_eq!(engine.must("SELECT count() FROM t"), "10000");
    // Background merges, which nobody asks for.
    engine.must("CREATE TABLE many (id UInt64) ENGINE = MergeTree ORDER BY id");
    for _ in 0..12 {
        engine.must("INSERT INTO many SELECT number FROM numbers(1000)");
    }
    engine.until("SELECT count() < 8 FROM system.parts WHERE table = 'many' AND active", "1");
    assert_eq!(engine.must("SELECT count() FROM many"), "12000");
}

#[test]
fn a_client_that_does_not_read_can_be_killed_and_keeps_nobody_from_ending() {
    let (_dir, mut engine) = served();
    let endless = "SELECT number FROM system.numbers";
    let mut stalled = engine.connect();
    stalled.write_all(&post("query_id=stalled", endless.as_bytes())).expect("taken");
    engine.until(&seen("stalled"), "1");
    // Its buffers are full once the count of rows read stands still.
    let read_rows = || engine.must("SELECT max(read_rows) FROM system.processes WHERE query_id = 'stalled'");
    let mut rows = read_rows();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = read_rows();
        if std::mem::replace(&mut rows, now.clone()) == now && now != "0" {
            break;
        }
    }
    assert!(engine.must("KILL QUERY WHERE query_id = 'stalled' SYNC").starts_with("finished\tstalled"));
    assert_eq!(engine.must(seen("stalled")), "0");
    let text = read(stalled).text;
    assert!(
        text.contains("__exception__") && text.contains("Code: 394. DB::Exception"),
        "the reader is told"
    );
    let mut other = engine.connect();
    other.write_all(&post("query_id=other", endless.as_bytes())).expect("taken");
    engine.until(&seen("other"), "1");
    let start = Instant::now();
    engine.terminate();
    assert_eq!(engine.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn an_insert_killed_in_the_engine_inserts_nothing_and_a_client_that_leaves_does_not_stop_one() {
    let (_dir, engine) = served();
    engine.must(
        "CREATE TABLE t (id UInt64, slow UInt8 MATERIALIZED sleepEachRow(0.00001)) ENGINE = MergeTree ORDER BY id",
    );
    let query = escaped("INSERT INTO t FORMAT RowBinary");
    let body: Vec<u8> = (0..200_000_u64).flat_map(u64::to_le_bytes).collect();
    std::thread::scope(|scope| {
        let insert = scope.spawn(|| engine.ask(&format!("query_id=killed&query={query}"), &body));
        engine.until(&seen("killed"), "1");
        assert!(engine.must("KILL QUERY WHERE query_id = 'killed' SYNC").starts_with("finished\tkilled\t"));
        assert_eq!(engine.must("SELECT count() FROM t"), "0");
        let (status, text) = insert.join().expect("an answer");
        assert!(status == 500 && text.starts_with("Code: 394. "), "{text}");
    });
    let mut stream = engine.connect();
    stream.write_all(&post(&format!("query_id=left&query={query}"), &body)).expect("taken");
    engine.until(&seen("left"), "1");
    drop(stream);
    engine.until("SELECT count() FROM t", "200000");
}

#[test]
fn a_dropped_table_is_gone_at_once_and_its_data_at_the_next_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut engine = Engine::start(&dir);
    for drop in ["DROP TABLE t SYNC", "DROP TABLE t NO DELAY", "DROP TABLE t"] {
        engine.must("CREATE TABLE t (id UInt64) ENGINE = MergeTree ORDER BY id");
        engine.must("INSERT INTO t SELECT number FROM numbers(1000)");
        engine.must(drop);
        assert_eq!(engine.must("EXISTS TABLE t"), "0");
    }
    engine.must("CREATE TABLE kept (id UInt64) ENGINE = MergeTree ORDER BY id");
    engine.must("INSERT INTO kept SELECT number FROM numbers(1000)");
    engine.terminate();
    engine.wait();
    let engine = Engine::start(&dir);
    assert_eq!(engine.must("SELECT count() FROM kept"), "1000");
    let left = std::fs::read_dir(dir.path().join("data/metadata_dropped")).expect("a directory").count();
    assert_eq!(left, 0);
}
