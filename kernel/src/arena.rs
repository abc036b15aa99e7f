//! Memory that a workload maps, moves, drops and forks, as an API without raw pointers.
//!
//! A [`Region`] owns one mapping and shows it as atomic words. Atomics are what makes this sound to share: every
//! bit pattern is a valid word, another thread or process (or the kernel, when a page is dropped or arrives late)
//! may change it at any time, and there is no reference to plain memory that such a change could invalidate.
//!
//! ```text
//! anonymous(n) --split_off--> two regions --relocate / resize--> elsewhere --discard--> zero pages --drop--> unmapped
//! ```
//!
//! Calls that move the mapping take `&mut self`, so no word can be borrowed across a move.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_void};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// Bytes of a page. Mapping anything fails on a kernel with another page size.
const PAGE_BYTES: usize = 4096;
/// 64-bit words in a page.
pub const WORDS_PER_PAGE: usize = PAGE_BYTES / size_of::<u64>();

/// One page of a [`Region`].
pub type PageWords = [AtomicU64; WORDS_PER_PAGE];

const _: () = assert!(size_of::<PageWords>() == PAGE_BYTES);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Private,
    Shared,
}

/// Where [`Region::relocate`] moves a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Wherever the kernel finds room.
    Anywhere,
    /// This address; fails with `EEXIST` if anything is mapped there.
    At(usize),
}

/// A mapping owned by this value; dropping it unmaps the memory.
pub struct Region {
    start: NonNull<PageWords>,
    pages: usize,
    sharing: Sharing,
}

// SAFETY: a region is an address and a length that nobody else owns; `mmap`, `munmap` and access through atomics
// are bound to the process, not to the thread that made the mapping.
unsafe impl Send for Region {}
// SAFETY: `&Region` gives out only atomic words and calls `madvise`, both of which any thread may do at any time;
// whatever unmaps or moves the memory takes `&mut self` or `self`.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `pages` pages of private anonymous memory, all zero.
    ///
    /// # Errors
    /// What `mmap` says; `InvalidInput` for no pages at all.
    pub fn anonymous(pages: usize) -> io::Result<Self> {
        Self::map(pages, Sharing::Private, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Maps `pages` pages of anonymous memory that stays shared with children made by `fork`.
    ///
    /// # Errors
    /// What `mmap` says; `InvalidInput` for no pages at all.
    pub fn shared_anonymous(pages: usize) -> io::Result<Self> {
        Self::map(pages, Sharing::Shared, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
    }

    /// Maps the first `pages` pages of `file`, shared. Truncating the file later turns access into SIGBUS.
    ///
    /// # Errors
    /// What `mmap` says; `InvalidInput` for no pages at all or a file shorter than that.
    pub fn shared_file(file: &File, pages: usize) -> io::Result<Self> {
        let bytes = u64::try_from(bytes_of(pages)?).map_err(|_| io::ErrorKind::InvalidInput)?;
        if file.metadata()?.len() < bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "file is shorter than its mapping"));
        }
        Self::map(pages, Sharing::Shared, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(pages: usize, sharing: Sharing, flags: c_int, fd: c_int) -> io::Result<Self> {
        check_page_size()?;
        // SAFETY: no address is asked for, so nothing mapped is replaced; a bad length, flag or fd is an error.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), bytes_of(pages)?, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        Ok(Self { start: mapped(start)?, pages, sharing })
    }

    /// Pages in the region.
    #[must_use]
    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// The address of the first page, as a number.
    #[must_use]
    pub fn address(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// Page `index` as atomic words.
    ///
    /// # Panics
    /// If the region has no such page.
    #[must_use]
    pub fn page(&self, index: usize) -> &PageWords {
        assert!(index < self.pages, "page {index} of a region of {} pages", self.pages);
        // SAFETY: the region maps `pages` readable and writable pages at `start`, page-aligned (so aligned for
        // u64), and `index` is inside; any bytes are valid atomics; the borrow of `self` keeps the mapping alive,
        // and everything that could unmap or move it needs `&mut self`.
        unsafe { self.start.add(index).as_ref() }
    }

    /// Cuts the region at page `at`: `self` keeps the pages before it, the rest is returned. No system call.
    ///
    /// # Panics
    /// If one of the parts would be empty.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(0 < at && at < self.pages, "cut at page {at} of a region of {} pages", self.pages);
        // SAFETY: `at` is less than the pages mapped at `start`, so the result lies inside the same mapping.
        let start = unsafe { self.start.add(at) };
        let rest = Self { start, pages: self.pages - at, sharing: self.sharing };
        self.pages = at;
        rest
    }

    /// Drops the pages in `range` (`MADV_DONTNEED`): private anonymous memory then reads as zero.
    ///
    /// # Errors
    /// What `madvise` says; `InvalidInput` for a range outside of the region.
    pub fn discard(&self, range: Range<usize>) -> io::Result<()> {
        if range.start >= range.end || range.end > self.pages {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range was checked to lie inside the mapping this region owns; the pages stay mapped, and
        // that their words change under a reader is what the atomics are for.
        let done = unsafe {
            libc::madvise(
                self.start.add(range.start).as_ptr().cast(),
                range.len() * PAGE_BYTES,
                libc::MADV_DONTNEED,
            )
        };
        Errno::result(done).map(drop).map_err(io::Error::from)
    }

    /// Asks for huge pages (`MADV_HUGEPAGE`).
    ///
    /// # Errors
    /// What `madvise` says; `EINVAL` if the kernel has none.
    pub fn prefer_huge_pages(&self) -> io::Result<()> {
        let bytes = bytes_of(self.pages)?;
        // SAFETY: the range is the mapping this region owns; the advice changes no content.
        let done = unsafe { libc::madvise(self.start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        Errno::result(done).map(drop).map_err(io::Error::from)
    }

    /// Grows the region with zero pages or gives up its tail, in place or at a new address (`mremap`).
    ///
    /// # Errors
    /// What `mremap` says (the region is then unchanged); `InvalidInput` for no pages or a shared region.
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        self.require_private()?;
        let (old, new) = (bytes_of(self.pages)?, bytes_of(pages)?);
        // SAFETY: the old range is exactly the mapping this region owns, `&mut self` says that no word of it is
        // borrowed, and without MREMAP_FIXED the kernel only uses free addresses. On failure nothing changed.
        let moved = unsafe { libc::mremap(self.start.as_ptr().cast(), old, new, libc::MREMAP_MAYMOVE) };
        self.start = mapped(moved)?;
        self.pages = pages;
        Ok(())
    }

    /// Moves the region to another address (`mremap` with `MREMAP_FIXED`); its content goes along.
    ///
    /// # Errors
    /// What `mmap` or `mremap` say (the region is then where it was); `InvalidInput` for a shared region.
    pub fn relocate(&mut self, to: Target) -> io::Result<()> {
        self.require_private()?;
        // The target is reserved first: MREMAP_FIXED replaces whatever is mapped there, also what another thread
        // got from mmap a moment ago, unless it is a mapping of our own.
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let hint = match to {
            Target::Anywhere => ptr::null_mut(),
            Target::At(address) => {
                flags |= libc::MAP_FIXED_NOREPLACE;
                ptr::without_provenance_mut::<c_void>(address)
            }
        };
        // SAFETY: without a hint, and with MAP_FIXED_NOREPLACE, mmap takes only addresses that are free.
        let reserved = unsafe { libc::mmap(hint, bytes_of(self.pages)?, libc::PROT_NONE, flags, -1, 0) };
        let target = Self { start: mapped(reserved)?, pages: self.pages, sharing: Sharing::Private };
        // A kernel without MAP_FIXED_NOREPLACE takes the address as a mere hint.
        if matches!(to, Target::At(address) if address != target.address()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.replace(target)
    }

    /// Moves the region onto the pages of `victim`, which are gone afterwards; a longer victim loses its tail too.
    ///
    /// # Errors
    /// What `mremap` says (the region is then where it was); `InvalidInput` for shared regions or a short victim.
    pub fn relocate_over(&mut self, mut victim: Self) -> io::Result<()> {
        self.require_private()?;
        victim.require_private()?;
        if victim.pages < self.pages {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if victim.pages > self.pages {
            drop(victim.split_off(self.pages));
        }
        self.replace(victim)
    }

    /// `mremap` onto `target`, which has as many pages as `self`.
    fn replace(&mut self, target: Self) -> io::Result<()> {
        let bytes = bytes_of(self.pages)?;
        let onto = target.start;
        // Forgotten before the call, whatever its outcome: after a failure the kernel may already have unmapped
        // the target, and unmapping it again could hit a mapping that another thread made there since.
        std::mem::forget(target);
        // SAFETY: old and new range are mappings that this function owns, equally long and disjoint (two regions
        // never overlap); `&mut self` and the consumed target say that no word of either is borrowed.
        let moved = unsafe {
            libc::mremap(
                self.start.as_ptr().cast(),
                bytes,
                bytes,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                onto.as_ptr(),
            )
        };
        self.start = mapped(moved)?;
        Ok(())
    }

    fn require_private(&self) -> io::Result<()> {
        match self.sharing {
            Sharing::Private => Ok(()),
            Sharing::Shared => Err(io::Error::new(io::ErrorKind::InvalidInput, "region is shared")),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this region owns exactly this range, and `&mut self` in drop says that nothing borrows it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}

fn mapped(address: *mut c_void) -> io::Result<NonNull<PageWords>> {
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))
}

fn bytes_of(pages: usize) -> io::Result<usize> {
    let bytes = pages.checked_mul(PAGE_BYTES).filter(|&bytes| bytes > 0 && isize::try_from(bytes).is_ok());
    bytes.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn check_page_size() -> io::Result<()> {
    match sysconf(SysconfVar::PAGE_SIZE)? {
        Some(4096) => Ok(()),
        other => Err(io::Error::new(io::ErrorKind::Unsupported, format!("page size is {other:?}, not 4096"))),
    }
}

/// A number for the whole content of a page; that of a zero page is not zero.
#[must_use]
pub fn digest(page: &PageWords) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for word in page {
        sum = (sum ^ word.load(Ordering::Relaxed)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    sum
}

/// What a forked child compares: digests as of the fork against its copy of the memory.
#[derive(Clone, Copy)]
pub struct ForkCheck<'a> {
    /// Pages that the child only reads.
    pub fixed: &'a Region,
    /// One digest per page of `fixed`.
    pub fixed_digests: &'a [u64],
    /// How many pages of `fixed` the child picks at random.
    pub samples: usize,
    /// Steers the choice; also what the child writes.
    pub seed: u64,
    /// Private pages that the child reads, overwrites and reads back.
    pub scratch: &'a Region,
    /// One digest per page of `scratch`.
    pub scratch_digests: &'a [u64],
}

/// What a forked child found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildVerdict {
    /// Every page it looked at was right.
    Right,
    /// A read-only page was not what it was at the fork.
    WrongFixed,
    /// A page of the scratch part was not what it was at the fork, or did not keep what the child wrote.
    WrongScratch,
    /// It ended in another way; the status as the kernel gave it.
    Died(WaitStatus),
}

/// A child that [`fork_check`] made and that has to be waited for.
#[must_use]
#[derive(Debug)]
pub struct ForkedChild(Pid);

const EXIT_WRONG_FIXED: c_int = 3;
const EXIT_WRONG_SCRATCH: c_int = 4;

/// Forks a child that checks its copy of the memory and exits. Any number of threads may run.
///
/// # Errors
/// What `fork` says; `InvalidInput` if a region and its digests differ in length.
pub fn fork_check(check: ForkCheck<'_>) -> io::Result<ForkedChild> {
    if check.fixed.pages != check.fixed_digests.len() || check.scratch.pages != check.scratch_digests.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the child of a threaded process may only do what is async-signal-safe until it exits: it runs
    // `check_in_child`, which reads and writes memory that is mapped in the child too, without allocation, locks
    // or panics, and `_exit`, which runs no handlers and no destructors. The parent only gets a pid.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = check_in_child(check);
            // SAFETY: `_exit` has no preconditions.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(ForkedChild(Pid::from_raw(pid))),
    }
}

/// The child's body: no allocation, no lock, and no index that is not reduced to the length first.
fn check_in_child(check: ForkCheck<'_>) -> c_int {
    let mut state = check.seed;
    for _ in 0..check.samples {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let page = (state >> 33) as usize % check.fixed.pages;
        if digest(check.fixed.page(page)) != check.fixed_digests[page] {
            return EXIT_WRONG_FIXED;
        }
    }
    for page in 0..check.scratch.pages {
        let words = check.scratch.page(page);
        if digest(words) != check.scratch_digests[page] {
            return EXIT_WRONG_SCRATCH;
        }
        for word in words {
            word.store(state, Ordering::Relaxed);
        }
        if words.iter().any(|word| word.load(Ordering::Relaxed) != state) {
            return EXIT_WRONG_SCRATCH;
        }
    }
    0
}

impl ForkedChild {
    /// Waits for the child to end, however long that takes.
    ///
    /// # Errors
    /// What `waitpid` says.
    pub fn wait(self) -> io::Result<ChildVerdict> {
        loop {
            return match waitpid(self.0, None) {
                Err(Errno::EINTR) => continue,
                Err(errno) => Err(errno.into()),
                Ok(WaitStatus::Exited(_, 0)) => Ok(ChildVerdict::Right),
                Ok(WaitStatus::Exited(_, EXIT_WRONG_FIXED)) => Ok(ChildVerdict::WrongFixed),
                Ok(WaitStatus::Exited(_, EXIT_WRONG_SCRATCH)) => Ok(ChildVerdict::WrongScratch),
                Ok(other) => Ok(ChildVerdict::Died(other)),
            };
        }
    }
}

/// Which side of [`fork_single_threaded`] this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The process that called it.
    Parent {
        /// The new child.
        child: Pid,
    },
    /// The new process.
    Child,
}

/// Forks a process that has one thread only, so that the child may go on as any program does.
///
/// # Errors
/// What `fork` says; `Unsupported` if there is a second thread.
pub fn fork_single_threaded() -> io::Result<Side> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "process has more than one thread"));
    }
    // SAFETY: this is the only thread (nobody else could have started one since it was counted), so the child
    // inherits no lock held by a thread that it does not have, and everything in it is in a consistent state.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        child => Ok(Side::Parent { child: Pid::from_raw(child) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(region: &Region, salt: u64) {
        for (index, value) in (0..region.pages()).zip(salt..) {
            for word in region.page(index) {
                word.store(value, Ordering::Relaxed);
            }
        }
    }

    fn word(region: &Region, page: usize) -> u64 {
        region.page(page)[WORDS_PER_PAGE - 1].load(Ordering::Relaxed)
    }

    #[test]
    fn content_follows_a_region_that_is_cut_moved_and_resized() {
        let mut head = Region::anonymous(16).unwrap();
        fill(&head, 100);
        let mut middle = head.split_off(4);
        let tail = middle.split_off(4);
        middle.resize(6).unwrap();
        assert_eq!((0..6).map(|page| word(&middle, page)).collect::<Vec<_>>(), [104, 105, 106, 107, 0, 0]);
        middle.resize(4).unwrap();
        // Another test's thread may map something where the region was a moment ago; then it is tried again.
        let went_back = (0..100).any(|_| {
            let left = middle.address();
            middle.relocate(Target::Anywhere).unwrap();
            assert_ne!(middle.address(), left);
            middle.relocate(Target::At(left)).is_ok() && middle.address() == left
        });
        assert!(went_back);
        assert_eq!((word(&middle, 3), word(&tail, 0), word(&head, 3)), (107, 108, 103));
        let error = middle.relocate(Target::At(tail.address())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        let over = tail.address();
        middle.relocate_over(tail).unwrap();
        assert_eq!((middle.address(), word(&middle, 0)), (over, 104));
    }

    #[test]
    fn discarded_pages_read_as_zero_and_only_those() {
        let region = Region::anonymous(4).unwrap();
        fill(&region, 1);
        region.discard(1..3).unwrap();
        assert_eq!((0..4).map(|page| word(&region, page)).collect::<Vec<_>>(), [1, 0, 0, 4]);
        assert!(region.discard(3..5).is_err());
    }

    #[test]
    fn a_child_sees_the_memory_of_the_fork_and_its_writes_stay_its_own() {
        let fixed = Region::anonymous(8).unwrap();
        let scratch = Region::anonymous(2).unwrap();
        fill(&fixed, 1);
        fill(&scratch, 50);
        let digests =
            |region: &Region| (0..region.pages()).map(|page| digest(region.page(page))).collect::<Vec<_>>();
        let (right, scratch_right) = (digests(&fixed), digests(&scratch));
        let check = ForkCheck {
            fixed: &fixed,
            fixed_digests: &right,
            samples: 64,
            seed: 7,
            scratch: &scratch,
            scratch_digests: &scratch_right,
        };
        assert_eq!(fork_check(check).unwrap().wait().unwrap(), ChildVerdict::Right);
        assert_eq!(word(&scratch, 0), 50);
        let wrong = vec![0; 8];
        let verdict = fork_check(ForkCheck { fixed_digests: &wrong, ..check }).unwrap().wait().unwrap();
        assert_eq!(verdict, ChildVerdict::WrongFixed);
        let verdict = fork_check(ForkCheck { scratch_digests: &[1, 2], ..check }).unwrap().wait().unwrap();
        assert_eq!(verdict, ChildVerdict::WrongScratch);
    }

    #[test]
    fn digest_of_a_zero_page_is_not_zero() {
        let region = Region::anonymous(1).unwrap();
        assert_ne!(digest(region.page(0)), 0);
    }
}
