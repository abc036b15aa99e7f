//! A few pages that move as one: where they are changes, which pages they are does not.

use std::ops::Range;

use kernel::arena::{Region, Target};

use super::journal::Journal;
use super::ledger::Ledger;
use super::page::{self, Place};

/// Places set aside for every slice, so that it can grow without taking those of its neighbour.
pub(super) const PLACES_PER_SLICE: usize = 512;
/// Most pages a slice grows to.
pub(super) const SLICE_PAGES_MAX: usize = 384;
/// Fewest pages a slice shrinks to.
pub(super) const SLICE_PAGES_MIN: usize = 8;

/// Numbers the versions of all pages of one owner. They never repeat: a page that is dropped and stamped again
/// must not get the generation that a late copy of the old one has.
#[derive(Debug, Default)]
pub(super) struct Generations(u32);

impl Generations {
    /// The next generation.
    pub(super) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(1).max(1);
        self.0
    }
}

/// A region with what its pages should be. Generation 0 in its ledger is a page that has to be zero.
pub(super) struct Slice {
    region: Region,
    first: Place,
    ledger: Ledger,
}

impl Slice {
    /// Stamps every page of `region`.
    pub(super) fn stamped(region: Region, first: Place, generations: &mut Generations) -> Self {
        let ledger = Ledger::filled(region.pages(), 0);
        let mut slice = Self { region, first, ledger };
        for page in 0..slice.pages() {
            slice.stamp(page, generations.next());
        }
        slice
    }

    /// Pages it has now.
    pub(super) fn pages(&self) -> usize {
        self.region.pages()
    }

    /// Its address and its pages.
    pub(super) fn extent(&self) -> (usize, usize) {
        (self.region.address(), self.pages())
    }

    /// The place of its first page.
    pub(super) fn first(&self) -> Place {
        self.first
    }

    fn stamp(&mut self, page: usize, generation: u32) {
        page::write(self.region.page(page), self.first.offset(page), generation, 0);
        self.ledger.set(page, generation);
    }

    /// Checks one page, without writing to it.
    pub(super) fn check(&self, page: usize, journal: &Journal) -> bool {
        journal.check(self.region.page(page), self.first.offset(page), self.ledger.get(page))
    }

    /// Checks one page and stamps it anew.
    pub(super) fn rewrite(&mut self, page: usize, generations: &mut Generations, journal: &Journal) {
        self.check(page, journal);
        self.stamp(page, generations.next());
    }

    /// Drops some pages: they have to be zero from now on.
    pub(super) fn discard(&mut self, pages: Range<usize>) -> std::io::Result<()> {
        self.region.discard(pages.clone())?;
        for page in pages {
            self.ledger.set(page, 0);
        }
        Ok(())
    }

    /// Gives up the pages past `pages`, or adds pages that have to be zero.
    pub(super) fn resize(&mut self, pages: usize) -> std::io::Result<()> {
        self.region.resize(pages)?;
        self.ledger.resize(pages, 0);
        Ok(())
    }

    /// Moves it.
    pub(super) fn relocate(&mut self, to: Target) -> std::io::Result<()> {
        self.region.relocate(to)
    }

    /// Moves it onto the pages of another slice, which is gone then.
    pub(super) fn relocate_over(&mut self, victim: Self) -> std::io::Result<()> {
        self.region.relocate_over(victim.region)
    }

    /// Checks all pages and the ledger; each wrong one is reported once. Returns the number of pages.
    pub(super) fn verify(&mut self, generations: &mut Generations, journal: &Journal) -> u64 {
        let damaged: Vec<usize> = self.ledger.damaged().collect();
        for page in damaged {
            journal.wrong_ledger(self.first.offset(page));
            self.ledger.accept(page);
        }
        for page in 0..self.pages() {
            if !self.check(page, journal) {
                self.stamp(page, generations.next());
            }
        }
        u64::try_from(self.pages()).unwrap_or(0)
    }
}

/// The sizes that `pages` pages are cut into: `low` to `high` each, the last one what is left.
pub(super) fn cut_sizes(pages: usize, low: u64, high: u64, random: &mut crate::random::Random) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut left = pages;
    while left > 0 {
        let size = usize::try_from(random.between(low, high)).unwrap_or(left).min(left);
        sizes.push(size);
        left -= size;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::super::page::Part;
    use super::*;
    use crate::random::Random;
    use crate::workload::StatusLog;

    #[test]
    fn a_slice_knows_its_pages_after_every_kind_of_move() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(StatusLog::new(dir.path().join("status")));
        let mut generations = Generations::default();
        let place = |page| Place { process: 0, part: Part::Slices, page };
        let mut slice = Slice::stamped(Region::anonymous(32).unwrap(), place(0), &mut generations);
        let victim = Slice::stamped(Region::anonymous(64).unwrap(), place(512), &mut generations);
        slice.relocate(Target::Anywhere).unwrap();
        slice.discard(4..9).unwrap();
        slice.resize(40).unwrap();
        slice.rewrite(5, &mut generations, &journal);
        slice.relocate_over(victim).unwrap();
        slice.resize(20).unwrap();
        assert_eq!((slice.verify(&mut generations, &journal), journal.wrong_count()), (20, 0));
        slice.region.discard(0..1).unwrap();
        slice.verify(&mut generations, &journal);
        slice.verify(&mut generations, &journal);
        assert_eq!(journal.wrong_count(), 1);
    }

    #[test]
    fn a_late_copy_of_a_dropped_page_is_stale_also_after_it_was_stamped_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(StatusLog::new(dir.path().join("status")));
        let mut generations = Generations::default();
        let place = Place { process: 0, part: Part::Slices, page: 0 };
        let mut slice = Slice::stamped(Region::anonymous(1).unwrap(), place, &mut generations);
        let late = slice.ledger.get(0);
        slice.discard(0..1).unwrap();
        slice.rewrite(0, &mut generations, &journal);
        page::write(slice.region.page(0), place, late, 0);
        assert!(!slice.check(0, &journal));
    }

    #[test]
    fn cut_sizes_add_up() {
        let sizes = cut_sizes(10_000, 16, 256, &mut Random::new(3));
        assert_eq!(sizes.iter().sum::<usize>(), 10_000);
        assert!(sizes[..sizes.len() - 1].iter().all(|size| (16..=256).contains(size)));
    }
}
