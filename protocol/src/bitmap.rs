//! A bitmap over page indices, scanned a word at a time.
//!
//! A hash map or a byte per page on the fault path turns microseconds into milliseconds; a bit per page is
//! 32 KiB per GiB, and a run of pages is found with two word scans.

/// A fixed number of bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
}

const BITS: u64 = 64;

#[allow(clippy::cast_possible_truncation)] // callers stay below `len`, whose words fit in memory
const fn split(bit: u64) -> (usize, u32) {
    ((bit / BITS) as usize, (bit % BITS) as u32)
}

impl Bitmap {
    /// `len` bits, all clear.
    #[must_use]
    pub fn clear(len: u64) -> Self {
        let (words, rest) = split(len);
        Self { words: vec![0; words + usize::from(rest > 0)], len }
    }

    /// `len` bits, all set.
    #[must_use]
    pub fn full(len: u64) -> Self {
        let mut map = Self::clear(len);
        map.set_range(0, len);
        map
    }

    /// Number of bits.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bits at all.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether `bit` is set; false past the end.
    #[must_use]
    pub fn get(&self, bit: u64) -> bool {
        let (word, shift) = split(bit);
        bit < self.len && self.words[word] >> shift & 1 == 1
    }

    /// Sets `bit` and says whether it was clear; does nothing past the end.
    pub fn set(&mut self, bit: u64) -> bool {
        self.set_range(bit, bit.saturating_add(1)) == 1
    }

    /// Clears `bit` and says whether it was set; does nothing past the end.
    pub fn unset(&mut self, bit: u64) -> bool {
        self.unset_range(bit, bit.saturating_add(1)) == 1
    }

    /// Sets `start..end` and returns how many bits were clear.
    pub fn set_range(&mut self, start: u64, end: u64) -> u64 {
        self.each_word(start, end, |word, mask| {
            let changed = !*word & mask;
            *word |= mask;
            changed
        })
    }

    /// Clears `start..end` and returns how many bits were set.
    pub fn unset_range(&mut self, start: u64, end: u64) -> u64 {
        self.each_word(start, end, |word, mask| {
            let changed = *word & mask;
            *word &= !mask;
            changed
        })
    }

    fn each_word(&mut self, start: u64, end: u64, mut change: impl FnMut(&mut u64, u64) -> u64) -> u64 {
        let end = end.min(self.len);
        let mut at = start;
        let mut changed = 0;
        while at < end {
            let (word, shift) = split(at);
            let bits = (BITS - u64::from(shift)).min(end - at);
            let mask = (u64::MAX >> (BITS - bits)) << shift;
            changed += u64::from(change(&mut self.words[word], mask).count_ones());
            at += bits;
        }
        changed
    }

    /// The first run of set bits in `start..end`, as first bit and first bit behind.
    #[must_use]
    pub fn run_in(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let end = end.min(self.len);
        let first = self.find(start, end, 0)?;
        Some((first, self.find(first, end, u64::MAX).unwrap_or(end)))
    }

    /// The first bit in `start..end` that differs from the bits of `flip` (0: set, all ones: clear).
    fn find(&self, start: u64, end: u64, flip: u64) -> Option<u64> {
        let mut at = start;
        while at < end {
            let (word, shift) = split(at);
            let bits = (self.words[word] ^ flip) >> shift;
            if bits != 0 {
                let found = at + u64::from(bits.trailing_zeros());
                return (found < end).then_some(found);
            }
            at += BITS - u64::from(shift);
        }
        None
    }

    /// Number of set bits in `start..end`.
    #[must_use]
    pub fn count_range(&self, start: u64, end: u64) -> u64 {
        let mut total = 0;
        let mut at = start;
        while let Some((first, behind)) = self.run_in(at, end) {
            total += behind - first;
            at = behind;
        }
        total
    }

    /// The bits of `start..end` in bytes, lowest first; `start` is a multiple of 64. Bits past the end are clear.
    ///
    /// # Panics
    /// If `start` is no multiple of 64.
    #[must_use]
    pub fn bytes(&self, start: u64, end: u64) -> Vec<u8> {
        assert_eq!(start % BITS, 0, "pieces begin at a word");
        let end = end.min(self.len).max(start);
        let (first, last) = (split(start).0, split(end.next_multiple_of(BITS)).0);
        let words = self.words[first.min(self.words.len())..last].iter();
        let mut bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(usize::try_from((end - start).div_ceil(8)).unwrap_or(usize::MAX));
        if let (Some(byte), rest @ 1..) = (bytes.last_mut(), (end - start) % 8) {
            *byte &= (1 << rest) - 1;
        }
        bytes
    }

    /// Number of set bits.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn edges() {
        let mut map = Bitmap::clear(130);
        assert_eq!(map.set_range(60, 130), 70);
        assert!(!map.set(130), "past the end");
        assert!(!map.get(130));
        assert_eq!(map.run_in(0, 1000), Some((60, 130)));
        assert!(map.unset(64));
        assert_eq!(map.run_in(0, 130), Some((60, 64)));
        assert_eq!(map.run_in(64, 130), Some((65, 130)));
        assert_eq!(map.run_in(0, 60), None);
        assert_eq!(map.count(), 69);
        assert_eq!(Bitmap::full(65).count(), 65);
        assert!(Bitmap::clear(0).is_empty());
    }

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_bools(
            len in 1u64..300,
            ops in proptest::collection::vec((any::<bool>(), 0u64..310, 0u64..310), 0..40),
            from in 0u64..310,
            to in 0u64..310,
        ) {
            let mut map = Bitmap::clear(len);
            let mut model = vec![false; usize::try_from(len).unwrap()];
            for (set, a, b) in ops {
                let mut changed = 0;
                for bit in a..b.min(len) {
                    let slot = &mut model[usize::try_from(bit).unwrap()];
                    changed += u64::from(*slot != set);
                    *slot = set;
                }
                let got = if set { map.set_range(a, b) } else { map.unset_range(a, b) };
                prop_assert_eq!(got, changed);
            }
            let bit = |i: u64| model[usize::try_from(i).unwrap()];
            let first = (from..to.min(len)).find(|i| bit(*i));
            let run = first.map(|f| (f, (f..to.min(len)).find(|i| !bit(*i)).unwrap_or(to.min(len))));
            prop_assert_eq!(map.run_in(from, to), run);
            let inside = (from..to.min(len)).filter(|i| bit(*i)).count() as u64;
            prop_assert_eq!(map.count_range(from, to), inside);
            prop_assert_eq!(map.count(), model.iter().filter(|b| **b).count() as u64);
        }
    }
}
