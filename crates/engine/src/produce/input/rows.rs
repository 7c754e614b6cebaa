//! One id a row of a query's answer, in RowBinary: every value byte for byte
//! (<https://clickhouse.com/docs/interfaces/formats/RowBinary>).

use std::io::{self, BufRead};

use millstream::Id;

use super::Line;
use super::text::{LONGEST, id_of_value, too_long};
use crate::model::input_fault::ReadFault;

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// Its length, then its bytes.
    Text,
    /// A number of this many bytes, the lowest first.
    Number(usize),
}

pub(super) struct Rows<R> {
    reader: R,
    value: Value,
    row: u64,
}

impl<R: BufRead> Rows<R> {
    pub fn new(reader: R, value: Value) -> Self {
        Self { reader, value, row: 0 }
    }

    pub fn into_reader(self) -> R {
        self.reader
    }

    pub fn next<I: Id>(&mut self) -> io::Result<Option<Line<I>>> {
        if self.reader.fill_buf()?.is_empty() {
            return Ok(None);
        }
        self.row += 1;
        let id = match self.value {
            Value::Number(bytes) => Ok(I::from_number(self.number(bytes)?)),
            Value::Text => self.text()?,
        };
        Ok(Some(Line::of(self.row, id)))
    }

    fn number(&mut self, bytes: usize) -> io::Result<u64> {
        let mut number = [0; 8];
        self.fill(&mut number[..bytes])?;
        Ok(u64::from_le_bytes(number))
    }

    fn text<I: Id>(&mut self) -> io::Result<Result<I, String>> {
        let length = self.length()?;
        if length > LONGEST as u64 {
            self.pass(length)?;
            return Ok(Err(too_long(length)));
        }
        let mut text = vec![0; length as usize];
        self.fill(&mut text)?;
        Ok(id_of_value(&text))
    }

    /// Seven bits a byte, the lowest first; the last byte is below 128.
    fn length(&mut self) -> io::Result<u64> {
        let mut length = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let mut byte = [0];
            self.fill(&mut byte)?;
            length |= u64::from(byte[0] & 0x7f) << shift;
            if byte[0] < 0x80 {
                break;
            }
        }
        Ok(length)
    }

    fn pass(&mut self, mut left: u64) -> io::Result<()> {
        while left > 0 {
            let there = self.reader.fill_buf()?.len();
            if there == 0 {
                return Err(self.cut());
            }
            let passed = left.min(there as u64);
            self.reader.consume(passed as usize);
            left -= passed;
        }
        Ok(())
    }

    fn fill(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.reader.read_exact(into).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.cut(),
            _ => error,
        })
    }

    fn cut(&self) -> io::Error {
        ReadFault::Cut { row: self.row }.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<I: Id>(bytes: &[u8], value: Value) -> io::Result<Vec<Result<I, String>>> {
        let mut rows = Rows::new(bytes, value);
        let mut seen = Vec::new();
        while let Some(line) = rows.next::<I>()? {
            seen.push(match line {
                Line::Id(id) => Ok(id),
                Line::Bad { number, fault } => Err(format!("{number}: {fault}")),
            });
        }
        Ok(seen)
    }

    #[test]
    fn every_value_is_one_id_byte_for_byte() {
        let seen = read::<String>(b"\x03a\nb\x02  \x02c\r\x01\0\x00\x04caf\xe9", Value::Text).expect("whole");
        let ids = ["a\nb", "  ", "c\r", "\0"].map(|id| Ok(id.to_owned()));
        assert_eq!(seen[..4], ids);
        assert_eq!(seen[4], Err("5: an id must not be empty".to_owned()));
        assert_eq!(seen[5], Err("6: it is not UTF-8: `caf\\xe9`".to_owned()));
    }

    #[test]
    fn numbers_have_any_width() {
        assert_eq!(read::<u64>(&[1, 255], Value::Number(1)).expect("whole"), [Ok(1), Ok(255)]);
        assert_eq!(read::<u64>(&[1, 2], Value::Number(2)).expect("whole"), [Ok(513)]);
        assert_eq!(read::<u64>(&[255; 8], Value::Number(8)).expect("whole"), [Ok(u64::MAX)]);
    }

    #[test]
    fn long_values_are_passed_over_whole_and_cut_ones_are_refused() {
        let long = [&[0x80, 0x80, 0x08][..], &[b'x'; 1 << 17], b"\x01a"].concat();
        let seen = read::<String>(&long, Value::Text).expect("whole");
        assert_eq!(seen, [Err(format!("1: {}", too_long(1 << 17))), Ok("a".to_owned())]);
        for cut in [&b"\x01a\x05ab"[..], b"\x01a\x80"] {
            let error = read::<String>(cut, Value::Text).expect_err("cut");
            assert_eq!(ReadFault::of(&error), Some(&ReadFault::Cut { row: 2 }));
        }
    }
}
