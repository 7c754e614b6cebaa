//! One id a line.

use std::io::{self, BufRead, BufReader, Read};

use millstream::Id;
use tokio::sync::mpsc;

use super::Line;
use super::text::{LONGEST, id_of_plain, is_blank, is_text, mark_before, too_long};

/// Channel capacity, in chunks; a chunk holds the lines of one read.
const READ_AHEAD: usize = 4;

/// Lines that one read returned.
pub type Lines<I> = io::Result<Vec<Line<I>>>;

/// Reads lines as they arrive, on a thread of its own that ends with the input, with the receiver, or with the process.
/// Complete lines are passed on at once: an incomplete line does not delay them.
///
/// # Errors
/// When the system gives no thread.
pub fn feed<I: Id>(from: impl Read + Send + 'static) -> io::Result<mpsc::Receiver<Lines<I>>> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    let mut lines = PlainLines::new(BufReader::with_capacity(1 << 16, from));
    // Not a tokio thread: tokio waits for its threads at the end, and nothing can interrupt a read.
    std::thread::Builder::new().name("input".into()).spawn(move || {
        loop {
            let together = lines.together();
            let last = together.as_ref().map_or(true, Vec::is_empty);
            if sender.blocking_send(together).is_err() || last {
                return;
            }
        }
    })?;
    Ok(receiver)
}

/// Lines by number. A line ends with a line feed; with a carriage return before it if the first line does.
pub(super) struct PlainLines<R> {
    reader: R,
    number: u64,
    /// Empty lines, which are skipped.
    pub blank: u64,
    /// Whether lines end with CRLF; `None` until the first line has ended.
    returns: Option<bool>,
    /// The line without its end, up to the longest kept length.
    bytes: Vec<u8>,
    /// Full length of the line, in bytes.
    length: u64,
}

impl<R: BufRead> PlainLines<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, number: 0, blank: 0, returns: None, bytes: Vec::new(), length: 0 }
    }

    pub fn into_reader(self) -> R {
        self.reader
    }

    pub fn next<I: Id>(&mut self) -> io::Result<Option<Line<I>>> {
        while self.read()? {
            if let Some(line) = self.line() {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    /// Reads one line of any content; `false` at the end.
    fn read(&mut self) -> io::Result<bool> {
        self.bytes.clear();
        let most = LONGEST as u64;
        self.length = (&mut self.reader).take(most).read_until(b'\n', &mut self.bytes)? as u64;
        if self.length == 0 {
            return Ok(false);
        }
        self.number += 1;
        let mut ended = self.bytes.ends_with(b"\n");
        if !ended && self.length == most {
            let rest = self.reader.skip_until(b'\n')? as u64;
            ended = rest > 0;
            self.length += rest;
        } else if ended {
            self.bytes.pop();
        }
        if self.number == 1 {
            let mark = mark_before(&self.bytes)?;
            self.bytes.drain(..mark);
        }
        let returns = self.bytes.ends_with(b"\r");
        if ended && self.returns.is_none() {
            self.returns = Some(returns);
        }
        if returns && self.returns == Some(true) {
            self.bytes.pop();
        }
        Ok(true)
    }

    /// The line that was read, unless it is empty.
    fn line<I: Id>(&mut self) -> Option<Line<I>> {
        // The reader has only the beginning of a line that is too long.
        let is_cut = self.length > LONGEST as u64;
        if !is_cut && (self.bytes.is_empty() || (!is_text::<I>() && is_blank(&self.bytes))) {
            self.blank += 1;
            return None;
        }
        let id = if is_cut { Err(too_long(self.length)) } else { id_of_plain(&self.bytes) };
        Some(Line::of(self.number, id))
    }
}

impl<R: Read> PlainLines<BufReader<R>> {
    /// Waits for a line, and takes all complete lines that were read with it; none at the end.
    fn together<I: Id>(&mut self) -> Lines<I> {
        let mut lines = Vec::new();
        loop {
            match self.read() {
                Ok(true) => lines.extend(self.line()),
                Ok(false) => break,
                Err(error) if lines.is_empty() => return Err(error),
                // The next call will meet the error again.
                Err(_) => break,
            }
            if !lines.is_empty() && !self.reader.buffer().contains(&b'\n') {
                break;
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids and faults of a text, each in words.
    fn read<I: Id>(text: &[u8]) -> (Vec<String>, u64) {
        let mut lines = PlainLines::new(text);
        let mut seen = Vec::new();
        while let Some(line) = lines.next::<I>().expect("readable") {
            seen.push(match line {
                Line::Id(id) => id.to_string(),
                Line::Bad { number, fault } => format!("bad {number}: {fault}"),
            });
        }
        (seen, lines.blank)
    }

    fn texts(text: &[u8]) -> Vec<String> {
        read::<String>(text).0
    }

    /// Returns one piece for each read, like a pipe.
    struct Pieces(Vec<&'static str>);

    impl Read for Pieces {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            (&mut self.0.remove(0).as_bytes()).read(into)
        }
    }

    #[test]
    fn lines_are_handed_over_as_they_come() {
        let reader = BufReader::new(Pieces(vec!["1\n2\n3", "4\n\n", "x\n", "5"]));
        let mut lines = PlainLines::new(reader);
        let mut seen = Vec::new();
        loop {
            let together: Vec<Line<u64>> = lines.together().expect("no pipe breaks here");
            if together.is_empty() {
                break;
            }
            seen.push(
                together
                    .into_iter()
                    .map(|line| match line {
                        Line::Id(id) => id.to_string(),
                        Line::Bad { number, .. } => format!("bad {number}"),
                    })
                    .collect::<Vec<_>>()
                    .join(" "),
            );
        }
        // The rest of a line is awaited only after the lines before it were passed on.
        assert_eq!(seen, ["1 2", "34", "bad 5", "5"]);
    }

    /// Regression: the id behind so many blanks was skipped with them, as an empty line.
    #[test]
    fn an_id_behind_more_blanks_than_a_line_may_have_is_refused() {
        let text = [b"1\n", &[b' '; LONGEST][..], b"2\n3\n"].concat();
        let (seen, blank) = read::<u64>(&text);
        assert_eq!((seen.len(), blank), (3, 0), "{seen:?}");
        assert!(seen[1].starts_with("bad 2: "), "{seen:?}");
    }

    #[test]
    fn a_file_of_dos_loses_its_line_ends_and_nothing_else() {
        assert_eq!(texts(b"a\r\n b \r\nc"), ["a", " b ", "c"]);
        assert_eq!(texts(b"a\r\nb\r"), ["a", "b"]);
        assert_eq!(texts(b"a\r\nb\n"), ["a", "b"]);
    }

    #[test]
    fn a_carriage_return_that_is_no_line_end_is_refused() {
        for (text, line) in
            [(&b"a\nb\r\n"[..], 2), (b"a\rb\rc\r", 1), (b"a\r\nb\r\r\n", 2), (b"a\r\nb\rc\r\n", 2)]
        {
            let seen = texts(text);
            let bad = seen.iter().find(|line| line.starts_with("bad")).expect("refused");
            assert!(bad.starts_with(&format!("bad {line}: ")) && bad.contains("carriage return"), "{bad}");
        }
        // Around a number a carriage return is a blank like others.
        assert_eq!(read::<u64>(b"1\n2\r\n\r\n3 \r\n").0, ["1", "2", "3"]);
    }

    #[test]
    fn blank_lines_are_passed_over_and_counted() {
        assert_eq!(read::<u64>(b"3\r\n\n 1 \n  \n2"), (vec!["3".into(), "1".into(), "2".into()], 2));
        assert_eq!(read::<String>(b"a\n\nb\n"), (vec!["a".into(), "b".into()], 1));
        // Blanks may be an id of the user's, so they are not skipped silently.
        assert_eq!(texts(b"a\n  \n"), ["a", "bad 2: `  ` holds nothing but blanks"]);
    }

    #[test]
    fn a_byte_order_mark_is_removed_from_the_beginning_alone() {
        assert_eq!(texts(b"\xef\xbb\xbfa\nb\n"), ["a", "b"]);
        assert_eq!(read::<u64>(b"\xef\xbb\xbf7\n8\n").0, ["7", "8"]);
        assert_eq!(read::<String>(b"\xef\xbb\xbf"), (vec![], 1));
        assert!(texts(b"a\n\xef\xbb\xbfb\n")[1].contains("byte-order mark"));
    }

    #[test]
    fn a_line_that_is_too_long_is_one_bad_line_whatever_is_at_its_end() {
        for length in [LONGEST - 1, LONGEST, LONGEST + 1, 3 << 20] {
            let text = format!("1\n{}\n2\n", "7".repeat(length));
            let (seen, _) = read::<u64>(text.as_bytes());
            assert_eq!(seen.len(), 3, "{length}");
            assert!(seen[1].starts_with("bad 2: ") && seen[2] == "2", "{length}: {seen:?}");
            // Text behind so many bytes is no id of its own.
            let text = format!("{}\n12\n", "x".repeat(length - 2) + "12");
            assert_eq!(texts(text.as_bytes())[1..], ["12"], "{length}");
        }
        let (seen, _) = read::<u64>("7".repeat(LONGEST * 2).as_bytes());
        assert_eq!(seen, [format!("bad 1: {}", too_long(LONGEST as u64 * 2))]);
    }
}
