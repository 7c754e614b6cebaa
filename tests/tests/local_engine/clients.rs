//! Requests as three clients sent them, and what of the answers those clients read. The fourth, the Rust client, runs in the other
//! tests itself.
//!
//! `recorded/README.md` says how they were recorded.

use std::path::Path;

use crate::engine::{Answer, ENDLESS, Engine, seen, served};

/// What `X-ClickHouse-Summary` says of an INSERT of so many rows.
fn written(rows: u64) -> String {
    format!("\"written_rows\":\"{rows}\"")
}

/// Sends what was recorded under `name`, but for its `Connection` header.
fn replay(engine: &Engine, name: &str) -> Answer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/local_engine/recorded").join(name);
    let recorded = std::fs::read(path.with_extension("http")).expect("a recorded request");
    let end = recorded.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("a head");
    let (head, rest) = recorded.split_at(end);
    let head = String::from_utf8(head.to_vec()).expect("a head of text");
    let head: Vec<&str> = head.split("\r\n").filter(|line| !line.starts_with("Connection:")).collect();
    engine.send(&[head.join("\r\n").as_bytes(), b"\r\nConnection: close", rest].concat())
}

/// The same for a request that must succeed.
fn accepted(engine: &Engine, name: &str) -> Answer {
    let answer = replay(engine, name);
    assert_eq!(answer.status, 200, "{name}: {answer:?}");
    answer
}

/// The same for one that must be refused with ClickHouse's `code`, in the header that clients read, and with `words`.
fn refused(engine: &Engine, name: &str, code: &str, words: &str) {
    let answer = replay(engine, name);
    assert_ne!(answer.status, 200, "{name}: {answer:?}");
    assert_eq!(answer.header("X-ClickHouse-Exception-Code"), Some(code), "{name}: {answer:?}");
    assert!(answer.text.contains(words), "{name}: {answer:?}");
}

/// Whether the answer ends in an exception, as the header that announces its tag and the tail with that tag tell.
fn fails_on_the_way(answer: &Answer, code: u32) -> bool {
    let Some(tag) = answer.header("X-ClickHouse-Exception-Tag") else { return false };
    let tail = format!("\r\n__exception__\r\n{tag}\r\nCode: {code}. DB::Exception: ");
    answer.text.contains(&tail) && answer.text.contains(&format!(" {tag}\r\n__exception__\r\n"))
}

#[test]
fn curl_is_answered_as_the_manual_shows_it() {
    let (_dir, engine) = served();
    assert_eq!(accepted(&engine, "curl/root").text, "Ok.\n");
    assert_eq!(accepted(&engine, "curl/ping").text, "Ok.\n");
    for name in ["curl/get", "curl/body", "curl/gzip"] {
        assert_eq!(accepted(&engine, name).text, "1\n", "{name}");
    }
    for name in ["curl/create", "curl/insert-url-and-body", "curl/insert-body"] {
        assert_eq!(accepted(&engine, name).text, "", "{name}");
    }
    refused(&engine, "curl/get-drop", "164", "Cannot execute query in readonly mode");
    assert_eq!(engine.must("SELECT sum(a) FROM t"), "21");
    assert_eq!(accepted(&engine, "curl/database").text, "0\n1\n2\n");
    let answer = accepted(&engine, "curl/headers");
    assert_eq!(answer.text, "{\"number\":0}\n{\"number\":1}\n");
    assert_eq!(answer.header("X-ClickHouse-Format"), Some("JSONEachRow"));
    assert_eq!(accepted(&engine, "curl/parameters").text, "2\ttest\n");
    assert_eq!(accepted(&engine, "curl/form").text, "7\n");
    refused(&engine, "curl/file", "36", "external tables are not supported");
    refused(&engine, "curl/compress", "48", "compress=1");
}

#[test]
fn clickhouse_connect_opens_inserts_and_reads() {
    let (_dir, engine) = served();
    assert_eq!(accepted(&engine, "clickhouse-connect/ping").text, "Ok.\n");
    let version = accepted(&engine, "clickhouse-connect/version");
    assert_eq!(version.text.matches('\t').count(), 1, "version and time zone: {version:?}");
    assert_eq!(version.header("X-ClickHouse-Query-Id"), Some("23588056-58f9-449c-ae4f-6b953d48defa"));
    let settings = accepted(&engine, "clickhouse-connect/settings");
    assert!(settings.text.contains("max_threads"), "the settings, in Native");
    let created = accepted(&engine, "clickhouse-connect/create");
    // By this the client tells a statement without a result from a result without rows.
    assert_eq!(created.header("X-ClickHouse-Format"), None);
    assert!(accepted(&engine, "clickhouse-connect/describe").text.contains("Nullable(Int32)"));
    for (name, rows) in [
        ("insert", 2),
        ("insert-tsv", 2),
        ("insert-gzip", 1),
        ("insert-deflate", 1),
        ("insert-zstd", 1),
        ("insert-lz4", 1),
    ] {
        let answer = accepted(&engine, &format!("clickhouse-connect/{name}"));
        let summary = answer.header("X-ClickHouse-Summary").expect("a summary");
        assert!(summary.contains(&written(rows)), "{name}: {summary}");
    }
    let rows = "1\ta\t\\N\n2\tb\t5\n3\tc\t7\n4\td\t7\n5\te\t7\n6\tf\t7\n10\tlz4\t\\N\n10\tzstd\t\\N";
    assert_eq!(engine.must("SELECT * FROM py ORDER BY id, word"), rows);
    let limited = accepted(&engine, "clickhouse-connect/limit-0");
    assert!(limited.text.contains("\"meta\"") && limited.text.contains("\"rows\": 0"), "{limited:?}");
    let parameters = accepted(&engine, "clickhouse-connect/parameters");
    assert_eq!(parameters.header("X-ClickHouse-Format"), Some("Native"));
    assert!(parameters.text.contains("zstd"), "all rows, in Native");
    let counted = accepted(&engine, "clickhouse-connect/form");
    assert!(counted.text.contains("UInt64\x01\0\0\0\0\0\0\0"), "one row, in Native: {counted:?}");
    let failed = accepted(&engine, "clickhouse-connect/error");
    assert!(fails_on_the_way(&failed, 395), "{} bytes", failed.text.len());
}

/// The client names a session unasked, and must not take for done what only a session would keep.
#[test]
fn clickhouse_connect_is_told_what_is_not_kept() {
    let (_dir, engine) = served();
    refused(&engine, "clickhouse-connect/set", "48", "the local engine keeps no sessions");
    refused(&engine, "clickhouse-connect/temporary", "48", "the local engine keeps no sessions");
    refused(&engine, "clickhouse-connect/file", "36", "external tables are not supported");
}

#[test]
fn the_node_client_inserts_reads_and_kills() {
    let (_dir, engine) = served();
    assert_eq!(accepted(&engine, "node/ping").text, "Ok.\n");
    assert_eq!(accepted(&engine, "node/ping-select").text, "ping\n");
    accepted(&engine, "node/create");
    for (name, rows) in [("node/insert-gzip", 2), ("node/insert", 1), ("node/insert-br", 1)] {
        let answer = accepted(&engine, name);
        let summary = answer.header("X-ClickHouse-Summary").expect("a summary");
        assert!(summary.contains(&written(rows)), "{name}: {summary}");
    }
    let rows = [(1, "w1"), (2, "b"), (3, "c"), (4, "w4")];
    let rows: String = rows.map(|(id, word)| format!("{{\"id\":{id},\"word\":\"{word}\"}}\n")).concat();
    assert_eq!(accepted(&engine, "node/parameters").text, rows, "the first and the last have their DEFAULT");
    assert!(accepted(&engine, "node/form").text.contains("\"n\": 2"));
    let failed = accepted(&engine, "node/error");
    assert!(fails_on_the_way(&failed, 395), "{} bytes", failed.text.len());
    std::thread::scope(|scope| {
        let long = scope.spawn(|| engine.ask("query_id=js-long", ENDLESS));
        engine.until(&seen("js-long"), "1");
        let killed = accepted(&engine, "node/kill").text;
        assert!(killed.starts_with("{\"kill_status\":\"finished\",\"query_id\":\"js-long\""), "{killed}");
        assert!(long.join().expect("an answer").1.starts_with("Code: 394. "));
    });
    accepted(&engine, "node/drop");
    assert_eq!(engine.must("EXISTS TABLE js"), "0");
}
