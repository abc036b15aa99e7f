//! Which pages a task has, and which it has written: the `PAGEMAP_SCAN` ioctl of `/proc/PID/pagemap` (Linux 6.7).
//!
//! With [`Protect::Matching`] looking and protecting are one step for each page: what is reported is
//! write-protected before the kernel looks at the next page table, so a later write shows in the next scan and no write
//! gets lost in between. That needs a range registered with a userfaultfd of [`crate::write_protect`].
//!
//! Source: `Documentation/admin-guide/mm/pagemap.rst`, `include/uapi/linux/fs.h`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

const PAGE_BYTES: u64 = 4096;

/// `struct pm_scan_arg`
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96);

/// `_IOWR('f', 16, struct pm_scan_arg)` (asm-generic encoding, as on x86-64 and arm64).
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<ScanArg>() as libc::c_ulong) << 16) | ((b'f' as libc::c_ulong) << 8) | 16;
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;

/// What the kernel says about a page: a set of `PAGE_IS_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    /// None.
    pub const NONE: Self = Self(0);
    /// Written since it was last protected; also what was never protected.
    pub const WRITTEN: Self = Self(1 << 1);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// On swap.
    pub const SWAPPED: Self = Self(1 << 4);
    /// There, one way or the other.
    pub const PRESENT_OR_SWAPPED: Self = Self(Self::PRESENT.0 | Self::SWAPPED.0);
    /// The kernel's page of zeros: read, never written.
    pub const ZERO: Self = Self(1 << 5);

    /// Whether all of `other` are among them.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// `struct page_region`: pages that follow each other, of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Address of the first page.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// Those of [`Query::report`] that hold.
    pub categories: Categories,
}
const _: () = assert!(size_of::<Region>() == 24);

/// What becomes of the pages that are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protect {
    /// They stay as they are.
    Nothing,
    /// They are write-protected, in one step with the look.
    Matching,
}

/// Which pages a scan reports, and how.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Pages that have all of these
    pub all: Categories,
    /// and one of these.
    ///
    /// With [`Protect::Matching`] name `PRESENT_OR_SWAPPED` here: otherwise markers are planted where no page is, and
    /// CRIU dumps each of them as a page.
    pub any: Categories,
    /// Which categories tell regions apart.
    pub report: Categories,
    /// What becomes of them.
    pub protect: Protect,
}

/// Why a scan ended before its range did.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// A part of the range is not registered for write protection. Pages before it may have been protected without being reported:
    /// whoever gets this takes the whole range as written.
    #[error("the range is not tracked")]
    Untracked,
    /// The address space is gone.
    #[error("the address space is gone")]
    Gone,
    /// Any other errno.
    #[error("scan page map: {0}")]
    Other(#[from] io::Error),
}

/// Regions of one call: enough that half a GiB of scattered pages takes a few dozen calls, and it stays in the cache.
const REGIONS: usize = 4096;

/// Room for the regions of one call; keep one per scanning thread.
#[derive(Debug)]
pub struct Regions(Vec<Region>);

impl Default for Regions {
    fn default() -> Self {
        Self(vec![Region::default(); REGIONS])
    }
}

/// The page map of one address space: that which the process had when it was opened.
#[derive(Debug)]
pub struct PageMap(OwnedFd);

impl PageMap {
    /// Opens the page map of a process.
    ///
    /// # Errors
    /// `NotFound` if it is gone, `PermissionDenied` without ptrace rights.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self(File::open(format!("/proc/{pid}/pagemap"))?.into()))
    }

    /// Hands each region in `range` that the query asks for to `each`, by ascending address.
    ///
    /// # Errors
    /// [`ScanError`].
    pub fn scan(
        &self,
        range: Range<u64>,
        query: &Query,
        room: &mut Regions,
        mut each: impl FnMut(Region),
    ) -> Result<(), ScanError> {
        let flags = match query.protect {
            Protect::Nothing => 0,
            Protect::Matching => WP_MATCHING | CHECK_WPASYNC,
        };
        let mut next = range.start;
        while next < range.end {
            let mut arg = ScanArg::new(flags, next..range.end, query);
            let found = self.call(&mut arg, &mut room.0)?;
            for region in &room.0[..found] {
                // Where it goes on below, the kernel may name pages again.
                let start = region.start.max(next);
                if start < region.end {
                    next = region.end;
                    each(Region { start, ..*region });
                }
            }
            // Not `walk_end`: when the walk is through it is stale if more than 512 regions were found.
            if found < room.0.len() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether the page at `address` is in a range that is registered for asynchronous write protection, by anybody; true
    /// where nothing is mapped.
    ///
    /// # Errors
    /// [`ScanError`], but for `Untracked`.
    pub fn is_tracked(&self, address: u64) -> Result<bool, ScanError> {
        let any = Categories::PRESENT;
        let query = Query { all: Categories::NONE, any, report: any, protect: Protect::Nothing };
        let mut arg = ScanArg::new(CHECK_WPASYNC, address..address.saturating_add(PAGE_BYTES), &query);
        match self.call(&mut arg, &mut [Region::default()]) {
            Ok(_) => Ok(true),
            Err(ScanError::Untracked) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn call(&self, arg: &mut ScanArg, regions: &mut [Region]) -> Result<usize, ScanError> {
        arg.vec = regions.as_mut_ptr() as u64;
        arg.vec_len = regions.len() as u64;
        loop {
            // SAFETY: the descriptor is open; the number carries the size of the struct (const assert above), which
            // is exclusively borrowed; the kernel writes at most `vec_len` regions to `vec`, which is the exclusively
            // borrowed slice of that length, and any bits are a valid Region.
            let found = unsafe {
                libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN as _, std::ptr::from_mut::<ScanArg>(arg))
            };
            if let Ok(found) = usize::try_from(found) {
                return Ok(found.min(regions.len()));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EPERM) => return Err(ScanError::Untracked),
                Some(libc::ESRCH) => return Err(ScanError::Gone),
                _ => return Err(error.into()),
            }
        }
    }
}

impl ScanArg {
    const fn new(flags: u64, range: Range<u64>, query: &Query) -> Self {
        Self {
            size: size_of::<Self>() as u64,
            flags,
            start: range.start,
            end: range.end,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0,
            category_mask: query.all.0,
            category_anyof_mask: query.any.0,
            return_mask: query.report.0,
        }
    }
}
