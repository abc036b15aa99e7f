//! The place of one test, and what must not be left there.
//!
//! The process of the test becomes a subreaper: whatever our programs leave behind, detached or not, becomes its
//! child. So "nothing of ours is left" can be asked, and everything ends with the test, however the test ends.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::TempDir;

use crate::processes::{self, Entry};
use crate::{eventually, programs};

/// How long what is on its way out may take.
const LEAVING: Duration = Duration::from_secs(15);

static TURN: Mutex<()> = Mutex::new(());

/// The place of one test. Dropping it kills every process that was started from it, and removes its files.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
    before: Traces,
    /// What a test before this one could not end.
    others: Vec<u32>,
    // One test at a time, whatever `--test-threads` says: they judge what is on the host.
    _turn: MutexGuard<'static, ()>,
}

impl Site {
    /// A place, or `None` where no move can be tested: why is said on standard error.
    ///
    /// # Panics
    /// If there is no room for files, or the programs were not built.
    #[must_use]
    pub fn new() -> Option<Self> {
        if let Some(obstacle) = programs::obstacle() {
            crate::skip(obstacle);
            return None;
        }
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        kernel::spawn::keep_descriptors().expect("close_range");
        kernel::spawn::become_subreaper(true).expect("prctl(PR_SET_CHILD_SUBREAPER)");
        let dir =
            tempfile::Builder::new().prefix("postcopy-test-").tempdir().expect("a directory for the test");
        fs::create_dir(dir.path().join("work")).expect("a work directory");
        let others = processes::below(std::process::id()).into_iter().map(|entry| entry.pid).collect();
        Some(Self { dir, before: Traces::now(), others, _turn: turn })
    }

    /// A path in the test's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The work directory that both programs are given, unless a test wants their own choice.
    #[must_use]
    pub fn work_dir(&self) -> PathBuf {
        self.path("work")
    }

    /// Every process that was started from here and has not ended.
    #[must_use]
    pub fn processes(&self) -> Vec<Entry> {
        let mut processes = processes::below(std::process::id());
        processes.retain(|entry| !self.others.contains(&entry.pid));
        processes
    }

    /// The process that has `pid` in a PID namespace of its own: a task that was moved.
    #[must_use]
    pub fn moved(&self, pid: u32) -> Option<u32> {
        let innermost = |entry: &Entry| entry.pid != pid && processes::innermost_pid(entry.pid) == Some(pid);
        self.processes().into_iter().find(innermost).map(|entry| entry.pid)
    }

    /// Nothing of ours is left but the processes in `expected`: no process, file, socket, mount or cgroup.
    ///
    /// # Panics
    /// If something stays.
    #[track_caller]
    pub fn assert_clean(&self, expected: &[u32]) {
        self.assert_only(expected);
        let mut left = Vec::new();
        let gone = wait(|| {
            left = contents(&self.work_dir());
            left.extend(Traces::now().beyond(&self.before));
            left.is_empty()
        });
        assert!(gone, "left behind: {left:#?}");
    }

    /// No process of ours is left but those in `expected`.
    ///
    /// # Panics
    /// If one stays.
    #[track_caller]
    pub fn assert_only(&self, expected: &[u32]) {
        let mut left = Vec::new();
        let gone = wait(|| {
            left = self.processes();
            left.retain(|entry| !expected.contains(&entry.pid));
            left.is_empty()
        });
        let left: Vec<String> = left.iter().map(ToString::to_string).collect();
        assert!(gone, "processes are left: {left:#?}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let killed = wait(|| {
            processes::kill_below(std::process::id());
            self.processes().is_empty()
        });
        if !killed {
            eprintln!("still there after they were killed: {:?}", self.processes());
        }
    }
}

fn wait(mut gone: impl FnMut() -> bool) -> bool {
    let deadline = std::time::Instant::now() + LEAVING;
    while !gone() {
        if std::time::Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Waits until the process is gone or a zombie.
///
/// # Panics
/// If it stays.
#[track_caller]
pub fn assert_ends(pid: u32, limit: Duration) {
    eventually(&format!("the end of process {pid}"), limit, || processes::has_ended(pid).then_some(()));
}

/// Directories that our programs have made, of their own choice, in memory file systems.
#[must_use]
pub fn default_work_dirs() -> BTreeSet<String> {
    let inside = |dir| names(Path::new(dir)).into_iter().map(move |name| format!("{dir}/{name}"));
    ["/dev/shm", "/run"].into_iter().flat_map(inside).filter(|path| path.contains("/postcopy-")).collect()
}

/// What CRIU, or programs that use it like ours, can leave on a host.
#[derive(Debug)]
struct Traces(BTreeSet<String>);

impl Traces {
    fn now() -> Self {
        let mut found = BTreeSet::new();
        for dir in ["/dev/shm", "/run", "/tmp"] {
            let crius = names(Path::new(dir)).into_iter().filter(|name| name.starts_with(".criu"));
            found.extend(crius.map(|name| format!("{dir}/{name}")));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        // Network namespaces are mounts, too: labs come and go beside this test.
        found.extend(points.filter(|at| !at.starts_with("/run/netns")).map(|at| format!("mount {at}")));
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"] {
            found.extend(names(Path::new(root)).into_iter().map(|name| format!("{root}/{name}")));
        }
        Self(found)
    }

    fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What is in `dir`, one level below included.
fn contents(dir: &Path) -> Vec<String> {
    names(dir).into_iter().map(|name| format!("{name}: {:?}", names(&dir.join(&name)))).collect()
}
