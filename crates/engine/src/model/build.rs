//! Which program computes: rows carry this name, so that an operator can separate the rows of two builds.

use std::fs::File;
use std::hash::Hasher;
use std::io::{self, Read};
use std::sync::OnceLock;

use twox_hash::XxHash64;

/// Bytes read in one call while the program is hashed.
const PIECE: usize = 1 << 20;

/// This program's build: the pipeline's version, if it has one, and a hash of the program's file: `1.4.0+9f86d081884c7d65`.
///
/// The hash covers the function and all that is linked into it. It does not cover what a function reads while it runs:
/// files, environment variables, shared libraries.
pub fn of_this_program(version: &str) -> String {
    static HASH: OnceLock<String> = OnceLock::new();
    let hash = HASH.get_or_init(|| match hash_of("/proc/self/exe") {
        Ok(hash) => format!("{hash:016x}"),
        Err(error) => {
            tracing::warn!(%error, "the program's own file cannot be read: rows will not name the build that computed them");
            "unknown".to_owned()
        }
    });
    if version.is_empty() { hash.clone() } else { format!("{version}+{hash}") }
}

fn hash_of(path: &str) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; PIECE];
    let mut hasher = XxHash64::with_seed(0);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finish()),
            read => hasher.write(&piece[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_a_version_and_a_hash() {
        let build = of_this_program("1.2.3");
        let (version, hash) = build.split_once('+').expect("both");
        assert_eq!((version, hash.len()), ("1.2.3", 16), "{build}");
        assert_eq!(of_this_program(""), hash);
    }

    #[test]
    fn other_programs_have_other_hashes() {
        let dir = tempfile::tempdir().expect("a directory");
        let [a, b] = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).expect("written");
            hash_of(path.to_str().expect("text")).expect("read")
        });
        assert_ne!(a, b);
        assert!(hash_of("/nowhere").is_err());
    }
}
