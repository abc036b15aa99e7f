//! The keeper: a small process that holds a duplicate of every userfaultfd of a move.
//!
//! When the last descriptor of a userfaultfd closes, missing pages read as zero, silently. As long as the
//! keeper holds one, tasks that touch a missing page wait instead, whatever happens to the daemon. The
//! daemon dismisses it once every page has arrived; without that word it stays until the tasks are gone.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kernel::fds;
use kernel::spawn::CommandSetup;
use kernel::uffd::Uffd;

/// Name of the hidden verb that runs the keeper.
pub const VERB: &str = "keeper";

const HOLD: u8 = b'H';
const DISMISS: u8 = b'Q';

/// How often an orphaned keeper looks whether its tasks are still there.
const LOOK: Duration = Duration::from_secs(1);

/// The daemon's end of a keeper.
#[derive(Clone, Debug)]
pub struct KeeperHandle {
    socket: Arc<UnixStream>,
    child: Arc<Mutex<Option<Child>>>,
}

impl KeeperHandle {
    /// Starts a keeper.
    ///
    /// # Errors
    /// The errno of starting it.
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(VERB)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.own_session().spawn()?;
        Ok(Self { socket: Arc::new(ours), child: Arc::new(Mutex::new(Some(child))) })
    }

    /// The keeper's pid.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Child::id)
    }

    /// Gives it a duplicate of `uffd`.
    pub fn hold(&self, uffd: BorrowedFd<'_>) {
        if let Err(error) = fds::send(self.socket.as_fd(), &[HOLD], &[uffd]) {
            tracing::error!("the keeper does not answer ({error}): a crash of this daemon would lose pages");
        }
    }

    /// Ends it: every page has arrived, or the tasks are gone.
    pub fn dismiss(&self) {
        let _ = (&*self.socket).write_all(&[DISMISS]);
        if let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = child.wait();
        }
    }
}

/// The keeper process: takes descriptors from standard input until it is dismissed.
#[must_use]
pub fn run() -> std::process::ExitCode {
    // Job control and service managers signal whole groups; only the daemon or SIGKILL ends a keeper.
    let _ = host::interrupt::Interrupt::install();
    let Ok(socket) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else {
        return std::process::ExitCode::FAILURE;
    };
    let mut held = Vec::new();
    let mut byte = [0];
    loop {
        match fds::receive(socket.as_fd(), &mut byte) {
            Ok((1, _)) if byte[0] == DISMISS => return std::process::ExitCode::SUCCESS,
            Ok((1, fds)) => held.extend(fds.into_iter().map(Uffd::from)),
            _ => break,
        }
    }
    // The daemon is gone. Its tasks wait as long as they are there.
    while !held.is_empty() {
        std::thread::sleep(LOOK);
        held.retain(|uffd| !uffd.is_orphaned());
    }
    std::process::ExitCode::SUCCESS
}
