//! What the user's code prints in a compute process: lines for the log, at a limited rate.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// A longer line is cut.
const MAX_LINE: usize = 1000;
/// Lines that a process may print at once, and further lines for each second.
const AT_ONCE: u32 = 100;
const A_SECOND: f64 = 20.0;
/// Bytes kept of the end of the output, because they may say why a process died.
const LAST_WORDS: usize = 4 << 10;
const READ_AT_ONCE: usize = 16 << 10;
/// Bytes that one read takes out of the pipe: a pipe's usual size.
const THERE_AT_ONCE: usize = 64 << 10;

/// What arrives through the pipe.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// A line that the user's code printed.
    Line(String),
    /// The process begins its next id, which prints the lines that follow.
    Next,
}

/// Stdout and stderr of a process, as one stream, like on one terminal.
#[derive(Debug)]
pub(super) struct Output {
    from: pipe::Receiver,
    ended: bool,
    /// Read buffer, on the heap: futures that are moved hold this value.
    chunk: Vec<u8>,
    line: Vec<u8>,
    /// The line that a child writes before each id.
    mark: Vec<u8>,
    last_words: Vec<u8>,
    allowed: f64,
    counted: Instant,
    left_out: u64,
}

impl Output {
    /// Reads `from`; `mark` is the line that the child writes before each id, without its line end.
    pub fn new(from: io::PipeReader, mark: String) -> io::Result<Self> {
        Ok(Self {
            from: pipe::Receiver::from_owned_fd(from.into())?,
            ended: false,
            chunk: Vec::with_capacity(READ_AT_ONCE),
            line: Vec::new(),
            mark: mark.into_bytes(),
            last_words: Vec::new(),
            allowed: f64::from(AT_ONCE),
            counted: Instant::now(),
            left_out: 0,
        })
    }

    /// The next output, possibly empty; waits for ever once the pipe has ended. Cancel safe.
    pub async fn next(&mut self) -> Vec<Said> {
        if self.ended {
            return std::future::pending().await;
        }
        self.chunk.clear();
        match self.from.read_buf(&mut self.chunk).await {
            Ok(read) if read > 0 => self.take_chunk(),
            _ => {
                self.ended = true;
                self.rest()
            }
        }
    }

    /// Everything in the pipe now. The runtime may learn of output later than of frames that the process wrote after
    /// it, so this asks the system.
    pub fn there(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        let mut left = THERE_AT_ONCE;
        while left > 0 && !self.ended {
            self.chunk.resize(READ_AT_ONCE, 0);
            match nix::unistd::read(self.from.as_fd(), &mut self.chunk) {
                Ok(read) if read > 0 => {
                    self.chunk.truncate(read);
                    said.extend(self.take_chunk());
                    left = left.saturating_sub(read);
                }
                // `next` sees the end of the pipe.
                _ => break,
            }
        }
        said
    }

    fn take_chunk(&mut self) -> Vec<Said> {
        let chunk = std::mem::take(&mut self.chunk);
        let said = self.take(&chunk);
        self.chunk = chunk;
        said
    }

    /// Whether the pipe has ended.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The end of the output.
    pub fn last_words(&self) -> String {
        String::from_utf8_lossy(&self.last_words).into_owned()
    }

    /// Forgets the output so far: it explains no later death.
    pub fn forget(&mut self) {
        self.last_words.clear();
    }

    /// A last line without its line end.
    pub fn rest(&mut self) -> Vec<Said> {
        if self.line.is_empty() { Vec::new() } else { self.take(b"\n") }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<Said> {
        let mut said = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.last_words.extend_from_slice(piece);
            self.line.extend_from_slice(piece);
            if !piece.ends_with(b"\n") {
                self.shorten();
                break;
            }
            self.line.pop();
            // A mark may follow an unfinished line.
            let marked = self.line.ends_with(&self.mark);
            if marked {
                self.line.truncate(self.line.len() - self.mark.len());
            }
            if !(marked && self.line.is_empty()) {
                said.extend(self.end_line().map(Said::Line));
            }
            self.line.clear();
            if marked {
                self.last_words.clear();
                said.push(Said::Next);
            }
        }
        let surplus = self.last_words.len().saturating_sub(LAST_WORDS);
        self.last_words.drain(..surplus);
        said
    }

    /// Drops the middle of a line that is too long; keeps its end, which may be part of a mark.
    fn shorten(&mut self) {
        let end = self.line.len().saturating_sub(self.mark.len());
        if end > MAX_LINE + 1 {
            self.line.drain(MAX_LINE + 1..end);
        }
    }

    fn end_line(&mut self) -> Option<String> {
        let line = &self.line;
        let cut = if line.len() > MAX_LINE { "…" } else { "" };
        let text = String::from_utf8_lossy(&line[..line.len().min(MAX_LINE)]).trim_end().to_owned() + cut;
        if !self.may_say() {
            self.left_out += 1;
            return None;
        }
        Some(match std::mem::take(&mut self.left_out) {
            0 => text,
            lines => format!("{text} (after {})", left_out(lines)),
        })
    }

    /// Reports how many lines were left out since the last report, once a line is allowed again or `at_the_end`.
    pub fn tell_left_out(&mut self, at_the_end: bool) -> Option<Said> {
        let tell = self.left_out > 0 && (self.may_say() || at_the_end);
        tell.then(|| Said::Line(left_out(std::mem::take(&mut self.left_out))))
    }

    /// Whether one more line is allowed now; counts it if so.
    fn may_say(&mut self) -> bool {
        let now = Instant::now();
        let more = (now - self.counted).as_secs_f64() * A_SECOND;
        self.allowed = (self.allowed + more).min(f64::from(AT_ONCE));
        self.counted = now;
        let may = self.allowed >= 1.0;
        if may {
            self.allowed -= 1.0;
        }
        may
    }
}

fn left_out(lines: u64) -> String {
    format!("{lines} lines that are left out: too many a second")
}

/// How long to wait for output of a process that has ended: a program that it started may hold the pipe.
pub(super) const LAST_WORDS_WITHIN: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    async fn heard(text: &[u8]) -> (Vec<String>, Output) {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let mut output = Output::new(reader, "\0mark".to_owned()).expect("a pipe");
        let text = text.to_vec();
        let writing = std::thread::spawn(move || writer.write_all(&text));
        let mut lines = Vec::new();
        while !output.has_ended() {
            lines.extend(output.next().await);
        }
        writing.join().expect("no panic").expect("it is read");
        let shown = |said| match said {
            Said::Line(line) => line,
            Said::Next => "NEXT".to_owned(),
        };
        (lines.into_iter().map(shown).collect(), output)
    }

    #[tokio::test]
    async fn lines_are_cut_and_the_last_needs_no_end() {
        let (lines, _) = heard(&[b"one\r\n", &[b'x'; 50_000][..], b"\n\nlast"].concat()).await;
        let lengths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert_eq!(lengths, [3, MAX_LINE + 1, 0, 4], "{lines:?}");
    }

    #[tokio::test]
    async fn marks_are_found_wherever_they_are_cut() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let mut output = Output::new(reader, "\0mark".to_owned()).expect("a pipe");
        let text = [b"\0mark\none\n\0mark\n\n\0mark\n", &[b'x'; 3000][..], b"\0mark\n\0mar\n"].concat();
        let mut said = Vec::new();
        for byte in text {
            writer.write_all(&[byte]).expect("room");
            said.extend(output.there());
        }
        let line = |text: &str| Said::Line(text.to_owned());
        let long = "x".repeat(MAX_LINE) + "…";
        let whole = [
            Said::Next,
            line("one"),
            Said::Next,
            line(""),
            Said::Next,
            line(&long),
            Said::Next,
            line("\0mar"),
        ];
        assert_eq!(said, whole);
        assert_eq!(output.last_words(), "\0mar\n");
    }

    #[tokio::test]
    async fn a_flood_is_bounded_and_its_end_is_kept() {
        let (lines, mut output) = heard(&b"a line\n".repeat(100_000)).await;
        assert!(lines.len() < 10_000, "{}", lines.len());
        let told = |line: &str| -> u64 {
            let count = line.split_once(" lines that are left out").map_or("0", |(before, _)| before);
            count.rsplit(['(', ' ']).next().and_then(|count| count.parse().ok()).unwrap_or(0)
        };
        let said = lines.iter().filter(|line| line.starts_with("a line")).count() as u64;
        let mut left_out: u64 = lines.iter().map(|line| told(line)).sum();
        if let Some(Said::Line(line)) = output.tell_left_out(true) {
            left_out += told(&line);
        }
        assert_eq!(said + left_out, 100_000);
        assert!(output.last_words().len() <= LAST_WORDS && output.last_words().ends_with("a line\n"));
    }
}
