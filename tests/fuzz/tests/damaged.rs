//! Inputs made up from those of the corpora by damage, without libFuzzer: bytes that change, go, come and trade places.
//!
//! `FUZZ_INPUTS=N` says how many for each target, `FUZZ_TARGET=NAME` plays one of them, `FUZZ_SEED=N` draws others.

use std::fs;
use std::panic;
use std::path::Path;

use fuzz::TARGETS;

/// For each target, where the environment says nothing.
const INPUTS: u64 = 300;
/// The longest input that is made.
const LONGEST: usize = 2048;

fn number(variable: &str, otherwise: u64) -> u64 {
    let set = std::env::var(variable);
    set.map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// Xorshift: the same numbers for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        const TELLING: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xff, b',', b'('];
        match self.below(2) {
            0 => TELLING[self.below(TELLING.len())],
            _ => self.below(256) as u8,
        }
    }

    fn damage(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(input.len());
        match self.below(7) {
            _ if input.is_empty() => input.push(self.byte()),
            0 => input[at] ^= 1 << self.below(8),
            1 => input[at] = self.byte(),
            2 => input.insert(at, self.byte()),
            3 => drop(input.drain(at..(at + 1 + self.below(8)).min(input.len()))),
            4 => {
                let to = self.below(input.len());
                input.swap(at, to);
            }
            5 => {
                let piece = input[at..(at + 1 + self.below(16)).min(input.len())].to_vec();
                let to = self.below(input.len());
                input.splice(to..to, piece);
            }
            _ => {
                let from = self.below(other.len());
                let piece = other[from..(from + self.below(32)).min(other.len())].to_vec();
                input.splice(at..(at + piece.len()).min(input.len()), piece);
            }
        }
        input.truncate(LONGEST);
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let listed = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = listed.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// One test, because the targets count what is on the heap of the whole process.
#[test]
fn damaged_inputs_hold() {
    let (inputs, seed) = (number("FUZZ_INPUTS", INPUTS), number("FUZZ_SEED", 1));
    let only = std::env::var("FUZZ_TARGET").ok();
    for (name, target) in
        TARGETS.into_iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name))
    {
        let (corpus, mut dice) = (corpus(name), Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        for _ in 0..inputs {
            let mut input = corpus[dice.below(corpus.len())].clone();
            for _ in 0..=dice.below(3) {
                let other = &corpus[dice.below(corpus.len())];
                dice.damage(&mut input, other);
            }
            let held = panic::catch_unwind(|| target(&input));
            assert!(held.is_ok(), "`{name}` does not hold for {}: its panic is above", input.escape_ascii());
        }
    }
}
