//! The process tree that is to move, as /proc shows it.

use std::fs;
use std::io;

use kernel::pidfd::PidFd;
use protocol::units::TaskId;

/// One process.
#[derive(Debug)]
pub struct Task {
    /// Its pid here.
    pub pid: u32,
    /// Its pid in its own PID namespace: its name in the images.
    pub id: TaskId,
    /// Its threads' ids in its own PID namespace, itself included.
    pub threads: Vec<u32>,
    /// Its name.
    pub name: String,
    /// Held, so that a reused pid is never signalled.
    pub handle: PidFd,
    /// Whether it was stopped (job control) before anything was done to it.
    pub was_stopped: bool,
}

/// A process and its descendants, root first.
#[derive(Debug)]
pub struct ProcessTree {
    /// The processes.
    pub tasks: Vec<Task>,
}

/// Most processes of a tree; a bound for a tree that forks as fast as it is listed.
const TASKS_MAX: usize = 65_536;

impl ProcessTree {
    /// Lists the tree below `root` as it is now.
    ///
    /// # Errors
    /// `NotFound` if there is no such process.
    pub fn of(root: u32) -> io::Result<Self> {
        let mut tasks = vec![Task::read(root)?];
        let mut next = 0;
        while next < tasks.len() && tasks.len() < TASKS_MAX {
            // One that exits while it is listed is no part of the tree any more.
            match children(tasks[next].pid) {
                Ok(found) => {
                    tasks.extend(found.into_iter().filter_map(|child| Task::read(child).ok()));
                    next += 1;
                }
                Err(error) if next > 0 && is_gone(&error) => drop(tasks.remove(next)),
                Err(error) => return Err(error),
            }
        }
        Ok(Self { tasks })
    }

    /// The same tree now that it is frozen: with what was forked and without what ended since this list was
    /// made. Whether a task was stopped is known from then.
    ///
    /// # Errors
    /// `NotFound` if the root is gone.
    pub fn as_frozen(&self) -> io::Result<Self> {
        let mut now = Self::of(self.root().pid)?;
        for task in &mut now.tasks {
            let before = self.tasks.iter().find(|before| before.pid == task.pid);
            task.was_stopped = before.is_some_and(|before| before.was_stopped);
        }
        Ok(now)
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> &Task {
        &self.tasks[0]
    }

    /// Memory of the whole tree in bytes: resident and swapped, anonymous and shared.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let of = |task: &Task| {
            let status = fs::read_to_string(format!("/proc/{}/status", task.pid)).unwrap_or_default();
            let kib = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key));
                line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
            };
            (kib("RssAnon:") + kib("RssShmem:") + kib("VmSwap:")) * 1024
        };
        self.tasks.iter().map(of).sum()
    }

    /// Every pid and tid that the restored tree needs.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.tasks.iter().flat_map(|task| task.threads.iter().copied()).collect()
    }
}

impl Task {
    fn read(pid: u32) -> io::Result<Self> {
        let gone = |error: io::Error| match error.raw_os_error() {
            Some(nix::libc::ESRCH) => io::ErrorKind::NotFound.into(),
            _ => error,
        };
        let handle = PidFd::open(pid).map_err(gone)?;
        let threads = fs::read_dir(format!("/proc/{pid}/task"))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
            .filter_map(|tid| own_pid(&format!("/proc/{pid}/task/{tid}/status")).ok())
            .collect();
        Ok(Self {
            pid,
            id: TaskId(own_pid(&format!("/proc/{pid}/status"))?),
            threads,
            name: fs::read_to_string(format!("/proc/{pid}/comm"))?.trim().to_owned(),
            handle,
            was_stopped: state(pid)? == 'T',
        })
    }
}

/// The pid in the innermost PID namespace: the last number of `NSpid`.
fn own_pid(status: &str) -> io::Result<u32> {
    let text = fs::read_to_string(status)?;
    let line = text.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.and_then(|line| line.split_whitespace().last()?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{status} has no NSpid")))
}

/// What reading about a process that has ended says, before and while it is read.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
}

/// The children of all threads of a process.
///
/// # Errors
/// `NotFound` if it is gone.
pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path().join("children");
        // A thread that ended meanwhile has no children.
        let text = fs::read_to_string(path).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(found)
}

/// The state letter of a process, as in `/proc/PID/stat`: `R`, `S`, `T` stopped, `t` traced, `Z` zombie …
///
/// # Errors
/// `NotFound` if it is gone.
pub fn state(pid: u32) -> io::Result<char> {
    state_in(&format!("/proc/{pid}/stat"))
}

/// The state letter of a thread.
///
/// # Errors
/// `NotFound` if it is gone.
pub fn thread_state(pid: u32, tid: u32) -> io::Result<char> {
    state_in(&format!("/proc/{pid}/task/{tid}/stat"))
}

fn state_in(stat: &str) -> io::Result<char> {
    let stat = fs::read_to_string(stat)?;
    // The name may hold anything, the last parenthesis ends it.
    let letter = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    letter.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether a process has ended (or is a zombie that nobody has waited for).
#[must_use]
pub fn has_ended(pid: u32) -> bool {
    matches!(state(pid), Err(_) | Ok('Z' | 'X'))
}

/// Whether a process has given its memory back: it has ended, or is about to.
#[must_use]
pub fn has_no_memory(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/statm")).map_or(true, |sizes| sizes.starts_with("0 "))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn lists_itself_with_its_threads() {
        let me = std::process::id();
        let tree = ProcessTree::of(me).unwrap();
        assert_eq!(tree.root().pid, me);
        assert!(tree.root().threads.contains(&tree.root().id.0));
        assert!(tree.memory_bytes() > 0);
        assert!(!has_ended(me) && !has_no_memory(me));
    }

    #[test]
    fn who_has_ended_has_no_memory() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let ended = PidFd::open(pid).unwrap();
        assert!(host::waiting::readable_within(ended.as_fd(), std::time::Duration::from_secs(60)).unwrap());
        assert!(has_no_memory(pid), "a zombie has none");
        child.wait().unwrap();
        assert!(has_no_memory(pid));
    }

    #[test]
    fn an_unknown_pid_is_not_found() {
        assert_eq!(ProcessTree::of(0x3f_ffff).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
