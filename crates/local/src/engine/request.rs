//! What a request asks for: its URL, its headers and its form, taken apart.
//!
//! Users and passwords are accepted and ignored: everything listens on loopback, for whoever may use this machine.

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method};
use percent_encoding::percent_decode_str;

use super::encoding::Encoding;
use super::errors::{Exception, code};
use super::statement;
use super::tokens::quoted;

/// Parameters that ClickHouse does not take for settings, and that mean nothing here. A session (`session_id`) would
/// hold temporary tables and settings between requests; here every request is a session of its own, and statements that
/// would need one are refused (`statement::parse`).
const IGNORED: &[&str] = &[
    "user",
    "password",
    "quota_key",
    "role",
    "stacktrace",
    "buffer_size",
    "session_id",
    "session_timeout",
    "close_session",
    "client_protocol_version",
    "framing",
    // Carries the query id to the engine; see `statement::mark`.
    "log_comment",
    // Would wait for ever; see `statement::drop_without_sync`.
    "database_atomic_wait_for_drop_and_detach_synchronously",
    // Headers while a query runs: there are none.
    "send_progress_in_http_headers",
    "http_headers_progress_interval_ms",
    // No compression by headers: there is `compress=1`, and this is loopback.
    "enable_http_compression",
    "http_zlib_compression_level",
];

/// A GET may not write: ClickHouse lets it change settings, though.
const READONLY_FOR_GET: &str = "2";

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The `query` parameter; the body comes after it.
    pub(super) query: Vec<u8>,
    pub(super) query_id: Option<String>,
    pub(super) default_format: Option<String>,
    database: Option<String>,
    /// `param_NAME=value`, without the prefix.
    pub(super) params: Vec<(String, String)>,
    settings: Vec<(String, String)>,
    /// Answer in compressed frames.
    pub(super) compress: bool,
    /// The body is in compressed frames.
    pub(super) decompress: bool,
    /// Answer once the query is over: an error then has its own status in any case.
    pub(super) wait_end: bool,
    /// How the body is compressed for HTTP.
    pub(super) encoding: Option<Encoding>,
    /// The boundary of a `multipart/form-data` body.
    pub(super) boundary: Option<String>,
    read_only: bool,
}

impl Request {
    pub(super) fn new(head: &Parts) -> Result<Self, Exception> {
        let header =
            |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut request = Self {
            database: header("X-ClickHouse-Database"),
            default_format: header("X-ClickHouse-Format"),
            boundary: boundary(&head.headers),
            read_only: head.method != Method::POST,
            ..Self::default()
        };
        if let Some(encoding) = header(CONTENT_ENCODING.as_str()) {
            request.encoding = Encoding::named(&encoding)?;
        }
        for (name, value) in form_pairs(head.uri.query().unwrap_or_default()) {
            request.take(&name, &value)?;
        }
        if request.encoding.is_some() && request.decompress {
            let both =
                "a body with both a Content-Encoding and decompress=1 is not supported by the local engine";
            return Err(Exception::new(code::NOT_IMPLEMENTED, both));
        }
        Ok(request)
    }

    /// One parameter, from the URL or from a form.
    pub(super) fn take(&mut self, name: &str, value: &[u8]) -> Result<(), Exception> {
        if name == "query" {
            self.query = value.to_vec();
            return Ok(());
        }
        let value = String::from_utf8_lossy(value).into_owned();
        match name {
            "query_id" => self.query_id = Some(value).filter(|id| !id.is_empty()),
            "database" => self.database = Some(value),
            "default_format" => self.default_format = Some(value),
            "compress" => self.compress = is_on(&value),
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
    pub(super) fn session(&self, query_id: &str) -> Vec<Vec<u8>> {
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

fn boundary(headers: &HeaderMap) -> Option<String> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    if !content_type.to_ascii_lowercase().starts_with("multipart/form-data") {
        return None;
    }
    let (_, rest) = content_type.split_once("boundary=")?;
    Some(rest.split(';').next().unwrap_or_default().trim().trim_matches('"').to_owned())
}

/// `name=value&…`, with `%XX` and `+` undone.
fn form_pairs(query: &str) -> impl Iterator<Item = (String, Vec<u8>)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (String::from_utf8_lossy(&decoded(name)).into_owned(), decoded(value))
    })
}

fn decoded(text: &str) -> Vec<u8> {
    percent_decode_str(&text.replace('+', " ")).collect()
}

/// The fields of a form: name and value of each part of `body`. Parts that are files are refused: ClickHouse takes
/// those for external tables.
pub(super) fn form_fields(body: &[u8], boundary: &str) -> Result<Vec<(String, Vec<u8>)>, Exception> {
    let bad = |what: &str| Exception::new(code::BAD_ARGUMENTS, &format!("multipart/form-data body: {what}"));
    let delimiter = format!("--{boundary}").into_bytes();
    let separator = [b"\r\n", &delimiter[..]].concat();
    let mut rest = body.strip_prefix(&delimiter[..]).ok_or_else(|| bad("no boundary at its start"))?;
    let mut fields = Vec::new();
    while let Some(part) = rest.strip_prefix(b"\r\n") {
        let end = find(part, &separator).ok_or_else(|| bad("a part does not end"))?;
        let head_end = find(&part[..end], b"\r\n\r\n").ok_or_else(|| bad("a part has no headers"))?;
        let head = String::from_utf8_lossy(&part[..head_end]);
        if head.contains("filename=") {
            return Err(bad("external tables are not supported by the local engine"));
        }
        let name = head
            .split_once("name=\"")
            .and_then(|(_, name)| name.split_once('"'))
            .ok_or_else(|| bad("a part has no name"))?;
        fields.push((name.0.to_owned(), part[head_end + 4..end].to_vec()));
        rest = &part[end + separator.len()..];
    }
    if !rest.starts_with(b"--") {
        return Err(bad("no boundary at its end"));
    }
    Ok(fields)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
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
            "/?query=SELECT+%7Bx%3AUInt8%7D%2B1&param_x=5&max_threads=2&a='b%5C&query_id=i&compress=1&user=u&database=",
        )
        .expect("a request");
        assert_eq!(request.query, b"SELECT {x:UInt8}+1");
        assert_eq!(request.params, [("x".to_owned(), "5".to_owned())]);
        assert_eq!(request.query_id.as_deref(), Some("i"));
        assert!(request.compress && !request.decompress);
        assert_eq!(
            session(&request),
            [
                r"SET implicit_select = 0, log_comment = 'millstream-query-id=q\'1', max_threads = '2', a = '\'b\\'"
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
    fn a_setting_that_cannot_be_one_is_refused() {
        assert_eq!(request(Method::POST, "/?a%20=1"), Err(code::UNKNOWN_SETTING));
    }

    #[test]
    fn broken_escapes_are_left_alone() {
        assert_eq!(decoded("%4a%zz%4"), b"J%zz%4");
    }

    #[test]
    fn a_form_is_taken_apart() {
        let body = b"--B\r\nContent-Disposition: form-data; name=\"query\"\r\n\r\nSELECT\r\n1\r\n\
            --B\r\nContent-Disposition: form-data; name=\"param_a\"\r\n\r\n\r\n--B--\r\n";
        let fields = form_fields(body, "B").expect("a form");
        assert_eq!(fields, [("query".into(), b"SELECT\r\n1".to_vec()), ("param_a".into(), Vec::new())]);
        for broken in [&body[1..], &body[..body.len() - 9], &body[..40], b"--B"] {
            assert!(form_fields(broken, "B").is_err());
        }
    }
}
