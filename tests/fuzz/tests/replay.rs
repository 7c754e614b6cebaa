//! The corpora through the targets, with nothing but `cargo test`: what fuzzing found once is tried at every change.

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};

use fuzz::TARGETS;

/// What all corpora together may weigh.
const MOST_BYTES: usize = 100_000;

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let listed = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<PathBuf> = listed.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).expect("readable"))).collect()
}

/// One test, because the targets count what is on the heap of the whole process.
#[test]
fn every_input_of_the_corpora_holds() {
    let mut bytes = 0;
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(!inputs.is_empty(), "the corpus of `{name}` is empty");
        target(&[]);
        for (path, input) in inputs {
            bytes += input.len();
            let held = panic::catch_unwind(|| target(&input));
            assert!(held.is_ok(), "{} does not hold: its panic is above", path.display());
        }
    }
    assert!(bytes <= MOST_BYTES, "the corpora weigh {bytes} bytes: minimise them, see README.md");
}
