//! Threads that rewrite the arena page by page, each time checking first that the page is what it was.

use std::sync::Arc;
use std::time::Duration;

use kernel::arena::Region;

use super::gate::Work;
use super::journal::{Journal, Progress};
use super::ledger::Ledger;
use super::page::{self, Place};
use crate::clock::monotonic_ns;
use crate::random::Random;

/// Every how many operations the ledger around the page is checked as well: it costs as much as many operations.
const LEDGER_CHECK_EVERY: u64 = 64;

/// Pages `share`, `share + of`, `share + 2 * of`, ... of a region, written by one thread only.
pub(super) struct Writer {
    region: Arc<Region>,
    share: usize,
    of: usize,
    first: Place,
    ledger: Ledger,
    pause: Duration,
    random: Random,
    last_ns: Option<u64>,
    journal: Arc<Journal>,
    progress: Arc<Progress>,
}

/// Which pages of the region are one writer's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Which writer this is.
    pub(super) index: usize,
    /// How many writers there are.
    pub(super) of: usize,
}

impl Writer {
    /// Stamps the pages of this share with generation 1.
    #[must_use]
    pub(super) fn new(
        region: Arc<Region>,
        share: Share,
        first: Place,
        pause: Duration,
        journal: Arc<Journal>,
    ) -> Self {
        let pages = region.pages().saturating_sub(share.index).div_ceil(share.of);
        let seed = u64::try_from(share.index).unwrap_or(0) + u64::from(first.process) * 1000;
        let writer = Self {
            region,
            share: share.index,
            of: share.of,
            first,
            ledger: Ledger::filled(pages, 1),
            pause,
            random: Random::new(seed),
            last_ns: None,
            journal,
            progress: Arc::default(),
        };
        for own in 0..pages {
            writer.stamp(own, 1);
        }
        writer
    }

    /// Where this writer counts what it does.
    #[must_use]
    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn page_of(&self, own: usize) -> usize {
        own * self.of + self.share
    }

    fn stamp(&self, own: usize, generation: u32) {
        let page = self.page_of(own);
        let writer = u32::try_from(self.share).unwrap_or(u32::MAX);
        page::write(self.region.page(page), self.first.offset(page), generation, writer);
    }

    fn check(&self, own: usize) {
        let page = self.page_of(own);
        self.journal.check(self.region.page(page), self.first.offset(page), self.ledger.get(own));
    }

    fn check_ledger(&mut self, own: usize) {
        if !self.ledger.is_sound_at(own) {
            self.journal.wrong_ledger(self.first.offset(self.page_of(own)));
            self.ledger.accept(own);
        }
    }
}

impl Work for Writer {
    fn step(&mut self) {
        if self.ledger.is_empty() {
            std::thread::sleep(Duration::from_millis(10));
            return;
        }
        let own = self.random.below(self.ledger.len());
        if self.progress.ops() % LEDGER_CHECK_EVERY == 0 {
            self.check_ledger(own);
        }
        self.check(own);
        // Also after a wrong page: it is wrong once, then it starts anew.
        let generation = self.ledger.get(own).wrapping_add(1).max(1);
        self.stamp(own, generation);
        self.ledger.set(own, generation);
        self.progress.operation(1);
        if !self.pause.is_zero() {
            std::thread::sleep(self.pause);
        }
        let now = monotonic_ns();
        if let Some(last) = self.last_ns.replace(now) {
            self.progress.gap(now.saturating_sub(last));
        }
    }

    fn verify(&mut self) -> u64 {
        let damaged: Vec<usize> = self.ledger.damaged().collect();
        for own in damaged {
            self.check_ledger(own);
        }
        for own in 0..self.ledger.len() {
            self.check(own);
        }
        self.last_ns = None;
        u64::try_from(self.ledger.len()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::page::Part;
    use super::*;
    use crate::workload::{StatusLog, field};

    #[test]
    fn a_page_lost_behind_the_writer_is_reported_once_and_by_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        let journal = Arc::new(Journal::new(StatusLog::new(status.clone())));
        let region = Arc::new(Region::anonymous(31).unwrap());
        let first = Place { process: 2, part: Part::Writers, page: 0 };
        let mut writers = [0, 1].map(|index| {
            let share = Share { index, of: 2 };
            Writer::new(Arc::clone(&region), share, first, Duration::ZERO, Arc::clone(&journal))
        });
        for _ in 0..1000 {
            writers.iter_mut().for_each(Writer::step);
        }
        assert_eq!(writers.iter_mut().map(Writer::verify).sum::<u64>(), 31);
        assert_eq!(journal.wrong_count(), 0);
        region.discard(7..8).unwrap();
        for _ in 0..1000 {
            writers.iter_mut().for_each(Writer::step);
        }
        assert_eq!(journal.wrong_count(), 1);
        let line = std::fs::read_to_string(&status).unwrap();
        assert_eq!(field::<String>(&line, "page").as_deref(), Some("2/Writers/7"));
        assert_eq!(field::<String>(&line, "kind").as_deref(), Some("zero"));
    }
}
