//! `poll(2)` over a set that keeps its memory: a loop that waits for every fault need not allocate for it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Descriptors to wait for, in the order in which they were added.
#[derive(Debug, Default)]
pub struct PollSet(Vec<libc::pollfd>);

impl PollSet {
    /// Empties the set; its memory stays.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a descriptor to wait for input from, and if `write` for room as well; says where in the set it is.
    pub fn add(&mut self, fd: BorrowedFd<'_>, write: bool) -> usize {
        let events = libc::POLLIN | if write { libc::POLLOUT } else { 0 };
        self.0.push(libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 });
        self.0.len() - 1
    }

    /// Waits until something is ready or broken, at most `timeout`.
    ///
    /// # Errors
    /// The errno of `ppoll(2)`, `EINTR` excepted.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let timeout = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let len = libc::nfds_t::try_from(self.0.len()).unwrap_or(libc::nfds_t::MAX);
        // SAFETY: the vector is exclusively borrowed and has len entries; the time lives through the call, and no mask is
        // given. A number that no descriptor has any more is reported as ready.
        let result = unsafe { libc::ppoll(self.0.as_mut_ptr(), len, &raw const timeout, std::ptr::null()) };
        match result {
            0.. => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Whether the descriptor at `position` was ready or broken at the last wait.
    #[must_use]
    pub fn is_ready(&self, position: usize) -> bool {
        self.0.get(position).is_some_and(|polled| polled.revents != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn tells_who_is_ready() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut set = PollSet::default();
        let quiet = set.add(near.as_fd(), false);
        let writable = set.add(far.as_fd(), true);
        set.wait(Duration::from_secs(10)).unwrap();
        assert!(set.is_ready(writable) && !set.is_ready(quiet) && !set.is_ready(99));
        far.write_all(b"x").unwrap();
        set.clear();
        let heard = set.add(near.as_fd(), false);
        set.wait(Duration::from_secs(10)).unwrap();
        assert!(set.is_ready(heard));
        set.clear();
        set.add(far.as_fd(), false);
        set.wait(Duration::from_nanos(1)).unwrap();
        assert!(!set.is_ready(0));
    }
}
