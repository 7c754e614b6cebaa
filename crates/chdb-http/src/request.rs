//! What a request asks for: its URL and its headers, taken apart.
//!
//! Users and passwords are accepted and ignored: the server listens on loopback, for everyone with an account on this machine.

use hyper::Method;
use hyper::header::CONTENT_ENCODING;
use hyper::http::request::Parts;
use percent_encoding::percent_decode_str;

use crate::encoding::Encoding;
use crate::exception::{Exception, code};
use crate::form;
use crate::statement;
use crate::tokens::quoted;

/// Parameters that clients send, that ClickHouse does not take for settings, and that mean nothing here. A session (`session_id`)
/// would hold temporary tables and settings between requests; here every request is a session of its own, and statements that
/// would need one are refused (`statement::parse`).
const IGNORED: &[&str] = &[
    "user",
    "password",
    "quota_key",
    "role",
    "buffer_size",
    "session_id",
    "session_timeout",
    "client_protocol_version",
    // Carries the query id to the engine; see `statement::mark`.
    "log_comment",
    // Would wait for ever; see `statement::drop_without_sync`.
    "database_atomic_wait_for_drop_and_detach_synchronously",
];

/// A GET may not write, as with a server: a browser sends one for any link. It may change settings.
const READONLY_FOR_GET: &str = "2";

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// The `query` parameter; the body comes after it.
    pub(crate) query: Vec<u8>,
    pub(crate) query_id: Option<String>,
    pub(crate) default_format: Option<String>,
    database: Option<String>,
    /// `param_NAME=value`, without the prefix.
    pub(crate) params: Vec<(String, String)>,
    settings: Vec<(String, String)>,
    /// The body is in compressed frames.
    pub(crate) decompress: bool,
    /// Answer once the query is over: an error then has its own status in any case.
    pub(crate) wait_end: bool,
    /// How the body is compressed for HTTP.
    pub(crate) encoding: Option<Encoding>,
    /// The boundary of a `multipart/form-data` body.
    pub(crate) boundary: Option<String>,
    read_only: bool,
}

impl Request {
    pub(crate) fn new(head: &Parts) -> Result<Self, Exception> {
        let header =
            |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut request = Self {
            database: header("X-ClickHouse-Database"),
            default_format: header("X-ClickHouse-Format"),
            boundary: form::boundary(&head.headers),
            read_only: head.method != Method::POST,
            ..Self::default()
        };
        if let Some(encoding) = header(CONTENT_ENCODING.as_str()) {
            request.encoding = Encoding::named(&encoding)?;
        }
        for (name, value) in pairs(head.uri.query().unwrap_or_default()) {
            request.take(&name, value)?;
        }
        if request.encoding.is_some() && request.decompress {
            return Err(Exception::not_here("a body with both a Content-Encoding and decompress=1"));
        }
        Ok(request)
    }

    /// One parameter, from the URL or from a form.
    pub(crate) fn take(&mut self, name: &str, value: Vec<u8>) -> Result<(), Exception> {
        if name == "query" {
            self.query = value;
            return Ok(());
        }
        let value = String::from_utf8(value).map_err(|_| no_text(name))?;
        match name {
            "query_id" => self.query_id = Some(value).filter(|id| !id.is_empty()),
            "database" => self.database = Some(value),
            "default_format" => self.default_format = Some(value),
            "compress" if is_on(&value) => {
                return Err(Exception::not_here("an answer in frames (compress=1)"));
            }
            "compress" => {}
            "decompress" => self.decompress = is_on(&value),
            "wait_end_of_query" => self.wait_end = is_on(&value),
            "session_check" if is_on(&value) => {
                let none = "Session not found: the local engine keeps no sessions between requests";
                return Err(Exception::new(code::SESSION_NOT_FOUND, none));
            }
            "session_check" => {}
            name if IGNORED.contains(&name) => {}
            name => match name.strip_prefix("param_") {
                Some(param) => self.params.push((param.to_owned(), value)),
                None if is_setting_name(name) => self.settings.push((name.to_owned(), value)),
                None => {
                    let message = format!("Unknown setting '{name}'");
                    return Err(Exception::new(code::UNKNOWN_SETTING, &message));
                }
            },
        }
        Ok(())
    }

    /// What makes a fresh session this request's: its database, then its settings in one SET, with the query id among
    /// them.
    pub(crate) fn session(&self, query_id: &str) -> Vec<Vec<u8>> {
        let mut statements = Vec::new();
        if let Some(database) = self.database.as_deref().filter(|name| !name.is_empty()) {
            statements.push([b"USE ", &quoted(database.as_bytes(), b'`')[..]].concat());
        }
        // `1 + 1` is no statement to a server.
        let mut set = b"SET implicit_select = 0, log_comment = ".to_vec();
        set.extend(quoted(statement::mark(query_id).as_bytes(), b'\''));
        for (name, value) in &self.settings {
            set.extend_from_slice(format!(", {name} = ").as_bytes());
            set.extend(quoted(value.as_bytes(), b'\''));
        }
        if self.read_only && !self.settings.iter().any(|(name, _)| name == "readonly") {
            set.extend_from_slice(format!(", readonly = {READONLY_FOR_GET}").as_bytes());
        }
        statements.push(set);
        statements
    }
}

/// As ClickHouse reads booleans in the URL.
fn is_on(value: &str) -> bool {
    value == "1" || value.eq_ignore_ascii_case("true")
}

fn is_setting_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// `name=value&…`, with `%XX` and `+` undone. A statement may hold any bytes, and crates for URLs read what is not UTF-8 as U+FFFD.
fn pairs(query: &str) -> impl Iterator<Item = (String, Vec<u8>)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (String::from_utf8_lossy(&decoded(name)).into_owned(), decoded(value))
    })
}

fn decoded(text: &str) -> Vec<u8> {
    percent_decode_str(&text.replace('+', " ")).collect()
}

fn no_text(name: &str) -> Exception {
    Exception::new(code::BAD_ARGUMENTS, &format!("the value of the parameter '{name}' is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, uri: &str) -> Result<Request, u32> {
        let (head, ()) = hyper::Request::builder()
            .method(method)
            .uri(uri)
            .header("X-ClickHouse-Database", "fromheader")
            .body(())
            .expect("a request")
            .into_parts();
        Request::new(&head).map_err(|exception| exception.code)
    }

    fn session(request: &Request) -> Vec<String> {
        request.session("q'1").iter().map(|sql| String::from_utf8_lossy(sql).into_owned()).collect()
    }

    #[test]
    fn parameters_find_their_places() {
        let request = request(
            Method::POST,
            "/?query=SELECT+%7Bx%3AUInt8%7D%2B1&param_x=5&max_threads=2&a='b%5C&query_id=i&decompress=1&user=u&database=",
        )
        .expect("a request");
        assert_eq!(request.query, b"SELECT {x:UInt8}+1");
        assert_eq!(request.params, [("x".to_owned(), "5".to_owned())]);
        assert_eq!(request.query_id.as_deref(), Some("i"));
        assert!(request.decompress && !request.wait_end);
        assert_eq!(
            session(&request),
            [
                r"SET implicit_select = 0, log_comment = 'chdb-http-query-id=q\'1', max_threads = '2', a = '\'b\\'"
            ]
        );
    }

    #[test]
    fn a_get_is_read_only_unless_it_says_more() {
        let get = request(Method::GET, "/?query=x").expect("a request");
        assert_eq!(session(&get)[0], "USE `fromheader`");
        assert!(session(&get)[1].ends_with(", readonly = 2"));
        let stricter = request(Method::GET, "/?query=x&readonly=1&database=d%60b").expect("a request");
        assert_eq!(session(&stricter)[0], r"USE `d\`b`");
        assert!(session(&stricter)[1].ends_with(", readonly = '1'"));
    }

    #[test]
    fn what_would_not_reach_the_engine_as_it_was_sent_is_refused() {
        let cases = [
            ("/?a%20=1", code::UNKNOWN_SETTING),
            ("/?param_x=%FF", code::BAD_ARGUMENTS),
            ("/?compress=1", code::NOT_IMPLEMENTED),
            ("/?session_id=a&session_check=1", code::SESSION_NOT_FOUND),
        ];
        for (uri, code) in cases {
            assert_eq!(request(Method::POST, uri), Err(code), "{uri}");
        }
        let bytes =
            request(Method::POST, "/?query=SELECT+'%FF'&compress=0&session_check=0").expect("a request");
        assert_eq!(bytes.query, b"SELECT '\xff'");
    }

    #[test]
    fn broken_escapes_are_left_alone() {
        assert_eq!(decoded("%4a%zz%4"), b"J%zz%4");
    }
}
