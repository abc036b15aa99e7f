//! `criu restore --lazy-pages`, held at a [`Barrier`] before the tasks' first instruction.
//!
//! CRIU takes tens of milliseconds to start: it finds out what the kernel can do, with a dozen of processes of its own where it
//! cannot remember that (it does so on a tmpfs below `/run` only). So it is started before there are images, while the
//! tree still runs at the source. The first image that it reads is a link to its standard input, a pipe: it waits there until it is
//! [given the images](Restore::begin), and ends if this process does.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

use host::criu::{self, Criu, Running};
use host::waiting;
use host::workdir::fresh_dir;
use kernel::pidfd::PidFd;
use kernel::spawn::CommandSetup;

use crate::barrier::{self, Barrier, Report};
use crate::limits;
use crate::pidns::PidNamespace;
use crate::preflight;

/// Which PID namespace a restored tree gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PidPlace {
    /// The daemon's own; a new one if a needed pid is in use there.
    #[default]
    Auto,
    /// The daemon's own.
    Host,
    /// A new one.
    New,
}

/// The image that CRIU reads before all others.
const FIRST_IMAGE: &str = "inventory.img";
/// Where CRIU looks for images.
const CRIUS_IMAGES: &str = "restoring";

/// How long CRIU may take to kill what it restored.
const ABORT_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum Place {
    Host(Running),
    Namespace(PidNamespace),
}

/// A restore under way.
#[derive(Debug)]
pub struct Restore {
    place: Option<Place>,
    /// Where CRIU waits for the first image.
    first: Option<ChildStdin>,
    images: PathBuf,
    /// The highest pid that there is room for in a namespace.
    highest_pid: u32,
    barrier: Barrier,
    /// What it has restored in this PID namespace, from when it was held: a CRIU that is killed leaves it behind.
    held: Vec<PidFd>,
    /// Never readable: stands in for what has ended.
    silence: (UnixStream, UnixStream),
    log: PathBuf,
    ended: Option<i32>,
}

impl Restore {
    /// Starts CRIU in `dir`, in `namespace` if there is one, and lets it wait for images. `highest_pid` is the highest pid that
    /// the tree needs.
    ///
    /// # Errors
    /// The errno of the system calls.
    pub fn start(
        criu: &Criu,
        dir: &Path,
        namespace: Option<PidNamespace>,
        highest_pid: u32,
        options: &[OsString],
    ) -> io::Result<Self> {
        let images = dir.join(CRIUS_IMAGES);
        fresh_dir(&images)?;
        // Other than a FIFO, a pipe can be opened without somebody at its other end.
        symlink("/proc/self/fd/0", images.join(FIRST_IMAGE))?;
        let barrier = Barrier::new(dir)?;
        let log = dir.join(barrier::LOG);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut args = vec!["restore".to_owned(), "--images-dir".into(), text(&images)];
        args.extend(["--work-dir".to_owned(), text(dir), "--log-file".into(), text(&log)]);
        args.extend(["-v1", "--lazy-pages", "--restore-detached", "--action-script"].map(str::to_owned));
        args.push(text(&std::env::current_exe()?));
        args.extend(options.iter().map(|option| option.to_string_lossy().into_owned()));
        let (place, first) = match namespace {
            Some(mut namespace) => {
                // Room for CRIU and for the programs it starts.
                let (program, output) = (text(&criu.path), criu::printed(&log));
                let first = namespace.start(&program, &args, barrier.path(), &output, highest_pid + 1)?;
                (Place::Namespace(namespace), first)
            }
            None => {
                let mut command = Command::new(&criu.path);
                command.args(&args).env(barrier::SOCKET, barrier.path()).own_session();
                let (running, first) = Running::start_fed(&mut command, log.clone())?;
                (Place::Host(running), first)
            }
        };
        let silence = UnixStream::pair()?;
        Ok(Self {
            place: Some(place),
            first: Some(first),
            images,
            highest_pid,
            barrier,
            held: Vec::new(),
            silence,
            log,
            ended: None,
        })
    }

    /// Whether a tree with these pids can be restored where this was started.
    #[must_use]
    pub fn has_room_for(&self, pids: &[u32], place: PidPlace) -> bool {
        match (&self.place, place) {
            (Some(Place::Namespace(_)), _) => pids.iter().all(|pid| *pid <= self.highest_pid),
            // By now CRIU itself may have taken one.
            (_, PidPlace::Auto) => preflight::first_used(pids).is_none(),
            _ => true,
        }
    }

    /// Gives CRIU the images in `from`: the restore begins.
    ///
    /// # Errors
    /// The errno of linking and reading them; `InvalidData` for an inventory that is not CRIU's.
    pub fn begin(&mut self, from: &Path) -> io::Result<()> {
        let Some(mut waiting) = self.first.take() else { return Ok(()) };
        for image in fs::read_dir(from)? {
            let image = image?;
            if image.file_name() != FIRST_IMAGE {
                fs::hard_link(image.path(), self.images.join(image.file_name()))?;
            }
        }
        let first = fs::read(from.join(FIRST_IMAGE))?;
        if first.len() > limits::INVENTORY_BYTES_MAX {
            let what = format!("{FIRST_IMAGE} has {} bytes: that is not criu's", first.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        match waiting.write_all(&first) {
            // Whoever waits for the restore hears that it has ended, and why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    /// Readable when the restore reports.
    #[must_use]
    pub fn reports_fd(&self) -> BorrowedFd<'_> {
        self.barrier.as_fd()
    }

    /// Readable when CRIU has ended; never again once that was seen.
    #[must_use]
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        match (&self.place, self.ended) {
            (Some(Place::Host(running)), None) => running.as_fd(),
            (Some(Place::Namespace(namespace)), None) => namespace.ended_fd(),
            _ => self.silence.0.as_fd(),
        }
    }

    /// Whether [`Restore::end`] was called.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// What the readable `reports_fd` says.
    ///
    /// # Errors
    /// The errno of reading it.
    pub fn report(&mut self) -> io::Result<Option<Report>> {
        let report = self.barrier.report()?;
        if let (Some(Report::Held), Some(Place::Host(running))) = (report, &self.place) {
            self.held = descendants(running.pid());
        }
        Ok(report)
    }

    /// The exit status behind the readable `ended_fd`.
    pub fn end(&mut self) -> i32 {
        let status = match &mut self.place {
            Some(Place::Host(running)) => running.wait().ok().and_then(|status| status.code()),
            Some(Place::Namespace(namespace)) => namespace.exit_status(),
            None => None,
        };
        *self.ended.insert(status.unwrap_or(-1))
    }

    /// Lets the held tasks run.
    ///
    /// # Errors
    /// `BrokenPipe` if CRIU is gone.
    pub fn run(&mut self) -> io::Result<()> {
        self.barrier.run()
    }

    /// What CRIU's log says about a failure.
    #[must_use]
    pub fn complaint(&self) -> String {
        criu::complaint(&self.log)
    }

    /// Pid of the init of the tree's own PID namespace, if it has one.
    #[must_use]
    pub const fn init_pid(&self) -> Option<u32> {
        match &self.place {
            Some(Place::Namespace(namespace)) => Some(namespace.init_pid()),
            _ => None,
        }
    }

    /// The /proc that shows the restored tasks under their own pids.
    #[must_use]
    pub fn proc_dir(&self) -> PathBuf {
        self.init_pid().map_or_else(|| "/proc".into(), |init| format!("/proc/{init}/root/proc").into())
    }

    /// Undoes the restore: nothing of the tree is left.
    pub fn abort(&mut self) {
        // Without images CRIU ends by itself, and takes along what it tries the kernel with.
        let waits = self.first.take().is_some();
        match self.place.take() {
            Some(Place::Namespace(mut namespace)) => {
                if waits && self.ended.is_none() {
                    let _ = waiting::readable_within(namespace.ended_fd(), ABORT_PATIENCE);
                }
                namespace.kill();
            }
            Some(Place::Host(mut running)) => {
                // At the barrier CRIU kills its tree by itself; elsewhere it is taken down with it.
                self.barrier.refuse();
                let patience = if self.ended.is_some() { Duration::ZERO } else { ABORT_PATIENCE };
                let tree = descendants(running.pid());
                if !waiting::readable_within(running.as_fd(), patience).unwrap_or(false) {
                    kill_all(&tree);
                }
                running.kill();
                kill_all(&tree);
                kill_all(&self.held);
            }
            None => {}
        }
    }

    /// The tree runs: it is left to itself.
    pub fn leave(mut self) {
        if let Some(Place::Namespace(namespace)) = self.place.take() {
            namespace.leave();
        }
    }
}

/// Every process below `pid`, held by descriptor.
fn descendants(pid: u32) -> Vec<PidFd> {
    let mut found = Vec::new();
    let mut next = vec![pid];
    while let Some(pid) = next.pop() {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()) {
                found.extend(PidFd::open(child));
                next.push(child);
            }
        }
    }
    found
}

fn kill_all(processes: &[PidFd]) {
    for process in processes {
        // Gone already is as good.
        let _ = process.signal(nix::libc::SIGKILL);
    }
}
