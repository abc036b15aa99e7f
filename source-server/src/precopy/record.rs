//! What the destination keeps of the tree, and which of it is what the tree has. Pure.
//!
//! ```text
//!            sent              written (a scan reports it)
//! nothing ─────────▶ fresh ◀───────────────────────────────▶ stale      outside of all areas, or its address space
//!                              sent                                     or task gone: nothing again
//! ```
//!
//! A stale page is still kept there: it takes room until a later copy replaces it. What is fresh when the tree stands still is clean.

use std::collections::{BTreeMap, HashMap};

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{ImageAddr, PAGE_BYTES, PageRun, TaskId};

/// Pages whose bits are kept together.
const GROUP_PAGES: u64 = 512;

/// Pages by task and address.
#[derive(Debug)]
pub struct Record {
    tasks: HashMap<TaskId, BTreeMap<u64, Group>>,
    kept: u64,
    most: u64,
}

/// The pages of an aligned 2 MiB; fresh and rewritten ones are kept ones.
#[derive(Debug)]
struct Group {
    kept: Bitmap,
    fresh: Bitmap,
    /// Written again after they were sent.
    rewritten: Bitmap,
}

impl Default for Group {
    fn default() -> Self {
        let none = Bitmap::clear(GROUP_PAGES);
        Self { kept: none.clone(), fresh: none.clone(), rewritten: none }
    }
}

impl Record {
    /// Nothing is kept; the destination keeps `most` pages at most.
    #[must_use]
    pub fn new(most: u64) -> Self {
        Self { tasks: HashMap::new(), kept: 0, most }
    }

    /// Pages that the destination keeps.
    #[must_use]
    pub const fn kept(&self) -> u64 {
        self.kept
    }

    /// What is kept of a task outside of `areas` (by ascending address) is dropped; all of it if its address space is another one.
    pub fn keep_within(&mut self, task: TaskId, starts_again: bool, areas: &[PageRun]) {
        let areas = if starts_again { &[] } else { areas };
        let Some(groups) = self.tasks.get_mut(&task) else { return };
        let mut dropped = 0;
        groups.retain(|&number, group| {
            let (start, end) = (number * GROUP_PAGES, (number + 1) * GROUP_PAGES);
            let first = areas.partition_point(|area| page_number(area.end()) <= start);
            let mut at = start;
            for area in areas[first..].iter().take_while(|area| page_number(area.start) < end) {
                dropped += group.drop_pages(at - start, page_number(area.start).max(at) - start);
                at = page_number(area.end()).min(end);
            }
            dropped += group.drop_pages(at - start, GROUP_PAGES);
            group.kept.run_in(0, GROUP_PAGES).is_some()
        });
        self.kept -= dropped;
    }

    /// What is kept of all other tasks is dropped.
    pub fn keep_tasks(&mut self, keep: impl Fn(TaskId) -> bool) {
        let kept = &mut self.kept;
        self.tasks.retain(|&task, groups| {
            let stays = keep(task);
            if !stays {
                *kept -= groups.values().map(|group| group.kept.count()).sum::<u64>();
            }
            stays
        });
    }

    /// These pages may have been written: what is kept of them is stale.
    pub fn written(&mut self, task: TaskId, run: PageRun) {
        self.in_groups(task, run, |group, start, end| {
            group.fresh.unset_range(start, end);
            let mut at = start;
            while let Some((first, behind)) = group.kept.run_in(at, end) {
                group.rewritten.set_range(first, behind);
                at = behind;
            }
        });
    }

    /// As [`Record::written`], where no round follows: it says nothing of how often a page is written.
    pub fn written_last(&mut self, task: TaskId, run: PageRun) {
        self.in_groups(task, run, |group, start, end| {
            group.fresh.unset_range(start, end);
        });
    }

    fn in_groups(&mut self, task: TaskId, run: PageRun, mut each: impl FnMut(&mut Group, u64, u64)) {
        let Some(groups) = self.tasks.get_mut(&task) else { return };
        for (number, start, end) in parts(run) {
            groups.get_mut(&number).into_iter().for_each(|group| each(group, start, end));
        }
    }

    /// Whether there is room for all of these pages.
    #[must_use]
    pub fn has_room(&self, task: TaskId, run: PageRun) -> bool {
        if self.kept + run.pages <= self.most {
            return true;
        }
        let groups = self.tasks.get(&task);
        let kept_of = |(number, start, end)| {
            groups
                .and_then(|groups| groups.get(&number))
                .map_or(0, |group| group.kept.count_range(start, end))
        };
        self.kept + run.pages - parts(run).map(kept_of).sum::<u64>() <= self.most
    }

    /// These pages were sent, as they were after the last scan.
    pub fn sent(&mut self, task: TaskId, run: PageRun) {
        let groups = self.tasks.entry(task).or_default();
        for (number, start, end) in parts(run) {
            let group = groups.entry(number).or_default();
            self.kept += group.kept.set_range(start, end);
            group.fresh.set_range(start, end);
        }
    }

    /// Which lazy pages are fresh.
    #[must_use]
    pub fn clean(&self, map: &LazyMap) -> Bitmap {
        self.lazy(map, |group| &group.fresh)
    }

    /// Which lazy pages were written again after they had been sent.
    #[must_use]
    pub fn rewritten(&self, map: &LazyMap) -> Bitmap {
        self.lazy(map, |group| &group.rewritten)
    }

    /// The lazy pages among those that `of` says.
    fn lazy(&self, map: &LazyMap, of: impl Fn(&Group) -> &Bitmap) -> Bitmap {
        let mut found = Bitmap::clear(map.pages());
        for task in map.tasks() {
            let Some(groups) = self.tasks.get(&task.id) else { continue };
            for lazy in &task.runs {
                let mut index = lazy.first;
                for (number, start, end) in parts(lazy.run) {
                    let mut at = start;
                    while let Some((first, behind)) =
                        groups.get(&number).and_then(|group| of(group).run_in(at, end))
                    {
                        found.set_range(index + first - start, index + behind - start);
                        at = behind;
                    }
                    index += end - start;
                }
            }
        }
        found
    }
}

impl Group {
    /// How many of these pages were kept.
    fn drop_pages(&mut self, start: u64, end: u64) -> u64 {
        self.fresh.unset_range(start, end);
        self.rewritten.unset_range(start, end);
        self.kept.unset_range(start, end)
    }
}

const fn page_number(address: ImageAddr) -> u64 {
    address.get() / PAGE_BYTES
}

/// A run by groups: the number of each, and which of its pages.
fn parts(run: PageRun) -> impl Iterator<Item = (u64, u64, u64)> {
    let (first, behind) = (page_number(run.start), page_number(run.start) + run.pages);
    (first / GROUP_PAGES..behind.div_ceil(GROUP_PAGES)).map(move |number| {
        let start = number * GROUP_PAGES;
        (number, first.max(start) - start, behind.min(start + GROUP_PAGES) - start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(page: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::containing(page << 12), pages).unwrap()
    }

    #[test]
    fn a_page_is_clean_from_its_copy_to_the_next_write() {
        let map = LazyMap::new([(TaskId(1), vec![run(510, 4), run(600, 1)]), (TaskId(2), vec![run(510, 2)])]);
        let map = map.unwrap();
        let mut record = Record::new(100);
        record.sent(TaskId(1), run(508, 5));
        record.sent(TaskId(2), run(511, 1));
        assert_eq!(record.clean(&map).bytes_from(0, 1), [0b0100_0111]);
        record.written(TaskId(1), run(511, 1));
        record.written(TaskId(1), run(600, 1));
        assert_eq!((record.clean(&map).count(), record.kept()), (3, 6), "stale, and kept");
        assert_eq!(
            record.rewritten(&map).bytes_from(0, 1),
            [0b0000_0010],
            "what was never sent is not rewritten"
        );
        record.sent(TaskId(1), run(511, 1));
        assert_eq!((record.clean(&map).count(), record.kept()), (4, 6));
        record.keep_within(TaskId(1), false, &[run(0, 509), run(512, 50)]);
        assert_eq!(record.clean(&map).bytes_from(0, 1), [0b0100_0100]);
        record.keep_within(TaskId(1), true, &[run(0, 900)]);
        assert_eq!(record.kept(), 1);
        record.keep_tasks(|task| task == TaskId(1));
        assert_eq!((record.clean(&map).count(), record.kept()), (0, 0));
    }

    #[test]
    fn what_is_kept_has_a_bound() {
        let mut record = Record::new(4);
        record.sent(TaskId(1), run(510, 3));
        assert!(record.has_room(TaskId(1), run(513, 1)) && !record.has_room(TaskId(1), run(513, 2)));
        assert!(record.has_room(TaskId(1), run(510, 4)), "three of them are there");
        assert!(!record.has_room(TaskId(2), run(510, 2)));
    }

    /// A step over pages 0 to 2047 of tasks 0 to 2.
    #[derive(Clone, Debug)]
    enum Step {
        Within(u32, bool, Vec<(u64, u64)>),
        Tasks(u32),
        Written(u32, u64, u64),
        Sent(u32, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let task = || 0u32..3;
        let gaps = prop::collection::vec((1u64..600, 1u64..600), 0..5);
        prop_oneof![
            (task(), prop::bool::weighted(0.1), gaps)
                .prop_map(|(t, again, gaps)| Step::Within(t, again, gaps)),
            task().prop_map(Step::Tasks),
            (task(), 0u64..2000, 1u64..700).prop_map(|(t, page, pages)| Step::Written(t, page, pages)),
            (task(), 0u64..2000, 1u64..257).prop_map(|(t, page, pages)| Step::Sent(t, page, pages)),
            (task(), 0u64..2000, 1u64..257).prop_map(|(t, page, pages)| Step::Sent(t, page, pages)),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_map_of_pages(steps in prop::collection::vec(step(), 1..40), most in 1u64..4000) {
            let mut record = Record::new(most);
            // By task and page: whether it is fresh.
            let mut model: BTreeMap<(u32, u64), bool> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Within(task, again, gaps) => {
                        let mut at = 0;
                        let areas: Vec<PageRun> = gaps.iter().map(|&(gap, pages)| {
                            let area = run(at + gap, pages);
                            at += gap + pages;
                            area
                        }).collect();
                        record.keep_within(TaskId(task), again, &areas);
                        let within = |page| areas.iter().any(|area| area.contains(run(page, 1).start));
                        model.retain(|&(of, page), _| of != task || !again && within(page));
                    }
                    Step::Tasks(gone) => {
                        record.keep_tasks(|task| task.0 != gone);
                        model.retain(|&(task, _), _| task != gone);
                    }
                    Step::Written(task, page, pages) => {
                        record.written(TaskId(task), run(page, pages));
                        for page in page..page + pages {
                            model.entry((task, page)).and_modify(|fresh| *fresh = false);
                        }
                    }
                    Step::Sent(task, page, pages) => {
                        let new = (page..page + pages).filter(|&page| !model.contains_key(&(task, page))).count();
                        let room = model.len() + new <= usize::try_from(most).unwrap();
                        prop_assert_eq!(record.has_room(TaskId(task), run(page, pages)), room);
                        if room {
                            record.sent(TaskId(task), run(page, pages));
                            model.extend((page..page + pages).map(|page| ((task, page), true)));
                        }
                    }
                }
                prop_assert_eq!(record.kept(), model.len() as u64);
                prop_assert!(record.kept() <= most);
            }
            let all = |task| (TaskId(task), vec![run(3, 700), run(703, 1), run(710, 3000)]);
            let map = LazyMap::new((0..3).map(all)).unwrap();
            let clean = record.clean(&map);
            for index in 0..map.pages() {
                let (task, at, _) = map.locate(index).unwrap();
                let fresh = model.get(&(task.0, page_number(at))).copied().unwrap_or(false);
                prop_assert_eq!(clean.get(index), fresh, "{} of {}", at, task);
            }
        }
    }
}
