//! The order in which pages are touched.

use std::fmt;

use crate::random::Permutation;

/// How the next page follows from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Every page once, in an order that looks random
    Random,
    /// One after the other
    Sequential,
    /// Every n-th page, then those beside them
    Stride,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
            Self::Stride => "stride",
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

    /// The page at place `index` of the walk, which must be below the number of pages.
    pub(super) const fn at(&self, index: u64) -> u64 {
        match self.pattern {
            Pattern::Random => self.order.at(index),
            Pattern::Sequential => index,
            Pattern::Stride => self.strided(index),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_visits_every_page_once() {
        for pattern in [Pattern::Random, Pattern::Sequential, Pattern::Stride] {
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
}
