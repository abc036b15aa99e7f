//! The index: from the address of a page to a level and an offset. Pure.

use std::fmt;

use super::error::PagesError;
use crate::criu::images::PagemapEntry;
use crate::criu::limits::MAX_PARENT_DEPTH;
use crate::units::{ImageAddr, pages_to_bytes};

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a pages file.
    Data {
        /// Level in the chain, 0 for the top.
        level: usize,
        /// Offset in the pages file of that level, in bytes.
        offset: u64,
        /// How many pages, with this one, follow each other in the file and in memory. At least 1; an entry at any
        /// level ends it, so it may go on behind.
        contiguous_pages: u64,
    },
    /// Not in the images: left on the source by `criu dump --lazy-pages`.
    LazyElsewhere {
        /// How many pages, with this one, are so. At least 1.
        contiguous_pages: u64,
    },
    /// In no entry of the top level: never touched, or zero, or not memory at all. Reads as zero after restore.
    Absent,
    /// Promised by a level above, but not there: a parent directory is missing or is another one.
    Missing {
        /// The level that should have it.
        level: usize,
    },
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data { level, offset, .. } => write!(f, "at offset {offset:#x} of level {level}"),
            Self::LazyElsewhere { .. } => f.write_str("left on the source"),
            Self::Absent => f.write_str("never dumped"),
            Self::Missing { level } => write!(f, "parent images of level {level} should have it"),
        }
    }
}

/// Pagemaps of one task, from the top down its parents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageIndex {
    levels: Vec<Level>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Level {
    entries: Vec<Indexed>,
    data_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Indexed {
    entry: PagemapEntry,
    /// Where the data of the entry starts, if it has any.
    offset: u64,
}

impl PageIndex {
    /// An index over the pagemaps of a task: of the dump itself, of its parent, and so on.
    ///
    /// # Errors
    /// [`PagesError::Unsorted`] or [`PagesError::TooDeep`].
    pub fn new(chain: impl IntoIterator<Item = Vec<PagemapEntry>>) -> Result<Self, PagesError> {
        let mut levels = Vec::new();
        for entries in chain {
            if levels.len() > MAX_PARENT_DEPTH {
                return Err(PagesError::TooDeep);
            }
            levels.push(Level::new(levels.len(), entries)?);
        }
        Ok(Self { levels })
    }

    /// Number of levels.
    #[must_use]
    pub fn levels(&self) -> usize {
        self.levels.len()
    }

    /// Bytes that the pages file of `level` must have; 0 if there is no such level.
    #[must_use]
    pub fn data_bytes(&self, level: usize) -> u64 {
        self.levels.get(level).map_or(0, |level| level.data_bytes)
    }

    /// Where the page at `addr` is.
    #[must_use]
    pub fn locate(&self, addr: ImageAddr) -> Location {
        let mut contiguous_pages = u64::MAX;
        for (level, pagemap) in self.levels.iter().enumerate() {
            let Some(Indexed { entry, offset }) = pagemap.find(addr) else {
                return if level == 0 { Location::Absent } else { Location::Missing { level } };
            };
            contiguous_pages = contiguous_pages.min(entry.run.end().pages_since(addr));
            if entry.flags.parent {
                continue;
            }
            if entry.flags.present {
                let offset = offset.saturating_add(pages_to_bytes(addr.pages_since(entry.run.start)));
                return Location::Data { level, offset, contiguous_pages };
            }
            // What a parent left on its source went away with that source.
            return if level == 0 {
                Location::LazyElsewhere { contiguous_pages }
            } else {
                Location::Missing { level }
            };
        }
        match self.levels.len() {
            0 => Location::Absent,
            level => Location::Missing { level },
        }
    }
}

impl Level {
    fn new(level: usize, entries: Vec<PagemapEntry>) -> Result<Self, PagesError> {
        let mut indexed = Vec::with_capacity(entries.len());
        let (mut data_bytes, mut previous_end) = (0_u64, ImageAddr::default());
        for entry in entries {
            if entry.run.start < previous_end {
                return Err(PagesError::Unsorted { level, start: entry.run.start });
            }
            previous_end = entry.run.end();
            indexed.push(Indexed { entry, offset: data_bytes });
            if entry.flags.present {
                // Runs that do not overlap fit the address space together, so this does not saturate.
                data_bytes = data_bytes.saturating_add(pages_to_bytes(entry.run.pages));
            }
        }
        Ok(Self { entries: indexed, data_bytes })
    }

    fn find(&self, addr: ImageAddr) -> Option<Indexed> {
        let behind = self.entries.partition_point(|indexed| indexed.entry.run.start <= addr);
        let found = self.entries.get(behind.checked_sub(1)?)?;
        found.entry.run.contains(addr).then_some(*found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::criu::images::PageFlags;
    use crate::units::{PAGE_BYTES, PageRun};

    fn page(number: u64) -> ImageAddr {
        ImageAddr::aligned(number * PAGE_BYTES).unwrap()
    }

    fn entry(start: u64, pages: u64, flags: PageFlags) -> PagemapEntry {
        PagemapEntry { run: PageRun::new(page(start), pages).unwrap(), flags, wide: true }
    }

    fn data(level: usize, offset_pages: u64, contiguous_pages: u64) -> Location {
        Location::Data { level, offset: offset_pages * PAGE_BYTES, contiguous_pages }
    }

    #[test]
    fn offsets_count_present_pages_only() {
        let entries = vec![
            entry(1, 2, PageFlags::PRESENT),
            entry(3, 5, PageFlags::LAZY),
            entry(9, 3, PageFlags::LAZY_PRESENT),
            entry(12, 1, PageFlags::PARENT),
            entry(13, 1, PageFlags::PRESENT),
        ];
        let index = PageIndex::new([entries]).unwrap();
        assert_eq!(index.locate(page(0)), Location::Absent);
        assert_eq!(index.locate(page(2)), data(0, 1, 1));
        assert_eq!(index.locate(page(4)), Location::LazyElsewhere { contiguous_pages: 4 });
        assert_eq!(index.locate(page(8)), Location::Absent);
        assert_eq!(index.locate(page(9)), data(0, 2, 3));
        assert_eq!(index.locate(page(12)), Location::Missing { level: 1 });
        assert_eq!(index.locate(page(13)), data(0, 5, 1));
        assert_eq!(index.locate(page(14)), Location::Absent);
        assert_eq!(index.data_bytes(0), 6 * PAGE_BYTES);
        assert_eq!(index.data_bytes(1), 0);
    }

    #[test]
    fn parent_entries_are_split_by_the_levels_below() {
        let index = PageIndex::new([
            vec![entry(10, 8, PageFlags::PARENT)],
            vec![
                entry(8, 4, PageFlags::PRESENT),
                entry(12, 3, PageFlags::PARENT),
                entry(15, 1, PageFlags::LAZY),
            ],
            vec![entry(12, 1, PageFlags::PRESENT), entry(14, 9, PageFlags::LAZY_PRESENT)],
        ])
        .unwrap();
        assert_eq!(index.levels(), 3);
        assert_eq!(index.locate(page(10)), data(1, 2, 2));
        assert_eq!(index.locate(page(12)), data(2, 0, 1));
        assert_eq!(index.locate(page(13)), Location::Missing { level: 2 });
        assert_eq!(index.locate(page(14)), data(2, 1, 1));
        assert_eq!(index.locate(page(15)), Location::Missing { level: 1 });
        assert_eq!(index.locate(page(16)), Location::Missing { level: 1 });
        assert_eq!(index.locate(page(9)), Location::Absent);
    }

    #[test]
    fn unsorted_entries_are_refused() {
        let entries = vec![entry(5, 2, PageFlags::PRESENT), entry(6, 2, PageFlags::PRESENT)];
        let error = PageIndex::new([vec![], entries]).unwrap_err();
        assert!(matches!(error, PagesError::Unsorted { level: 1, start } if start == page(6)));
    }

    #[test]
    fn too_many_levels_are_refused() {
        assert!(PageIndex::new(vec![vec![]; MAX_PARENT_DEPTH + 1]).is_ok());
        let error = PageIndex::new(vec![vec![]; MAX_PARENT_DEPTH + 2]).unwrap_err();
        assert!(matches!(error, PagesError::TooDeep));
    }

    #[test]
    fn no_level_has_nothing() {
        assert_eq!(PageIndex::new([]).unwrap().locate(page(1)), Location::Absent);
    }

    const PAGES: usize = 40;
    /// One level of a naive model: what each page is, if it is in an entry.
    type Model = Vec<Option<PageFlags>>;

    fn level() -> impl Strategy<Value = Model> {
        let flags = proptest::sample::select(vec![
            None,
            Some(PageFlags::PARENT),
            Some(PageFlags::LAZY),
            Some(PageFlags::PRESENT),
            Some(PageFlags::LAZY_PRESENT),
        ]);
        // Runs, so that entries are longer than a page.
        proptest::collection::vec((flags, 1_usize..8), PAGES).prop_map(|runs| {
            runs.into_iter().flat_map(|(flags, pages)| vec![flags; pages]).take(PAGES).collect()
        })
    }

    fn entries(model: &Model) -> Vec<PagemapEntry> {
        let mut entries: Vec<PagemapEntry> = Vec::new();
        for (number, flags) in (0..).zip(model) {
            let Some(flags) = *flags else { continue };
            match entries.last_mut() {
                Some(last) if last.flags == flags && last.run.end() == page(number) => last.run.pages += 1,
                _ => entries.push(entry(number, 1, flags)),
            }
        }
        entries
    }

    fn naive(models: &[Model], number: usize) -> Option<(usize, u64)> {
        for (level, model) in models.iter().enumerate() {
            let flags = model[number]?;
            if flags.present {
                let below = model[..number].iter().flatten().filter(|flags| flags.present).count();
                return Some((level, u64::try_from(below).unwrap() * PAGE_BYTES));
            }
            if !flags.parent {
                return None;
            }
        }
        None
    }

    proptest! {
        #[test]
        fn every_page_is_where_the_model_says(models in proptest::collection::vec(level(), 1..5)) {
            let index = PageIndex::new(models.iter().map(entries)).unwrap();
            for number in 0..PAGES {
                let location = index.locate(page(u64::try_from(number).unwrap()));
                match location {
                    Location::Data { level, offset, contiguous_pages } => {
                        prop_assert!(contiguous_pages > 0);
                        for step in 0..usize::try_from(contiguous_pages).unwrap() {
                            let at = offset + u64::try_from(step).unwrap() * PAGE_BYTES;
                            prop_assert_eq!(naive(&models, number + step), Some((level, at)));
                        }
                    }
                    other => {
                        prop_assert_eq!(naive(&models, number), None);
                        prop_assert_eq!(other == Location::Absent, models[0][number].is_none());
                        let lazy = models[0][number] == Some(PageFlags::LAZY);
                        prop_assert_eq!(matches!(other, Location::LazyElsewhere { .. }), lazy);
                    }
                }
            }
        }
    }
}
