//! Writes as the kernel notes them in the soft-dirty bit of each page: cleared through `/proc/PID/clear_refs`, read in
//! `/proc/PID/pagemap`. Nothing is injected and no task is ever stopped.
//!
//! The kernel cannot read the bits and clear them in one step: what is written between the two would be lost, and
//! a task that stands still in between stands for as long as both take, 10 ms and more for each GiB. So the bits are not asked which
//! pages to copy. They are cleared first, and all memory is compared with what was copied ([`super::content`]):
//!
//! ```text
//! each round   clear the bits of all tasks ── compare every page with what was copied ── copy what differs
//!                      │◀──────────────── a write from here on sets the bit again ─────────────────▶│
//! frozen                                                       bit set: stale · bit clear: it holds what was copied
//! ```
//!
//! - A write before the clearing is over is there when the page is compared, and one behind it sets the bit: none falls in between.
//! - All tasks are cleared before any is looked at: two of them may share an address space for a moment (`vfork`), and the second
//!   clearing would take the first one's bits away.
//! - A bit stands in the page's entry and goes where that goes. Memory that was dropped and is read again is a page of zeros
//!   whose bit is clear, and `mremap` moves whole tables of entries as they are. So what is not in the same frame as
//!   in the last round, or shares it (with a child, or with all who read zeros), is read and compared even if its bit is clear.
//! - A huge page has one bit: a write to it in the end makes all of its 512 pages stale. It is not split, as write protection does.
//! - A new area, also one behind `exec`, has all its bits set. A forked child is a task of its own: nothing was copied of it.
//! - What a device was given to write to (`O_DIRECT`, `io_uring`) keeps its bit when others are cleared, since Linux 5.11;
//!   [`super::pins`] looks for the descriptors anyhow.
//!
//! Cost: a round reads all memory once, while the tree runs; clearing takes some milliseconds for each GiB in which threads
//! that fault wait, and the next write to each page takes a fault. Frozen, only entries of the page map are read. 24 bytes
//! are kept for each page. Whoever else clears the bits of these tasks meanwhile (another `criu --track-mem`) breaks it, and finds them
//! cleared; nothing else is left behind.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering::Relaxed;

use kernel::arena::Region;
use protocol::units::{ImageAddr, PageRun, TaskId};

use super::content::{ByPage, Content, Look};
use super::page_map::{Entry, PageMap};
use super::{Method, Pass, Round, Tracker};
use crate::process::ProcessTree;

/// The tracker.
#[derive(Debug, Default)]
pub struct SoftDirty {
    content: Content,
    /// The frame of each page in the last round: what tells whether a clear bit is its own. 0 for none, and for one that is shared.
    frames: HashMap<TaskId, ByPage<u64>>,
}

impl Tracker for SoftDirty {
    fn method(&self) -> Method {
        Method::SoftDirty
    }

    fn scan(&mut self, tree: &ProcessTree, pass: Pass) -> Round {
        match pass {
            Pass::Round => self.round(tree),
            Pass::Ahead => Round::default(),
            Pass::Last => self.last(tree),
        }
    }

    fn copied(&mut self, task: TaskId, start: ImageAddr, pages: &[u8]) {
        self.content.copied(task, start, pages);
    }

    fn disarm(self: Box<Self>) {}
}

impl SoftDirty {
    fn round(&mut self, tree: &ProcessTree) -> Round {
        // Of what cannot be cleared no frame is noted: it is compared again in the end.
        let cleared = |pid| {
            clear(pid).inspect_err(|error| tracing::debug!(pid, %error, "soft-dirty bits stay")).is_ok()
        };
        let cleared = tree.tasks.iter().filter(|task| cleared(task.pid)).map(|task| task.id);
        self.frames = cleared.map(|id| (id, ByPage::default())).collect();
        let frames = &mut self.frames;
        self.content.scan_by(tree, |task, at, entry| {
            if let Some((frames, frame)) = frames.get_mut(&task).zip(entry.own_frame()) {
                frames.set(at, frame);
            }
            entry.is_there().then_some(Look::Compare)
        })
    }

    fn last(&mut self, tree: &ProcessTree) -> Round {
        let frames = &self.frames;
        self.content.scan_by(tree, |task, at, entry| {
            let before = frames.get(&task).map_or(0, |frames| frames.get(at));
            entry.is_there().then(|| look(entry, before))
        })
    }
}

/// How to find out about a page that was in this frame in the last round.
fn look(now: Entry, before: u64) -> Look {
    match now.own_frame() {
        _ if now.is_written() => Look::Written,
        Some(frame) if frame != 0 && frame == before => Look::Unwritten,
        _ => Look::Compare,
    }
}

/// Clears the bits of all pages of a process, and lets the next write to each be noted.
fn clear(pid: u32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "4")
}

/// Tries everything that this needs on memory of this process, whose bits are cleared by that.
pub(super) fn works() -> Result<(), String> {
    // A page that is merged with others of its content gets an entry without the bit.
    if std::fs::read_to_string("/sys/kernel/mm/ksm/run").is_ok_and(|run| run.trim() == "1") {
        return Err("same-page merging (KSM) runs, which forgets what was written".into());
    }
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let region = Region::anonymous(1).map_err(failed("map memory"))?;
    let page = PageRun::new(ImageAddr::containing(region.address() as u64), 1).ok_or("no page")?;
    let mut map = PageMap::open(std::process::id()).map_err(failed("open page map"))?;
    let mut entry = || {
        let mut found = Entry::default();
        let note = |_, entry| {
            found = entry;
            None::<()>
        };
        map.runs(page, note, |_, ()| {}).map(|()| found).map_err(failed("read page map"))
    };
    region.page(0)[0].store(1, Relaxed);
    clear(std::process::id()).map_err(failed("clear soft-dirty bits"))?;
    let cleared = entry()?;
    region.page(0)[0].store(2, Relaxed);
    let written = entry()?;
    match (cleared.is_written(), written.is_written(), written.own_frame()) {
        (false, true, Some(1..)) => Ok(()),
        (false, true, _) => Err("the kernel does not tell the frames of pages (CAP_SYS_ADMIN)".into()),
        _ => Err("this kernel was built without soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)".into()),
    }
}
