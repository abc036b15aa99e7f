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

    /// The bits from `first` (a multiple of 8) on as bytes, the lowest bit of a byte first: at most `most` bytes. Bits of the
    /// last byte that are past the end are clear.
    ///
    /// # Panics
    /// If `first` is inside a byte.
    #[must_use]
    pub fn bytes_from(&self, first: u64, most: usize) -> Vec<u8> {
        assert!(first % 8 == 0, "bit {first} is inside a byte");
        let bytes = self.words.iter().flat_map(|word| word.to_le_bytes());
        let (skip, len) = (first / 8, self.len.div_ceil(8));
        let count = usize::try_from(len.saturating_sub(skip)).unwrap_or(usize::MAX).min(most);
        bytes.skip(usize::try_from(skip).unwrap_or(usize::MAX)).take(count).collect()
    }

    /// Sets the bits that are set in `bytes`, of which the first is `first` (a multiple of 8). Says whether all of them, the set
    /// ones and the clear ones but for the rest of the last byte, are within the map; if not, nothing was changed.
    #[must_use]
    pub fn set_bytes(&mut self, first: u64, bytes: &[u8]) -> bool {
        let (skip, len) = (first / 8, self.len.div_ceil(8));
        let spare = self.len % 8;
        let ends = skip.checked_add(bytes.len() as u64).is_some_and(|end| {
            let within_last = spare == 0 || end < len || bytes.last().is_none_or(|last| last >> spare == 0);
            end <= len && within_last
        });
        if first % 8 != 0 || !ends {
            return false;
        }
        for (at, byte) in (skip..).zip(bytes) {
            let (word, shift) = split(at * 8);
            self.words[word] |= u64::from(*byte) << shift;
        }
        true
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

    /// The 64 bits from `first` on, the first of them the lowest; those past the end are clear.
    #[must_use]
    pub fn word_at(&self, first: u64) -> u64 {
        let (word, shift) = split(first);
        let get = |word: usize| self.words.get(word).copied().unwrap_or(0);
        let high = if shift == 0 { 0 } else { get(word.saturating_add(1)) << (64 - shift) };
        (get(word) >> shift) | high
    }

    /// Sets the bits from `first` on that are set in `bits`, whose lowest is the first; does nothing past the end.
    pub fn set_word(&mut self, first: u64, bits: u64) {
        let (word, shift) = split(first);
        let left = self.len.saturating_sub(first);
        let bits = if left < BITS { bits & !(u64::MAX << left) } else { bits };
        if let Some(low) = self.words.get_mut(word) {
            *low |= bits << shift;
        }
        if let Some(high) = self.words.get_mut(word + 1).filter(|_| shift > 0) {
            *high |= bits >> (64 - shift);
        }
    }

    /// Clears the bits that are clear in `others`; those past its end count as clear.
    pub fn keep_only(&mut self, others: &Self) {
        for (at, word) in self.words.iter_mut().enumerate() {
            *word &= others.words.get(at).copied().unwrap_or(0);
        }
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

    #[test]
    fn bytes_past_the_end_are_refused() {
        let mut map = Bitmap::clear(20);
        assert!(map.set_bytes(8, &[0x81, 0x0f]));
        assert_eq!(map.count(), 6);
        assert_eq!(map.bytes_from(0, 99), [0, 0x81, 0x0f]);
        assert_eq!(map.bytes_from(8, 1), [0x81]);
        assert!(map.bytes_from(24, 9).is_empty());
        let before = map.clone();
        assert!(!map.set_bytes(16, &[0x10]), "bit 20");
        assert!(!map.set_bytes(16, &[0, 0]), "a byte behind the last");
        assert!(!map.set_bytes(4, &[0]), "inside a byte");
        assert!(!map.set_bytes(u64::MAX - 7, &[0]));
        assert_eq!(map, before);
    }

    proptest! {
        #[test]
        fn bytes_round_trip(bits in proptest::collection::vec(any::<bool>(), 0..300), piece in 1usize..50) {
            let mut map = Bitmap::clear(bits.len() as u64);
            for (bit, _) in bits.iter().enumerate().filter(|(_, set)| **set) {
                map.set(bit as u64);
            }
            let mut again = Bitmap::clear(map.len());
            let mut first = 0;
            while first < map.len() {
                let bytes = map.bytes_from(first, piece);
                prop_assert!(!bytes.is_empty());
                prop_assert!(again.set_bytes(first, &bytes));
                first += bytes.len() as u64 * 8;
            }
            prop_assert_eq!(again, map);
        }

        #[test]
        fn words_are_bits_wherever_they_begin(set in proptest::collection::vec(0u64..200, 0..40), len in 0u64..200, to in 0u64..210) {
            let mut map = Bitmap::clear(200);
            for bit in &set {
                map.set(*bit);
            }
            for first in [0, 1, 63, 64, 65, 127, 136, 137, 199, 200, 300, u64::MAX] {
                let word = map.word_at(first);
                for bit in 0..64 {
                    prop_assert_eq!(word >> bit & 1 == 1, map.get(first.saturating_add(bit)), "{} of {}", bit, first);
                }
            }
            let mut copy = Bitmap::clear(len);
            copy.set_word(to, map.word_at(3));
            for bit in 0..300 {
                let expected = bit >= to && bit < to + 64 && bit < len && map.get(3 + bit - to);
                prop_assert_eq!(copy.get(bit), expected, "bit {}", bit);
            }
            let mut both = map.clone();
            both.keep_only(&copy);
            prop_assert!((0..300).all(|bit| both.get(bit) == (map.get(bit) && copy.get(bit))));
            prop_assert_eq!(copy.count(), (0..300).filter(|bit| copy.get(*bit)).count() as u64);
        }

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
