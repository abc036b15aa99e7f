//! Waiting for several descriptors with a deadline.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// Waits until one of `fds` is readable (or broken) and says which are, in the same order; all false if
/// `deadline` passed first.
///
/// # Errors
/// The errno of `ppoll(2)`.
pub fn readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    deadline: Option<Instant>,
) -> io::Result<[bool; N]> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(TimeSpec::from_duration);
        let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match ppoll(&mut polled, timeout, None) {
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok([false; N]),
            Ok(0) => {}
            Ok(_) => return Ok(polled.map(|fd| fd.any().unwrap_or(true))),
        }
    }
}

/// Whether `fd` becomes readable within `timeout`.
///
/// # Errors
/// The errno of `ppoll(2)`.
pub fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    Ok(readable([fd], Some(Instant::now() + timeout))?[0])
}
