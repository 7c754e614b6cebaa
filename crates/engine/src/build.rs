//! Which build of a pipeline this process is: it stands in rows, in heartbeats and in records of passes, so that two
//! builds that worked on one pass can be told apart.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::OnceLock;

use crc32fast::Hasher;

/// Bytes of the program that are read at once.
const PIECE: usize = 1 << 20;

/// The version and a hash of the program's file: `0.1.0+5f0c2a91`. A program that cannot be read has `unknown` for a hash.
pub fn build() -> &'static str {
    static BUILD: OnceLock<String> = OnceLock::new();
    BUILD.get_or_init(|| {
        let hash = hash_of_program().map_or_else(|_| "unknown".to_owned(), |hash| format!("{hash:08x}"));
        format!("{}+{hash}", env!("CARGO_PKG_VERSION"))
    })
}

/// The file that this process runs, even where it was replaced or removed since.
fn hash_of_program() -> io::Result<u32> {
    let mut program = BufReader::with_capacity(PIECE, File::open("/proc/self/exe")?);
    let (mut hasher, mut piece) = (Hasher::new(), vec![0; PIECE]);
    loop {
        match program.read(&mut piece)? {
            0 => return Ok(hasher.finalize()),
            read => hasher.update(&piece[..read]),
        }
    }
}
