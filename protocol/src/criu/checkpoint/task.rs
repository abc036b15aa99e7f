//! The images of one task.

use super::error::ImageError;
use super::files::{ImageDir, ImageName};
use crate::criu::images::{self, PagemapEntry, PstreeEntry, TaskState, Vma};
use crate::criu::limits::MAX_PID;
use crate::units::{ImageAddr, PageRun, TaskId};

/// The images of one task. Lists of a dead task are empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskImages {
    /// Pid in the images.
    pub id: TaskId,
    /// Pid of the parent, 0 for the root of the tree.
    pub ppid: u32,
    /// Process group; 0 if it is outside the tree's PID namespace.
    pub pgid: u32,
    /// Session; 0 if it is outside the tree's PID namespace.
    pub sid: u32,
    /// Thread ids, the main thread's first.
    pub threads: Vec<u32>,
    /// Name of the task, for messages.
    pub comm: String,
    /// Whether the task has memory. A zombie has not: no mm and pagemap image, and no userfaultfd at hand-over.
    pub alive: bool,
    /// VMAs in ascending order.
    pub vmas: Vec<Vma>,
    /// Pagemap entries in ascending order.
    pub pagemap: Vec<PagemapEntry>,
    /// The data of present pages is in `pages-<pages_id>.img`; 0 for a dead task.
    pub pages_id: u32,
}

impl TaskImages {
    pub(super) fn read(dir: &ImageDir, entry: PstreeEntry) -> Result<Self, ImageError> {
        let id = entry.pid;
        let core = dir.decode(ImageName::Core(id), images::read_core)?;
        let mut task = Self {
            id,
            ppid: entry.ppid,
            pgid: entry.pgid,
            sid: entry.sid,
            threads: Vec::new(),
            comm: core.comm,
            alive: false,
            vmas: Vec::new(),
            pagemap: Vec::new(),
            pages_id: 0,
        };
        match core.state {
            TaskState::Alive | TaskState::Stopped => task.read_memory(dir, entry.threads)?,
            TaskState::Dead | TaskState::Zombie => {}
            TaskState::Unknown(state) => {
                return Err(ImageError::TaskState { path: dir.path(ImageName::Core(id)), state });
            }
        }
        Ok(task)
    }

    fn read_memory(&mut self, dir: &ImageDir, threads: Vec<u32>) -> Result<(), ImageError> {
        let task = self.id;
        if let Some(&thread) = threads.iter().find(|&&thread| thread == 0 || thread > MAX_PID) {
            return Err(ImageError::Thread { path: dir.path(ImageName::Pstree), task, thread });
        }
        let pagemap = dir.decode(ImageName::Pagemap(task), images::read_pagemap)?;
        self.alive = true;
        self.threads = threads;
        self.vmas = dir.decode(ImageName::Mm(task), images::read_mm)?.vmas;
        self.pagemap = pagemap.entries;
        self.pages_id = pagemap.head.pages_id;
        match self.lazy_cuts().find_map(Result::err) {
            Some(addr) => {
                Err(ImageError::LazyOutsideVmas { path: dir.path(ImageName::Pagemap(task)), task, addr })
            }
            None => Ok(()),
        }
    }

    /// The runs of lazy pages in address order: one for each pagemap entry, cut where VMAs meet. A run so cut is
    /// in one VMA, so it can be installed in one piece, and in one entry, so CRIU's page server can answer it in
    /// one piece.
    #[must_use]
    pub fn lazy_runs(&self) -> Vec<PageRun> {
        self.lazy_cuts().flatten().collect()
    }

    /// Number of lazy pages.
    #[must_use]
    pub fn lazy_pages(&self) -> u64 {
        self.lazy_cuts().flatten().map(|run| run.pages).fold(0, u64::saturating_add)
    }

    fn lazy_cuts(&self) -> LazyCuts<'_> {
        LazyCuts { vmas: &self.vmas, entries: self.pagemap.iter(), rest: None }
    }
}

/// Walks lazy entries and VMAs side by side. Gives the address of a page that is in no VMA as an error, once for
/// each entry.
struct LazyCuts<'a> {
    vmas: &'a [Vma],
    entries: std::slice::Iter<'a, PagemapEntry>,
    rest: Option<PageRun>,
}

impl Iterator for LazyCuts<'_> {
    type Item = Result<PageRun, ImageAddr>;

    fn next(&mut self) -> Option<Self::Item> {
        let run = match self.rest.take() {
            Some(rest) => rest,
            None => self.entries.find(|entry| entry.flags.lazy)?.run,
        };
        let below = self.vmas.partition_point(|vma| vma.end <= run.start);
        self.vmas = self.vmas.get(below..).unwrap_or_default();
        let Some(vma) = self.vmas.first().filter(|vma| vma.start <= run.start) else {
            return Some(Err(run.start));
        };
        let pages = run.pages.min(vma.end.pages_since(run.start));
        self.rest = PageRun::new(run.start.add(pages), run.pages - pages);
        Some(Ok(PageRun { start: run.start, pages }))
    }
}
