//! The kernel as the bookkeeping sees it; a model stands in for it in tests.

use std::io;
use std::sync::Arc;

use kernel::uffd::{Event, EventBuffer, Install, Probe, Uffd};
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

    /// Whether missing pages at `at` are reported; changes nothing.
    ///
    /// # Errors
    /// What is no ordinary outcome.
    fn probe(&self, at: TaskAddr) -> io::Result<Probe>;
}

/// Does something to `pages` pages, or to as many from the first on as lie in its area: the kernel takes nothing that
/// reaches from one area into the next, and the task may have cut one in two without an event (`mprotect`, `madvise`, `mlock`).
///
/// # Errors
/// What `act` returns.
pub fn in_one_area(mut pages: u64, mut act: impl FnMut(u64) -> io::Result<Install>) -> io::Result<Install> {
    let mut done = act(pages)?;
    while done == Install::Unregistered && pages > 1 {
        pages /= 2;
        done = act(pages)?;
    }
    Ok(done)
}

/// An address space whose events are read and whose pages are installed; clones are the same one.
pub trait AddressSpace: Installer + Clone {
    /// Hands each event that is there to `each`, without waiting, at most [`kernel::uffd::EVENTS_PER_READ`].
    ///
    /// # Errors
    /// What is no ordinary outcome.
    fn read(&self, buffer: &mut EventBuffer, each: impl FnMut(Event<Self>)) -> io::Result<()>;

    /// Whether it is gone.
    fn is_orphaned(&self) -> bool;
}

impl AddressSpace for Arc<Uffd> {
    fn read(&self, buffer: &mut EventBuffer, mut each: impl FnMut(Event<Self>)) -> io::Result<()> {
        Uffd::read(self, buffer, |event| each(event.adopt(|child| Self::new(Uffd::from(child))))).map(drop)
    }

    fn is_orphaned(&self) -> bool {
        Uffd::is_orphaned(self)
    }
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

    fn probe(&self, at: TaskAddr) -> io::Result<Probe> {
        Uffd::probe(self, at.get())
    }
}
