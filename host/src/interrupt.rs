//! Ctrl-C (INT, TERM, HUP) as something that can be waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Readable once a signal has come.
#[derive(Debug)]
pub struct Interrupt {
    woken: UnixStream,
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }
}

impl Interrupt {
    /// Takes over the signals of the process.
    ///
    /// # Errors
    /// The errno of the system calls.
    pub fn install() -> io::Result<Self> {
        let (woken, waker) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, waker.try_clone()?)?;
        }
        Ok(Self { woken })
    }

    /// Whether a signal has come and was not taken.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        crate::waiting::readable_within(self.as_fd(), Duration::ZERO).unwrap_or(false)
    }

    /// Whether a signal has come since the last call.
    #[must_use]
    pub fn take(&self) -> bool {
        let mut bytes = [0; 16];
        matches!(io::Read::read(&mut &self.woken, &mut bytes), Ok(1..))
    }
}
