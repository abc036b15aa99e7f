//! Processes by descriptor: no pid reuse between looking and acting.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::fds::owned;

/// A process held by descriptor. Readable (in the sense of `poll`) once it has exited.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl PidFd {
    /// Holds the process (not thread) `pid`.
    ///
    /// # Errors
    /// `ESRCH` if there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        Ok(Self(owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?))
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// `ESRCH` if it has exited, `EPERM` without the right to.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: the descriptor is open; a null siginfo means "as kill(2)"; flags are 0.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// A duplicate of the process's descriptor `number`.
    ///
    /// # Errors
    /// `EBADF` if it has no such descriptor, `EPERM` without ptrace rights.
    pub fn take(&self, number: i32) -> io::Result<OwnedFd> {
        // SAFETY: the descriptor is open; pidfd_getfd takes two integers more and returns a new descriptor.
        owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0) })
    }
}
