//! What was sent and what was acknowledged: bitmaps over the lazy map, by chunk. Pure.

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{PageRun, TaskId};
use protocol::wire::frame::TaskRun;

/// A run of the lazy map with its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexedTaskRun {
    /// Index of the first page.
    pub first: u64,
    /// Whose pages and which.
    pub what: TaskRun,
}

/// A peer that speaks of pages which are not lazy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the destination speaks of {pages} pages at {start} of task {task}, which are no lazy run")]
pub struct NotLazy {
    task: TaskId,
    start: protocol::units::ImageAddr,
    pages: u64,
}

/// Index of the first page of `what`, if all of it lies in one lazy run.
///
/// # Errors
/// [`NotLazy`].
pub fn index_of(map: &LazyMap, what: &TaskRun) -> Result<u64, NotLazy> {
    let TaskRun { task, run } = *what;
    map.task(task).and_then(|task| task.index_of_run(run)).ok_or(NotLazy {
        task,
        start: run.start,
        pages: run.pages,
    })
}

/// What was sent and what was acknowledged.
#[derive(Debug)]
pub struct Ledger {
    chunk_pages: u64,
    sent: Bitmap,
    acknowledged: Bitmap,
    missing: u64,
}

impl Ledger {
    /// Nothing sent yet of `pages` pages, kept in chunks of `chunk_pages`.
    #[must_use]
    pub fn new(pages: u64, chunk_pages: u64) -> Self {
        Self { chunk_pages, sent: Bitmap::clear(pages), acknowledged: Bitmap::clear(pages), missing: pages }
    }

    /// Number of chunks.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.sent.len().div_ceil(self.chunk_pages)
    }

    /// The pages of a chunk.
    #[must_use]
    pub fn chunk(&self, chunk: u64) -> std::ops::Range<u64> {
        let first = chunk * self.chunk_pages;
        first..(first + self.chunk_pages).min(self.sent.len())
    }

    /// Pages not acknowledged yet.
    #[must_use]
    pub const fn missing(&self) -> u64 {
        self.missing
    }

    /// These pages are sent as an answer; says whether any of them was not sent before.
    pub fn sent(&mut self, first: u64, pages: u64) -> bool {
        self.sent.set_range(first, first + pages) > 0
    }

    /// The destination has these pages already: they are neither pushed nor sent ahead of a fault.
    ///
    /// # Panics
    /// If the map is over other pages.
    pub fn has_already(&mut self, pages: &Bitmap) {
        assert_eq!(pages.len(), self.sent.len());
        let mut at = 0;
        while let Some((first, behind)) = pages.run_in(at, pages.len()) {
            self.sent.set_range(first, behind);
            at = behind;
        }
    }

    /// Takes pages from `first` on that nobody has sent yet, at most `most`: how many; they count as sent from now on.
    pub fn take_unsent_from(&mut self, first: u64, most: u64) -> u64 {
        let end = (first + most).min(self.sent.len());
        let pages = self.sent.run_in(first, end).map_or(end, |(start, _)| start).saturating_sub(first);
        self.sent.set_range(first, first + pages);
        pages
    }

    /// Takes an acknowledgement in; returns the chunks that it completed.
    pub fn acknowledge(&mut self, first: u64, pages: u64) -> Vec<u64> {
        if pages == 0 {
            return Vec::new();
        }
        let end = first + pages;
        self.sent.set_range(first, end);
        let chunks = first / self.chunk_pages..=(end - 1) / self.chunk_pages;
        chunks
            .filter(|chunk| {
                let pages = self.chunk(*chunk);
                let fresh = self.acknowledged.set_range(pages.start.max(first), pages.end.min(end));
                self.missing -= fresh;
                // One that was complete before is no news, whatever else was acknowledged with it.
                fresh > 0 && self.acknowledged.count_range(pages.start, pages.end) == pages.end - pages.start
            })
            .collect()
    }

    /// Begins again on new connections: what the destination says is settled is acknowledged, and what is not
    /// acknowledged counts as never sent. Returns the chunks that are complete now and were not before.
    pub fn resume(&mut self, settled: &Bitmap) -> Vec<u64> {
        let mut complete = Vec::new();
        let mut at = 0;
        while let Some((first, behind)) = settled.run_in(at, self.sent.len()) {
            complete.extend(self.acknowledge(first, behind - first));
            at = behind;
        }
        self.sent = self.acknowledged.clone();
        complete
    }

    /// The runs of a chunk that nobody has sent yet, each within one lazy run and at most `most` pages long;
    /// they count as sent from now on.
    pub fn take_unsent(&mut self, map: &LazyMap, chunk: u64, most: u64, runs: &mut Vec<IndexedTaskRun>) {
        runs.clear();
        let pages = self.chunk(chunk);
        let mut at = pages.start;
        while at < pages.end {
            if self.sent.get(at) {
                at = self.sent.run_in(at, pages.end).map_or(pages.end, |(_, behind)| behind);
                continue;
            }
            let next_sent = self.sent.run_in(at, pages.end).map_or(pages.end, |(start, _)| start);
            let Some((task, addr, follow)) = map.locate(at) else { return };
            let count = follow.min(next_sent - at).min(most);
            let Some(run) = PageRun::new(addr, count) else { return };
            runs.push(IndexedTaskRun { first: at, what: TaskRun { task, run } });
            self.sent.set_range(at, at + count);
            at += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::units::ImageAddr;

    fn run(page: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::containing(page << 12), pages).unwrap()
    }

    fn map() -> LazyMap {
        LazyMap::new([(TaskId(1), vec![run(16, 6), run(40, 4)]), (TaskId(2), vec![run(16, 2)])]).unwrap()
    }

    #[test]
    fn a_chunk_is_complete_with_its_last_page_and_only_once() {
        let mut ledger = Ledger::new(12, 4);
        assert_eq!(ledger.chunks(), 3);
        assert!(ledger.acknowledge(0, 3).is_empty());
        assert_eq!(ledger.acknowledge(3, 6), [0, 1]);
        assert!(ledger.acknowledge(0, 4).is_empty(), "acknowledged before");
        assert_eq!(ledger.missing(), 3);
        assert!(ledger.acknowledge(6, 4).is_empty(), "one page of the next, behind two of a complete chunk");
        assert_eq!(ledger.missing(), 2);
        assert_eq!(ledger.acknowledge(9, 3), [2]);
        assert_eq!(ledger.missing(), 0);
    }

    #[test]
    fn the_push_sends_what_nobody_sent_cut_at_runs() {
        let map = map();
        let mut ledger = Ledger::new(map.pages(), 8);
        ledger.sent(1, 1);
        let mut runs = Vec::new();
        ledger.take_unsent(&map, 0, 3, &mut runs);
        let got: Vec<_> = runs.iter().map(|r| (r.first, r.what.run.pages)).collect();
        assert_eq!(got, [(0, 1), (2, 3), (5, 1), (6, 2)]);
        ledger.take_unsent(&map, 0, 3, &mut runs);
        assert!(runs.is_empty());
        ledger.take_unsent(&map, 1, 64, &mut runs);
        let got: Vec<_> = runs.iter().map(|r| (r.what.task.0, r.what.run.pages)).collect();
        assert_eq!(got, [(1, 2), (2, 2)]);
    }

    #[test]
    fn pages_asked_for_ahead_end_at_the_first_that_was_sent() {
        let mut ledger = Ledger::new(12, 4);
        assert!(ledger.sent(5, 1));
        assert!(!ledger.sent(5, 1));
        assert_eq!(ledger.take_unsent_from(2, 8), 3);
        assert_eq!(ledger.take_unsent_from(2, 8), 0);
        assert_eq!(ledger.take_unsent_from(6, 256), 6);
    }

    #[test]
    fn what_the_destination_has_is_not_sent_but_acknowledged() {
        let map = map();
        let mut ledger = Ledger::new(map.pages(), 8);
        let mut clean = Bitmap::clear(12);
        clean.set_range(0, 5);
        clean.set_range(7, 11);
        ledger.has_already(&clean);
        let mut runs = Vec::new();
        ledger.take_unsent(&map, 0, 64, &mut runs);
        assert_eq!(
            runs.iter().map(|run| (run.first, run.what.run.pages)).collect::<Vec<_>>(),
            [(5, 1), (6, 1)]
        );
        assert_eq!(ledger.take_unsent_from(8, 4), 0);
        assert_eq!(ledger.missing(), 12);
        assert_eq!(ledger.acknowledge(0, 8), [0]);
    }

    #[test]
    fn on_new_connections_what_was_not_acknowledged_is_sent_again() {
        let map = map();
        let mut ledger = Ledger::new(map.pages(), 4);
        let mut runs = Vec::new();
        for chunk in 0..3 {
            ledger.take_unsent(&map, chunk, 64, &mut runs);
        }
        assert_eq!(ledger.acknowledge(0, 5), [0]);
        // The acknowledgement of 5..8 was lost; what the map lacks of 0..5 is not taken back.
        let mut settled = Bitmap::clear(map.pages());
        settled.set_range(4, 8);
        settled.set(10);
        assert_eq!(ledger.resume(&settled), [1]);
        assert_eq!(ledger.missing(), 3);
        ledger.take_unsent(&map, 0, 64, &mut runs);
        assert!(runs.is_empty());
        ledger.take_unsent(&map, 2, 64, &mut runs);
        let again: Vec<_> = runs.iter().map(|run| (run.first, run.what.run.pages)).collect();
        assert_eq!(again, [(8, 2), (11, 1)]);
        settled.set_range(0, map.pages());
        assert_eq!(ledger.resume(&settled), [2]);
        assert_eq!(ledger.missing(), 0);
    }

    #[test]
    fn only_lazy_runs_have_an_index() {
        let map = map();
        let what = |task, page, pages| TaskRun { task: TaskId(task), run: run(page, pages) };
        assert_eq!(index_of(&map, &what(1, 41, 3)), Ok(7));
        assert_eq!(index_of(&map, &what(2, 17, 1)), Ok(11));
        for bad in [what(1, 21, 2), what(3, 16, 1), what(1, 30, 1), what(1, 41, 4)] {
            assert!(index_of(&map, &bad).is_err(), "{bad:?}");
        }
    }
}
