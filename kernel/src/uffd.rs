//! userfaultfd: events out, pages in.
//!
//! CRIU creates the descriptor (`O_CLOEXEC | O_NONBLOCK`), negotiates `UFFD_FEATURE_EVENT_{FORK,REMAP,
//! REMOVE,UNMAP}` and registers the lazy areas; it reaches us over a unix socket. So the usual work here is
//! reading and installing; creating and registering is for restorers in tests and experiments.
//!
//! Two rules of the kernel shape the results:
//!
//! - while a non-cooperative event (fork, remap, remove, unmap) is unread or under way, every install fails
//!   with `EAGAIN`: [`Install::Deferred`]. Read the events, then try again.
//! - a run of pages stops at the first page that is present; what was installed before it is reported, and
//!   a further try at that page gives `EEXIST`: [`Install::Present`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::fds::owned;

const UFFDIO: u64 = 0xAA;
const PAGE_BYTES: u64 = 4096;

/// `_IOWR`/`_IOR` number for the userfaultfd ioctls (asm-generic encoding, as on x86-64 and arm64).
const fn iowr(nr: u64, size: usize) -> libc::c_ulong {
    ((3 << 30) | ((size as u64) << 16) | (UFFDIO << 8) | nr) as libc::c_ulong
}
const fn ior(nr: u64, size: usize) -> libc::c_ulong {
    ((2 << 30) | ((size as u64) << 16) | (UFFDIO << 8) | nr) as libc::c_ulong
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UffdioRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct UffdioPoison {
    range: UffdioRange,
    mode: u64,
    updated: i64,
}

const UFFDIO_API: libc::c_ulong = iowr(0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: libc::c_ulong = iowr(0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: libc::c_ulong = ior(0x01, size_of::<UffdioRange>());
const UFFDIO_WAKE: libc::c_ulong = ior(0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: libc::c_ulong = iowr(0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: libc::c_ulong = iowr(0x04, size_of::<UffdioZeropage>());
const UFFDIO_WRITEPROTECT: libc::c_ulong = iowr(0x06, size_of::<UffdioWriteprotect>());
const UFFDIO_CONTINUE: libc::c_ulong = iowr(0x07, size_of::<UffdioContinue>());
const UFFDIO_POISON: libc::c_ulong = iowr(0x08, size_of::<UffdioPoison>());

// The numbers as include/uapi/linux/userfaultfd.h makes them.
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03);
const _: () = assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
const _: () = assert!(UFFDIO_CONTINUE == 0xc020_aa07);
const _: () = assert!(UFFDIO_POISON == 0xc020_aa08);

/// `UFFD_FEATURE_EVENT_FORK | _REMAP | _REMOVE | _UNMAP`: what CRIU negotiates.
pub const FEATURES_OF_CRIU: u64 = 0x2 | 0x4 | 0x8 | 0x40;

const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const UFFD_API: u64 = 0xAA;
/// `UFFD_USER_MODE_ONLY`
const USER_MODE_ONLY: libc::c_int = 1;

/// `struct uffd_msg`: 32 bytes, packed by the kernel into 8-byte words.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct RawMessage([u8; 32]);
const _: () = assert!(size_of::<RawMessage>() == 32);

/// What a userfaultfd reports. Addresses are the task's own; ranges are `start..end` in bytes. `Child` is what serves a
/// forked address space.
#[derive(Debug)]
pub enum Event<Child = OwnedFd> {
    /// A thread waits for the page at `address` (page-aligned unless `EXACT_ADDRESS` was negotiated).
    Fault {
        /// Faulting address.
        address: u64,
    },
    /// The task forked; `child` serves the new address space, which started as a copy of this one.
    Fork {
        /// The child's userfaultfd.
        child: Child,
    },
    /// `mremap` moved `len` bytes.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Bytes moved.
        len: u64,
    },
    /// `madvise` is about to drop the range; the task goes on once this was read.
    Remove {
        /// First byte.
        start: u64,
        /// First byte behind.
        end: u64,
    },
    /// The range was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// First byte behind.
        end: u64,
    },
    /// An event this version does not know; reported so that nobody waits in silence.
    Unknown(u8),
}

impl<Child> Event<Child> {
    /// The same event, with something else to serve a forked address space.
    pub fn adopt<Other>(self, child: impl FnOnce(Child) -> Other) -> Event<Other> {
        match self {
            Self::Fault { address } => Event::Fault { address },
            Self::Fork { child: of } => Event::Fork { child: child(of) },
            Self::Remap { from, to, len } => Event::Remap { from, to, len },
            Self::Remove { start, end } => Event::Remove { start, end },
            Self::Unmap { start, end } => Event::Unmap { start, end },
            Self::Unknown(kind) => Event::Unknown(kind),
        }
    }
}

/// What became of an attempt to install pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Install {
    /// The first `pages` pages were installed (all of them if it equals what was asked).
    Done {
        /// Pages installed, at least 1.
        pages: u64,
    },
    /// The first page is present already; nothing was changed and nobody woken.
    Present,
    /// An event is unread or an address-space change is under way: read the events and try again.
    Deferred,
    /// No registered area at this address (unmapped, or not registered yet).
    Unregistered,
    /// The address space is gone.
    TaskGone,
}

/// How many messages one [`Uffd::read`] takes.
pub const EVENTS_PER_READ: usize = 32;

/// Room for the messages of one read; keep one per reading thread.
pub struct EventBuffer([RawMessage; EVENTS_PER_READ]);

impl Default for EventBuffer {
    fn default() -> Self {
        Self([RawMessage([0; 32]); EVENTS_PER_READ])
    }
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Creates a userfaultfd over the caller's own memory and negotiates `features`.
    ///
    /// Needs `CAP_SYS_PTRACE` (or `vm.unprivileged_userfaultfd=1`) unless `user_mode_only`, and
    /// `CAP_SYS_PTRACE` for fork events.
    ///
    /// # Errors
    /// The errno of `userfaultfd(2)` or `UFFDIO_API`.
    pub fn create(features: u64, user_mode_only: bool) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if user_mode_only { USER_MODE_ONLY } else { 0 };
        // SAFETY: userfaultfd takes one int and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let uffd = Self(owned(fd)?);
        uffd.negotiate(features)?;
        Ok(uffd)
    }

    /// `UFFDIO_API` on a fresh descriptor.
    pub(crate) fn negotiate(&self, features: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_API, &mut UffdioApi { api: UFFD_API, features, ioctls: 0 })
    }

    /// Registers `[start, start + len)` of the owner's memory for missing pages.
    ///
    /// # Errors
    /// The errno of `UFFDIO_REGISTER`; `EBUSY` if the area belongs to another userfaultfd.
    pub fn register_missing(&self, start: u64, len: u64) -> io::Result<()> {
        self.register(UffdioRange { start, len }, MODE_MISSING)
    }

    /// Registers a range for write protection.
    pub(crate) fn register_write_protect(&self, start: u64, len: u64) -> io::Result<()> {
        self.register(UffdioRange { start, len }, MODE_WP)
    }

    fn register(&self, range: UffdioRange, mode: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut UffdioRegister { range, mode, ioctls: 0 })
    }

    /// Lifts write protection from a range.
    pub(crate) fn write_unprotect(&self, range: UffdioRange) -> io::Result<()> {
        self.ioctl(UFFDIO_WRITEPROTECT, &mut UffdioWriteprotect { range, mode: 0 })
    }

    /// Takes `[start, start + len)` out of the registration and wakes who waits there.
    ///
    /// # Errors
    /// The errno of `UFFDIO_UNREGISTER`; `ENOMEM` if the address space is gone.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut UffdioRange { start, len })
    }

    /// Reads what is there without waiting and hands each message to `each`; returns how many there were,
    /// 0 if none.
    ///
    /// Reading a remove, unmap, remap or fork event lets the task go on, so what `each` does about it must
    /// exclude installs from before the read until it has been done.
    ///
    /// # Errors
    /// The errno of `read(2)`, `EAGAIN` and `EINTR` excepted.
    pub fn read(&self, buffer: &mut EventBuffer, mut each: impl FnMut(Event)) -> io::Result<usize> {
        // SAFETY: the buffer is exclusively borrowed, its length in bytes is what we pass, and any bit
        // pattern is a valid RawMessage.
        let got =
            unsafe { libc::read(self.0.as_raw_fd(), buffer.0.as_mut_ptr().cast(), size_of_val(&buffer.0)) };
        if got < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(0),
                _ => Err(error),
            };
        }
        let count = usize::try_from(got).unwrap_or(0) / size_of::<RawMessage>();
        for message in &buffer.0[..count] {
            each(decode(message));
        }
        Ok(count)
    }

    /// Installs `data` (whole pages) at `address` and wakes who waits there.
    ///
    /// # Errors
    /// An errno that is no ordinary outcome, for example `EINVAL` for an unaligned address.
    pub fn copy(&self, address: u64, data: &[u8]) -> io::Result<Install> {
        let mut arg =
            UffdioCopy { dst: address, src: data.as_ptr() as u64, len: data.len() as u64, mode: 0, copy: 0 };
        let result = self.ioctl(UFFDIO_COPY, &mut arg);
        outcome(result, arg.copy, data.len() as u64)
    }

    /// Maps zero pages at `address` for `len` bytes and wakes who waits there.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn zero(&self, address: u64, len: u64) -> io::Result<Install> {
        let mut arg = UffdioZeropage { range: UffdioRange { start: address, len }, mode: 0, zeropage: 0 };
        let result = self.ioctl(UFFDIO_ZEROPAGE, &mut arg);
        outcome(result, arg.zeropage, len)
    }

    /// Poisons missing pages: whoever touches them gets `SIGBUS` instead of zeros.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn poison(&self, address: u64, len: u64) -> io::Result<Install> {
        let mut arg = UffdioPoison { range: UffdioRange { start: address, len }, mode: 0, updated: 0 };
        let result = self.ioctl(UFFDIO_POISON, &mut arg);
        outcome(result, arg.updated, len)
    }

    /// Wakes who waits in the range; they look again and report again if the page is still missing.
    ///
    /// # Errors
    /// `EINVAL` for an unaligned or empty range.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut UffdioRange { start: address, len })
    }

    /// Whether missing pages at `address` are ours to resolve; changes nothing.
    ///
    /// `UFFDIO_CONTINUE` on private anonymous memory can never succeed: the kernel looks the area up first
    /// (`ENOENT` if it is not registered here) and refuses its kind afterwards (`EINVAL`).
    ///
    /// # Errors
    /// Any errno but the expected ones.
    pub fn probe(&self, address: u64) -> io::Result<Probe> {
        let mut arg =
            UffdioContinue { range: UffdioRange { start: address, len: PAGE_BYTES }, mode: 0, mapped: 0 };
        match self.ioctl(UFFDIO_CONTINUE, &mut arg) {
            Ok(()) => Ok(Probe::Registered),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL | libc::EEXIST | libc::EFAULT) => Ok(Probe::Registered),
                Some(libc::ENOENT) => Ok(Probe::Unregistered),
                Some(libc::EAGAIN) => Ok(Probe::Changing),
                Some(libc::ESRCH) => Ok(Probe::TaskGone),
                _ => Err(error),
            },
        }
    }

    /// Whether the address space behind it is gone.
    #[must_use]
    pub fn is_orphaned(&self) -> bool {
        // The kernel looks for the address space before it looks for an area, so any address will do.
        const ANYWHERE: u64 = 0x1000_0000;
        matches!(self.probe(ANYWHERE), Ok(Probe::TaskGone))
    }

    fn ioctl<T>(&self, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
        // SAFETY: the descriptor is open; every request above is paired with the struct whose size its
        // number carries (checked by the const asserts), exclusively borrowed for the call. The kernel
        // writes only into that struct, and reads `src` of a copy, a live slice of the stated length.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, std::ptr::from_mut(arg)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// What [`Uffd::probe`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// The address is in a registered area.
    Registered,
    /// It is not.
    Unregistered,
    /// An event is unread: ask again.
    Changing,
    /// The address space is gone.
    TaskGone,
}

fn outcome(result: io::Result<()>, done: i64, asked: u64) -> io::Result<Install> {
    let Err(error) = result else {
        return Ok(Install::Done { pages: asked / PAGE_BYTES });
    };
    // A run cut short reports EAGAIN with what it did; the same errno with a negative count (-EAGAIN) means
    // that the address space is changing and nothing was done.
    match (error.raw_os_error(), u64::try_from(done)) {
        (Some(libc::EAGAIN), Ok(bytes)) if bytes >= PAGE_BYTES => {
            Ok(Install::Done { pages: bytes / PAGE_BYTES })
        }
        (Some(libc::EAGAIN), _) => Ok(Install::Deferred),
        (Some(libc::EEXIST), _) => Ok(Install::Present),
        (Some(libc::ENOENT), _) => Ok(Install::Unregistered),
        (Some(libc::ESRCH), _) => Ok(Install::TaskGone),
        _ => Err(error),
    }
}

fn decode(message: &RawMessage) -> Event {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message.0[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message.0[0] {
        0x12 => Event::Fault { address: word(16) },
        0x13 => {
            let number = i32::from_ne_bytes([message.0[8], message.0[9], message.0[10], message.0[11]]);
            // SAFETY: the kernel installed this descriptor for us during the read and nobody else knows it.
            let child = unsafe { OwnedFd::from_raw_fd(number) };
            Event::Fork { child }
        }
        0x14 => Event::Remap { from: word(8), to: word(16), len: word(24) },
        0x15 => Event::Remove { start: word(8), end: word(16) },
        0x16 => Event::Unmap { start: word(8), end: word(16) },
        other => Event::Unknown(other),
    }
}
