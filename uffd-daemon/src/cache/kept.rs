//! The clean pages of one task, until they are installed.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::TaskMap;

use super::CacheError;
use super::chunk::{BLOCK_PAGES, CHUNK_PAGES, Chunk, Content, address, parts};

/// Clean pages that lie together and hold the same kind of content. Indices are within the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptRun<'a> {
    /// Index of the first.
    pub first: u64,
    /// What they hold.
    pub content: Content<'a>,
}

/// The clean pages of one task.
#[derive(Debug)]
pub struct Kept {
    /// By index within the family.
    here: Bitmap,
    pages: u64,
    chunks: BTreeMap<u64, Chunk>,
    /// Rounds and the chunks with pages that were last copied in them: the next to install last.
    order: Vec<(u8, Reverse<u64>)>,
    /// Chunks that may have memory of pages that are not clean, and are not in `order` yet.
    unsorted: Vec<u64>,
}

/// Pages last copied in this round or later count as hot: they were written while the task was copied.
pub(super) const HOT_ROUND: u8 = 2;

impl Kept {
    /// Those of `chunks` that are clean; `clean` is by the numbers of the whole map, of which `map` is a part. Chunks
    /// without a clean page become unneeded.
    pub(super) fn new(
        map: &TaskMap,
        clean: &Bitmap,
        chunks: BTreeMap<u64, Chunk>,
        unneeded: &mut Vec<Chunk>,
    ) -> Result<Self, CacheError> {
        let mut here = Bitmap::clear(map.pages);
        let mut wanted: BTreeMap<u64, Bitmap> = BTreeMap::new();
        for indexed in &map.runs {
            let mut index = indexed.first;
            for (number, range) in parts(indexed.run.start, indexed.run.pages) {
                for at in range.clone().step_by(64) {
                    let among = range.end - at;
                    let mask = if among < 64 { !(u64::MAX << among) } else { u64::MAX };
                    let bits = clean.word_at(index + at - range.start) & mask;
                    if bits == 0 {
                        continue;
                    }
                    let lacking = chunks.get(&number).map_or(bits, |chunk| chunk.lacks(at, bits));
                    if lacking != 0 {
                        let at = address(number, at + u64::from(lacking.trailing_zeros()));
                        return Err(CacheError::NotKept { task: map.id, at });
                    }
                    wanted.entry(number).or_insert_with(|| Bitmap::clear(CHUNK_PAGES)).set_word(at, bits);
                    here.set_word(index + at - range.start - map.first, bits);
                }
                index += range.end - range.start;
            }
        }
        let mut wanted_chunks = BTreeMap::new();
        for (number, mut chunk) in chunks {
            match wanted.get(&number) {
                Some(wanted) => {
                    chunk.keep_only(wanted);
                    wanted_chunks.insert(number, chunk);
                }
                None => unneeded.push(chunk),
            }
        }
        let (pages, unsorted) = (here.count(), wanted_chunks.keys().copied().collect());
        Ok(Self { here, pages, chunks: wanted_chunks, order: Vec::new(), unsorted })
    }

    /// Whether the page with this index is here.
    #[must_use]
    pub fn has(&self, index: u64) -> bool {
        self.here.get(index)
    }

    /// How many pages are here.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The first run of pages in `first..end` that are here, as first index and first index behind.
    #[must_use]
    pub fn indices_in(&self, first: u64, end: u64) -> Option<(u64, u64)> {
        self.here.run_in(first, end)
    }

    /// The first run of pages in `first..end` that are here, with what they hold.
    #[must_use]
    pub fn run_in(&self, map: &TaskMap, first: u64, end: u64) -> Option<KeptRun<'_>> {
        let (first, end) = self.here.run_in(first, end)?;
        let (addr, follow) = map.locate(map.first + first)?;
        let (number, range) = parts(addr, follow.min(end - first)).next()?;
        let (start, content) = self.chunks.get(&number)?.run_in(&range)?;
        (start == range.start).then_some(KeptRun { first, content })
    }

    /// These pages are not needed any more.
    pub fn forget(&mut self, map: &TaskMap, first: u64, end: u64) {
        let mut from = first;
        while let Some((start, stop)) = self.here.run_in(from, end) {
            let Some((addr, follow)) = map.locate(map.first + start) else { return };
            let pages = follow.min(stop - start);
            for (number, range) in parts(addr, pages) {
                self.drop_pages(number, &range);
            }
            self.pages -= self.here.unset_range(start, start + pages);
            from = start + pages;
        }
    }

    fn drop_pages(&mut self, number: u64, range: &Range<u64>) {
        let Some(chunk) = self.chunks.get_mut(&number) else { return };
        chunk.forget(range);
        if chunk.is_empty() {
            self.chunks.remove(&number);
        } else {
            chunk.give_back(range);
        }
    }

    /// Where to install next: the pages of a block behind one that was last copied in round `least` or later, the latest copies
    /// first, by address within a round. They stay here until they are [forgotten](Kept::forget).
    pub fn next(&mut self, map: &TaskMap, least: u8) -> Option<Range<u64>> {
        while self.sort_out() {}
        loop {
            let (round, Reverse(number)) = *self.order.last().filter(|(round, _)| *round >= least)?;
            let found = self.chunks.get(&number).and_then(|chunk| chunk.run_of(round));
            let place = found.and_then(|pages| Some((map.index_of(address(number, pages.start))?, pages)));
            let Some((index, pages)) = place else {
                self.order.pop();
                continue;
            };
            let first = index - map.first;
            // Where the block is not lazy as a whole, these reach into the next.
            return Some(first..map.pages.min(first + BLOCK_PAGES - pages.start % BLOCK_PAGES));
        }
    }

    /// Gives back the memory of pages of one chunk that are not clean, and looks when its clean ones were copied; false once
    /// that is done for all.
    pub fn sort_out(&mut self) -> bool {
        let Some(number) = self.unsorted.pop() else { return false };
        if let Some(chunk) = self.chunks.get_mut(&number) {
            chunk.give_back(&(0..CHUNK_PAGES));
            self.order.extend(chunk.rounds().map(|round| (round, Reverse(number))));
        }
        if self.unsorted.is_empty() {
            self.order.sort_unstable();
        }
        true
    }
}
