//! Why an input cannot be read as ids.

/// Why an input cannot be read, beside what the system says. Comes within an [`std::io::Error`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadFault {
    /// The second reading found something else than the first.
    #[error("it changed after it was checked")]
    Changed,
    /// A quote that has no end.
    #[error("a quote that opens on line {line} is never closed")]
    OpenQuote {
        /// Where it opens.
        line: u64,
    },
    /// Text between the end of a quoted field and the next delimiter.
    #[error("a quote that opens on line {line} is closed before the end of its field")]
    EarlyQuote {
        /// Where it opens.
        line: u64,
    },
    /// A quote that would be text, and was hardly meant so.
    #[error("line {line} has a blank between a delimiter and a quote")]
    BlankQuote {
        /// The line.
        line: u64,
    },
    /// A carriage return that ends no line, outside of quotes.
    #[error("line {line} has a carriage return without a line feed")]
    BareReturn {
        /// The line.
        line: u64,
    },
    /// Text in another encoding.
    #[error("it is text in {encoding}, and UTF-8 is needed")]
    Encoding {
        /// The encoding.
        encoding: &'static str,
    },
    /// No text at all.
    #[error("it is a {kind} file, and text is needed")]
    NoText {
        /// What it begins like.
        kind: &'static str,
    },
    /// A device that gives bytes without an end.
    #[error("it is a device, which has no end")]
    Device,
    /// An answer of ClickHouse that ends within a row.
    #[error("the answer was cut off in row {row}")]
    Cut {
        /// The row.
        row: u64,
    },
}

/// Why there is no such column.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ColumnFault {
    /// No column of the name.
    #[error("it has no such column, its columns are {}", .found.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "))]
    Missing {
        /// The names there are.
        found: Vec<String>,
    },
    /// Two columns of one name.
    #[error("{places} of its columns have that name")]
    Twice {
        /// How many.
        places: usize,
    },
    /// A header that looks like ids.
    #[error("its first line is `{line}`, which looks like ids and not like names of columns")]
    LikeIds {
        /// The line.
        line: String,
    },
    /// A number beyond the last column.
    #[error("its first line has {found} fields")]
    TooFew {
        /// How many it has.
        found: usize,
    },
}
