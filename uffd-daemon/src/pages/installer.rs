//! The kernel as the bookkeeping sees it; a model stands in for it in tests.

use std::io;
use std::sync::Arc;

use kernel::uffd::{Install, Uffd};
use protocol::units::TaskAddr;

/// Puts pages into one address space.
pub trait Installer {
    /// Installs whole pages and wakes who waits for them.
    ///
    /// # Errors
    /// What is no ordinary outcome.
    fn copy(&self, at: TaskAddr, data: &[u8]) -> io::Result<Install>;

    /// Installs `bytes` of zero pages and wakes who waits for them.
    ///
    /// # Errors
    /// What is no ordinary outcome.
    fn zero(&self, at: TaskAddr, bytes: u64) -> io::Result<Install>;

    /// Wakes who waits in a range.
    ///
    /// # Errors
    /// What is no ordinary outcome.
    fn wake(&self, at: TaskAddr, bytes: u64) -> io::Result<()>;
}

impl Installer for Arc<Uffd> {
    fn copy(&self, at: TaskAddr, data: &[u8]) -> io::Result<Install> {
        Uffd::copy(self, at.get(), data)
    }

    fn zero(&self, at: TaskAddr, bytes: u64) -> io::Result<Install> {
        Uffd::zero(self, at.get(), bytes)
    }

    fn wake(&self, at: TaskAddr, bytes: u64) -> io::Result<()> {
        Uffd::wake(self, at.get(), bytes)
    }
}
