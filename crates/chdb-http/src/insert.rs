//! An INSERT with its rows in the body, as one statement that the engine runs whole.
//!
//! The engine cuts an inline binary body short, and `input()` inserts nothing. So the rows are read as a file:
//! `INSERT INTO t (a, b) SETTINGS … SELECT * FROM file('/proc/self/fd/N', 'RowBinary', '…')`. The structure is that of
//! the table's columns, so that formats without types are read as the client wrote them, with their DEFAULTs, so that
//! fields missing in a row get them.

use crate::body::MemoryFile;
use crate::chdb::Connection;
use crate::exception::{Exception, code};
use crate::statement::Insert;
use crate::tokens::{Tokens, quoted};

/// One thread and one block, whatever the client says: only that is atomic. Like a server, the engine starts a second
/// block (and part) after this many rows; unlike one, not after 256 MiB.
const ONE_BLOCK: &str = "max_threads = 1, max_insert_threads = 1, max_parsing_threads = 1, \
    input_format_parallel_parsing = 0, max_insert_block_size = 1048449, min_insert_block_size_rows = 1048449, \
    min_insert_block_size_bytes = 0, async_insert = 0";

/// A column of the target, as DESCRIBE shows it.
#[derive(Debug, Clone, serde::Deserialize)]
struct Column {
    name: String,
    r#type: String,
    default_type: String,
    default_expression: String,
}

/// The statement that inserts `rows`; `None` if there are none. Asks for the table's columns first.
pub(crate) fn rewrite(
    connection: &mut Connection,
    insert: &Insert,
    rows: &MemoryFile,
    params: &[(String, String)],
) -> Result<Option<Vec<u8>>, Exception> {
    let describe = [
        b"DESCRIBE TABLE ",
        &insert.table[..],
        b" SETTINGS describe_include_subcolumns = 0, describe_compact_output = 0",
    ]
    .concat();
    let answer =
        connection.query(&describe, "JSONEachRow", params).map_err(|text| Exception::from_engine(&text))?;
    let statement = from_file(&answer.data, insert, &rows.path(), rows.compression())?;
    Ok((rows.len() > 0).then_some(statement))
}

/// The statement that inserts the rows of a file into a table of which DESCRIBE says `described`, in JSONEachRow.
pub(crate) fn from_file(
    described: &[u8],
    insert: &Insert,
    path: &str,
    compression: Option<&str>,
) -> Result<Vec<u8>, Exception> {
    let table = described
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(serde_json::from_slice)
        .collect::<Result<Vec<Column>, _>>()
        .map_err(|error| Exception::new(code::STD_EXCEPTION, &format!("cannot read DESCRIBE: {error}")))?;
    Ok(statement(insert, &targets(&table, insert)?, path, compression))
}

/// The columns in the order of the rows.
fn targets(table: &[Column], insert: &Insert) -> Result<Vec<Column>, Exception> {
    let Some(names) = &insert.columns else {
        let insertable = |column: &&Column| {
            !matches!(column.default_type.as_str(), "MATERIALIZED" | "ALIAS" | "EPHEMERAL")
        };
        return Ok(table.iter().filter(insertable).cloned().collect());
    };
    names
        .iter()
        .map(|name| {
            let found = table.iter().find(|column| column.name.as_bytes() == name);
            found.cloned().ok_or_else(|| no_column(&String::from_utf8_lossy(name), insert))
        })
        .collect()
}

fn no_column(name: &str, insert: &Insert) -> Exception {
    const NO_SUCH_COLUMN_IN_TABLE: u32 = 16;
    let table = String::from_utf8_lossy(&insert.table);
    Exception::from_engine(&format!(
        "Code: {NO_SUCH_COLUMN_IN_TABLE}. DB::Exception: No such column {name} in table {table} \
         (NO_SUCH_COLUMN_IN_TABLE)"
    ))
}

fn statement(insert: &Insert, columns: &[Column], path: &str, compression: Option<&str>) -> Vec<u8> {
    let names: Vec<Vec<u8>> = columns.iter().map(|column| quoted(column.name.as_bytes(), b'`')).collect();
    let structure: Vec<Vec<u8>> = columns.iter().map(|column| declaration(column, columns)).collect();
    let mut sql =
        [b"INSERT INTO ", &insert.table[..], b" (", &names.join(&b", "[..])[..], b") SETTINGS "].concat();
    if let Some(settings) = &insert.settings {
        sql.extend_from_slice(settings);
        // The clause may end in a comment.
        sql.extend_from_slice(b"\n, ");
    }
    sql.extend_from_slice(ONE_BLOCK.as_bytes());
    sql.extend_from_slice(b" SELECT * FROM file(");
    sql.extend(quoted(path.as_bytes(), b'\''));
    sql.extend_from_slice(b", ");
    sql.extend(quoted(insert.format.as_bytes(), b'\''));
    sql.extend_from_slice(b", ");
    sql.extend(quoted(&structure.join(&b", "[..]), b'\''));
    if let Some(compression) = compression {
        sql.extend_from_slice(b", ");
        sql.extend(quoted(compression.as_bytes(), b'\''));
    }
    sql.extend_from_slice(b")");
    sql
}

/// A DEFAULT that needs columns which the rows do not have is left out; a field missing in a row is then empty.
fn declaration(column: &Column, columns: &[Column]) -> Vec<u8> {
    let mut out = quoted(column.name.as_bytes(), b'`');
    out.push(b' ');
    out.extend_from_slice(column.r#type.as_bytes());
    if column.default_type == "DEFAULT" && needs_only(column.default_expression.as_bytes(), columns) {
        out.extend_from_slice(b" DEFAULT ");
        out.extend_from_slice(column.default_expression.as_bytes());
    }
    out
}

fn needs_only(expression: &[u8], columns: &[Column]) -> bool {
    let tokens: Vec<_> = Tokens::new(expression).collect();
    tokens.iter().enumerate().all(|(at, token)| {
        let function = tokens.get(at + 1).is_some_and(|next| next.punct() == Some(b'('));
        let number = token.bytes(expression).first().is_some_and(u8::is_ascii_digit);
        !token.is_name()
            || function
            || number
            || token.is_any(expression, &["NULL", "true", "false"])
            || columns.iter().any(|column| column.name.as_bytes() == token.value(expression))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, r#type: &str, default_type: &str, default_expression: &str) -> Column {
        let [name, r#type, default_type, default_expression] =
            [name, r#type, default_type, default_expression].map(str::to_owned);
        Column { name, r#type, default_type, default_expression }
    }

    fn insert(columns: Option<&[&str]>, settings: Option<&str>) -> Insert {
        Insert {
            table: b"d.t".to_vec(),
            columns: columns.map(|names| names.iter().map(|name| name.as_bytes().to_vec()).collect()),
            settings: settings.map(|text| text.as_bytes().to_vec()),
            format: "CSV".into(),
            data_at: 0,
        }
    }

    fn table() -> Vec<Column> {
        vec![
            column("id", "UInt64", "", ""),
            column("it`s", "Enum8('a' = 1)", "DEFAULT", "'a'"),
            column("m", "UInt64", "MATERIALIZED", "id"),
            column("n", "UInt64", "DEFAULT", "id + 1"),
        ]
    }

    #[test]
    fn the_statement_reads_the_rows_as_the_tables_columns() {
        let insert = insert(None, Some("x = 1 "));
        let columns = targets(&table(), &insert).expect("columns");
        let sql = String::from_utf8(statement(&insert, &columns, "/p", None)).expect("text");
        let (head, tail) = sql.split_once(ONE_BLOCK).expect("our settings");
        assert_eq!(head, "INSERT INTO d.t (`id`, `it\\`s`, `n`) SETTINGS x = 1 \n, ");
        assert_eq!(
            tail,
            r" SELECT * FROM file('/p', 'CSV', '`id` UInt64, `it\\`s` Enum8(\'a\' = 1) DEFAULT \'a\', `n` UInt64 DEFAULT id + 1')"
        );
        let packed = statement(&insert, &columns, "/p", Some("lz4"));
        assert!(packed.ends_with(b" DEFAULT id + 1', 'lz4')"), "{}", packed.escape_ascii());
    }

    #[test]
    fn a_column_list_rules_and_is_checked() {
        let columns = targets(&table(), &insert(Some(&["n"]), None)).expect("columns");
        assert_eq!(declaration(&columns[0], &columns), b"`n` UInt64", "its DEFAULT needs id");
        let unknown = targets(&table(), &insert(Some(&["n", "zz"]), None)).err();
        assert_eq!(unknown.map(|exception| exception.code), Some(16));
    }
}
