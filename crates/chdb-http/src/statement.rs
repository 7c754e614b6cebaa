//! What a statement is, and how it must be changed for the engine to run it behind this face.
//!
//! The engine's own parser has the last word: whatever is not recognised here goes to it unchanged.

use crate::exception::{Exception, code};
use crate::tokens::{Kind, Token, Tokens, quoted};

/// By which requests are found again in the engine's process list: its queries carry their HTTP `query_id` in the
/// setting `log_comment`, because the engine makes query ids of its own.
const MARK: &str = "chdb-http-query-id=";

/// What follows the first words of a statement.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Statement {
    /// Has a result.
    Reads(Reads),
    /// An INSERT whose rows are in the body.
    Insert(Insert),
    /// A KILL QUERY by id.
    Kill(Kill),
    /// A DROP … SYNC, which would wait for a thread that the engine as a library does not start.
    DropSync,
    /// Anything else: runs as it is, and answers with little or nothing.
    Other,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reads {
    /// How many bytes follow the place where `INTO OUTFILE` goes.
    pub(crate) after: usize,
    pub(crate) format: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Insert {
    /// As written: `db.table`, or with `{name:Identifier}` in it.
    pub(crate) table: Vec<u8>,
    /// `None` where the statement has no column list.
    pub(crate) columns: Option<Vec<Vec<u8>>>,
    /// What its own SETTINGS clause says, without the word.
    pub(crate) settings: Option<Vec<u8>>,
    pub(crate) format: String,
    /// Where the rows start.
    pub(crate) data_at: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kill {
    pub(crate) query_id: String,
    pub(crate) format: Option<String>,
}

/// What gzip begins with.
const GZIP: &[u8] = &[0x1f, 0x8b];

/// Tells what `sql` is, or refuses what this face must not pass on.
pub(crate) fn parse(sql: &[u8]) -> Result<Statement, Exception> {
    // The engine would take what comes before it for the whole.
    if sql.first() == Some(&0) || sql.starts_with(GZIP) {
        let binary =
            "The query begins with bytes that are no SQL: a compressed body needs its Content-Encoding";
        return Err(Exception::new(code::SYNTAX_ERROR, binary));
    }
    let mut tokens = Tokens::new(sql);
    let Some(first) = tokens.find(|token| token.punct() != Some(b'(')) else {
        return Err(Exception::new(code::SYNTAX_ERROR, "Empty query"));
    };
    if first.is(sql, "INSERT") {
        return parse_insert(sql, tokens);
    }
    refuse_what_needs_a_session(sql, first, tokens)?;
    let all = top_level(sql)?;
    if first.is(sql, "KILL") {
        return parse_kill(sql, &all);
    }
    if first.is(sql, "DROP") && sync_clause(sql, &all).is_some() {
        return Ok(Statement::DropSync);
    }
    let reads = ["SELECT", "WITH", "FROM", "SHOW", "DESCRIBE", "DESC", "EXISTS", "EXPLAIN"];
    let writes = all.iter().any(|token| token.is(sql, "INSERT"));
    if !first.is_any(sql, &reads) || (writes && !first.is(sql, "EXPLAIN")) {
        return Ok(Statement::Other);
    }
    if all.windows(2).any(|pair| pair[0].is(sql, "INTO") && pair[1].is(sql, "OUTFILE")) {
        return Err(Exception::new(code::INTO_OUTFILE_NOT_ALLOWED, "INTO OUTFILE is not allowed over HTTP"));
    }
    Ok(Statement::Reads(parse_reads(sql, &all)))
}

/// Whether what follows CREATE makes a table or view that lives as long as its session; one that is only called so does not.
fn is_temporary(sql: &[u8], rest: Tokens<'_>) -> bool {
    let mut words = rest.skip_while(|token| token.is_any(sql, &["OR", "REPLACE"]));
    words.next().is_some_and(|token| token.is_any(sql, &["TEMPORARY", "TEMP"]))
        && words.next().is_some_and(|token| token.is_any(sql, &["TABLE", "VIEW"]))
}

/// Refuses what would succeed here, and be forgotten before the client's next request.
fn refuse_what_needs_a_session(sql: &[u8], first: Token, rest: Tokens<'_>) -> Result<(), Exception> {
    let (what, instead) = if first.is(sql, "SET") {
        ("SET", "give the setting in the URL or in the statement's SETTINGS clause")
    } else if first.is(sql, "USE") {
        ("USE", "name the database in the URL (database=…) or before the table's name")
    } else if first.is_any(sql, &["CREATE", "REPLACE"]) && is_temporary(sql, rest) {
        ("a temporary table", "make a table of engine Memory and drop it at the end")
    } else {
        return Ok(());
    };
    Err(Exception::new(
        code::NOT_IMPLEMENTED,
        &format!("{what} would not outlive this request, as the local engine keeps no sessions: {instead}"),
    ))
}

/// The tokens outside of brackets, without a last semicolon. An opening bracket stands for what is in it.
fn top_level(sql: &[u8]) -> Result<Vec<Token>, Exception> {
    let mut depth = 0_usize;
    let mut all: Vec<Token> = Vec::new();
    let mut over = false;
    for token in Tokens::new(sql) {
        let closes = matches!(token.punct(), Some(b')' | b']' | b'}'));
        depth = depth.saturating_sub(usize::from(closes));
        if over && token.punct() != Some(b';') {
            return Err(Exception::new(
                code::SYNTAX_ERROR,
                "Syntax error (Multi-statements are not allowed)",
            ));
        }
        match token.punct() {
            Some(b';') if depth == 0 => over = true,
            // The bracket's token grows to its closing one, so that the end of the statement is known.
            _ if closes && depth == 0 => match all.last_mut() {
                Some(last) => last.end = token.end,
                None => all.push(token),
            },
            _ if depth == 0 => all.push(token),
            _ => {}
        }
        depth += usize::from(matches!(token.punct(), Some(b'(' | b'[' | b'{')));
    }
    Ok(all)
}

fn parse_reads(sql: &[u8], all: &[Token]) -> Reads {
    let end = all.last().map_or(sql.len(), |token| token.end);
    match format_clause(sql, all) {
        Some((clause, name)) => {
            Reads { after: sql.len() - clause.start, format: Some(text(name.bytes(sql))) }
        }
        None => Reads { after: sql.len() - end, format: None },
    }
}

/// `FORMAT Name` at the end, or before a last SETTINGS clause; not a column or function called format.
fn format_clause<'a>(sql: &[u8], all: &'a [Token]) -> Option<(&'a Token, &'a Token)> {
    let at = all.windows(2).rposition(|pair| pair[0].is(sql, "FORMAT") && pair[1].kind == Kind::Word)?;
    let before = at.checked_sub(1).map(|before| &all[before])?;
    let after = all.get(at + 2);
    let ends = after.is_none_or(|token| token.is(sql, "SETTINGS"));
    let column = before.is(sql, "SELECT") || matches!(before.punct(), Some(b',' | b'.'));
    (ends && !column).then(|| (&all[at], &all[at + 1]))
}

/// `SYNC` or `NO DELAY` at the end, or before a last SETTINGS clause.
fn sync_clause(sql: &[u8], all: &[Token]) -> Option<(usize, usize)> {
    let end = all.iter().position(|token| token.is(sql, "SETTINGS")).unwrap_or(all.len());
    match &all[..end] {
        [.., no, delay] if no.is(sql, "NO") && delay.is(sql, "DELAY") => Some((no.start, delay.end)),
        [.., sync] if sync.is(sql, "SYNC") => Some((sync.start, sync.end)),
        _ => None,
    }
}

/// The same DROP without its SYNC.
pub(crate) fn drop_without_sync(sql: &[u8]) -> Vec<u8> {
    let all: Vec<Token> = Tokens::new(sql).filter(|token| token.punct() != Some(b';')).collect();
    match sync_clause(sql, &all) {
        Some((start, end)) => [&sql[..start], &sql[end..]].concat(),
        None => sql.to_vec(),
    }
}

fn parse_insert(sql: &[u8], mut tokens: Tokens<'_>) -> Result<Statement, Exception> {
    let mut next = tokens.next();
    for word in ["INTO", "TABLE"] {
        if next.is_some_and(|token| token.is(sql, word)) {
            next = tokens.next();
        }
    }
    let Some(first) = next else { return Ok(Statement::Other) };
    if first.is(sql, "FUNCTION") {
        return into_function(sql, tokens);
    }
    let Some((table, mut token)) = table_name(sql, first, &mut tokens) else { return Ok(Statement::Other) };
    let mut insert =
        Insert { table, columns: None, settings: None, format: "Values".to_owned(), data_at: sql.len() };
    if token.punct() == Some(b'(') {
        match column_list(sql, &mut tokens)? {
            List::Query => return insert_from_query(sql),
            List::Columns(names) => insert.columns = Some(names),
        }
        let Some(after) = tokens.next() else { return Ok(Statement::Insert(insert)) };
        token = after;
    }
    if token.is(sql, "SETTINGS") {
        let Some(found) = tokens.find(|token| token.is_any(sql, &["FORMAT", "VALUES", "SELECT", "WITH"]))
        else {
            return Ok(Statement::Other);
        };
        insert.settings = Some(sql[token.end..found.start].to_vec());
        token = found;
    }
    if token.is(sql, "VALUES") {
        insert.data_at = token.end;
    } else if token.is(sql, "FORMAT") {
        let Some(name) = tokens.next().filter(|token| token.kind == Kind::Word) else {
            return Ok(Statement::Other);
        };
        insert.format = text(name.bytes(sql));
        insert.data_at = rows_at(sql, name.end);
    } else {
        return insert_from_query(sql);
    }
    Ok(Statement::Insert(insert))
}

/// A table's name: words, quoted names, dots and {parameters}; and the bracket or clause that ends it.
fn table_name(sql: &[u8], first: Token, tokens: &mut Tokens<'_>) -> Option<(Vec<u8>, Token)> {
    const CLAUSES: &[&str] = &["SETTINGS", "FORMAT", "VALUES", "SELECT", "WITH", "FROM", "PARTITION"];
    let mut end = first.end;
    let mut braces = usize::from(first.punct() == Some(b'{'));
    for token in tokens {
        match token.punct() {
            Some(b'{') => braces += 1,
            Some(b'}') => braces = braces.saturating_sub(1),
            Some(b'(') if braces == 0 => return Some((sql[first.start..end].to_vec(), token)),
            _ if braces == 0 && token.is_any(sql, CLAUSES) => {
                return Some((sql[first.start..end].to_vec(), token));
            }
            _ => {}
        }
        end = token.end;
    }
    None
}

/// The engine answers 200 to `input()` and inserts nothing.
fn insert_from_query(sql: &[u8]) -> Result<Statement, Exception> {
    let tokens: Vec<Token> = Tokens::new(sql).collect();
    let input = |pair: &[Token]| pair[0].is(sql, "input") && pair[1].punct() == Some(b'(');
    if tokens.windows(2).any(input) {
        return Err(Exception::not_here("INSERT from input()"));
    }
    top_level(sql).map(|_| Statement::Other)
}

fn into_function(sql: &[u8], tokens: Tokens<'_>) -> Result<Statement, Exception> {
    if tokens.clone().any(|token| token.is_any(sql, &["FORMAT", "VALUES"]))
        && !tokens.clone().any(|token| token.is(sql, "SELECT"))
    {
        return Err(Exception::not_here("INSERT INTO FUNCTION with rows in the body"));
    }
    Ok(Statement::Other)
}

enum List {
    Columns(Vec<Vec<u8>>),
    /// The bracket holds a query.
    Query,
}

/// The names up to the closing bracket. `a.b` is the name of a nested column.
fn column_list(sql: &[u8], tokens: &mut Tokens<'_>) -> Result<List, Exception> {
    let mut names = Vec::new();
    let mut name = Vec::new();
    for token in tokens.by_ref() {
        match token.punct() {
            None if name.is_empty() && token.is_any(sql, &["SELECT", "WITH"]) => return Ok(List::Query),
            None if token.is_name() && (name.is_empty() || name.ends_with(b".")) => {
                name.extend(token.value(sql));
            }
            Some(b'.') if !name.is_empty() => name.push(b'.'),
            Some(b',') if !name.is_empty() => names.push(std::mem::take(&mut name)),
            Some(b')') if !name.is_empty() => {
                names.push(name);
                return Ok(List::Columns(names));
            }
            _ => return Err(Exception::not_here("an INSERT's column list with anything but names in it")),
        }
    }
    Err(Exception::new(code::SYNTAX_ERROR, "Syntax error: the column list is not closed"))
}

/// As ClickHouse does after a format's name: blanks, a semicolon's worth of nothing, one line end.
fn rows_at(sql: &[u8], mut at: usize) -> usize {
    let byte = |at: usize| sql.get(at).copied();
    while matches!(byte(at), Some(b' ' | b'\t' | 0x0c)) {
        at += 1;
    }
    at += usize::from(byte(at) == Some(b';'));
    at += usize::from(byte(at) == Some(b'\r'));
    at + usize::from(byte(at) == Some(b'\n'))
}

/// `KILL QUERY WHERE query_id = 'x'`, with or without SYNC, is answered here. The engine does not know the ids of its clients, so any
/// other condition would kill other queries than are meant, or none.
fn parse_kill(sql: &[u8], all: &[Token]) -> Result<Statement, Exception> {
    let [_, query, rest @ ..] = all else { return Ok(Statement::Other) };
    if !query.is(sql, "QUERY") {
        return Ok(Statement::Other);
    }
    let format = format_clause(sql, all).map(|(_, name)| text(name.bytes(sql)));
    let end = rest.iter().position(|token| token.is_any(sql, &["SYNC", "FORMAT"])).unwrap_or(rest.len());
    let is_understood = match &rest[end..] {
        [] => true,
        [sync] => sync.is(sql, "SYNC"),
        [word, _] => word.is(sql, "FORMAT"),
        [sync, word, _] => sync.is(sql, "SYNC") && word.is(sql, "FORMAT"),
        _ => false,
    };
    match &rest[..end] {
        [is_where, column, operator, value]
            if is_understood
                && is_where.is(sql, "WHERE")
                && column.is_name()
                && column.value(sql) == b"query_id"
                && operator.punct() == Some(b'=')
                && value.kind == Kind::Text =>
        {
            Ok(Statement::Kill(Kill { query_id: text(&value.value(sql)), format }))
        }
        _ => Err(Exception::not_here("KILL QUERY other than `WHERE query_id = '…' SYNC`")),
    }
}

/// The setting's value for a request.
pub(crate) fn mark(query_id: &str) -> String {
    format!("{MARK}{query_id}")
}

/// Puts the HTTP `query_id` in the place of the engine's, in questions to `system.processes`.
pub(crate) fn with_real_query_ids(sql: &[u8]) -> Vec<u8> {
    let tokens: Vec<Token> = Tokens::new(sql).collect();
    let mut out = Vec::with_capacity(sql.len());
    let mut copied = 0;
    for window in tokens.windows(4) {
        let [from, system, dot, processes] = window else { continue };
        let named = |token: &Token, name: &[u8]| token.is_name() && token.value(sql) == name;
        if from.is_any(sql, &["FROM", "JOIN"])
            && named(system, b"system")
            && dot.punct() == Some(b'.')
            && named(processes, b"processes")
        {
            out.extend_from_slice(&sql[copied..system.start]);
            out.extend_from_slice(self::processes().as_bytes());
            copied = processes.end;
        }
    }
    out.extend_from_slice(&sql[copied..]);
    out
}

/// What stands for `system.processes`, as the engine spells it in its errors.
pub(crate) fn processes() -> String {
    format!("(SELECT * REPLACE ({} AS query_id) FROM system.processes)", real_query_id())
}

/// Kills the queries of one request in the engine.
pub(crate) fn kill_marked(query_id: &str) -> Vec<u8> {
    let mut sql = b"KILL QUERY WHERE Settings['log_comment'] = ".to_vec();
    sql.extend(quoted(mark(query_id).as_bytes(), b'\''));
    sql.extend_from_slice(b" ASYNC");
    sql
}

fn real_query_id() -> String {
    let comment = "Settings['log_comment']";
    let after = MARK.len() + 1;
    format!("if(startsWith({comment}, '{MARK}'), substring({comment}, {after}), query_id)")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests;
