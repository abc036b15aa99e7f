//! The steering side: start a workload, wait for what it says, tell it what to do.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Child, Command as Program, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use kernel::pidfd::PidFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::status::{Command, Order};
use super::{Files, field};

/// How many of the last lines an error shows.
const LINES_SHOWN: usize = 5;

/// A workload that was started here. Dropping it kills what was started, not a copy that was moved elsewhere; a
/// moved copy ends by itself once its control file is gone.
#[derive(Debug)]
pub struct Process {
    child: Child,
    exit: PidFd,
    status: StatusReader,
    control: PathBuf,
    last_number: u64,
    moved: bool,
}

impl Process {
    /// Starts `program`, which has to be given the same `files`, without a terminal. Both files are made anew.
    ///
    /// # Errors
    /// If the files cannot be made or the program cannot be started.
    pub fn start(mut program: Program, files: &Files) -> anyhow::Result<Self> {
        for path in [&files.status, &files.control] {
            File::create(path).with_context(|| format!("creating {path:?}"))?;
        }
        let status = StatusReader::new(files.status.clone())?;
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = program.spawn().with_context(|| format!("starting {:?}", program.get_program()))?;
        // The child is not reaped before this value drops, so the pid cannot belong to anybody else.
        let exit = PidFd::open(child.id()).context("holding the workload")?;
        Ok(Self { child, exit, status, control: files.control.clone(), last_number: 0, moved: false })
    }

    /// The pid it was started with.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// From now on the end of the process that was started here is no error: the workload runs elsewhere.
    pub const fn mark_moved(&mut self) {
        self.moved = true;
    }

    /// Waits until the process that was started here has ended, for at most `limit`, and reaps it.
    ///
    /// # Errors
    /// If it still runs then.
    pub fn wait_gone(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        if !wait_readable(&[self.exit.as_fd()], Instant::now() + limit)?[0] {
            bail!("process {} still runs after {limit:?}", self.pid());
        }
        Ok(self.child.wait()?)
    }

    /// Writes an order into the control file, in one step, and returns its number.
    ///
    /// # Errors
    /// If the file cannot be replaced.
    pub fn order(&mut self, order: Order) -> anyhow::Result<u64> {
        let command = self.next_command(order);
        let next = self.control.with_extension("next");
        fs::write(&next, format!("{command}\n"))?;
        fs::rename(&next, &self.control).with_context(|| format!("replacing {:?}", self.control))?;
        Ok(self.last_number)
    }

    /// The next command, for somebody else to put into the control file before any other is.
    pub const fn next_command(&mut self, order: Order) -> Command {
        self.last_number += 1;
        Command { order, number: self.last_number }
    }

    /// Waits for a line that `pick` accepts, among those not looked at yet, for at most `limit`.
    ///
    /// # Errors
    /// If there is none in time, if the workload failed or panicked, or if it ended without having been moved.
    pub fn wait_for<T>(
        &mut self,
        limit: Duration,
        mut pick: impl FnMut(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            // Asked before the file is read: what the process wrote before it ended is then read below.
            let ended = !self.moved && wait_readable(&[self.exit.as_fd()], Instant::now())?[0];
            while let Some(line) = self.status.next_line()? {
                if line.starts_with("PANIC") || line.starts_with("FAILED") {
                    bail!("workload: {line}");
                }
                if let Some(found) = pick(&line) {
                    return Ok(found);
                }
            }
            if ended {
                bail!(
                    "workload {} ended: {:?}; {}",
                    self.pid(),
                    self.child.wait()?,
                    self.status.last_lines()
                );
            }
            if Instant::now() >= deadline {
                return Err(anyhow!("no such line within {limit:?}; {}", self.status.last_lines()));
            }
            if self.moved {
                wait_readable(&[self.status.changes.as_fd()], deadline)?;
            } else {
                wait_readable(&[self.status.changes.as_fd(), self.exit.as_fd()], deadline)?;
            }
            self.status.clear_changes();
        }
    }

    /// Waits for a line that starts with `word` and, if `number` is given, has it as its second word.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for).
    pub fn wait_line(&mut self, word: &str, number: Option<u64>, limit: Duration) -> anyhow::Result<String> {
        self.wait_for(limit, |line| {
            let mut words = line.split_whitespace();
            let right = words.next() == Some(word)
                && number
                    .is_none_or(|number| words.next().and_then(|word| word.parse().ok()) == Some(number));
            right.then(|| line.to_owned())
        })
        .with_context(|| format!("waiting for {word} {number:?}"))
    }

    /// Passes over the lines that are there already: what is waited for next was written after this.
    ///
    /// # Errors
    /// If the status file cannot be read.
    pub fn catch_up(&mut self) -> anyhow::Result<()> {
        while self.status.next_line()?.is_some() {}
        Ok(())
    }

    /// Every line read so far that starts with `word`.
    #[must_use]
    pub fn lines(&self, word: &str) -> Vec<&str> {
        self.status.lines.iter().map(String::as_str).filter(|line| line.starts_with(word)).collect()
    }

    /// The highest value of `key` among the lines read so far that start with `word`.
    #[must_use]
    pub fn highest(&self, word: &str, key: &str) -> Option<u64> {
        self.lines(word).into_iter().filter_map(|line| field(line, key)).max()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        // A workload leads its own process group (`detach`), so its children end with it. Before it got there, or
        // for a client that does not, the group does not exist and only the child is killed.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until one of `fds` is readable or the deadline has passed; says which are.
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>], deadline: Instant) -> anyhow::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        match poll(&mut polled, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => return Ok(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect()),
        }
    }
}

/// Follows a growing file line by line.
#[derive(Debug)]
struct StatusReader {
    path: PathBuf,
    changes: Inotify,
    offset: u64,
    partial: Vec<u8>,
    lines: Vec<String>,
    next: usize,
}

impl StatusReader {
    fn new(path: PathBuf) -> anyhow::Result<Self> {
        let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        changes.add_watch(&path, AddWatchFlags::IN_MODIFY).with_context(|| format!("watching {path:?}"))?;
        Ok(Self { path, changes, offset: 0, partial: Vec::new(), lines: Vec::new(), next: 0 })
    }

    fn clear_changes(&self) {
        let _ = self.changes.read_events();
    }

    fn next_line(&mut self) -> anyhow::Result<Option<String>> {
        if self.next == self.lines.len() {
            self.read_more()?;
        }
        let line = self.lines.get(self.next).cloned();
        self.next += usize::from(line.is_some());
        Ok(line)
    }

    fn read_more(&mut self) -> anyhow::Result<()> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        self.offset += u64::try_from(file.read_to_end(&mut bytes)?)?;
        for byte in bytes {
            if byte == b'\n' {
                self.lines.push(String::from_utf8_lossy(&self.partial).into_owned());
                self.partial.clear();
            } else {
                self.partial.push(byte);
            }
        }
        Ok(())
    }

    fn last_lines(&self) -> String {
        let from = self.lines.len().saturating_sub(LINES_SHOWN);
        format!("its last lines: {:?}", &self.lines[from..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, files: &Files) -> Program {
        let mut program = Program::new("sh");
        program.args(["-c", script, "sh"]).arg(&files.status).arg(&files.control);
        program
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn lines_arrive_when_they_are_written_and_orders_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::in_dir(dir.path(), "w");
        let script = "echo READY id=0 >>$1; until grep -q 'check 1' $2; do sleep 0.02; done; echo CHECK 1 wrong=3 >>$1";
        let mut process = Process::start(shell(script, &files), &files).unwrap();
        assert_eq!(process.wait_line("READY", None, LONG).unwrap(), "READY id=0");
        let number = process.order(Order::Check).unwrap();
        assert_eq!(process.wait_line("CHECK", Some(number), LONG).unwrap(), "CHECK 1 wrong=3");
        assert!(process.wait_gone(LONG).unwrap().success());
        assert_eq!(process.highest("CHECK", "wrong"), Some(3));
    }

    #[test]
    fn a_workload_that_ends_or_panics_is_noticed_before_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::in_dir(dir.path(), "w");
        let mut process = Process::start(shell("echo LAST >>$1; exit 7", &files), &files).unwrap();
        let error = process.wait_line("READY", None, LONG).unwrap_err();
        assert!(format!("{error:#}").contains("LAST"), "{error:#}");
        let mut process = Process::start(shell("echo PANIC at x >>$1; sleep 20", &files), &files).unwrap();
        assert!(format!("{:#}", process.wait_line("READY", None, LONG).unwrap_err()).contains("PANIC at x"));
    }

    #[test]
    fn a_line_that_does_not_come_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::in_dir(dir.path(), "w");
        let mut process = Process::start(shell("sleep 20", &files), &files).unwrap();
        let begun = Instant::now();
        assert!(process.wait_line("READY", None, Duration::from_millis(50)).is_err());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
