//! The restored tree: one [`Family`] per task, and how much of it is still remote.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Instant;

use kernel::uffd::Uffd;
use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{PageRun, TaskId};
use protocol::wire::control::PageCounts;
use protocol::wire::frame::TaskRun;

use crate::cache::Kept;
use crate::journal::{Change, Entry, Journal};
use crate::limits;
use crate::pages::{Family, Installer, Origin, Rest, SpaceId, What};
use crate::steering::Steered;

/// A family whose installers are real userfaultfds.
pub type TaskFamily = Family<Arc<Uffd>>;

/// What the threads of one move share.
#[derive(Debug)]
pub struct Tree<I = Arc<Uffd>> {
    map: LazyMap,
    families: Vec<Mutex<Family<I>>>,
    by_task: HashMap<TaskId, usize>,
    total: u64,
    /// Faults that were asked for and have not been answered: the push lets them pass.
    pub demand_outstanding: AtomicU32,
    /// Faults that were asked for, ever.
    pub demands: AtomicU64,
    /// Faults on pages that were kept here, ever.
    pub local_faults: AtomicU64,
    /// Bytes that came unasked, ever.
    pub pushed_bytes: AtomicU64,
    /// The fault loop.
    pub fault_thread: Steered,
    /// The push.
    pub push_thread: Steered,
    /// What installs kept pages.
    pub installing_thread: Steered,
    /// What carries the push lane for it, on QUIC.
    pub push_pump: Steered,
    /// Who waits for a family and is not the push.
    urgent: AtomicU32,
    settled_at: OnceLock<Instant>,
    journal: OnceLock<Journal>,
}

impl<I: Installer> Tree<I> {
    /// The tree of a checkpoint; nothing has been handed over yet.
    #[must_use]
    pub fn new(map: &LazyMap) -> Arc<Self> {
        let families = map.tasks().iter().map(|task| Mutex::new(Family::new(task.clone()))).collect();
        let by_task = map.tasks().iter().enumerate().map(|(i, task)| (task.id, i)).collect();
        Arc::new(Self {
            map: map.clone(),
            families,
            by_task,
            total: map.pages(),
            demand_outstanding: AtomicU32::new(0),
            demands: AtomicU64::new(0),
            local_faults: AtomicU64::new(0),
            pushed_bytes: AtomicU64::new(0),
            fault_thread: Steered::default(),
            push_thread: Steered::default(),
            installing_thread: Steered::default(),
            push_pump: Steered::default(),
            urgent: AtomicU32::new(0),
            settled_at: OnceLock::new(),
            journal: OnceLock::new(),
        })
    }

    /// From here on what happens is recorded, for whoever takes over. The first journal counts.
    pub fn keep_journal(&self, journal: Journal) {
        let _ = self.journal.set(journal);
    }

    /// The journal, if one is kept.
    #[must_use]
    pub fn journal(&self) -> Option<&Journal> {
        self.journal.get()
    }

    fn record(&self, family: usize, space: SpaceId, entry: Entry) {
        if let Some(journal) = self.journal() {
            journal.record(Change { family, space, entry });
        }
    }

    /// Takes in a change of an address space.
    pub fn changed(&self, position: usize, family: &mut Family<I>, space: SpaceId, what: What) {
        let first = !family.is_changing(space);
        family.changed(space, what);
        self.record(position, space, Entry::Changed { what, first });
    }

    /// Takes in a child of an address space.
    pub fn forked(
        &self,
        position: usize,
        family: &mut Family<I>,
        space: SpaceId,
        child: I,
    ) -> Option<SpaceId> {
        let first = !family.is_changing(space);
        let child = family.forked(space, child)?;
        self.record(position, space, Entry::Changed { what: What::Forked { child }, first });
        Some(child)
    }

    /// Applies what was read of an address space, if nothing is under way there any more; false if something is.
    ///
    /// # Errors
    /// An errno from the kernel that is no ordinary outcome.
    pub fn rest(&self, position: usize, family: &mut Family<I>, space: SpaceId) -> io::Result<bool> {
        match family.rest(space)? {
            Rest::Changing => return Ok(false),
            Rest::AsRead => {}
            Rest::Ordered(order) => self.record(position, space, Entry::Ordered(order.packed())),
        }
        Ok(true)
    }

    /// Records what is about to be acknowledged.
    pub fn record_acknowledged(&self, runs: &[TaskRun]) {
        let Some(journal) = self.journal() else { return };
        for TaskRun { task, run } in runs {
            let family = self.position(*task).and_then(|position| self.map.tasks().get(position));
            if let Some(first) = family.and_then(|family| family.index_of(run.start)) {
                journal.acknowledges(first, run.pages);
            }
        }
    }

    /// Lazy pages of the whole tree.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.total
    }

    /// Number of families.
    #[must_use]
    pub fn len(&self) -> usize {
        self.families.len()
    }

    /// Whether there is no task at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.families.is_empty()
    }

    /// Position of a task's family.
    #[must_use]
    pub fn position(&self, task: TaskId) -> Option<usize> {
        self.by_task.get(&task).copied()
    }

    /// Position of the family that a run of lazy pages belongs to, and the index of its first page there.
    #[must_use]
    pub fn place(&self, task: TaskId, run: PageRun) -> Option<(usize, u64)> {
        let position = self.position(task)?;
        let map = self.map.tasks().get(position)?;
        Some((position, map.index_of_run(run)? - map.first))
    }

    /// A family, exclusively: its events are not read while this is held, and nothing else is installed.
    ///
    /// # Panics
    /// If `position` did not come from [`Tree::position`].
    pub fn lock(&self, position: usize) -> MutexGuard<'_, Family<I>> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        let family = self.spin(position).unwrap_or_else(|| self.lock_now(position));
        self.urgent.fetch_sub(1, Ordering::Relaxed);
        family
    }

    /// The push holds a family for a slice at a time, on another processor: to sleep, and to be woken, takes longer.
    fn spin(&self, position: usize) -> Option<MutexGuard<'_, Family<I>>> {
        for _ in 0..limits::LOCK_SPINS {
            match self.families[position].try_lock() {
                Ok(family) => return Some(family),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        None
    }

    /// As [`Tree::lock`], after everybody who waits there. A mutex is not fair: the push, which takes it again and
    /// again, would keep a fault out for milliseconds.
    ///
    /// # Panics
    /// As [`Tree::lock`].
    pub fn lock_last(&self, position: usize) -> MutexGuard<'_, Family<I>> {
        loop {
            while self.urgent.load(Ordering::Relaxed) > 0 {
                std::thread::yield_now();
            }
            let family = self.lock_now(position);
            if self.urgent.load(Ordering::Relaxed) == 0 {
                return family;
            }
        }
    }

    fn lock_now(&self, position: usize) -> MutexGuard<'_, Family<I>> {
        // A panic of another thread cannot leave a family half-changed in a way that loses pages: bits are
        // cleared only after a page was installed.
        self.families[position].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages are here already, of each family in order.
    pub fn keep(&self, kept: Vec<Kept>) {
        for (position, kept) in kept.into_iter().enumerate().take(self.families.len()) {
            self.lock(position).keep(kept);
        }
    }

    /// Pages that pre-copy brought and that are not installed yet.
    #[must_use]
    pub fn kept_pages(&self) -> u64 {
        (0..self.len()).map(|position| self.lock(position).kept().map_or(0, Kept::pages)).sum()
    }

    /// Whether every task with lazy pages was handed over.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        (0..self.len()).all(|position| {
            let family = self.lock(position);
            family.is_restored() || family.map().pages == 0
        })
    }

    /// Pages some space still misses.
    #[must_use]
    pub fn remote_pages(&self) -> u64 {
        (0..self.families.len()).map(|position| self.lock(position).remote_pages()).sum()
    }

    /// Notes the moment when nothing is remote any more; true from then on.
    pub fn check_settled(&self) -> bool {
        if self.settled_at.get().is_some() {
            return true;
        }
        let settled = self.remote_pages() == 0;
        if settled {
            let _ = self.settled_at.set(Instant::now());
        }
        settled
    }

    /// When the last page was settled.
    #[must_use]
    pub fn settled_at(&self) -> Option<Instant> {
        self.settled_at.get().copied()
    }

    /// Appends settled runs of the whole tree that were not reported yet, until there are `most`. A family is looked
    /// through in pieces: pages that faults brought here and there cost time each, and a fault waits for no more of it than
    /// for an install.
    pub fn acknowledge(&self, most: usize, runs: &mut Vec<TaskRun>) {
        for position in 0..self.families.len() {
            let pages = self.lock_last(position).map().pages;
            let mut first = 0;
            while first < pages {
                let end = pages.min(first + limits::SWEEP_PAGES);
                self.lock_last(position).acknowledge(first, end, most, runs);
                if runs.len() >= most {
                    return;
                }
                first = end;
            }
        }
    }

    /// What is settled now, by index in the whole tree; it counts as reported from here on.
    #[must_use]
    pub fn report_settled(&self) -> Bitmap {
        let mut map = Bitmap::clear(self.total);
        for position in 0..self.families.len() {
            let pages = self.lock(position).map().pages;
            for first in (0..pages).step_by(usize::try_from(limits::SWEEP_PAGES).unwrap_or(usize::MAX)) {
                let end = pages.min(first + limits::SWEEP_PAGES);
                self.lock(position).report_settled(first, end, &mut map);
            }
        }
        if let Some(journal) = self.journal() {
            let mut at = 0;
            while let Some((first, behind)) = map.run_in(at, self.total) {
                journal.acknowledges(first, behind - first);
                at = behind;
            }
        }
        map
    }

    /// Whether every page was reported as settled.
    #[must_use]
    pub fn all_acknowledged(&self) -> bool {
        (0..self.families.len()).all(|position| self.lock(position).all_acknowledged())
    }

    /// Whether somebody waits for a fault: then the push lets go of the processor.
    #[must_use]
    pub fn demand_waits(&self) -> bool {
        self.demand_outstanding.load(Ordering::Relaxed) > 0
    }

    /// The account of the whole tree, and how many pages the push has brought for it.
    #[must_use]
    pub fn account(&self) -> (PageCounts, u64) {
        let mut sum = PageCounts::default();
        let mut pushed = 0;
        for position in 0..self.families.len() {
            let family = self.lock(position);
            let counts = family.counts();
            pushed += family.received(Origin::Push);
            sum.lazy += counts.lazy;
            sum.demand += counts.demand;
            sum.push += counts.push;
            sum.precopied += counts.precopied;
            sum.zero += counts.zero;
            sum.gone += counts.gone;
            sum.redundant += counts.redundant;
        }
        (sum, pushed)
    }

    /// The account of the whole tree.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        self.account().0
    }
}
