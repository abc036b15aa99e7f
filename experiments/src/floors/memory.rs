//! Memory whose pages are missing until somebody installs them.

use std::io;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, ensure};
use kernel::arena::Region;
use kernel::uffd::{Install, Uffd};

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
/// Bytes that a push sends and installs at a time.
pub(super) const CHUNK: usize = 64 << 10;

/// A region of this process that is registered with a userfaultfd.
pub(super) struct LazyMemory {
    region: Region,
    pub(super) uffd: Uffd,
}

impl LazyMemory {
    /// `pages` pages, all of them missing.
    pub(super) fn new(pages: usize) -> anyhow::Result<Self> {
        let region = Region::anonymous(pages)?;
        let uffd = Uffd::create(0, false).context("userfaultfd (this needs root)")?;
        uffd.register_missing(region.address() as u64, (pages * PAGE) as u64)?;
        Ok(Self { region, uffd })
    }

    /// The same after every page has been there once: first touch of memory that a host has taken back from its guest
    /// is no cost of installing.
    pub(super) fn warmed(pages: usize) -> anyhow::Result<Self> {
        let memory = Self::new(pages)?;
        memory.fill(|| Ok(&[1; CHUNK]))?;
        memory.discard(0..pages)?;
        Ok(memory)
    }

    /// Installs chunk after chunk over all of the memory, the last one as far as there is room.
    pub(super) fn fill<'a>(&self, mut next: impl FnMut() -> anyhow::Result<&'a [u8]>) -> anyhow::Result<()> {
        for page in (0..self.pages()).step_by(CHUNK / PAGE) {
            let chunk = next()?;
            let room = (self.pages() - page) * PAGE;
            self.install_at(self.address(page), &chunk[..chunk.len().min(room)])?;
        }
        Ok(())
    }

    pub(super) const fn pages(&self) -> usize {
        self.region.pages()
    }

    /// Reads a word of a page, and waits for the page.
    pub(super) fn touch(&self, page: usize) -> u64 {
        self.region.page(page)[0].load(SeqCst)
    }

    /// The address of a page.
    pub(super) fn address(&self, page: usize) -> u64 {
        (self.region.address() + page * PAGE) as u64
    }

    /// Installs `data` at the page that `address` is in.
    pub(super) fn install_at(&self, address: u64, data: &[u8]) -> anyhow::Result<()> {
        let address = address & !(PAGE as u64 - 1);
        match self.uffd.copy(address, data)? {
            Install::Done { pages } => {
                ensure!(pages == (data.len() / PAGE) as u64, "installed only {pages} pages at {address:#x}");
                Ok(())
            }
            other => anyhow::bail!("install at {address:#x}: {other:?}"),
        }
    }

    /// Makes pages missing again.
    pub(super) fn discard(&self, pages: std::ops::Range<usize>) -> io::Result<()> {
        self.region.discard(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs root: userfaultfd"]
    fn what_is_installed_is_read_and_can_be_missing_again() {
        let memory = LazyMemory::new(4).unwrap();
        memory.install_at(memory.address(1) + 100, &[7; 2 * PAGE]).unwrap();
        assert_eq!(memory.touch(2), u64::from_ne_bytes([7; 8]));
        assert!(memory.install_at(memory.address(1), &[8; PAGE]).is_err(), "it is there");
        memory.discard(1..3).unwrap();
        memory.install_at(memory.address(1), &[8; PAGE]).unwrap();
        assert_eq!(memory.touch(1), u64::from_ne_bytes([8; 8]));
    }
}
