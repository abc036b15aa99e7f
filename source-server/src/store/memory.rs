//! The memory of stopped tasks.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use protocol::lazy_map::LazyMap;
use protocol::link::Stream;
use protocol::units::{ImageAddr, PAGE_SIZE, TaskId, pages_to_bytes};
use protocol::wire::frame::Kind;

use super::{StoreError, leading};
use crate::ledger::IndexedTaskRun;

/// Reads the memory of stopped tasks through `/proc/PID/mem`, which also reads `PROT_NONE` pages
/// (`process_vm_readv` does not).
#[derive(Debug, Default)]
pub struct TaskMemory {
    files: HashMap<TaskId, File>,
}

impl TaskMemory {
    /// Opens the memory of tasks, given by image pid and host pid.
    ///
    /// # Errors
    /// `EACCES` without ptrace rights, `ENOENT` if a task is gone.
    pub fn open(tasks: impl IntoIterator<Item = (TaskId, u32)>) -> io::Result<Self> {
        let open = |(id, pid): (TaskId, u32)| Ok((id, File::open(format!("/proc/{pid}/mem"))?));
        Ok(Self { files: tasks.into_iter().map(open).collect::<io::Result<_>>()? })
    }

    /// Whether `task` is one of them.
    #[must_use]
    pub fn has(&self, task: TaskId) -> bool {
        self.files.contains_key(&task)
    }

    /// Fills `pages` from `start` on; returns the bytes of whole pages that could be read, at least one
    /// page.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the first page cannot be read: not mapped, or the task is gone.
    pub fn read(&self, task: TaskId, start: ImageAddr, pages: &mut [u8]) -> Result<usize, StoreError> {
        let missing = || StoreError::Missing { task, addr: start };
        let file = self.files.get(&task).ok_or_else(missing)?;
        let mut filled = 0;
        while filled < pages.len() {
            match file.read_at(&mut pages[filled..], start.get() + filled as u64) {
                Ok(0) => break,
                Ok(got) => filled += got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let whole = filled - filled % PAGE_SIZE;
        if whole == 0 { Err(missing()) } else { Ok(whole) }
    }

    /// Fills `pages` with those from the index `first` of `map` on that lie together; how many these were, none if there
    /// is no such index.
    ///
    /// # Errors
    /// As [`TaskMemory::read`].
    pub fn read_indexed(&self, map: &LazyMap, first: u64, pages: &mut [u8]) -> Result<u64, StoreError> {
        let Some((task, addr, follow)) = map.locate(first) else { return Ok(0) };
        Ok((self.read(task, addr, leading(pages, follow))? / PAGE_SIZE) as u64)
    }

    /// Sends runs, each as a frame numbered from `id` on.
    ///
    /// # Errors
    /// As [`TaskMemory::read`]; [`StoreError::Link`].
    pub fn send(&self, runs: &[IndexedTaskRun], id: u64, link: &Stream) -> Result<(), StoreError> {
        let mut buffer = Vec::new();
        for (run, id) in runs.iter().zip(id..) {
            let IndexedTaskRun { what, .. } = run;
            let bytes = usize::try_from(pages_to_bytes(what.run.pages)).unwrap_or(0);
            buffer.resize(bytes, 0);
            let mut filled = 0;
            while filled < bytes {
                let at = what.run.start.add((filled / PAGE_SIZE) as u64);
                filled += self.read(what.task, at, &mut buffer[filled..])?;
            }
            let head = what.frame(Kind::Pages, id, bytes);
            link.send_both(&head, &buffer, false).map_err(StoreError::Link)?;
        }
        Ok(())
    }
}
