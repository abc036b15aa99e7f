//! Anonymous memory as bytes, given back page by page.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::{self, NonNull};

use nix::errno::Errno;

const PAGE_BYTES: usize = 4096;

/// Private anonymous memory of whole pages, all zero at first; unmapped when it is dropped. A page takes memory once it was
/// written, and until it is [given back](Anonymous::give_back). Never in huge pages: one written page of 4 KiB would take 2 MiB.
/// Not in children either: a `fork` would copy the page tables (milliseconds for each GiB), and hold the memory.
#[derive(Debug)]
pub struct Anonymous {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone, and reading, writing, `madvise` and `munmap` are bound to the process,
// not to the thread that made it.
unsafe impl Send for Anonymous {}
// SAFETY: `&Anonymous` gives out only `&[u8]`; everything that writes, drops content or unmaps takes `&mut self` or `self`.
unsafe impl Sync for Anonymous {}

impl Anonymous {
    /// Maps `len` bytes.
    ///
    /// # Errors
    /// The errno of `mmap(2)`; `InvalidInput` if `len` is no number of whole pages, or none.
    pub fn new(len: usize) -> io::Result<Self> {
        if len == 0 || len % PAGE_BYTES != 0 || isize::try_from(len).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for, so nothing mapped is replaced.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        let this = Self { start, len };
        for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTFORK] {
            // SAFETY: the range is the mapping just made; the advice changes no content here, and what a child runs between
            // `fork` and `exec` does not touch the value. A kernel without huge pages refuses the first.
            unsafe { libc::madvise(this.start.as_ptr().cast(), len, advice) };
        }
        Ok(this)
    }

    /// Gives the memory of the pages that `bytes` consists of back to the kernel: they read as zero from here on.
    ///
    /// # Errors
    /// The errno of `madvise(2)`; `InvalidInput` for a range that is outside, or not of whole pages.
    pub fn give_back(&mut self, bytes: Range<usize>) -> io::Result<()> {
        let whole = bytes.start % PAGE_BYTES == 0 && bytes.end % PAGE_BYTES == 0;
        if !whole || bytes.start > bytes.end || bytes.end > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range was checked to lie within the mapping, which stays mapped; `&mut self` says that nobody has a
        // reference to the bytes that change here.
        let done = unsafe {
            libc::madvise(self.start.add(bytes.start).as_ptr().cast(), bytes.len(), libc::MADV_DONTNEED)
        };
        Errno::result(done).map(drop).map_err(io::Error::from)
    }
}

impl Deref for Anonymous {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` and `len` are a readable mapping that lives as long as `self`, of initialised bytes (the kernel's
        // zeros or what was written), at most isize::MAX; nobody writes them while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Anonymous {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable; `&mut self` makes the reference the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the pages are in memory.
    fn resident(memory: &Anonymous) -> usize {
        let mut pages = vec![0_u8; memory.len() / PAGE_BYTES];
        // SAFETY: the range is a live mapping, and the vector has a byte for each of its pages.
        let done = unsafe { libc::mincore(memory.start.as_ptr().cast(), memory.len, pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn pages_take_memory_from_their_first_write_until_they_are_given_back() {
        let mut memory = Anonymous::new(512 * PAGE_BYTES).unwrap();
        assert_eq!(resident(&memory), 0);
        memory[5 * PAGE_BYTES..8 * PAGE_BYTES].fill(7);
        assert_eq!(resident(&memory), 3);
        memory.give_back(6 * PAGE_BYTES..8 * PAGE_BYTES).unwrap();
        assert_eq!(resident(&memory), 1);
        assert_eq!((memory[5 * PAGE_BYTES], memory[6 * PAGE_BYTES]), (7, 0));
    }

    #[test]
    fn ranges_that_are_not_whole_pages_or_outside_are_refused() {
        assert!(Anonymous::new(0).is_err());
        assert!(Anonymous::new(PAGE_BYTES + 1).is_err());
        let mut memory = Anonymous::new(2 * PAGE_BYTES).unwrap();
        for range in [1..PAGE_BYTES, 0..1, 0..3 * PAGE_BYTES, 3 * PAGE_BYTES..4 * PAGE_BYTES] {
            assert!(memory.give_back(range).is_err());
        }
        memory.give_back(0..0).unwrap();
    }
}
