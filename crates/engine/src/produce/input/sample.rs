//! A sample of an input, on which the function is timed.

use millstream::Id;

/// Ids of a file that its sample keeps: a second's work of most functions, and 32 MiB of the longest ids.
pub(super) const SAMPLED: usize = 8192;

/// Ids from all over an input, as many as the caller takes.
#[derive(Debug, Clone)]
pub struct Sample<I> {
    drawn: Drawn<I>,
    /// How many ids were taken.
    taken: u64,
}

#[derive(Debug, Clone)]
enum Drawn<I> {
    Range { first: u64, ids: u64 },
    List(Vec<I>),
}

impl<I: Id> Sample<I> {
    pub(super) fn of_range(first: u64, ids: u64) -> Self {
        Self { drawn: Drawn::Range { first, ids }, taken: 0 }
    }

    /// A sample of ids that are in memory.
    pub fn of(ids: impl IntoIterator<Item = I>) -> Self {
        let mut sample = Self::of_list();
        (0..).zip(ids).for_each(|(place, id)| sample.offer(id, place));
        sample
    }

    pub(super) fn of_list() -> Self {
        Self { drawn: Drawn::List(Vec::new()), taken: 0 }
    }

    /// Offers the id at this place of the list. In the end each id was kept with equal probability (Vitter's algorithm
    /// R, <https://doi.org/10.1145/3147.3165>), in no order.
    pub(super) fn offer(&mut self, id: I, place: u64) {
        let Drawn::List(kept) = &mut self.drawn else { return };
        let slot = ((u128::from(scattered(place)) * u128::from(place + 1)) >> u64::BITS) as usize;
        if kept.len() < SAMPLED {
            kept.push(id);
            let last = kept.len() - 1;
            kept.swap(slot, last);
        } else if slot < SAMPLED {
            kept[slot] = id;
        }
    }

    /// How many ids the sample can give before it repeats.
    pub fn len(&self) -> u64 {
        match &self.drawn {
            Drawn::Range { ids, .. } => *ids,
            Drawn::List(kept) => kept.len() as u64,
        }
    }

    /// Whether the sample is empty, which no surveyed input's is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next ids, at least one and at most `most`, sorted and without repeats. All ids taken so far lie evenly over
    /// the whole input; a list begins again at its end.
    pub fn take(&mut self, most: usize) -> Vec<I> {
        /// The golden ratio's fraction of 2^64: its multiples lie evenly, wherever the sequence stops.
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let from = self.taken;
        let mut ids: Vec<I> = match &self.drawn {
            Drawn::Range { first, ids } => {
                let spread = |number: u64| {
                    let share = u128::from(number.wrapping_mul(GOLDEN)) * u128::from(*ids);
                    I::from_number(first + (share >> u64::BITS) as u64)
                };
                (from..from + (most as u64).min(*ids)).map(spread).collect()
            }
            Drawn::List(kept) => {
                let begin = from as usize % kept.len().max(1);
                kept.iter().cycle().skip(begin).take(most.min(kept.len())).cloned().collect()
            }
        };
        self.taken += ids.len() as u64;
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// A number without visible relation to its neighbours' (the last steps of splitmix64).
fn scattered(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_add(1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
