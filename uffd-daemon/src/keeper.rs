//! The keeper: a small process that holds a duplicate of every userfaultfd of a move, and its journal.
//!
//! When the last descriptor of a userfaultfd closes, missing pages read as zero, silently. As long as the
//! keeper holds one, tasks that touch a missing page wait instead, whatever happens to the daemon. The
//! daemon dismisses it once every page has arrived; without that word it stays until the tasks are gone, or until
//! another daemon takes over, unless they have never run.
//!
//! ```text
//!   daemon ──▶ keeper        H + uffd: hold this, it is space b of family a      S + listener, journal, description
//!                            Q: every page is here
//!   anybody of this user ──▶ its socket in the state directory
//!       I  ──▶               ◀── A or O, held, since when + journal, description
//!       T  ──▶               ◀── A (a daemon serves it), or O and what is held, each as H; who asked is the daemon now
//! ```
//!
//! Every message is 24 bytes: a letter, and three numbers.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host::{privileges, waiting};
use kernel::fds;
use kernel::seccomp::{Otherwise, allow_only};
use kernel::spawn::CommandSetup;
use kernel::uffd::Uffd;
use nix::fcntl::AT_FDCWD;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::journal;

/// Name of the hidden verb that runs the keeper.
pub const VERB: &str = "keeper";

const HOLD: u8 = b'H';
const STATE: u8 = b'S';
const DISMISS: u8 = b'Q';
const INFO: u8 = b'I';
const TAKE: u8 = b'T';
const ATTENDED: u8 = b'A';
const ORPHANED: u8 = b'O';

/// How often an orphaned keeper looks whether its tasks are still there.
const LOOK: Duration = Duration::from_secs(1);
/// How long one that asks may take to say what.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a keeper does, with what the allocator and the end of a process need. Anything else fails: who holds the only
/// descriptors of somebody's missing pages is not killed for a mistake.
const SYSTEM_CALLS: [libc::c_long; 39] = [
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_ioctl,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_sigaltstack,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

const MESSAGE_LEN: usize = 24;

/// A message: a letter and three numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Message {
    letter: u8,
    a: u32,
    b: u64,
    c: u64,
}

impl Message {
    fn of(letter: u8) -> Self {
        Self { letter, ..Self::default() }
    }

    fn hold(owner: Owner) -> Self {
        Self { a: owner.family, b: owner.space, ..Self::of(HOLD) }
    }

    fn encode(self) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        bytes[0] = self.letter;
        bytes[4..8].copy_from_slice(&self.a.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.b.to_le_bytes());
        bytes[16..].copy_from_slice(&self.c.to_le_bytes());
        bytes
    }

    fn send(self, socket: &UnixStream, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        fds::send(socket.as_fd(), &self.encode(), fds)
    }

    fn receive(socket: &UnixStream) -> io::Result<(Self, Vec<OwnedFd>)> {
        let mut bytes = [0; MESSAGE_LEN];
        let (got, fds) = fds::receive(socket.as_fd(), &mut bytes)?;
        if got != MESSAGE_LEN {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let number = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let a = bytes[4..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        Ok((Self { letter: bytes[0], a, b: number(8), c: number(16) }, fds))
    }
}

/// Whose userfaultfd it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Position of its family; of a task without lazy pages [`Owner::NOBODY`].
    pub family: u32,
    /// Which of its spaces.
    pub space: u64,
}

impl Owner {
    /// A task that no page is missing of.
    pub const NOBODY: Self = Self { family: u32::MAX, space: 0 };

    /// Of a space of a family.
    #[must_use]
    pub fn new(family: usize, space: u64) -> Self {
        Self { family: u32::try_from(family).unwrap_or(u32::MAX), space }
    }
}

/// The daemon's end of a keeper.
#[derive(Clone, Debug)]
pub struct KeeperHandle {
    socket: Arc<UnixStream>,
    pid: u32,
    /// None if another daemon has started it.
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
        Ok(Self { socket: Arc::new(ours), pid: child.id(), child: Arc::new(Mutex::new(Some(child))) })
    }

    /// The keeper's pid.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Gives it a duplicate of `uffd`.
    pub fn hold(&self, owner: Owner, uffd: BorrowedFd<'_>) {
        if let Err(error) = Message::hold(owner).send(&self.socket, &[uffd]) {
            tracing::error!("the keeper does not answer ({error}): a crash of this daemon would lose pages");
        }
    }

    /// Tells it where it is found, and what whoever takes over has to know.
    ///
    /// # Errors
    /// The errno of the socket.
    pub fn describe(&self, listener: &UnixListener, journal: &File, description: &File) -> io::Result<()> {
        let fds = [listener.as_fd(), journal.as_fd(), description.as_fd()];
        Message::of(STATE).send(&self.socket, &fds)
    }

    /// Ends it: every page has arrived, or the tasks are gone.
    pub fn dismiss(&self) {
        let _ = (&*self.socket).write_all(&Message::of(DISMISS).encode());
        match self.child.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(mut child) => drop(child.wait()),
            // It closes its end as it ends.
            None => drop(waiting::readable_within(self.socket.as_fd(), PATIENCE)),
        }
    }
}

/// What a keeper says about itself.
#[derive(Debug)]
pub struct Info {
    /// A daemon serves the move.
    pub attended: bool,
    /// Userfaultfds that it holds.
    pub held: u32,
    /// When its daemon ended.
    pub since: SystemTime,
    /// The keeper's pid.
    pub pid: u32,
    /// The journal.
    pub journal: File,
    /// What whoever takes over has to know.
    pub description: File,
}

/// A keeper that is asked by somebody who is not its daemon.
#[derive(Debug)]
pub struct Stranger(UnixStream);

impl Stranger {
    /// Finds the keeper that listens at `path`.
    ///
    /// # Errors
    /// The errno of connecting: `ConnectionRefused` if it has ended.
    pub fn find(path: &std::path::Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// How it is.
    ///
    /// # Errors
    /// The errno of the socket; `InvalidData` for another answer.
    pub fn info(&self) -> io::Result<Info> {
        Message::of(INFO).send(&self.0, &[])?;
        self.answer()
    }

    fn answer(&self) -> io::Result<Info> {
        let (Message { letter, a, b, c }, fds) = Message::receive(&self.0)?;
        let attended = match letter {
            ATTENDED => true,
            ORPHANED => false,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let Ok([journal, description]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(Info {
            attended,
            held: a,
            since: UNIX_EPOCH + Duration::from_secs(b),
            pid: u32::try_from(c).unwrap_or(0),
            journal: journal.into(),
            description: description.into(),
        })
    }

    /// Takes everything over: what it holds, and the keeper, whose daemon this process is from here on. Nothing if
    /// another daemon serves the move.
    ///
    /// # Errors
    /// The errno of the socket; `InvalidData` for another answer.
    #[allow(clippy::type_complexity)]
    pub fn take(self) -> io::Result<Option<(Info, Vec<(Owner, OwnedFd)>, KeeperHandle)>> {
        Message::of(TAKE).send(&self.0, &[])?;
        let info = self.answer()?;
        if info.attended {
            return Ok(None);
        }
        let mut held = Vec::new();
        for _ in 0..info.held {
            let (message, fds) = Message::receive(&self.0)?;
            let (HOLD, Ok([uffd])) = (message.letter, <[OwnedFd; 1]>::try_from(fds)) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            held.push((Owner { family: message.a, space: message.b }, uffd));
        }
        self.0.set_read_timeout(None)?;
        let handle =
            KeeperHandle { socket: Arc::new(self.0), pid: info.pid, child: Arc::new(Mutex::new(None)) };
        Ok(Some((info, held, handle)))
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
    // The other end shall see this process end, and only that.
    if let Ok(nothing) = File::open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(nothing);
    }
    privileges::renounce();
    if let Err(error) = allow_only(&SYSTEM_CALLS, Otherwise::Refuse) {
        tracing::warn!("the keeper runs without a filter for system calls: {error}");
    }
    let mut keeper = Keeper { daemon: Some(socket), held: Vec::new(), state: None, since: SystemTime::now() };
    while keeper.step() {}
    keeper.remove_socket();
    std::process::ExitCode::SUCCESS
}

struct Keeper {
    daemon: Option<UnixStream>,
    held: Vec<(Owner, Uffd)>,
    state: Option<State>,
    since: SystemTime,
}

struct State {
    listener: UnixListener,
    journal: File,
    description: OwnedFd,
}

impl Keeper {
    /// Does what there is to do; false when nothing is left to be kept.
    fn step(&mut self) -> bool {
        if self.daemon.is_none() {
            // Those of tasks that have ended stay, too: their children's address spaces began as copies of theirs.
            if self.held.iter().all(|(_, uffd)| uffd.is_orphaned()) {
                return false;
            }
        }
        let daemon = self.daemon.as_ref().map(AsFd::as_fd);
        let listener = self.state.as_ref().map(|state| state.listener.as_fd());
        let deadline = daemon.is_none().then(|| std::time::Instant::now() + LOOK);
        let ready = match (daemon, listener) {
            (Some(daemon), Some(listener)) => waiting::readable([daemon, listener], deadline),
            (Some(fd), None) => waiting::readable([fd], deadline).map(|[ready]| [ready, false]),
            (None, Some(fd)) => waiting::readable([fd], deadline).map(|[ready]| [false, ready]),
            // Nobody can take over: the tasks wait as long as they are there.
            (None, None) => {
                std::thread::sleep(LOOK);
                Ok([false, false])
            }
        };
        let [from_daemon, asked] = ready.unwrap_or([false, false]);
        if from_daemon && !self.hear_daemon() {
            return false;
        }
        if asked {
            // Whoever does not ask properly is not answered.
            let _ = self.answer();
        }
        true
    }

    fn hear_daemon(&mut self) -> bool {
        let Some(daemon) = &self.daemon else { return true };
        match Message::receive(daemon) {
            Ok((Message { letter: DISMISS, .. }, _)) => return false,
            Ok((Message { letter: HOLD, a, b, .. }, fds)) => {
                let owner = Owner { family: a, space: b };
                self.held.extend(fds.into_iter().map(|fd| (owner, Uffd::from(fd))));
            }
            Ok((Message { letter: STATE, .. }, fds)) => {
                if let Ok([listener, journal, description]) = <[OwnedFd; 3]>::try_from(fds) {
                    self.state =
                        Some(State { listener: listener.into(), journal: journal.into(), description });
                }
            }
            Ok(_) | Err(_) => {
                self.daemon = None;
                self.since = SystemTime::now();
                return !self.never_ran();
            }
        }
        true
    }

    /// Whether the daemon has ended before it let the tasks run. One that waits for a page keeps CRIU from coming to the barrier, where
    /// it finds that out and kills what it has restored: without a keeper they go there, whatever the page reads as.
    fn never_ran(&self) -> bool {
        self.state.as_ref().is_some_and(|state| journal::is_before_running(&state.journal).unwrap_or(false))
    }

    fn answer(&mut self) -> io::Result<()> {
        let Some(state) = &self.state else { return Ok(()) };
        let (peer, _) = state.listener.accept()?;
        if getsockopt(&peer, PeerCredentials)?.uid() != nix::unistd::geteuid().as_raw() {
            return Ok(());
        }
        peer.set_read_timeout(Some(PATIENCE))?;
        peer.set_write_timeout(Some(PATIENCE))?;
        let (question, _) = Message::receive(&peer)?;
        let attended = self.daemon.is_some();
        let letter = if attended { ATTENDED } else { ORPHANED };
        let since = self.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let held = u32::try_from(self.held.len()).unwrap_or(u32::MAX);
        let fds = [state.journal.as_fd(), state.description.as_fd()];
        let answer = Message { letter, a: held, b: since, c: u64::from(std::process::id()) };
        answer.send(&peer, &fds)?;
        if question.letter == TAKE && !attended {
            for (owner, uffd) in &self.held {
                Message::hold(*owner).send(&peer, &[uffd.as_fd()])?;
            }
            peer.set_read_timeout(None)?;
            self.daemon = Some(peer);
        }
        Ok(())
    }

    fn remove_socket(&self) {
        let Some(state) = &self.state else { return };
        if let Some(path) = state.listener.local_addr().ok().as_ref().and_then(|addr| addr.as_pathname()) {
            let _ = unlinkat(AT_FDCWD, path, UnlinkatFlags::NoRemoveDir);
        }
    }
}
