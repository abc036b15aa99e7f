//! One thread that maps, unmaps, moves, resizes and drops memory, for as long as the process lives.
//!
//! Most of it happens to slices of the arena. After a move of the process such a slice is, page by page, still on
//! the source until somebody touches it, and the thread touches few pages of each: so whole slices are moved,
//! dropped or unmapped before they have arrived, and what was at an address is soon somewhere else.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use kernel::arena::{Region, Target};

use super::gate::Work;
use super::journal::{Journal, Progress};
use super::page::{Part, Place, Wrong};
use super::slice::{Generations, PLACES_PER_SLICE, SLICE_PAGES_MAX, SLICE_PAGES_MIN, Slice, cut_sizes};
use crate::random::{Random, mix};

/// Pause between operations: slow enough to last through a move, fast enough to run into everything it does.
const PAUSE_US: RangeInclusive<u64> = 200..=2000;
/// Pages that an operation looks at in the slice it chose.
const LOOKS: usize = 4;
/// Fresh mappings and heap blocks kept at a time, and vacated addresses remembered.
const FRESH_MAX: usize = 8;
const BLOCKS_MAX: usize = 4;
const HOLES_MAX: usize = 16;
/// Pages of a slice as the arena is cut.
const SLICE_PAGES: RangeInclusive<u64> = 16..=256;
/// Words in a heap block, one in so many written. From 256 KiB to 4 MiB: both sides of malloc's mmap threshold.
const BLOCK_WORDS: RangeInclusive<u64> = (32 << 10)..=(512 << 10);
const BLOCK_STEP: usize = 256;

struct Block {
    words: Vec<u64>,
    seed: u64,
}

/// The thread that changes mappings.
pub(super) struct Churn {
    process: u16,
    slices: Vec<Slice>,
    fresh: Vec<Slice>,
    fresh_serial: u32,
    blocks: Vec<Block>,
    holes: Vec<(usize, usize)>,
    generations: Generations,
    random: Random,
    journal: Arc<Journal>,
    progress: Arc<Progress>,
}

impl Churn {
    /// Cuts `region` into slices and stamps them.
    #[must_use]
    pub(super) fn new(process: u16, mut region: Region, journal: Arc<Journal>) -> Self {
        let mut churn = Self {
            process,
            slices: Vec::new(),
            fresh: Vec::new(),
            fresh_serial: 0,
            blocks: Vec::new(),
            holes: Vec::new(),
            generations: Generations::default(),
            random: Random::new(0xc4 + u64::from(process)),
            journal,
            progress: Arc::default(),
        };
        let sizes = cut_sizes(region.pages(), *SLICE_PAGES.start(), *SLICE_PAGES.end(), &mut churn.random);
        for (number, size) in sizes.into_iter().enumerate() {
            let rest = (size < region.pages()).then(|| region.split_off(size));
            let first = Place { process, part: Part::Slices, page: 0 }.offset(number * PLACES_PER_SLICE);
            churn.slices.push(Slice::stamped(region, first, &mut churn.generations));
            let Some(rest) = rest else { break };
            region = rest;
        }
        churn
    }

    /// Where it counts its operations.
    #[must_use]
    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn pick(&mut self) -> usize {
        self.random.below(self.slices.len())
    }

    /// Looks at a few pages of a slice; writes to about half of them.
    fn look(&mut self, index: usize) {
        for _ in 0..LOOKS {
            let page = self.random.below(self.slices[index].pages());
            if self.random.below(2) == 0 {
                self.slices[index].rewrite(page, &mut self.generations, &self.journal);
            } else {
                self.slices[index].check(page, &self.journal);
            }
        }
    }

    fn report(&self, operation: &str, result: std::io::Result<()>) {
        if let Err(error) = result {
            self.journal.failed(operation, &error);
        }
    }

    fn relocate(&mut self) {
        let index = self.pick();
        let left = self.slices[index].extent();
        let fitting = self.holes.iter().position(|hole| hole.1 >= left.1);
        let hole = fitting.filter(|_| self.random.below(2) == 0).map(|hole| self.holes.swap_remove(hole));
        // A hole may have been filled since by malloc or another thread: then it is no hole any more.
        let went = hole.is_some_and(|hole| self.slices[index].relocate(Target::At(hole.0)).is_ok());
        if !went {
            let result = self.slices[index].relocate(Target::Anywhere);
            self.report("mremap-move", result);
        }
        if self.holes.len() == HOLES_MAX {
            self.holes.swap_remove(0);
        }
        self.holes.push(left);
        self.look(index);
    }

    /// Moves one slice onto another that nobody has looked at, and maps a new one for that.
    fn overlay(&mut self) {
        if self.slices.len() < 2 {
            return;
        }
        let index = self.pick();
        let mut slice = self.slices.swap_remove(index);
        let victim = self.pick();
        if self.slices[victim].pages() >= slice.pages() {
            let victim = self.slices.swap_remove(victim);
            let (first, pages) = (victim.first(), victim.pages());
            let result = slice.relocate_over(victim);
            self.report("mremap-over", result);
            self.map_slice(first, pages);
        }
        self.slices.push(slice);
        self.look(self.slices.len() - 1);
    }

    /// Unmaps a slice as it is, and maps a new one for it.
    fn replace(&mut self) {
        let index = self.pick();
        let slice = self.slices.swap_remove(index);
        let (first, pages) = (slice.first(), slice.pages());
        drop(slice);
        self.map_slice(first, pages);
    }

    fn map_slice(&mut self, first: Place, pages: usize) {
        match Region::anonymous(pages) {
            Ok(region) => self.slices.push(Slice::stamped(region, first, &mut self.generations)),
            Err(error) => self.journal.failed("mmap", &error),
        }
    }

    fn discard(&mut self) {
        let index = self.pick();
        let pages = self.slices[index].pages();
        let from = self.random.below(pages);
        let to = from + 1 + self.random.below(pages - from);
        let result = self.slices[index].discard(from..to);
        self.report("madvise-dontneed", result);
        // Half of the time nobody looks: these pages then have to be zero whenever somebody does.
        if self.random.below(2) == 0 {
            self.look(index);
        }
    }

    fn resize(&mut self) {
        let index = self.pick();
        let pages = self.slices[index].pages();
        let by = 1 + self.random.below(64);
        let grow = self.random.below(2) == 0;
        let new = if grow { (pages + by).min(SLICE_PAGES_MAX) } else { pages.saturating_sub(by) };
        let new = new.max(SLICE_PAGES_MIN.min(pages));
        if new != pages {
            let result = self.slices[index].resize(new);
            self.report("mremap-resize", result);
        }
        self.look(index);
    }

    fn fresh(&mut self) {
        if self.fresh.len() == FRESH_MAX {
            let oldest = self.random.below(FRESH_MAX);
            self.fresh.swap_remove(oldest).verify(&mut self.generations, &self.journal);
        }
        self.fresh_serial = self.fresh_serial.wrapping_add(1);
        let page = self.fresh_serial.wrapping_mul(512);
        let pages = 1 + self.random.below(PLACES_PER_SLICE / 2);
        match Region::anonymous(pages) {
            Err(error) => self.journal.failed("mmap", &error),
            Ok(region) => {
                let first = Place { process: self.process, part: Part::Fresh, page };
                let mut slice = Slice::stamped(region, first, &mut self.generations);
                let result = slice.resize(1 + self.random.below(PLACES_PER_SLICE / 2));
                self.report("mremap-fresh", result);
                self.fresh.push(slice);
            }
        }
    }

    fn heap(&mut self) {
        if self.blocks.len() == BLOCKS_MAX {
            let oldest = self.blocks.remove(0);
            self.check_block(&oldest);
        }
        let words =
            usize::try_from(self.random.between(*BLOCK_WORDS.start(), *BLOCK_WORDS.end())).unwrap_or(0);
        let seed = self.random.next() >> 1;
        let mut words = vec![0; words];
        for (word, salt) in words.iter_mut().step_by(BLOCK_STEP).zip(seed..) {
            *word = mix(salt);
        }
        self.blocks.push(Block { words, seed });
    }

    fn check_block(&self, block: &Block) {
        for (index, (word, salt)) in block.words.iter().step_by(BLOCK_STEP).zip(block.seed..).enumerate() {
            if *word != mix(salt) {
                let place = Place { process: self.process, part: Part::Heap, page: 0 }.offset(index / 2);
                let wrong = if *word == 0 { Wrong::Zero } else { Wrong::Torn };
                self.journal.wrong_page(place, 1, wrong);
            }
        }
    }
}

impl Work for Churn {
    fn step(&mut self) {
        match self.random.below(100) {
            0..25 => {
                let index = self.pick();
                self.look(index);
            }
            25..47 => self.relocate(),
            47..60 => self.discard(),
            60..72 => self.resize(),
            72..76 => self.replace(),
            76..80 => self.overlay(),
            80..92 => self.fresh(),
            _ => self.heap(),
        }
        self.progress.operation(u64::try_from(LOOKS).unwrap_or(0));
        std::thread::sleep(Duration::from_micros(self.random.between(*PAUSE_US.start(), *PAUSE_US.end())));
    }

    fn verify(&mut self) -> u64 {
        let mut pages = 0;
        for slice in self.slices.iter_mut().chain(&mut self.fresh) {
            pages += slice.verify(&mut self.generations, &self.journal);
        }
        for block in &self.blocks {
            self.check_block(block);
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::StatusLog;

    #[test]
    fn a_process_that_stays_where_it_is_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        let journal = Arc::new(Journal::new(StatusLog::new(status.clone())));
        let mut churn = Churn::new(1, Region::anonymous(1024).unwrap(), Arc::clone(&journal));
        for _ in 0..600 {
            churn.step();
        }
        assert!(churn.verify() > 100);
        let wrong = std::fs::read_to_string(&status).unwrap_or_default();
        assert_eq!(journal.wrong_count(), 0, "{wrong}");
    }
}
