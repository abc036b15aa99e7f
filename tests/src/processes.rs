//! Who is there, read from files of /proc that do not touch the memory of the process they are about: `cmdline` and
//! `environ` of a task that waits for a missing page would wait for it, too.

use std::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::time::Duration;

use host::waiting;
use kernel::pidfd::PidFd;
use nix::sys::signal::Signal;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its pid.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its name.
    pub name: String,
    /// Its state: `R`, `S`, `D`, `T` stopped, `t` traced, `Z` ended.
    pub state: char,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}) of {}", self.pid, self.name, self.state, self.parent)
    }
}

impl Entry {
    /// The process with this pid, if there is one.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything; the last parenthesis ends it.
        let (head, tail) = stat.rsplit_once(')')?;
        let mut words = tail.split_whitespace();
        let state = words.next()?.chars().next()?;
        let parent = words.next()?.parse().ok()?;
        Some(Self { pid, parent, name: head.split_once('(')?.1.to_owned(), state })
    }

    /// Whether it has ended and only waits to be reaped.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// Whether the process is gone or has ended, with every thread: until then it has its descriptors, and who writes to one that it
/// listens at is not told that nobody does.
#[must_use]
pub fn has_ended(pid: u32) -> bool {
    let ended =
        |process: PidFd| waiting::readable_within(process.as_fd(), Duration::ZERO).is_ok_and(|ended| ended);
    PidFd::open(pid).map_or(true, ended)
}

/// Whether a process, or a thread of this name of it, has no capability and gets none by executing a program.
#[must_use]
pub fn is_unprivileged(pid: u32, thread: Option<&str>) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut found = tasks
        .filter_map(|task| fs::read_to_string(task.path().join("status")).ok())
        .filter(|status| thread.is_none_or(|name| value(status, "Name:") == Some(name)))
        .peekable();
    let unprivileged = |status: String| {
        value(&status, "NoNewPrivs:") == Some("1")
            && ["CapEff:", "CapPrm:", "CapInh:"]
                .iter()
                .all(|key| value(&status, key).is_some_and(|caps| caps.bytes().all(|digit| digit == b'0')))
    };
    found.peek().is_some() && found.all(unprivileged)
}

/// Whether a filter decides about the system calls of a process.
#[must_use]
pub fn has_filter(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .is_ok_and(|status| value(&status, "Seccomp:") == Some("2"))
}

/// The value behind a key of a `status` file.
fn value<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// Whether the process stands still: stopped by a signal, or held by a tracer.
#[must_use]
pub fn is_stopped(pid: u32) -> bool {
    Entry::of(pid).is_some_and(|entry| matches!(entry.state, 'T' | 't'))
}

/// The process stands still, or will as soon as it has a processor: one that CRIU lets go of with a stop pending has to wake up for
/// that, which takes a while on a busy host.
///
/// # Panics
/// If it does not.
#[track_caller]
pub fn assert_stops(pid: u32) {
    let stops = || is_stopped(pid).then_some(());
    crate::eventually_or_say("that it stands still", crate::STEP, stops, || format!("{:?}", Entry::of(pid)));
}

/// Every process of this host, those that have ended included.
#[must_use]
pub fn all() -> Vec<Entry> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Entry::of).collect()
}

/// Whether `word` is on a program's command line; not for tasks, whose pages may be missing.
#[must_use]
pub fn is_told(pid: u32, word: &str) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
}

/// Whether a process has a signal that none of its threads has taken.
#[must_use]
pub fn is_pending(pid: u32, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let masks = status.lines().filter_map(|line| line.strip_prefix("ShdPnd:"));
    let mut masks = masks.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    masks.any(|mask| mask & (1 << (signal as i32 - 1)) != 0)
}

/// Every process below `root` that has not ended.
#[must_use]
pub fn below(root: u32) -> Vec<Entry> {
    let all = all();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all.iter().filter(|entry| entry.parent == parent).map(|entry| entry.pid));
        next += 1;
    }
    let live = |entry: &Entry| entry.pid != root && found.contains(&entry.pid) && !entry.has_ended();
    all.into_iter().filter(live).collect()
}

/// The pid that the process has in its own PID namespace.
#[must_use]
pub fn innermost_pid(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

/// Kills what is still below `root`.
pub fn kill_below(root: u32) {
    for Entry { pid, .. } in below(root) {
        // Held first, then looked at again: by now the pid could be somebody else's.
        let Ok(held) = PidFd::open(pid) else { continue };
        if below(root).iter().any(|entry| entry.pid == pid) {
            let _ = held.signal(Signal::SIGKILL as i32);
        }
    }
}

/// Sends a signal to a process of this test.
///
/// # Panics
/// If it is not there.
#[track_caller]
pub fn signal(pid: u32, signal: Signal) {
    try_signal(pid, signal).unwrap_or_else(|error| panic!("{signal} to {pid}: {error}"));
}

/// Sends a signal to a process that may have ended.
///
/// # Errors
/// `ESRCH` if it has.
pub fn try_signal(pid: u32, signal: Signal) -> std::io::Result<()> {
    PidFd::open(pid).and_then(|held| held.signal(signal as i32))
}

/// Bytes of anonymous memory that a process has present.
#[must_use]
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Number of pipe ends that a process has open.
#[must_use]
pub fn pipe_ends(pid: u32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("pipe:")).count()
}
