//! Telling primes from composites, without error.

use crate::montgomery::Modulus;

/// Jim Sinclair's bases: no composite below 2^64 is a strong probable prime to all of them
/// (<https://miller-rabin.appspot.com>, 2011). A base that `n` divides says nothing and is passed over.
const BASES: [u64; 7] = [2, 325, 9375, 28178, 450775, 9780504, 1795265022];

/// Whether `n` is prime: the test of Miller and Rabin, which for these bases is a proof.
pub fn is_prime(n: u64) -> bool {
    if n < 2 || n.is_multiple_of(2) {
        return n == 2;
    }
    let modulus = Modulus::new(n);
    BASES
        .iter()
        .map(|base| base % n)
        .all(|base| base == 0 || is_probable_prime(n, &modulus, modulus.residue(base)))
}

/// Whether `base^(n-1)` is 1 and was not reached as the square of anything but 1 or -1: of a prime this is true for
/// every base, of a composite for at most a quarter of them.
fn is_probable_prime(n: u64, modulus: &Modulus, base: u64) -> bool {
    let squarings = (n - 1).trailing_zeros();
    let mut power = modulus.power(base, (n - 1) >> squarings);
    if power == modulus.one() {
        return true;
    }
    for _ in 1..squarings {
        if power == modulus.minus_one() {
            return true;
        }
        power = modulus.multiply(power, power);
    }
    power == modulus.minus_one()
}
