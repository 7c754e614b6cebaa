//! Why an input cannot be read as ids.

/// Why an input cannot be read, apart from what the system reports. Travels inside an [`std::io::Error`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadFault {
    /// The second reading found other content than the first.
    #[error("it changed after it was checked")]
    Changed,
    /// A quote that is never closed.
    #[error("a quote that opens on line {line} is never closed")]
    OpenQuote {
        /// The line on which it opens.
        line: u64,
    },
    /// Text between the end of a quoted field and the next delimiter.
    #[error("a quote that opens on line {line} is closed before the end of its field")]
    EarlyQuote {
        /// The line on which it opens.
        line: u64,
    },
    /// A quote after a blank: it would be text, and the author of the file hardly meant that.
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
    /// The file is no text.
    #[error("it is a {kind} file, and text is needed")]
    NoText {
        /// The kind of file that its first bytes show.
        kind: &'static str,
    },
    /// A device that gives bytes without end.
    #[error("it is a device, which has no end")]
    Device,
    /// ClickHouse's answer ends within a row.
    #[error("the answer was cut off in row {row}")]
    Cut {
        /// The row.
        row: u64,
    },
}

/// Why a column cannot be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ColumnFault {
    /// No column has this name.
    #[error("it has no such column, its columns are {}", .found.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "))]
    Missing {
        /// The names of the columns that exist.
        found: Vec<String>,
    },
    /// Two columns have one name.
    #[error("{places} of its columns have that name")]
    Twice {
        /// How many columns have it.
        places: usize,
    },
    /// The header looks like ids.
    #[error("its first line is `{line}`, which looks like ids and not like names of columns")]
    LikeIds {
        /// The line.
        line: String,
    },
    /// The number is beyond the last column.
    #[error("its first line has {found} fields")]
    TooFew {
        /// How many fields the line has.
        found: usize,
    },
}
