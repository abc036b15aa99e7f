//! What pre-copy brought, until it is installed.
//!
//! ```text
//!   PrecopyLane  Areas, Precopy, PrecopyZero, Round ─▶ PageCache   by task and address, while the tasks run at the source
//!   Clean pieces ─▶ CleanPages ─────────────────────────▶ Kept     what is clean, by task; the rest is dropped
//!   Kept: installed by the fault loop, where a thread waits for a page, and by Installing, everything else
//! ```
//!
//! Pages lie in chunks of 2 MiB of addresses, where they are received into and installed from. A page gives its memory back as
//! soon as every address space that misses it has it, so the cache and the restored memory together take hardly more than the
//! larger of the two.

mod chunk;
mod clean;
mod install;
mod kept;
mod lane;
#[cfg(test)]
mod tests;

pub use chunk::Content;
pub use clean::{CleanError, CleanPages};
pub use install::{Installing, Milestone};
pub use kept::{Kept, KeptRun};
pub use lane::{PrecopyError, PrecopyLane, PrecopyProgress};

use std::collections::BTreeMap;
use std::io;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{ImageAddr, PageRun, TaskId, bytes_to_pages};
use protocol::wire::frame::TaskRun;
use protocol::wire::precopy::{Areas, Round};

use self::chunk::{CHUNK_PAGES, Chunk, parts};
use crate::limits;

/// Why a source's copies are not taken.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// More pages than it offered.
    #[error("the source sends more than the {0} pages that it offered to send before the freeze")]
    TooManyPages(u64),
    /// More tasks or areas than are remembered.
    #[error("the source names more than {max} {what} before the freeze")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        max: usize,
    },
    /// Pages where no memory was said to be.
    #[error("the source sends {pages} pages at {start} of task {task}, which lie in no area that it named")]
    Outside {
        /// The task.
        task: TaskId,
        /// The first page.
        start: ImageAddr,
        /// How many.
        pages: u64,
    },
    /// Something of another round than the one that is running.
    #[error("the source sends something of round {said} in round {running}")]
    OutOfOrder {
        /// The source's number.
        said: u64,
        /// The round that is running.
        running: u64,
    },
    /// A page is called clean that is not here.
    #[error("the source says that the page at {at} of task {task} is here, but it is not")]
    NotKept {
        /// The task.
        task: TaskId,
        /// The page.
        at: ImageAddr,
    },
    /// The lane broke, or there is no memory.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Pages of tasks that still run at the source, by task and address.
#[derive(Debug)]
pub struct PageCache {
    tasks: BTreeMap<TaskId, TaskPages>,
    /// The round that is running.
    round: u64,
    most: u64,
    kept: u64,
    /// Areas of all tasks.
    areas: usize,
}

/// Memory of pages that are not needed. To drop it takes tens of milliseconds for each GiB.
#[derive(Debug, Default)]
pub struct Unneeded {
    _chunks: Vec<Chunk>,
}

#[derive(Debug, Default)]
struct TaskPages {
    /// By address, without overlap.
    areas: Vec<PageRun>,
    /// The last round that named them.
    named_in: u64,
    chunks: BTreeMap<u64, Chunk>,
}

impl PageCache {
    /// An empty cache, for `most` pages.
    #[must_use]
    pub const fn new(most: u64) -> Self {
        Self { tasks: BTreeMap::new(), round: 1, most, kept: 0, areas: 0 }
    }

    /// Pages that are kept.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.kept
    }

    /// Says where a task has memory: what is kept of it elsewhere is dropped.
    ///
    /// # Errors
    /// [`CacheError::TooMany`].
    pub fn areas(&mut self, areas: Areas) -> Result<(), CacheError> {
        let known = self.tasks.contains_key(&areas.task);
        if !known && self.tasks.len() >= limits::PRECOPY_TASKS_MAX {
            return Err(CacheError::TooMany { what: "tasks", max: limits::PRECOPY_TASKS_MAX });
        }
        let task = self.tasks.entry(areas.task).or_default();
        let count = self.areas - task.areas.len() + areas.areas.len();
        if count > limits::PRECOPY_AREAS_MAX {
            return Err(CacheError::TooMany { what: "areas", max: limits::PRECOPY_AREAS_MAX });
        }
        self.areas = count;
        task.named_in = self.round;
        if areas.starts_again {
            self.kept -= std::mem::take(&mut task.chunks).values().map(kept_in).sum::<u64>();
        } else if areas.areas != task.areas {
            self.kept -= task.keep_only(&areas.areas);
        }
        task.areas = areas.areas;
        Ok(())
    }

    /// Keeps what `fill` writes, part by part, in place of what was kept of these pages.
    ///
    /// # Errors
    /// [`CacheError`]; what `fill` says.
    pub fn fill(
        &mut self,
        what: TaskRun,
        round: u64,
        mut fill: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<(), CacheError> {
        self.replace(what, round, |chunk, pages, round| chunk.fill(pages, round, &mut fill))
    }

    /// Keeps zeros, in place of what was kept of these pages.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn zero(&mut self, what: TaskRun, round: u64) -> Result<(), CacheError> {
        self.replace(what, round, |chunk, pages, round| {
            chunk.zero(pages, round);
            Ok(())
        })
    }

    fn replace(
        &mut self,
        what: TaskRun,
        round: u64,
        mut put: impl FnMut(&mut Chunk, std::ops::Range<u64>, u8) -> io::Result<()>,
    ) -> Result<(), CacheError> {
        if round != self.round {
            return Err(CacheError::OutOfOrder { said: round, running: self.round });
        }
        let TaskRun { task, run } = what;
        let outside = CacheError::Outside { task, start: run.start, pages: run.pages };
        let Some(pages) = self.tasks.get_mut(&task).filter(|task| task.has_area(run)) else {
            return Err(outside);
        };
        let round = u8::try_from(round).unwrap_or(u8::MAX);
        for (number, range) in parts(run.start, run.pages) {
            let before = pages.chunks.get(&number).map_or(0, |chunk| chunk.kept_in(&range));
            let more = range.end - range.start - before;
            // Before there is a chunk for it: what is offered bounds the memory.
            if self.kept + more > self.most {
                return Err(CacheError::TooManyPages(self.most));
            }
            let chunk = match pages.chunks.entry(number) {
                std::collections::btree_map::Entry::Occupied(chunk) => chunk.into_mut(),
                std::collections::btree_map::Entry::Vacant(free) => free.insert(Chunk::new()?),
            };
            // Should it fail, these pages are not kept any more.
            self.kept -= before;
            put(chunk, range, round)?;
            self.kept += before + more;
        }
        Ok(())
    }

    /// A round is over: tasks that it did not name have ended.
    ///
    /// # Errors
    /// [`CacheError::OutOfOrder`].
    pub fn end_round(&mut self, round: Round) -> Result<(), CacheError> {
        if u64::from(round.number) != self.round {
            return Err(CacheError::OutOfOrder { said: u64::from(round.number), running: self.round });
        }
        let ended: Vec<TaskId> =
            self.tasks.iter().filter(|(_, task)| task.named_in < self.round).map(|(id, _)| *id).collect();
        for task in ended.iter().filter_map(|id| self.tasks.remove(id)) {
            self.kept -= task.chunks.values().map(kept_in).sum::<u64>();
            self.areas -= task.areas.len();
        }
        self.round += 1;
        Ok(())
    }

    /// What is clean of each task of `map`, in its order, and everything else.
    ///
    /// # Errors
    /// [`CacheError::NotKept`].
    pub fn into_clean(mut self, map: &LazyMap, clean: &Bitmap) -> Result<(Vec<Kept>, Unneeded), CacheError> {
        let mut unneeded = Vec::new();
        let mut kept = Vec::new();
        for task in map.tasks() {
            let chunks = self.tasks.remove(&task.id).unwrap_or_default().chunks;
            kept.push(Kept::new(task, clean, chunks, &mut unneeded)?);
        }
        unneeded.extend(self.tasks.into_values().flat_map(|task| task.chunks.into_values()));
        Ok((kept, Unneeded { _chunks: unneeded }))
    }
}

fn kept_in(chunk: &Chunk) -> u64 {
    chunk.kept_in(&(0..CHUNK_PAGES))
}

impl TaskPages {
    fn has_area(&self, run: PageRun) -> bool {
        let behind = self.areas.partition_point(|area| area.start <= run.start);
        behind.checked_sub(1).is_some_and(|at| run.end() <= self.areas[at].end())
    }

    /// Drops what lies in none of these areas; says how many pages.
    fn keep_only(&mut self, areas: &[PageRun]) -> u64 {
        let page = |addr: ImageAddr| bytes_to_pages(addr.get());
        let (mut from, mut dropped) = (0, 0);
        for area in areas {
            dropped += self.drop_pages(from, page(area.start));
            from = page(area.end());
        }
        dropped + self.drop_pages(from, u64::MAX)
    }

    /// Drops the pages with these numbers from the start of the address space.
    fn drop_pages(&mut self, first: u64, end: u64) -> u64 {
        if first >= end {
            return 0;
        }
        let mut dropped = 0;
        let mut empty = Vec::new();
        for (number, chunk) in self.chunks.range_mut(first / CHUNK_PAGES..=(end - 1) / CHUNK_PAGES) {
            let start = number * CHUNK_PAGES;
            let pages = first.saturating_sub(start)..(end - start).min(CHUNK_PAGES);
            dropped += chunk.forget(&pages);
            chunk.give_back(&pages);
            empty.extend(chunk.is_empty().then_some(*number));
        }
        empty.iter().for_each(|number| drop(self.chunks.remove(number)));
        dropped
    }
}
