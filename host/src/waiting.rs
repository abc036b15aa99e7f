//! Waiting for several descriptors with a deadline.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use protocol::link::Link;

/// Waits until one of `fds` is readable (or broken) and says which are, in the same order; all false if
/// `deadline` passed first.
///
/// # Errors
/// The errno of `ppoll(2)`.
pub fn readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    deadline: Option<Instant>,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    poll_until(&mut polled, deadline)?;
    Ok(polled.map(|fd| fd.any().unwrap_or(true)))
}

/// Waits as [`readable`] does, and until `link` has something: it first, then `fds`. A link may have data of its own
/// when its descriptor is quiet.
///
/// # Errors
/// The errno of `ppoll(2)`.
pub fn link_or<const N: usize>(
    link: &impl Link,
    fds: [BorrowedFd<'_>; N],
    deadline: Option<Instant>,
) -> io::Result<(bool, [bool; N])> {
    let buffered = link.has_buffered();
    let deadline = if buffered { Some(Instant::now()) } else { deadline };
    let mut polled = Vec::with_capacity(N + 1);
    polled.push(PollFd::new(link.as_fd(), PollFlags::POLLIN));
    polled.extend(fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    poll_until(&mut polled, deadline)?;
    let mut ready = polled.iter().map(|fd| fd.any().unwrap_or(true));
    let on_link = ready.next().unwrap_or(false);
    Ok((buffered || on_link, std::array::from_fn(|_| ready.next().unwrap_or(false))))
}

/// Whether `link` has something within `timeout`.
///
/// # Errors
/// The errno of `ppoll(2)`.
pub fn link_within(link: &impl Link, timeout: Duration) -> io::Result<bool> {
    Ok(link_or(link, [], Some(Instant::now() + timeout))?.0)
}

fn poll_until(polled: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<()> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(TimeSpec::from_duration);
        match ppoll(polled, timeout, None) {
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
            Ok(_) => return Ok(()),
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
