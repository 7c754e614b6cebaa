//! How far each number is from 1, and how high its way there leads.
//!
//! The 3x+1 problem: halve an even number, triple an odd one and add 1, and do so until 1 is reached. This pipeline
//! stores, for each start, the number of steps and the largest value met.
//!
//! It is also the example of how a pipeline is written. There are four pieces, and no others:
//!
//! 1. [`Collatz`], the pipeline: a type that holds whatever the function needs (here nothing).
//! 2. [`Steps`], the row: a struct with one field per column.
//! 3. `impl Pipeline for Collatz`, which names the two and gives the columns their ClickHouse types.
//!    Millstream compares columns and fields before it computes anything; the first test below does so too.
//! 4. [`compute`](Pipeline::compute), the function: an id in, a row or a [`Failure`] out. Threads, messages, retries
//!    and inserts are Millstream's; the tests below call it like any other function.
//!
//! `main.rs` hands the pipeline to `millstream_cli::main`, and that is the binary:
//! `cargo run --release -p collatz -- run --ids 1..=10000000`.

use millstream::{Failure, Outcome, Pipeline};
use serde::{Deserialize, Serialize};

/// The pipeline. It has no state: a number's trajectory depends on the number alone.
#[derive(Debug, Clone, Copy)]
pub struct Collatz;

/// One row: what the trajectory from an id came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Steps until 1 is reached; halving and tripling each count as one.
    pub steps: u32,
    /// The largest value met, the start included.
    pub peak: u128,
}

impl Pipeline for Collatz {
    const NAME: &'static str = "collatz";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("steps", "UInt32"), ("peak", "UInt128")];

    type Id = u64;
    type Row = Steps;

    /// Follows the trajectory from `id` to 1.
    ///
    /// # Errors
    /// [`Failure::Reject`] for 0, and for a trajectory that no `UInt128` can hold. No 64-bit start has one: the highest
    /// of them peaks below 2^126 (start 1980976057694848447; Bařina's table, cited in the tests).
    fn compute(&self, id: &u64) -> Outcome<Steps> {
        if *id == 0 {
            return Err(Failure::reject("0 never reaches 1: half of 0 is 0"));
        }
        walk(*id).ok_or_else(|| Failure::reject("the trajectory exceeds 2^128 - 1, the most `peak` can hold"))
    }
}

/// The largest odd number whose next value, `3n + 1`, fits into 64 bits.
const LAST_NARROW: u64 = (u64::MAX - 1) / 3;

/// Walks from `start`, which must not be 0, to 1. `None` when a value exceeds 128 bits.
fn walk(start: u64) -> Option<Steps> {
    // Halvings come in runs, so only odd values are visited: one look at the trailing zeros takes a whole run.
    let mut steps = start.trailing_zeros();
    let mut odd = start >> steps;
    let mut peak = start;
    while odd != 1 {
        if odd > LAST_NARROW {
            return walk_wide(odd.into(), Steps { steps, peak: peak.into() });
        }
        let tripled = 3 * odd + 1;
        peak = peak.max(tripled);
        let halvings = tripled.trailing_zeros();
        odd = tripled >> halvings;
        steps += 1 + halvings;
    }
    Some(Steps { steps, peak: peak.into() })
}

/// [`walk`] from an odd value on, in 128 bits; `so_far` is what was counted on the way to it.
///
/// It stays wide to the end. The first start to come here is 12327829503 (see the tests), so narrowing again when the
/// value is small would be code without a use.
#[cold]
fn walk_wide(mut odd: u128, mut so_far: Steps) -> Option<Steps> {
    while odd != 1 {
        let tripled = odd.checked_mul(3)?.checked_add(1)?;
        so_far.peak = so_far.peak.max(tripled);
        let halvings = tripled.trailing_zeros();
        odd = tripled >> halvings;
        so_far.steps += 1 + halvings;
    }
    Some(so_far)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(id: u64) -> Steps {
        Collatz.compute(&id).expect("a positive id has a row")
    }

    /// The definition, word for word. 128 bits are enough for every id: see the test of their highest peak.
    fn naive(start: u128) -> Steps {
        let (mut n, mut steps, mut peak) = (start, 0, start);
        while n != 1 {
            n = if n.is_multiple_of(2) { n / 2 } else { 3 * n + 1 };
            steps += 1;
            peak = peak.max(n);
        }
        Steps { steps, peak }
    }

    /// Ids up to `last` whose value exceeds that of every smaller id, and these values.
    fn records<V: Ord + Copy>(last: u64, value: impl Fn(u64) -> V) -> (Vec<u64>, Vec<V>) {
        let (mut starts, mut values) = (Vec::new(), Vec::new());
        for id in 1..=last {
            let value = value(id);
            if values.last().is_none_or(|highest| value > *highest) {
                starts.push(id);
                values.push(value);
            }
        }
        (starts, values)
    }

    #[test]
    fn the_row_fits_the_columns() {
        assert!(millstream::check::<Collatz>().is_ok());
    }

    #[test]
    fn zero_is_rejected_because_it_never_reaches_1() {
        assert_eq!(Collatz.compute(&0), Err(Failure::Reject("0 never reaches 1: half of 0 is 0".to_owned())));
    }

    #[test]
    fn the_peak_includes_the_start() {
        assert_eq!(row(1), Steps { steps: 0, peak: 1 });
        assert_eq!(row(2), Steps { steps: 1, peak: 2 });
        assert_eq!(row(3), Steps { steps: 7, peak: 16 });
        for power in 0..u64::BITS {
            assert_eq!(row(1 << power), Steps { steps: power, peak: 1 << power });
        }
    }

    /// Every record below a million, and no other: <https://oeis.org/A006877>, steps <https://oeis.org/A006878>.
    #[test]
    fn records_of_steps_are_the_published_ones() {
        let starts = [
            1, 2, 3, 6, 7, 9, 18, 25, 27, 54, 73, 97, 129, 171, 231, 313, 327, 649, 703, 871, 1161, 2223,
            2463, 2919, 3711, 6171, 10971, 13255, 17647, 23529, 26623, 34239, 35655, 52527, 77031, 106239,
            142587, 156159, 216367, 230631, 410011, 511935, 626331, 837799,
        ];
        let values = [
            0, 1, 7, 8, 16, 19, 20, 23, 111, 112, 115, 118, 121, 124, 127, 130, 143, 144, 170, 178, 181, 182,
            208, 216, 237, 261, 267, 275, 278, 281, 307, 310, 323, 339, 350, 353, 374, 382, 385, 442, 448,
            469, 508, 524,
        ];
        assert_eq!(records(1_000_000, |id| row(id).steps), (starts.to_vec(), values.to_vec()));
    }

    /// Every record below a million, and no other: <https://oeis.org/A006884>, peaks <https://oeis.org/A006885>.
    #[test]
    fn records_of_the_peak_are_the_published_ones() {
        let starts = [
            1, 2, 3, 7, 15, 27, 255, 447, 639, 703, 1819, 4255, 4591, 9663, 20895, 26623, 31911, 60975,
            77671, 113383, 138367, 159487, 270271, 665215, 704511,
        ];
        let values = [
            1,
            2,
            16,
            52,
            160,
            9232,
            13120,
            39364,
            41524,
            250504,
            1276936,
            6810136,
            8153620,
            27114424,
            50143264,
            106358020,
            121012864,
            593279152,
            1570824736,
            2482111348,
            2798323360,
            17202377752,
            24648077896,
            52483285312,
            56991483520,
        ];
        assert_eq!(records(1_000_000, |id| row(id).peak), (starts.to_vec(), values.to_vec()));
    }

    /// The start below each power of ten with the most steps: <https://oeis.org/A284668>; steps from
    /// <https://en.wikipedia.org/wiki/Collatz_conjecture#Examples>.
    #[test]
    fn far_records_of_steps_are_the_published_ones() {
        let published = [
            (9, 19),
            (97, 118),
            (871, 178),
            (6171, 261),
            (77031, 350),
            (837799, 524),
            (8400511, 685),
            (63728127, 949),
            (670617279, 986),
            (9780657630, 1132),
            (75128138247, 1228),
            (989345275647, 1348),
            (7887663552367, 1563),
            (80867137596217, 1662),
            (942488749153153, 1862),
            (7579309213675935, 1958),
            (93571393692802302, 2091),
            (931386509544713451, 2283),
        ];
        for (id, steps) in published {
            assert_eq!(row(id).steps, steps, "from {id}");
            assert_eq!(row(id), naive(id.into()), "from {id}");
        }
    }

    /// Steps from <https://oeis.org/A132348>, peaks from <http://www.ericr.nl/wondrous/pathrecs.html>. The peak of
    /// 8528817511 is the last record within 64 bits, that of 12327829503 the first beyond.
    #[test]
    fn far_records_of_the_peak_are_the_published_ones() {
        let published = [
            (319804831, 592, 1414236446719942480),
            (1410123943, 770, 7125885122794452160),
            (8528817511, 726, 18144594937356598024),
            (12327829503, 543, 20722398914405051728),
            (23035537407, 836, 68838156641548227040),
            (45871962271, 555, 82341648902022834004),
            (51739336447, 770, 114639617141613998440),
            (59152641055, 871, 151499365062390201544),
            (59436135663, 796, 205736389371841852168),
            (70141259775, 1109, 420967113788389829704),
        ];
        for (id, steps, peak) in published {
            assert_eq!(row(id), Steps { steps, peak }, "from {id}");
            assert_eq!(row(id), naive(id.into()), "from {id}");
        }
    }

    /// Path records at both edges, from <https://pcbarina.fit.vutbr.cz/path-records.htm>, whose values are half of
    /// ours because its odd step is `(3n + 1) / 2`. The record after 1980976057694848447 starts beyond 64 bits, so that
    /// is the highest peak an id can have; the one after next exceeds 128 bits.
    #[test]
    fn a_value_beyond_128_bits_ends_the_walk() {
        let wide = |odd| walk_wide(odd, Steps { steps: 0, peak: odd }).map(|row| row.peak);
        assert_eq!(row(1980976057694848447).peak, 2 * 32012333661096566765082938647132369010);
        assert_eq!(wide(35136221158664800255), Some(2 * 92102545196486820634779928066830214436));
        assert_eq!(wide(48503373501652785087), None);
        assert_eq!(wide(u128::MAX), None);
    }

    /// Values of Python's unbounded integers.
    #[test]
    fn the_largest_ids_are_exact() {
        assert_eq!(row(u64::MAX), Steps { steps: 863, peak: 6867367640585024969315698178560 });
        assert_eq!(row(u64::MAX - 1), Steps { steps: 863, peak: 2289122546861674989771899392852 });
    }

    #[test]
    fn both_sides_of_the_narrow_limit_follow_the_definition() {
        for id in LAST_NARROW - 300..=LAST_NARROW + 300 {
            assert_eq!(row(id), naive(id.into()), "from {id}");
        }
    }

    proptest! {
        #[test]
        fn any_start_follows_the_definition(id in 1..=u64::MAX, shift in 0..u64::BITS) {
            let id = (id >> shift).max(1);
            prop_assert_eq!(row(id), naive(id.into()));
        }
    }
}
