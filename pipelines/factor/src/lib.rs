//! The prime factors of each 64-bit number.
//!
//! A pipeline whose cost per id varies a thousandfold: a number with small factors takes less than a microsecond, a
//! product of two 32-bit primes about 400. So one id can take as long as all others of its batch, and a run shows its
//! tail.
//!
//! The pieces are those of every pipeline (`collatz` explains them); the function is more than a few lines, so it has
//! modules:
//!
//! | module | what it owns |
//! |---|---|
//! | `small` | taking out the primes below 256 |
//! | `prime` | telling primes from composites |
//! | `rho` | splitting a composite without small factors |
//! | `montgomery` | multiplication modulo an odd number, for both |
//!
//! `cargo run --release -p factor -- run --ids 1..=1000000`

mod montgomery;
mod prime;
mod rho;
mod small;

use millstream::{Failure, Outcome, Pipeline};
use serde::{Deserialize, Serialize};

/// The pipeline. It has no state: the tables it reads are built by the compiler.
#[derive(Debug, Clone, Copy)]
pub struct Factor;

/// One row: an id as a product of primes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Factors {
    /// Prime factors, ascending, each as often as it divides the id. Empty for 1.
    pub factors: Vec<u64>,
}

impl Pipeline for Factor {
    const NAME: &'static str = "factor";
    const COLUMNS: &'static [(&'static str, &'static str)] = &[("factors", "Array(UInt64)")];

    type Id = u64;
    type Row = Factors;

    /// Factors `id`. Nothing is random: an id takes the same path every time.
    ///
    /// # Errors
    /// [`Failure::Reject`] for 0.
    fn compute(&self, id: &u64) -> Outcome<Factors> {
        if *id == 0 {
            return Err(Failure::reject("0 is no product of primes: every number divides it"));
        }
        let mut factors = Vec::new();
        let rest = small::take_out(*id, &mut factors);
        split(rest, &mut factors);
        factors.sort_unstable();
        Ok(Factors { factors })
    }
}

/// Appends the prime factors of `n`, in any order; `n` has none below [`small::BOUND`].
fn split(n: u64, factors: &mut Vec<u64>) {
    if n == 1 {
        return;
    }
    if n < small::BOUND * small::BOUND || prime::is_prime(n) {
        factors.push(n);
        return;
    }
    let divisor = rho::divisor(n);
    split(divisor, factors);
    split(n / divisor, factors);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn factors(id: u64) -> Vec<u64> {
        Factor.compute(&id).expect("a positive id has a row").factors
    }

    /// Whether `n` is prime, by the definition.
    fn is_prime_slowly(n: u64) -> bool {
        n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
    }

    /// Whether `n` is prime, sharing nothing with the code above: plain division, and as bases the first 12 primes,
    /// which suffice below 3·10^23 (<https://oeis.org/A014233>).
    fn is_prime_by_other_bases(n: u64) -> bool {
        const BASES: [u64; 12] = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37];
        if let Some(base) = BASES.iter().find(|base| n.is_multiple_of(**base)) {
            return n == *base;
        }
        let times = |a: u64, b: u64| (u128::from(a) * u128::from(b) % u128::from(n)) as u64;
        let power = |base, exponent: u64| {
            (0..u64::BITS).rev().fold(1, |power, bit| {
                let square = times(power, power);
                if exponent >> bit & 1 == 1 { times(square, base) } else { square }
            })
        };
        let squarings = (n - 1).trailing_zeros();
        n > 1
            && BASES.iter().all(|base| {
                let first = power(*base, (n - 1) >> squarings);
                let mut powers =
                    std::iter::successors(Some(first), |x| Some(times(*x, *x))).take(squarings as usize);
                first == 1 || powers.any(|x| x == n - 1)
            })
    }

    /// That `id`'s factors are ascending primes whose product it is; there is one such list.
    fn assert_factored(id: u64) {
        let factors = factors(id);
        assert!(factors.is_sorted(), "{id}: {factors:?}");
        assert_eq!(factors.iter().product::<u64>(), id, "{factors:?}");
        assert!(factors.iter().all(|factor| is_prime_by_other_bases(*factor)), "{id}: {factors:?}");
    }

    /// The smallest prime from `n` on, round the end of 32 bits.
    fn prime_from(n: u32) -> u64 {
        (n..=u32::MAX).chain(2..).map(u64::from).find(|n| is_prime_by_other_bases(*n)).expect("a prime")
    }

    #[test]
    fn the_row_fits_the_columns() {
        assert!(millstream::check::<Factor>().is_ok());
    }

    #[test]
    fn zero_is_rejected_and_1_has_no_factors() {
        let reason = "0 is no product of primes: every number divides it";
        assert_eq!(Factor.compute(&0), Err(Failure::reject(reason)));
        assert_eq!(factors(1), []);
    }

    #[test]
    fn every_number_up_to_200_000_agrees_with_a_sieve() {
        const LAST: usize = 200_000;
        let mut smallest: Vec<usize> = (0..=LAST).collect();
        for prime in 2..=LAST.isqrt() {
            for multiple in (prime * prime..=LAST).step_by(prime) {
                if smallest[multiple] == multiple {
                    smallest[multiple] = prime;
                }
            }
        }
        for id in 1..=LAST {
            let mut expected = Vec::new();
            let mut rest = id;
            while rest > 1 {
                expected.push(smallest[rest] as u64);
                rest /= smallest[rest];
            }
            assert_eq!(factors(id as u64), expected, "{id}");
            assert_eq!(prime::is_prime(id as u64), id > 1 && smallest[id] == id, "{id}");
        }
    }

    /// Mersenne numbers: <https://planetmath.org/TableOfFactorsOfSmallMersenneNumbers>; 2^61 - 1 is prime. Repunits:
    /// <https://oeis.org/A102380>. 2^32 + 1 is Euler's, 2^64 - 1 the product of the first six Fermat numbers.
    #[test]
    fn published_factorisations_come_out() {
        let repunit = |digits| (10u64.pow(digits) - 1) / 9;
        let published: [(u64, &[u64]); 16] = [
            ((1 << 11) - 1, &[23, 89]),
            ((1 << 23) - 1, &[47, 178481]),
            ((1 << 29) - 1, &[233, 1103, 2089]),
            ((1 << 37) - 1, &[223, 616318177]),
            ((1 << 41) - 1, &[13367, 164511353]),
            ((1 << 43) - 1, &[431, 9719, 2099863]),
            ((1 << 47) - 1, &[2351, 4513, 13264529]),
            ((1 << 53) - 1, &[6361, 69431, 20394401]),
            ((1 << 59) - 1, &[179951, 3203431780337]),
            ((1 << 61) - 1, &[(1 << 61) - 1]),
            ((1 << 32) + 1, &[641, 6700417]),
            (u64::MAX, &[3, 5, 17, 257, 641, 65537, 6700417]),
            (repunit(7), &[239, 4649]),
            (repunit(13), &[53, 79, 265371653]),
            (repunit(17), &[2071723, 5363222357]),
            (repunit(19), &[1111111111111111111]),
        ];
        for (id, expected) in published {
            assert_eq!(factors(id), expected);
            assert_factored(id);
        }
    }

    /// Each is a strong probable prime to the first one, two, three ... primes, and the smallest such composite:
    /// <https://oeis.org/A014233>.
    #[test]
    fn strong_pseudoprimes_are_composite() {
        let published: [(u64, &[u64]); 8] = [
            (2047, &[23, 89]),
            (1373653, &[829, 1657]),
            (25326001, &[2251, 11251]),
            (3215031751, &[151, 751, 28351]),
            (2152302898747, &[6763, 10627, 29947]),
            (3474749660383, &[1303, 16927, 157543]),
            (341550071728321, &[10670053, 32010157]),
            (3825123056546413051, &[149491, 747451, 34233211]),
        ];
        for (id, expected) in published {
            assert!(!prime::is_prime(id), "{id}");
            assert_eq!(factors(id), expected);
        }
    }

    /// `(6k + 1)(12k + 1)(18k + 1)` is a Carmichael number when all three are prime (Chernick, 1939;
    /// <https://oeis.org/A033502>): 1729 is the first, and the last windows end just within 64 bits.
    #[test]
    fn carmichael_numbers_are_composite() {
        let mut seen = 0;
        for k in (1..3_000).chain(100_000..101_000).chain(241_000..242_000) {
            let primes = [6 * k + 1, 12 * k + 1, 18 * k + 1];
            if primes.iter().all(|prime| is_prime_slowly(*prime)) {
                let carmichael = primes.iter().product();
                assert!(!prime::is_prime(carmichael), "{carmichael}");
                assert_eq!(factors(carmichael), primes);
                seen += 1;
            }
        }
        assert!(seen > 50, "{seen}");
    }

    #[test]
    fn powers_of_primes_come_apart() {
        for prime in [2u64, 3, 5, 7, 251, 257, 263, 65521, 65537, 2642239, 4294967279, 4294967291] {
            for exponent in 1..=u64::MAX.ilog(prime) {
                assert_eq!(factors(prime.pow(exponent)), vec![prime; exponent as usize]);
            }
        }
    }

    #[test]
    fn the_hardest_numbers_come_apart() {
        // The two largest 32-bit primes, and the largest 64-bit prime: <https://oeis.org/A014234>.
        assert_eq!(factors(4294967279 * 4294967291), [4294967279, 4294967291]);
        assert_eq!(factors(18446744073709551557), [18446744073709551557]);
        assert!((18446744073709551558..=u64::MAX).all(|id| !prime::is_prime(id)));
        (u64::MAX - 300..=u64::MAX).for_each(assert_factored);
    }

    proptest! {
        #[test]
        fn any_number_is_the_product_of_its_primes(id in 1..=u64::MAX, shift in 0..u64::BITS) {
            assert_factored((id >> shift).max(1));
        }

        #[test]
        fn two_primes_of_32_bits_are_found_again(a: u32, b: u32) {
            let mut primes = [prime_from(a), prime_from(b)];
            primes.sort_unstable();
            prop_assert_eq!(factors(primes[0] * primes[1]), primes);
        }
    }
}
