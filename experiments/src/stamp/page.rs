//! The stamp on every page, and what a page turns out to be.
//!
//! A page carries its stamp three times: at its start, at an offset that depends on place and generation, and at
//! its end. One stamp is four words:
//!
//! ```text
//! | magic | place: process, part, page index | generation, writer | checksum of the three |
//! ```
//!
//! So a page that was lost (zero), that came from an older round (stale), that was put together from two versions
//! (torn) or that belongs elsewhere (alien) is recognised by itself, without anything to compare it with but the
//! generation its owner remembers.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use kernel::arena::{PageWords, WORDS_PER_PAGE};

use crate::random::mix;

const MAGIC: u64 = 0x5354_414d_5045_4421;
const STAMP_WORDS: usize = 4;
const TAIL: usize = WORDS_PER_PAGE - STAMP_WORDS;
/// A word that no stamp covers, whatever the place and the generation: for what else a page is to carry.
pub const FREE_WORD: usize = TAIL - 1;

/// The part of a process's memory that a page is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Rewritten by the writer threads.
    Writers = 1,
    /// Written once, then only read, by forked children too.
    Fixed = 2,
    /// Copied on write between the process and forked children.
    Scratch = 3,
    /// Moved, resized and dropped by the churn thread.
    Slices = 4,
    /// Mapped and unmapped by the churn thread.
    Fresh = 5,
    /// In anonymous memory shared by the processes of a tree.
    SharedAnonymous = 6,
    /// In a block from malloc.
    Heap = 8,
    /// In a file mapped by all processes of a tree.
    SharedFile = 7,
}

/// Which page this is, whatever its address: it keeps its place when it is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which process of the tree stamped it.
    pub process: u16,
    /// The part of its memory.
    pub part: Part,
    /// The index in that part when it was stamped.
    pub page: u32,
}

impl Place {
    fn word(self) -> u64 {
        u64::from(self.process) << 48 | (self.part as u64) << 32 | u64::from(self.page)
    }

    /// The same part, `pages` pages on.
    #[must_use]
    pub fn offset(self, pages: usize) -> Self {
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        Self { page: self.page.saturating_add(pages), ..self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:?}/{}", self.process, self.part, self.page)
    }
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Zero from start to end.
    Zero,
    /// An older version of itself; for a page that was dropped, any version.
    Stale {
        /// The generation found.
        found: u32,
    },
    /// A newer version than its owner remembers: then the owner's memory is the stale one.
    Ahead {
        /// The generation found.
        found: u32,
    },
    /// Not one version: the three stamps disagree, or one of them is damaged.
    Torn,
    /// A whole page that belongs to another place.
    Alien {
        /// The place it was stamped for, as in [`Place`]'s display but as numbers.
        place: u64,
    },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("found=0 kind=zero"),
            Self::Stale { found } => write!(f, "found={found} kind=stale"),
            Self::Ahead { found } => write!(f, "found={found} kind=ahead"),
            Self::Torn => f.write_str("found=? kind=torn"),
            Self::Alien { place } => write!(f, "found={place:#x} kind=alien"),
        }
    }
}

type Stamp = [u64; STAMP_WORDS];

fn stamp(place: u64, generation: u32, writer: u32) -> Stamp {
    let version = u64::from(generation) << 32 | u64::from(writer);
    [MAGIC, place, version, mix(MAGIC ^ mix(place ^ mix(version)))]
}

/// Where the second stamp is: anywhere that touches neither the first nor the last.
fn middle(place: u64, generation: u32) -> usize {
    let room = u64::try_from(TAIL - 2 * STAMP_WORDS).unwrap_or(1);
    STAMP_WORDS + usize::try_from(mix(place ^ mix(u64::from(generation))) % room).unwrap_or(0)
}

/// Stamps a page.
pub fn write(words: &PageWords, place: Place, generation: u32, writer: u32) {
    let place = place.word();
    let stamp = stamp(place, generation, writer);
    for at in [0, middle(place, generation), TAIL] {
        for (word, value) in words[at..].iter().zip(stamp) {
            word.store(value, Relaxed);
        }
    }
}

/// Fills what is between the stamps of a page with numbers that depend on the place, then stamps it: for pages that
/// are compared as a whole.
pub fn write_full(words: &PageWords, place: Place, generation: u32, writer: u32) {
    for (word, salt) in words.iter().zip(0_u64..) {
        word.store(mix(place.word() ^ mix(salt ^ u64::from(generation))), Relaxed);
    }
    write(words, place, generation, writer);
}

fn stamp_at(words: &PageWords, at: usize) -> Stamp {
    std::array::from_fn(|index| words[at + index].load(Relaxed))
}

/// What of a page, that should be at `place` with this generation, is wrong. Generation 0 is a page of zeros.
#[must_use]
pub fn verify(words: &PageWords, place: Place, generation: u32) -> Option<Wrong> {
    let head = stamp_at(words, 0);
    if head == [0; STAMP_WORDS] && words.iter().all(|word| word.load(Relaxed) == 0) {
        return (generation != 0).then_some(Wrong::Zero);
    }
    let [_, found_place, version, _] = head;
    let (found, writer) = (upper(version), lower(version));
    let whole = head == stamp(found_place, found, writer)
        && head == stamp_at(words, middle(found_place, found))
        && head == stamp_at(words, TAIL);
    if !whole {
        return Some(Wrong::Torn);
    }
    if found_place != place.word() {
        return Some(Wrong::Alien { place: found_place });
    }
    match found.cmp(&generation) {
        std::cmp::Ordering::Equal => None,
        // A dropped page that shows any version of itself was filled with what it was dropped for.
        _ if generation == 0 => Some(Wrong::Stale { found }),
        std::cmp::Ordering::Less => Some(Wrong::Stale { found }),
        std::cmp::Ordering::Greater => Some(Wrong::Ahead { found }),
    }
}

fn upper(word: u64) -> u32 {
    u32::try_from(word >> 32).unwrap_or(0)
}

fn lower(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    const HERE: Place = Place { process: 0, part: Part::Writers, page: 77 };

    fn blank() -> PageWords {
        std::array::from_fn(|_| AtomicU64::new(0))
    }

    fn stamped(place: Place, generation: u32) -> PageWords {
        let page = blank();
        write(&page, place, generation, 9);
        page
    }

    #[test]
    fn a_page_as_it_was_written_is_right() {
        for generation in 1..500 {
            assert_eq!(verify(&stamped(HERE, generation), HERE, generation), None);
        }
        let page = blank();
        write_full(&page, HERE, 3, 1);
        assert_eq!(verify(&page, HERE, 3), None);
    }

    #[test]
    fn no_stamp_covers_the_free_word() {
        for page in 0..5000 {
            let (place, words) = (HERE.offset(page), blank());
            write(&words, place, 1, 9);
            assert_eq!(words[FREE_WORD].load(Relaxed), 0, "{place}");
            words[FREE_WORD].store(u64::MAX, Relaxed);
            assert_eq!(verify(&words, place, 1), None, "{place}");
        }
    }

    #[test]
    fn a_lost_page_is_zero_and_a_dropped_one_should_be() {
        assert_eq!(verify(&blank(), HERE, 4), Some(Wrong::Zero));
        assert_eq!(verify(&blank(), HERE, 0), None);
        assert_eq!(verify(&stamped(HERE, 4), HERE, 0), Some(Wrong::Stale { found: 4 }));
    }

    #[test]
    fn an_older_version_is_stale_and_a_newer_one_ahead() {
        let page = stamped(HERE, 4);
        write(&page, HERE, 5, 9);
        assert_eq!(verify(&page, HERE, 6), Some(Wrong::Stale { found: 5 }));
        assert_eq!(verify(&page, HERE, 4), Some(Wrong::Ahead { found: 5 }));
    }

    #[test]
    fn any_lost_or_old_part_makes_a_page_torn() {
        let (old, new) = (stamped(HERE, 4), stamped(HERE, 4));
        write(&new, HERE, 5, 9);
        let in_middle = middle(HERE.word(), 5);
        for at in [0, in_middle, TAIL] {
            let page: PageWords = std::array::from_fn(|word| AtomicU64::new(new[word].load(Relaxed)));
            page[at..at + STAMP_WORDS].iter().for_each(|word| word.store(0, Relaxed));
            assert_eq!(verify(&page, HERE, 5), Some(Wrong::Torn), "zeros at word {at}");
        }
        for cut in [STAMP_WORDS, 256, TAIL] {
            let page: PageWords = std::array::from_fn(|word| {
                AtomicU64::new(if word < cut { &new } else { &old }[word].load(Relaxed))
            });
            assert_eq!(verify(&page, HERE, 5), Some(Wrong::Torn), "old from word {cut}");
        }
        let page = stamped(HERE, 5);
        page[2].fetch_xor(1, Relaxed);
        assert_eq!(verify(&page, HERE, 5), Some(Wrong::Torn), "one bit");
    }

    #[test]
    fn a_page_of_another_place_is_alien_whatever_its_generation() {
        for other in [HERE.offset(1), Place { process: 1, ..HERE }, Place { part: Part::Slices, ..HERE }] {
            let found = verify(&stamped(other, 5), HERE, 5);
            assert_eq!(found, Some(Wrong::Alien { place: other.word() }), "{other}");
        }
    }
}
