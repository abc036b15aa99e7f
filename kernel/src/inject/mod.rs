//! A userfaultfd out of another process, which does not notice.
//!
//! The kernel makes a userfaultfd for the memory of the process that asks. So the process is made to ask: its main
//! thread is stopped and runs `userfaultfd` and `close` through a `syscall` instruction of the vDSO, and in
//! between the descriptor is taken out with `pidfd_getfd`. Threads that fork meanwhile hand a copy on; it is
//! closed in the child. Threads that sleep are not disturbed.
//!
//! ```text
//! caller ── fork ──▶ operator ── seize ──▶ threads
//!    │                  │ main thread: userfaultfd(2), pidfd_getfd(2), close(2), registers back, detach
//!    ◀── uffd, times ───┘
//! ```
//!
//! What the process keeps of it: nothing. No code, memory or stack of it is changed; a system call that was
//! interrupted starts again, also those that report `EINTR` to a process that is stopped and continued
//! (`epoll_wait` and others, their timeout then starts anew). Extended registers are not touched: between two stops
//! the thread runs one `syscall` instruction, and the kernel keeps them.
//!
//! The work is done by a child of the caller in a session of its own. If the caller is killed in the middle, the
//! operator finishes; with it goes the last copy of the descriptor, and the process is as before. Only who kills
//! the operator itself within the tenth of a millisecond between the first and the last changed register breaks
//! the process.

#[cfg(target_arch = "x86_64")]
mod listing;
#[cfg(target_arch = "x86_64")]
mod operation;
#[cfg(target_arch = "x86_64")]
mod operator;
#[cfg(target_arch = "x86_64")]
mod ptrace;
#[cfg(target_arch = "x86_64")]
mod report;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Whether this architecture is one it is made for.
pub const IS_SUPPORTED: bool = cfg!(target_arch = "x86_64");
/// How long the main thread may take to stop; until then nobody stands still. Among many busy threads it waits for a processor
/// first, and in an uninterruptible wait (`vfork`, a disk) it does not stop at all.
pub const STOP_PATIENCE: Duration = Duration::from_secs(1);
/// How long threads that may be in the middle of a fork are waited for: as long as they might for a processor.
#[cfg(target_arch = "x86_64")]
const FORK_PATIENCE: Duration = Duration::from_millis(200);
/// How long the operator may take for everything.
#[cfg(target_arch = "x86_64")]
const PATIENCE: Duration = Duration::from_secs(5);

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Taken {
    /// Fresh: nothing is negotiated yet.
    pub fd: OwnedFd,
    /// From the request to stop until the main thread was seen standing: it slept, ran, or waited for a processor.
    pub waited: Duration,
    /// From there until it ran on. No other thread stood longer than it takes to look at it.
    pub stood: Duration,
    /// Threads that were stopped at all.
    pub threads: u32,
    /// Copies of the descriptor that had to be closed in children.
    pub copies: u32,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process is gone.
    #[error("the process is gone")]
    Gone,
    /// Somebody traces it already.
    #[error("the process is traced already")]
    Traced,
    /// The main thread did not stop in time; everything is as before, and it may be tried again.
    #[error("its main thread did not stop within {STOP_PATIENCE:?}")]
    Busy,
    /// It cannot be done with this process, or here.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The process may not have a userfaultfd.
    #[error("the process's userfaultfd call: {0}")]
    Refused(io::Error),
    /// Any other errno.
    #[error("{what}: {source}")]
    Failed {
        /// What was being done.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

/// Has process `pid` make a userfaultfd (`O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY`) and takes it.
///
/// # Errors
/// [`InjectError`]; the process is as before.
#[cfg(target_arch = "x86_64")]
pub fn userfaultfd_of(pid: u32) -> Result<Taken, InjectError> {
    operator::userfaultfd_of(pid)
}

/// Not on this architecture.
///
/// # Errors
/// [`InjectError::Unsupported`].
#[cfg(not(target_arch = "x86_64"))]
pub fn userfaultfd_of(_pid: u32) -> Result<Taken, InjectError> {
    Err(InjectError::Unsupported("system calls are injected on x86-64 only"))
}
