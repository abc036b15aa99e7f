//! Tracking writes with a userfaultfd: pages are write-protected, and the kernel notes the first write to each
//! without anybody being asked (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7). [`crate::pagemap`] protects and reports.
//!
//! The descriptor belongs to the address space it was created in, wherever it is held; [`crate::inject`] creates one in another
//! process. When it is closed, or its holder dies, the kernel unregisters every range and lifts every protection.

use std::io;
use std::os::fd::OwnedFd;

use crate::uffd::{Uffd, UffdioRange};

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP | _WP_HUGETLBFS_SHMEM | _WP_UNPOPULATED | _WP_ASYNC`. Unpopulated: without it the
/// kernel refuses asynchronous tracking of anonymous memory. No events: nobody reads them, and the task would wait for it.
const FEATURES: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// The range is registered with this descriptor, by this call or before.
    Done,
    /// A part of it belongs to somebody else's userfaultfd.
    Taken,
    /// A part of it cannot be tracked, or nothing is mapped there any more.
    Refused,
    /// The address space is gone.
    TaskGone,
}

/// A userfaultfd that notes writes.
#[derive(Debug)]
pub struct WriteTracker(Uffd);

impl WriteTracker {
    /// Makes one out of a fresh userfaultfd.
    ///
    /// # Errors
    /// `EINVAL` if the kernel does not have the features (before Linux 6.7).
    pub fn from_fresh(fd: OwnedFd) -> io::Result<Self> {
        let uffd = Uffd::from(fd);
        uffd.negotiate(FEATURES)?;
        Ok(Self(uffd))
    }

    /// One for the caller's own memory.
    ///
    /// # Errors
    /// As [`WriteTracker::from_fresh`], and the errno of `userfaultfd(2)`.
    pub fn of_self() -> io::Result<Self> {
        Uffd::create(FEATURES, true).map(Self)
    }

    /// Registers `[start, start + len)`. Its pages are not protected yet: all of them count as written.
    ///
    /// # Errors
    /// Any errno that has no name in [`Registration`].
    pub fn register(&self, start: u64, len: u64) -> io::Result<Registration> {
        let Err(error) = self.0.register_write_protect(start, len) else { return Ok(Registration::Done) };
        match error.raw_os_error() {
            Some(libc::EBUSY) => Ok(Registration::Taken),
            Some(libc::EINVAL | libc::EPERM | libc::ENOENT) => Ok(Registration::Refused),
            // The kernel says ENOMEM here where it says ESRCH elsewhere.
            Some(libc::ESRCH) => Ok(Registration::TaskGone),
            Some(libc::ENOMEM) if self.0.is_orphaned() => Ok(Registration::TaskGone),
            _ => Err(error),
        }
    }

    /// Lifts the protection of a registered range: all of its pages count as written.
    ///
    /// # Errors
    /// `ENOENT` if a part of it is not registered, `EAGAIN` while the address space changes, `ESRCH` if it is gone.
    pub fn unprotect(&self, start: u64, len: u64) -> io::Result<()> {
        self.0.write_unprotect(UffdioRange { start, len })
    }

    /// Takes a range out of the registration and lifts its protection.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped there any more, `ENOMEM` if the address space is gone.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.0.unregister(start, len)
    }

    /// Whether the address space is gone: its process has ended or has executed another program.
    #[must_use]
    pub fn is_orphaned(&self) -> bool {
        self.0.is_orphaned()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::arena::Region;
    use crate::pagemap::{Categories, PageMap, Protect, Query, Regions, ScanError};

    fn query(all: Categories, protect: Protect) -> Query {
        Query { all, any: Categories::PRESENT_OR_SWAPPED, report: Categories::ZERO, protect }
    }

    /// A tracker over a region of this process; `None` (and a word why) where the kernel has none.
    fn tracked(region: &Region) -> Option<(WriteTracker, PageMap)> {
        let tracker = match WriteTracker::of_self() {
            Ok(tracker) => tracker,
            Err(error) => {
                eprintln!("skipped: no asynchronous write tracking here: {error}");
                return None;
            }
        };
        let len = (region.pages() * 4096) as u64;
        assert_eq!(tracker.register(region.address() as u64, len).unwrap(), Registration::Done);
        Some((tracker, PageMap::open(std::process::id()).unwrap()))
    }

    fn pages(map: &PageMap, region: &Region, query: &Query) -> Vec<u64> {
        let start = region.address() as u64;
        let mut found = Vec::new();
        let range = start..start + (region.pages() * 4096) as u64;
        map.scan(range, query, &mut Regions::default(), |region| {
            found.extend((region.start..region.end).step_by(4096).map(|at| (at - start) / 4096));
        })
        .unwrap();
        found
    }

    #[test]
    fn a_write_shows_once_and_a_hole_never() {
        let region = Region::anonymous(64).unwrap();
        let Some((tracker, map)) = tracked(&region) else { return };
        for page in [3, 4, 9] {
            region.page(page)[0].store(1, Relaxed);
        }
        let written = query(Categories::WRITTEN, Protect::Matching);
        assert_eq!(pages(&map, &region, &written), [3, 4, 9]);
        assert_eq!(pages(&map, &region, &written), []);
        region.page(4)[7].store(2, Relaxed);
        region.page(50)[7].store(2, Relaxed);
        region.discard(9..10).unwrap();
        assert_eq!(pages(&map, &region, &written), [4, 50]);
        assert_eq!(pages(&map, &region, &query(Categories::NONE, Protect::Nothing)), [3, 4, 50]);
        tracker.unprotect(region.address() as u64, 64 * 4096).unwrap();
        assert_eq!(pages(&map, &region, &written), [3, 4, 50]);
    }

    #[test]
    fn more_regions_than_fit_one_call_come_each_once() {
        let region = Region::anonymous(4 * 4096).unwrap();
        let Some((_tracker, map)) = tracked(&region) else { return };
        let every_other: Vec<u64> = (0..region.pages() as u64).step_by(2).collect();
        for &page in &every_other {
            region.page(usize::try_from(page).unwrap())[0].store(1, Relaxed);
        }
        assert_eq!(pages(&map, &region, &query(Categories::NONE, Protect::Nothing)), every_other);
        assert_eq!(pages(&map, &region, &query(Categories::WRITTEN, Protect::Matching)), every_other);
        assert_eq!(pages(&map, &region, &query(Categories::WRITTEN, Protect::Matching)), []);
    }

    #[test]
    fn what_is_not_registered_is_an_error_and_what_was_read_is_zero() {
        let region = Region::anonymous(8).unwrap();
        let Some((tracker, map)) = tracked(&region) else { return };
        let start = region.address() as u64;
        assert!(map.is_tracked(start).unwrap());
        assert_eq!(region.page(2)[0].load(Relaxed), 0);
        let mut seen = Vec::new();
        let all = query(Categories::NONE, Protect::Nothing);
        map.scan(start..start + 8 * 4096, &all, &mut Regions::default(), |region| seen.push(region)).unwrap();
        assert_eq!(seen.len(), 1);
        assert!(seen[0].categories.contains(Categories::ZERO));
        tracker.unregister(start, 8 * 4096).unwrap();
        assert!(!map.is_tracked(start).unwrap());
        let written = query(Categories::WRITTEN, Protect::Matching);
        let scanned = map.scan(start..start + 4096, &written, &mut Regions::default(), |_| {});
        assert!(matches!(scanned, Err(ScanError::Untracked)));
    }
}
