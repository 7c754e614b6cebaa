//! Signed whole numbers of up to 256 bits, as columns hold them.

/// The most digits that always fit into 256 bits.
const MAX_DIGITS: usize = 77;

/// A sign and a magnitude of four words, the lowest word first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wide {
    negative: bool,
    words: [u64; 4],
}

impl From<u128> for Wide {
    fn from(number: u128) -> Self {
        Self { negative: false, words: [number as u64, (number >> 64) as u64, 0, 0] }
    }
}

impl From<i128> for Wide {
    fn from(number: i128) -> Self {
        Self { negative: number < 0, ..Self::from(number.unsigned_abs()) }
    }
}

impl Wide {
    const ZERO: Self = Self { negative: false, words: [0; 4] };

    /// Ten to the power of `digits`, up to 76.
    fn power_of_ten(digits: u8) -> Self {
        let mut power = Self { negative: false, words: [1, 0, 0, 0] };
        for _ in 0..digits {
            power.push_digit(10, 0);
        }
        power
    }

    /// Multiplies by the base and adds; `false` when more than 256 bits would be needed.
    fn push_digit(&mut self, base: u64, digit: u64) -> bool {
        let mut carry = u128::from(digit);
        for word in &mut self.words {
            let product = u128::from(*word) * u128::from(base) + carry;
            *word = product as u64;
            carry = product >> 64;
        }
        carry == 0
    }

    /// Parses `-12`, `0x2a` or `-0x2A`; `None` for other text and for numbers of more than 256 bits.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (negative, digits) = signed(text);
        let (base, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
            Some(hex) => (16, hex),
            None => (10, digits),
        };
        let mut number = Self { negative, ..Self::ZERO };
        let all = digits.chars().all(|symbol| {
            symbol.to_digit(base).is_some_and(|digit| number.push_digit(u64::from(base), u64::from(digit)))
        });
        (all && !digits.is_empty()).then_some(number)
    }

    /// Parses a decimal number such as `-12.50` or `1.5E-3`, multiplied by ten to the `scale`.
    ///
    /// # Errors
    /// Why the text is not a number of at most `precision` digits; nothing is ever rounded.
    pub(crate) fn parse_decimal(text: &str, precision: u8, scale: u8) -> Result<Self, &'static str> {
        const NO_NUMBER: &str = "it is not a decimal number";
        let (negative, rest) = signed(text);
        let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().map_err(|_| NO_NUMBER)?),
            None => (rest, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits = || whole.bytes().chain(fraction.bytes());
        if digits().next().is_none() || !digits().all(|digit| digit.is_ascii_digit()) {
            return Err(NO_NUMBER);
        }
        // The digits of the scaled number: those in the text, plus or minus the shift.
        let shift = i64::from(scale) + i64::from(exponent) - fraction.len() as i64;
        let there = (whole.len() + fraction.len()) as i64;
        let kept = (there + shift.min(0)).max(0) as usize;
        if digits().skip(kept).any(|digit| digit != b'0') {
            return Err("it has more decimal places than the column");
        }
        let mut number = Self { negative, ..Self::ZERO };
        let significant = digits().take(kept).skip_while(|digit| *digit == b'0').count();
        if significant == 0 {
            return Ok(Self::ZERO);
        }
        if significant as i64 + shift.max(0) > i64::from(precision).min(MAX_DIGITS as i64) {
            return Err("it has more digits than the column");
        }
        let padding = (0..shift.max(0)).map(|_| b'0');
        for digit in digits().take(kept).chain(padding) {
            number.push_digit(10, u64::from(digit - b'0'));
        }
        Ok(number)
    }

    fn bits(&self) -> usize {
        let top = self.words.iter().rposition(|word| *word != 0);
        top.map_or(0, |index| 64 * (index + 1) - self.words[index].leading_zeros() as usize)
    }

    /// Whether a column of this many bytes can hold the number.
    pub(crate) fn fits(&self, width: usize, signed: bool) -> bool {
        let bits = self.bits();
        let limit = width * 8;
        match (self.negative, signed) {
            (true, false) => bits == 0,
            (false, false) => bits <= limit,
            (false, true) => bits < limit,
            (true, true) => bits < limit || (bits == limit && self.is_power_of_two()),
        }
    }

    fn is_power_of_two(&self) -> bool {
        self.words.iter().map(|word| word.count_ones()).sum::<u32>() == 1
    }

    /// Whether the number has at most `precision` digits.
    pub(crate) fn has_digits(&self, precision: u8) -> bool {
        let limit = Self::power_of_ten(precision);
        self.words.iter().rev().lt(limit.words.iter().rev())
    }

    /// The number, if it fits into an `i64`.
    pub(crate) fn small(&self) -> Option<i64> {
        let magnitude = i128::from(self.words[0]);
        let number = if self.negative { -magnitude } else { magnitude };
        (self.bits() <= 64).then(|| i64::try_from(number).ok())?
    }

    /// The number as a float, if the float is exact.
    pub(crate) fn exact_float(&self) -> Option<f64> {
        let small = self.small()?;
        let float = small as f64;
        (float as i128 == i128::from(small)).then_some(float)
    }

    /// Reads the bytes that [`Self::to_le_bytes`] wrote, at most 32.
    pub(crate) fn from_le_bytes(bytes: &[u8]) -> Self {
        let negative = bytes.last().is_some_and(|top| *top >= 0x80);
        let mut padded = [if negative { 0xFF } else { 0 }; 32];
        padded[..bytes.len().min(32)].copy_from_slice(&bytes[..bytes.len().min(32)]);
        let number = Self { negative, words: Self::from_words(padded) };
        // The two's complement of a negative number is its magnitude.
        Self { negative, words: Self::from_words(number.to_le_bytes()) }
    }

    fn from_words(bytes: [u8; 32]) -> [u64; 4] {
        let mut words = [0; 4];
        for (word, place) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*place);
        }
        words
    }

    /// The number in two's complement, little-endian; a column takes the first bytes.
    pub(crate) fn to_le_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let mut carry = true;
        for (word, place) in self.words.iter().zip(bytes.as_chunks_mut::<8>().0) {
            let (value, over) =
                if self.negative { (!word).overflowing_add(u64::from(carry)) } else { (*word, false) };
            carry = over;
            *place = value.to_le_bytes();
        }
        bytes
    }
}

/// Splits a number's text into its sign and the rest.
fn signed(text: &str) -> (bool, &str) {
    match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn decimals_are_exact_or_refused() {
        let table: [(&str, u8, u8, Result<i128, &str>); 13] = [
            ("12.5", 9, 2, Ok(1250)),
            ("-0.05", 9, 2, Ok(-5)),
            ("+7", 9, 0, Ok(7)),
            ("1.500", 3, 1, Ok(15)),
            ("1.55", 3, 1, Err("decimal places")),
            ("9999999.99", 9, 2, Ok(999_999_999)),
            ("10000000", 9, 2, Err("more digits than")),
            ("00000000000001", 1, 0, Ok(1)),
            ("1.5E3", 9, 2, Ok(150_000)),
            ("15e-2", 9, 2, Ok(15)),
            ("0e999999999", 9, 2, Ok(0)),
            ("NaN", 9, 2, Err("not a decimal")),
            (".", 9, 2, Err("not a decimal")),
        ];
        for (text, precision, scale, want) in table {
            match (Wide::parse_decimal(text, precision, scale), want) {
                (Ok(found), Ok(want)) => assert_eq!(found, Wide::from(want), "{text}"),
                (Err(found), Err(want)) => assert!(found.contains(want), "{text}: {found}"),
                (found, want) => panic!("{text}: {found:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn the_ends_of_256_bits_fit_and_one_more_does_not() {
        let highest = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
        assert!(Wide::parse(highest).expect("2^256 - 1").fits(32, false));
        assert_eq!(Wide::parse(&highest.replace("935", "936")), None);
        let lowest = Wide::parse("-0x8000000000000000000000000000000000000000000000000000000000000000");
        assert!(lowest.expect("-2^255").fits(32, true));
        assert!(!lowest.expect("-2^255").fits(32, false));
        let lower = Wide::parse("-0x8000000000000000000000000000000000000000000000000000000000000001");
        assert!(!lower.expect("256 bits").fits(32, true));
    }

    proptest! {
        #[test]
        fn numbers_have_rusts_own_bytes(number in any::<i128>()) {
            let wide = Wide::parse(&number.to_string()).expect("a number");
            prop_assert_eq!(wide, Wide::from(number));
            prop_assert_eq!(&wide.to_le_bytes()[..16], &number.to_le_bytes()[..]);
            prop_assert_eq!(Wide::from_le_bytes(&number.to_le_bytes()), wide);
            prop_assert!(wide.fits(16, true));
            prop_assert_eq!(wide.fits(8, true), i64::try_from(number).is_ok());
            prop_assert_eq!(wide.fits(4, false), u32::try_from(number).is_ok());
            prop_assert_eq!(wide.small(), i64::try_from(number).ok());
            prop_assert_eq!(wide.has_digits(9), number.unsigned_abs() < 1_000_000_000);
        }
    }
}
