//! The kernel under one address space of the destination: what is mapped, present and waited for, and the userfaultfd.
//!
//! It keeps to what `mm/userfaultfd.c` and `fs/userfaultfd.c` do:
//!
//! - a thread that touches a missing registered page reports it, and waits until somebody wakes it; then it looks again
//! - `munmap`, `mremap` and `fork` take effect, then wait until their event was read; `MADV_DONTNEED` waits first
//! - a thread may be held up before it queues its event: events come in another order than their effects
//! - from before the event until its thread goes on, installs give `EAGAIN`
//! - a copy stops at the first page that is present (`EEXIST` if it is the first of all); one that is not inside one
//!   registered area gives `ENOENT`, also if only its end lies in the next one
//! - the end of the task gives `ESRCH`; when the last descriptor is closed, missing pages read as zeros
//!
//! Beside it stands what the task has written where, which is all that a read may find.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernel::uffd::{EVENTS_PER_READ, Event, EventBuffer, Install, Probe};
use protocol::units::{PAGE_BYTES, PAGE_SIZE, TaskAddr, bytes_to_pages};
use uffd_daemon::pages::{AddressSpace, Installer};

use super::chance::Chance;
use super::pages::{ZEROS, stamp_of};

/// An address space; clones are the same one.
#[derive(Clone, Debug)]
pub struct Mm(Arc<Mutex<State>>);

/// What is mapped at a page.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Pages with the same number are in one area of the kernel.
    pub area: u64,
    /// Its missing pages are reported.
    pub registered: bool,
}

#[derive(Clone, Copy, Debug)]
struct Present {
    stamp: u64,
    /// Which daemon has put it there, if one has.
    by: Option<u32>,
}

/// A thread that has touched a missing page.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    thread: usize,
    page: u64,
    /// Turns of the fault loop since it was read in which nothing was in the way.
    turns: u32,
}

#[derive(Debug)]
struct Queued {
    event: Event<Mm>,
    thread: usize,
}

/// What a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// Nothing.
    No,
    /// A page.
    Page,
    /// That its event is read.
    Event,
}

/// Everything about an address space.
#[derive(Debug)]
pub struct State {
    chance: Chance,
    /// Whose it is, for messages.
    pub name: String,
    /// By page.
    pub mapped: BTreeMap<u64, Mapping>,
    present: BTreeMap<u64, Present>,
    /// What the task has written, by page; where it has not, zeros.
    pub written: BTreeMap<u64, u64>,
    /// Ranges that are being dropped: until then they may read as zeros.
    dropping: Vec<Range<u64>>,
    pending: VecDeque<Waiting>,
    read: Vec<Waiting>,
    events: VecDeque<Queued>,
    /// What has taken effect, of threads that have not come to queue it yet.
    unqueued: Vec<Queued>,
    /// By thread: whether its event was not read yet.
    unread: BTreeMap<usize, bool>,
    changing: u32,
    /// Where `mremap` has put something and has not returned: who drops that meanwhile may drop what was there before.
    arriving: BTreeMap<usize, Range<u64>>,
    gone: bool,
    released: bool,
    areas: u64,
    /// Which daemon serves it.
    pub generation: u32,
    /// Wakes are forgotten: a defect.
    pub forgets_wakes: bool,
    /// Pages that a daemon has put here.
    pub installed: u64,
    /// What is wrong.
    pub wrong: Option<String>,
}

impl Mm {
    /// An address space whose `areas` are registered and hold `written`, none of it present.
    #[must_use]
    pub fn restored(
        chance: &Chance,
        name: String,
        areas: &[Range<u64>],
        written: BTreeMap<u64, u64>,
    ) -> Self {
        let mut mapped = BTreeMap::new();
        for (area, pages) in (0..).zip(areas) {
            mapped.extend(pages.clone().map(|page| (page, Mapping { area, registered: true })));
        }
        let areas = areas.len() as u64;
        Self(Arc::new(Mutex::new(State { mapped, written, areas, ..State::new(chance.clone(), name) })))
    }

    /// Exclusively.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the same one.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The last descriptor is closed.
    pub fn release(&self) {
        let mut state = self.state();
        state.released = true;
        state.pending.clear();
        state.read.clear();
        let unqueued = std::mem::take(&mut state.unqueued);
        for Queued { event, thread } in std::mem::take(&mut state.events).into_iter().chain(unqueued) {
            state.unread.insert(thread, false);
            if let Event::Fork { child } = event {
                child.release();
            }
        }
        state.mapped.values_mut().for_each(|mapping| mapping.registered = false);
    }
}

impl State {
    /// Without areas, and without a history.
    const fn new(chance: Chance, name: String) -> Self {
        Self {
            chance,
            name,
            mapped: BTreeMap::new(),
            present: BTreeMap::new(),
            written: BTreeMap::new(),
            dropping: Vec::new(),
            pending: VecDeque::new(),
            read: Vec::new(),
            events: VecDeque::new(),
            unqueued: Vec::new(),
            unread: BTreeMap::new(),
            changing: 0,
            arriving: BTreeMap::new(),
            gone: false,
            released: false,
            areas: 0,
            generation: 0,
            forgets_wakes: false,
            installed: 0,
            wrong: None,
        }
    }

    /// Notes what is wrong; the first counts.
    pub fn fail(&mut self, what: String) {
        self.wrong.get_or_insert(what);
    }

    /// Whether the task has ended.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether nobody holds its userfaultfd any more.
    #[must_use]
    pub const fn is_released(&self) -> bool {
        self.released
    }

    /// Whether somebody would find something to read.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.pending.is_empty() || !self.events.is_empty()
    }

    /// What a thread waits for.
    #[must_use]
    pub fn waits(&self, thread: usize) -> Waits {
        if self.unread.get(&thread).copied().unwrap_or(false) {
            Waits::Event
        } else if self.pending.iter().chain(&self.read).any(|waiting| waiting.thread == thread) {
            Waits::Page
        } else {
            Waits::No
        }
    }

    /// A thread reads a page, and writes it if there is something to write; false if it has to wait.
    pub fn touch(&mut self, thread: usize, page: u64, write: Option<u64>) -> bool {
        // Unmapped meanwhile: the access ends with a signal that the program takes.
        let Some(mapping) = self.mapped.get(&page).copied() else { return true };
        let found = match self.present.get(&page) {
            Some(present) => present.stamp,
            None if mapping.registered => {
                self.pending.push_back(Waiting { thread, page, turns: 0 });
                return false;
            }
            None => {
                self.present.insert(page, Present { stamp: ZEROS, by: None });
                ZEROS
            }
        };
        self.check(page, found, "reads");
        if let Some(stamp) = write {
            self.present.insert(page, Present { stamp, by: None });
            self.written.insert(page, stamp);
        }
        true
    }

    fn check(&mut self, page: u64, found: u64, does: &str) {
        let expected = self.written.get(&page).copied().unwrap_or(ZEROS);
        let dropping = found == ZEROS && self.dropping.iter().any(|pages| pages.contains(&page));
        if found != expected && !dropping {
            let name = &self.name;
            self.fail(format!("{name} {does} {found:#x} at page {page}, where {expected:#x} belongs"));
        }
    }

    fn announce(&mut self, thread: usize, event: Event<Mm>) {
        if self.released {
            return;
        }
        self.unread.insert(thread, true);
        self.unqueued.push(Queued { event, thread });
    }

    /// A thread queues the event of what it has done; false if it has none. Others may have overtaken it.
    pub fn queue(&mut self, thread: usize) -> bool {
        let Some(at) = self.unqueued.iter().position(|queued| queued.thread == thread) else { return false };
        let queued = self.unqueued.remove(at);
        self.events.push_back(queued);
        true
    }

    /// `madvise(MADV_DONTNEED)` begins; [`State::drop_content`] ends it.
    pub fn begin_drop(&mut self, thread: usize, pages: &Range<u64>) {
        self.dropping.push(pages.clone());
        // Of two calls at the same time either may be the first: a child of a fork under way has the pages, or zeros.
        for queued in self.unqueued.iter().chain(&self.events) {
            if let Event::Fork { child } = &queued.event {
                child.state().dropping.push(pages.clone());
            }
        }
        self.changing += 1;
        self.announce(thread, Event::Remove { start: at(pages.start), end: at(pages.end) });
    }

    /// The content of these pages is gone.
    pub fn drop_content(&mut self, pages: &Range<u64>) {
        let begun = self.dropping.iter().position(|dropping| dropping == pages);
        begun.map(|begun| self.dropping.swap_remove(begun));
        self.forget(pages);
    }

    fn forget(&mut self, pages: &Range<u64>) {
        self.present.retain(|page, _| !pages.contains(page));
        self.written.retain(|page, _| !pages.contains(page));
    }

    /// `munmap`.
    pub fn unmap(&mut self, thread: usize, pages: &Range<u64>) {
        if self.take_out(pages) {
            self.changing += 1;
            self.announce(thread, Event::Unmap { start: at(pages.start), end: at(pages.end) });
        }
    }

    /// Unmaps; whether any of it was registered.
    fn take_out(&mut self, pages: &Range<u64>) -> bool {
        let registered = self.mapped.range(pages.clone()).any(|(_, mapping)| mapping.registered);
        self.forget(pages);
        self.mapped.retain(|page, _| !pages.contains(page));
        registered
    }

    /// `mmap` of fresh memory where nothing is.
    pub fn map(&mut self, pages: &Range<u64>) {
        self.areas += 1;
        let mapping = Mapping { area: self.areas, registered: false };
        self.mapped.extend(pages.clone().map(|page| (page, mapping)));
    }

    /// `mprotect`, or whatever else makes an area of its own of some of its pages. Nobody is told.
    pub fn split(&mut self, pages: &Range<u64>) {
        // What is behind is cut off as well.
        let behind: Vec<u64> = self.mapped.range(pages.end..).map(|(page, _)| *page).collect();
        let area = self.mapped.get(&pages.start).map(|mapping| mapping.area);
        self.areas += 2;
        let (own, rest) = (self.areas - 1, self.areas);
        self.mapped.range_mut(pages.clone()).for_each(|(_, mapping)| mapping.area = own);
        for page in behind {
            let Some(mapping) = self.mapped.get_mut(&page).filter(|mapping| Some(mapping.area) == area)
            else {
                break;
            };
            mapping.area = rest;
        }
    }

    /// `mremap` of one area to another place; says whether the task waits for a second event, which
    /// [`State::announce_move`] sends.
    pub fn remap(&mut self, thread: usize, from: &Range<u64>, to: u64) -> bool {
        let target = to..to + (from.end - from.start);
        let unmapped = self.take_out(&target);
        let registered = self.mapped.range(from.clone()).any(|(_, mapping)| mapping.registered);
        self.areas += 1;
        self.arriving.insert(thread, target.clone());
        for page in from.clone() {
            let moved = to + (page - from.start);
            if let Some(mapping) = self.mapped.remove(&page) {
                self.mapped.insert(moved, Mapping { area: self.areas, ..mapping });
            }
            if let Some(present) = self.present.remove(&page) {
                self.present.insert(moved, present);
            }
            if let Some(stamp) = self.written.remove(&page) {
                self.written.insert(moved, stamp);
            }
        }
        self.changing += u32::from(unmapped) + u32::from(registered);
        if unmapped {
            self.announce(thread, Event::Unmap { start: at(target.start), end: at(target.end) });
        }
        if registered && !unmapped {
            self.announce_move(thread, from, to);
        }
        registered && unmapped
    }

    /// The second event of [`State::remap`].
    pub fn announce_move(&mut self, thread: usize, from: &Range<u64>, to: u64) {
        let len = at(from.end - from.start);
        self.announce(thread, Event::Remap { from: at(from.start), to: at(to), len });
    }

    /// `fork`: the child has what is present; it runs once the event was read.
    pub fn fork(&mut self, thread: usize, name: String) -> Mm {
        let child = Mm(Arc::new(Mutex::new(Self {
            mapped: self.mapped.clone(),
            present: self.present.clone(),
            written: self.written.clone(),
            dropping: self.dropping.clone(),
            released: self.released,
            areas: self.areas,
            generation: self.generation,
            forgets_wakes: self.forgets_wakes,
            ..Self::new(self.chance.clone(), name)
        })));
        if !self.released {
            self.changing += 1;
            self.announce(thread, Event::Fork { child: child.clone() });
        }
        child
    }

    /// A thread whose event was read goes on.
    pub const fn go_on(&mut self) {
        self.changing = self.changing.saturating_sub(1);
    }

    /// [`State::remap`] returns: its thread has heard of every event.
    pub fn has_arrived(&mut self, thread: usize) {
        self.arriving.remove(&thread);
    }

    /// Whether another thread is about to hear that something was moved there.
    #[must_use]
    pub fn is_arriving(&self, pages: &Range<u64>) -> bool {
        self.arriving.values().any(|arriving| arriving.start < pages.end && pages.start < arriving.end)
    }

    /// Whether something is being dropped: another thread had better not move it.
    #[must_use]
    pub fn is_dropping(&self) -> bool {
        !self.dropping.is_empty()
    }

    /// The task ends, or is killed.
    pub fn exit(&mut self) {
        self.gone = true;
        self.changing = 0;
        self.pending.clear();
        self.read.clear();
        self.events.clear();
        self.unqueued.clear();
        self.unread.clear();
    }

    fn wake_range(&mut self, pages: &Range<u64>) {
        self.pending.retain(|waiting| !pages.contains(&waiting.page));
        self.read.retain(|waiting| !pages.contains(&waiting.page));
    }

    fn put(&mut self, first: u64, stamps: &[u64]) -> Install {
        if self.changing > 0 {
            return Install::Deferred;
        }
        if self.gone {
            return Install::TaskGone;
        }
        let area = self.mapped.get(&first).filter(|mapping| mapping.registered).map(|mapping| mapping.area);
        let within = |page| self.mapped.get(&page).is_some_and(|mapping| Some(mapping.area) == area);
        if area.is_none() || !(first..first + stamps.len() as u64).all(within) {
            return Install::Unregistered;
        }
        let mut done = 0;
        for (page, stamp) in (first..).zip(stamps) {
            if let Some(present) = self.present.get(&page).copied() {
                // A daemon before this one may have put it there; this one knows what it has installed.
                if present.by == Some(self.generation) && *stamp != ZEROS {
                    let name = &self.name;
                    self.fail(format!("page {page} of {name} is installed again"));
                }
                return if done == 0 { Install::Present } else { Install::Done { pages: done } };
            }
            // A copy may be interrupted.
            if done > 0 && self.chance.once_in(64) {
                return Install::Done { pages: done };
            }
            self.check(page, *stamp, "is given");
            self.present.insert(page, Present { stamp: *stamp, by: Some(self.generation) });
            self.wake_range(&(page..page + 1));
            self.installed += 1;
            done += 1;
        }
        Install::Done { pages: done }
    }

    /// The fault loop has taken a turn. Pages that threads have waited for through several turns without a reason.
    pub fn after_turn(&mut self) -> Vec<u64> {
        let quiet = self.changing == 0 && self.events.is_empty();
        for waiting in &mut self.read {
            waiting.turns = if quiet { waiting.turns + 1 } else { 0 };
        }
        self.read.iter().filter(|waiting| waiting.turns > 4).map(|waiting| waiting.page).collect()
    }

    /// A page that the daemon of today has put here, and what it held then.
    #[must_use]
    pub fn first_installed(&self) -> Option<(u64, u64)> {
        let mut installed = self.present.iter().filter(|(_, present)| present.by == Some(self.generation));
        installed.find(|(_, present)| present.stamp != ZEROS).map(|(page, present)| (*page, present.stamp))
    }

    /// Nobody holds the userfaultfd any more: everything must be as the task has written it.
    pub fn check_whole(&mut self) {
        let pages: Vec<u64> = self.mapped.keys().copied().collect();
        for page in pages {
            let found = self.present.get(&page).map_or(ZEROS, |present| present.stamp);
            self.check(page, found, "is left with");
        }
    }

    /// What is present must be as the task has written it.
    pub fn check_present(&mut self) {
        let pages: Vec<_> = self.present.iter().map(|(page, present)| (*page, present.stamp)).collect();
        for (page, stamp) in pages {
            self.check(page, stamp, "has");
        }
    }
}

const fn at(page: u64) -> u64 {
    page * PAGE_BYTES
}

const fn page(at: TaskAddr) -> u64 {
    bytes_to_pages(at.get())
}

impl Installer for Mm {
    fn copy(&self, at: TaskAddr, data: &[u8]) -> io::Result<Install> {
        let stamps: Vec<u64> = data.chunks_exact(PAGE_SIZE).map(stamp_of).collect();
        Ok(self.state().put(page(at), &stamps))
    }

    fn zero(&self, at: TaskAddr, bytes: u64) -> io::Result<Install> {
        let stamps = vec![ZEROS; usize::try_from(bytes_to_pages(bytes)).expect("few pages")];
        Ok(self.state().put(page(at), &stamps))
    }

    fn wake(&self, at: TaskAddr, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        if !state.forgets_wakes {
            state.wake_range(&(page(at)..page(at) + bytes_to_pages(bytes)));
        }
        Ok(())
    }

    fn probe(&self, at: TaskAddr) -> io::Result<Probe> {
        let state = self.state();
        Ok(match state.mapped.get(&page(at)) {
            _ if state.changing > 0 => Probe::Changing,
            _ if state.gone => Probe::TaskGone,
            Some(mapping) if mapping.registered => Probe::Registered,
            _ => Probe::Unregistered,
        })
    }
}

impl AddressSpace for Mm {
    fn read(&self, _: &mut EventBuffer, mut each: impl FnMut(Event<Self>)) -> io::Result<()> {
        for _ in 0..EVENTS_PER_READ {
            let mut state = self.state();
            let event = if let Some(waiting) = state.pending.pop_front() {
                state.read.push(waiting);
                Event::Fault { address: at(waiting.page) }
            } else if let Some(Queued { event, thread }) = state.events.pop_front() {
                state.unread.insert(thread, false);
                event
            } else {
                break;
            };
            drop(state);
            each(event);
        }
        Ok(())
    }

    fn is_orphaned(&self) -> bool {
        self.state().gone
    }
}
