//! The pipeline of known weight that the benchmarks measure; the figures are in `benches/figures.rs`.

use millstream::{Outcome, Pipeline};
use serde::{Deserialize, Serialize};

/// Rounds of arithmetic for each id, given in the environment so that the bound and the run do the same.
pub const ROUNDS: &str = "HEAVY_ROUNDS";

/// A function of a fixed amount of arithmetic: real work, which a busy machine slows as it slows any other.
pub struct Heavy {
    rounds: u64,
}

/// A row of [`Heavy`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Mixed {
    /// Where the arithmetic ended.
    pub mixed: u64,
}

impl Heavy {
    /// As many rounds as given.
    pub fn new(rounds: u64) -> Self {
        Self { rounds }
    }

    /// As many rounds as the environment says.
    pub fn from_env() -> Self {
        let rounds = std::env::var(ROUNDS).ok().and_then(|text| text.parse().ok()).unwrap_or(1000);
        Self::new(rounds)
    }
}

impl Pipeline for Heavy {
    const NAME: &'static str = "heavy";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("mixed", "UInt64")];
    type Id = u64;
    type Row = Mixed;

    fn compute(&self, id: &u64) -> Outcome<Mixed> {
        Ok(Mixed { mixed: mix(*id, self.rounds) })
    }
}

/// A chain of multiplications that no compiler can shorten.
pub fn mix(id: u64, rounds: u64) -> u64 {
    (0..rounds)
        .fold(id | 1, |state, round| (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ round)
}
