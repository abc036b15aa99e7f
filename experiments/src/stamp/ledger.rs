//! What the owner of some pages remembers of them: one generation per page, doubly kept.
//!
//! The ledger lies on the heap and so arrives late itself. If a page of it were lost, every stamp it speaks for
//! would look wrong, or, worse, lost stamps would look right. A checksum over every 1024 generations (one page of
//! them) is kept apart, so that a damaged ledger is told from a damaged page.

use crate::random::mix;

const CHUNK: usize = 1024;

/// Generations of the pages `0..len`, with a checksum per 1024 of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    generations: Vec<u32>,
    sums: Vec<u64>,
}

impl Ledger {
    /// `len` pages of one generation.
    #[must_use]
    pub(super) fn filled(len: usize, generation: u32) -> Self {
        let mut ledger = Self::default();
        ledger.resize(len, generation);
        ledger
    }

    /// Pages it speaks for.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.generations.len()
    }

    /// Whether it speaks for no page.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.generations.is_empty()
    }

    /// The generation of page `index`.
    #[must_use]
    pub(super) fn get(&self, index: usize) -> u32 {
        self.generations[index]
    }

    /// Notes that page `index` is now of this generation.
    pub(super) fn set(&mut self, index: usize, generation: u32) {
        let before = std::mem::replace(&mut self.generations[index], generation);
        // Exchanged, not summed anew: a chunk that was damaged before stays recognisable.
        self.sums[index / CHUNK] ^= term(index, before) ^ term(index, generation);
    }

    /// Forgets pages at the end, or adds pages of this generation there.
    pub(super) fn resize(&mut self, len: usize, generation: u32) {
        while self.generations.len() > len {
            let index = self.generations.len() - 1;
            self.set(index, 0);
            self.sums[index / CHUNK] ^= term(index, 0);
            self.generations.pop();
        }
        while self.generations.len() < len {
            let index = self.generations.len();
            self.generations.push(generation);
            self.sums.resize(index / CHUNK + 1, 0);
            self.sums[index / CHUNK] ^= term(index, generation);
        }
        self.sums.truncate(len.div_ceil(CHUNK));
    }

    /// Whether the chunk that page `index` is in agrees with its checksum.
    #[must_use]
    pub(super) fn is_sound_at(&self, index: usize) -> bool {
        let from = index - index % CHUNK;
        let to = (from + CHUNK).min(self.len());
        let sum = (from..to).fold(0, |sum, index| sum ^ term(index, self.generations[index]));
        sum == self.sums[index / CHUNK]
    }

    /// The first page of every chunk that disagrees with its checksum.
    pub(super) fn damaged(&self) -> impl Iterator<Item = usize> {
        (0..self.len()).step_by(CHUNK).filter(|&index| !self.is_sound_at(index))
    }

    /// Takes the generations as they are for right, so that one damage is reported once.
    pub(super) fn accept(&mut self, index: usize) {
        let from = index - index % CHUNK;
        let to = (from + CHUNK).min(self.len());
        self.sums[index / CHUNK] =
            (from..to).fold(0, |sum, index| sum ^ term(index, self.generations[index]));
    }
}

fn term(index: usize, generation: u32) -> u64 {
    mix((u64::try_from(index).unwrap_or(0) + 1) << 32 | u64::from(generation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_that_was_only_used_is_sound() {
        let mut ledger = Ledger::filled(3000, 1);
        for index in (0..3000).step_by(7) {
            ledger.set(index, u32::try_from(index).unwrap());
        }
        ledger.resize(1500, 0);
        ledger.resize(2500, 0);
        assert_eq!((ledger.len(), ledger.get(700), ledger.get(2499)), (2500, 700, 0));
        assert_eq!(ledger.damaged().count(), 0);
        ledger.resize(0, 0);
        assert_eq!((ledger.is_empty(), ledger.damaged().count()), (true, 0));
    }

    #[test]
    fn a_chunk_that_became_zero_is_damaged_whatever_is_written_to_it_later() {
        let mut ledger = Ledger::filled(3000, 1);
        ledger.generations[1024..2048].fill(0);
        ledger.set(1030, 5);
        assert_eq!(ledger.damaged().collect::<Vec<_>>(), [1024]);
        ledger.sums.fill(0);
        assert_eq!(ledger.damaged().count(), 3, "zero checksums do not vouch for anything");
        ledger.accept(1030);
        assert!(ledger.is_sound_at(1500) && !ledger.is_sound_at(0));
    }
}
