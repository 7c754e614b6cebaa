//! Random moments that can be drawn again (SplitMix64).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Draws from a seed.
#[derive(Debug, Clone)]
pub struct Dice {
    /// What it was made of.
    pub seed: u64,
    state: u64,
}

impl Dice {
    /// From this seed.
    pub fn seeded(seed: u64) -> Self {
        Self { seed, state: seed }
    }

    /// From the seed in an environment variable, or from the clock.
    pub fn drawn(variable: &str) -> Self {
        let given = std::env::var(variable).ok().and_then(|seed| seed.parse().ok());
        Self::seeded(given.unwrap_or_else(clock))
    }

    /// From `least` to below `most`.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        least + (mixed ^ (mixed >> 31)) % (most - least)
    }

    /// A time in milliseconds, from `least` to below `most`.
    pub fn pause(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(self.between(least_ms, most_ms))
    }
}

/// A seed of no meaning.
pub fn clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos().into())
}
