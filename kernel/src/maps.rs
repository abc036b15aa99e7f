//! One area of a process's memory, by address, as it is now: the `PROCMAP_QUERY` ioctl of `/proc/PID/maps` (Linux 6.11).
//!
//! Reading the list takes as long as there are areas, and by its end they may be others; this takes a microsecond.
//!
//! Source: `include/uapi/linux/fs.h`, `fs/proc/task_mmu.c`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// `struct procmap_query`
#[repr(C)]
#[derive(Default)]
struct QueryArg {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}
const _: () = assert!(size_of::<QueryArg>() == 104);

/// `_IOWR('f', 17, struct procmap_query)` (asm-generic encoding, as on x86-64 and arm64).
const PROCMAP_QUERY: libc::c_ulong =
    (3 << 30) | ((size_of::<QueryArg>() as libc::c_ulong) << 16) | ((b'f' as libc::c_ulong) << 8) | 17;

const SHARED: u64 = 1 << 3;
const COVERING_OR_NEXT: u64 = 1 << 4;

/// Addresses that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// The first.
    pub start: u64,
    /// The first behind.
    pub end: u64,
    /// Whether it is private, and no file's.
    pub is_private_anonymous: bool,
}

/// The areas of one address space: that which the process had when this was opened.
#[derive(Debug)]
pub struct Maps(OwnedFd);

impl Maps {
    /// Opens the list of a process.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `PermissionDenied` without ptrace rights.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self(File::open(format!("/proc/{pid}/maps"))?.into()))
    }

    /// The area that `address` is in.
    ///
    /// # Errors
    /// `ENOTTY` before Linux 6.11, `ESRCH` if the address space is gone.
    pub fn at(&self, address: u64) -> io::Result<Option<Area>> {
        self.query(address, 0)
    }

    /// The area that `address` is in, or the next one.
    ///
    /// # Errors
    /// As [`Maps::at`].
    pub fn at_or_behind(&self, address: u64) -> io::Result<Option<Area>> {
        self.query(address, COVERING_OR_NEXT)
    }

    fn query(&self, address: u64, flags: u64) -> io::Result<Option<Area>> {
        let size = size_of::<QueryArg>() as u64;
        let mut arg = QueryArg { size, query_flags: flags, query_addr: address, ..QueryArg::default() };
        loop {
            // SAFETY: the descriptor is open; the number carries the size of the struct (const assert above), which
            // is exclusively borrowed; it names no other memory, as both sizes for that are zero.
            let result = unsafe {
                libc::ioctl(self.0.as_raw_fd(), PROCMAP_QUERY as _, std::ptr::from_mut::<QueryArg>(&mut arg))
            };
            if result >= 0 {
                let is_private_anonymous = arg.vma_flags & SHARED == 0 && arg.inode == 0;
                return Ok(Some(Area { start: arg.vma_start, end: arg.vma_end, is_private_anonymous }));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::ENOENT) => return Ok(None),
                _ => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Region;

    #[test]
    fn finds_what_is_mapped_and_what_comes_next() {
        let maps = Maps::open(std::process::id()).unwrap();
        let region = Region::anonymous(8).unwrap();
        let start = region.address() as u64;
        let here = match maps.at(start + 4096) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => return,
            found => found.unwrap().unwrap(),
        };
        assert!(here.start <= start && here.end >= start + 8 * 4096 && here.is_private_anonymous, "{here:?}");
        assert_eq!(maps.at_or_behind(start).unwrap(), Some(here));
        let first = maps.at_or_behind(0).unwrap().unwrap();
        assert_eq!(maps.at(first.start - 1).unwrap(), None);
        let code =
            maps.at(finds_what_is_mapped_and_what_comes_next as fn() as usize as u64).unwrap().unwrap();
        assert!(!code.is_private_anonymous, "{code:?}");
    }
}
