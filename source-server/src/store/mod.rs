//! Where the pages wait.

mod frozen;
mod memory;
mod pipes;
mod scratch;

pub use frozen::FrozenStore;
pub use memory::TaskMemory;
pub use pipes::PipeStore;
pub use scratch::Scratch;

use std::io;

use protocol::link::Stream;
use protocol::units::{ImageAddr, TaskId, pages_to_bytes};

use crate::ledger::IndexedTaskRun;

/// Pages that cannot be had from where they should be.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A pipe, a socket or a task's memory failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The connection to the destination failed.
    #[error("push pages: {0}")]
    Link(io::Error),
    /// The task's memory does not have what the images say.
    #[error("task {task} has no readable page at {addr}")]
    Missing {
        /// The task.
        task: TaskId,
        /// The address.
        addr: ImageAddr,
    },
    /// CRIU's page server does not keep to its protocol.
    #[error("criu's page server: {0}")]
    PageServer(String),
    /// The store was given up while somebody waited for a page.
    #[error("the pages were given up")]
    GivenUp,
}

impl StoreError {
    pub(crate) const fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// The first `most` pages of `pages`.
fn leading(pages: &mut [u8], most: u64) -> &mut [u8] {
    let most = usize::try_from(pages_to_bytes(most)).unwrap_or(usize::MAX);
    let len = pages.len().min(most);
    &mut pages[..len]
}

/// Where the pages of a frozen tree wait until the destination has them.
pub trait PageStore: Send + Sync {
    /// Pages per chunk: what is freed and pushed together.
    fn chunk_pages(&self) -> u64;

    /// How many chunks, from the first on, can be sent without waiting for them.
    fn chunks_at_hand(&self) -> u64;

    /// Reads pages from the index `first` on into `pages`, as many as lie together; none if their chunk was freed.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read(&self, scratch: &mut Scratch, first: u64, pages: &mut [u8]) -> Result<u64, StoreError>;

    /// Sends runs of one chunk, each as a frame numbered from `id` on; waits until the chunk is there.
    /// False if it was freed.
    ///
    /// # Errors
    /// [`StoreError`].
    fn send(
        &self,
        scratch: &mut Scratch,
        runs: &[IndexedTaskRun],
        id: u64,
        link: &Stream,
    ) -> Result<bool, StoreError>;

    /// Frees a chunk.
    fn free(&self, chunk: u64);

    /// Bytes held.
    fn held_bytes(&self) -> u64;
}
