//! CRIU's own programs as scripts use them: `dump`, `lazy-pages` and `restore`, each a process of the test.
//!
//! ```text
//!   images/ <-- dump ... restore      work/ <-- lazy-pages.socket, logs
//! ```
//!
//! Restores go into a PID namespace of their own, so that the original may still be there.

use std::fs::{self, File};
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use host::criu::Criu;
use kernel::spawn::CommandSetup;
use nix::fcntl::OFlag;
use protocol::criu::checkpoint::Checkpoint;

use crate::site::Site;
use crate::tool::Tool;
use crate::{STEP, programs};

/// Starts what its arguments say and goes on as the init of its PID namespace.
const INIT: &str = "\"$@\"; echo \"restore ended with $?\"; exec sleep infinity";

static JOBS_MADE: AtomicU32 = AtomicU32::new(0);

/// How often a test begins anew to get a checkpoint whose memory is lazy. It is, but for one in fifty or so.
const TRIES: usize = 10;

/// What `begin` begins, as soon as most of its memory is left to a daemon.
///
/// # Panics
/// If that does not happen.
#[track_caller]
pub fn until_lazy<T>(mib: usize, begin: impl Fn() -> (Job, T)) -> (Job, T) {
    let mut tries = std::iter::repeat_with(begin).take(TRIES);
    let lazy = tries.find(|(job, _)| job.is_mostly_lazy(mib));
    lazy.unwrap_or_else(|| panic!("hardly any page was lazy, {TRIES} times in a row"))
}

/// Every CRIU that the project knows of here: the usual one, and the one with the other header layout if it is there.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn crius() -> Vec<Criu> {
    let mut found = vec![Criu::find(None).expect("a CRIU")];
    match programs::next_criu().map(|path| Criu::find(Some(&path)).expect("the second CRIU")) {
        Some(next) if next.layout != found[0].layout => found.push(next),
        Some(_) => {}
        None => eprintln!("skipped in part: no second CRIU, scripts/setup --criu-next makes one"),
    }
    found
}

/// One checkpoint: its images, and where the programs around it work.
#[derive(Debug)]
pub struct Job {
    criu: Criu,
    /// The images.
    pub images: PathBuf,
    /// The socket and the logs.
    pub work: PathBuf,
}

impl Job {
    /// A place for a checkpoint.
    ///
    /// # Panics
    /// If there is no room for it.
    #[must_use]
    pub fn new(site: &Site, criu: &Criu) -> Self {
        let number = JOBS_MADE.fetch_add(1, Relaxed);
        let dir = site.path(&format!("job-{}-{number}", criu.version));
        let job = Self { criu: criu.clone(), images: dir.join("images"), work: dir.join("work") };
        for dir in [&job.images, &job.work] {
            fs::create_dir_all(dir).expect("a directory");
        }
        job
    }

    /// `criu VERB` on this checkpoint, its log beside the others.
    #[must_use]
    pub fn criu(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.criu.path);
        self.arguments(&mut command, verb);
        command
    }

    /// `uffd-daemon lazy-pages` in the place of `criu lazy-pages`.
    #[must_use]
    pub fn daemon(&self) -> Command {
        let mut command = Command::new(programs::program("uffd-daemon"));
        self.arguments(&mut command, "lazy-pages");
        command
    }

    fn arguments(&self, command: &mut Command, verb: &str) {
        command.arg(verb).arg("-D").arg(&self.images).arg("-W").arg(&self.work);
        command.args(["-v4", "-o", &format!("{verb}.log")]);
    }

    /// Writes everything into the images; the process has ended then.
    ///
    /// # Panics
    /// If CRIU fails.
    #[track_caller]
    pub fn dump(&self, pid: u32) {
        let mut command = self.criu("dump");
        command.args(["--tree", &pid.to_string()]);
        let status = Tool::start("criu dump", command).wait(STEP);
        assert_eq!(status, 0, "{}", self.log("dump"));
    }

    /// Writes all but the memory, and waits as a page server for somebody who wants that.
    ///
    /// # Panics
    /// If CRIU fails.
    #[track_caller]
    #[must_use]
    pub fn dump_lazily(&self, pid: u32, options: &[&str]) -> (Tool, SocketAddr) {
        let address = free_address();
        let mut command = self.criu("dump");
        command.args(["--tree", &pid.to_string(), "--lazy-pages", "--address", &address.ip().to_string()]);
        command.args(["--port", &address.port().to_string()]).args(options);
        (self.start_ready("dump", command), address)
    }

    /// Starts a program that says on `--status-fd` when it is ready.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    #[must_use]
    pub fn start_ready(&self, verb: &str, mut command: Command) -> Tool {
        let status = Status::add_to(&mut command);
        status.start(verb, command, &self.work.join(format!("{verb}.log")))
    }

    /// Restores into a PID namespace of its own; an `Err` is CRIU's exit status. What was restored ends with it.
    ///
    /// # Errors
    /// CRIU's exit status, if it is not 0.
    ///
    /// # Panics
    /// If the restore does not end.
    #[track_caller]
    pub fn restore(&self, options: &[&str]) -> Result<Tool, i32> {
        let mut restore = self.criu("restore");
        restore.args(["--lazy-pages", "--restore-detached"]).args(options);
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", INIT, "sh"]);
        command.arg(restore.get_program()).args(restore.get_args());
        let tool = Tool::start("restore", command);
        let status = |line: &str| line.strip_prefix("restore ended with ").map(str::to_owned);
        match tool.wait_for(STEP, status).parse() {
            Ok(0) => Ok(tool),
            status => Err(status.unwrap_or(-1)),
        }
    }

    /// Whether most of a workload of `mib` is left to a daemon. CRIU leaves nothing of a process where the stack
    /// pointer of any thread happens to be at the start of a page; what a test sees then is the work of `criu restore`.
    ///
    /// # Panics
    /// If the images cannot be read.
    #[track_caller]
    #[must_use]
    pub fn is_mostly_lazy(&self, mib: usize) -> bool {
        let lazy = Checkpoint::open(&self.images).expect("images").lazy_pages();
        lazy > u64::try_from(mib << 8).expect("a size") / 10 * 9
    }

    /// The last lines of a log.
    #[must_use]
    pub fn log(&self, verb: &str) -> String {
        last_lines(&self.work.join(format!("{verb}.log")))
    }
}

/// A `--status-fd`: where a program says that it is ready.
#[derive(Debug)]
pub struct Status(File);

impl Status {
    /// Gives it to a command, as its next option.
    ///
    /// # Panics
    /// If there is no descriptor for it.
    #[must_use]
    pub fn add_to(command: &mut Command) -> Self {
        let (status, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        command.args(["--status-fd", &theirs.as_raw_fd().to_string()]).inherit(theirs);
        Self(status.into())
    }

    /// Starts the command and waits until it is ready.
    ///
    /// # Panics
    /// If it does not get there; shows `log` then.
    #[track_caller]
    #[must_use]
    pub fn start(mut self, name: &str, command: Command, log: &Path) -> Tool {
        // Starting it drops the command, and with it our end for writing: the pipe ends if the program does.
        let tool = Tool::start(name, command);
        let told = host::waiting::readable_within(self.0.as_fd(), STEP).expect("poll");
        let mut byte = [0xff; 2];
        let got = if told { self.0.read(&mut byte).expect("a pipe") } else { 0 };
        assert_eq!(byte[..got], [0], "not ready: {}\n{}", tool.last_lines(), last_lines(log));
        tool
    }
}

/// The last lines of a file.
#[must_use]
pub fn last_lines(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    format!("{}:\n  {}", path.display(), lines[lines.len().saturating_sub(30)..].join("\n  "))
}

/// An address on loopback that was free a moment ago: CRIU does not take port 0.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}
