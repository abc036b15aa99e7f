//! The memory of a move: which pages there are, what they hold, and how that looks as bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use protocol::lazy_map::LazyMap;
use protocol::units::{ImageAddr, PAGE_BYTES, PAGE_SIZE, PageRun, TaskId};

use super::chance::Chance;

/// What a page of zeros holds.
pub const ZEROS: u64 = 0;

/// Fills a page: every word of it tells what it holds.
pub fn fill(stamp: u64, page: &mut [u8]) {
    for (word, bytes) in (1_u64..).zip(page.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&stamp.wrapping_mul(word).to_le_bytes());
    }
}

/// What a page holds.
///
/// # Panics
/// If it is of several pages.
#[must_use]
pub fn stamp_of(page: &[u8]) -> u64 {
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).expect("eight bytes");
    let stamp = word(&page[..8]);
    for (number, bytes) in (1_u64..).zip(page.chunks_exact(8)) {
        assert_eq!(word(bytes), stamp.wrapping_mul(number), "a page that is mixed of several");
    }
    assert_eq!(page.len(), PAGE_SIZE);
    stamp
}

/// A run of pages by number.
///
/// # Panics
/// If it is empty.
#[must_use]
pub fn run(pages: &Range<u64>) -> PageRun {
    PageRun::new(ImageAddr::containing(pages.start * PAGE_BYTES), pages.end - pages.start)
        .expect("a small run")
}

/// A task at the source.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its pid.
    pub id: TaskId,
    /// Its memory areas by page.
    pub areas: Vec<Range<u64>>,
    /// What it has written, by page; the rest was never touched.
    pub written: BTreeMap<u64, u64>,
    /// Pages that were written since the last scan.
    pub dirty: BTreeSet<u64>,
}

/// The tree at the source.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Its tasks.
    pub tasks: Vec<Task>,
    stamps: u64,
}

impl Memory {
    /// A small tree.
    #[must_use]
    pub fn random(chance: &Chance) -> Self {
        let mut this = Self { tasks: Vec::new(), stamps: 0 };
        for number in 0..chance.between(1, 3) {
            let mut areas = Vec::new();
            // Around a border of the cache's chunks.
            let mut at = chance.between(16, 500);
            for _ in 0..chance.between(1, 3) {
                at += if chance.once_in(2) { 0 } else { chance.between(1, 8) };
                let end = at + chance.between(2, 40);
                areas.push(at..end);
                at = end;
            }
            let id = TaskId(u32::try_from(100 + number).expect("few tasks"));
            this.tasks.push(Task { id, areas, written: BTreeMap::new(), dirty: BTreeSet::new() });
        }
        let often = chance.between(5, 200);
        (0..often).for_each(|_| this.write(chance));
        this
    }

    /// A number that nothing holds yet.
    pub const fn new_stamp(&mut self) -> u64 {
        self.stamps += 1;
        // Odd, so that no multiple of it in a page is zero.
        self.stamps * 2 + 1
    }

    /// Some task writes a page, or a few that lie together.
    pub fn write(&mut self, chance: &Chance) {
        let stamp = if chance.once_in(8) { ZEROS } else { self.new_stamp() };
        let number = chance.below(self.tasks.len());
        let task = &mut self.tasks[number];
        let area = task.areas[chance.below(task.areas.len())].clone();
        let first = chance.between(area.start, area.end - 1);
        let end = area.end.min(first + if chance.once_in(3) { chance.between(1, 16) } else { 1 });
        for page in first..end {
            task.written.insert(page, stamp);
            task.dirty.insert(page);
        }
    }

    /// What stays behind when it is frozen now, numbered.
    ///
    /// # Panics
    /// Never: the runs are in order.
    #[must_use]
    pub fn lazy_map(&self) -> LazyMap {
        let runs = |task: &Task| {
            let mut runs: Vec<Range<u64>> = Vec::new();
            for area in &task.areas {
                let mut open: Option<Range<u64>> = None;
                for page in task.written.range(area.clone()).map(|(page, _)| *page) {
                    open = match open {
                        Some(run) if run.end == page => Some(run.start..page + 1),
                        before => {
                            runs.extend(before);
                            Some(page..page + 1)
                        }
                    };
                }
                runs.extend(open);
            }
            runs.iter().map(run).collect()
        };
        LazyMap::new(self.tasks.iter().map(|task| (task.id, runs(task)))).expect("runs in order")
    }

    /// What the pages of `map` hold, by index.
    ///
    /// # Panics
    /// If the map is of another tree.
    #[must_use]
    pub fn contents(&self, map: &LazyMap) -> Vec<u64> {
        let content = |index| {
            let (id, addr, _) = map.locate(index).expect("a page of the map");
            let task = self.tasks.iter().find(|task| task.id == id).expect("a task of the tree");
            task.written[&(addr.get() / PAGE_BYTES)]
        };
        (0..map.pages()).map(content).collect()
    }
}
