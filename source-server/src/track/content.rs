//! Writes found by comparison: every page is read in every round and compared with what was copied of it.
//!
//! Works with any kernel and never stops a task. What is compared with is not what the scan before saw but
//! what was sent: a page that changes in between and back again is no exception then. A page is known by 128 bits of
//! XXH3; a task that builds two pages with the same hash on purpose cheats itself.
//!
//! Cost: all memory is read once per round; about 16 bytes are kept for each page.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use protocol::units::{ImageAddr, PAGE_BYTES, PAGE_SIZE, PageRun, TaskId};
use xxhash_rust::xxh3::xxh3_128;

use super::page_map::{Entry, PageMap};
use super::{Method, Pass, Round, Run, TaskRound, Tracker, areas, empty_round};
use crate::process::{ProcessTree, Task, has_no_memory};

/// Pages that are read at a time.
const CHUNK_PAGES: u64 = 256;
/// Pages whose entries are kept together: those of a huge page.
const GROUP_PAGES: u64 = 512;

/// The tracker.
#[derive(Debug)]
pub struct Content {
    tasks: HashMap<TaskId, Hashes>,
    zero: u128,
    room: Vec<u8>,
}

impl Default for Content {
    fn default() -> Self {
        let chunk = vec![0; usize::try_from(CHUNK_PAGES).unwrap_or(1) * PAGE_SIZE];
        Self { tasks: HashMap::new(), zero: hash(&chunk[..PAGE_SIZE]), room: chunk }
    }
}

impl Tracker for Content {
    fn method(&self) -> Method {
        Method::Content
    }

    fn scan(&mut self, tree: &ProcessTree, pass: Pass) -> Round {
        if pass == Pass::Ahead {
            return Round::default();
        }
        self.scan_by(tree, |_, _, entry| entry.is_there().then_some(Look::Compare))
    }

    fn copied(&mut self, task: TaskId, start: ImageAddr, pages: &[u8]) {
        let hashes = self.tasks.entry(task).or_default();
        for (number, page) in (0..).zip(pages.chunks_exact(PAGE_SIZE)) {
            hashes.set(start.add(number), hash(page));
        }
    }

    fn disarm(self: Box<Self>) {}
}

/// What is done to find out whether a page was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It is read, and compared with what was copied.
    Compare,
    /// It was.
    Written,
    /// It was not: it holds what was copied of it, if that was copied.
    Unwritten,
}

impl Content {
    /// Scans all tasks, and asks how to look at each page; `None` for one that is not there.
    pub(super) fn scan_by(
        &mut self,
        tree: &ProcessTree,
        mut look: impl FnMut(TaskId, ImageAddr, Entry) -> Option<Look>,
    ) -> Round {
        self.tasks.retain(|id, _| tree.tasks.iter().any(|task| task.id == *id));
        let mut round = Round::default();
        for task in &tree.tasks {
            let found = self.scan_task(task, |at, entry| look(task.id, at, entry));
            let found = found.or_else(|error| match has_no_memory(task.pid) {
                true => Ok(None),
                false => Err(error),
            });
            round.tasks.extend(found.unwrap_or_else(|error: io::Error| {
                self.tasks.remove(&task.id);
                let untracked = Some(format!("read memory: {error}"));
                Some(TaskRound { untracked, starts_again: true, ..empty_round(task) })
            }));
        }
        round
    }

    fn scan_task(
        &mut self,
        task: &Task,
        mut look: impl FnMut(ImageAddr, Entry) -> Option<Look>,
    ) -> io::Result<Option<TaskRound>> {
        let mut round = empty_round(task);
        round.areas = areas::of(task.pid)?;
        let mut map = PageMap::open(task.pid)?;
        let memory = File::open(format!("/proc/{}/mem", task.pid))?;
        let before = self.tasks.remove(&task.id).unwrap_or_default();
        // What is not there now is not taken over: it counts as written when it comes back.
        let mut now = Hashes::default();
        let mut found = Vec::new();
        for &area in &round.areas {
            map.runs(area, &mut look, |run, look| match look {
                Look::Compare => self.compare(&memory, run, &before, &mut now, &mut found),
                Look::Written => {
                    (0..run.pages).for_each(|page| report(&mut found, run.start.add(page), false))
                }
                Look::Unwritten => {
                    for address in (0..run.pages).map(|page| run.start.add(page)) {
                        match before.get(address) {
                            0 => report(&mut found, address, false),
                            hash => now.set(address, hash),
                        }
                    }
                }
            })?;
            // Pages of two areas are never one run.
            round.runs.append(&mut found);
        }
        self.tasks.insert(task.id, now);
        Ok(Some(round))
    }

    /// Reports the pages of `run` that are not what was copied.
    fn compare(
        &mut self,
        memory: &File,
        run: PageRun,
        before: &Hashes,
        now: &mut Hashes,
        runs: &mut Vec<Run>,
    ) {
        let mut done = 0;
        while done < run.pages {
            let start = run.start.add(done);
            let pages = CHUNK_PAGES.min(run.pages - done);
            let bytes = usize::try_from(pages).unwrap_or(0) * PAGE_SIZE;
            let got = memory.read_at(&mut self.room[..bytes], start.get()).unwrap_or(0) / PAGE_SIZE;
            for (number, page) in (0..).zip(self.room[..got * PAGE_SIZE].chunks_exact(PAGE_SIZE)) {
                let (address, hash) = (start.add(number), hash(page));
                // What is reported is known again when it is copied: until then nobody has it.
                match before.get(address) == hash {
                    true => now.set(address, hash),
                    false => report(runs, address, hash == self.zero),
                }
            }
            if got == 0 {
                // It cannot be read, or is gone meanwhile.
                report(runs, start, false);
            }
            done += (got as u64).max(1);
        }
    }
}

/// Adds a page to the last run, or as a new one.
fn report(runs: &mut Vec<Run>, address: ImageAddr, zero: bool) {
    match runs.last_mut() {
        Some(last) if last.pages.end() == address && last.zero == zero => last.pages.pages += 1,
        _ => runs.extend(PageRun::new(address, 1).map(|pages| Run { pages, zero })),
    }
}

/// What a page is known by; never 0.
fn hash(page: &[u8]) -> u128 {
    xxh3_128(page).max(1)
}

/// The hashes of what was copied; 0 where nothing was.
type Hashes = ByPage<u128>;

/// A value for each page, the default where none was set.
#[derive(Debug, Default)]
pub(super) struct ByPage<T>(HashMap<u64, Box<[T]>>);

impl<T: Copy + Default> ByPage<T> {
    fn place(address: ImageAddr) -> (u64, usize) {
        let page = address.get() / PAGE_BYTES;
        (page / GROUP_PAGES, usize::try_from(page % GROUP_PAGES).unwrap_or(0))
    }

    pub(super) fn get(&self, address: ImageAddr) -> T {
        let (group, index) = Self::place(address);
        self.0.get(&group).map_or_else(T::default, |group| group[index])
    }

    pub(super) fn set(&mut self, address: ImageAddr, value: T) {
        let (group, index) = Self::place(address);
        let empty = || vec![T::default(); usize::try_from(GROUP_PAGES).unwrap_or(0)].into_boxed_slice();
        self.0.entry(group).or_insert_with(empty)[index] = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_known_by_what_was_copied_of_it() {
        let mut hashes = Hashes::default();
        let page = |number: u64| ImageAddr::containing(number * PAGE_BYTES);
        hashes.set(page(511), 1);
        hashes.set(page(512), 2);
        assert_eq!((hashes.get(page(511)), hashes.get(page(512)), hashes.get(page(513))), (1, 2, 0));
    }

    #[test]
    fn a_page_that_was_reported_and_not_copied_is_reported_again() {
        let region = kernel::arena::Region::anonymous(1).unwrap();
        let page = PageRun::new(ImageAddr::containing(region.address() as u64), 1).unwrap();
        let memory = File::open("/proc/self/mem").unwrap();
        let mut content = Content::default();
        let mut scan = |word, before: &Hashes| {
            region.page(0)[0].store(word, std::sync::atomic::Ordering::Relaxed);
            let (mut now, mut runs) = (Hashes::default(), Vec::new());
            content.compare(&memory, page, before, &mut now, &mut runs);
            (!runs.is_empty(), now)
        };
        let mut known = Hashes::default();
        assert!(scan(1, &known).0);
        let mut copy = [0; PAGE_SIZE];
        memory.read_exact_at(&mut copy, page.start.get()).unwrap();
        known.set(page.start, hash(&copy));
        assert!(!scan(1, &known).0);
        let (changed, known) = scan(2, &known);
        assert!(changed);
        assert!(scan(1, &known).0, "it is as it was before, and nobody has it");
    }

    #[test]
    fn pages_that_follow_each_other_are_one_run_if_they_are_alike() {
        let mut runs = Vec::new();
        let page = |number: u64| ImageAddr::containing(number * PAGE_BYTES);
        for (number, zero) in [(1, false), (2, false), (3, true), (5, true)] {
            report(&mut runs, page(number), zero);
        }
        let seen: Vec<_> = runs.iter().map(|run| (run.pages.start, run.pages.pages, run.zero)).collect();
        assert_eq!(seen, [(page(1), 2, false), (page(3), 1, true), (page(5), 1, true)]);
    }
}
