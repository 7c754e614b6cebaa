//! A file that is read twice: the second reading sees the same bytes, or fails.
//!
//! The first reading stores a hash of every block. The second compares each block before using any of it, and ends
//! where the first did: appended data is ignored, and overwritten data is never used as if it had been checked. The
//! file is opened once, so that another file under its name does not matter.

use crate::model::input_fault::ReadFault;

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes of a block: with eight bytes of hash each, a gigabyte of input needs 32 KiB.
const BLOCK: usize = 256 << 10;

/// What the first reading saw of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    length: u64,
    hashes: Vec<u64>,
    /// Whether the last line has a line end.
    ends_line: bool,
}

enum Task {
    /// The first reading.
    See(Seen),
    /// The second reading, which compares.
    Check(Arc<Seen>),
}

/// Reads a file from its beginning, independently of the descriptor's position.
pub(super) struct Blocks {
    file: Arc<File>,
    task: Task,
    /// Offset of the block.
    begin: u64,
    block: Vec<u8>,
    used: usize,
    ended: bool,
}

impl Blocks {
    /// Begins the first reading.
    pub fn see(file: Arc<File>) -> Self {
        Self::new(file, Task::See(Seen::default()))
    }

    /// Begins the second reading.
    pub fn check(file: Arc<File>, seen: Arc<Seen>) -> Self {
        Self::new(file, Task::Check(seen))
    }

    fn new(file: Arc<File>, task: Task) -> Self {
        Self { file, task, begin: 0, block: Vec::new(), used: 0, ended: false }
    }

    /// What the first reading saw.
    pub fn into_seen(self) -> Seen {
        match self.task {
            Task::See(seen) => seen,
            Task::Check(seen) => (*seen).clone(),
        }
    }

    fn next_block(&mut self) -> io::Result<()> {
        self.begin += self.block.len() as u64;
        self.used = 0;
        let left = match &self.task {
            Task::See(_) => BLOCK,
            Task::Check(seen) => (seen.length - self.begin).min(BLOCK as u64) as usize,
        };
        self.block.resize(left, 0);
        let read = read_full(&self.file, &mut self.block, self.begin)?;
        self.block.truncate(read);
        self.ended = read < BLOCK;
        match &mut self.task {
            Task::See(seen) if read > 0 => {
                seen.length += read as u64;
                seen.hashes.push(hash(&self.block));
                seen.ends_line = self.block.ends_with(b"\n");
            }
            Task::See(_) => {}
            Task::Check(seen) => {
                let known = seen.hashes.get((self.begin / BLOCK as u64) as usize);
                let same = read == left && (read == 0 || known == Some(&hash(&self.block)));
                let ended = self.begin + read as u64 == seen.length;
                self.ended = ended;
                // In a growing file, the last line may have been incomplete.
                if !same || (ended && !seen.ends_line && goes_on(&self.file, seen.length)?) {
                    // None of the block is used.
                    self.block.clear();
                    return Err(ReadFault::Changed.into());
                }
            }
        }
        Ok(())
    }
}

impl BufRead for Blocks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.block.len() && !self.ended {
            self.next_block()?;
        }
        Ok(&self.block[self.used..])
    }

    fn consume(&mut self, bytes: usize) {
        self.used += bytes;
    }
}

impl Read for Blocks {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(into)?;
        self.consume(read);
        Ok(read)
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < into.len() {
        match file.read_at(&mut into[read..], at + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// Whether a line that had no end continues now.
fn goes_on(file: &File, at: u64) -> io::Result<bool> {
    let mut next = [0; 1];
    Ok(at > 0 && read_full(file, &mut next, at)? > 0 && !matches!(next, [b'\n' | b'\r']))
}

fn hash(block: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(block);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// The result of a second reading after `change` was applied to the file.
    fn again(text: &[u8], change: impl FnOnce(&mut File)) -> io::Result<Vec<u8>> {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(text).expect("written");
        let shared = Arc::new(file.try_clone().expect("a second handle"));
        let mut first = Blocks::see(shared.clone());
        let mut all = Vec::new();
        first.read_to_end(&mut all).expect("read");
        assert_eq!(all, text);
        change(&mut file);
        let mut second = Blocks::check(shared, Arc::new(first.into_seen()));
        let mut all = Vec::new();
        second.read_to_end(&mut all)?;
        Ok(all)
    }

    #[test]
    fn a_file_that_did_not_change_is_read_twice() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK] {
            let text = vec![b'7'; length];
            assert_eq!(again(&text, |_| {}).expect("the same"), text, "{length}");
        }
    }

    #[test]
    fn what_is_added_behind_is_not_seen() {
        for length in [2, BLOCK, 2 * BLOCK] {
            let mut text = vec![b'7'; length];
            text[length - 1] = b'\n';
            let read = again(&text, |file| file.write_all(b"8\n").expect("written"));
            assert_eq!(read.expect("the same"), text, "{length}");
        }
        // Only the end of the last line was appended.
        assert_eq!(again(b"7", |file| file.write_all(b"\n8\n").expect("written")).expect("the same"), b"7");
    }

    #[test]
    fn a_change_is_noticed_before_it_is_used() {
        let text = vec![b'7'; BLOCK + 100];
        let is_changed = |read: io::Result<Vec<u8>>| {
            let error = read.expect_err("changed");
            matches!(ReadFault::of(&error), Some(ReadFault::Changed))
        };
        assert!(is_changed(again(&text, |file| file.write_all_at(b"8", 5).expect("written"))), "edited");
        assert!(is_changed(again(&text, |file| file.set_len(BLOCK as u64 + 99).expect("cut"))), "shorter");
        assert!(is_changed(again(&text, |file| file.set_len(0).expect("cut"))), "emptied");
        assert!(is_changed(again(b"12", |file| file.write_all(b"3\n").expect("written"))), "half of a line");
    }
}
