//! `criu dump --lazy-pages`: freezes the tree, writes the small images, and leaves its page server on a
//! socketpair with nobody but us at the other end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use host::criu::{Criu, Running};
use host::waiting;
use host::workdir::fresh_dir;
use kernel::spawn::CommandSetup;
use nix::sys::socket::{setsockopt, sockopt};
use protocol::criu::page_server::{Command as PageCommand, Header, MAX_HEADER_LEN};

use crate::limits;
use crate::stacks::{StackWatch, Stacks};

/// Socket buffers towards CRIU's page server: a whole answer of 4 MiB in flight.
const SERVER_BUFFER: usize = 4 << 20;

/// A running dump.
#[derive(Debug)]
pub struct Dump {
    criu: Running,
    /// CRIU's page server.
    pub server: UnixStream,
    status: File,
    criu_version: Criu,
    /// Where the images are.
    pub images: PathBuf,
}

/// A dump that failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// It could not be started.
    #[error("cannot start criu dump: {0}")]
    Start(io::Error),
    /// CRIU gave up; the tasks run on.
    #[error("criu dump failed: {0}")]
    Failed(String),
    /// It takes too long.
    #[error("criu dump was not ready after {0:?}")]
    TimedOut(Duration),
    /// CRIU would take all memory for stacks: nothing would be lazy. It was sent away, the tasks run on.
    #[error(
        "the stack pointer of thread {0} lies on the first byte of a page, where criu takes all memory for stacks"
    )]
    AlignedStack(u32),
    /// Called off, and it did not get ready soon enough to be sent away cleanly.
    #[error("interrupted")]
    Interrupted,
    /// It ended otherwise than it was told.
    #[error("criu dump did not end as told: {0}")]
    Ending(String),
}

impl Dump {
    /// Starts CRIU on the tree below `root`; the tasks run until it has seized them.
    ///
    /// # Errors
    /// [`DumpError::Start`].
    pub fn start(criu: &Criu, root: u32, dir: &Path, options: &[OsString]) -> Result<Self, DumpError> {
        Self::try_start(criu, root, dir, options).map_err(DumpError::Start)
    }

    fn try_start(criu: &Criu, root: u32, dir: &Path, options: &[OsString]) -> io::Result<Self> {
        let images = dir.join("images");
        fresh_dir(&images)?;
        let (server, theirs) = UnixStream::pair()?;
        for socket in [&server, &theirs] {
            // Beyond the system's limit where we may; a smaller buffer is only slower.
            let _ = setsockopt(socket, sockopt::SndBufForce, &SERVER_BUFFER);
        }
        let (status, ready) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let theirs = OwnedFd::from(theirs);
        let log = dir.join("dump.log");
        let mut command = Command::new(&criu.path);
        command
            .arg("dump")
            .args(["--tree", &root.to_string()])
            .arg("--images-dir")
            .arg(&images)
            .arg("--work-dir")
            .arg(dir)
            .arg("--log-file")
            .arg(&log)
            // Its two warnings per page request are not worth their time.
            .args(["-v1", "--lazy-pages", "--leave-stopped"])
            .args(["--ps-socket", &theirs.as_raw_fd().to_string()])
            .args(["--status-fd", &ready.as_raw_fd().to_string()])
            .args(options);
        command.inherit(theirs).inherit(ready).own_session();
        if let Some(namespace) = other_network(root)? {
            command.enter_namespace(namespace.into());
        }
        let running = Running::start(&mut command, log)?;
        Ok(Self { criu: running, server, status: status.into(), criu_version: criu.clone(), images })
    }

    /// Waits until CRIU's page server is ready, for less long once it was interrupted. Returns when the tasks
    /// were seen frozen; `once_frozen` is called as soon as all were. On the last try a dump that takes all memory for stacks is
    /// better than none.
    ///
    /// # Errors
    /// [`DumpError`]; CRIU has ended and the tasks run.
    pub fn wait_ready(
        &mut self,
        root: u32,
        last_try: bool,
        interrupt: BorrowedFd<'_>,
        mut limit: Duration,
        once_frozen: impl FnOnce(),
    ) -> Result<Instant, DumpError> {
        const LOOK: Duration = Duration::from_micros(200);
        let mut stacks = Some(StackWatch::new(root));
        let begun = Instant::now();
        let mut frozen = None;
        let mut once_frozen = Some(once_frozen);
        let mut called_off = false;
        loop {
            if let Some(watch) = &mut stacks {
                let found = watch.look();
                if frozen.is_none() && (watch.has_begun() || found != Stacks::Running) {
                    frozen = Some(Instant::now());
                }
                if let Stacks::Aligned(thread) = found {
                    let error = DumpError::AlignedStack(thread);
                    if !last_try && watch.send_away(&mut self.criu).map_err(DumpError::Start)? {
                        return Err(error);
                    }
                    tracing::warn!("{error}: this move copies all memory before it resumes");
                }
                if found != Stacks::Running {
                    stacks = None;
                    once_frozen.take().into_iter().for_each(|then| then());
                }
            }
            let look = if stacks.is_some() { Instant::now() + LOOK } else { begun + limit };
            let interrupt = if called_off { self.criu.as_fd() } else { interrupt };
            let fds = [self.status.as_fd(), self.criu.as_fd(), interrupt];
            let [ready, ended, interrupted] = waiting::readable(fds, Some(look)).map_err(DumpError::Start)?;
            let mut byte = [0];
            if ready && matches!(self.status.read(&mut byte), Ok(1)) {
                return Ok(frozen.unwrap_or_else(Instant::now));
            }
            if ended || ready {
                let status = self.criu.wait().map_err(DumpError::Start)?;
                return Err(DumpError::Failed(format!("{} ({status})", self.criu.complaint())));
            }
            if interrupted {
                called_off = true;
                limit = limit.min(begun.elapsed() + limits::INTERRUPTED_DUMP_TIMEOUT);
            }
            if begun.elapsed() > limit {
                self.kill();
                return Err(if called_off { DumpError::Interrupted } else { DumpError::TimedOut(limit) });
            }
        }
    }

    /// Whether CRIU has ended, or does within `patience`.
    #[must_use]
    pub fn has_ended(&self, patience: Duration) -> bool {
        waiting::readable_within(self.criu.as_fd(), patience).unwrap_or(false)
    }

    /// CRIU's pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.criu.pid()
    }

    /// CRIU's last words, for a dump that ended by itself.
    #[must_use]
    pub fn complaint(&self) -> String {
        self.criu.complaint()
    }

    /// Tells CRIU that nobody needs its pages any more; the tasks stay stopped.
    ///
    /// # Errors
    /// [`DumpError::Ending`] if CRIU does not end well within `limit`; it is killed then.
    pub fn close(&mut self, limit: Duration) -> Result<(), DumpError> {
        let mut bytes = [0; MAX_HEADER_LEN];
        let told = Header::close(PageCommand::Close)
            .encode(self.criu_version.layout, &mut bytes)
            .map_err(io::Error::other)
            .and_then(|len| self.server.write_all(&bytes[..len]));
        let ending = |why: String| DumpError::Ending(why);
        let result = told.map_err(|error| ending(error.to_string())).and_then(|()| {
            // It answers four bytes and then waits for our end of the connection.
            let mut answer = [0; 4];
            self.server.set_read_timeout(Some(limit)).and_then(|()| self.server.read_exact(&mut answer)).ok();
            let _ = self.server.shutdown(std::net::Shutdown::Both);
            match waiting::readable_within(self.criu.as_fd(), limit) {
                Ok(true) => match self.criu.wait() {
                    Ok(status) if status.success() => Ok(()),
                    Ok(status) => Err(ending(format!("{} ({status})", self.criu.complaint()))),
                    Err(error) => Err(ending(error.to_string())),
                },
                _ => Err(ending(format!("still there after {limit:?}"))),
            }
        });
        if result.is_err() {
            self.kill();
        }
        result
    }

    /// Kills CRIU. Tasks behind no fence run on.
    pub fn kill(&mut self) {
        self.criu.kill();
    }
}

/// The network namespace of a process, if it is not ours: CRIU must run in it.
pub(crate) fn other_network(pid: u32) -> io::Result<Option<File>> {
    let theirs = format!("/proc/{pid}/ns/net");
    let same = fs::read_link(&theirs)? == fs::read_link("/proc/self/ns/net")?;
    if same { Ok(None) } else { File::open(theirs).map(Some) }
}
