//! The barrier before a restored tree's first instruction.
//!
//! CRIU runs an action script at every phase of a restore, and kills what it restored if the script fails at
//! `post-restore`, where everything is restored and the network is still locked. The script is this program
//! itself (a path that can be executed, whatever the working directory is mounted with), told by its
//! environment where the daemon listens. A daemon that dies closes the connection: the script fails.
//!
//! That the tasks run is also left as a file beside the socket: a daemon that dies behind the barrier does not hear it, and
//! whoever takes over has to know.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use host::workdir::remove_if_there;

/// Set by CRIU: the phase.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
/// Set by us: the daemon's socket.
pub const SOCKET: &str = "POSTCOPY_BARRIER";

const HELD: u8 = b'h';
const RESUMING: u8 = b'f';
const RESUMED: u8 = b'r';
const RUN: u8 = b'g';

/// Name of the file that says that the tasks run.
const MARK: &str = "resumed";

/// What CRIU reports through its script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Restored, and held.
    Held,
    /// All is done but for letting the tasks go; should CRIU die now, the kernel does that.
    Resuming,
    /// The tasks run.
    Resumed,
}

/// The daemon's end.
#[derive(Debug)]
pub struct Barrier {
    listener: UnixListener,
    path: PathBuf,
    held: Option<UnixStream>,
}

impl AsFd for Barrier {
    /// Readable when the script has something to report.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Barrier {
    /// Listens in `dir`; a socket left by an earlier restore there is replaced.
    ///
    /// # Errors
    /// The errno of `bind(2)`.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let path = dir.join("barrier.socket");
        remove_if_there(&path)?;
        Ok(Self { listener: UnixListener::bind(&path)?, path, held: None })
    }

    /// Where the script finds it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a report.
    ///
    /// # Errors
    /// The errno of the socket calls.
    pub fn report(&mut self) -> io::Result<Option<Report>> {
        let (mut script, _) = self.listener.accept()?;
        let mut byte = [0];
        script.read_exact(&mut byte)?;
        Ok(match byte[0] {
            HELD => {
                self.held = Some(script);
                Some(Report::Held)
            }
            RESUMING => Some(Report::Resuming),
            RESUMED => Some(Report::Resumed),
            _ => None,
        })
    }

    /// Lets the held tree run.
    ///
    /// # Errors
    /// `BrokenPipe` if the script is gone.
    pub fn run(&mut self) -> io::Result<()> {
        self.held.take().ok_or(io::ErrorKind::NotConnected)?.write_all(&[RUN])
    }

    /// Refuses: CRIU kills the held tree.
    pub fn refuse(&mut self) {
        self.held = None;
        let _ = fs::remove_file(&self.path);
    }
}

/// If CRIU runs this program as its action script: plays it and returns the exit status.
#[must_use]
pub fn play_script() -> Option<ExitCode> {
    let (socket, action) = (std::env::var_os(SOCKET)?, std::env::var(ACTION).ok()?);
    let result = match action.as_str() {
        "post-restore" => hold(Path::new(&socket)),
        "pre-resume" => UnixStream::connect(socket).and_then(|mut socket| socket.write_all(&[RESUMING])),
        "post-resume" => resumed(Path::new(&socket)),
        _ => Ok(()),
    };
    Some(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the tasks whose barrier was in `dir` have run.
#[must_use]
pub fn have_run(dir: &Path) -> bool {
    dir.join(MARK).exists()
}

fn resumed(socket: &Path) -> io::Result<()> {
    fs::write(socket.with_file_name(MARK), [])?;
    UnixStream::connect(socket)?.write_all(&[RESUMED])
}

fn hold(socket: &Path) -> io::Result<()> {
    let mut socket = UnixStream::connect(socket)?;
    socket.write_all(&[HELD])?;
    let mut byte = [0];
    socket.read_exact(&mut byte)?;
    if byte[0] == RUN { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_until_told_to_run() {
        let dir = tempfile::tempdir().unwrap();
        let mut barrier = Barrier::new(dir.path()).unwrap();
        let path = barrier.path().to_owned();
        let script = std::thread::spawn(move || hold(&path));
        assert_eq!(barrier.report().unwrap(), Some(Report::Held));
        assert!(!script.is_finished());
        barrier.run().unwrap();
        assert!(script.join().unwrap().is_ok());
    }

    #[test]
    fn that_the_tasks_run_is_left_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut barrier = Barrier::new(dir.path()).unwrap();
        assert!(!have_run(dir.path()));
        resumed(barrier.path()).unwrap();
        assert_eq!(barrier.report().unwrap(), Some(Report::Resumed));
        let path = barrier.path().to_owned();
        drop(barrier);
        fs::remove_file(dir.path().join(MARK)).unwrap();
        assert!(resumed(&path).is_err(), "nobody listens");
        assert!(have_run(dir.path()));
    }

    #[test]
    fn a_refusal_and_a_dead_daemon_fail_the_script() {
        let dir = tempfile::tempdir().unwrap();
        let mut barrier = Barrier::new(dir.path()).unwrap();
        let path = barrier.path().to_owned();
        let script = std::thread::spawn(move || hold(&path));
        barrier.report().unwrap();
        barrier.refuse();
        assert!(script.join().unwrap().is_err());
        assert!(hold(&dir.path().join("barrier.socket")).is_err());
    }
}
