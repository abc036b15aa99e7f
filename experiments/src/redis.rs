//! A redis server for a test: in a host of the lab, without anything on disk, on no terminal.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::Context;
use tempfile::TempDir;

use crate::workload::{Files, Process};

const START_LIMIT: Duration = Duration::from_secs(20);
/// The port it listens on.
pub const PORT: u16 = 6379;

/// A running redis. Dropping it kills what was started here; a copy that was moved elsewhere is not.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    address: SocketAddr,
    _directory: TempDir,
}

impl Redis {
    /// Starts `redis-server` and waits until it listens on `address`. `in_host` makes the command that runs a program
    /// in the right namespace, for example `|program| lab.run_in(Host::Source, program)`.
    ///
    /// # Errors
    /// If it is not installed or does not start.
    pub fn start(address: Ipv4Addr, in_host: impl FnOnce(&str) -> Command) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("redis").tempdir()?;
        let path: &Path = directory.path();
        // Its log is what a workload's status file is: it says there when it is ready.
        let files = Files::in_dir(path, "redis");
        // setsid(1): CRIU dumps sessions whole, so a server has to lead its own. It becomes the server, too.
        let mut command = in_host("setsid");
        command.arg("redis-server").args(["--save", "", "--appendonly", "no", "--daemonize", "no"]);
        command.args(["--port", &PORT.to_string(), "--bind", &address.to_string(), "--protected-mode", "no"]);
        command.arg("--dir").arg(path).arg("--logfile").arg(&files.status);
        let mut process = Process::start(command, &files)?;
        let ready = |line: &str| line.contains("Ready to accept connections").then_some(());
        process.wait_for(START_LIMIT, ready).context("starting redis-server")?;
        Ok(Self { process, address: (address, PORT).into(), _directory: directory })
    }

    /// The pid of the server.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the end of what was started here, and reaps it.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait_gone(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.process.wait_gone(limit)
    }
}
