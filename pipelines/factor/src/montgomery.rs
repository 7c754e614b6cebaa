//! Multiplication modulo an odd number without division.
//!
//! A residue `x` is held as `x · 2^64 mod n`. The product of two such, divided by 2^64, is their product in the same
//! form, and that division needs only multiplications (P. L. Montgomery, Modular Multiplication Without Trial
//! Division, Math. Comp. 44, 1985, <https://doi.org/10.1090/S0025-5718-1985-0777282-X>). Residues are always below `n`,
//! so equal residues are equal numbers.

/// An odd modulus, prepared. Every residue taken and given is below it and in the form above.
#[derive(Debug, Clone, Copy)]
pub struct Modulus {
    n: u64,
    inverse: u64,
    /// 2^64 mod n: what stands for 1.
    one: u64,
    /// 2^128 mod n: multiplying by it brings a number into the form.
    square: u64,
}

impl Modulus {
    /// Prepares an odd `n` from 3 on.
    pub fn new(n: u64) -> Self {
        debug_assert!(n % 2 == 1 && n > 1, "{n} is no odd modulus");
        let one = n.wrapping_neg() % n;
        let square = u128::from(one) * u128::from(one) % u128::from(n);
        Self { n, inverse: inverse(n), one, square: square as u64 }
    }

    /// What stands for 1.
    pub fn one(&self) -> u64 {
        self.one
    }

    /// What stands for -1.
    pub fn minus_one(&self) -> u64 {
        self.n - self.one
    }

    /// What stands for `x`, which is below `n`.
    pub fn residue(&self, x: u64) -> u64 {
        self.multiply(x, self.square)
    }

    /// `a · b`.
    pub fn multiply(&self, a: u64, b: u64) -> u64 {
        self.multiply_add(a, b, 0)
    }

    /// `a · b + c / 2^64`: for a `c` that may be any constant, this is one addition cheaper than `a · b + c`.
    pub fn multiply_add(&self, a: u64, b: u64, c: u64) -> u64 {
        self.reduce(u128::from(a) * u128::from(b) + u128::from(c))
    }

    /// `base` to the power of `exponent`.
    pub fn power(&self, base: u64, exponent: u64) -> u64 {
        let (mut power, mut square, mut left) = (self.one, base, exponent);
        while left > 0 {
            if left % 2 == 1 {
                power = self.multiply(power, square);
            }
            square = self.multiply(square, square);
            left /= 2;
        }
        power
    }

    /// `product / 2^64 mod n`, for a product below `n · 2^64`.
    fn reduce(&self, product: u128) -> u64 {
        let (high, low) = ((product >> u64::BITS) as u64, product as u64);
        // The multiple of n that ends in the same 64 bits: their difference is a multiple of 2^64, so high words do.
        let multiple = u128::from(low.wrapping_mul(self.inverse)) * u128::from(self.n);
        let (difference, borrow) = high.overflowing_sub((multiple >> u64::BITS) as u64);
        if borrow { difference.wrapping_add(self.n) } else { difference }
    }
}

/// The inverse of an odd `n` modulo 2^64.
pub const fn inverse(n: u64) -> u64 {
    // n is its own inverse modulo 8, and each of Newton's steps doubles the bits that are right: 3, 6, 12, 24, 48, 96.
    let mut inverse = n;
    let mut bits = 3;
    while bits < u64::BITS {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(n.wrapping_mul(inverse)));
        bits *= 2;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn modulo(x: u128, n: u64) -> u64 {
        (x % u128::from(n)) as u64
    }

    proptest! {
        #[test]
        fn products_are_those_of_plain_division(n in 1..=u64::MAX / 2, a: u64, b: u64, shift in 0..u64::BITS - 1) {
            let n = (n >> shift).max(1) * 2 + 1;
            let (a, b, modulus) = (a % n, b % n, Modulus::new(n));
            let product = modulus.multiply(modulus.residue(a), modulus.residue(b));
            let expected = modulo(u128::from(a) * u128::from(b), n);
            prop_assert_eq!(product, modulus.residue(expected));
            prop_assert_eq!(modulus.multiply(product, 1), expected);
            prop_assert_eq!(modulo(u128::from(modulus.multiply_add(a, b, b)) << u64::BITS, n),
                modulo(u128::from(a) * u128::from(b) + u128::from(b), n));
        }

        #[test]
        fn powers_are_repeated_products(n in 1..=u64::MAX / 2, base: u64, exponent in 0u64..100) {
            let n = n * 2 + 1;
            let modulus = Modulus::new(n);
            let expected = (0..exponent).fold(1, |power, _| modulo(u128::from(power) * u128::from(base % n), n));
            prop_assert_eq!(modulus.power(modulus.residue(base % n), exponent), modulus.residue(expected));
        }

        #[test]
        fn a_number_times_its_inverse_is_1(n: u64) {
            prop_assert_eq!((n | 1).wrapping_mul(inverse(n | 1)), 1);
        }
    }

    #[test]
    fn the_extreme_moduli_are_exact() {
        for n in [3, 5, u64::MAX / 2, u64::MAX - 2, u64::MAX] {
            let modulus = Modulus::new(n);
            let minus_one = modulus.residue(n - 1);
            assert_eq!(minus_one, modulus.minus_one());
            assert_eq!(modulus.residue(1), modulus.one());
            assert_eq!(modulus.multiply(minus_one, minus_one), modulus.one());
            // The largest product there is.
            assert_eq!(modulo(u128::from(modulus.multiply_add(n - 1, n - 1, n - 1)) << u64::BITS, n), 0);
        }
    }
}
