//! One address space: where its lazy pages are now, and which of them are still remote.

use std::collections::BTreeMap;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::TaskMap;
use protocol::units::TaskAddr;

/// Pages that lie together in the task and in the numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// Index of the first page, within the family.
    first: u64,
    pages: u64,
}

/// A stretch of remote pages: where it is in the task, and its indices within the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Address of the first page, now.
    pub at: TaskAddr,
    /// Index of the first page.
    pub first: u64,
    /// Number of pages.
    pub pages: u64,
}

/// One address space of a family.
///
/// Two maps hold the same segments, by address for faults and events and by index for data that arrives;
/// they start as one segment per lazy run and split only where the task unmaps or moves part of one.
#[derive(Clone, Debug)]
pub struct Space {
    by_addr: BTreeMap<TaskAddr, Segment>,
    by_index: BTreeMap<u64, (TaskAddr, u64)>,
    remote: Bitmap,
    remote_pages: u64,
}

impl Space {
    /// The space of a task that was just restored: every lazy page is remote, where it was dumped.
    #[must_use]
    pub fn restored(map: &TaskMap) -> Self {
        let mut space = Self {
            by_addr: BTreeMap::new(),
            by_index: BTreeMap::new(),
            remote: Bitmap::full(map.pages),
            remote_pages: map.pages,
        };
        // Neighbouring pagemap entries become one segment: the numbering runs on through them.
        let mut open: Option<(TaskAddr, Segment)> = None;
        for indexed in &map.runs {
            let (at, pages) = (indexed.run.start.as_restored(), indexed.run.pages);
            open = match open {
                Some((start, segment)) if start.add(segment.pages) == at => {
                    Some((start, Segment { pages: segment.pages + pages, ..segment }))
                }
                before => {
                    if let Some((start, segment)) = before {
                        space.insert(start, segment);
                    }
                    Some((at, Segment { first: indexed.first - map.first, pages }))
                }
            };
        }
        if let Some((start, segment)) = open {
            space.insert(start, segment);
        }
        space
    }

    /// Pages that are still remote.
    #[must_use]
    pub const fn remote_pages(&self) -> u64 {
        self.remote_pages
    }

    /// Index of the page at `at` if it is remote.
    #[must_use]
    pub fn remote_at(&self, at: TaskAddr) -> Option<u64> {
        let (start, segment) = self.by_addr.range(..=at).next_back()?;
        let offset = at.pages_since(*start);
        let index = segment.first + offset;
        (offset < segment.pages && self.remote.get(index)).then_some(index)
    }

    /// Whether the page with `index` is remote.
    #[must_use]
    pub fn is_remote(&self, index: u64) -> bool {
        self.remote.get(index)
    }

    /// The first stretch of remote pages with indices in `first..end`.
    #[must_use]
    pub fn remote_in(&self, first: u64, end: u64) -> Option<Stretch> {
        let (start, behind) = self.remote.run_in(first, end)?;
        // A remote page always has a segment: dropping a segment clears its bits.
        let (segment_first, (at, pages)) = self.by_index.range(..=start).next_back()?;
        let offset = start - segment_first;
        let pages = (behind - start).min(pages.saturating_sub(offset));
        (pages > 0).then(|| Stretch { at: at.add(offset), first: start, pages })
    }

    /// A space that is not known yet, of a family of so many pages.
    pub(super) fn unknown(pages: u64) -> Self {
        Self {
            by_addr: BTreeMap::new(),
            by_index: BTreeMap::new(),
            remote: Bitmap::clear(pages),
            remote_pages: 0,
        }
    }

    /// Whether a lazy page is at `at`, remote or not.
    pub(super) fn has(&self, at: TaskAddr) -> bool {
        let before = self.by_addr.range(..=at).next_back();
        before.is_some_and(|(start, segment)| at.pages_since(*start) < segment.pages)
    }

    /// Where lazy pages are in `start..end`, and how many.
    pub(super) fn segments_in(
        &self,
        start: TaskAddr,
        end: TaskAddr,
    ) -> impl Iterator<Item = (TaskAddr, u64)> + use<> {
        self.overlapping(start, end).into_iter().map(|(at, segment)| (at, segment.pages))
    }

    /// The first address of every segment, to check that restore registered them.
    pub fn segment_starts(&self) -> impl Iterator<Item = TaskAddr> + '_ {
        self.by_addr.keys().copied()
    }

    /// These pages are no longer remote: installed.
    pub fn settle(&mut self, first: u64, pages: u64) {
        self.remote_pages -= self.remote.unset_range(first, first + pages);
    }

    /// The task drops the content of a range (`MADV_DONTNEED` and the like): it stays mapped and reads zero.
    pub fn remove(&mut self, start: TaskAddr, end: TaskAddr) {
        for (_, segment) in self.overlapping(start, end) {
            self.settle(segment.first, segment.pages);
        }
    }

    /// The task unmapped a range.
    pub fn unmap(&mut self, start: TaskAddr, end: TaskAddr) {
        self.remove(start, end);
        self.cut_out(start, end);
    }

    /// The task moved `pages` pages from `from` to `to`.
    pub fn remap(&mut self, from: TaskAddr, to: TaskAddr, pages: u64) {
        let moved = self.cut_out(from, from.add(pages));
        // The kernel reports the unmapping of whatever was at the target first; should it not, what was there
        // cannot be reached any more.
        self.unmap(to, to.add(pages));
        for (at, segment) in moved {
            self.insert(to.add(at.pages_since(from)), segment);
        }
    }

    fn insert(&mut self, at: TaskAddr, segment: Segment) {
        self.by_addr.insert(at, segment);
        self.by_index.insert(segment.first, (at, segment.pages));
    }

    /// The parts of segments inside `start..end`, with their addresses.
    fn overlapping(&self, start: TaskAddr, end: TaskAddr) -> Vec<(TaskAddr, Segment)> {
        let before = self.by_addr.range(..start).next_back();
        let inside = self.by_addr.range(start..end.max(start));
        before
            .into_iter()
            .chain(inside)
            .filter_map(|(at, segment)| {
                let from = (*at).max(start);
                let to = at.add(segment.pages).min(end);
                let pages = to.pages_since(from);
                let first = segment.first + from.pages_since(*at);
                (pages > 0).then_some((from, Segment { first, pages }))
            })
            .collect()
    }

    /// Takes the parts inside `start..end` out of the maps; what sticks out at either side stays.
    fn cut_out(&mut self, start: TaskAddr, end: TaskAddr) -> Vec<(TaskAddr, Segment)> {
        let parts = self.overlapping(start, end);
        for (from, part) in &parts {
            let Some((at, whole)) = self.by_addr.range(..=*from).next_back().map(|(a, s)| (*a, *s)) else {
                continue;
            };
            self.by_addr.remove(&at);
            self.by_index.remove(&whole.first);
            let head = from.pages_since(at);
            if head > 0 {
                self.insert(at, Segment { first: whole.first, pages: head });
            }
            let tail = whole.pages - head - part.pages;
            if tail > 0 {
                let behind = head + part.pages;
                self.insert(at.add(behind), Segment { first: whole.first + behind, pages: tail });
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::lazy_map::LazyMap;
    use protocol::units::{ImageAddr, PageRun, TaskId};
    use std::collections::HashMap;

    fn addr(page: u64) -> TaskAddr {
        TaskAddr::containing(page << 12)
    }

    fn map(runs: &[(u64, u64)]) -> TaskMap {
        let runs = runs
            .iter()
            .map(|(page, pages)| PageRun::new(ImageAddr::containing(page << 12), *pages).unwrap())
            .collect();
        LazyMap::new([(TaskId(1), runs)]).unwrap().task(TaskId(1)).unwrap().clone()
    }

    #[test]
    fn neighbouring_runs_are_one_segment() {
        let space = Space::restored(&map(&[(16, 4), (20, 4), (32, 1)]));
        assert_eq!(space.segment_starts().count(), 2);
        assert_eq!(space.remote_in(2, 8), Some(Stretch { at: addr(18), first: 2, pages: 6 }));
        assert_eq!(space.remote_in(8, 9), Some(Stretch { at: addr(32), first: 8, pages: 1 }));
    }

    #[test]
    fn a_moved_range_is_found_at_its_new_place_only() {
        let mut space = Space::restored(&map(&[(16, 8)]));
        space.remap(addr(18), addr(100), 3);
        assert_eq!(space.remote_at(addr(18)), None);
        assert_eq!(space.remote_at(addr(100)), Some(2));
        assert_eq!(space.remote_at(addr(21)), Some(5));
        assert_eq!(space.remote_in(0, 8), Some(Stretch { at: addr(16), first: 0, pages: 2 }));
        assert_eq!(space.remote_in(2, 8), Some(Stretch { at: addr(100), first: 2, pages: 3 }));
        assert_eq!(space.remote_in(5, 8), Some(Stretch { at: addr(21), first: 5, pages: 3 }));
    }

    /// The naive model: a map from page to index.
    #[derive(Clone, Debug)]
    enum Op {
        Settle(u64, u64),
        Remove(u64, u64),
        Unmap(u64, u64),
        Remap(u64, u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let page = 0u64..96;
        let len = 1u64..24;
        prop_oneof![
            (0u64..48, len.clone()).prop_map(|(a, n)| Op::Settle(a, n)),
            (page.clone(), len.clone()).prop_map(|(a, n)| Op::Remove(a, n)),
            (page.clone(), len.clone()).prop_map(|(a, n)| Op::Unmap(a, n)),
            (page.clone(), page, len).prop_filter_map("mremap refuses overlap", |(a, b, n)| {
                (a.abs_diff(b) >= n).then_some(Op::Remap(a, b, n))
            }),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_page_table(ops in proptest::collection::vec(op(), 0..30)) {
            let task = map(&[(4, 10), (14, 6), (40, 20)]);
            let mut space = Space::restored(&task);
            // page -> index, and the set of remote indices
            let mut table: HashMap<u64, u64> = HashMap::new();
            for indexed in &task.runs {
                for i in 0..indexed.run.pages {
                    table.insert((indexed.run.start.get() >> 12) + i, indexed.first + i);
                }
            }
            let mut remote: Vec<bool> = vec![true; 36];
            let slot = |index: u64| usize::try_from(index).unwrap();
            for op in ops {
                match op {
                    Op::Settle(a, n) => {
                        space.settle(a, n);
                        (a..(a + n).min(36)).for_each(|i| remote[slot(i)] = false);
                    }
                    Op::Remove(a, n) => {
                        space.remove(addr(a), addr(a + n));
                        (a..a + n).filter_map(|p| table.get(&p)).for_each(|i| remote[slot(*i)] = false);
                    }
                    Op::Unmap(a, n) => {
                        space.unmap(addr(a), addr(a + n));
                        (a..a + n).filter_map(|p| table.remove(&p)).for_each(|i| remote[slot(i)] = false);
                    }
                    Op::Remap(a, b, n) => {
                        space.remap(addr(a), addr(b), n);
                        (b..b + n).filter_map(|p| table.remove(&p)).for_each(|i| remote[slot(i)] = false);
                        for p in 0..n {
                            if let Some(index) = table.remove(&(a + p)) {
                                table.insert(b + p, index);
                            }
                        }
                    }
                }
                for page in 0..130 {
                    let expected = table.get(&page).copied().filter(|i| remote[slot(*i)]);
                    prop_assert_eq!(space.remote_at(addr(page)), expected, "page {}", page);
                }
                let count = remote.iter().filter(|r| **r).count() as u64;
                prop_assert_eq!(space.remote_pages(), count);
                // Every remote index is reachable in index order, at the place the table says.
                let mut at = 0;
                let mut seen = 0;
                while let Some(stretch) = space.remote_in(at, 36) {
                    for i in 0..stretch.pages {
                        let page = (stretch.at.get() >> 12) + i;
                        prop_assert_eq!(table.get(&page), Some(&(stretch.first + i)));
                    }
                    seen += stretch.pages;
                    at = stretch.first + stretch.pages;
                }
                prop_assert_eq!(seen, count);
            }
        }
    }
}
