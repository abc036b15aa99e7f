//! Which pages of a tree are written while it runs: what a pre-copy round has to send, and in the end what is stale.
//!
//! ```text
//!            scan(Round)                        scan(Round)            frozen: scan(Last)
//! ───────────────┼── copy what it reports ───────────┼── copy … ──────────────┼───────────────▶
//!   every page   │◀────────── written here ─────────▶│◀──── written here ────▶│ stale
//! ```
//!
//! A page that a scan does not report holds what was copied of it after the last scan that did report it. Nothing is
//! ever missing; a page may be reported without need. Only what CRIU makes lazy is looked at ([`areas`]).
//!
//! - [`write_protect`]: the kernel notes the first write to each page (Linux 6.7)
//! - [`soft_dirty`]: the kernel keeps a bit for each page (Linux 3.11, where it was built in); every round reads all memory
//!   as well, the last look does not
//! - [`content`]: pages are read and compared with what was copied; works everywhere, and reads all memory each round
//! - [`choice`]: which of them this host can do; [`pins`]: which tasks may be written past it
//!
//! A process that maps memory next to an area that is write-protected gets two areas where it had got one, until
//! the next round; `mremap` across both fails with `EFAULT` until then. An area that changes
//! while it is being armed is not one of these: it is armed as it is then, and what is cut off it is armed as well.

use std::time::Duration;

use protocol::units::{ImageAddr, PageRun, TaskId};

use crate::process::{ProcessTree, Task};

pub mod areas;
pub mod choice;
pub mod content;
mod page_map;
pub mod pins;
pub mod soft_dirty;
pub mod write_protect;

/// How writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Asynchronous write protection by userfaultfd.
    WriteProtect,
    /// The kernel's soft-dirty bits.
    SoftDirty,
    /// Comparison of content.
    Content,
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::WriteProtect => "write-protect",
            Self::SoftDirty => "soft-dirty",
            Self::Content => "content",
        })
    }
}

/// What a scan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// A round while the tree runs: what is new is armed, and what is reported is watched again from here on.
    Round,
    /// Before the last look, so that it has less to find: as a round, but nothing is armed, and nobody copies what is reported. A
    /// method whose last look would not be quicker for it does nothing.
    Ahead,
    /// The last look at a tree that stands still, held by somebody else's ptrace.
    Last,
}

/// Pages that a scan reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where they are.
    pub pages: PageRun,
    /// Whether they were all zero, by the kernel's word or by their content; they may have been written since.
    pub zero: bool,
}

/// What a scan found in one task.
#[derive(Debug)]
pub struct TaskRound {
    /// The task.
    pub task: TaskId,
    /// Its pid here.
    pub pid: u32,
    /// Whether its address space is another one than at the scan before: what was copied of it is void.
    pub starts_again: bool,
    /// Why every page had to be taken as written, if it had.
    pub untracked: Option<String>,
    /// Where it has memory that can be lazy. What was copied from elsewhere is of no use any more.
    pub areas: Vec<PageRun>,
    /// Pages that are there and may have been written since the scan before, by ascending address; each run lies in one
    /// area.
    pub runs: Vec<Run>,
}

impl TaskRound {
    /// Pages in all runs.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages.pages).sum()
    }

    /// Whether what was copied of the task before is of no use: another address space, or writes that nobody may have seen.
    #[must_use]
    pub const fn is_void(&self) -> bool {
        self.starts_again || self.untracked.is_some()
    }
}

/// A task that was stopped to be armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stop {
    /// How long it stood still.
    pub stood: Duration,
    /// How long it took before until it did.
    pub waited: Duration,
}

/// What a scan found.
#[derive(Debug, Default)]
pub struct Round {
    /// Task by task, as the tree lists them; without those that ended meanwhile.
    pub tasks: Vec<TaskRound>,
    /// One for each address space that was armed.
    pub stops: Vec<Stop>,
}

impl Round {
    /// Pages of all tasks.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.tasks.iter().map(TaskRound::pages).sum()
    }
}

/// Follows the writes of a tree.
///
/// Dropping a tracker disarms it, at a cost: see [`Tracker::disarm`].
pub trait Tracker: std::fmt::Debug + Send {
    /// How it does it.
    fn method(&self) -> Method;

    /// Reports every page that is there at the first scan of an address space, and what may have been written
    /// since the scan before at every other.
    ///
    /// What goes wrong with a task makes all of its pages count as written: [`TaskRound::untracked`].
    fn scan(&mut self, tree: &ProcessTree, pass: Pass) -> Round;

    /// What was read of pages after the scan that reported them, and sent: whole pages from `start` on.
    ///
    /// A page that was reported and not sent stays stale; that is for the caller to remember.
    fn copied(&mut self, task: TaskId, start: ImageAddr, pages: &[u8]);

    /// Lets go of the tree. The tasks are as they were: nothing registered, protected, mapped or traced.
    fn disarm(self: Box<Self>);
}

/// The result of a scan of one task before anything is known of it.
fn empty_round(task: &Task) -> TaskRound {
    TaskRound {
        task: task.id,
        pid: task.pid,
        starts_again: false,
        untracked: None,
        areas: Vec::new(),
        runs: Vec::new(),
    }
}
