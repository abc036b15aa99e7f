//! The two programs that do the move, as processes of the demo.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kernel::pidfd::PidFd;

use crate::lab::{Host, Lab};
use crate::workload::wait_readable;

/// Lines of a tool's output that an error shows.
const LINES_SHOWN: usize = 30;

/// A program of this project: beside the program that runs, as cargo builds them.
///
/// # Errors
/// If it is not there.
pub(super) fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let path = own.with_file_name(name);
    if !path.exists() {
        bail!("{name} is not beside {own:?}: build it with `cargo build --release`");
    }
    Ok(path)
}

/// A running tool. Dropping it kills it.
pub(super) struct Tool {
    name: &'static str,
    child: Child,
    exit: PidFd,
    log: PathBuf,
}

impl Tool {
    /// Starts a program with its output in a file.
    pub(super) fn start(name: &'static str, mut command: Command, log: PathBuf) -> anyhow::Result<Self> {
        let output = File::create(&log).with_context(|| format!("creating {log:?}"))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let exit = PidFd::open(child.id()).with_context(|| format!("holding {name}"))?;
        Ok(Self { name, child, exit, log })
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        if !wait_readable(&[self.exit.as_fd()], Instant::now() + limit)?[0] {
            bail!("{} still runs after {limit:?}\n{}", self.name, self.last_lines());
        }
        Ok(self.child.wait()?)
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> anyhow::Result<bool> {
        Ok(wait_readable(&[self.exit.as_fd()], Instant::now())?[0])
    }

    /// The last lines it printed, for an error.
    pub(super) fn last_lines(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(LINES_SHOWN);
        format!("{} ({:?}):\n  {}", self.name, self.log, lines[from..].join("\n  "))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until somebody listens on `port` in a host, or is bound to it over UDP. Read from the kernel's tables: a
/// connection made to find out would be taken for the one move that `--once` is about.
pub(super) fn wait_listening(
    lab: &Lab,
    host: Host,
    port: u16,
    by: &Tool,
    limit: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !lab.inside(host, || is_listening(Path::new("/proc/thread-self/net"), port))? {
        if by.has_ended()? || Instant::now() > deadline {
            bail!("nobody listens on port {port}\n{}", by.last_lines());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn is_listening(net: &Path, port: u16) -> bool {
    let has = |table: &str, state: &str| {
        let text = fs::read_to_string(net.join(table)).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            // "  0: 0200004D:1E61 00000000:0000 0A ...": number, local address, remote address, state
            let mut words = line.split_whitespace().skip(1);
            let local = words.next().unwrap_or_default().ends_with(&format!(":{port:04X}"));
            local && words.nth(1) == Some(state)
        })
    };
    has("tcp", "0A") || has("tcp6", "0A") || has("udp", "07") || has("udp6", "07")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_in_the_kernel_s_table_and_a_connection_is_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let net = Path::new("/proc/thread-self/net");
        assert!(is_listening(net, port));
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(!is_listening(net, client.local_addr().unwrap().port()));
        drop(listener);
        assert!(!is_listening(net, port));
    }
}
