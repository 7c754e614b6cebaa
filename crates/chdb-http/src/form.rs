//! Forms (`multipart/form-data`): how clients send parameters that would make a URL too long. The Rust client sends all of
//! its parameters so.

use hyper::HeaderMap;
use hyper::header::CONTENT_TYPE;

use crate::exception::{Exception, code};

/// The boundary of a `multipart/form-data` body; `None` for a body of another type.
pub(crate) fn boundary(headers: &HeaderMap) -> Option<String> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    if !content_type.to_ascii_lowercase().starts_with("multipart/form-data") {
        return None;
    }
    let (_, rest) = content_type.split_once("boundary=")?;
    Some(rest.split(';').next().unwrap_or_default().trim().trim_matches('"').to_owned())
}

/// The fields of a form: name and value of each part of `body`. Parts that are files are refused: ClickHouse takes
/// those for external tables.
pub(crate) fn fields(body: &[u8], boundary: &str) -> Result<Vec<(String, Vec<u8>)>, Exception> {
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

    #[test]
    fn a_form_is_taken_apart() {
        let body = b"--B\r\nContent-Disposition: form-data; name=\"query\"\r\n\r\nSELECT\r\n1\r\n\
            --B\r\nContent-Disposition: form-data; name=\"param_a\"\r\n\r\n\r\n--B--\r\n";
        let found = fields(body, "B").expect("a form");
        assert_eq!(found, [("query".into(), b"SELECT\r\n1".to_vec()), ("param_a".into(), Vec::new())]);
        for broken in [&body[1..], &body[..body.len() - 9], &body[..40], b"--B"] {
            assert!(fields(broken, "B").is_err());
        }
    }
}
