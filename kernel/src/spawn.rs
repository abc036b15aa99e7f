//! What a child process needs between `fork` and `exec`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Adds to a [`Command`] what std has no safe call for.
pub trait CommandSetup {
    /// The child gets `fd` under the same number (close-on-exec cleared); the descriptor is closed here
    /// when the command is dropped.
    fn inherit(&mut self, fd: OwnedFd) -> &mut Self;

    /// The child enters the namespace `fd` refers to (`setns` with any type).
    fn enter_namespace(&mut self, fd: OwnedFd) -> &mut Self;

    /// The child starts a session of its own, so that a terminal's Ctrl-C does not reach it.
    fn own_session(&mut self) -> &mut Self;

    /// The child is killed when the thread that started it ends.
    fn die_with_parent(&mut self) -> &mut Self;
}

impl CommandSetup for Command {
    fn inherit(&mut self, fd: OwnedFd) -> &mut Self {
        let setup = move || {
            // SAFETY: fcntl on a descriptor that the closure owns; async-signal-safe.
            let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure calls only fcntl and allocates nothing.
        unsafe { self.pre_exec(setup) }
    }

    fn enter_namespace(&mut self, fd: OwnedFd) -> &mut Self {
        let setup = move || {
            // SAFETY: setns on a descriptor that the closure owns; the child has one thread.
            let result = unsafe { libc::setns(fd.as_raw_fd(), 0) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure calls only setns and allocates nothing.
        unsafe { self.pre_exec(setup) }
    }

    fn own_session(&mut self) -> &mut Self {
        let setup = || {
            // SAFETY: setsid has no arguments; a failure (already a leader) does not matter.
            unsafe { libc::setsid() };
            Ok(())
        };
        // SAFETY: the closure calls only setsid and allocates nothing.
        unsafe { self.pre_exec(setup) }
    }

    fn die_with_parent(&mut self) -> &mut Self {
        let setup = || {
            // SAFETY: prctl with integer arguments only.
            let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure calls only prctl and allocates nothing.
        unsafe { self.pre_exec(setup) }
    }
}

/// Sets or clears the flag that makes orphaned descendants of the caller its children.
///
/// # Errors
/// The errno of `prctl(2)`.
pub fn become_subreaper(on: bool) -> io::Result<()> {
    // SAFETY: prctl with integer arguments only.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, libc::c_ulong::from(on)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Keeps every descriptor but the standard ones from programs that the caller starts from now on: what it
/// inherited itself, such as a lock, would be part of a checkpoint of theirs.
///
/// # Errors
/// The errno of `close_range(2)`.
pub fn keep_descriptors() -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC no descriptor is closed here, so nobody's is closed under him.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
