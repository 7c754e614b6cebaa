//! One id a record of CSV, in one of its columns (RFC 4180 with any delimiter).
//!
//! A reader of our own, because an unclosed quote must not swallow the rest of the file: where quotes and delimiters
//! disagree, the error names the line on which the quote opened.

use std::io::{self, BufRead};
use std::mem;

use millstream::Id;

use super::Line;
use super::text::{LONGEST, id_of_plain, id_of_value, is_text, mark_before, too_long};
use crate::model::input_fault::{ColumnFault, ReadFault};

/// Which column of CSV holds the ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// By name or by number.
    pub at: At,
    /// The byte between two fields.
    pub delimiter: u8,
}

/// How the user names a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// A name in the first record.
    Name(String),
    /// A number, counted from 1; then the first record holds an id.
    Number(usize),
}

/// Reads records, including the first one.
pub(super) struct Fields<R> {
    reader: R,
    record: Record,
    /// Number of fields in every record.
    width: usize,
    header: bool,
    /// Whether the first record holds an id and was not returned yet.
    first: bool,
    pub blank: u64,
}

/// Why the input cannot be read as CSV.
pub(super) enum NoFields {
    Read(io::Error),
    Column(ColumnFault),
}

impl From<io::Error> for NoFields {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

impl<R: BufRead> Fields<R> {
    /// Reads the first record, and finds the column.
    pub fn open<I: Id>(mut reader: R, column: &Column) -> Result<Self, NoFields> {
        let mark = mark_before(reader.fill_buf()?)?;
        reader.consume(mark);
        let (index, header) = match column.at {
            At::Name(_) => (None, true),
            At::Number(number) => (Some(number - 1), false),
        };
        let record = Record::new(column.delimiter, index);
        let mut fields = Self { reader, record, width: 0, header, first: !header, blank: 0 };
        if !fields.read()? {
            return Ok(fields);
        }
        fields.width = fields.record.fields;
        match &column.at {
            At::Name(name) => {
                let names: Vec<String> = mem::take(&mut fields.record.names);
                let index = place_of::<I>(name, &names).map_err(NoFields::Column)?;
                fields.record.wanted = Some(index);
            }
            At::Number(number) if *number > fields.width => {
                return Err(NoFields::Column(ColumnFault::TooFew { found: fields.width }));
            }
            At::Number(_) => {}
        }
        Ok(fields)
    }

    pub fn into_reader(self) -> R {
        self.reader
    }

    pub fn next<I: Id>(&mut self) -> io::Result<Option<Line<I>>> {
        if mem::take(&mut self.first) && self.record.fields > 0 {
            return Ok(Some(self.line()));
        }
        Ok(self.read()?.then(|| self.line()))
    }

    fn line<I: Id>(&self) -> Line<I> {
        let Record { begun, fields, ref kept, length, quoted, .. } = self.record;
        let id = if fields != self.width {
            let first = if self.header { "the header" } else { "the first line" };
            Err(format!("it has {}, {first} has {}", counted(fields), counted(self.width)))
        } else if length > LONGEST as u64 {
            Err(too_long(length))
        } else if quoted {
            id_of_value(kept)
        } else {
            id_of_plain(kept)
        };
        Line::of(begun, id)
    }

    /// Reads the next record that is no empty line; `false` at the end.
    fn read(&mut self) -> io::Result<bool> {
        loop {
            self.record.begin();
            let any = self.read_record()?;
            if any && self.record.is_blank() {
                self.blank += 1;
            } else {
                return Ok(any);
            }
        }
    }

    fn read_record(&mut self) -> io::Result<bool> {
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok(self.record.end_of_input()?);
            }
            let mut used = 0;
            let mut ended = false;
            while used < buffer.len() && !ended {
                ended = self.record.take(buffer[used])?;
                used += 1;
            }
            self.reader.consume(used);
            if ended {
                return Ok(true);
            }
        }
    }
}

/// The place of the column with this name.
fn place_of<I: Id>(name: &str, names: &[String]) -> Result<usize, ColumnFault> {
    if !is_text::<I>() && I::parse(name).is_ok() && names.iter().any(|found| found == name) {
        return Err(ColumnFault::LikeIds { line: millstream::shortened(&names.join(",")) });
    }
    let places = |same: &dyn Fn(&str) -> bool| -> Vec<usize> {
        (0..).zip(names).filter(|(_, found)| same(found)).map(|(place, _)| place).collect()
    };
    let exact = places(&|found| found == name);
    let found = if exact.is_empty() { places(&|found| found.trim() == name) } else { exact };
    match found[..] {
        [place] => Ok(place),
        [] => {
            let shortened = |name: &String| millstream::shortened(name);
            Err(ColumnFault::Missing { found: names.iter().map(shortened).collect() })
        }
        ref places => Err(ColumnFault::Twice { places: places.len() }),
    }
}

fn counted(fields: usize) -> String {
    if fields == 1 { "1 field".into() } else { format!("{fields} fields") }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// At the beginning of a field.
    Start,
    /// Within a field without quotes.
    Plain,
    /// Within quotes.
    Quoted,
    /// After a quote within quotes: the end of the field, or one of two.
    Quote,
    /// After the end of a quoted field and a carriage return.
    Return,
}

/// A record that is parsed byte by byte.
struct Record {
    delimiter: u8,
    /// The field to keep; `None` keeps all of them as names.
    wanted: Option<usize>,
    names: Vec<String>,
    state: State,
    /// Lines that have ended.
    lines: u64,
    /// The line on which the record begins.
    begun: u64,
    /// The line on which the record's last quote opened.
    opened: u64,
    /// Fields that have ended.
    fields: usize,
    /// Whether a field is not empty, or has quotes.
    any: bool,
    /// Bytes of the field, up to the longest kept length.
    field: Vec<u8>,
    /// Full length of the field, in bytes.
    field_length: u64,
    field_quoted: bool,
    /// Bytes of the wanted field, up to the longest kept length.
    kept: Vec<u8>,
    length: u64,
    quoted: bool,
}

impl Record {
    fn new(delimiter: u8, wanted: Option<usize>) -> Self {
        Self {
            delimiter,
            wanted,
            names: Vec::new(),
            state: State::Start,
            lines: 0,
            begun: 1,
            opened: 1,
            fields: 0,
            any: false,
            field: Vec::new(),
            field_length: 0,
            field_quoted: false,
            kept: Vec::new(),
            length: 0,
            quoted: false,
        }
    }

    fn begin(&mut self) {
        self.state = State::Start;
        self.begun = self.lines + 1;
        (self.fields, self.any) = (0, false);
        self.kept.clear();
        self.names.clear();
        (self.length, self.quoted) = (0, false);
        self.begin_field();
    }

    fn begin_field(&mut self) {
        self.field.clear();
        (self.field_length, self.field_quoted) = (0, false);
    }

    /// Whether the record is an empty line.
    fn is_blank(&self) -> bool {
        self.fields == 1 && !self.any
    }

    /// Takes a byte; `true` when it ends the record.
    fn take(&mut self, byte: u8) -> Result<bool, ReadFault> {
        use State::{Plain, Quote, Quoted, Return, Start};
        match (self.state, byte) {
            (Start, b'"') => {
                self.opened = self.lines + 1;
                self.field_quoted = true;
                self.state = Quoted;
            }
            // Otherwise lines that end with a carriage return alone would all be one record.
            (Plain, byte) if byte != b'\n' && self.field.ends_with(b"\r") => {
                return Err(ReadFault::BareReturn { line: self.lines + 1 });
            }
            (Start | Plain | Quote, byte) if byte == self.delimiter => {
                self.end_field();
                self.state = Start;
            }
            (Start | Plain | Quote | Return, b'\n') => {
                self.lines += 1;
                self.end_record();
                return Ok(true);
            }
            (Plain, b'"') if self.field.iter().all(|byte| matches!(byte, b' ' | b'\t')) => {
                return Err(ReadFault::BlankQuote { line: self.lines + 1 });
            }
            (Start | Plain, byte) => {
                self.push(byte);
                self.state = Plain;
            }
            (Quoted, b'"') => self.state = Quote,
            (Quote, b'"') => {
                self.push(byte);
                self.state = Quoted;
            }
            (Quoted, byte) => {
                self.lines += u64::from(byte == b'\n');
                self.push(byte);
            }
            (Quote, b'\r') => self.state = Return,
            (Quote | Return, _) => return Err(ReadFault::EarlyQuote { line: self.opened }),
        }
        Ok(false)
    }

    /// Whether a record ends with the input.
    fn end_of_input(&mut self) -> Result<bool, ReadFault> {
        match self.state {
            State::Quoted => Err(ReadFault::OpenQuote { line: self.opened }),
            State::Start if self.fields == 0 => Ok(false),
            _ => {
                self.end_record();
                Ok(true)
            }
        }
    }

    fn push(&mut self, byte: u8) {
        self.field_length += 1;
        if self.field.len() < LONGEST {
            self.field.push(byte);
        }
    }

    /// Ends the last field: a carriage return behind it is part of the line's end.
    fn end_record(&mut self) {
        if !self.field_quoted && self.field_length <= LONGEST as u64 && self.field.ends_with(b"\r") {
            self.field.pop();
            self.field_length -= 1;
        }
        self.end_field();
    }

    fn end_field(&mut self) {
        self.any |= self.field_length > 0 || self.field_quoted;
        match self.wanted {
            None => self.names.push(String::from_utf8_lossy(&self.field).into_owned()),
            Some(wanted) if wanted == self.fields => {
                mem::swap(&mut self.kept, &mut self.field);
                (self.length, self.quoted) = (self.field_length, self.field_quoted);
            }
            Some(_) => {}
        }
        self.fields += 1;
        self.begin_field();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str) -> Column {
        Column { at: At::Name(name.to_owned()), delimiter: b',' }
    }

    fn number(number: usize, delimiter: u8) -> Column {
        Column { at: At::Number(number), delimiter }
    }

    /// Ids and bad lines of a column, or why there are none.
    fn read(text: &[u8], column: &Column) -> Result<Vec<String>, String> {
        let mut fields = Fields::open::<String>(text, column).map_err(|fault| match fault {
            NoFields::Read(error) => error.to_string(),
            NoFields::Column(fault) => fault.to_string(),
        })?;
        let mut seen = Vec::new();
        while let Some(line) = fields.next::<String>().map_err(|error| error.to_string())? {
            seen.push(match line {
                Line::Id(id) => id,
                Line::Bad { number, fault } => format!("bad {number}: {fault}"),
            });
        }
        Ok(seen)
    }

    fn ids(text: &[u8], column: &Column) -> Vec<String> {
        read(text, column).expect("readable")
    }

    #[test]
    fn a_column_is_taken_by_name_or_by_number() {
        assert_eq!(ids(b"name,id\n\"a,\nb\",7\nc,8\n", &column("id")), ["7", "8"]);
        assert_eq!(ids(b"\xef\xbb\xbfid,name\r\n7,a\r\n8,b\r\n", &column("id")), ["7", "8"]);
        assert_eq!(ids(b"name, id \na,7", &column("id")), ["7"]);
        assert_eq!(ids(b"a;7\nb;8\n", &number(2, b';')), ["7", "8"]);
        assert_eq!(ids(b"a\t7\nb\t8", &number(1, b'\t')), ["a", "b"]);
        assert!(ids(b"", &number(1, b',')).is_empty());
        assert!(ids(b"\n", &column("id")).is_empty());
    }

    #[test]
    fn fields_are_kept_byte_for_byte() {
        let text = b"n,id\r\n1, a \r\n2,\" b\r\nc \"\r\n3,\"say \"\"hi\"\"\"\r\n4,a\"b\r\n";
        assert_eq!(ids(text, &column("id")), [" a ", " b\r\nc ", "say \"hi\"", "a\"b"]);
        assert_eq!(ids(b"id,n\n\"\r\",1\n", &column("id")), ["\r"]);
        assert_eq!(ids(b"id,n\r\na,1\r\nb,2\r", &column("id")), ["a", "b"]);
    }

    #[test]
    fn a_quote_that_is_never_closed_is_named_by_its_line() {
        let open = read(b"id,n\na,1\n\"b,2\nc,3\n", &column("id")).expect_err("open");
        assert_eq!(open, "a quote that opens on line 3 is never closed");
        let open = read(b"id,n\na,\"1\nb,2\n\n\nc,3\n", &column("id")).expect_err("open, in another column");
        assert_eq!(open, "a quote that opens on line 2 is never closed");
        let early = read(b"id,n\na,1\n\"b,2\n\"c\",3\n", &column("id")).expect_err("closed by another");
        assert_eq!(early, "a quote that opens on line 3 is closed before the end of its field");
        let header = read(b"\"id,n\na,1\n", &column("id")).expect_err("open in the header");
        assert_eq!(header, "a quote that opens on line 1 is never closed");
        let blank = read(b"n,id\n1, \"a,b\"\n", &column("id")).expect_err("a blank");
        assert_eq!(blank, "line 2 has a blank between a delimiter and a quote");
    }

    #[test]
    fn a_record_has_as_many_fields_as_the_first() {
        let seen = ids(b"n,id\n1,a\n2\n3,b,c\n\"4\n\n\",d\n5\n", &column("id"));
        assert_eq!(
            seen,
            [
                "a",
                "bad 3: it has 1 field, the header has 2 fields",
                "bad 4: it has 3 fields, the header has 2 fields",
                "d",
                "bad 8: it has 1 field, the header has 2 fields"
            ]
        );
        assert_eq!(
            ids(b"a,b\nc\n", &number(1, b','))[1],
            "bad 2: it has 1 field, the first line has 2 fields"
        );
    }

    #[test]
    fn empty_lines_are_passed_over_and_empty_fields_are_not() {
        assert_eq!(ids(b"\nid,n\n\r\na,1\n\n", &column("id")), ["a"]);
        assert_eq!(ids(b"n,id\n1,\n", &column("id")), ["bad 2: an id must not be empty"]);
        assert_eq!(ids(b"id\n\"\"\na\n", &column("id")), ["bad 2: an id must not be empty", "a"]);
        assert_eq!(ids(b"n,id\n\n1,a\n", &column("id")), ["a"]);
    }

    #[test]
    fn a_column_that_is_not_there_once_is_refused() {
        assert_eq!(
            read(b"name,id\na,7\n", &column("key")).expect_err("none"),
            "it has no such column, its columns are `name`, `id`"
        );
        assert_eq!(read(b"id,n,id\n", &column("id")).expect_err("two"), "2 of its columns have that name");
        assert_eq!(read(b"a,b\n", &number(3, b',')).expect_err("beyond"), "its first line has 2 fields");
        let like = Fields::open::<u64>(&b"5,7\n6,8\n"[..], &column("5"));
        let Err(NoFields::Column(fault)) = like else { panic!("a first line of ids is no header") };
        assert_eq!(
            fault.to_string(),
            "its first line is `5,7`, which looks like ids and not like names of columns"
        );
    }

    #[test]
    fn a_field_that_is_too_long_is_one_bad_line() {
        let text = format!("id,n\n{},1\nb,2\n", "x".repeat(LONGEST * 3));
        assert_eq!(
            ids(text.as_bytes(), &column("id")),
            [format!("bad 2: {}", too_long(LONGEST as u64 * 3)), "b".into()]
        );
    }
}
