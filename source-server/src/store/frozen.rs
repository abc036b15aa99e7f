//! Pages stay in the frozen tasks: served from the first millisecond, freed all at once at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::lazy_map::LazyMap;
use protocol::link::Stream;
use protocol::units::pages_to_bytes;

use super::{PageStore, Scratch, StoreError, TaskMemory};
use crate::ledger::IndexedTaskRun;
use crate::limits::PUSH_FRAME_PAGES;

/// Reads the frozen tasks.
#[derive(Debug)]
pub struct FrozenStore {
    map: Arc<LazyMap>,
    memory: Arc<TaskMemory>,
    held_pages: AtomicU64,
}

impl FrozenStore {
    /// A store over `memory`.
    #[must_use]
    pub fn new(map: Arc<LazyMap>, memory: Arc<TaskMemory>) -> Self {
        let held_pages = AtomicU64::new(map.pages());
        Self { map, memory, held_pages }
    }
}

impl PageStore for FrozenStore {
    fn chunk_pages(&self) -> u64 {
        PUSH_FRAME_PAGES
    }

    fn chunks_at_hand(&self) -> u64 {
        u64::MAX
    }

    fn read(&self, _: &mut Scratch, first: u64, pages: &mut [u8]) -> Result<u64, StoreError> {
        self.memory.read_indexed(&self.map, first, pages)
    }

    fn send(
        &self,
        _: &mut Scratch,
        runs: &[IndexedTaskRun],
        id: u64,
        link: &Stream,
    ) -> Result<bool, StoreError> {
        self.memory.send(runs, id, link)?;
        Ok(true)
    }

    fn free(&self, chunk: u64) {
        let first = chunk * PUSH_FRAME_PAGES;
        let pages = (self.map.pages().saturating_sub(first)).min(PUSH_FRAME_PAGES);
        self.held_pages.fetch_sub(pages, Ordering::Relaxed);
    }

    fn held_bytes(&self) -> u64 {
        pages_to_bytes(self.held_pages.load(Ordering::Relaxed))
    }
}
