//! Which text may be an id, and which files are no text.

use crate::model::input_fault::ReadFault;

use std::borrow::Cow;
use std::io;

use millstream::{Id, MAX_STRING_ID, shortened};

/// Longest line or field that is kept, in bytes. Longer ones are no ids, and a file without line ends must not fill
/// memory.
pub(super) const LONGEST: usize = 64 << 10;
/// The byte-order mark that some programs put before text in UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

impl ReadFault {
    /// The fault inside an I/O error.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// What the user can do about the fault.
    pub fn hint(&self) -> String {
        match self {
            Self::Changed => "give the input as it was, or a copy of it that does not change".into(),
            Self::OpenQuote { .. } | Self::EarlyQuote { .. } => {
                "nothing was published; within quotes a quote is written twice (\"\"); correct that line".into()
            }
            Self::BareReturn { .. } => {
                "nothing was published; lines end with LF or CRLF: `tr '\\r' '\\n' < FILE` converts a file of an old Mac".into()
            }
            Self::BlankQuote { .. } => {
                "nothing was published; remove the blank, or choose another --delimiter".into()
            }
            Self::Encoding { encoding } => {
                let encoding = encoding.split(',').next().unwrap_or(encoding);
                format!("convert it: iconv -f {encoding} -t UTF-8 FILE | … --stdin")
            }
            Self::NoText { .. } => "unpack it, and give its ids with --stdin: zcat FILE | … --stdin".into(),
            Self::Device => "name a file or a pipe".into(),
            Self::Cut { .. } => "try again".into(),
        }
    }
}

impl From<ReadFault> for io::Error {
    fn from(fault: ReadFault) -> Self {
        Self::new(io::ErrorKind::InvalidData, fault)
    }
}

/// How many bytes at the beginning of an input are a byte-order mark and no text.
///
/// # Errors
/// [`ReadFault::Encoding`], [`ReadFault::NoText`].
pub(super) fn mark_before(begin: &[u8]) -> io::Result<usize> {
    // The longer marks first, because a UTF-16 mark is the beginning of a UTF-32 mark.
    const OTHERS: [(&[u8], &str); 4] = [
        (b"\xff\xfe\0\0", "UTF-32LE"),
        (b"\0\0\xfe\xff", "UTF-32BE"),
        (b"\xff\xfe", "UTF-16LE"),
        (b"\xfe\xff", "UTF-16BE"),
    ];
    const PACKED: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh9", "bzip2"),
        (b"PK\x03\x04", "zip (or Excel)"),
        (b"PAR1", "Parquet"),
    ];
    if let Some((_, encoding)) = OTHERS.into_iter().find(|(mark, _)| begin.starts_with(mark)) {
        return Err(ReadFault::Encoding { encoding }.into());
    }
    if let Some((_, kind)) = PACKED.into_iter().find(|(mark, _)| begin.starts_with(mark)) {
        return Err(ReadFault::NoText { kind }.into());
    }
    Ok(if begin.starts_with(MARK) { MARK.len() } else { 0 })
}

/// Whether ids of this type are text, in which every byte counts.
pub(super) fn is_text<I: Id>() -> bool {
    I::CLICKHOUSE == String::CLICKHOUSE
}

/// A line, or a field without quotes, as an id: byte for byte, or the reason for refusing it. Characters that an editor
/// hides and that hardly ever belong to an id are refused.
pub(super) fn id_of_plain<I: Id>(bytes: &[u8]) -> Result<I, String> {
    if is_text::<I>() {
        let why = if bytes.contains(&0) {
            Some("holds a NUL byte, as text in UTF-16 does")
        } else if bytes.contains(&b'\r') {
            Some("holds a carriage return that is no line end of this input")
        } else if bytes.starts_with(MARK) {
            Some("begins with a byte-order mark")
        } else if !bytes.is_empty() && is_blank(bytes) {
            Some("holds nothing but blanks")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(format!("`{}` {why}", shown(bytes)));
        }
    }
    id_of_value(bytes)
}

/// A value delimited by quotes or by its length, as an id: byte for byte, or the reason for refusing it.
pub(super) fn id_of_value<I: Id>(bytes: &[u8]) -> Result<I, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| format!("it is not UTF-8: `{}`", shown(bytes)))?;
    I::parse(text).map_err(|fault| fault.to_string())
}

/// Why a text of this length is no id.
pub(super) fn too_long(length: u64) -> String {
    format!("{length} bytes are longer than the limit of an id, {MAX_STRING_ID}")
}

pub(super) fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(u8::is_ascii_whitespace)
}

/// Bytes in a printable form.
fn shown(bytes: &[u8]) -> Cow<'_, str> {
    let begin = &bytes[..bytes.len().min(400)];
    match std::str::from_utf8(begin) {
        Ok(text) => shortened(text).into(),
        Err(_) => shortened(&begin.escape_ascii().to_string()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_no_text() {
        assert_eq!(mark_before(b"\xef\xbb\xbfabc").expect("UTF-8"), 3);
        assert_eq!(mark_before(b"abc").expect("text"), 0);
        assert_eq!(mark_before(b"").expect("nothing"), 0);
    }

    #[test]
    fn other_encodings_and_packed_files_are_named() {
        let table: [(&[u8], &str); 8] = [
            (b"\xff\xfea\0", "text in UTF-16LE"),
            (b"\xfe\xff\0a", "text in UTF-16BE"),
            (b"\xff\xfe\0\0a\0\0\0", "text in UTF-32LE"),
            (b"\0\0\xfe\xff\0\0\0a", "text in UTF-32BE"),
            (b"\x1f\x8b\x08\0", "a gzip file"),
            (b"\x28\xb5\x2f\xfd\x04", "a zstd file"),
            (b"PK\x03\x04\x14", "a zip (or Excel) file"),
            (b"PAR1\x15", "a Parquet file"),
        ];
        for (begin, named) in table {
            let error = mark_before(begin).expect_err(named).to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn text_is_an_id_byte_for_byte() {
        for text in ["a", " a ", "a\tb", "ü\u{a0}", "\u{1b}[2J", "\"a\"", "+5"] {
            assert_eq!(id_of_plain::<String>(text.as_bytes()).as_deref(), Ok(text));
        }
        for text in ["a\nb", "  ", "c\r", "\0", "\u{feff}a"] {
            assert_eq!(id_of_value::<String>(text.as_bytes()).as_deref(), Ok(text));
        }
    }

    #[test]
    fn text_that_cannot_be_meant_is_refused_with_the_reason() {
        let table: [(&[u8], &str); 7] = [
            (b"a\0b\0", "`a\\u{0}b\\u{0}` holds a NUL byte"),
            (b"a\rb", "`a\\rb` holds a carriage return"),
            (b"c\r", "`c\\r` holds a carriage return"),
            (b"\xef\xbb\xbfa", "`\\u{feff}a` begins with a byte-order mark"),
            (b" \t", "` \\t` holds nothing but blanks"),
            (b"caf\xe9", "it is not UTF-8: `caf\\xe9`"),
            (b"", "an id must not be empty"),
        ];
        for (bytes, why) in table {
            let fault = id_of_plain::<String>(bytes).expect_err(why);
            assert!(fault.starts_with(why), "{fault}");
        }
    }
}
