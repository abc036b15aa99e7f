//! Random numbers that can be repeated from a seed, and orders that need no memory.

/// Mixes the bits of `value`: equal inputs give equal outputs, close inputs give unrelated ones (splitmix64).
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A small generator; the same seed gives the same numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that starts from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x9e37_79b9_7f4a_7c15))
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number less than `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).unwrap_or(u64::MAX);
        usize::try_from(self.next() % bound.max(1)).unwrap_or(0)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high.saturating_sub(low) + 1)
    }
}

/// Every number below a bound once, in an order that looks random, computed instead of stored: a stored order
/// would be memory of the process and so arrive late itself.
///
/// A Feistel network over an even number of bits is a permutation whatever its round function is; numbers past
/// the bound are sent through it again until they are inside.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    bound: u64,
    half_bits: u32,
    seed: u64,
}

impl Permutation {
    /// An order of the numbers below `bound`.
    #[must_use]
    pub const fn new(bound: u64, seed: u64) -> Self {
        let bits = u64::BITS - bound.saturating_sub(1).leading_zeros();
        let half = bits.div_ceil(2);
        Self { bound, half_bits: if half == 0 { 1 } else { half }, seed }
    }

    /// Which number comes at place `index`; `index` must be below the bound.
    #[must_use]
    pub const fn at(&self, index: u64) -> u64 {
        assert!(index < self.bound);
        let mut value = self.scramble(index);
        while value >= self.bound {
            value = self.scramble(value);
        }
        value
    }

    const fn scramble(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        let mut round = 0;
        while round < 4 {
            (left, right) = (right, left ^ (mix(right ^ self.seed ^ (round << 56)) & mask));
            round += 1;
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_gives_every_number_once() {
        for bound in [1_u64, 2, 3, 16, 17, 1000, 4097] {
            let order = Permutation::new(bound, 5);
            let mut seen: Vec<u64> = (0..bound).map(|index| order.at(index)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..bound).collect::<Vec<_>>(), "bound {bound}");
        }
    }

    #[test]
    fn a_permutation_of_some_size_is_not_in_order() {
        let order = Permutation::new(4096, 1);
        let near = (1..4096).filter(|&index| order.at(index).abs_diff(order.at(index - 1)) < 16).count();
        assert!(near < 100, "{near} neighbours of 4095 stayed close");
    }

    #[test]
    fn numbers_stay_within_their_bounds() {
        let mut random = Random::new(1);
        assert!((0..1000).all(|_| random.below(7) < 7 && (3..=5).contains(&random.between(3, 5))));
        assert_eq!(random.below(0), 0);
    }
}
