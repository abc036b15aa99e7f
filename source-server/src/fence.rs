//! The fence: once it stands, the source cannot run again, whatever happens to CRIU.
//!
//! While `criu dump` waits in its page server it holds the tasks by ptrace; if it dies they run on. So a
//! SIGSTOP is sent to every task as soon as the page server is ready: pending behind the ptrace stop, it
//! takes effect the moment nobody holds the task any more. A task in a cgroup (v2) that holds nothing but
//! the tree is frozen there as well, against a stray SIGCONT.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc::{SIGCONT, SIGKILL, SIGSTOP};

use crate::process::{ProcessTree, has_ended, state};

/// A fence around a tree.
#[derive(Debug)]
pub struct Fence {
    frozen: Option<PathBuf>,
}

/// A fence that could not be put up.
#[derive(Debug, thiserror::Error)]
#[error("cannot stop task {pid}: {source}")]
pub struct FenceError {
    pid: u32,
    source: io::Error,
}

impl Fence {
    /// Puts the fence up around tasks that CRIU holds.
    ///
    /// # Errors
    /// [`FenceError`].
    pub fn raise(tree: &ProcessTree) -> Result<Self, FenceError> {
        for task in &tree.tasks {
            match task.handle.signal(SIGSTOP) {
                Ok(()) => {}
                // A zombie stays one.
                Err(_) if has_ended(task.pid) => {}
                Err(source) => return Err(FenceError { pid: task.pid, source }),
            }
        }
        let frozen = own_cgroup(tree).filter(|dir| fs::write(dir.join("cgroup.freeze"), "1").is_ok());
        Ok(Self { frozen })
    }

    /// A fence that another process has put up.
    #[must_use]
    pub const fn standing(cgroup: Option<PathBuf>) -> Self {
        Self { frozen: cgroup }
    }

    /// The cgroup that it froze.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Path> {
        self.frozen.as_deref()
    }

    /// Whether no task of the tree can run, whoever continues it.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        let events = self.frozen.as_ref().map(|dir| fs::read_to_string(dir.join("cgroup.events")));
        events.is_some_and(|events| events.is_ok_and(|text| text.lines().any(|line| line == "frozen 1")))
    }

    /// Takes the fence down and lets the tasks run; those that were stopped before stay stopped.
    ///
    /// # Errors
    /// [`FenceError`] for the first task that could not be continued; the others were.
    pub fn lower(self, tree: &ProcessTree) -> Result<(), FenceError> {
        if let Some(dir) = self.frozen {
            // If this fails the tasks stay frozen, and SIGCONT below has no effect yet.
            fs::write(dir.join("cgroup.freeze"), "0")
                .map_err(|source| FenceError { pid: tree.root().pid, source })?;
        }
        let mut failed = None;
        for task in tree.tasks.iter().filter(|task| !task.was_stopped) {
            if let Err(source) = task.handle.signal(SIGCONT) {
                if !has_ended(task.pid) {
                    failed = failed.or(Some(FenceError { pid: task.pid, source }));
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Kills the tasks and waits until they are gone; returns who is still there at the end.
    #[must_use]
    pub fn kill(&self, tree: &ProcessTree, patience: Duration) -> Vec<u32> {
        for task in &tree.tasks {
            // ESRCH: gone already.
            let _ = task.handle.signal(SIGKILL);
        }
        let deadline = Instant::now() + patience;
        tree.tasks
            .iter()
            .filter(|task| {
                let left = deadline.saturating_duration_since(Instant::now());
                let fd = std::os::fd::AsFd::as_fd(&task.handle);
                !host::waiting::readable_within(fd, left).unwrap_or(false) && !has_ended(task.pid)
            })
            .map(|task| task.pid)
            .collect()
    }
}

/// Whether every task stands still: stopped, traced, or ended.
#[must_use]
pub fn stands(tree: &ProcessTree) -> bool {
    tree.tasks.iter().all(|task| matches!(state(task.pid), Err(_) | Ok('T' | 't' | 'Z' | 'X')))
}

/// The tree's cgroup (v2), if every task is in it or below and nobody else is.
fn own_cgroup(tree: &ProcessTree) -> Option<PathBuf> {
    let mount = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .find(|dir| fs::metadata(format!("{dir}/cgroup.controllers")).is_ok())?;
    let path_of = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        Some(text.lines().find_map(|line| line.strip_prefix("0::"))?.to_owned())
    };
    let path = path_of(tree.root().pid)?;
    if path == "/" {
        return None;
    }
    let dir = PathBuf::from(format!("{mount}{path}"));
    let mut members = Vec::new();
    collect_members(&dir, &mut members)?;
    let ours = |pid: &u32| tree.tasks.iter().any(|task| task.pid == *pid);
    (members.iter().all(ours) && tree.tasks.iter().all(|task| members.contains(&task.pid))).then_some(dir)
}

fn collect_members(dir: &std::path::Path, members: &mut Vec<u32>) -> Option<()> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).ok()?;
    members.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    for entry in fs::read_dir(dir).ok()?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_members(&entry.path(), members)?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn wait_for(pid: u32, wanted: char) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while state(pid).unwrap() != wanted {
            assert!(Instant::now() < deadline, "{pid} never got into state {wanted}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn stops_continues_and_kills() {
        let child = Sleeper(Command::new("sleep").arg("600").spawn().unwrap());
        let tree = ProcessTree::of(child.0.id()).unwrap();
        let fence = Fence::raise(&tree).unwrap();
        wait_for(child.0.id(), 'T');
        assert!(stands(&tree));
        fence.lower(&tree).unwrap();
        wait_for(child.0.id(), 'S');
        assert!(!stands(&tree));
        let fence = Fence::raise(&tree).unwrap();
        assert!(fence.kill(&tree, Duration::from_secs(10)).is_empty());
        assert!(has_ended(child.0.id()));
    }

    #[test]
    fn a_task_that_was_stopped_stays_stopped() {
        let child = Sleeper(Command::new("sleep").arg("600").spawn().unwrap());
        let before = ProcessTree::of(child.0.id()).unwrap();
        let _ = Fence::raise(&before).unwrap();
        wait_for(child.0.id(), 'T');
        let tree = ProcessTree::of(child.0.id()).unwrap();
        let fence = Fence::raise(&tree).unwrap();
        fence.lower(&tree).unwrap();
        assert_eq!(state(child.0.id()).unwrap(), 'T');
    }
}
