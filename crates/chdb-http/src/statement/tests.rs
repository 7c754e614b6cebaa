use super::*;

fn insert(sql: &str) -> Insert {
    match parse(sql.as_bytes()) {
        Ok(Statement::Insert(insert)) => insert,
        other => panic!("{sql}: {other:?}"),
    }
}

fn reads(sql: &str) -> (String, Option<String>) {
    match parse(sql.as_bytes()) {
        Ok(Statement::Reads(reads)) => {
            let (before, after) = sql.split_at(sql.len() - reads.after);
            (format!("{before}|{after}"), reads.format)
        }
        other => panic!("{sql}: {other:?}"),
    }
}

#[test]
fn an_insert_is_cut_into_its_parts() {
    type Case<'a> = (&'a str, &'a str, Option<&'a [&'a str]>, Option<&'a str>, &'a str, &'a str);
    let cases: [Case<'_>; 12] = [
        ("INSERT INTO t FORMAT RowBinary\nDATA", "t", None, None, "RowBinary", "DATA"),
        ("insert into `d b`.t(a, `b c`) format CSV", "`d b`.t", Some(&["a", "b c"]), None, "CSV", ""),
        ("INSERT INTO TABLE t (a) VALUES (1)", "t", Some(&["a"]), None, "Values", " (1)"),
        ("INSERT INTO t (a)", "t", Some(&["a"]), None, "Values", ""),
        ("INSERT INTO t (n.x, n.`y`) FORMAT TSV;\n1", "t", Some(&["n.x", "n.y"]), None, "TSV", "1"),
        (
            "INSERT INTO t SETTINGS async_insert=0, x='FORMAT' FORMAT Native \r\n\n",
            "t",
            None,
            Some(" async_insert=0, x='FORMAT' "),
            "Native",
            "\n",
        ),
        ("INSERT INTO {t:Identifier} (a) FORMAT TSV", "{t:Identifier}", Some(&["a"]), None, "TSV", ""),
        ("/* c */ INSERT INTO t -- x\n VALUES(1)", "t", None, None, "Values", "(1)"),
        ("INSERT t VALUES (1)", "t", None, None, "Values", " (1)"),
        ("INSERT INTO d.t FORMAT JSONEachRow {\"a\":1}", "d.t", None, None, "JSONEachRow", "{\"a\":1}"),
        (
            "INSERT INTO t (a)\nSETTINGS a=1\nVALUES ('x'",
            "t",
            Some(&["a"]),
            Some(" a=1\n"),
            "Values",
            " ('x'",
        ),
        ("INSERT INTO t FORMAT\nTSV\n\n1", "t", None, None, "TSV", "\n1"),
    ];
    for (sql, table, columns, settings, format, data) in cases {
        let found = insert(sql);
        assert_eq!(text(&found.table), table, "{sql}");
        let names = found.columns.map(|names| names.iter().map(|name| text(name)).collect::<Vec<_>>());
        assert_eq!(
            names.as_deref(),
            columns.map(|c| c.iter().map(ToString::to_string).collect::<Vec<_>>()).as_deref()
        );
        assert_eq!(found.settings.as_deref().map(text).as_deref(), settings, "{sql}");
        assert_eq!((found.format.as_str(), &sql[found.data_at..]), (format, data), "{sql}");
    }
}

#[test]
fn inserts_from_queries_are_left_to_the_engine() {
    for sql in [
        "INSERT INTO t SELECT 1",
        "INSERT INTO t (a) SELECT 1 FORMAT x",
        "INSERT INTO t (SELECT 1)",
        "INSERT INTO t (a) WITH 1 AS x SELECT x",
        "INSERT INTO FUNCTION null('a UInt8') SELECT 1",
        "INSERT INTO t FROM INFILE 'x' FORMAT CSV",
    ] {
        assert_eq!(parse(sql.as_bytes()), Ok(Statement::Other), "{sql}");
    }
}

#[test]
fn what_the_engine_would_do_wrongly_is_refused() {
    let cases = [
        ("INSERT INTO t SELECT * FROM input('a UInt8') FORMAT CSV", code::NOT_IMPLEMENTED),
        ("INSERT INTO FUNCTION file('x') FORMAT CSV", code::NOT_IMPLEMENTED),
        ("INSERT INTO t (* EXCEPT(a)) FORMAT CSV", code::NOT_IMPLEMENTED),
        ("INSERT INTO t (a FORMAT CSV", code::NOT_IMPLEMENTED),
        ("INSERT INTO t (a", code::SYNTAX_ERROR),
        ("SELECT 1; SELECT 2", code::SYNTAX_ERROR),
        ("SELECT 1 INTO OUTFILE 'x'", code::INTO_OUTFILE_NOT_ALLOWED),
        (" -- nothing", code::SYNTAX_ERROR),
    ];
    for (sql, expected) in cases {
        assert_eq!(parse(sql.as_bytes()).map_err(|exception| exception.code), Err(expected), "{sql}");
    }
}

#[test]
fn the_outfile_clause_goes_before_the_format() {
    let cases = [
        ("SELECT 1", "SELECT 1|", None),
        ("SELECT 1 ; ", "SELECT 1| ; ", None),
        ("SELECT 1 -- c", "SELECT 1| -- c", None),
        ("SELECT 1 FORMAT JSON", "SELECT 1 |FORMAT JSON", Some("JSON")),
        ("select 1 settings a=1 format TSV;", "select 1 settings a=1 |format TSV;", Some("TSV")),
        ("SELECT 1 FORMAT TSV SETTINGS a = 1", "SELECT 1 |FORMAT TSV SETTINGS a = 1", Some("TSV")),
        ("SELECT format, x FROM t", "SELECT format, x FROM t|", None),
        ("SELECT format x", "SELECT format x|", None),
        ("SELECT format('a', 1) AS format", "SELECT format('a', 1) AS format|", None),
        ("(SELECT 1) UNION ALL (SELECT 2)", "(SELECT 1) UNION ALL (SELECT 2)|", None),
        ("WITH (SELECT 1 FORMAT x) AS y SELECT y", "WITH (SELECT 1 FORMAT x) AS y SELECT y|", None),
        ("SHOW TABLES FORMAT CSV", "SHOW TABLES |FORMAT CSV", Some("CSV")),
        ("DESCRIBE TABLE t", "DESCRIBE TABLE t|", None),
        ("EXPLAIN INSERT INTO t SELECT 1", "EXPLAIN INSERT INTO t SELECT 1|", None),
    ];
    for (sql, place, format) in cases {
        assert_eq!(reads(sql), (place.to_owned(), format.map(str::to_owned)), "{sql}");
    }
}

#[test]
fn statements_without_a_result_are_left_to_the_engine() {
    for sql in [
        "CREATE TABLE temporary (temp UInt8) ENGINE = Memory;",
        "CREATE DATABASE temp",
        "OPTIMIZE TABLE t FINAL",
        "nonsense",
    ] {
        assert_eq!(parse(sql.as_bytes()), Ok(Statement::Other), "{sql}");
    }
}

#[test]
fn what_only_a_session_would_remember_is_refused() {
    for sql in [
        "SET a = 1",
        "use d",
        "CREATE TEMPORARY TABLE t (a UInt8)",
        "create or replace temporary table t AS SELECT 1",
    ] {
        assert_eq!(
            parse(sql.as_bytes()).map_err(|exception| exception.code),
            Err(code::NOT_IMPLEMENTED),
            "{sql}"
        );
    }
}

#[test]
fn a_kill_names_its_query_or_is_refused() {
    for (sql, query_id, format) in [
        ("KILL QUERY WHERE query_id = 'a\\'b' SYNC", "a'b", None),
        ("kill query where `query_id`='x';", "x", None),
        ("KILL QUERY WHERE query_id = 'x' SYNC FORMAT JSON", "x", Some("JSON")),
        ("KILL QUERY WHERE query_id = 'x' FORMAT Native", "x", Some("Native")),
    ] {
        let expected = Kill { query_id: query_id.to_owned(), format: format.map(str::to_owned) };
        assert_eq!(parse(sql.as_bytes()), Ok(Statement::Kill(expected)), "{sql}");
    }
    for sql in [
        "KILL QUERY WHERE query_id = 'x' ASYNC",
        "KILL QUERY WHERE query_id = 'x' TEST",
        "KILL QUERY WHERE query_id IN ('x', 'y') SYNC",
        "KILL QUERY WHERE query_id LIKE 'x%' SYNC",
        "KILL QUERY WHERE query_id = 'x' OR 1 SYNC",
        "KILL QUERY WHERE query_id = 'x' SYNC TEST",
        "KILL QUERY",
    ] {
        let refused = parse(sql.as_bytes()).map_err(|exception| exception.code);
        assert_eq!(refused, Err(code::NOT_IMPLEMENTED), "{sql}");
    }
    assert_eq!(parse(b"KILL MUTATION WHERE 1"), Ok(Statement::Other));
}

#[test]
fn the_process_list_shows_the_clients_query_ids() {
    let sql = text(&with_real_query_ids(b"SELECT count() FROM system.processes p WHERE query_id = 'x'"));
    assert!(sql.starts_with("SELECT count() FROM (SELECT * REPLACE (if(startsWith("), "{sql}");
    assert!(sql.ends_with(" AS query_id) FROM system.processes) p WHERE query_id = 'x'"), "{sql}");
    let other = b"SELECT 'FROM system.processes' FROM t";
    assert_eq!(with_real_query_ids(other), other);
}

#[test]
fn a_drop_does_not_wait_for_what_never_comes() {
    for (sql, expected) in [
        ("DROP TABLE IF EXISTS d.t SYNC", Some("DROP TABLE IF EXISTS d.t ")),
        ("DROP DATABASE `sync` NO DELAY;", Some("DROP DATABASE `sync` ;")),
        ("drop table t sync settings a = 1", Some("drop table t  settings a = 1")),
        ("DROP TABLE t", None),
        ("DROP TABLE `SYNC`", None),
    ] {
        let waits = parse(sql.as_bytes()) == Ok(Statement::DropSync);
        assert_eq!(waits, expected.is_some(), "{sql}");
        assert_eq!(text(&drop_without_sync(sql.as_bytes())), expected.unwrap_or(sql));
    }
}
