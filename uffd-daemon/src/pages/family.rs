//! One task of the images and the address spaces that share its lazy pages.

use std::io;
use std::ops::Range;

use kernel::uffd::Install;
use protocol::bitmap::Bitmap;
use protocol::lazy_map::TaskMap;
use protocol::units::{PAGE_BYTES, PAGE_SIZE, PageRun, TaskAddr, TaskId, pages_to_bytes};
use protocol::wire::control::PageCounts;
use protocol::wire::frame::TaskRun;

use super::installer::{Installer, in_one_area};
use super::space::{Space, Stretch};
use super::under_way::What;
use crate::cache::{Content, Kept};
use crate::prefetch::{Ahead, Streams};

/// How a page came; each lazy page counts once, by its first arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was asked for, because of a fault there or of the faults before it.
    Demand,
    /// By the push.
    Push,
    /// By pre-copy.
    Precopied,
    /// By pre-copy, as a page of zeros.
    Zero,
}

/// Number of origins.
const ORIGINS: usize = 4;

/// Names a space within its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub(super) usize);

impl SpaceId {
    /// As a number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0 as u64
    }

    /// The space with this number, if there can be one.
    #[must_use]
    pub fn numbered(number: u64) -> Option<Self> {
        usize::try_from(number).ok().map(Self)
    }
}

/// What a fault needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The page with this index must be asked for.
    Ask(u64),
    /// The page with this index was asked for already; its arrival wakes this thread too.
    Asked(u64),
    /// The page with this index is kept here: [`Family::arrived_kept`] installs it.
    Kept(u64),
    /// It has no content: a zero page.
    Zero,
    /// A change under way leaves in doubt what belongs there: ask again once the space is at rest.
    Unknown,
}

/// Why pages could not be installed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// The address space is changing: read its events, then try again.
    Changing,
    /// The address is not registered: an event about it must be on its way.
    Unregistered,
}

/// What became of pages that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Every space has them or does not want them.
    Settled,
    /// Some space could not take them now: offer the same pages again.
    Blocked(Blocked),
}

#[derive(Debug)]
pub(super) struct Member<I> {
    pub(super) space: Space,
    pub(super) installer: I,
    /// Changes that were read and are perhaps under way, with others that were not read yet.
    pub(super) under_way: Vec<What>,
    /// Of a child: who forked it, in a change that is under way. What the child has is not known yet.
    pub(super) unborn_of: Option<SpaceId>,
}

impl<I> Member<I> {
    pub(super) fn is_changing(&self) -> bool {
        self.unborn_of.is_some() || !self.under_way.is_empty()
    }

    pub(super) fn is_in_doubt(&self, at: TaskAddr) -> bool {
        self.unborn_of.is_some() || self.under_way.iter().any(|what| what.touches(at))
    }
}

/// One task of the images and the address spaces that share its lazy pages.
#[derive(Debug)]
pub struct Family<I> {
    pub(super) map: TaskMap,
    pub(super) members: Vec<Option<Member<I>>>,
    /// Asked for by a fault and not arrived yet.
    asked: Bitmap,
    /// Where threads read on.
    streams: Streams,
    /// What pre-copy brought and is not installed yet.
    kept: Option<Box<Kept>>,
    /// Installed somewhere.
    came: Bitmap,
    /// How many came from where, by [`Origin`].
    came_by: [u64; ORIGINS],
    /// Not acknowledged to the source yet.
    unreported: Bitmap,
    /// Pages whose data was dealt with, however often, by the way they came.
    received: [u64; ORIGINS],
    /// Of these, pages that every task had dropped.
    discarded: u64,
    /// Pages that tasks had made themselves where others were to be installed.
    present: u64,
    /// Pages that a daemon before this one received.
    taken_over: u64,
}

impl<I: Installer> Family<I> {
    /// A family without spaces; [`Family::restored`] adds the first.
    #[must_use]
    pub fn new(map: TaskMap) -> Self {
        Self {
            asked: Bitmap::clear(map.pages),
            streams: Streams::default(),
            kept: None,
            came: Bitmap::clear(map.pages),
            came_by: [0; ORIGINS],
            unreported: Bitmap::full(map.pages),
            members: Vec::new(),
            received: [0; ORIGINS],
            discarded: 0,
            present: 0,
            taken_over: 0,
            map,
        }
    }

    /// These pages are here already: nobody asks the source for them.
    pub fn keep(&mut self, kept: Kept) {
        self.kept = Some(Box::new(kept)).filter(|kept| kept.pages() > 0);
    }

    /// What pre-copy brought and is not installed yet.
    #[must_use]
    pub fn kept(&self) -> Option<&Kept> {
        self.kept.as_deref()
    }

    fn has_kept(&self, index: u64) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.has(index))
    }

    /// The task.
    #[must_use]
    pub const fn task(&self) -> TaskId {
        self.map.id
    }

    /// Its lazy pages.
    #[must_use]
    pub const fn map(&self) -> &TaskMap {
        &self.map
    }

    /// The restored task's own space.
    pub fn restored(&mut self, installer: I) -> SpaceId {
        self.restored_again(Some(installer))
    }

    pub(super) fn add(&mut self, of: Option<(Space, I)>, unborn_of: Option<SpaceId>) -> SpaceId {
        let member = |(space, installer)| Member { space, installer, under_way: Vec::new(), unborn_of };
        self.members.push(of.map(member));
        SpaceId(self.members.len() - 1)
    }

    pub(super) fn get(&self, id: SpaceId) -> Option<&Member<I>> {
        self.members.get(id.0)?.as_ref()
    }

    pub(super) fn member(&mut self, id: SpaceId) -> Option<&mut Member<I>> {
        self.members.get_mut(id.0)?.as_mut()
    }

    /// Whether the task's own space was handed over. Until then nothing is missing anywhere.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        !self.members.is_empty()
    }

    fn spaces(&self) -> impl Iterator<Item = &Space> {
        self.members.iter().flatten().map(|member| &member.space)
    }

    /// Pages that some space still misses (a page counts once per space).
    #[must_use]
    pub fn remote_pages(&self) -> u64 {
        self.spaces().map(Space::remote_pages).sum()
    }

    /// Wakes whoever waits for a page of `first..end`: it faults again.
    ///
    /// # Errors
    /// An errno from the kernel that is no ordinary outcome.
    pub fn wake_missing(&self, first: u64, end: u64) -> io::Result<()> {
        for member in self.members.iter().flatten() {
            let mut from = first;
            while let Some(stretch) = member.space.remote_in(from, end) {
                member.installer.wake(stretch.at, pages_to_bytes(stretch.pages))?;
                from = stretch.first + stretch.pages;
            }
        }
        Ok(())
    }

    /// Whether some space misses a page of `first..end`.
    #[must_use]
    pub fn is_missing(&self, first: u64, end: u64) -> bool {
        self.spaces().any(|space| space.remote_in(first, end).is_some())
    }

    /// A space of this family, if it is still there.
    #[must_use]
    pub fn space(&self, id: SpaceId) -> Option<&Space> {
        self.get(id).map(|member| &member.space)
    }

    /// A thread waits for the page at `at`.
    pub fn fault(&mut self, id: SpaceId, at: TaskAddr) -> Resolution {
        if self.is_in_doubt(id, at) {
            return Resolution::Unknown;
        }
        let Some(index) = self.space(id).and_then(|space| space.remote_at(at)) else {
            return Resolution::Zero;
        };
        if self.has_kept(index) {
            return Resolution::Kept(index);
        }
        if self.asked.set(index) { Resolution::Ask(index) } else { Resolution::Asked(index) }
    }

    /// Takes over what was acknowledged by who served these spaces before, by index in the whole tree: it is settled
    /// everywhere. How it came is not known; it counts as pushed.
    pub fn acknowledged_before(&mut self, map: &Bitmap) {
        let (offset, end) = (self.map.first, self.map.first + self.map.pages);
        let mut at = offset;
        while let Some((first, behind)) = map.run_in(at, end) {
            let (from, to) = (first - offset, behind - offset);
            for member in self.members.iter_mut().flatten() {
                member.space.settle(from, to - from);
            }
            let taken_over = self.came.set_range(from, to);
            self.came_by[Origin::Push as usize] += taken_over;
            self.taken_over += taken_over;
            self.unreported.unset_range(from, to);
            at = behind;
        }
    }

    /// Pages of one space that will not be installed.
    pub fn settled_otherwise(&mut self, id: SpaceId, first: u64, pages: u64) {
        if let Some(member) = self.member(id) {
            member.space.settle(first, pages);
        }
    }

    /// The address space is gone; its installer comes back to be dropped outside any lock. One that is changing stays: what its
    /// children have is not known yet.
    pub fn exited(&mut self, id: SpaceId) -> Option<I> {
        let member = self.members.get_mut(id.0)?;
        member.take_if(|member| !member.is_changing()).map(|member| member.installer)
    }

    /// A thread waits for the page `index`: what it will probably need next.
    pub fn expects(&mut self, index: u64) -> Option<Ahead> {
        self.streams.fault(index)
    }

    /// Pages that arrived: `data` is installed wherever the pages `first..` are still remote.
    ///
    /// # Errors
    /// An errno from the kernel that is no ordinary outcome.
    pub fn arrived(&mut self, first: u64, data: &[u8], origin: Origin) -> io::Result<Arrival> {
        let arrival = self.put(first, Content::Pages(data), origin)?;
        if arrival == Arrival::Settled {
            let pages = (data.len() / PAGE_SIZE) as u64;
            self.forget_kept(first, first + pages);
            self.received[origin as usize] += pages;
            self.discarded += pages - self.came.count_range(first, first + pages);
        }
        Ok(arrival)
    }

    /// Pages whose data came as `origin` says and was dealt with, however often.
    #[must_use]
    pub const fn received(&self, origin: Origin) -> u64 {
        self.received[origin as usize]
    }

    /// Installs what is kept of the pages `first..end`, wherever they are remote; what is installed is no longer kept.
    ///
    /// # Errors
    /// An errno from the kernel that is no ordinary outcome.
    pub fn arrived_kept(&mut self, first: u64, end: u64) -> io::Result<Arrival> {
        let Some(kept) = self.kept.take() else { return Ok(Arrival::Settled) };
        let mut arrival = Ok(Arrival::Settled);
        let mut from = first;
        while let Some(run) = kept.run_in(&self.map, from, end) {
            let origin = match run.content {
                Content::Pages(_) => Origin::Precopied,
                Content::Zeros(_) => Origin::Zero,
            };
            arrival = self.put(run.first, run.content, origin);
            if !matches!(arrival, Ok(Arrival::Settled)) {
                break;
            }
            from = run.first + run.content.pages();
        }
        self.kept = Some(kept);
        self.forget_kept(first, from);
        arrival
    }

    fn forget_kept(&mut self, first: u64, end: u64) {
        if let Some(kept) = &mut self.kept {
            kept.forget(&self.map, first, end);
        }
        self.kept = self.kept.take().filter(|kept| kept.pages() > 0);
    }

    /// The first of these pages that are kept and lie together, as first index and first index behind.
    #[must_use]
    pub fn kept_in(&self, first: u64, end: u64) -> Option<(u64, u64)> {
        let run = self.kept.as_ref()?.run_in(&self.map, first, end)?;
        Some((run.first, run.first + run.content.pages()))
    }

    /// Where to install next what is kept, if any of it was last copied in round `least` or later; see [`Kept::next`].
    pub fn next_kept(&mut self, least: u8) -> Option<Range<u64>> {
        self.kept.as_mut()?.next(&self.map, least)
    }

    /// Sorts out a piece of what is kept, as [`Kept::sort_out`] does.
    pub fn sort_out_kept(&mut self) -> bool {
        self.kept.as_mut().is_some_and(|kept| kept.sort_out())
    }

    fn put(&mut self, first: u64, content: Content<'_>, origin: Origin) -> io::Result<Arrival> {
        let end = first + content.pages();
        let mut blocked = None;
        for slot in 0..self.members.len() {
            let mut from = first;
            let missing = |m: &Member<I>| m.is_changing() && m.space.remote_in(first, end).is_some();
            if self.members[slot].as_ref().is_some_and(missing) && !self.rest_alone(SpaceId(slot))? {
                blocked = Some(Blocked::Changing);
                continue;
            }
            while let Some(stretch) = self.members[slot].as_ref().and_then(|m| m.space.remote_in(from, end)) {
                match self.install(slot, stretch, first, content)? {
                    Ok(pages) => {
                        self.settle(slot, stretch.first, pages, origin);
                        from = stretch.first + pages;
                    }
                    Err(Blocked::Changing) => {
                        blocked = Some(Blocked::Changing);
                        break;
                    }
                    // What lies behind it may still be ours: whoever gives up must find nothing else missing.
                    Err(Blocked::Unregistered) => {
                        blocked = blocked.or(Some(Blocked::Unregistered));
                        from = stretch.first + 1;
                    }
                }
            }
        }
        if let Some(why) = blocked {
            return Ok(Arrival::Blocked(why));
        }
        self.asked.unset_range(first, end);
        Ok(Arrival::Settled)
    }

    /// One copy into one space: pages settled, or why none could be. A space that is gone settles all.
    fn install(
        &mut self,
        slot: usize,
        stretch: Stretch,
        first: u64,
        content: Content<'_>,
    ) -> io::Result<Result<u64, Blocked>> {
        let Some(member) = self.members[slot].as_ref() else { return Ok(Ok(stretch.pages)) };
        let install = |pages| match content {
            Content::Pages(data) => {
                let offset = bytes(stretch.first - first);
                member.installer.copy(stretch.at, &data[offset..offset + bytes(pages)])
            }
            Content::Zeros(_) => member.installer.zero(stretch.at, pages_to_bytes(pages)),
        };
        Ok(match in_one_area(stretch.pages, install)? {
            Install::Done { pages } => Ok(pages),
            Install::Present => {
                // Nobody else installs in this space, so this is a page the task made itself.
                member.installer.wake(stretch.at, PAGE_BYTES)?;
                self.present += 1;
                Ok(1)
            }
            Install::Deferred => Err(Blocked::Changing),
            Install::Unregistered => Err(Blocked::Unregistered),
            Install::TaskGone => {
                self.members[slot] = None;
                Ok(stretch.pages)
            }
        })
    }

    fn settle(&mut self, slot: usize, first: u64, pages: u64, origin: Origin) {
        let Some(member) = self.members[slot].as_mut() else { return };
        member.space.settle(first, pages);
        // The first arrival counts: a forked child may get the page later, from somewhere else.
        self.came_by[origin as usize] += self.came.set_range(first, first + pages);
    }

    /// These pages will not arrive by themselves: a fault may ask again.
    pub fn not_asked(&mut self, first: u64, end: u64) {
        self.asked.unset_range(first, end);
    }

    /// The first run in `first..end` that was asked for, or that is kept.
    fn coming_in(&self, first: u64, end: u64) -> Option<(u64, u64)> {
        let asked = self.asked.run_in(first, end);
        let kept = self.kept.as_ref().and_then(|kept| kept.indices_in(first, end));
        asked.into_iter().chain(kept).min()
    }

    /// The next run at or behind index `from` that is worth fetching (missing somewhere, neither asked for nor kept), at
    /// most `most` pages; it is marked as asked for.
    pub fn next_to_fetch(&mut self, from: u64, most: u64) -> Option<(u64, PageRun)> {
        // Looked for in pieces: the end of a long run costs more than its beginning, and is not needed.
        const PIECE: u64 = 4096;
        let mut from = from;
        loop {
            let end = self.map.pages.min(from + most.max(PIECE));
            let missing = self.spaces().filter_map(|s| s.remote_in(from, end)).min_by_key(|s| s.first);
            let Some(missing) = missing else {
                if end == self.map.pages {
                    return None;
                }
                from = end;
                continue;
            };
            let behind = missing.first + missing.pages;
            let (here, stop) = self.coming_in(missing.first, behind).unwrap_or((behind, behind));
            if here == missing.first {
                from = stop;
                continue;
            }
            let (addr, follow) = self.map.locate(self.map.first + missing.first)?;
            let pages = (here - missing.first).min(follow).min(most);
            self.asked.set_range(missing.first, missing.first + pages);
            return Some((missing.first, PageRun::new(addr, pages)?));
        }
    }

    /// Hands the pages that are worth asking for ahead (missing somewhere, neither asked for nor kept) to `each`, with the index
    /// of the first, run by run; they are marked as asked for.
    pub fn ask_ahead(&mut self, ahead: Ahead, mut each: impl FnMut(u64, PageRun)) {
        let mut open: Option<(u64, u64)> = None;
        let mut index = ahead.first;
        for _ in 0..ahead.pages {
            if index >= self.map.pages {
                break;
            }
            let missing = self.spaces().any(|space| space.is_remote(index));
            if missing && !self.has_kept(index) && self.asked.set(index) {
                open = match open {
                    Some((first, pages)) if first + pages == index => Some((first, pages + 1)),
                    before => {
                        self.runs_of(before, &mut each);
                        Some((index, 1))
                    }
                };
            }
            let Some(next) = index.checked_add_signed(ahead.stride) else { break };
            index = next;
        }
        self.runs_of(open, &mut each);
    }

    /// The runs that make up the pages from an index on.
    fn runs_of(&self, pages: Option<(u64, u64)>, each: &mut impl FnMut(u64, PageRun)) {
        let Some((mut first, mut left)) = pages else { return };
        while let Some((addr, follow)) = self.map.locate(self.map.first + first) {
            let Some(run) = PageRun::new(addr, left.min(follow)) else { return };
            each(first, run);
            first += run.pages;
            left -= run.pages;
        }
    }

    /// Gives up on pages that cannot be installed because their area is not registered any more.
    pub fn give_up(&mut self, first: u64, end: u64) {
        for member in self.members.iter_mut().flatten() {
            member.space.settle(first, end - first);
        }
        self.asked.unset_range(first, end);
        self.forget_kept(first, end);
    }

    /// Appends to `runs` what is settled in every space in `first..end` and was not reported yet, until
    /// there are `most`.
    pub fn acknowledge(&mut self, first: u64, end: u64, most: usize, runs: &mut Vec<TaskRun>) {
        let mut from = first;
        while let Some((start, stop)) = self.unreported.run_in(from, end) {
            if runs.len() >= most {
                return;
            }
            // The next page that some space misses ends the settled stretch before it.
            let missing = self.spaces().filter_map(|s| s.remote_in(start, stop)).min_by_key(|s| s.first);
            let settled = missing.map_or(stop, |stretch| stretch.first);
            if settled == start {
                from = missing.map_or(stop, |stretch| stretch.first + stretch.pages);
                continue;
            }
            let Some((addr, follow)) = self.map.locate(self.map.first + start) else { return };
            let pages = follow.min(settled - start);
            self.unreported.unset_range(start, start + pages);
            runs.extend(PageRun::new(addr, pages).map(|run| TaskRun { task: self.map.id, run }));
            from = start + pages;
        }
    }

    /// Marks in `map`, by index in the whole tree, what is settled in every space in `first..end`, and takes it for
    /// reported.
    pub fn report_settled(&mut self, first: u64, end: u64, map: &mut Bitmap) {
        let mut from = first;
        while from < end {
            let missing = self.spaces().filter_map(|s| s.remote_in(from, end)).min_by_key(|s| s.first);
            let settled = missing.map_or(end, |stretch| stretch.first);
            map.set_range(self.map.first + from, self.map.first + settled);
            self.unreported.unset_range(from, settled);
            from = missing.map_or(end, |stretch| stretch.first + stretch.pages);
        }
    }

    /// The first segment of any space for which `unregistered` is true.
    pub fn first_unregistered(&self, unregistered: impl Fn(&I, TaskAddr) -> bool) -> Option<TaskAddr> {
        let members = self.members.iter().flatten();
        members
            .flat_map(|member| member.space.segment_starts().map(|at| (&member.installer, at)))
            .find(|(installer, at)| unregistered(installer, *at))
            .map(|(_, at)| at)
    }

    /// Whether every page was reported as settled.
    #[must_use]
    pub fn all_acknowledged(&self) -> bool {
        self.unreported.run_in(0, self.map.pages).is_none()
    }

    /// The account: complete once nothing is remote.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        let [demand, push, precopied, zero] = self.came_by;
        let lazy = self.map.pages;
        let gone = lazy - demand - push - precopied - zero;
        // Of data that was dealt with only in part, pages count as installed before they count as received.
        let first = demand + push - self.taken_over + self.discarded;
        let again = self.received.iter().sum::<u64>().saturating_sub(first);
        PageCounts { lazy, demand, push, precopied, zero, gone, redundant: again + self.present }
    }
}

#[allow(clippy::cast_possible_truncation)] // a run that arrived fits in a buffer
const fn bytes(pages: u64) -> usize {
    pages_to_bytes(pages) as usize
}

#[cfg(test)]
mod tests {
    use super::super::Rest;
    use super::*;
    use kernel::uffd::Probe;
    use protocol::lazy_map::LazyMap;
    use protocol::units::ImageAddr;
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::rc::Rc;

    /// A kernel that keeps what was installed.
    #[derive(Clone, Default)]
    struct Model {
        pages: Rc<RefCell<BTreeMap<u64, u8>>>,
        next: Rc<Cell<Option<Install>>>,
        woken: Rc<RefCell<Vec<u64>>>,
    }

    impl Installer for Model {
        fn copy(&self, at: TaskAddr, data: &[u8]) -> io::Result<Install> {
            if let Some(outcome) = self.next.take() {
                return Ok(outcome);
            }
            let mut pages = self.pages.borrow_mut();
            for (i, page) in data.chunks(PAGE_SIZE).enumerate() {
                if pages.contains_key(&at.add(i as u64).get()) {
                    return Ok(if i == 0 { Install::Present } else { Install::Done { pages: i as u64 } });
                }
                pages.insert(at.add(i as u64).get(), page[0]);
            }
            Ok(Install::Done { pages: (data.len() / PAGE_SIZE) as u64 })
        }

        fn zero(&self, _: TaskAddr, _: u64) -> io::Result<Install> {
            unreachable!("the family never zeroes")
        }

        fn wake(&self, at: TaskAddr, _: u64) -> io::Result<()> {
            self.woken.borrow_mut().push(at.get());
            Ok(())
        }

        fn probe(&self, _: TaskAddr) -> io::Result<Probe> {
            Ok(Probe::Unregistered)
        }
    }

    fn addr(page: u64) -> TaskAddr {
        TaskAddr::containing(page << 12)
    }

    fn family(pages: u64) -> Family<Model> {
        let run = PageRun::new(ImageAddr::containing(16 << 12), pages).unwrap();
        Family::new(LazyMap::new([(TaskId(1), vec![run])]).unwrap().tasks()[0].clone())
    }

    fn data(range: std::ops::Range<u8>) -> Vec<u8> {
        range.flat_map(|value| vec![value; PAGE_SIZE]).collect()
    }

    fn acks(family: &mut Family<Model>) -> u64 {
        let mut runs = Vec::new();
        family.acknowledge(0, 1000, 100, &mut runs);
        runs.iter().map(|run| run.run.pages).sum()
    }

    #[test]
    fn each_page_counts_once_by_its_first_arrival() {
        let mut family = family(4);
        let kernel = Model::default();
        let root = family.restored(kernel.clone());
        assert_eq!(family.fault(root, addr(17)), Resolution::Ask(1));
        assert_eq!(family.fault(root, addr(17)), Resolution::Asked(1));
        assert_eq!(family.fault(root, addr(99)), Resolution::Zero);
        assert_eq!(family.arrived(1, &data(1..2), Origin::Demand).unwrap(), Arrival::Settled);
        assert_eq!(family.arrived(0, &data(0..3), Origin::Push).unwrap(), Arrival::Settled);
        family.changed(root, What::Removed { start: addr(19), end: addr(20) });
        // Too late is not twice.
        assert_eq!(family.arrived(3, &data(3..4), Origin::Push).unwrap(), Arrival::Settled);
        let counts = family.counts();
        assert_eq!((counts.demand, counts.push, counts.gone, counts.redundant), (1, 2, 1, 1));
        assert_eq!((family.received(Origin::Demand), family.received(Origin::Push)), (1, 4));
        assert_eq!(family.remote_pages(), 0);
        assert_eq!(kernel.pages.borrow().values().copied().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn a_child_gets_what_was_missing_when_it_forked_and_acknowledgement_waits_for_it() {
        let mut family = family(4);
        let (parent, child) = (Model::default(), Model::default());
        let root = family.restored(parent);
        family.arrived(0, &data(0..1), Origin::Push).unwrap();
        family.forked(root, child.clone()).unwrap();
        assert_eq!(acks(&mut family), 1);
        assert_eq!(family.rest(root).unwrap(), Rest::AsRead);
        family.changed(root, What::Removed { start: addr(17), end: addr(20) });
        assert_eq!(acks(&mut family), 0, "the child still misses them");
        family.arrived(1, &data(1..4), Origin::Push).unwrap();
        assert_eq!(acks(&mut family), 3);
        assert!(family.all_acknowledged());
        assert_eq!(child.pages.borrow().keys().map(|a| a >> 12).collect::<Vec<_>>(), [17, 18, 19]);
        assert_eq!(family.counts().push, 4);
    }

    #[test]
    fn the_map_of_what_is_settled_counts_as_reported() {
        let mut family = family(6);
        let root = family.restored(Model::default());
        family.arrived(1, &data(1..3), Origin::Push).unwrap();
        assert_eq!(acks(&mut family), 2, "acknowledged, perhaps on a link that lost it");
        family.changed(root, What::Removed { start: addr(21), end: addr(22) });
        family.forked(root, Model::default()).unwrap();
        assert_eq!(family.rest(root).unwrap(), Rest::AsRead);
        family.arrived(3, &data(3..4), Origin::Push).unwrap();
        family.changed(root, What::Removed { start: addr(16), end: addr(17) });
        let mut map = Bitmap::clear(6);
        family.report_settled(0, 2, &mut map);
        family.report_settled(2, 6, &mut map);
        let settled: Vec<u64> = (0..6).filter(|index| map.get(*index)).collect();
        assert_eq!(settled, [1, 2, 3, 5], "the child still misses the first");
        assert_eq!(acks(&mut family), 0);
        family.arrived(0, &data(0..1), Origin::Push).unwrap();
        family.arrived(4, &data(4..5), Origin::Push).unwrap();
        assert_eq!(acks(&mut family), 2);
        assert!(family.all_acknowledged());
    }

    #[test]
    fn a_family_is_put_together_again_from_what_was_recorded() {
        let mut before = family(6);
        let root = before.restored(Model::default());
        before.changed(root, What::Removed { start: addr(16), end: addr(17) });
        before.forked(root, Model::default()).unwrap();
        assert_eq!(before.rest(root).unwrap(), Rest::AsRead);
        before.changed(root, What::Remapped { from: addr(18), to: addr(40), pages: 2 });
        assert_eq!(before.rest(root).unwrap(), Rest::AsRead);
        before.arrived(4, &data(4..6), Origin::Push).unwrap();
        let mut acknowledged = Bitmap::clear(6);
        acknowledged.set_range(4, 6);

        let mut again = family(6);
        let kernels = [Model::default(), Model::default()];
        assert_eq!(again.restored_again(Some(kernels[0].clone())), root);
        again.changed(root, What::Removed { start: addr(16), end: addr(17) });
        let child = again.forked_again(root, Some(kernels[1].clone()));
        again.rested_as_read(root);
        again.changed(root, What::Remapped { from: addr(18), to: addr(40), pages: 2 });
        again.acknowledged_before(&acknowledged);
        // Whether this was over the daemon before did not record.
        assert_eq!(again.rest(root).unwrap(), Rest::AsRead);
        assert_eq!(again.remote_pages(), before.remote_pages());
        assert_eq!(again.fault(root, addr(41)), Resolution::Ask(3));
        assert_eq!(again.fault(root, addr(16)), Resolution::Zero);
        assert_eq!(again.fault(child, addr(18)), Resolution::Ask(2));
        assert_eq!(again.fault(child, addr(20)), Resolution::Zero, "acknowledged");
        again.arrived(0, &data(0..4), Origin::Push).unwrap();
        assert_eq!(kernels[0].pages.borrow().keys().map(|a| a >> 12).collect::<Vec<_>>(), [17, 40, 41]);
        assert_eq!(kernels[1].pages.borrow().keys().map(|a| a >> 12).collect::<Vec<_>>(), [17, 18, 19]);
        assert_eq!(acks(&mut again), 4);
        assert!(again.all_acknowledged());
        let counts = again.counts();
        assert_eq!((counts.push, counts.gone), (5, 1));
    }

    #[test]
    fn a_changing_space_blocks_and_the_same_pages_can_be_offered_again() {
        let mut family = family(2);
        let kernel = Model::default();
        family.restored(kernel.clone());
        kernel.next.set(Some(Install::Deferred));
        let blocked = Arrival::Blocked(Blocked::Changing);
        assert_eq!(family.arrived(0, &data(0..2), Origin::Push).unwrap(), blocked);
        assert_eq!(acks(&mut family), 0);
        kernel.next.set(Some(Install::Done { pages: 1 }));
        assert_eq!(family.arrived(0, &data(0..2), Origin::Push).unwrap(), Arrival::Settled);
        assert_eq!(acks(&mut family), 2);
    }

    #[test]
    fn a_page_dropped_while_in_flight_is_never_filled() {
        let mut family = family(2);
        let kernel = Model::default();
        let root = family.restored(kernel.clone());
        assert_eq!(family.fault(root, addr(16)), Resolution::Ask(0));
        family.changed(root, What::Removed { start: addr(16), end: addr(17) });
        family.arrived(0, &data(0..1), Origin::Demand).unwrap();
        assert!(kernel.pages.borrow().is_empty());
        assert_eq!(family.fault(root, addr(16)), Resolution::Zero);
    }

    #[test]
    fn a_task_that_is_gone_takes_its_pages_with_it() {
        let mut family = family(3);
        let kernel = Model::default();
        let root = family.restored(kernel.clone());
        kernel.next.set(Some(Install::TaskGone));
        assert_eq!(family.arrived(0, &data(0..1), Origin::Push).unwrap(), Arrival::Settled);
        assert!(family.space(root).is_none());
        assert_eq!(acks(&mut family), 3);
        assert_eq!(family.counts().gone, 3);
    }
}
