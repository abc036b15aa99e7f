//! What the destination keeps before the freeze, against a naive model: which pages with which content, and what is left of
//! them once the source has said what is clean.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use arbitrary::{Arbitrary, Unstructured};
use protocol::bitmap::Bitmap;
use protocol::lazy_map::{LazyMap, TaskMap};
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};
use protocol::wire::frame::TaskRun;
use protocol::wire::precopy::{Areas, Round};
use uffd_daemon::cache::{CacheError, Content, Kept, PageCache};
use uffd_daemon::limits::INSTALL_SLICE_PAGES;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Op {
    Areas { task: u8, again: bool, areas: [(u8, u8); 3] },
    Pages { task: u8, page: u16, pages: u8, content: Option<u8>, late: u8, breaks: bool },
    EndRound { late: u8, last: bool },
    Freeze { which: u64, lie: Option<u16> },
}

/// Where the pages of all tasks are: around two borders of chunks.
const PAGES: Range<u64> = 400..1200;
/// The lazy runs of every task, among other memory: neighbours, a gap, and one that begins inside a chunk.
const LAZY: [Range<u64>; 4] = [400..512, 512..600, 620..700, 720..1150];
/// The tasks of the map; pre-copy also knows another.
const TASKS: [u32; 2] = [3, 1];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// The byte it is full of; zeros without.
    content: Option<u8>,
    round: u64,
}

#[derive(Default)]
struct Task {
    areas: Vec<Range<u64>>,
    named_in: u64,
    pages: BTreeMap<u64, Page>,
}

struct Model {
    tasks: BTreeMap<u32, Task>,
    round: u64,
    most: u64,
}

fn run(pages: &Range<u64>) -> PageRun {
    PageRun::new(ImageAddr::containing(pages.start << 12), pages.end - pages.start).expect("a small run")
}

/// Rounds of pre-copy, and what becomes of them. First how many pages may be kept, then operations.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_page_cache(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(most) = input.int_in_range(1..=1500) else { return };
    let mut cache = PageCache::new(most);
    let mut model = Model { tasks: BTreeMap::new(), round: 1, most };
    while !input.is_empty() {
        let Ok(op) = input.arbitrary::<Op>() else { return };
        if let Op::Freeze { which, lie } = op {
            return model.freeze(cache, which, lie);
        }
        if !model.apply(&mut cache, op) {
            return;
        }
        assert_eq!(cache.pages(), model.count());
    }
}

impl Model {
    fn count(&self) -> u64 {
        self.tasks.values().map(|task| task.pages.len() as u64).sum()
    }

    /// False if it was refused: the lane ends.
    fn apply(&mut self, cache: &mut PageCache, op: Op) -> bool {
        match op {
            Op::Areas { task, again, areas } => self.areas(cache, u32::from(task) % 4, again, &areas),
            Op::Pages { task, page, pages, content, late, breaks } => {
                let first = PAGES.start + u64::from(page) % (PAGES.end - PAGES.start);
                let pages = first..first + 1 + u64::from(pages);
                let breaks = breaks && content.is_some() && late == 1;
                self.put(cache, u32::from(task) % 4, pages, content, u64::from(late / 250), breaks)
            }
            Op::EndRound { late, last } => {
                let late = u64::from(late / 250);
                let number = u32::try_from(self.round + late).expect("few rounds");
                let ended = cache.end_round(Round { number, last });
                assert_eq!(ended.is_ok(), late == 0, "{ended:?}");
                let round = self.round;
                self.tasks.retain(|_, task| task.named_in == round);
                self.round += 1;
                ended.is_ok()
            }
            Op::Freeze { .. } => unreachable!("looked at before"),
        }
    }

    fn areas(&mut self, cache: &mut PageCache, task: u32, again: bool, areas: &[(u8, u8)]) -> bool {
        let mut at = PAGES.start;
        let areas: Vec<Range<u64>> = areas
            .iter()
            .map(|(gap, pages)| {
                let start = at + u64::from(*gap) / 2;
                at = start + 1 + 3 * u64::from(*pages);
                start..at
            })
            .collect();
        let said = Areas { task: TaskId(task), starts_again: again, areas: areas.iter().map(run).collect() };
        cache.areas(said).expect("few areas");
        let entry = self.tasks.entry(task).or_default();
        entry.named_in = self.round;
        entry.pages.retain(|page, _| !again && areas.iter().any(|area| area.contains(page)));
        entry.areas = areas;
        true
    }

    fn put(
        &mut self,
        cache: &mut PageCache,
        task: u32,
        pages: Range<u64>,
        content: Option<u8>,
        late: u64,
        breaks: bool,
    ) -> bool {
        let (what, round) = (TaskRun { task: TaskId(task), run: run(&pages) }, self.round + late);
        let result = match content {
            Some(content) => cache.fill(what, round, |part| {
                part.fill(content);
                if breaks { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
            }),
            None => cache.zero(what, round),
        };
        let before = self.count();
        let inside =
            |task: &Task| task.areas.iter().any(|area| area.start <= pages.start && pages.end <= area.end);
        let Some(entry) = self.tasks.get_mut(&task).filter(|task| late == 0 && inside(task)) else {
            let refused = matches!(result, Err(CacheError::OutOfOrder { .. } | CacheError::Outside { .. }));
            assert!(refused, "{result:?}");
            return false;
        };
        let more = pages.clone().filter(|page| !entry.pages.contains_key(page)).count() as u64;
        if breaks {
            assert!(matches!(result, Err(CacheError::Io(_) | CacheError::TooManyPages(_))), "{result:?}");
            return false;
        }
        if before + more > self.most {
            assert!(matches!(result, Err(CacheError::TooManyPages(_))), "{result:?}");
            return false;
        }
        result.expect("it fits");
        entry.pages.extend(pages.map(|page| (page, Page { content, round })));
        true
    }

    /// The tasks stand still: of what is kept some pages are clean, and once in a while one is called so that is not kept.
    fn freeze(&self, cache: PageCache, which: u64, lie: Option<u16>) {
        let runs = || LAZY.iter().map(run).collect::<Vec<_>>();
        let map = LazyMap::new(TASKS.map(|task| (TaskId(task), runs()))).expect("a small map");
        let mut clean = Bitmap::clear(map.pages());
        let page_at = |index: u64| {
            let (task, addr, _) = map.locate(index).expect("a page of the map");
            self.tasks.get(&task.0).and_then(|task| task.pages.get(&(addr.get() >> 12)))
        };
        for index in (0..map.pages()).filter(|index| which >> ((index / 3) % 64) & 1 == 1) {
            if page_at(index).is_some() {
                clean.set(index);
            }
        }
        clean.set(lie.map_or(u64::MAX, |index| u64::from(index) % map.pages()));
        let absent = (0..map.pages()).find(|index| clean.get(*index) && page_at(*index).is_none());
        let result = cache.into_clean(&map, &clean);
        let (all, _unneeded) = match (result, absent) {
            (Ok(clean), None) => clean,
            (Err(CacheError::NotKept { task, at }), Some(index)) => {
                assert_eq!(map.locate(index).map(|(task, at, _)| (task, at)), Some((task, at)));
                return;
            }
            (result, absent) => panic!("{absent:?} is not kept: {result:?}"),
        };
        assert_eq!(all.len(), TASKS.len());
        for (kept, task) in all.into_iter().zip(map.tasks()) {
            let clean = (0..task.pages).filter(|index| clean.get(task.first + index));
            let pages = clean.map(|index| (index, *page_at(task.first + index).expect("a clean page")));
            Rest { kept, pages: pages.collect(), map: task }.empty(which);
        }
    }
}

/// What is kept of a task, and what should be.
struct Rest<'a> {
    kept: Kept,
    pages: BTreeMap<u64, Page>,
    map: &'a TaskMap,
}

impl Rest<'_> {
    /// Takes what comes next until nothing is left, and other pages between.
    fn empty(mut self, which: u64) {
        let mut turn = 0_u64;
        self.check();
        for _ in 0..which % 3 {
            self.kept.sort_out();
        }
        self.check();
        for least in [2, 0] {
            while let Some(next) = self.kept.next(self.map, least) {
                let round = self.pages.values().map(|page| page.round).max().expect("a page is left");
                let first = self.pages.iter().find(|(_, page)| page.round == round).map(|(index, _)| *index);
                assert!(Some(next.start) == first && round >= u64::from(least) && !next.is_empty());
                assert!(next.end - next.start <= INSTALL_SLICE_PAGES as u64 && next.end <= self.map.pages);
                self.forget(next);
                turn += 1;
                if turn % 5 == 0 {
                    let from = which.rotate_left(u32::try_from(turn % 64).expect("small")) % self.map.pages;
                    self.forget(from..from + 1 + turn % 40);
                }
            }
            assert!(self.pages.values().all(|page| page.round < u64::from(least)));
        }
        self.check();
        assert_eq!(self.kept.pages(), 0);
    }

    fn forget(&mut self, indices: Range<u64>) {
        self.kept.forget(self.map, indices.start, indices.end);
        self.pages.retain(|index, _| !indices.contains(index));
        assert_eq!(self.kept.pages(), self.pages.len() as u64);
        self.check_from(indices.start.saturating_sub(20), indices.end + 20);
    }

    fn check(&self) {
        self.check_from(0, self.map.pages + 1);
    }

    fn check_from(&self, first: u64, end: u64) {
        let mut expected: Vec<(u64, Option<u8>)> = Vec::new();
        for index in first..end {
            let page = self.pages.get(&index);
            assert_eq!(self.kept.has(index), page.is_some(), "index {index}");
            expected.extend(page.map(|page| (index, page.content)));
        }
        let (mut from, mut found) = (first, Vec::new());
        while let Some(run) = self.kept.run_in(self.map, from, end) {
            let contents: Vec<Option<u8>> = match run.content {
                Content::Zeros(pages) => (0..pages).map(|_| None).collect(),
                Content::Pages(bytes) => {
                    let whole = |page: &[u8]| page.iter().all(|byte| *byte == page[0]).then_some(page[0]);
                    bytes.chunks_exact(PAGE_SIZE).map(|page| Some(whole(page).expect("one copy"))).collect()
                }
            };
            assert!(run.content.pages() > 0);
            from = run.first + run.content.pages();
            found.extend((run.first..).zip(contents));
        }
        assert_eq!(found, expected);
    }
}
