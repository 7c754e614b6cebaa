//! ClickHouse's tokens: just enough to tell words, names, strings and brackets from comments.
//!
//! Works on bytes, since the data of an INSERT follows its statement directly and is not text.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A keyword, a bare name or a number.
    Word,
    /// A name in backticks or double quotes.
    Quoted,
    /// A string in single quotes, or a heredoc.
    Text,
    /// One byte of anything else.
    Punct(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Token {
    pub(crate) fn bytes<'a>(&self, sql: &'a [u8]) -> &'a [u8] {
        &sql[self.start..self.end]
    }

    pub(crate) fn is(&self, sql: &[u8], keyword: &str) -> bool {
        self.kind == Kind::Word && self.bytes(sql).eq_ignore_ascii_case(keyword.as_bytes())
    }

    pub(crate) fn is_any(&self, sql: &[u8], keywords: &[&str]) -> bool {
        keywords.iter().any(|keyword| self.is(sql, keyword))
    }

    pub(crate) fn punct(&self) -> Option<u8> {
        match self.kind {
            Kind::Punct(byte) => Some(byte),
            Kind::Word | Kind::Quoted | Kind::Text => None,
        }
    }

    pub(crate) fn is_name(&self) -> bool {
        matches!(self.kind, Kind::Word | Kind::Quoted)
    }

    /// What a quoted name or a string says; any other token's bytes.
    pub(crate) fn value(&self, sql: &[u8]) -> Vec<u8> {
        let bytes = self.bytes(sql);
        match (self.kind, bytes.first()) {
            (Kind::Quoted | Kind::Text, Some(quote @ (b'\'' | b'`' | b'"'))) => unquoted(bytes, *quote),
            _ => bytes.to_vec(),
        }
    }
}

/// Tokens one by one, so that a parser does not read beyond a statement into its data.
#[derive(Clone)]
pub(crate) struct Tokens<'a> {
    sql: &'a [u8],
    at: usize,
}

impl<'a> Tokens<'a> {
    pub(crate) fn new(sql: &'a [u8]) -> Self {
        Self { sql, at: 0 }
    }

    fn rest(&self) -> &'a [u8] {
        self.sql.get(self.at..).unwrap_or_default()
    }

    fn skip_blanks_and_comments(&mut self) {
        loop {
            let rest = self.rest();
            if rest.first().is_some_and(|byte| byte.is_ascii_whitespace() || *byte == 0x0b) {
                self.at += 1;
            } else if rest.starts_with(b"--") || rest.starts_with(b"#!") || rest.starts_with(b"# ") {
                self.at += rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
            } else if rest.starts_with(b"/*") {
                self.at += find(&rest[2..], b"*/").map_or(rest.len(), |end| end + 4);
            } else {
                return;
            }
        }
    }
}

impl Iterator for Tokens<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        self.skip_blanks_and_comments();
        let rest = self.rest();
        let (kind, length) = match *rest.first()? {
            quote @ (b'`' | b'"') => (Kind::Quoted, quoted_length(rest, quote)),
            b'\'' => (Kind::Text, quoted_length(rest, b'\'')),
            b'$' => match heredoc_length(rest) {
                Some(length) => (Kind::Text, length),
                None => (Kind::Word, word_length(rest)),
            },
            byte if in_word(byte) => (Kind::Word, word_length(rest)),
            byte => (Kind::Punct(byte), 1),
        };
        let start = self.at;
        self.at += length;
        Some(Token { kind, start, end: self.at })
    }
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$') || !byte.is_ascii()
}

fn word_length(rest: &[u8]) -> usize {
    rest.iter().position(|byte| !in_word(*byte)).unwrap_or(rest.len())
}

/// Up to the closing quote; backslashes escape, doubled quotes do not end it.
fn quoted_length(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote && rest.get(at + 1) == Some(&quote) => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// `$tag$ … $tag$`.
fn heredoc_length(rest: &[u8]) -> Option<usize> {
    let tag = rest[1..].iter().position(|byte| *byte == b'$')? + 2;
    if !rest[1..tag - 1].iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_') {
        return None;
    }
    find(&rest[tag..], &rest[..tag]).map(|end| tag + end + tag)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn unquoted(bytes: &[u8], quote: u8) -> Vec<u8> {
    let inner = bytes.get(1..bytes.len().saturating_sub(1)).unwrap_or_default();
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => out.extend(bytes.next().map(unescaped)),
            byte if byte == quote => {
                bytes.next();
                out.push(quote);
            }
            byte => out.push(byte),
        }
    }
    out
}

fn unescaped(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b't' => b'\t',
        b'r' => b'\r',
        b'0' => 0,
        byte => byte,
    }
}

/// `text` between `quote`s, as ClickHouse reads it back.
pub(crate) fn quoted(text: &[u8], quote: u8) -> Vec<u8> {
    let mut out = vec![quote];
    for byte in text {
        if *byte == quote || *byte == b'\\' {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(sql: &str) -> Vec<String> {
        let sql = sql.as_bytes();
        Tokens::new(sql).map(|token| String::from_utf8_lossy(token.bytes(sql)).into_owned()).collect()
    }

    #[test]
    fn statements_are_cut_into_tokens() {
        let cases: [(&str, &[&str]); 6] = [
            ("SELECT 1, a.`b c`", &["SELECT", "1", ",", "a", ".", "`b c`"]),
            ("a -- b\n c /* d ' */ e", &["a", "c", "e"]),
            (r"'it''s' 'it\'s' x", &["'it''s'", r"'it\'s'", "x"]),
            ("$$ ' $$ $x$ $$ $x$ y", &["$$ ' $$", "$x$ $$ $x$", "y"]),
            ("'open", &["'open"]),
            ("/* open", &[]),
        ];
        for (sql, expected) in cases {
            assert_eq!(words(sql), expected, "{sql}");
        }
    }

    #[test]
    fn quoting_is_read_back() {
        for text in [&b"plain"[..], b"it's", br"back\slash", b"`tick`", b""] {
            for quote in [b'\'', b'`'] {
                let sql = quoted(text, quote);
                let tokens: Vec<Token> = Tokens::new(&sql).collect();
                assert_eq!(tokens.len(), 1);
                assert_eq!(tokens[0].value(&sql), text);
            }
        }
    }
}
