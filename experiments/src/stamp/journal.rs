//! What a process of the stamping workload counts and reports.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use kernel::arena::PageWords;

use super::page::{self, Place, Wrong};
use crate::clock::monotonic_ms;
use crate::workload::StatusLog;

/// Lines about wrong pages that one process writes; after that they are only counted. A lost uffd makes every page
/// wrong, and the first thousand say that as well as the first million.
const WRONG_LINES_MAX: u64 = 1000;

/// Collects what is wrong.
#[derive(Debug)]
pub(super) struct Journal {
    log: StatusLog,
    wrong: AtomicU64,
}

impl Journal {
    /// A journal that writes to `log`.
    #[must_use]
    pub(super) const fn new(log: StatusLog) -> Self {
        Self { log, wrong: AtomicU64::new(0) }
    }

    /// Everything wrong so far.
    #[must_use]
    pub(super) fn wrong_count(&self) -> u64 {
        self.wrong.load(Relaxed)
    }

    /// Writes a line that is not about something wrong.
    pub(super) fn line(&self, text: &str) {
        self.log.line(text);
    }

    /// Checks a page against its place and generation; what is wrong with it is reported. Says whether it is right.
    pub(super) fn check(&self, words: &PageWords, place: Place, generation: u32) -> bool {
        let wrong = page::verify(words, place, generation);
        if let Some(wrong) = wrong {
            self.wrong_page(place, generation, wrong);
        }
        wrong.is_none()
    }

    /// Reports a page.
    pub(super) fn wrong_page(&self, place: Place, expected: u32, wrong: Wrong) {
        self.wrong(format_args!("page={place} expected={expected} {wrong}"));
    }

    /// Reports a ledger whose generations around page `first` disagree with their checksum.
    pub(super) fn wrong_ledger(&self, first: Place) {
        self.wrong(format_args!("page={first} expected=? found=? kind=ledger"));
    }

    /// Reports a system call that failed but would not have failed in a process that was never moved.
    pub(super) fn failed(&self, operation: &str, error: &dyn fmt::Display) {
        let error = error.to_string().replace(' ', "_");
        self.wrong(format_args!("page=- expected=- found={error} kind=failed operation={operation}"));
    }

    fn wrong(&self, what: fmt::Arguments<'_>) {
        if self.wrong.fetch_add(1, Relaxed) < WRONG_LINES_MAX {
            self.log.line(&format!("WRONG {what} t={}", monotonic_ms()));
        }
    }
}

/// What one worker did, for the heartbeat.
#[derive(Debug, Default)]
pub(super) struct Progress {
    ops: AtomicU64,
    pages: AtomicU64,
    gap_ns: AtomicU64,
}

impl Progress {
    /// Counts one operation that looked at `pages` pages.
    pub(super) fn operation(&self, pages: u64) {
        self.ops.fetch_add(1, Relaxed);
        self.pages.fetch_add(pages, Relaxed);
    }

    /// Notes the time between two operations in a row of one thread.
    pub(super) fn gap(&self, ns: u64) {
        self.gap_ns.fetch_max(ns, Relaxed);
    }

    /// Operations so far.
    #[must_use]
    pub(super) fn ops(&self) -> u64 {
        self.ops.load(Relaxed)
    }

    /// Pages looked at so far.
    #[must_use]
    pub(super) fn pages(&self) -> u64 {
        self.pages.load(Relaxed)
    }

    /// The longest gap since this was last asked.
    #[must_use]
    pub(super) fn take_gap_ns(&self) -> u64 {
        self.gap_ns.swap(0, Relaxed)
    }
}
