//! Splitting a composite: Pollard's rho with Brent's search for the cycle and a gcd for many terms at once.
//!
//! The sequence `x → x² + c mod n` repeats itself modulo a prime `p` that divides `n` after about √p terms, long before
//! it does so modulo `n`. Two terms that agree modulo `p` differ by a multiple of `p`, which a gcd with `n` brings to
//! light. Differences are multiplied up and share one gcd (R. P. Brent, An Improved Monte Carlo Factorization
//! Algorithm, BIT 20, 1980, <https://doi.org/10.1007/BF01933190>).

use crate::montgomery::Modulus;

/// A gcd costs as much as dozens of steps; the more terms share one, the further a hit is overrun.
const TERMS_PER_GCD: u64 = 128;

/// A divisor of the odd composite `n` other than 1 and `n`.
///
/// It would search a prime for ever, and 9, which no such sequence splits.
pub fn divisor(n: u64) -> u64 {
    let modulus = Modulus::new(n);
    let mut constant = 1;
    // A sequence fails when it repeats itself modulo every prime of n at the same term; the next is independent of it.
    loop {
        if let Some(divisor) = search(n, &modulus, constant) {
            return divisor;
        }
        constant += 1;
    }
}

/// Follows one sequence until it repeats itself modulo some divisor of `n`. `None` when that is `n` itself.
fn search(n: u64, modulus: &Modulus, constant: u64) -> Option<u64> {
    let next = |x| modulus.multiply_add(x, x, constant);
    let mut x = modulus.one();
    let mut stretch = 1;
    loop {
        // Compare the terms of a stretch with the one before it; what repeats sooner, a shorter stretch has found.
        let anchor = x;
        for _ in 0..stretch {
            x = next(x);
        }
        let mut left = stretch;
        while left > 0 {
            let terms = left.min(TERMS_PER_GCD);
            let before = x;
            let mut product = modulus.one();
            for _ in 0..terms {
                x = next(x);
                product = modulus.multiply(product, x.abs_diff(anchor));
            }
            if gcd(product, n) != 1 {
                return Some(first_divisor(n, before, anchor, next)).filter(|divisor| *divisor != n);
            }
            left -= terms;
        }
        stretch *= 2;
    }
}

/// Goes through the terms after `before` again, one gcd for each, because their product can hold several primes of `n`.
fn first_divisor(n: u64, before: u64, anchor: u64, next: impl Fn(u64) -> u64) -> u64 {
    let mut x = before;
    loop {
        x = next(x);
        let divisor = gcd(x.abs_diff(anchor), n);
        if divisor != 1 {
            return divisor;
        }
    }
}

/// The greatest common divisor of any `a` and an odd `b`, by halving and subtracting. That of 0 and `b` is `b`.
fn gcd(mut a: u64, mut b: u64) -> u64 {
    while a != 0 {
        a >>= a.trailing_zeros();
        (a, b) = (a.abs_diff(b), a.min(b));
    }
    b
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn euclid(a: u64, b: u64) -> u64 {
        if b == 0 { a } else { euclid(b, a % b) }
    }

    proptest! {
        #[test]
        fn the_gcd_is_euclids(a: u64, b: u64, common in 1u64..1 << 32) {
            let (a, b) = ((a >> 32) * common, ((b >> 32) * common) | 1);
            prop_assert_eq!(gcd(a, b), euclid(a, b));
            let (a, b) = ((a / common) * (common | 1), (b >> 32 | 1) * (common | 1));
            prop_assert_eq!(gcd(a, b), euclid(a, b));
        }
    }

    #[test]
    fn the_gcd_with_0_is_the_other_number() {
        assert_eq!([gcd(0, 1), gcd(0, 15), gcd(0, u64::MAX)], [1, 15, u64::MAX]);
    }

    /// Small numbers are where both primes repeat at once, so that sequences fail and the next must be tried.
    #[test]
    fn every_odd_composite_is_split() {
        for n in (15..20_000).step_by(2).filter(|n| (3..*n).any(|d| n % d == 0)) {
            let divisor = divisor(n);
            assert!(n % divisor == 0 && divisor != 1 && divisor != n, "{divisor} of {n}");
        }
    }
}
