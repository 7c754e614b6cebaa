//! Trial division by the primes below 256, without dividing.
//!
//! An odd `d` has an inverse modulo 2^64. `n` is a multiple of `d` exactly when `n · inverse` modulo 2^64 is at most
//! `u64::MAX / d`, and that product is then `n / d` (Granlund and Montgomery, Division by Invariant Integers using
//! Multiplication, PLDI 1994, section 9). So one multiplication answers for one prime, where a division would take
//! several times as long.

use crate::montgomery::inverse;

/// What [`take_out`] leaves has no prime factor below this.
pub const BOUND: u64 = 256;

/// The odd primes below [`BOUND`].
const COUNT: usize = 53;

/// An odd prime, prepared.
#[derive(Clone, Copy)]
struct Divisor {
    prime: u64,
    inverse: u64,
    largest_quotient: u64,
}

const DIVISORS: [Divisor; COUNT] = divisors();

/// Appends the prime factors of `n` (not 0) below [`BOUND`] and returns what is left.
pub fn take_out(n: u64, factors: &mut Vec<u64>) -> u64 {
    let twos = n.trailing_zeros();
    factors.extend((0..twos).map(|_| 2));
    let mut rest = n >> twos;
    for divisor in &DIVISORS {
        loop {
            let quotient = rest.wrapping_mul(divisor.inverse);
            if quotient > divisor.largest_quotient {
                break;
            }
            factors.push(divisor.prime);
            rest = quotient;
        }
    }
    rest
}

const fn divisors() -> [Divisor; COUNT] {
    let mut found = [Divisor { prime: 0, inverse: 0, largest_quotient: 0 }; COUNT];
    let (mut count, mut candidate) = (0, 3);
    while candidate < BOUND {
        if has_no_divisor_in(&found, count, candidate) {
            let (inverse, largest_quotient) = (inverse(candidate), u64::MAX / candidate);
            found[count] = Divisor { prime: candidate, inverse, largest_quotient };
            count += 1;
        }
        candidate += 2;
    }
    assert!(count == COUNT, "COUNT is not the number of odd primes below BOUND");
    found
}

const fn has_no_divisor_in(found: &[Divisor; COUNT], count: usize, candidate: u64) -> bool {
    let mut index = 0;
    while index < count {
        if candidate.is_multiple_of(found[index].prime) {
            return false;
        }
        index += 1;
    }
    true
}
