//! Pre-copy: memory is copied to the destination while the tree works, so that little is left when it is frozen.
//!
//! ```text
//!           ┌────────────────────── rounds, in a thread ──────────────────────┐
//! preflight │ scan ─ copy what it reports ─ Round ─▶ ◀─ Round ─ scan ─ copy … │ freeze ─ look ahead, dump ─ last scan ─ Clean
//!           └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - [`compression`]: whether pages are compressed
//! - [`policy`]: whether there is another round
//! - [`record`]: what the destination keeps, and which of it is up to date
//! - [`rounds`]: the thread that scans, reads and sends
//!
//! Nothing of the tree is changed. Reading is of processes that run: a page that is gone between scan and copy is not sent,
//! one that is written meanwhile is found by the next scan.

pub mod compression;
mod pages;
pub mod policy;
pub mod record;
pub mod rounds;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::bytes_to_pages;

use crate::limits;
use crate::process::ProcessTree;
use crate::track::{Pass, Tracker};
use record::Record;

/// Most pages that the destination is asked to keep of a tree that uses `memory_bytes` now.
#[must_use]
pub const fn most_pages(memory_bytes: u64) -> u64 {
    let (part, bytes) = limits::PRECOPY_GROWTH;
    bytes_to_pages(memory_bytes.saturating_add(memory_bytes / part).saturating_add(bytes))
}

/// A tree whose writes are followed, and what the destination has of it. Dropped, it is disarmed.
#[derive(Debug)]
pub struct Copied {
    /// There until the drop.
    tracker: Option<Box<dyn Tracker>>,
    record: Record,
    /// Pages that the look ahead has found written.
    ahead: u64,
}

/// What the last scan found.
#[derive(Debug)]
pub struct LastScan {
    /// The lazy pages that the destination has.
    pub clean: Bitmap,
    /// The lazy pages that were written again in one round after another: likely to be needed soon.
    pub hot: Bitmap,
    /// Pages that were written since the scan before; one that is written behind the look ahead as well counts twice.
    pub written: u64,
}

impl Copied {
    fn new(tracker: Box<dyn Tracker>, most_pages: u64) -> Self {
        Self { tracker: Some(tracker), record: Record::new(most_pages), ahead: 0 }
    }

    fn tracker(&mut self) -> &mut dyn Tracker {
        self.tracker.as_deref_mut().expect("there until the drop")
    }

    /// A look at a tree that CRIU has frozen and dumps, so that the last scan finds little: it is what the tree waits for.
    pub fn look_ahead(&mut self, tree: &ProcessTree) {
        let found = self.tracker().scan(tree, Pass::Ahead);
        self.ahead += found.pages();
        for found in &found.tasks {
            if found.is_void() {
                self.record.keep_within(found.task, true, &[]);
            }
            found.runs.iter().for_each(|run| self.record.written_last(found.task, run.pages));
        }
    }

    /// The last scan, of a tree that stands still and whose images have these lazy pages.
    pub fn last_scan(&mut self, tree: &ProcessTree, map: &LazyMap) -> LastScan {
        let last = self.tracker().scan(tree, Pass::Last);
        self.record.keep_tasks(|task| last.tasks.iter().any(|found| found.task == task));
        for found in &last.tasks {
            self.record.keep_within(found.task, found.is_void(), &found.areas);
            found.runs.iter().for_each(|run| self.record.written_last(found.task, run.pages));
        }
        let (clean, hot) = (self.record.clean(map), self.record.rewritten(map));
        LastScan { clean, hot, written: self.ahead + last.pages() }
    }

    /// The tree is gone: there is nothing to lift, and closing descriptors costs nothing.
    pub fn tree_is_gone(mut self) {
        drop(self.tracker.take());
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if let Some(tracker) = self.tracker.take() {
            tracker.disarm();
        }
    }
}
