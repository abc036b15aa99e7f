//! Which pages stayed behind, numbered.
//!
//! Both sides read the same images and so build the same map: task by task in the order of the process
//! tree, run by run in address order, every lazy page has one index from 0. Page states are then plain
//! bitmaps over that index, and neither side ever sends a map to the other.

use crate::criu::limits::MAX_LAZY_PAGES;
use crate::units::{ImageAddr, PageRun, TaskId};

/// One lazy run and the index of its first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexedRun {
    /// The pages, by image address.
    pub run: PageRun,
    /// Index of the first page in the whole map.
    pub first: u64,
}

/// The lazy pages of one task.
#[derive(Clone, Debug)]
pub struct TaskMap {
    /// The task.
    pub id: TaskId,
    /// Its runs in address order.
    pub runs: Vec<IndexedRun>,
    /// Index of its first page.
    pub first: u64,
    /// Number of its lazy pages.
    pub pages: u64,
}

impl TaskMap {
    /// Position in `runs` of the run that holds `addr`.
    #[must_use]
    pub fn run_at(&self, addr: ImageAddr) -> Option<&IndexedRun> {
        let behind = self.runs.partition_point(|r| r.run.start <= addr);
        let candidate = self.runs.get(behind.checked_sub(1)?)?;
        candidate.run.contains(addr).then_some(candidate)
    }

    /// Index of the page at `addr`, if it is lazy.
    #[must_use]
    pub fn index_of(&self, addr: ImageAddr) -> Option<u64> {
        let found = self.run_at(addr)?;
        Some(found.first + addr.pages_since(found.run.start))
    }

    /// Index of the first page of `run`, if all of it lies in one lazy run.
    #[must_use]
    pub fn index_of_run(&self, run: PageRun) -> Option<u64> {
        let found = self.run_at(run.start).filter(|found| run.end() <= found.run.end())?;
        Some(found.first + run.start.pages_since(found.run.start))
    }

    /// Address of the page with `index`, and how many pages follow in its run (itself included).
    #[must_use]
    pub fn locate(&self, index: u64) -> Option<(ImageAddr, u64)> {
        let behind = self.runs.partition_point(|r| r.first <= index);
        let found = self.runs.get(behind.checked_sub(1)?)?;
        let offset = index - found.first;
        (offset < found.run.pages).then(|| (found.run.start.add(offset), found.run.pages - offset))
    }
}

/// A run list that cannot be numbered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LazyMapError {
    /// The runs of a task overlap or are not in address order.
    #[error("lazy runs of task {task} are out of order at {at}")]
    Unordered {
        /// The task.
        task: TaskId,
        /// Start of the offending run.
        at: ImageAddr,
    },
    /// More pages than there can be.
    #[error("task {0} brings the lazy pages to more than {MAX_LAZY_PAGES}; the images are damaged")]
    TooManyPages(TaskId),
    /// A task appears twice.
    #[error("task {0} appears twice")]
    Twice(TaskId),
}

/// The lazy pages of a whole process tree.
#[derive(Clone, Debug, Default)]
pub struct LazyMap {
    tasks: Vec<TaskMap>,
    pages: u64,
}

impl LazyMap {
    /// Numbers the runs of `tasks` in the order given.
    ///
    /// # Errors
    /// [`LazyMapError`] if a task appears twice, its runs overlap or are unsorted, or the pages are more than
    /// [`MAX_LAZY_PAGES`].
    pub fn new(tasks: impl IntoIterator<Item = (TaskId, Vec<PageRun>)>) -> Result<Self, LazyMapError> {
        let mut map = Self::default();
        for (id, runs) in tasks {
            if map.task(id).is_some() {
                return Err(LazyMapError::Twice(id));
            }
            let first = map.pages;
            let mut indexed = Vec::with_capacity(runs.len());
            let mut end = ImageAddr::default();
            for run in runs {
                if run.start < end {
                    return Err(LazyMapError::Unordered { task: id, at: run.start });
                }
                end = run.end();
                indexed.push(IndexedRun { run, first: map.pages });
                map.pages = map
                    .pages
                    .checked_add(run.pages)
                    .filter(|pages| *pages <= MAX_LAZY_PAGES)
                    .ok_or(LazyMapError::TooManyPages(id))?;
            }
            map.tasks.push(TaskMap { id, runs: indexed, first, pages: map.pages - first });
        }
        Ok(map)
    }

    /// All lazy pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The tasks in index order.
    #[must_use]
    pub fn tasks(&self) -> &[TaskMap] {
        &self.tasks
    }

    /// The map of one task.
    #[must_use]
    pub fn task(&self, id: TaskId) -> Option<&TaskMap> {
        self.tasks.iter().find(|t| t.id == id)
    }

    /// Task and address of the page with `index`, and how many pages follow in its run (itself included).
    #[must_use]
    pub fn locate(&self, index: u64) -> Option<(TaskId, ImageAddr, u64)> {
        let behind = self.tasks.partition_point(|t| t.first <= index);
        // Tasks without lazy pages share their `first` with the next one: the last of them that has pages
        // is the one.
        let task = self.tasks[..behind].iter().rev().find(|t| t.pages > 0)?;
        let (addr, follow) = task.locate(index)?;
        Some((task.id, addr, follow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::containing(start), pages).unwrap()
    }

    #[test]
    fn numbers_pages_across_tasks_and_runs() {
        let map = LazyMap::new([
            (TaskId(7), vec![run(0x1000, 2), run(0x5000, 3)]),
            (TaskId(8), vec![]),
            (TaskId(9), vec![run(0x1000, 4)]),
        ])
        .unwrap();
        assert_eq!(map.pages(), 9);
        let seven = map.task(TaskId(7)).unwrap();
        assert_eq!(seven.index_of(ImageAddr::containing(0x6000)), Some(3));
        assert_eq!(seven.index_of(ImageAddr::containing(0x3000)), None);
        assert_eq!(map.locate(3), Some((TaskId(7), ImageAddr::containing(0x6000), 2)));
        assert_eq!(map.locate(5), Some((TaskId(9), ImageAddr::containing(0x1000), 4)));
        assert_eq!(map.locate(9), None);
        for index in 0..9 {
            let (task, addr, _) = map.locate(index).unwrap();
            assert_eq!(map.task(task).unwrap().index_of(addr), Some(index));
        }
    }

    #[test]
    fn refuses_more_pages_than_there_can_be() {
        let map = |tasks: &[u64]| {
            let ids = (1..).map(TaskId);
            LazyMap::new(ids.zip(tasks.iter().map(|pages| vec![run(0, *pages)])))
        };
        assert_eq!(map(&[MAX_LAZY_PAGES - 1, 1]).unwrap().pages(), MAX_LAZY_PAGES);
        assert_eq!(map(&[MAX_LAZY_PAGES, 1]).unwrap_err(), LazyMapError::TooManyPages(TaskId(2)));
        // Together more than a number holds.
        assert_eq!(map(&[(1 << 52) - 1; 4097]).unwrap_err(), LazyMapError::TooManyPages(TaskId(1)));
    }

    #[test]
    fn refuses_overlap_and_double_tasks() {
        let overlap = LazyMap::new([(TaskId(7), vec![run(0x1000, 2), run(0x2000, 3)])]);
        assert!(matches!(overlap, Err(LazyMapError::Unordered { .. })));
        let twice = LazyMap::new([(TaskId(7), vec![]), (TaskId(7), vec![])]);
        assert_eq!(twice.unwrap_err(), LazyMapError::Twice(TaskId(7)));
    }
}
