//! The barrier before a restored tree's first instruction.
//!
//! CRIU runs an action script at every phase of a restore, and kills what it restored if the script fails at
//! `post-restore`, where everything is restored and the network is still locked. The script is this program
//! itself (a path that can be executed, whatever the working directory is mounted with), told by its
//! environment where the daemon listens. A daemon that dies closes the connection: the script fails.
//!
//! How it goes on is also left as files beside the socket: a daemon that dies behind the barrier does not hear it, and
//! whoever follows has to [know](word).

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use host::criu;
use host::workdir::remove_if_there;

/// Set by CRIU: the phase.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
/// Set by us: the daemon's socket.
pub const SOCKET: &str = "POSTCOPY_BARRIER";

const HELD: u8 = b'h';
const RESUMED: u8 = b'r';
const RUN: u8 = b'g';

/// Name of CRIU's log, beside the socket.
pub const LOG: &str = "restore.log";
/// Name of the file that says that CRIU has only to let the tasks go.
const RESUMING_MARK: &str = "resuming";
/// Name of the file that says that the tasks run.
const RESUMED_MARK: &str = "resumed";

/// What CRIU reports through its script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Restored, and held.
    Held,
    /// The tasks run.
    Resumed,
}

/// What a CRIU whose barrier was lifted has left word of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Nothing: it is at work, or was killed.
    None,
    /// It has failed, and killed what it had restored before any of it ran.
    Failed,
    /// All is done but for letting the tasks go; should CRIU be killed, the kernel does that.
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
        "pre-resume" => mark(Path::new(&socket), RESUMING_MARK),
        "post-resume" => resumed(Path::new(&socket)),
        _ => Ok(()),
    };
    Some(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the CRIU has left word of whose barrier and log are in `dir`.
#[must_use]
pub fn word(dir: &Path) -> Word {
    // Looked at first: it is the last that CRIU writes, so that marks which were left are there by then.
    let failed = criu::has_failed(&dir.join(LOG));
    match () {
        () if dir.join(RESUMED_MARK).exists() => Word::Resumed,
        () if dir.join(RESUMING_MARK).exists() => Word::Resuming,
        () if failed => Word::Failed,
        () => Word::None,
    }
}

fn mark(socket: &Path, name: &str) -> io::Result<()> {
    fs::write(socket.with_file_name(name), [])
}

fn resumed(socket: &Path) -> io::Result<()> {
    mark(socket, RESUMED_MARK)?;
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
    fn how_it_goes_on_is_left_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut barrier = Barrier::new(dir.path()).unwrap();
        assert_eq!(word(dir.path()), Word::None);
        fs::write(dir.path().join(LOG), "(00.1) Error (criu/cr-restore.c:1): Restoring FAILED.\n").unwrap();
        assert_eq!(word(dir.path()), Word::Failed);
        mark(barrier.path(), RESUMING_MARK).unwrap();
        assert_eq!(word(dir.path()), Word::Resuming, "what has begun to run is not undone");
        resumed(barrier.path()).unwrap();
        assert_eq!(barrier.report().unwrap(), Some(Report::Resumed));
        let path = barrier.path().to_owned();
        drop(barrier);
        fs::remove_file(dir.path().join(RESUMED_MARK)).unwrap();
        assert!(resumed(&path).is_err(), "nobody listens");
        assert_eq!(word(dir.path()), Word::Resumed);
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
