//! ClickHouse's exceptions: code, text, HTTP status.

use hyper::StatusCode;

use crate::statement;

/// The codes that this module's own answers carry; the engine brings its own.
pub(crate) mod code {
    pub(crate) const BAD_ARGUMENTS: u32 = 36;
    pub(crate) const CANNOT_DECOMPRESS: u32 = 271;
    pub(crate) const CHECKSUM_DOESNT_MATCH: u32 = 40;
    pub(crate) const INTO_OUTFILE_NOT_ALLOWED: u32 = 358;
    pub(crate) const NOT_IMPLEMENTED: u32 = 48;
    pub(crate) const QUERY_IS_TOO_LARGE: u32 = 229;
    pub(crate) const QUERY_WAS_CANCELLED: u32 = 394;
    pub(crate) const QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING: u32 = 216;
    pub(crate) const SESSION_NOT_FOUND: u32 = 372;
    pub(crate) const SOCKET_TIMEOUT: u32 = 209;
    pub(crate) const STD_EXCEPTION: u32 = 1001;
    pub(crate) const SYNTAX_ERROR: u32 = 62;
    pub(crate) const TOO_LARGE_SIZE_COMPRESSED: u32 = 39;
    pub(crate) const UNEXPECTED_END_OF_FILE: u32 = 3;
    pub(crate) const UNKNOWN_COMPRESSION_METHOD: u32 = 89;
    pub(crate) const UNKNOWN_EXCEPTION: u32 = 1002;
    pub(crate) const UNKNOWN_SETTING: u32 = 115;
}

/// An exception as clients see it: `Code: 60. DB::Exception: … (UNKNOWN_TABLE)`, without the version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exception {
    pub(crate) code: u32,
    text: String,
}

impl Exception {
    /// One of ours, in ClickHouse's words.
    pub(crate) fn new(code: u32, message: &str) -> Self {
        Self { code, text: format!("Code: {code}. DB::Exception: {message} ({})", name(code)) }
    }

    /// What a server does, and this one does not.
    pub(crate) fn not_here(what: &str) -> Self {
        Self::new(code::NOT_IMPLEMENTED, &format!("{what} is not supported by the local engine"))
    }

    /// An operation of this process that failed, as ClickHouse reports such: with code 1001.
    pub(crate) fn io(doing: &str, error: &std::io::Error) -> Self {
        Self::new(code::STD_EXCEPTION, &format!("cannot {doing}: {error}"))
    }

    /// The engine's text, unchanged but for line ends.
    pub(crate) fn from_engine(text: &str) -> Self {
        let code = text
            .split_once("Code: ")
            .and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next())
            .and_then(|digits| digits.parse().ok());
        // The client asked for the table, not for what stands in its place.
        let text = text.replace(&statement::processes(), "system.processes");
        match code {
            Some(code) => Self { code, text: text.trim_end().to_owned() },
            None => Self::new(code::UNKNOWN_EXCEPTION, text.trim_end()),
        }
    }

    /// The same without words that this face, not the client, put into the statement: `ours`, or what is left of them where the
    /// engine's parser stopped within.
    pub(crate) fn without(mut self, ours: &str) -> Self {
        let mut left = ours.trim_start();
        while let Some((stop, rest)) = left.split_once(' ') {
            self.text = self.text.replace(&format!("({stop}): {left}"), "(end of query): ");
            left = rest;
        }
        self.text = self.text.replace(ours, "");
        self
    }

    /// The whole line, as the body of an answer has it.
    pub(crate) fn line(&self, version: &str) -> String {
        format!("{} (version {version} (chdb build))\n", self.text)
    }

    /// As ClickHouse maps codes: <https://github.com/ClickHouse/ClickHouse/blob/master/src/Server/HTTP/exceptionCodeToHTTPStatus.cpp>.
    pub(crate) fn status(&self) -> StatusCode {
        match self.code {
            194 => StatusCode::UNAUTHORIZED,
            192 | 193 | 497 | 512 | 516 => StatusCode::FORBIDDEN,
            6 | 8 | 15 | 25 | 26 | 27 | 36 | 37 | 38 | 41 | 44 | 53 | 62 | 72 | 117 | 123 | 167 | 168
            | 223 | 321 | 376 | 427 | 441 | 675 | 676 => StatusCode::BAD_REQUEST,
            46 | 47 | 50 | 56 | 60 | 63 | 73 | 78 | 81 | 115 | 152 | 336 | 511 => StatusCode::NOT_FOUND,
            229 => StatusCode::PAYLOAD_TOO_LARGE,
            48 => StatusCode::NOT_IMPLEMENTED,
            76 | 209 | 439 => StatusCode::SERVICE_UNAVAILABLE,
            159 => StatusCode::REQUEST_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

fn name(code: u32) -> &'static str {
    match code {
        code::BAD_ARGUMENTS => "BAD_ARGUMENTS",
        code::CANNOT_DECOMPRESS => "CANNOT_DECOMPRESS",
        code::CHECKSUM_DOESNT_MATCH => "CHECKSUM_DOESNT_MATCH",
        code::INTO_OUTFILE_NOT_ALLOWED => "INTO_OUTFILE_NOT_ALLOWED",
        code::NOT_IMPLEMENTED => "NOT_IMPLEMENTED",
        code::QUERY_IS_TOO_LARGE => "QUERY_IS_TOO_LARGE",
        code::QUERY_WAS_CANCELLED => "QUERY_WAS_CANCELLED",
        code::QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING => "QUERY_WITH_SAME_ID_IS_ALREADY_RUNNING",
        code::SESSION_NOT_FOUND => "SESSION_NOT_FOUND",
        code::SOCKET_TIMEOUT => "SOCKET_TIMEOUT",
        code::STD_EXCEPTION => "STD_EXCEPTION",
        code::SYNTAX_ERROR => "SYNTAX_ERROR",
        code::TOO_LARGE_SIZE_COMPRESSED => "TOO_LARGE_SIZE_COMPRESSED",
        code::UNEXPECTED_END_OF_FILE => "UNEXPECTED_END_OF_FILE",
        code::UNKNOWN_COMPRESSION_METHOD => "UNKNOWN_COMPRESSION_METHOD",
        code::UNKNOWN_SETTING => "UNKNOWN_SETTING",
        _ => "UNKNOWN_EXCEPTION",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_text_is_kept_and_its_code_is_found() {
        let cases = [
            ("Code: 60. DB::Exception: no table (UNKNOWN_TABLE)\n", 60, StatusCode::NOT_FOUND),
            ("std::exception. Code: 1001, type: filesystem_error", 1001, StatusCode::INTERNAL_SERVER_ERROR),
            ("Code: 62. DB::Exception: Code: 115. x", 62, StatusCode::BAD_REQUEST),
        ];
        for (text, code, status) in cases {
            let exception = Exception::from_engine(text);
            assert_eq!((exception.code, exception.status()), (code, status), "{text}");
            assert_eq!(exception.line("1"), format!("{} (version 1 (chdb build))\n", text.trim_end()));
        }
    }

    #[test]
    fn words_of_this_face_are_not_shown() {
        let ours = " INTO OUTFILE '/proc/self/fd/5' APPEND ";
        let cases = [
            (
                "failed at position 15 (x): x y INTO OUTFILE '/proc/self/fd/5' APPEND . Expected",
                "failed at position 15 (x): x y. Expected",
            ),
            (
                "failed at position 28 (OUTFILE): OUTFILE '/proc/self/fd/5' APPEND . Expected",
                "failed at position 28 (end of query): . Expected",
            ),
            (
                "failed at position 20 (INTO): INTO OUTFILE '/proc/self/fd/5' APPEND . Expected",
                "failed at position 20 (end of query): . Expected",
            ),
            ("another", "another"),
        ];
        for (text, shown) in cases {
            let exception = Exception::from_engine(&format!("Code: 62. DB::Exception: {text}")).without(ours);
            assert_eq!(exception.text, format!("Code: 62. DB::Exception: {shown}"));
        }
    }

    #[test]
    fn a_text_without_a_code_gets_one() {
        let exception = Exception::from_engine("No active connection");
        assert_eq!(exception.code, code::UNKNOWN_EXCEPTION);
        assert!(exception.line("1").starts_with("Code: 1002. DB::Exception: No active connection (UNKNOWN_"));
    }
}
