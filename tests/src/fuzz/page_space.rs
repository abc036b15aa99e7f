//! The bookkeeping of the destination, against naive models: which pages are where, and what is asked for.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use arbitrary::{Arbitrary, Unstructured};
use kernel::uffd::{Install, Probe};
use protocol::bitmap::Bitmap;
use protocol::lazy_map::{LazyMap, TaskMap};
use protocol::units::{ImageAddr, PAGE_BYTES, PAGE_SIZE, PageRun, TaskAddr, TaskId};
use protocol::wire::frame::TaskRun;
use protocol::wire::precopy::{Areas, Round};
use uffd_daemon::cache::{Kept, PageCache};
use uffd_daemon::inflight::{Asked, InFlight, Purpose};
use uffd_daemon::limits::{INSTALL_SLICE_PAGES, PREFETCH_PAGES};
use uffd_daemon::pages::{Arrival, Family, Installer, Origin, Resolution, Rest, SpaceId, What};
use uffd_daemon::prefetch::{Ahead, Streams};

/// Pages of a family at most: an index fits in a byte, and so in the content of a page.
const PAGES_MAX: u64 = 64;
/// Spaces of a family at most.
const SPACES_MAX: usize = 6;
/// What a page holds that the task wrote itself.
const OWN: u8 = 0xff;
/// What a page of zeros counts as.
const ZEROS: u8 = 0xfe;

/// `NextKept` had a number more, which the inputs of the corpus still have.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Op {
    Fault { space: u8, page: u8 },
    Arrived { first: u8, pages: u8, demanded: bool, trouble: Option<Trouble> },
    ArrivedKept { first: u8, pages: u8, trouble: Option<Trouble> },
    NextKept { hot: bool, _most: u8 },
    Removed { space: u8, page: u8, pages: u8 },
    Unmapped { space: u8, page: u8, pages: u8 },
    Remapped { space: u8, from: u8, to: u8, pages: u8 },
    Forked { space: u8 },
    Exited { space: u8 },
    NotAsked { first: u8, pages: u8 },
    GiveUp { first: u8, pages: u8 },
    Fetch { from: u8, most: u8 },
    Ahead { first: u8, stride: i8, pages: u8 },
    Acknowledge { first: u8, pages: u8 },
    Wake { first: u8, pages: u8 },
}

/// What the kernel says to the first copy, instead of doing it.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Trouble {
    /// The address space is changing.
    Changing,
    /// The address is not registered.
    Unregistered,
    /// The task is gone.
    Gone,
    /// Only one page was copied.
    Short,
    /// The task has a page of its own there.
    Own,
}

/// What a copy did: at which page, with which content.
#[derive(Clone, Copy, Debug)]
enum Done {
    Installed(u64, u8),
    Present(u64),
    Gone,
}

/// The kernel under one space.
#[derive(Clone, Debug, Default)]
struct Kernel {
    trouble: Rc<Cell<Option<Trouble>>>,
    done: Rc<RefCell<Vec<Done>>>,
}

impl Kernel {
    fn put(&self, at: TaskAddr, contents: impl Iterator<Item = u8>) -> io::Result<Install> {
        let page = at.get() >> 12;
        let mut done = self.done.borrow_mut();
        let most = match self.trouble.take() {
            Some(Trouble::Changing) => return Ok(Install::Deferred),
            Some(Trouble::Unregistered) => return Ok(Install::Unregistered),
            Some(Trouble::Gone) => {
                done.push(Done::Gone);
                return Ok(Install::TaskGone);
            }
            Some(Trouble::Own) => {
                done.push(Done::Present(page));
                return Ok(Install::Present);
            }
            Some(Trouble::Short) => 1,
            None => usize::MAX,
        };
        let before = done.len();
        done.extend((page..).zip(contents).take(most).map(|(page, content)| Done::Installed(page, content)));
        Ok(Install::Done { pages: (done.len() - before) as u64 })
    }
}

impl Installer for Kernel {
    fn copy(&self, at: TaskAddr, data: &[u8]) -> io::Result<Install> {
        self.put(at, data.chunks_exact(PAGE_SIZE).map(|page| page[0]))
    }

    fn zero(&self, at: TaskAddr, bytes: u64) -> io::Result<Install> {
        self.put(at, (0..bytes / PAGE_BYTES).map(|_| ZEROS))
    }

    fn wake(&self, _: TaskAddr, bytes: u64) -> io::Result<()> {
        assert!(bytes > 0 && bytes % PAGE_SIZE as u64 == 0);
        Ok(())
    }

    fn probe(&self, _: TaskAddr) -> io::Result<Probe> {
        Ok(Probe::Unregistered)
    }
}

/// A space as a table: which page of the family is at which page of the task, and what has arrived.
#[derive(Clone, Debug)]
struct Table {
    index_at: BTreeMap<u64, u64>,
    remote: BTreeSet<u64>,
    memory: BTreeMap<u64, u8>,
}

impl Table {
    fn remove(&mut self, pages: Range<u64>) {
        for page in pages {
            self.memory.remove(&page);
            if let Some(index) = self.index_at.get(&page) {
                self.remote.remove(index);
            }
        }
    }

    fn unmap(&mut self, pages: Range<u64>) {
        self.remove(pages.clone());
        self.index_at.retain(|page, _| !pages.contains(page));
    }

    fn remap(&mut self, from: u64, to: u64, pages: u64) {
        let take = |page| (self.index_at.remove(&page), self.memory.remove(&page));
        let moved: Vec<_> = (from..from + pages).map(take).collect();
        self.unmap(to..to + pages);
        for (page, (index, content)) in (to..).zip(moved) {
            self.index_at.extend(index.map(|index| (page, index)));
            self.memory.extend(content.map(|content| (page, content)));
        }
    }
}

struct Rig {
    family: Family<Kernel>,
    map: TaskMap,
    tree: LazyMap,
    ids: Vec<SpaceId>,
    /// By space; `None` once it is gone.
    tables: Vec<Option<Table>>,
    kernels: Vec<Kernel>,
    asked: BTreeSet<u64>,
    /// What pre-copy brought: whether it is zeros, and in which round it came.
    kept: BTreeMap<u64, (bool, u8)>,
    came: BTreeSet<u64>,
    came_by: [u64; 4],
    reported: BTreeSet<u64>,
    /// Pages whose data was dealt with, and of these those that came nowhere.
    received: u64,
    discarded: u64,
    /// Pages that a task had made itself.
    present: u64,
}

fn addr(page: u64) -> TaskAddr {
    TaskAddr::containing(page << 12)
}

/// One family and the spaces that fork from it, against tables and sets. First its runs (how many, then gap and length of
/// each), then what pre-copy brought, then operations.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_page_space(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(mut rig) = Rig::new(&mut input) else { return };
    // Half of the moves begin without pre-copy.
    if let Ok((true, which, zeros)) = input.arbitrary::<(bool, u64, u64)>() {
        rig.keep(which, zeros);
    }
    while !input.is_empty() {
        let Ok(op) = input.arbitrary::<Op>() else { return };
        rig.apply(op);
        rig.check();
    }
}

impl Rig {
    fn new(input: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        let (mut page, mut pages, mut runs) = (16, 0, Vec::new());
        for _ in 0..input.int_in_range(1..=5)? {
            page += input.int_in_range(0..=3)?;
            let length = input.int_in_range(1..=12_u64)?.min(PAGES_MAX - pages);
            runs.extend(PageRun::new(ImageAddr::containing(page << 12), length));
            (page, pages) = (page + length, pages + length);
        }
        // Another task before this one: indices of the family and of the whole map differ.
        let before = PageRun::new(ImageAddr::containing(16 << 12), 7).expect("a run");
        let map = LazyMap::new([(TaskId(1), vec![before]), (TaskId(2), runs)]).expect("a small map");
        let tree = map;
        let map = tree.task(TaskId(2)).expect("the second task").clone();
        let mut index_at = BTreeMap::new();
        for index in 0..map.pages {
            let (addr, _) = map.locate(map.first + index).expect("a page of the map");
            index_at.insert(addr.get() >> 12, index);
        }
        let mut family = Family::new(map.clone());
        let kernel = Kernel::default();
        let table = Table { index_at, remote: (0..map.pages).collect(), memory: BTreeMap::new() };
        Ok(Self {
            ids: vec![family.restored(kernel.clone())],
            family,
            map,
            tree,
            tables: vec![Some(table)],
            kernels: vec![kernel],
            asked: BTreeSet::new(),
            kept: BTreeMap::new(),
            came: BTreeSet::new(),
            came_by: [0; 4],
            reported: BTreeSet::new(),
            received: 0,
            discarded: 0,
            present: 0,
        })
    }

    /// Pre-copy brought some of the pages: those of `which`, of which those of `zeros` hold nothing; the first ones again in
    /// a second round.
    fn keep(&mut self, which: u64, zeros: u64) {
        let map = &self.map;
        let mut cache = PageCache::new(PAGES_MAX);
        let areas = || Areas {
            task: map.id,
            starts_again: false,
            areas: map.runs.iter().map(|indexed| indexed.run).collect(),
        };
        let mut clean = Bitmap::clear(map.first + map.pages);
        for round in [1_u8, 2] {
            cache.areas(areas()).expect("few areas");
            for index in (0..map.pages).filter(|index| which >> index & 1 == 1) {
                if round == 2 && index % 3 > 0 {
                    continue;
                }
                let (addr, _) = map.locate(map.first + index).expect("a page of the map");
                let what = TaskRun { task: map.id, run: PageRun::new(addr, 1).expect("a page") };
                let zero = zeros >> index & 1 == 1;
                let content = u8::try_from(index).expect("few pages");
                let fill = |page: &mut [u8]| {
                    page.fill(content);
                    Ok(())
                };
                let put =
                    if zero { cache.zero(what, round.into()) } else { cache.fill(what, round.into(), fill) };
                put.expect("there is room");
                clean.set(map.first + index);
                self.kept.insert(index, (zero, round));
            }
            cache.end_round(Round { number: round.into(), last: round == 2 }).expect("the round that runs");
        }
        let (mut kept, _) = cache.into_clean(&self.tree, &clean).expect("everything is kept");
        self.family.keep(kept.pop().expect("the last task"));
    }

    fn is_missing(&self, index: u64) -> bool {
        self.tables.iter().flatten().any(|table| table.remote.contains(&index))
    }

    /// A range of the family's indices that begins inside it.
    fn range(&self, first: u8, pages: u8) -> Range<u64> {
        let first = u64::from(first) % self.map.pages;
        first..(first + 1 + u64::from(pages) % 24).min(self.map.pages)
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Fault { space, page } => self.fault(self.slot(space), u64::from(page) % 128),
            Op::Arrived { first, pages, demanded, trouble } => {
                let origin = if demanded { Origin::Demand } else { Origin::Push };
                self.arrived(self.range(first, pages), origin, trouble);
            }
            Op::ArrivedKept { first, pages, trouble } => {
                self.arrived_kept(self.range(first, pages), trouble);
            }
            Op::NextKept { hot, .. } => self.next_kept(if hot { 2 } else { 0 }),
            Op::Removed { space, page, pages } => {
                let (slot, range) = (self.slot(space), places(page, pages));
                self.changed(slot, What::Removed { start: addr(range.start), end: addr(range.end) });
                self.tables[slot].iter_mut().for_each(|table| table.remove(range.clone()));
            }
            Op::Unmapped { space, page, pages } => {
                let (slot, range) = (self.slot(space), places(page, pages));
                self.changed(slot, What::Unmapped { start: addr(range.start), end: addr(range.end) });
                self.tables[slot].iter_mut().for_each(|table| table.unmap(range.clone()));
            }
            Op::Remapped { space, from, to, pages } => {
                let (slot, range) = (self.slot(space), places(from, pages));
                let (to, pages) = (u64::from(to) % 128, range.end - range.start);
                // The kernel refuses to move a range onto itself.
                if range.start.abs_diff(to) >= pages {
                    self.changed(slot, What::Remapped { from: addr(range.start), to: addr(to), pages });
                    self.tables[slot].iter_mut().for_each(|table| table.remap(range.start, to, pages));
                }
            }
            Op::Forked { space } if self.ids.len() < SPACES_MAX => self.forked(self.slot(space)),
            Op::Forked { .. } => {}
            Op::Exited { space } => {
                let slot = self.slot(space);
                let exited = self.family.exited(self.ids[slot]);
                assert_eq!(exited.is_some(), self.tables[slot].take().is_some());
            }
            Op::NotAsked { first, pages } => {
                let range = self.range(first, pages);
                self.family.not_asked(range.start, range.end);
                self.asked.retain(|index| !range.contains(index));
            }
            Op::GiveUp { first, pages } => {
                let range = self.range(first, pages);
                self.family.give_up(range.start, range.end);
                self.asked.retain(|index| !range.contains(index));
                self.kept.retain(|index, _| !range.contains(index));
                for table in self.tables.iter_mut().flatten() {
                    table.remote.retain(|index| !range.contains(index));
                }
            }
            Op::Fetch { from, most } => {
                self.fetch(u64::from(from) % (self.map.pages + 2), u64::from(most) + 1)
            }
            Op::Ahead { first, stride, pages } => {
                // A stride is never 0, see `Ahead`.
                let stride = if stride == 0 { 1 } else { i64::from(stride) };
                let (first, pages) = (u64::from(first), u64::from(pages) % PREFETCH_PAGES + 1);
                self.ahead(Ahead { first, stride, pages });
            }
            Op::Acknowledge { first, pages } => self.acknowledge(self.range(first, pages)),
            Op::Wake { first, pages } => {
                let range = self.range(first, pages);
                self.family.wake_missing(range.start, range.end).expect("the model wakes");
                let missing = range.clone().any(|index| self.is_missing(index));
                assert_eq!(self.family.is_missing(range.start, range.end), missing);
            }
        }
    }

    fn slot(&self, space: u8) -> usize {
        usize::from(space) % self.ids.len()
    }

    fn fault(&mut self, slot: usize, page: u64) {
        let table = self.tables[slot].as_ref();
        let remote = |table: &Table| table.index_at.get(&page).copied().filter(|i| table.remote.contains(i));
        let expected = match table.and_then(remote) {
            None => Resolution::Zero,
            Some(index) if self.kept.contains_key(&index) => Resolution::Kept(index),
            Some(index) if self.asked.insert(index) => Resolution::Ask(index),
            Some(index) => Resolution::Asked(index),
        };
        assert_eq!(self.family.fault(self.ids[slot], addr(page)), expected);
    }

    /// One thread changes a space, and goes on.
    fn changed(&mut self, slot: usize, what: What) {
        self.family.changed(self.ids[slot], what);
        assert_eq!(self.family.rest(self.ids[slot]).expect("the model answers"), Rest::AsRead);
    }

    fn forked(&mut self, parent: usize) {
        let kernel = Kernel::default();
        let child = self.family.forked(self.ids[parent], kernel.clone());
        assert_eq!(self.family.rest(self.ids[parent]).expect("the model answers"), Rest::AsRead);
        assert_eq!(child.is_some(), self.tables[parent].is_some());
        if let Some(child) = child {
            self.ids.push(child);
            self.tables.push(self.tables[parent].clone());
            self.kernels.push(kernel);
        }
    }

    fn arrived(&mut self, range: Range<u64>, origin: Origin, trouble: Option<Trouble>) {
        // Trouble in the last space, which came last by a fork.
        if let Some(kernel) = self.kernels.last() {
            kernel.trouble.set(trouble);
        }
        let content = |index: u64| u8::try_from(index).expect("few pages");
        let data: Vec<u8> = range.clone().flat_map(|index| [content(index); PAGE_SIZE]).collect();
        let arrival = self.family.arrived(range.start, &data, origin).expect("the model takes it");
        self.follow_all(|_, _| origin);
        self.check_arrival(arrival, trouble, &range.clone().collect::<Vec<_>>());
        if arrival == Arrival::Settled {
            self.asked.retain(|index| !range.contains(index));
            self.kept.retain(|index, _| !range.contains(index));
            self.received += range.end - range.start;
            self.discarded += range.filter(|index| !self.came.contains(index)).count() as u64;
        }
    }

    fn arrived_kept(&mut self, range: Range<u64>, trouble: Option<Trouble>) {
        if let Some(kernel) = self.kernels.last() {
            kernel.trouble.set(trouble);
        }
        let kept: Vec<u64> = self.kept.range(range.clone()).map(|(index, _)| *index).collect();
        let arrival = self.family.arrived_kept(range.start, range.end).expect("the model takes it");
        self.follow_all(|rig, index| if rig.kept[&index].0 { Origin::Zero } else { Origin::Precopied });
        self.check_arrival(arrival, trouble, &kept);
        for index in kept {
            if !self.family.kept().is_some_and(|kept| kept.has(index)) {
                assert!(!self.is_missing(index), "dropped, and still missing");
                self.kept.remove(&index);
                self.asked.remove(&index);
            } else {
                assert_ne!(arrival, Arrival::Settled, "settled, and still kept");
            }
        }
    }

    fn next_kept(&mut self, least: u8) {
        let next = self.family.next_kept(least);
        let round = self.kept.values().map(|(_, round)| *round).filter(|round| *round >= least).max();
        let first = self.kept.iter().find(|(_, (_, of))| Some(*of) == round).map(|(index, _)| *index);
        assert_eq!(next.as_ref().map(|next| next.start), first);
        assert!(next.is_none_or(|next| next.end - next.start <= INSTALL_SLICE_PAGES as u64));
    }

    fn follow_all(&mut self, origin: impl Fn(&Self, u64) -> Origin) {
        self.kernels.iter().for_each(|kernel| kernel.trouble.set(None));
        for slot in 0..self.kernels.len() {
            for done in self.kernels[slot].done.take() {
                self.follow(slot, done, &origin);
            }
        }
    }

    fn check_arrival(&self, arrival: Arrival, trouble: Option<Trouble>, pages: &[u64]) {
        let missing = pages.iter().any(|index| self.is_missing(*index));
        if arrival == Arrival::Settled {
            assert!(!missing, "settled, and still missing");
        } else {
            assert!(matches!(trouble, Some(Trouble::Changing | Trouble::Unregistered)), "{arrival:?}");
            assert!(missing, "blocked, and nothing missing");
        }
    }

    /// What the kernel did must be what the table allows.
    fn follow(&mut self, slot: usize, done: Done, origin: impl Fn(&Self, u64) -> Origin) {
        let (page, content) = match done {
            Done::Installed(page, content) => (page, Some(content)),
            Done::Present(page) => (page, None),
            Done::Gone => {
                self.tables[slot] = None;
                return;
            }
        };
        let table = self.tables[slot].as_ref().expect("nothing is installed in a space that is gone");
        let index = table.index_at.get(&page).copied().expect("only lazy pages are installed");
        let origin = origin(self, index);
        let expected = if origin == Origin::Zero { ZEROS } else { u8::try_from(index).expect("few pages") };
        let table = self.tables[slot].as_mut().expect("it was there a moment ago");
        assert!(table.remote.remove(&index), "page {page} was filled again");
        match content {
            Some(content) => assert_eq!(content, expected, "page {page} has another's content"),
            None => self.present += 1,
        }
        let old = table.memory.insert(page, content.unwrap_or(OWN));
        assert_eq!(old, None, "page {page} was there");
        self.came_by[origin as usize] += u64::from(self.came.insert(index));
    }

    fn fetch(&mut self, from: u64, most: u64) {
        let wanted = |index: &u64| {
            self.is_missing(*index) && !self.asked.contains(index) && !self.kept.contains_key(index)
        };
        let wanted: BTreeSet<u64> = (from..self.map.pages).filter(wanted).collect();
        let fetched = self.family.next_to_fetch(from, most);
        assert_eq!(fetched.map(|(first, _)| first), wanted.first().copied());
        let Some((first, run)) = fetched else { return };
        assert!(run.pages <= most && (first..first + run.pages).all(|index| wanted.contains(&index)));
        self.ask(first, run);
    }

    fn ask(&mut self, first: u64, run: PageRun) {
        let (start, follow) = self.map.locate(self.map.first + first).expect("a page of the map");
        assert!(run.start == start && run.pages <= follow, "{run:?} is not in one run");
        self.asked.extend(first..first + run.pages);
    }

    fn ahead(&mut self, ahead: Ahead) {
        let steps = (0..ahead.pages).map_while(|step| {
            let step = i64::try_from(step).ok()?.checked_mul(ahead.stride)?;
            ahead.first.checked_add_signed(step).filter(|index| *index < self.map.pages)
        });
        let expected: BTreeSet<u64> = steps
            .filter(|index| self.is_missing(*index))
            .filter(|index| !self.asked.contains(index) && !self.kept.contains_key(index))
            .collect();
        let mut runs = Vec::new();
        self.family.ask_ahead(ahead, |first, run| runs.push((first, run)));
        let asked: Vec<u64> = runs.iter().flat_map(|(first, run)| *first..first + run.pages).collect();
        assert_eq!(asked.len(), expected.len());
        assert_eq!(asked.into_iter().collect::<BTreeSet<_>>(), expected);
        runs.into_iter().for_each(|(first, run)| self.ask(first, run));
    }

    fn acknowledge(&mut self, range: Range<u64>) {
        let due = range.clone().filter(|index| !self.is_missing(*index) && !self.reported.contains(index));
        let due: Vec<u64> = due.collect();
        let mut runs = Vec::new();
        self.family.acknowledge(range.start, range.end, usize::MAX, &mut runs);
        let mut reported = Vec::new();
        for what in &runs {
            assert_eq!(what.task, self.map.id);
            let first = self.map.index_of(what.run.start).expect("a lazy page") - self.map.first;
            reported.extend(first..first + what.run.pages);
        }
        assert_eq!(reported, due);
        self.reported.extend(reported);
    }

    fn check(&self) {
        for (id, table) in self.ids.iter().zip(&self.tables) {
            let space = self.family.space(*id);
            assert_eq!(space.is_some(), table.is_some());
            let (Some(space), Some(table)) = (space, table) else { continue };
            assert_eq!(space.remote_pages(), table.remote.len() as u64);
            for (page, index) in &table.index_at {
                let remote = table.remote.contains(index).then_some(*index);
                assert_eq!(space.remote_at(addr(*page)), remote, "page {page}");
            }
            for index in 0..self.map.pages {
                assert_eq!(space.is_remote(index), table.remote.contains(&index));
            }
        }
        let remote = self.tables.iter().flatten().map(|table| table.remote.len() as u64);
        assert_eq!(self.family.remote_pages(), remote.sum::<u64>());
        let counts = self.family.counts();
        let came_by = [counts.demand, counts.push, counts.precopied, counts.zero];
        assert_eq!(came_by, self.came_by);
        assert_eq!(counts.lazy, came_by.iter().sum::<u64>() + counts.gone);
        let kept = self.family.kept();
        assert_eq!(kept.map_or(0, Kept::pages), self.kept.len() as u64);
        assert!(self.kept.keys().all(|index| kept.is_some_and(|kept| kept.has(*index))));
        // Whatever is neither the first nor came too late; what was installed before a space blocked is received later.
        let first = counts.demand + counts.push + self.discarded;
        assert_eq!(counts.redundant, self.received.saturating_sub(first) + self.present);
        assert_eq!(self.family.all_acknowledged(), self.reported.len() as u64 == self.map.pages);
    }
}

/// A range of pages of a task.
fn places(page: u8, pages: u8) -> Range<u64> {
    let page = u64::from(page) % 128;
    page..page + 1 + u64::from(pages) % 24
}

/// Faults at any index: what is asked for ahead stays within its bound, and lies on a stream.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_prefetch(data: &[u8]) {
    let mut streams = Streams::default();
    let mut last = 0_u64;
    let mut rest = data;
    while let Some((how, behind)) = rest.split_first() {
        // Mostly steps, which make streams; some jumps.
        (last, rest) = match behind.split_first_chunk() {
            Some((far, behind)) if *how == 0 => (u64::from_le_bytes(*far), behind),
            _ => (last.wrapping_add_signed(i64::from(i8::from_le_bytes([*how]))), behind),
        };
        let Some(ahead) = streams.fault(last) else { continue };
        assert!((1..=PREFETCH_PAGES).contains(&ahead.pages) && ahead.stride != 0, "{ahead:?}");
        let distance = i128::from(ahead.first) - i128::from(last);
        assert_eq!(distance % i128::from(ahead.stride), 0, "{ahead:?} after {last}");
        assert!(distance / i128::from(ahead.stride) > 0, "{ahead:?} lies behind {last}");
    }
}

/// Questions, their answers, and answers to what was never asked: a byte for each.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_in_flight(data: &[u8]) {
    let mut flight = InFlight::default();
    let (mut open, mut past) = (BTreeMap::new(), Vec::new());
    for (count, byte) in (0_u64..).zip(data) {
        let pick = usize::from(byte >> 2);
        match byte % 4 {
            0 | 1 => {
                let purpose = if byte % 4 == 0 { Purpose::Demand } else { Purpose::Background };
                let at = Instant::now();
                let id =
                    flight.insert(Asked { family: 0, first: count, pages: 1, purpose, waiter: None, at });
                assert!(!past.contains(&id), "number {id:#x} again");
                assert_eq!(open.insert(id, (count, purpose)), None);
            }
            2 => {
                let Some(id) = open.keys().copied().nth(pick % open.len().max(1)) else { continue };
                let answered = flight.remove(id).map(|asked| (asked.first, asked.purpose));
                assert_eq!(answered, open.remove(&id));
                past.push(id);
            }
            _ => {
                let never = (pick as u64).wrapping_mul(0x1_0000_0001);
                for id in past.get(pick % past.len().max(1)).copied().into_iter().chain([never, !never]) {
                    assert!(open.contains_key(&id) || flight.remove(id).is_none(), "{id:#x}");
                }
            }
        }
        let demands = open.values().filter(|(_, purpose)| *purpose == Purpose::Demand).count();
        assert_eq!((flight.demands() as usize, flight.is_empty()), (demands, open.is_empty()));
    }
}
