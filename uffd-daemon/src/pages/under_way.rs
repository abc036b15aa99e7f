//! Changes of one address space that were under way together, and the order in which they took effect.
//!
//! `munmap`, `mremap` and `fork` take effect first and report it afterwards, each thread for itself: of two that were
//! under way at once the later one may be read first. A child that was forked meanwhile has its pages where they were, or where
//! they are now.
//!
//! ```text
//!   mremap a→b   takes effect ──────────────────────────▶ event        read: fork, mremap
//!   fork                       takes effect ──▶ event                  true: mremap, fork; the child's pages are at b
//! ```
//!
//! So a change that was read waits until the kernel says that none is under way any more. What was read until then took effect in
//! some order: in the one whose result the kernel confirms. It is asked which places are registered, in the space and in its
//! children; of several orders that fit, the nearest to the one of the events is taken, but an `mremap` unmaps what is at its
//! target before anything else does. That an event was sent says something, too: what was moved or unmapped was registered until
//! then, and what was at the target of a move was not, or its unmapping was reported.
//!
//! `MADV_DONTNEED` reports first and drops afterwards: whatever was read before it had taken effect before.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::io;

use kernel::uffd::{Event, Probe};
use protocol::units::{TaskAddr, bytes_to_pages};

use super::SpaceId;
use super::space::Space;
use crate::limits;

/// What happened to an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The content of a range was dropped.
    Removed {
        /// First address.
        start: TaskAddr,
        /// First address behind.
        end: TaskAddr,
    },
    /// A range was unmapped.
    Unmapped {
        /// First address.
        start: TaskAddr,
        /// First address behind.
        end: TaskAddr,
    },
    /// A range was moved.
    Remapped {
        /// From where.
        from: TaskAddr,
        /// Where to.
        to: TaskAddr,
        /// Number of pages.
        pages: u64,
    },
    /// It was copied into this space of the same family.
    Forked {
        /// The child's.
        child: SpaceId,
    },
}

impl What {
    /// What an event says that its space has changed; nothing of a fault, or of a child, which has to get its number.
    #[must_use]
    pub fn of<C>(event: &Event<C>) -> Option<Self> {
        let at = TaskAddr::containing;
        match *event {
            Event::Remove { start, end } => Some(Self::Removed { start: at(start), end: at(end) }),
            Event::Unmap { start, end } => Some(Self::Unmapped { start: at(start), end: at(end) }),
            Event::Remap { from, to, len } => {
                Some(Self::Remapped { from: at(from), to: at(to), pages: bytes_to_pages(len) })
            }
            Event::Fault { .. } | Event::Fork { .. } | Event::Unknown(_) => None,
        }
    }

    /// From where to where what was there is not there any more: who waits there must look again.
    #[must_use]
    pub fn leaves(self) -> Option<(TaskAddr, TaskAddr)> {
        self.ranges()[0]
    }

    const fn is_removal(self) -> bool {
        matches!(self, Self::Removed { .. })
    }

    /// Whether what is at `at` depends on it.
    pub(super) fn touches(self, at: TaskAddr) -> bool {
        let mut ranges = self.ranges().into_iter().flatten();
        ranges.any(|(start, end)| start <= at && at < end)
    }

    fn ranges(self) -> [Option<(TaskAddr, TaskAddr)>; 2] {
        match self {
            Self::Removed { start, end } | Self::Unmapped { start, end } => [Some((start, end)), None],
            Self::Remapped { from, to, pages } => [Some((from, from.add(pages))), Some((to, to.add(pages)))],
            Self::Forked { .. } => [None, None],
        }
    }
}

/// Any address will do to hear whether a change is under way; hardly anything is mapped at this one.
pub(super) const ANYWHERE: TaskAddr = TaskAddr::containing(0x1000_0000);

/// An order of changes: their positions in the order in which they were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order(Vec<usize>);

impl Order {
    /// The longest that can be packed: half a byte for each.
    const MOST: usize = 16;

    pub(super) fn as_read(count: usize) -> Self {
        Self((0..count).collect())
    }

    pub(super) fn is_as_read(&self) -> bool {
        self.0.iter().enumerate().all(|(position, number)| position == *number)
    }

    /// Those in which one of the changes has another place. A removal stays behind all that was read before it.
    fn neighbours(&self, changes: &[What]) -> impl Iterator<Item = Self> + use<> {
        let is_removal = |number: &usize| changes[*number].is_removal();
        let (mut removals, others): (Vec<usize>, Vec<usize>) = self.0.iter().copied().partition(is_removal);
        removals.sort_unstable();
        let count = others.len();
        let places = move |from| (0..count).filter(move |to| *to != from).map(move |to| (from, to));
        (0..count).flat_map(places).map(move |(from, to)| {
            let mut order = others.clone();
            let moved = order.remove(from);
            order.insert(to, moved);
            with_removals(order, &removals)
        })
    }

    pub(super) fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().copied()
    }

    /// As a number.
    #[must_use]
    pub fn packed(&self) -> u64 {
        self.0.iter().rev().fold(0, |packed, number| packed << 4 | *number as u64)
    }

    /// The order of `count` changes that [`Order::packed`] gave for `packed`; the one of the events if there is none.
    #[must_use]
    pub fn unpacked(packed: u64, count: usize) -> Self {
        let bytes = packed.to_le_bytes();
        let number = |at: usize| usize::from(bytes[at / 2] >> (at % 2 * 4) & 0xf);
        let numbers: Vec<usize> = (0..count.min(Self::MOST)).map(number).collect();
        let distinct: BTreeSet<usize> = numbers.iter().copied().filter(|number| *number < count).collect();
        if distinct.len() == count { Self(numbers) } else { Self::as_read(count) }
    }
}

/// Plays changes in an order: hands every child to `born` as it began.
pub(super) fn play(
    space: &mut Space,
    changes: &[What],
    order: &Order,
    mut born: impl FnMut(SpaceId, &Space),
) {
    for what in order.positions().filter_map(|position| changes.get(position)) {
        match *what {
            What::Removed { start, end } => space.remove(start, end),
            What::Unmapped { start, end } => space.unmap(start, end),
            What::Remapped { from, to, pages } => space.remap(from, to, pages),
            What::Forked { child } => born(child, space),
        }
    }
}

/// Whether their order can matter.
pub(super) fn may_differ(changes: &[What]) -> bool {
    changes.iter().filter(|what| !what.is_removal()).count() > 1 && changes.len() <= Order::MOST
}

/// A child of a fork among the changes, and what it did since.
pub(super) struct Child<'a> {
    pub(super) id: SpaceId,
    pub(super) changes: &'a [What],
}

/// What is at a place, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Lazy pages, which are registered.
    Lazy,
    /// Nothing that is registered.
    Nothing,
    /// No lazy pages; their neighbours in an area are registered all the same. Where it was before all changes, if that is known.
    Unknown(Option<TaskAddr>),
}

/// What is at the first page of every stretch that lies in one piece whatever the order.
type Layout = BTreeMap<TaskAddr, Content>;

/// The order in which changes of `space` took effect. `probe` asks the kernel about the space itself (`None`) or one of its
/// children; nothing is returned if one of them is changing.
///
/// # Errors
/// What `probe` returns.
pub(super) fn find_order(
    space: &Space,
    changes: &[What],
    children: &[Child<'_>],
    mut probe: impl FnMut(Option<SpaceId>, TaskAddr) -> io::Result<Probe>,
) -> io::Result<Option<Order>> {
    let mut known = HashMap::new();
    let before = layout(space, changes, children);
    // How many places are not as this order would have them; nothing if something is changing.
    let mut judge = |order: &Order| -> io::Result<Option<usize>> {
        let (layouts, told) = layouts(&before, changes, children, order);
        let mut wrong = told.impossible + told.registered.intersection(&told.unregistered).count();
        for (who, after) in layouts {
            for (at, content) in after {
                let expected = match content {
                    Content::Lazy => true,
                    Content::Nothing => false,
                    Content::Unknown(Some(origin)) if told.registered.contains(&origin) => true,
                    Content::Unknown(Some(origin)) if told.unregistered.contains(&origin) => false,
                    Content::Unknown(_) => continue,
                };
                let registered = match known.get(&(who, at)) {
                    Some(answer) => *answer,
                    None => {
                        let answer = match probe(who, at)? {
                            Probe::Changing => return Ok(None),
                            Probe::Registered => Some(true),
                            Probe::Unregistered => Some(false),
                            Probe::TaskGone => None,
                        };
                        known.insert((who, at), answer);
                        answer
                    }
                };
                wrong += usize::from(registered.is_some_and(|registered| registered != expected));
            }
        }
        Ok(Some(wrong))
    };
    let mut found = (usize::MAX, Order::as_read(changes.len()));
    for order in orders(changes).take(limits::ORDERS_TRIED) {
        let Some(wrong) = judge(&order)? else { return Ok(None) };
        if wrong < found.0 {
            found = (wrong, order);
        }
        if found.0 == 0 {
            break;
        }
    }
    // Of more changes than can be tried in every order: one step after the other to less that is wrong.
    while found.0 > 0 {
        let mut better = None;
        for order in found.1.neighbours(changes) {
            let Some(wrong) = judge(&order)? else { return Ok(None) };
            if wrong < found.0 {
                better = Some((wrong, order));
                break;
            }
        }
        let Some(better) = better else { break };
        found = better;
    }
    // A change that has begun meanwhile may have taken effect before a place was looked up.
    if probe(None, ANYWHERE)? == Probe::Changing {
        return Ok(None);
    }
    Ok(Some(found.1))
}

/// What is where before any of these changes.
fn layout(space: &Space, changes: &[What], children: &[Child<'_>]) -> Layout {
    let all = || changes.iter().chain(children.iter().flat_map(|child| child.changes)).copied();
    let moves: Vec<(TaskAddr, TaskAddr, u64)> = all()
        .filter_map(|what| match what {
            What::Remapped { from, to, pages } => Some((from, to, pages)),
            _ => None,
        })
        .collect();
    let mut cuts = BTreeSet::new();
    for (start, end) in all().flat_map(What::ranges).flatten() {
        cuts.extend([start, end]);
        cuts.extend(space.segments_in(start, end).flat_map(|(at, pages)| [at, at.add(pages)]));
    }
    let shifted = |at: TaskAddr, from: TaskAddr, to: TaskAddr, pages: u64| {
        (from <= at && at < from.add(pages)).then(|| to.add(at.pages_since(from)))
    };
    // Where a cut comes to, and comes from, by any of the moves and then another.
    let mut open: VecDeque<TaskAddr> = cuts.iter().copied().collect();
    while let Some(at) = open.pop_front() {
        for (from, to, pages) in &moves {
            let others = [shifted(at, *from, *to, *pages), shifted(at, *to, *from, *pages)];
            open.extend(
                others
                    .into_iter()
                    .flatten()
                    .filter(|other| cuts.len() < limits::ORDER_POINTS && cuts.insert(*other)),
            );
        }
    }
    let content = |at: TaskAddr| if space.has(at) { Content::Lazy } else { Content::Unknown(Some(at)) };
    cuts.into_iter().map(|at| (at, content(at))).collect()
}

/// What events tell beyond what they are about: the kernel sends them for what is registered, and no others.
#[derive(Default)]
struct Told {
    /// What was not known, and was moved: by where it was.
    registered: HashSet<TaskAddr>,
    /// What was not known, and something was moved there without an unmapping.
    unregistered: HashSet<TaskAddr>,
    /// Changes that would not have been reported like this.
    impossible: usize,
}

/// What is where after these changes in an order: in the space itself, and in its children, which went on since.
fn layouts(
    before: &Layout,
    changes: &[What],
    children: &[Child<'_>],
    order: &Order,
) -> (Vec<(Option<SpaceId>, Layout)>, Told) {
    let (mut after, mut born, mut told) = (before.clone(), Vec::new(), Told::default());
    for what in order.positions().filter_map(|position| changes.get(position)) {
        if let What::Forked { child } = what {
            let mut layout = after.clone();
            let since =
                children.iter().find(|other| other.id == *child).map_or(&[][..], |child| child.changes);
            since.iter().for_each(|what| change(&mut layout, *what, &mut told));
            born.push((Some(*child), layout));
        }
        change(&mut after, *what, &mut told);
    }
    born.push((None, after));
    (born, told)
}

fn change(layout: &mut Layout, what: What, told: &mut Told) {
    match what {
        What::Unmapped { start, end } if start < end => {
            let mut unmapped = layout.range(start..end).peekable();
            let reported =
                unmapped.peek().is_none() || unmapped.any(|(_, content)| *content != Content::Nothing);
            told.impossible += usize::from(!reported);
            layout.range_mut(start..end).for_each(|(_, content)| *content = Content::Nothing);
        }
        What::Remapped { from, to, pages } => {
            let source = |at: TaskAddr| layout.get(&from.add(at.pages_since(to))).copied();
            let arrived: Vec<(TaskAddr, Content)> = layout
                .range(to..to.add(pages))
                .map(|(at, _)| (*at, source(*at).unwrap_or(Content::Unknown(None))))
                .collect();
            let mut possible = true;
            for (_, content) in layout.range(to..to.add(pages)) {
                match *content {
                    Content::Unknown(Some(origin)) => drop(told.unregistered.insert(origin)),
                    Content::Unknown(None) | Content::Nothing => {}
                    Content::Lazy => possible = false,
                }
            }
            for (_, content) in layout.range_mut(from..from.add(pages)) {
                match std::mem::replace(content, Content::Nothing) {
                    Content::Unknown(Some(origin)) => drop(told.registered.insert(origin)),
                    Content::Unknown(None) | Content::Lazy => {}
                    Content::Nothing => possible = false,
                }
            }
            told.impossible += usize::from(!possible);
            layout.extend(arrived);
        }
        What::Unmapped { .. } | What::Removed { .. } | What::Forked { .. } => {}
    }
}

/// Every order that these changes can have had: those first in which an `mremap` comes behind the unmapping of its target, which
/// it reports before itself.
fn orders(changes: &[What]) -> impl Iterator<Item = Order> {
    let is_target = |unmap: &What, remap: &What| match (*unmap, *remap) {
        // One that grows unmaps more than it moves.
        (What::Unmapped { start, end }, What::Remapped { to, pages, .. }) => {
            to == start && to.add(pages) <= end
        }
        _ => false,
    };
    let pairs: Vec<(usize, usize)> = (0..changes.len())
        .flat_map(|later| (0..later).map(move |earlier| (earlier, later)))
        .filter(|(earlier, later)| is_target(&changes[*earlier], &changes[*later]))
        .collect();
    let kept = move |order: &Order| {
        let place = |number| order.0.iter().position(|other| *other == number);
        pairs.iter().all(|(unmap, remap)| place(*unmap) < place(*remap))
    };
    let others = all_orders(changes).filter({
        let kept = kept.clone();
        move |order| !kept(order)
    });
    all_orders(changes).filter(kept).chain(others)
}

/// Every order, the nearest to the one they were read in first.
fn all_orders(changes: &[What]) -> impl Iterator<Item = Order> {
    let first = Order::as_read(changes.len());
    let mut seen = HashSet::from([first.0.clone()]);
    let mut open = VecDeque::from([first]);
    std::iter::from_fn(move || {
        let next = open.pop_front()?;
        for other in next.neighbours(changes) {
            if seen.len() < limits::ORDERS_TRIED && seen.insert(other.0.clone()) {
                open.push_back(other);
            }
        }
        Some(next)
    })
}

/// Puts every removal behind all that was read before it.
fn with_removals(mut order: Vec<usize>, removals: &[usize]) -> Order {
    for removal in removals {
        let behind = order.iter().rposition(|number| number < removal).map_or(0, |last| last + 1);
        order.insert(behind, *removal);
    }
    Order(order)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use kernel::uffd::Install;
    use proptest::prelude::*;
    use protocol::lazy_map::LazyMap;
    use protocol::units::{ImageAddr, PageRun, TaskId};

    use super::super::{Arrival, Blocked, Family, Installer, Origin, Resolution, Rest};
    use super::*;

    /// A kernel that knows what is registered, and whether a change is under way.
    #[derive(Clone, Default)]
    struct Kernel {
        registered: Rc<RefCell<BTreeSet<u64>>>,
        changing: Rc<Cell<bool>>,
    }

    impl Kernel {
        fn with(pages: impl IntoIterator<Item = u64>) -> Self {
            Self { registered: Rc::new(RefCell::new(pages.into_iter().collect())), ..Self::default() }
        }

        fn unmap(&self, pages: std::ops::Range<u64>) {
            self.registered.borrow_mut().retain(|page| !pages.contains(page));
        }

        fn remap(&self, from: u64, to: u64, pages: u64) {
            let moved: Vec<u64> =
                self.registered.borrow().range(from..from + pages).map(|page| page - from + to).collect();
            self.unmap(from..from + pages);
            self.unmap(to..to + pages);
            self.registered.borrow_mut().extend(moved);
        }

        fn fork(&self) -> Self {
            Self::with(self.registered.borrow().iter().copied())
        }
    }

    impl Installer for Kernel {
        fn copy(&self, _: TaskAddr, data: &[u8]) -> io::Result<Install> {
            Ok(Install::Done { pages: (data.len() / protocol::units::PAGE_SIZE) as u64 })
        }

        fn zero(&self, _: TaskAddr, _: u64) -> io::Result<Install> {
            unreachable!("the family never zeroes")
        }

        fn wake(&self, _: TaskAddr, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn probe(&self, at: TaskAddr) -> io::Result<Probe> {
            let registered = self.registered.borrow().contains(&(at.get() >> 12));
            Ok(match registered {
                _ if self.changing.get() => Probe::Changing,
                true => Probe::Registered,
                false => Probe::Unregistered,
            })
        }
    }

    fn addr(page: u64) -> TaskAddr {
        TaskAddr::containing(page << 12)
    }

    fn unmapped(page: u64, pages: u64) -> What {
        What::Unmapped { start: addr(page), end: addr(page + pages) }
    }

    fn removed(page: u64, pages: u64) -> What {
        What::Removed { start: addr(page), end: addr(page + pages) }
    }

    fn remapped(from: u64, to: u64, pages: u64) -> What {
        What::Remapped { from: addr(from), to: addr(to), pages }
    }

    /// A task with 4 lazy pages at 16 and 4 more at 32.
    fn family() -> (Family<Kernel>, SpaceId, Kernel) {
        family_with(0..0)
    }

    /// The same, with other pages that are registered.
    fn family_with(registered: std::ops::Range<u64>) -> (Family<Kernel>, SpaceId, Kernel) {
        let run = |page: u64| PageRun::new(ImageAddr::containing(page << 12), 4).unwrap();
        let map = LazyMap::new([(TaskId(1), vec![run(16), run(32)])]).unwrap();
        let mut family = Family::new(map.tasks()[0].clone());
        let kernel = Kernel::with(registered.chain(16..20).chain(32..36));
        let root = family.restored(kernel.clone());
        (family, root, kernel)
    }

    #[test]
    fn a_child_has_its_pages_where_they_were_when_it_was_forked_whatever_is_read_first() {
        for (moved_before, read_first) in [(true, true), (true, false), (false, true), (false, false)] {
            let (mut family, root, kernel) = family();
            kernel.changing.set(true);
            let early = kernel.fork();
            kernel.remap(16, 100, 4);
            let child = if moved_before { kernel.fork() } else { early };
            if read_first {
                family.changed(root, remapped(16, 100, 4));
            }
            let child = family.forked(root, child).unwrap();
            // It runs, while its parent's other thread has not come to queue its event.
            assert_eq!(family.fault(child, addr(101)), Resolution::Unknown);
            assert_eq!(family.rest(root).unwrap(), Rest::Changing);
            if !read_first {
                family.changed(root, remapped(16, 100, 4));
            }
            kernel.changing.set(false);
            let rest = family.rest(root).unwrap();
            assert_eq!(rest == Rest::AsRead, moved_before == read_first);
            let (here, elsewhere) = if moved_before { (101, 17) } else { (17, 101) };
            assert_eq!(family.fault(child, addr(here)), Resolution::Ask(1));
            assert_eq!(family.fault(child, addr(elsewhere)), Resolution::Zero);
            assert_eq!(family.fault(root, addr(101)), Resolution::Asked(1));
            assert_eq!(family.remote_pages(), 16);
        }
    }

    #[test]
    fn nothing_is_installed_or_given_up_while_something_is_under_way() {
        let (mut family, root, kernel) = family();
        kernel.changing.set(true);
        family.changed(root, unmapped(16, 4));
        let data = [0; 2 * protocol::units::PAGE_SIZE];
        let blocked = Arrival::Blocked(Blocked::Changing);
        assert_eq!(family.arrived(0, &data, Origin::Push).unwrap(), blocked);
        assert!(family.exited(root).is_none());
        assert_eq!(family.fault(root, addr(16)), Resolution::Unknown);
        assert_eq!(family.fault(root, addr(33)), Resolution::Ask(5), "which has nothing to do with it");
        let mut runs = Vec::new();
        family.acknowledge(0, 8, 10, &mut runs);
        assert!(runs.is_empty() && family.rest(root).unwrap() == Rest::Changing);
        kernel.changing.set(false);
        assert_eq!(family.rest(root).unwrap(), Rest::AsRead);
        family.acknowledge(0, 8, 10, &mut runs);
        assert_eq!(runs.len(), 1);
        assert_eq!(family.arrived(4, &data, Origin::Push).unwrap(), Arrival::Settled);
    }

    #[test]
    fn pages_that_changed_places_in_another_order_are_told_apart() {
        // 16 to 100, then 32 to 16; read the other way round.
        let (mut family, root, kernel) = family();
        kernel.remap(16, 100, 4);
        kernel.remap(32, 16, 4);
        family.changed(root, remapped(32, 16, 4));
        family.changed(root, remapped(16, 100, 4));
        assert!(matches!(family.rest(root).unwrap(), Rest::Ordered(_)));
        assert_eq!(family.fault(root, addr(100)), Resolution::Ask(0));
        assert_eq!(family.fault(root, addr(16)), Resolution::Ask(4));
    }

    #[test]
    fn what_is_moved_over_lazy_pages_is_told_from_them_by_where_it_was() {
        // 8 to 12 hold nothing lazy, and are registered. `mremap` tells of what was at the target, and of the move later.
        for forked_first in [true, false] {
            let (mut family, root, kernel) = family_with(8..12);
            let early = kernel.fork();
            kernel.remap(8, 16, 4);
            let child = if forked_first { early } else { kernel.fork() };
            family.changed(root, unmapped(16, 4));
            let child = family.forked(root, child).unwrap();
            family.changed(root, remapped(8, 16, 4));
            assert!(matches!(family.rest(root).unwrap(), Rest::Ordered(_)));
            let there = if forked_first { Resolution::Ask(1) } else { Resolution::Zero };
            assert_eq!(family.fault(child, addr(17)), there);
            assert_eq!(family.fault(root, addr(17)), Resolution::Zero);
        }
    }

    #[test]
    fn what_is_moved_to_where_nothing_was_is_not_there_before() {
        // The child has unmapped where it would be if it was forked first, and something else beside it.
        for forked_first in [true, false] {
            let (mut family, root, kernel) = family_with(8..12);
            let early = kernel.fork();
            kernel.remap(16, 100, 4);
            let child = if forked_first { early } else { kernel.fork() };
            child.unmap(8..20);
            let child = family.forked(root, child).unwrap();
            family.changed(child, unmapped(8, 12));
            family.changed(root, remapped(16, 100, 4));
            family.rest(root).unwrap();
            let there = if forked_first { Resolution::Zero } else { Resolution::Ask(1) };
            assert_eq!(family.fault(child, addr(101)), there);
        }
    }

    #[test]
    fn a_chain_of_moves_that_is_read_backwards_is_put_right() {
        let (mut family, root, kernel) = family();
        let places: Vec<u64> = (0..9).map(|number| 16 + 100 * number).collect();
        for step in places.windows(2) {
            kernel.remap(step[0], step[1], 4);
        }
        for step in places.windows(2).rev() {
            family.changed(root, remapped(step[0], step[1], 4));
        }
        assert!(matches!(family.rest(root).unwrap(), Rest::Ordered(_)));
        assert_eq!(family.fault(root, addr(places[8] + 1)), Resolution::Ask(1));
    }

    #[test]
    fn what_was_at_the_target_of_a_move_was_unmapped_by_it() {
        // 32 to 16, which goes on to 100: read as the unmapping of 16, its move, and the move to it.
        let (mut family, root, kernel) = family();
        kernel.remap(32, 16, 4);
        kernel.remap(16, 100, 4);
        family.changed(root, unmapped(16, 4));
        family.changed(root, remapped(16, 100, 4));
        family.changed(root, remapped(32, 16, 4));
        assert!(matches!(family.rest(root).unwrap(), Rest::Ordered(_)));
        assert_eq!(family.fault(root, addr(101)), Resolution::Ask(5));
    }

    #[test]
    fn what_is_dropped_after_a_change_was_read_is_dropped_where_that_left_it() {
        let (mut family, root, kernel) = family();
        kernel.remap(16, 100, 4);
        let child = kernel.fork();
        // One thread moves and then drops; the fork of another was between the two, and is read last.
        family.changed(root, remapped(16, 100, 4));
        family.changed(root, removed(100, 2));
        let child = family.forked(root, child).unwrap();
        family.rest(root).unwrap();
        assert_eq!(family.fault(root, addr(100)), Resolution::Zero);
        assert_eq!(family.fault(root, addr(102)), Resolution::Ask(2));
        assert_eq!(family.fault(child, addr(103)), Resolution::Ask(3));
    }

    #[test]
    fn a_child_that_goes_on_is_looked_at_as_it_is_now() {
        let (mut family, root, kernel) = family();
        let (early, late) = (kernel.fork(), {
            kernel.remap(16, 100, 4);
            kernel.fork()
        });
        for (fork, first) in [(early, 16), (late, 100)] {
            fork.unmap(first..first + 1);
            let child = family.forked(root, fork).unwrap();
            family.changed(child, unmapped(first, 1));
        }
        family.changed(root, remapped(16, 100, 4));
        let Rest::Ordered(order) = family.rest(root).unwrap() else { panic!("as read") };
        assert_eq!(order, Order(vec![0, 2, 1]));
        let [early, late] = [1, 2].map(|number| SpaceId::numbered(number).unwrap());
        for (child, there, gone) in [(early, 17, 16), (late, 101, 100)] {
            assert_eq!(family.rest(child).unwrap(), Rest::AsRead);
            assert!(matches!(family.fault(child, addr(there)), Resolution::Ask(1) | Resolution::Asked(1)));
            assert_eq!(family.fault(child, addr(gone)), Resolution::Zero);
        }
    }

    proptest! {
        #[test]
        fn orders_are_packed_and_found_again(count in 0_usize..=16, seed: u64) {
            let mut numbers: Vec<usize> = (0..count).collect();
            (1..count).for_each(|at| numbers.swap(at, usize::try_from(seed >> at).unwrap() % (at + 1)));
            let order = Order(numbers);
            prop_assert_eq!(Order::unpacked(order.packed(), count), order);
        }

        #[test]
        fn any_number_is_an_order(packed: u64, count in 0_usize..20) {
            let mut numbers = Order::unpacked(packed, count).0;
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn all_orders_of_five_are_tried() {
        let changes: Vec<What> = (0..5).map(|page| unmapped(page, 1)).collect();
        let orders: HashSet<Vec<usize>> = orders(&changes).map(|order| order.0).collect();
        assert_eq!(orders.len(), 120);
    }
}
