//! An image directory: the tasks of a dump, their memory maps and what of their memory is lazy.
//!
//! ```text
//!   DIR/inventory.img  pstree.img                       once
//!       core-PID.img                                    each task (and thread)
//!       mm-PID.img  pagemap-PID.img  pages-ID.img       each task that is not a zombie
//!       parent -> ../EARLIER                            if the dump is incremental
//! ```
//!
//! The directory may have come from another host: names are fixed words and numbers, a symlink in place of an
//! image is refused, and every file is bounded before it is read.

mod error;
mod files;
mod task;

use std::path::Path;

pub use error::ImageError;
pub(super) use files::ImageDir;
pub use files::ImageName;
pub use task::TaskImages;

use crate::criu::images::{
    self, CoreTask, DumpStats, Inventory, MmEntry, Pagemap, PagemapHead, PstreeEntry, RestoreStats, TaskState,
};
use crate::criu::page_server::HeaderLayout;
use crate::units::TaskId;

/// The small images of a dump, read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// What the dump as a whole says.
    pub inventory: Inventory,
    /// All tasks, zombies too, in the order of `pstree.img` (parents first).
    pub tasks: Vec<TaskImages>,
}

impl Checkpoint {
    /// Reads the images in `dir`. Pages files are not touched.
    ///
    /// # Errors
    /// [`ImageError`] if an image is missing, unreadable or damaged, or if images contradict each other.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let dir = ImageDir::open(dir)?;
        let inventory = dir.decode(ImageName::Inventory, images::read_inventory)?;
        let pstree = dir.decode(ImageName::Pstree, images::read_pstree)?;
        let tasks =
            pstree.into_iter().map(|entry| TaskImages::read(&dir, entry)).collect::<Result<_, _>>()?;
        Ok(Self { inventory, tasks })
    }

    /// Writes the images that [`Checkpoint::open`] reads into `dir`, for tests. `criu restore` needs many more.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn write(&self, dir: &Path) -> Result<(), ImageError> {
        let put = |name: ImageName, image: Vec<u8>| {
            let path = dir.join(name.to_string());
            std::fs::write(&path, image).map_err(|source| ImageError::Io { action: "write", path, source })
        };
        put(ImageName::Inventory, images::write_inventory(&self.inventory))?;
        put(
            ImageName::Pstree,
            images::write_pstree(&self.tasks.iter().map(pstree_entry).collect::<Vec<_>>()),
        )?;
        for task in &self.tasks {
            let state = if task.alive { TaskState::Alive } else { TaskState::Dead };
            let core = CoreTask { state, exit_code: 0, comm: task.comm.clone() };
            put(ImageName::Core(task.id), images::write_core(&core))?;
            if task.alive {
                let mm = MmEntry { vmas: task.vmas.clone(), ..MmEntry::default() };
                let head = PagemapHead { pages_id: task.pages_id };
                let pagemap = Pagemap { head, entries: task.pagemap.clone() };
                put(ImageName::Mm(task.id), images::write_mm(&mm))?;
                put(ImageName::Pagemap(task.id), images::write_pagemap(&pagemap))?;
            }
        }
        Ok(())
    }

    /// The images of a task.
    #[must_use]
    pub fn task(&self, id: TaskId) -> Option<&TaskImages> {
        self.tasks.iter().find(|task| task.id == id)
    }

    /// Pages left on the source, of all tasks.
    #[must_use]
    pub fn lazy_pages(&self) -> u64 {
        self.tasks.iter().map(TaskImages::lazy_pages).fold(0, u64::saturating_add)
    }

    /// The header layout of the page server of this dump, told from the pagemaps. `None` if they hold no entry, or
    /// entries of both kinds, which no CRIU writes.
    #[must_use]
    pub fn header_layout(&self) -> Option<HeaderLayout> {
        let mut wide = self.tasks.iter().flat_map(|task| &task.pagemap).map(|entry| entry.wide);
        let first = wide.next()?;
        let layout = if first { HeaderLayout::Wide } else { HeaderLayout::Compact };
        wide.all(|other| other == first).then_some(layout)
    }
}

/// Reads `stats-dump` in `dir`. See [`DumpStats`] on what a lazy dump leaves in it.
///
/// # Errors
/// [`ImageError`]; [`ImageError::NoStats`] if the file is about a restore.
pub fn read_dump_stats(dir: &Path) -> Result<DumpStats, ImageError> {
    let dir = ImageDir::open(dir)?;
    let stats = dir.decode(ImageName::StatsDump, images::read_stats)?;
    stats.dump.ok_or_else(|| ImageError::NoStats { path: dir.path(ImageName::StatsDump) })
}

/// Reads `stats-restore` in `dir`.
///
/// # Errors
/// [`ImageError`]; [`ImageError::NoStats`] if the file is about a dump.
pub fn read_restore_stats(dir: &Path) -> Result<RestoreStats, ImageError> {
    let dir = ImageDir::open(dir)?;
    let stats = dir.decode(ImageName::StatsRestore, images::read_stats)?;
    stats.restore.ok_or_else(|| ImageError::NoStats { path: dir.path(ImageName::StatsRestore) })
}

fn pstree_entry(task: &TaskImages) -> PstreeEntry {
    PstreeEntry {
        pid: task.id,
        ppid: task.ppid,
        pgid: task.pgid,
        sid: task.sid,
        threads: task.threads.clone(),
    }
}

#[cfg(test)]
mod tests;
