//! Where the pages wait at the source: chunks that are drained out of the stopped tasks, read, and freed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::link::Stream;
use protocol::units::PAGE_SIZE;
use source_server::ledger::IndexedTaskRun;
use source_server::store::{PageStore, Scratch, StoreError};

use super::pages::fill;

/// What the kernel has of the pages, whoever serves them: pipes, and the memory of stopped tasks.
#[derive(Debug)]
pub struct Pages {
    chunk_pages: u64,
    /// What each page holds, by index.
    contents: Vec<u64>,
    /// Chunks that are in pipes.
    drained: AtomicU64,
    freed: Mutex<Vec<bool>>,
}

impl Pages {
    /// Of tasks that stand still; nothing is drained yet.
    #[must_use]
    pub fn new(contents: Vec<u64>, chunk_pages: u64) -> Arc<Self> {
        let chunks = contents.len().div_ceil(usize::try_from(chunk_pages).expect("a small chunk"));
        let freed = Mutex::new(vec![false; chunks]);
        Arc::new(Self { chunk_pages, contents, drained: AtomicU64::new(0), freed })
    }

    fn freed(&self) -> MutexGuard<'_, Vec<bool>> {
        self.freed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more chunk is in its pipe; whether that was the last.
    pub fn drain_one(&self) -> bool {
        let chunks = self.freed().len() as u64;
        let drained = (self.drained.load(Ordering::Relaxed) + 1).min(chunks);
        self.drained.store(drained, Ordering::Relaxed);
        drained == chunks
    }
}

/// A program's hold on them.
#[derive(Debug)]
pub struct Store(pub Arc<Pages>);

impl PageStore for Store {
    fn chunk_pages(&self) -> u64 {
        self.0.chunk_pages
    }

    fn chunks_at_hand(&self) -> u64 {
        self.0.drained.load(Ordering::Relaxed)
    }

    fn read(&self, _: &mut Scratch, first: u64, pages: &mut [u8]) -> Result<u64, StoreError> {
        let chunk = first / self.0.chunk_pages;
        if self.0.freed().get(usize::try_from(chunk).expect("a small number")) != Some(&false) {
            return Ok(0);
        }
        let end = (self.0.contents.len() as u64).min((chunk + 1) * self.0.chunk_pages);
        let mut read = 0;
        for (index, page) in (first..end).zip(pages.chunks_exact_mut(PAGE_SIZE)) {
            fill(self.0.contents[usize::try_from(index).expect("a small index")], page);
            read += 1;
        }
        Ok(read)
    }

    fn send(&self, _: &mut Scratch, _: &[IndexedTaskRun], _: u64, _: &Stream) -> Result<bool, StoreError> {
        // Over the links of a world what is read is sent: see `Source::push`.
        Ok(false)
    }

    fn free(&self, chunk: u64) {
        if let Some(freed) = self.0.freed().get_mut(usize::try_from(chunk).expect("a small number")) {
            *freed = true;
        }
    }

    fn held_bytes(&self) -> u64 {
        0
    }
}
