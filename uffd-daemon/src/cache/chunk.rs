//! Pages that lie together: 2 MiB of addresses, of which some pages are kept.

use std::io;
use std::ops::Range;

use kernel::anonymous::Anonymous;
use protocol::bitmap::Bitmap;
use protocol::units::{ImageAddr, PAGE_SIZE, bytes_to_pages, pages_to_bytes};

use crate::limits;

/// Pages of a chunk: one mapping and one table of pages in the kernel.
pub(super) const CHUNK_PAGES: u64 = 512;

/// Pages of a block: what is installed together, and gives its memory back together. A system call for each of two pages costs
/// more than they take.
pub(super) const BLOCK_PAGES: u64 = limits::INSTALL_SLICE_PAGES as u64;

/// What pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// These bytes: whole pages.
    Pages(&'a [u8]),
    /// Zeros, so many pages of them.
    Zeros(u64),
}

impl Content<'_> {
    /// Number of pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        match self {
            Self::Pages(bytes) => bytes_to_pages(bytes.len() as u64),
            Self::Zeros(pages) => *pages,
        }
    }
}

/// The parts of a range of addresses: the number of a chunk, and pages within it.
pub(super) fn parts(start: ImageAddr, pages: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    let first = bytes_to_pages(start.get());
    let end = first + pages;
    let mut at = first;
    std::iter::from_fn(move || {
        let (chunk, from) = (at / CHUNK_PAGES, at % CHUNK_PAGES);
        let to = CHUNK_PAGES.min(from + end.saturating_sub(at));
        at += to - from;
        (from < to).then_some((chunk, from..to))
    })
}

/// The address of a page of a chunk.
pub(super) const fn address(chunk: u64, page: u64) -> ImageAddr {
    ImageAddr::containing(pages_to_bytes(chunk * CHUNK_PAGES + page))
}

#[derive(Debug)]
pub(super) struct Chunk {
    memory: Anonymous,
    /// Pages whose content is in `memory`.
    data: Bitmap,
    /// Pages that hold zeros.
    zeros: Bitmap,
    /// Pages that take memory.
    resident: Bitmap,
    /// Of each page that is kept, the round of its last copy; 255 for all later ones.
    rounds: Vec<u8>,
}

#[allow(clippy::cast_possible_truncation)] // a page of a chunk
const fn index(page: u64) -> usize {
    page as usize
}

const fn indices(pages: &Range<u64>) -> Range<usize> {
    index(pages.start)..index(pages.end)
}

const fn bytes(pages: &Range<u64>) -> Range<usize> {
    index(pages.start) * PAGE_SIZE..index(pages.end) * PAGE_SIZE
}

impl Chunk {
    pub(super) fn new() -> io::Result<Self> {
        let clear = || Bitmap::clear(CHUNK_PAGES);
        let memory = Anonymous::new(bytes(&(0..CHUNK_PAGES)).end)?;
        let rounds = vec![0; index(CHUNK_PAGES)];
        Ok(Self { memory, data: clear(), zeros: clear(), resident: clear(), rounds })
    }

    /// How many of these pages are kept.
    pub(super) fn kept_in(&self, pages: &Range<u64>) -> u64 {
        self.data.count_range(pages.start, pages.end) + self.zeros.count_range(pages.start, pages.end)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept_in(&(0..CHUNK_PAGES)) == 0
    }

    /// Keeps what `fill` writes; nothing of these pages if it fails.
    pub(super) fn fill(
        &mut self,
        pages: Range<u64>,
        round: u8,
        fill: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.forget(&pages);
        self.resident.set_range(pages.start, pages.end);
        fill(&mut self.memory[bytes(&pages)])?;
        self.data.set_range(pages.start, pages.end);
        self.rounds[indices(&pages)].fill(round);
        Ok(())
    }

    /// Keeps zeros.
    pub(super) fn zero(&mut self, pages: Range<u64>, round: u8) {
        self.forget(&pages);
        self.give_back(&pages);
        self.zeros.set_range(pages.start, pages.end);
        self.rounds[indices(&pages)].fill(round);
    }

    /// Keeps these pages no longer; says how many it had. Their memory is taken until their block is [given back](Chunk::give_back).
    pub(super) fn forget(&mut self, pages: &Range<u64>) -> u64 {
        self.data.unset_range(pages.start, pages.end) + self.zeros.unset_range(pages.start, pages.end)
    }

    /// Gives back the memory of each block of these pages that keeps none.
    pub(super) fn give_back(&mut self, pages: &Range<u64>) {
        let mut at = pages.start - pages.start % BLOCK_PAGES;
        let end = pages.end.next_multiple_of(BLOCK_PAGES);
        while at < end {
            // As many blocks together as have no page between them.
            let kept = self.data.run_in(at, end).map_or(end, |(page, _)| page - page % BLOCK_PAGES);
            while let Some((first, behind)) = self.resident.run_in(at, kept) {
                self.resident.unset_range(first, behind);
                // It cannot fail for memory that is mapped; at the latest the whole chunk is unmapped.
                let _ = self.memory.give_back(bytes(&(first..behind)));
            }
            at = kept + BLOCK_PAGES;
        }
    }

    /// Which of `wanted` are not kept: a bit for each of the 64 pages from `first` on.
    pub(super) fn lacks(&self, first: u64, wanted: u64) -> u64 {
        wanted & !(self.data.word_at(first) | self.zeros.word_at(first))
    }

    /// Keeps no others than those in `wanted`.
    pub(super) fn keep_only(&mut self, wanted: &Bitmap) {
        self.data.keep_only(wanted);
        self.zeros.keep_only(wanted);
    }

    /// The first of these pages that are kept and hold the same kind of content: their number, and the content.
    pub(super) fn run_in(&self, pages: &Range<u64>) -> Option<(u64, Content<'_>)> {
        let data = self.data.run_in(pages.start, pages.end);
        let zeros = self.zeros.run_in(pages.start, pages.end);
        match (data, zeros) {
            (Some((first, end)), zeros) if zeros.is_none_or(|zeros| first < zeros.0) => {
                Some((first, Content::Pages(&self.memory[bytes(&(first..end))])))
            }
            (_, zeros) => zeros.map(|(first, end)| (first, Content::Zeros(end - first))),
        }
    }

    /// The first pages that are kept and were last copied in this round.
    pub(super) fn run_of(&self, round: u8) -> Option<Range<u64>> {
        let of_round = |page: &u64| self.is_kept(*page) && self.rounds[index(*page)] == round;
        let first = (0..CHUNK_PAGES).find(of_round)?;
        let end = (first..CHUNK_PAGES).find(|page| !of_round(page)).unwrap_or(CHUNK_PAGES);
        Some(first..end)
    }

    fn is_kept(&self, page: u64) -> bool {
        self.data.get(page) || self.zeros.get(page)
    }

    /// The rounds that pages were last copied in.
    pub(super) fn rounds(&self) -> impl Iterator<Item = u8> {
        let mut found = [false; 256];
        for (page, round) in (0..).zip(&self.rounds) {
            found[usize::from(*round)] |= self.is_kept(page);
        }
        (0..=u8::MAX).zip(found).filter(|(_, found)| *found).map(|(round, _)| round)
    }
}
