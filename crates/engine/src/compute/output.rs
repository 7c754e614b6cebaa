//! What the user's code prints in a process that computes: lines for the log, no more of them than a log can bear.

use std::io;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// A longer line is cut.
const MAX_LINE: usize = 1000;
/// Lines that a process may print at once, and how many more each second.
const AT_ONCE: u32 = 100;
const A_SECOND: f64 = 20.0;
/// What is kept of the end, for the reason why a process died.
const LAST_WORDS: usize = 4 << 10;
const READ_AT_ONCE: usize = 16 << 10;

/// The stdout and stderr of a process, one stream as they were one terminal.
#[derive(Debug)]
pub(super) struct Output {
    from: pipe::Receiver,
    ended: bool,
    /// What is read into, on the heap: futures that are moved hold this.
    chunk: Vec<u8>,
    line: Vec<u8>,
    last_words: Vec<u8>,
    allowed: f64,
    counted: Instant,
    left_out: u64,
}

impl Output {
    pub fn new(from: io::PipeReader) -> io::Result<Self> {
        Ok(Self {
            from: pipe::Receiver::from_owned_fd(from.into())?,
            ended: false,
            chunk: Vec::with_capacity(READ_AT_ONCE),
            line: Vec::new(),
            last_words: Vec::new(),
            allowed: f64::from(AT_ONCE),
            counted: Instant::now(),
            left_out: 0,
        })
    }

    /// The lines that come next, at least none; waits for ever once there can be no more. Cancel safe.
    pub async fn next(&mut self) -> Vec<String> {
        if self.ended {
            return std::future::pending().await;
        }
        self.chunk.clear();
        match self.from.read_buf(&mut self.chunk).await {
            Ok(read) if read > 0 => {
                let chunk = std::mem::take(&mut self.chunk);
                let lines = self.take(&chunk);
                self.chunk = chunk;
                lines
            }
            _ => {
                self.ended = true;
                self.rest()
            }
        }
    }

    /// Whether there can be no more of it.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The end of what was printed.
    pub fn last_words(&self) -> String {
        String::from_utf8_lossy(&self.last_words).into_owned()
    }

    /// What was printed so far is no reason for what comes.
    pub fn forget(&mut self) {
        self.last_words.clear();
    }

    /// A line that was begun and not ended.
    pub fn rest(&mut self) -> Vec<String> {
        match self.line.is_empty() {
            true => Vec::new(),
            false => self.take(b"\n"),
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        self.last_words.extend_from_slice(bytes);
        let surplus = self.last_words.len().saturating_sub(LAST_WORDS);
        self.last_words.drain(..surplus);
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_LINE.saturating_sub(self.line.len());
            self.line.extend_from_slice(&piece[..piece.len().min(room + 1)]);
            if piece.ends_with(b"\n") {
                lines.extend(self.end_line());
            }
        }
        lines
    }

    fn end_line(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        let cut = if line.len() > MAX_LINE { "…" } else { "" };
        let text = String::from_utf8_lossy(&line[..line.len().min(MAX_LINE)]).trim_end().to_owned() + cut;
        let now = Instant::now();
        let more = (now - self.counted).as_secs_f64() * A_SECOND;
        (self.allowed, self.counted) = ((self.allowed + more).min(f64::from(AT_ONCE)), now);
        if self.allowed < 1.0 {
            self.left_out += 1;
            return None;
        }
        self.allowed -= 1.0;
        Some(match std::mem::take(&mut self.left_out) {
            0 => text,
            lines => format!("{text} (after {lines} lines that are left out: too many a second)"),
        })
    }
}

/// How long printing of a process that is over is waited for: a program that it started may hold the pipe.
pub(super) const LAST_WORDS_WITHIN: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    async fn heard(text: &[u8]) -> (Vec<String>, Output) {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let mut output = Output::new(reader).expect("a pipe");
        let text = text.to_vec();
        let writing = std::thread::spawn(move || writer.write_all(&text));
        let mut lines = Vec::new();
        while !output.has_ended() {
            lines.extend(output.next().await);
        }
        writing.join().expect("no panic").expect("it is read");
        (lines, output)
    }

    #[tokio::test]
    async fn lines_are_cut_and_the_last_needs_no_end() {
        let (lines, _) = heard(&[b"one\r\n", &[b'x'; 5000][..], b"\n\nlast"].concat()).await;
        let lengths: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert_eq!(lengths, [3, MAX_LINE + 1, 0, 4], "{lines:?}");
    }

    #[tokio::test]
    async fn a_flood_is_bounded_and_its_end_is_kept() {
        let (lines, output) = heard(&b"a line\n".repeat(100_000)).await;
        assert!(lines.len() < 10_000, "{}", lines.len());
        assert!(output.last_words().len() <= LAST_WORDS && output.last_words().ends_with("a line\n"));
    }
}
