//! What every workload shares: how it says how it is, how it is told what to do, how it is started.
//!
//! ```text
//!   test or experiment                                     the process that is moved
//!   Process::order("check 3")  --> control file  --poll-->  ControlFile::poll
//!   Process::wait_for(line)    <--inotify-- status file <-- StatusLog::line
//! ```
//!
//! Both are regular files, opened by path for every line and every poll: at most times the process holds no
//! descriptor for CRIU to restore, and none whose size or offset could disagree after a move. Sockets, terminals
//! and FIFOs would each need something of CRIU that is not what these experiments are about.

mod memory;
mod process;
mod spin;
mod status;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::unistd::{getpid, getsid, setsid};

pub use memory::touch_and_free;
pub use process::Process;
pub(crate) use process::wait_readable;
pub use spin::{BusyCores, SpinOptions, spin};
pub use status::{Command, ControlFile, Order, Poll, StatusLog, field};

/// The two files between a workload and whoever steers it.
#[derive(Clone, Debug, clap::Args)]
pub struct Files {
    /// File that the workload appends its lines to
    #[arg(long)]
    pub status: PathBuf,
    /// File that says what to do, for example `check 1` or `quit 2`
    #[arg(long)]
    pub control: PathBuf,
}

impl Files {
    /// `NAME.status` and `NAME.control` in `dir`.
    #[must_use]
    pub fn in_dir(dir: &Path, name: &str) -> Self {
        Self { status: dir.join(format!("{name}.status")), control: dir.join(format!("{name}.control")) }
    }

    /// The same files by absolute paths: the working directory need not be the same after a move.
    ///
    /// # Errors
    /// If there is no working directory.
    pub fn absolute(&self) -> anyhow::Result<Self> {
        let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("resolving {path:?}"));
        Ok(Self { status: absolute(&self.status)?, control: absolute(&self.control)? })
    }
}

/// Makes this process one that can be moved: the leader of its own session, without a terminal.
///
/// # Errors
/// If it leads a process group of a session that is not its own (start it with `setsid`), or has a terminal.
pub fn detach() -> anyhow::Result<()> {
    if getsid(None)? != getpid() {
        setsid().context("starting a session (a process group leader cannot: start it with setsid)")?;
    }
    for (name, stream) in [("stdin", 0), ("stdout", 1), ("stderr", 2)] {
        let target = std::fs::read_link(format!("/proc/self/fd/{stream}")).unwrap_or_default();
        if target.starts_with("/dev/pts") || target.starts_with("/dev/tty") {
            bail!(
                "{name} is the terminal {target:?}, which would not move: redirect it to /dev/null or a file"
            );
        }
    }
    Ok(())
}

/// Says in the status file why a workload could not start: its stderr goes nowhere.
///
/// # Errors
/// The same error.
pub fn report_failure<T>(files: &Files, result: anyhow::Result<T>) -> anyhow::Result<T> {
    result.inspect_err(|error| StatusLog::new(files.status.clone()).line(&format!("FAILED {error:#}")))
}

/// Makes a panic in any thread the end of the process, with a line about it: a workload that has lost a thread
/// would otherwise wait for it forever at the next check.
pub fn end_on_panic(status: StatusLog) {
    std::panic::set_hook(Box::new(move |panic| {
        status.line(&format!("PANIC {}", panic.to_string().replace('\n', " ")));
        std::process::abort();
    }));
}
