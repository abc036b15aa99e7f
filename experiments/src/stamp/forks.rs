//! Forks children that check their copy of the memory, while the parent goes on writing to what it shares with them.

use std::sync::Arc;
use std::time::Duration;

use kernel::arena::{ChildVerdict, ForkCheck, Region, digest, fork_check};

use super::gate::Work;
use super::journal::{Journal, Progress};
use super::page::{self, Place, Wrong};
use crate::random::Random;

/// Pages that every child and the parent both write, each to its own copy.
pub(super) const SCRATCH_PAGES: usize = 64;
/// How many pages a child looks at: enough to meet pages that have not arrived, few enough to end soon.
const SAMPLES: std::ops::RangeInclusive<u64> = 200..=2000;
/// Pause between two children.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 20..=50;

/// A part of the arena with what its pages should be.
struct Known {
    region: Region,
    first: Place,
    generations: Vec<u32>,
    digests: Vec<u64>,
}

impl Known {
    fn new(region: Region, first: Place) -> Self {
        let pages = region.pages();
        let mut known = Self { region, first, generations: vec![0; pages], digests: vec![0; pages] };
        for page in 0..pages {
            known.write(page);
        }
        known
    }

    fn write(&mut self, page: usize) {
        self.generations[page] += 1;
        let words = self.region.page(page);
        page::write_full(words, self.first.offset(page), self.generations[page], 0);
        self.digests[page] = digest(words);
    }

    fn verify(&self, journal: &Journal) {
        for page in 0..self.region.pages() {
            let (words, place, expected) =
                (self.region.page(page), self.first.offset(page), self.generations[page]);
            if journal.check(words, place, expected) && digest(words) != self.digests[page] {
                journal.wrong_page(place, expected, Wrong::Torn);
            }
        }
    }
}

/// The thread that forks.
pub(super) struct Forker {
    fixed: Known,
    scratch: Known,
    random: Random,
    journal: Arc<Journal>,
    progress: Arc<Progress>,
}

impl Forker {
    /// Fills both regions: `fixed` for good, `scratch` is written again with every fork.
    #[must_use]
    pub(super) fn new(fixed: (Region, Place), scratch: (Region, Place), journal: Arc<Journal>) -> Self {
        let random = Random::new(0xf0 + u64::from(fixed.1.process));
        Self {
            fixed: Known::new(fixed.0, fixed.1),
            scratch: Known::new(scratch.0, scratch.1),
            random,
            journal,
            progress: Arc::default(),
        }
    }

    /// Where it counts its children and the pages they looked at.
    #[must_use]
    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn fork_and_check(&mut self) -> std::io::Result<ChildVerdict> {
        let samples = self.random.between(*SAMPLES.start(), *SAMPLES.end());
        let child = fork_check(ForkCheck {
            fixed: &self.fixed.region,
            fixed_digests: &self.fixed.digests,
            samples: usize::try_from(samples).unwrap_or(0),
            seed: self.random.next(),
            scratch: &self.scratch.region,
            scratch_digests: &self.scratch.digests,
        })?;
        // While the child looks: it must see these pages as they were, and the parent never what the child writes.
        for _ in 0..self.random.below(SCRATCH_PAGES) {
            let page = self.random.below(self.scratch.region.pages());
            let (words, place) = (self.scratch.region.page(page), self.scratch.first.offset(page));
            self.journal.check(words, place, self.scratch.generations[page]);
            self.scratch.write(page);
        }
        self.progress.operation(samples);
        child.wait()
    }
}

impl Work for Forker {
    fn step(&mut self) {
        match self.fork_and_check() {
            Ok(ChildVerdict::Right) => {}
            Ok(verdict) => self.journal.failed("forked-child", &format!("{verdict:?}")),
            Err(error) => self.journal.failed("fork", &error),
        }
        std::thread::sleep(Duration::from_millis(self.random.between(*PAUSE_MS.start(), *PAUSE_MS.end())));
    }

    fn verify(&mut self) -> u64 {
        self.fixed.verify(&self.journal);
        self.scratch.verify(&self.journal);
        u64::try_from(self.fixed.region.pages() + self.scratch.region.pages()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::page::Part;
    use super::*;
    use crate::workload::StatusLog;

    #[test]
    fn children_find_what_is_wrong_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::new(StatusLog::new(dir.path().join("status"))));
        let part = |part, pages| (Region::anonymous(pages).unwrap(), Place { process: 0, part, page: 0 });
        let mut forker =
            Forker::new(part(Part::Fixed, 128), part(Part::Scratch, SCRATCH_PAGES), Arc::clone(&journal));
        for _ in 0..5 {
            forker.step();
        }
        assert_eq!((forker.verify(), journal.wrong_count()), (192, 0));
        // All but one page: the child looks at 200 or more of them.
        forker.fixed.region.discard(0..127).unwrap();
        forker.step();
        assert_eq!(journal.wrong_count(), 1);
        forker.verify();
        assert_eq!(journal.wrong_count(), 128);
    }
}
