//! CRIU: find it, start it, wait for it, quote its log.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};

use kernel::pidfd::PidFd;
use protocol::criu::page_server::HeaderLayout;

/// Oldest CRIU that the formats here were checked with.
pub const OLDEST: (u32, u32) = (4, 1);

/// A CRIU binary and what it says of itself.
#[derive(Clone, Debug)]
pub struct Criu {
    /// The program.
    pub path: PathBuf,
    /// Its version, for example `4.1.1`.
    pub version: String,
    /// The page-server header it speaks.
    pub layout: HeaderLayout,
}

/// No usable CRIU.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// Nothing found.
    #[error(
        "no criu found (looked at --criu, $CRIU, PATH and {prefix}); run scripts/setup or install criu 4.1 or later"
    )]
    Missing {
        /// The prefix looked at.
        prefix: String,
    },
    /// It does not start.
    #[error("cannot run {path}: {source}; run scripts/setup or give --criu PATH")]
    Start {
        /// The program.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Too old, or an output we cannot read.
    #[error("{path} is version {version:?}; 4.1 or later is needed: run scripts/setup or give --criu PATH")]
    Version {
        /// The program.
        path: PathBuf,
        /// What it said.
        version: String,
    },
}

impl Criu {
    /// The CRIU to use: `given`, else `$CRIU`, else the one on PATH, else the prefix that `scripts/setup`
    /// made beside this program.
    ///
    /// # Errors
    /// [`CriuError`].
    pub fn find(given: Option<&Path>) -> Result<Self, CriuError> {
        let prefix = setup_prefix();
        if let Some(path) = given {
            return Self::at(path.to_owned());
        }
        if let Some(path) = std::env::var_os("CRIU").filter(|path| !path.is_empty()) {
            return Self::at(path.into());
        }
        // One on PATH that is too old (Debian 12's) must not hide the one that setup made.
        let on_path = find_on_path("criu").map(Self::at);
        if let Some(Ok(criu)) = on_path {
            return Ok(criu);
        }
        match prefix.iter().find(|path| path.exists()) {
            Some(path) => Self::at(path.clone()),
            None => on_path.unwrap_or_else(|| {
                let prefix = prefix.first().map_or_else(String::new, |path| path.display().to_string());
                Err(CriuError::Missing { prefix })
            }),
        }
    }

    /// Whether it can dump Internet sockets on this kernel: before 4.2 it takes it for a failure that the kernel (from
    /// 6.16 on) refuses `SO_PASSCRED` on them.
    #[must_use]
    pub fn dumps_internet_sockets(&self) -> bool {
        self.layout == HeaderLayout::Wide || !kernel_refuses_passcred()
    }

    fn at(path: PathBuf) -> Result<Self, CriuError> {
        let output = Command::new(&path)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| CriuError::Start { path: path.clone(), source })?;
        Self::saying(path, &String::from_utf8_lossy(&output.stdout))
    }

    /// The CRIU at `path`, by what its `--version` prints.
    fn saying(path: PathBuf, text: &str) -> Result<Self, CriuError> {
        let bad = |version: &str| CriuError::Version { path: path.clone(), version: version.to_owned() };
        let version = text
            .lines()
            .find_map(|line| line.strip_prefix("Version:"))
            .map(|v| v.trim().to_owned())
            .ok_or_else(|| bad(text.trim()))?;
        let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
            return Err(bad(&version));
        };
        if (major, minor) < OLDEST {
            return Err(bad(&version));
        }
        let layout = if (major, minor) >= (4, 2) { HeaderLayout::Wide } else { HeaderLayout::Compact };
        Ok(Self { path, version, layout })
    }
}

fn kernel_refuses_passcred() -> bool {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket, sockopt};
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    socket.is_ok_and(|socket| getsockopt(&socket, sockopt::PassCred) == Err(nix::Error::EOPNOTSUPP))
}

/// `target/criu-prefix/bin/criu` for a program in `target/PROFILE/`, and under the current directory.
fn setup_prefix() -> Vec<PathBuf> {
    let tail = Path::new("criu-prefix/bin/criu");
    let mut places = Vec::new();
    if let Ok(exe) = std::env::current_exe() {
        places.extend(exe.ancestors().skip(2).take(2).map(|dir| dir.join(tail)));
    }
    places.push(Path::new("target").join(tail));
    places
}

fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// A running CRIU, held by descriptor.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pidfd: PidFd,
    log: PathBuf,
}

impl AsFd for Running {
    /// Readable once it has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Running {
    /// Starts `command`, whose CRIU log is `log`; what it prints itself goes to `log` with `.out` appended.
    ///
    /// # Errors
    /// The errno of starting it.
    pub fn start(command: &mut Command, log: PathBuf) -> io::Result<Self> {
        Self::spawn(command.stdin(Stdio::null()), log)
    }

    /// As [`Running::start`]; what is written to the second value is its standard input.
    ///
    /// # Errors
    /// The errno of starting it.
    pub fn start_fed(command: &mut Command, log: PathBuf) -> io::Result<(Self, ChildStdin)> {
        let mut running = Self::spawn(command.stdin(Stdio::piped()), log)?;
        let input = running.child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok((running, input))
    }

    fn spawn(command: &mut Command, log: PathBuf) -> io::Result<Self> {
        let printed = File::create(printed(&log))?;
        let child = command.stdout(printed.try_clone()?).stderr(printed).spawn()?;
        let pidfd = PidFd::open(child.id())?;
        Ok(Self { child, pidfd, log })
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The errno of `waitpid(2)`.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// `ESRCH` if it has ended and was waited for.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        self.pidfd.signal(signal)
    }

    /// Kills it and waits.
    pub fn kill(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.pidfd.signal(nix::libc::SIGKILL);
        let _ = self.child.wait();
    }

    /// What its log says about a failure.
    #[must_use]
    pub fn complaint(&self) -> String {
        complaint(&self.log)
    }
}

/// Where what CRIU prints itself goes, beside its log.
#[must_use]
pub fn printed(log: &Path) -> PathBuf {
    log.with_extension("out")
}

/// The error lines of a CRIU log (and of what CRIU printed), most telling last; without any, the last it printed.
#[must_use]
pub fn complaint(log: &Path) -> String {
    const MOST: usize = 5;
    let texts = [printed(log), log.to_owned()]
        .map(|file| String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned());
    let lines = texts.iter().flat_map(|text| text.lines()).map(str::trim).filter(|line| !line.is_empty());
    // What getopt says about an option begins with the program's name.
    let is_error = |line: &&str| {
        // In every log of a process that may not raise its limits, and never the cause.
        let harmless = line.contains("rlimit: Can't setup RLIMIT_NOFILE");
        !harmless && (line.contains("Error") || line.starts_with("criu: "))
    };
    let errors: Vec<&str> = lines.clone().filter(is_error).collect();
    let lines = if errors.is_empty() { lines.collect() } else { errors };
    if lines.is_empty() {
        return "it gave no reason".to_owned();
    }
    let skip = lines.len().saturating_sub(MOST);
    lines[skip..].join("; ")
}

/// Whether the log of a restore says that it has failed: CRIU has killed what it had restored then.
#[must_use]
pub fn has_failed(log: &Path) -> bool {
    // The same in all of its versions, and the last that it logs.
    std::fs::read(log).is_ok_and(|text| String::from_utf8_lossy(&text).contains("Restoring FAILED"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // What a program prints, not a script that prints it: one just written is "busy" as long as a child that another
    // test's thread forked meanwhile has its descriptor.
    fn saying(text: &str) -> Result<Criu, CriuError> {
        Criu::saying(PathBuf::from("criu"), text)
    }

    #[test]
    fn layout_follows_the_version() {
        let old = saying("Version: 4.1.1\nGitID: v4.1.1\n").unwrap();
        assert_eq!((old.version.as_str(), old.layout), ("4.1.1", HeaderLayout::Compact));
        let new = saying("Version: 4.2\n").unwrap();
        assert_eq!(new.layout, HeaderLayout::Wide);
    }

    #[test]
    fn old_and_odd_versions_are_refused() {
        for text in ["Version: 3.17.1\n", "Version: x\n", "hello\n", ""] {
            assert!(matches!(saying(text), Err(CriuError::Version { .. })), "{text}");
        }
        let program = |path: &str| Criu::find(Some(Path::new(path)));
        assert!(matches!(program("/nonexistent"), Err(CriuError::Start { .. })));
        assert!(matches!(program("/bin/true"), Err(CriuError::Version { .. })));
    }

    #[test]
    fn complaints_quote_the_last_errors() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        assert!(complaint(&log).contains("no reason"));
        std::fs::write(printed(&log), "criu: unrecognized option '--x'\n\nUsage:\n").unwrap();
        assert_eq!(complaint(&log), "criu: unrecognized option '--x'");
        std::fs::write(&log, "(0.1) fine\n(0.2) Error (a.c:1): first\n(0.3) Error (b.c:2): last\n").unwrap();
        assert!(complaint(&log).ends_with("last"));
    }
}
