//! `lazy-pages.socket`: where `criu restore` hands its userfaultfds over.

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use host::waiting;
use host::workdir::remove_if_there;
use kernel::fds;
use protocol::criu::handover::{Event, Handover, HandoverError};
use protocol::units::TaskId;

/// The name CRIU connects to, in its working directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// A hand-over that failed.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// A system call failed.
    #[error("hand-over on {SOCKET_NAME}: {0}")]
    Io(#[from] io::Error),
    /// Restore sent what it must not, or ended early.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// Called off.
    #[error("hand-over was called off")]
    Cancelled,
}

impl ReceiveError {
    /// Whether restore has ended before the finish word, behind which it lets the tasks go.
    #[must_use]
    pub const fn is_early_end(&self) -> bool {
        matches!(self, Self::Handover(HandoverError::EarlyEnd { .. }))
    }
}

/// Listens for one restore.
#[derive(Debug)]
pub struct HandoverSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl HandoverSocket {
    /// Listens in `dir`, the working directory of the restore; a socket left by an earlier run is replaced.
    ///
    /// # Errors
    /// The errno of `bind(2)`.
    pub fn bind(dir: &Path) -> io::Result<Self> {
        let path = dir.join(SOCKET_NAME);
        remove_if_there(&path)?;
        // A socket address holds 108 bytes; through a descriptor of the directory any path fits.
        let dir = File::open(dir)?;
        let short = format!("/proc/self/fd/{}/{SOCKET_NAME}", dir.as_raw_fd());
        Ok(Self { listener: UnixListener::bind(short)?, path })
    }

    /// Receives one hand-over: every live task's userfaultfd goes to `each`, before the tasks run; returns
    /// at the finish word, with the connection. Ends early when `cancel` becomes readable or `each` breaks off:
    /// the restore fails then.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn receive(
        self,
        tasks: impl IntoIterator<Item = TaskId>,
        cancel: BorrowedFd<'_>,
        mut each: impl FnMut(TaskId, OwnedFd) -> ControlFlow<()>,
    ) -> Result<UnixStream, ReceiveError> {
        let mut handover = Handover::new(tasks)?;
        wait(self.listener.as_fd(), cancel)?;
        let (socket, _) = self.listener.accept()?;
        // One restore per daemon: nobody else may connect.
        let _ = fs::remove_file(&self.path);
        drop(self.listener);
        let mut buffer = [0; 4];
        loop {
            wait(socket.as_fd(), cancel)?;
            let wanted = handover.expect().bytes().min(buffer.len());
            let (got, fds) = fds::receive(socket.as_fd(), &mut buffer[..wanted])?;
            if got == 0 {
                handover.end()?;
            }
            let count = fds.len();
            match handover.feed(&buffer[..got], count)? {
                Some(Event::Task { id }) => {
                    for uffd in fds {
                        if each(id, uffd).is_break() {
                            return Err(ReceiveError::Cancelled);
                        }
                    }
                }
                Some(Event::Finished) => return Ok(socket),
                Some(Event::Zombie { .. }) | None => {}
            }
        }
    }
}

fn wait(fd: BorrowedFd<'_>, cancel: BorrowedFd<'_>) -> Result<(), ReceiveError> {
    match waiting::readable([cancel, fd], None)? {
        [true, _] => Err(ReceiveError::Cancelled),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::criu::handover::{FD_BYTE, send};
    use std::io::Write;

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn restore(dir: &Path, act: impl FnOnce(&UnixStream) + Send + 'static) -> std::thread::JoinHandle<()> {
        let path = dir.join(SOCKET_NAME);
        std::thread::spawn(move || act(&UnixStream::connect(path).unwrap()))
    }

    #[test]
    fn tasks_zombies_and_the_finish_word() {
        let dir = dir();
        let socket = HandoverSocket::bind(dir.path()).unwrap();
        let (_keep, cancel) = UnixStream::pair().unwrap();
        let peer = restore(dir.path(), |mut socket| {
            socket.write_all(&send::zombie(TaskId(8)).unwrap()).unwrap();
            socket.write_all(&send::task(TaskId(7)).unwrap()).unwrap();
            let file = File::open("/dev/null").unwrap();
            fds::send(socket.as_fd(), &FD_BYTE, &[file.as_fd()]).unwrap();
            socket.write_all(&send::finish()).unwrap();
        });
        let mut seen = Vec::new();
        socket
            .receive([TaskId(7), TaskId(8)], cancel.as_fd(), |id, _| {
                seen.push(id);
                ControlFlow::Continue(())
            })
            .unwrap();
        peer.join().unwrap();
        assert_eq!(seen, [TaskId(7)]);
        assert!(!dir.path().join(SOCKET_NAME).exists());
    }

    #[test]
    fn a_restore_that_dies_is_an_error() {
        let dir = dir();
        let socket = HandoverSocket::bind(dir.path()).unwrap();
        let (_keep, cancel) = UnixStream::pair().unwrap();
        let peer = restore(dir.path(), |mut socket| socket.write_all(&[1, 2]).unwrap());
        let result = socket.receive([TaskId(7)], cancel.as_fd(), |_, _| ControlFlow::Continue(()));
        peer.join().unwrap();
        assert!(matches!(result, Err(ReceiveError::Handover(_))), "{result:?}");
    }

    #[test]
    fn it_can_be_called_off_and_a_stale_socket_is_replaced() {
        let dir = dir();
        drop(HandoverSocket::bind(dir.path()).unwrap());
        let socket = HandoverSocket::bind(dir.path()).unwrap();
        let (keep, cancel) = UnixStream::pair().unwrap();
        drop(keep);
        assert!(matches!(
            socket.receive([], cancel.as_fd(), |_, _| ControlFlow::Continue(())),
            Err(ReceiveError::Cancelled)
        ));
    }

    #[test]
    fn long_directories_are_no_obstacle() {
        let dir = dir();
        let long = dir.path().join("x".repeat(120));
        fs::create_dir(&long).unwrap();
        assert!(HandoverSocket::bind(&long).is_ok());
        assert!(long.join(SOCKET_NAME).exists());
    }
}
