//! Programs that run beside an experiment, and what they used.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kernel::pidfd::PidFd;
use nix::sys::resource::{UsageWho, getrusage};

use crate::clock::wall_ns;
use crate::workload::wait_readable;

/// Lines of a tool's output that an error shows.
const LINES_SHOWN: usize = 30;
/// Between two looks at a tool that is to get ready: what is late here is part of a blackout.
const READY_INTERVAL: Duration = Duration::from_millis(1);
/// Between two looks at tools that are to end.
const END_INTERVAL: Duration = Duration::from_millis(2);

/// A program of this project: beside the program that runs, as cargo builds them.
///
/// # Errors
/// If it is not there.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let path = own.with_file_name(name);
    if !path.exists() {
        bail!("{name} is not beside {own:?}: build it with `cargo build --release`");
    }
    Ok(path)
}

/// Whether a program is on PATH.
#[must_use]
pub fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// What a tool used until its end.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Used {
    /// User and system time of itself and of the children it waited for, in seconds.
    pub cpu_s: f64,
    /// The most resident memory that was seen of itself, in MiB.
    pub peak_mib: f64,
    /// When its end was noticed, by [`wall_ns`].
    pub ended_ns: u64,
}

/// A running tool. Dropping it kills it.
#[derive(Debug)]
pub struct Tool {
    name: String,
    child: Child,
    exit: PidFd,
    log: PathBuf,
    peak_kib: u32,
}

impl Tool {
    /// Starts a program with its output in the file `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> anyhow::Result<Self> {
        let output = File::create(&log).with_context(|| format!("creating {log:?}"))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let exit = PidFd::open(child.id()).with_context(|| format!("holding {name}"))?;
        Ok(Self { name: name.to_owned(), child, exit, log, peak_kib: 0 })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        if !wait_readable(&[self.exit.as_fd()], Instant::now() + limit)?[0] {
            bail!("{} still runs after {limit:?}\n{}", self.name, self.last_lines());
        }
        Ok(self.child.wait()?)
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// The errno of `poll(2)`.
    pub fn has_ended(&self) -> anyhow::Result<bool> {
        Ok(wait_readable(&[self.exit.as_fd()], Instant::now())?[0])
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines it printed, for an error.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let text = self.output();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(LINES_SHOWN);
        format!("{} ({:?}):\n  {}", self.name, self.log, lines[from..].join("\n  "))
    }

    /// Waits for a line in its output that `pick` accepts.
    ///
    /// # Errors
    /// If it ends without one, or there is none within `limit`.
    pub fn wait_line<T>(&mut self, limit: Duration, pick: impl Fn(&str) -> Option<T>) -> anyhow::Result<T> {
        let found = |tool: &Self| tool.output().lines().find_map(&pick);
        self.wait_until(limit, |tool| found(tool).is_some())?;
        found(self).context("a line of a log is gone")
    }

    /// Waits until `condition` holds, looked at every millisecond.
    ///
    /// # Errors
    /// If the tool ends before, or it does not hold within `limit`.
    pub fn wait_until(&mut self, limit: Duration, condition: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        while !condition(self) {
            if let Some(status) = self.child.try_wait()? {
                bail!("ended ({status}): {}", self.last_lines());
            }
            ensure!(Instant::now() < deadline, "not ready after {limit:?}: {}", self.last_lines());
            std::thread::sleep(READY_INTERVAL);
        }
        Ok(())
    }

    /// What it used so far of what can be said before its end: its peak memory.
    #[must_use]
    pub fn used_so_far(&self) -> Used {
        Used { cpu_s: f64::NAN, peak_mib: f64::from(self.peak_kib) / 1024.0, ended_ns: wall_ns() }
    }

    /// What it used, if it has ended, and well. Called again and again until then, because the memory of a process
    /// cannot be asked for after its end. No other thread may wait for children meanwhile.
    ///
    /// # Errors
    /// If it failed.
    pub fn used(&mut self) -> anyhow::Result<Option<Used>> {
        self.peak_kib = peak_memory_kib(self.child.id()).unwrap_or(self.peak_kib);
        let before = children_cpu_s()?;
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        let ended_ns = wall_ns();
        ensure!(status.success(), "failed ({status}): {}", self.last_lines());
        let cpu_s = children_cpu_s()? - before;
        Ok(Some(Used { cpu_s, peak_mib: f64::from(self.peak_kib) / 1024.0, ended_ns }))
    }
}

impl Tool {
    /// Waits for its good end, and says what it used.
    ///
    /// # Errors
    /// If it fails, or still runs after `limit`.
    pub fn wait_used(&mut self, limit: Duration) -> anyhow::Result<Used> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(used) = self.used()? {
                return Ok(used);
            }
            ensure!(Instant::now() < deadline, "no end after {limit:?}: {}", self.last_lines());
            std::thread::sleep(END_INTERVAL);
        }
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the good end of both sides of a move, and says what each used.
///
/// # Errors
/// If one fails, or does not end within `limit`.
pub fn wait_both(source: &mut Tool, destination: &mut Tool, limit: Duration) -> anyhow::Result<(Used, Used)> {
    match wait_both_until(source, destination, limit)? {
        [Some(source), Some(destination)] => Ok((source, destination)),
        [None, _] => bail!("no end after {limit:?}: {}", source.last_lines()),
        [_, None] => bail!("no end after {limit:?}: {}", destination.last_lines()),
    }
}

/// Waits for the good end of both sides of a move, at most `limit`, and says what each used that has ended.
///
/// # Errors
/// If one fails.
pub fn wait_both_until(
    source: &mut Tool,
    destination: &mut Tool,
    limit: Duration,
) -> anyhow::Result<[Option<Used>; 2]> {
    let deadline = Instant::now() + limit;
    let mut used = [None, None];
    loop {
        for (used, tool) in used.iter_mut().zip([&mut *source, &mut *destination]) {
            if used.is_none() {
                *used = tool.used()?;
            }
        }
        if used.iter().all(Option::is_some) || Instant::now() >= deadline {
            return Ok(used);
        }
        std::thread::sleep(END_INTERVAL);
    }
}

fn children_cpu_s() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(u64::try_from(time.tv_sec()).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec()).unwrap_or(0))
    };
    Ok((seconds(usage.user_time()) + seconds(usage.system_time())).as_secs_f64())
}

fn peak_memory_kib(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(dir: &tempfile::TempDir, script: &str) -> Tool {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Tool::start("shell", command, dir.path().join("log")).unwrap()
    }

    #[test]
    fn programs_on_path_are_found() {
        assert!(is_installed("sh") && !is_installed("no such program"));
    }

    #[test]
    fn a_line_of_a_tool_is_found_and_its_end_is_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut tool = shell(&dir, "echo a=1; echo b=2; read x </dev/zero");
        let found = tool.wait_line(LONG, |line| line.strip_prefix("b=")?.parse::<u32>().ok()).unwrap();
        assert_eq!(found, 2);
        let error = shell(&dir, "echo a=1; exit 3").wait_line(LONG, |line| line.strip_prefix("b=").map(drop));
        assert!(format!("{:#}", error.unwrap_err()).contains("a=1"));
    }

    #[test]
    fn what_a_tool_used_includes_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let spin = "sh -c 'i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done'";
        let (mut idle, mut busy) = (shell(&dir, "sleep 0.01"), shell(&dir, spin));
        let (idle, busy) = wait_both(&mut idle, &mut busy, LONG).unwrap();
        assert!(busy.cpu_s > idle.cpu_s && busy.peak_mib > 0.0, "{idle:?} {busy:?}");
        let mut failing = shell(&dir, "exit 1");
        assert!(wait_both(&mut failing, &mut shell(&dir, "true"), LONG).is_err());
        let (mut ends, mut stays) = (shell(&dir, "true"), shell(&dir, "read x </dev/zero"));
        assert!(wait_both(&mut ends, &mut stays, Duration::from_millis(50)).is_err());
    }
}
