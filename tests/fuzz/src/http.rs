//! A request to the local engine, up to what the engine would be asked.

use std::io::Read;

use chdb_http::dissect::{Dissected, FILE, Kind, dissect};
use lz4_flex::frame::FrameDecoder;
use millstream::frame::compress;

use crate::heap::bounded;

/// LZ4 cannot make more than this of one byte.
const LZ4_MOST: usize = 255;
/// What one byte of a statement takes at most while it is understood: tokens of a byte each, in growing lists.
const STATEMENT: usize = 256;
/// Beyond this many bytes a statement is refused.
const MAX_STATEMENT: usize = 1 << 18;
/// What a decoder of an HTTP coding remembers at most of what it made: a stream may ask for that much.
const WINDOW: usize = 128 << 20;
/// Names, headers, settings.
const SLACK: usize = 64 << 10;

/// A request as it is written in an input: `METHOD URI`, header lines, an empty line, a byte that says how long the
/// pieces of the body are, the body.
struct Request<'a> {
    method: &'a str,
    uri: &'a str,
    headers: Vec<(&'a str, &'a [u8])>,
    piece: usize,
    body: &'a [u8],
}

/// Takes the input apart as a request: whole, then in pieces or with its body compressed.
pub fn http(input: &[u8]) {
    let Some(request) = Request::read(input) else { return };
    let Request { uri, body, piece, .. } = request;
    let Some(whole) = request.dissect(uri, &[body]) else { return };
    // One of the two for each input: every input costs several files in memory.
    if piece % 2 == 0 {
        let pieces: Vec<&[u8]> = body.chunks(piece).collect();
        assert_eq!(request.dissect(uri, &pieces).as_ref(), Some(&whole), "pieces of {piece}");
    } else if let Some(uri) = decompressing(uri).filter(|_| !request.is_coded()) {
        let mut frames = Vec::new();
        body.chunks(piece).for_each(|piece| compress(piece, &mut frames));
        if let Some(compressed) = request.dissect(&uri, &[&frames]) {
            assert_eq!(compressed.map(unpacked), whole, "compressed");
        }
    }
    match &whole {
        Ok(dissected) => sound(dissected),
        Err(code) => assert_ne!(*code, 0),
    }
}

/// The same with its rows as they were before they were compressed.
fn unpacked(mut dissected: Dissected) -> Dissected {
    let Some(compression) = dissected.compression.take() else { return dissected };
    assert_eq!((compression, dissected.kind), ("lz4", Kind::Insert));
    let mut rows = Vec::new();
    FrameDecoder::new(&dissected.rows[..]).read_to_end(&mut rows).expect("an LZ4 frame file");
    dissected.rows = rows;
    let statement = dissected.statement.strip_suffix(b", 'lz4')").expect("the engine is told");
    dissected.statement = [statement, b")"].concat();
    dissected
}

impl<'a> Request<'a> {
    fn read(input: &'a [u8]) -> Option<Self> {
        let mut lines = input.split_inclusive(|byte| *byte == b'\n');
        let (method, uri) =
            std::str::from_utf8(lines.next()?).ok()?.trim_end_matches('\n').split_once(' ')?;
        let mut at = input.iter().position(|byte| *byte == b'\n')? + 1;
        let mut headers = Vec::new();
        for line in lines {
            at += line.len();
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            let Some(colon) = line.iter().position(|byte| *byte == b':') else { break };
            let value = line.get(colon + 2..).unwrap_or_default();
            headers.push((std::str::from_utf8(&line[..colon]).ok()?, value));
        }
        let (piece, body) = input[at..].split_first().unwrap_or((&0, &[]));
        Some(Self { method, uri, headers, piece: usize::from(*piece).max(1), body })
    }

    /// Whether its body is compressed for HTTP: then it has no frames in it.
    fn is_coded(&self) -> bool {
        self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-encoding"))
    }

    fn dissect(&self, uri: &str, pieces: &[&[u8]]) -> Option<Result<Dissected, u32>> {
        let sent: usize = pieces.iter().map(|piece| piece.len()).sum();
        let statement = uri.len() + (sent * LZ4_MOST).min(MAX_STATEMENT);
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        let window = if self.is_coded() { WINDOW } else { 0 };
        let limit = sent * (1 + LZ4_MOST) + statement * STATEMENT + headers * 8 + SLACK + window;
        bounded(limit, || dissect(self.method, uri, &self.headers, pieces))
    }
}

/// The same address for a body in frames; none where it may say that already, however it spells it.
fn decompressing(uri: &str) -> Option<String> {
    let unclear = uri.contains('%') || uri.contains('#') || uri.contains("decompress");
    (!unclear).then(|| format!("{uri}{}decompress=1", if uri.contains('?') { '&' } else { '?' }))
}

fn sound(dissected: &Dissected) {
    let Dissected { session, statement, kind, .. } = dissected;
    match &session[..] {
        [set] => settings(set),
        [database, set] => {
            let rest = database.strip_prefix(b"USE ").and_then(|name| quoted(name, b'`'));
            assert_eq!(rest, Some(&[][..]), "{}", database.escape_ascii());
            settings(set);
        }
        other => panic!("{} statements make a session", other.len()),
    }
    match kind {
        Kind::Reads => {
            let outfile = format!(" INTO OUTFILE '{FILE}' APPEND ");
            assert!(holds(statement, outfile.as_bytes()), "{}", statement.escape_ascii());
        }
        Kind::Insert => insert(statement),
        Kind::Kill => assert!(statement.ends_with(b" ASYNC"), "{}", statement.escape_ascii()),
        Kind::Other => assert!(!statement.is_empty()),
    }
}

/// `SET a = 0, b = 'text', …`: whatever the client says, it says it within quotes.
fn settings(set: &[u8]) {
    let fault = || format!("not the settings of a session: {}", set.escape_ascii());
    let rest =
        set.strip_prefix(b"SET implicit_select = 0, log_comment = ").unwrap_or_else(|| panic!("{}", fault()));
    let mut rest = quoted(rest, b'\'').unwrap_or_else(|| panic!("{}", fault()));
    while !rest.is_empty() && rest != b", readonly = 2" {
        let name = rest.strip_prefix(b", ").unwrap_or_else(|| panic!("{}", fault()));
        let length = name.iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_').count();
        let value = name[length..].strip_prefix(b" = ").filter(|_| length > 0);
        rest = value.and_then(|value| quoted(value, b'\'')).unwrap_or_else(|| panic!("{}", fault()));
    }
}

/// The rows come from the file, in the format and with the columns that are named: nothing follows.
fn insert(statement: &[u8]) {
    let fault = || format!("not an INSERT from a file: {}", statement.escape_ascii());
    let source = format!(" SELECT * FROM file('{FILE}', ");
    let at = statement.windows(source.len()).rposition(|window| window == source.as_bytes());
    let rest = at.map_or(&[][..], |at| &statement[at + source.len()..]);
    let format = quoted(rest, b'\'').and_then(|rest| rest.strip_prefix(b", "));
    let structure = format.and_then(|rest| quoted(rest, b'\''));
    assert_eq!(structure, Some(&b")"[..]), "{}", fault());
    assert!(statement.starts_with(b"INSERT INTO "), "{}", fault());
}

/// What follows a text in quotes, read as ClickHouse does: backslashes escape, a doubled quote does not end it.
fn quoted(bytes: &[u8], quote: u8) -> Option<&[u8]> {
    let mut rest = bytes.strip_prefix(&[quote])?;
    loop {
        rest = match rest {
            [b'\\', _, rest @ ..] => rest,
            [first, second, rest @ ..] if *first == quote && *second == quote => rest,
            [first, rest @ ..] if *first == quote => return Some(rest),
            [_, rest @ ..] => rest,
            [] => return None,
        };
    }
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use chdb_http::dissect::QUERY_ID;

    use super::*;

    fn session(uri: &str) -> Vec<Vec<u8>> {
        let dissected = dissect("POST", uri, &[], &[b"SELECT 1"]).expect("a request").expect("accepted");
        dissected.session
    }

    #[test]
    fn a_session_is_understood() {
        let session = session("/?database=a%60b%5C&query_id=%27%5C&max_threads=%27");
        assert_eq!(session[0], br"USE `a\`b\\`");
        settings(&session[1]);
    }

    #[test]
    #[should_panic(expected = "not the settings of a session")]
    fn a_setting_that_leaves_its_quotes_is_noticed() {
        settings(b"SET implicit_select = 0, log_comment = 'x', a = 'b' , c = 1");
    }

    #[test]
    fn a_request_that_names_no_query_id_gets_one() {
        let set = String::from_utf8(session("/").remove(0)).expect("text");
        assert!(set.contains(QUERY_ID), "{set}");
    }
}
