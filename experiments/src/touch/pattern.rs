//! The order in which pages are touched.

use std::fmt;

use crate::random::{Permutation, mix};

/// How the next page follows from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Every page once, in an order that looks random
    Random,
    /// One after the other
    Sequential,
    /// Every n-th page, then those beside them
    Stride,
    /// Few pages often, most seldom or never: as many accesses as there are pages, by Zipf's law with exponent 0.99
    Zipf,
    /// Every page once, in an order that looks random: each page says which one is next
    Chase,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Random, Self::Sequential, Self::Stride, Self::Zipf, Self::Chase];

    /// Whether it comes to every page, and to each only once.
    #[must_use]
    pub const fn is_complete(self) -> bool {
        !matches!(self, Self::Zipf)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
            Self::Stride => "stride",
            Self::Zipf => "zipf",
            Self::Chase => "chase",
        })
    }
}

/// A pattern over so many pages, computed: an order in memory would arrive late like everything else.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pattern: Pattern,
    pages: u64,
    stride: u64,
    order: Permutation,
}

impl Walk {
    /// A walk over `pages` pages; `stride` is for [`Pattern::Stride`].
    pub(super) const fn new(pattern: Pattern, pages: u64, stride: u64) -> Self {
        let stride = if stride == 0 { 1 } else { stride };
        Self { pattern, pages, stride, order: Permutation::new(pages, 0x70_75_63_68) }
    }

    /// How it goes.
    pub(super) const fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// The pages it goes over.
    pub(super) const fn pages(&self) -> u64 {
        self.pages
    }

    /// The page at place `index` of the walk, which must be below the number of pages.
    pub(super) fn at(&self, index: u64) -> u64 {
        match self.pattern {
            Pattern::Random | Pattern::Chase => self.order.at(index),
            Pattern::Sequential => index,
            Pattern::Stride => self.strided(index),
            // The hot pages lie anywhere.
            Pattern::Zipf => self.order.at(zipf_rank(unit(mix(index ^ 0x7a69_7066)), self.pages)),
        }
    }

    /// Rounds that start at page 0, 1, 2, ... The first `pages % stride` rounds are one page longer than the others.
    const fn strided(&self, index: u64) -> u64 {
        let (short, longer) = (self.pages / self.stride, self.pages % self.stride);
        let in_longer = longer * (short + 1);
        if index < in_longer {
            return index / (short + 1) + index % (short + 1) * self.stride;
        }
        let index = index - in_longer;
        longer + index / short + index % short * self.stride
    }
}

/// A number from 0 to less than 1 out of random bits.
#[expect(clippy::cast_precision_loss, reason = "53 bits are kept")]
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Which of `ranks` things is picked at `at`, from 0 to less than 1, when the k-th is wanted in proportion to
/// 1/k^0.99: the inverse of the distribution function, with a continuous k.
#[expect(clippy::cast_precision_loss, reason = "page numbers far below 2^53")]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 1 to the number of ranks")]
fn zipf_rank(at: f64, ranks: u64) -> u64 {
    const REST: f64 = 1.0 - 0.99;
    let end = (ranks as f64 + 1.0).powf(REST);
    let k = (1.0 + at * (end - 1.0)).powf(1.0 / REST);
    (k as u64).clamp(1, ranks) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_complete_pattern_visits_every_page_once() {
        for pattern in Pattern::ALL.into_iter().filter(|pattern| pattern.is_complete()) {
            for (pages, stride) in [(1, 7), (6, 7), (7, 7), (100, 7), (4096, 16), (1000, 1)] {
                let walk = Walk::new(pattern, pages, stride);
                let mut seen: Vec<u64> = (0..pages).map(|index| walk.at(index)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..pages).collect::<Vec<_>>(), "{pattern} over {pages} by {stride}");
            }
        }
    }

    #[test]
    fn a_stride_goes_round_after_round() {
        let walk = Walk::new(Pattern::Stride, 10, 4);
        let pages: Vec<u64> = (0..10).map(|index| walk.at(index)).collect();
        assert_eq!(pages, [0, 4, 8, 1, 5, 9, 2, 6, 3, 7]);
    }

    #[test]
    fn zipf_likes_few_pages_and_stays_within_all() {
        assert_eq!((zipf_rank(0.0, 1000), zipf_rank(0.999_999_999, 1000)), (0, 999));
        assert_eq!(zipf_rank(0.5, 1), 0);
        let pages = 100_000;
        let walk = Walk::new(Pattern::Zipf, pages, 1);
        let mut visits = vec![0_u32; 100_000];
        (0..pages).for_each(|index| visits[usize::try_from(walk.at(index)).unwrap()] += 1);
        visits.sort_unstable_by(|a, b| b.cmp(a));
        let total = |visits: &[u32]| visits.iter().sum::<u32>();
        // With H(n) near ln n: the first hundredth has (ln 1000) / (ln 100000), 60 %, of the visits.
        let hot = total(&visits[..1000]);
        assert!((50_000..70_000).contains(&hot), "{hot} of 100000 visits to the hottest hundredth");
        let never = visits.iter().filter(|&&count| count == 0).count();
        assert!((30_000..90_000).contains(&never), "{never} pages never visited");
    }
}
