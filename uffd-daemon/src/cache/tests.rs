//! The cache, and the lane that fills it, with a source that the test plays.

use super::*;
use crate::pages::{Arrival, Family, Installer, Origin, Resolution, Rest, What};
use kernel::uffd::{Install, Probe};
use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, TaskAddr};
use protocol::wire::frame::{Kind, encode_frame};
use protocol::wire::lz4::Compressor;
use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn run(page: u64, pages: u64) -> PageRun {
    PageRun::new(ImageAddr::containing(page << 12), pages).unwrap()
}

fn what(task: u32, page: u64, pages: u64) -> TaskRun {
    TaskRun { task: TaskId(task), run: run(page, pages) }
}

fn areas(task: u32, areas: &[(u64, u64)]) -> Areas {
    let areas = areas.iter().map(|(page, pages)| run(*page, *pages)).collect();
    Areas { task: TaskId(task), starts_again: false, areas }
}

fn round(number: u32) -> Round {
    Round { number, last: false }
}

fn put(cache: &mut PageCache, what: TaskRun, round: u64, content: u8) -> Result<(), CacheError> {
    cache.fill(what, round, |part| {
        part.fill(content);
        Ok(())
    })
}

fn map(tasks: &[(u32, &[(u64, u64)])]) -> LazyMap {
    let runs = |runs: &[(u64, u64)]| runs.iter().map(|(page, pages)| run(*page, *pages)).collect();
    LazyMap::new(tasks.iter().map(|(task, of)| (TaskId(*task), runs(of)))).unwrap()
}

#[test]
fn a_later_copy_replaces_an_earlier_one_and_takes_no_room() {
    let mut cache = PageCache::new(8);
    cache.areas(areas(1, &[(508, 8)])).unwrap();
    // Across the border of two chunks.
    put(&mut cache, what(1, 508, 8), 1, 7).unwrap();
    assert_eq!(cache.pages(), 8);
    cache.zero(what(1, 510, 4), 1).unwrap();
    put(&mut cache, what(1, 513, 1), 1, 9).unwrap();
    assert_eq!(cache.pages(), 8);
    let map = map(&[(1, &[(508, 8)])]);
    let (kept, _) = cache.into_clean(&map, &Bitmap::full(8)).unwrap();
    let contents: Vec<(u64, Option<u8>)> = contents(&kept[0], &map.tasks()[0]);
    let (seven, zero, nine) = (Some(7), None, Some(9));
    let expected = [seven, seven, zero, zero, zero, nine, seven, seven];
    assert_eq!(contents, (0..8).zip(expected).collect::<Vec<_>>());
}

fn contents(kept: &Kept, map: &protocol::lazy_map::TaskMap) -> Vec<(u64, Option<u8>)> {
    let (mut from, mut found) = (0, Vec::new());
    while let Some(run) = kept.run_in(map, from, map.pages) {
        let pages: Vec<Option<u8>> = match run.content {
            Content::Pages(bytes) => bytes.chunks(PAGE_SIZE).map(|page| Some(page[0])).collect(),
            Content::Zeros(pages) => (0..pages).map(|_| None).collect(),
        };
        from = run.first + run.content.pages();
        found.extend((run.first..).zip(pages));
    }
    found
}

#[test]
fn more_pages_than_were_offered_are_refused() {
    let mut cache = PageCache::new(3);
    cache.areas(areas(1, &[(510, 8)])).unwrap();
    cache.zero(what(1, 510, 2), 1).unwrap();
    put(&mut cache, what(1, 510, 3), 1, 1).unwrap();
    assert!(matches!(cache.zero(what(1, 513, 1), 1), Err(CacheError::TooManyPages(3))));
    // In the second of two chunks.
    let mut cache = PageCache::new(3);
    cache.areas(areas(1, &[(510, 8)])).unwrap();
    assert!(matches!(put(&mut cache, what(1, 510, 4), 1, 1), Err(CacheError::TooManyPages(3))));
}

#[test]
fn what_lies_outside_or_belongs_to_another_round_is_refused() {
    let mut cache = PageCache::new(100);
    assert!(matches!(cache.zero(what(1, 10, 1), 1), Err(CacheError::Outside { .. })), "no areas at all");
    cache.areas(areas(1, &[(10, 4), (14, 4), (30, 1)])).unwrap();
    for (page, pages) in [(9, 2), (13, 2), (17, 2), (29, 1), (31, 1), (1 << 40, 1)] {
        let outside = cache.zero(what(1, page, pages), 1);
        assert!(matches!(outside, Err(CacheError::Outside { .. })), "{pages} pages at {page}");
    }
    assert!(matches!(cache.zero(what(2, 10, 1), 1), Err(CacheError::Outside { .. })), "another task");
    for said in [0, 2] {
        let late = cache.zero(what(1, 10, 1), said);
        assert!(matches!(late, Err(CacheError::OutOfOrder { running: 1, .. })));
    }
    assert!(cache.end_round(round(2)).is_err());
    cache.end_round(round(1)).unwrap();
    assert!(cache.end_round(round(1)).is_err());
    assert_eq!(cache.pages(), 0);
}

#[test]
fn what_a_task_has_no_longer_is_dropped() {
    let mut cache = PageCache::new(5000);
    cache.areas(areas(1, &[(100, 2000)])).unwrap();
    cache.areas(areas(2, &[(100, 10)])).unwrap();
    cache.areas(areas(3, &[(100, 10)])).unwrap();
    for (task, pages) in [(1, 2000), (2, 10), (3, 10)] {
        put(&mut cache, what(task, 100, pages), 1, 1).unwrap();
    }
    cache.end_round(round(1)).unwrap();
    // Two stretches are left of the first, one of them in a chunk of which the rest goes; the second has another address
    // space, the third has ended.
    cache.areas(areas(1, &[(150, 10), (1500, 600)])).unwrap();
    cache.areas(Areas { starts_again: true, ..areas(2, &[(100, 10)]) }).unwrap();
    assert_eq!(cache.pages(), 610 + 10);
    cache.end_round(round(2)).unwrap();
    assert_eq!(cache.pages(), 610);
    let map = map(&[(1, &[(150, 10), (1500, 600)]), (2, &[(100, 10)])]);
    let (kept, _) = cache.into_clean(&map, &clean(&map, 0..610)).unwrap();
    assert_eq!(kept.iter().map(Kept::pages).collect::<Vec<_>>(), [610, 0]);
}

fn clean(map: &LazyMap, pages: std::ops::Range<u64>) -> Bitmap {
    let mut clean = Bitmap::clear(map.pages());
    clean.set_range(pages.start, pages.end);
    clean
}

#[test]
fn areas_are_bounded_over_all_tasks() {
    let many: Vec<(u64, u64)> = (0..65_536).map(|area| (2 * area, 1)).collect();
    let mut cache = PageCache::new(1);
    for task in 0..16 {
        cache.areas(areas(task, &many)).unwrap();
        cache.areas(areas(task, &many)).unwrap();
    }
    assert!(matches!(cache.areas(areas(16, &many[..1])), Err(CacheError::TooMany { what: "areas", .. })));
    let mut cache = PageCache::new(1);
    for task in 0..65_536 {
        cache.areas(areas(task, &[])).unwrap();
    }
    assert!(matches!(cache.areas(areas(70_000, &[])), Err(CacheError::TooMany { what: "tasks", .. })));
}

#[test]
fn a_clean_page_that_is_not_kept_is_named() {
    let mut cache = PageCache::new(10);
    cache.areas(areas(1, &[(508, 8)])).unwrap();
    put(&mut cache, what(1, 508, 6), 1, 1).unwrap();
    let map = map(&[(1, &[(508, 8)])]);
    let error = cache.into_clean(&map, &clean(&map, 3..7)).unwrap_err();
    let at = ImageAddr::containing(514 << 12);
    assert!(matches!(error, CacheError::NotKept { task: TaskId(1), at: found } if found == at), "{error}");
}

/// Pages from a place on, and what they are full of; zero pages are not.
type Put = (u64, u64, Option<u8>);

/// A kernel that notes what was installed.
#[derive(Clone, Default)]
struct Kernel(Rc<RefCell<Vec<Put>>>);

impl Installer for Kernel {
    fn copy(&self, at: TaskAddr, data: &[u8]) -> io::Result<Install> {
        let pages = (data.len() / PAGE_SIZE) as u64;
        self.0.borrow_mut().push((at.get() >> 12, pages, Some(data[0])));
        Ok(Install::Done { pages })
    }

    fn zero(&self, at: TaskAddr, bytes: u64) -> io::Result<Install> {
        self.0.borrow_mut().push((at.get() >> 12, bytes >> 12, None));
        Ok(Install::Done { pages: bytes >> 12 })
    }

    fn wake(&self, _: TaskAddr, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn probe(&self, _: TaskAddr) -> io::Result<Probe> {
        Ok(Probe::Unregistered)
    }
}

/// A family of 20 pages at 100, of which 4..16 are kept: those from 12 on as zeros, and 14 and 15 copied again.
fn family() -> (Family<Kernel>, Kernel) {
    let mut cache = PageCache::new(100);
    cache.areas(areas(1, &[(100, 20)])).unwrap();
    put(&mut cache, what(1, 104, 8), 1, 7).unwrap();
    cache.zero(what(1, 112, 4), 1).unwrap();
    cache.end_round(round(1)).unwrap();
    cache.areas(areas(1, &[(100, 20)])).unwrap();
    cache.zero(what(1, 114, 2), 2).unwrap();
    let map = map(&[(1, &[(100, 20)])]);
    let (mut kept, _) = cache.into_clean(&map, &clean(&map, 4..16)).unwrap();
    let mut family = Family::new(map.tasks()[0].clone());
    family.keep(kept.remove(0));
    (family, Kernel::default())
}

fn addr(page: u64) -> TaskAddr {
    TaskAddr::containing(page << 12)
}

#[test]
fn a_fault_on_a_kept_page_needs_no_source_wherever_it_is() {
    let (mut family, kernel) = family();
    let root = family.restored(kernel.clone());
    assert_eq!(family.fault(root, addr(103)), Resolution::Ask(3));
    assert_eq!(family.fault(root, addr(105)), Resolution::Kept(5));
    let child_kernel = Kernel::default();
    let child = family.forked(root, child_kernel.clone()).unwrap();
    assert_eq!(family.rest(root).unwrap(), Rest::AsRead);
    family.changed(root, What::Remapped { from: addr(104), to: addr(900), pages: 4 });
    assert_eq!(family.rest(root).unwrap(), Rest::AsRead);
    assert_eq!(family.fault(root, addr(901)), Resolution::Kept(5));
    assert_eq!(family.arrived_kept(5, 6).unwrap(), Arrival::Settled);
    assert_eq!(*kernel.0.borrow(), [(901, 1, Some(7))]);
    assert_eq!(*child_kernel.0.borrow(), [(105, 1, Some(7))]);
    assert_eq!(family.fault(child, addr(106)), Resolution::Kept(6));
    family.changed(child, What::Removed { start: addr(106), end: addr(107) });
    assert_eq!(family.fault(child, addr(106)), Resolution::Zero);
    assert_eq!(family.kept().unwrap().pages(), 11);
}

#[test]
fn everything_kept_is_installed_latest_copies_first_and_counted_once() {
    let (mut family, kernel) = family();
    let root = family.restored(kernel.clone());
    family.changed(root, What::Removed { start: addr(108), end: addr(110) });
    family.arrived(4, &[1; PAGE_SIZE], Origin::Push).unwrap();
    let mut order = Vec::new();
    while let Some(pages) = family.next_kept(0) {
        assert_eq!(family.arrived_kept(pages.start, pages.end).unwrap(), Arrival::Settled);
        order.push(pages);
    }
    assert_eq!(order, [14..20, 5..12, 12..20], "up to the end of a block, or of the task");
    let (seven, zero) = (Some(7), None);
    let installed = [(104, 1, Some(1)), (114, 2, zero), (105, 3, seven), (110, 2, seven), (112, 2, zero)];
    assert_eq!(*kernel.0.borrow(), installed);
    assert!(family.kept().is_none());
    let counts = family.counts();
    let came = (counts.demand, counts.push, counts.precopied, counts.zero);
    assert_eq!((came, counts.redundant), ((0, 1, 5, 4), 0));
    assert_eq!(family.remote_pages(), 8);
}

#[test]
fn kept_pages_are_never_asked_for() {
    let (mut family, kernel) = family();
    family.restored(kernel);
    let mut asked = Vec::new();
    let ahead = crate::prefetch::Ahead { first: 2, stride: 1, pages: 32 };
    family.ask_ahead(ahead, |first, run| asked.push(first..first + run.pages));
    assert_eq!(asked, [2..4, 16..20]);
    assert_eq!(family.next_to_fetch(0, 100).map(|(first, run)| first..first + run.pages), Some(0..2));
    assert_eq!(family.next_to_fetch(0, 100), None);
}

/// A lane, the source's end of it, and how far it is.
fn lane(most: u64) -> (PrecopyLane, Stream, Arc<PrecopyProgress>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let progress = Arc::new(PrecopyProgress::default());
    (PrecopyLane::new(Stream::Unix(ours), most, progress.clone()), Stream::Unix(theirs), progress)
}

fn precopy(number: u64, task: u32, page: u64, contents: &[u8]) -> Vec<u8> {
    let what = what(task, page, contents.len() as u64);
    let head = what.frame(Kind::Precopy, number, contents.len() * PAGE_SIZE);
    head.into_iter().chain(contents.iter().flat_map(|byte| [*byte; PAGE_SIZE])).collect()
}

/// As [`precopy`], compressed, for as many pages as it says.
fn packed(page: u64, pages: u64, contents: &[u8]) -> Vec<u8> {
    let data: Vec<u8> = contents.iter().flat_map(|byte| [*byte; PAGE_SIZE]).collect();
    let mut compressor = Compressor::default();
    let block = compressor.compress(&data).unwrap();
    let head = what(1, page, pages).frame(Kind::PrecopyLz4, 1, block.len());
    [&head[..], block].concat()
}

#[test]
fn compressed_pages_are_kept_as_they_were() {
    let (lane, source, _) = lane(100);
    source.send_all(&areas(1, &[(510, 20)]).encode(), false).unwrap();
    source.send_all(&packed(510, 4, &[1, 2, 3, 4]), false).unwrap();
    source.send_all(&packed(515, 1, &[5]), false).unwrap();
    source.send_all(&Round { number: 1, last: true }.encode(), false).unwrap();
    let (_, cache, _) = lane.run().unwrap();
    let map = map(&[(1, &[(510, 4), (515, 1)])]);
    let (kept, _) = cache.into_clean(&map, &Bitmap::full(5)).unwrap();
    let expected = [1, 2, 3, 4, 5].map(Some);
    assert_eq!(contents(&kept[0], &map.tasks()[0]), (0..5).zip(expected).collect::<Vec<_>>());
}

#[test]
fn rounds_are_received_and_answered() {
    let (lane, source, progress) = lane(100);
    let receiver = std::thread::spawn(move || lane.run());
    let answer = || {
        let mut frame = [0; 24];
        source.receive_all(&mut frame).unwrap();
        frame.to_vec()
    };
    let mut sent = 0;
    let mut send = |bytes: &[u8]| {
        sent += bytes.len() as u64;
        source.send_all(bytes, false).unwrap();
    };
    send(&areas(1, &[(510, 20)]).encode());
    send(&precopy(1, 1, 510, &[1, 2, 3, 4]));
    send(&what(1, 520, 2).frame(Kind::PrecopyZero, 1, 0));
    send(&round(1).encode());
    assert_eq!(answer(), round(1).encode());
    assert_eq!((progress.rounds.load(Ordering::Relaxed), progress.kept.load(Ordering::Relaxed)), (1, 6));
    send(&areas(1, &[(510, 20)]).encode());
    send(&precopy(2, 1, 511, &[9]));
    let last = Round { number: 2, last: true };
    send(&last.encode());
    let (stream, cache, round) = receiver.join().unwrap().unwrap();
    assert_eq!((round, cache.pages()), (last, 6));
    assert_eq!(progress.bytes.load(Ordering::Relaxed), sent);
    // Who brings up the rest answers it.
    stream.send_all(&round.encode(), false).unwrap();
    assert_eq!(answer(), last.encode());
    let map = map(&[(1, &[(510, 4), (520, 2)])]);
    let (kept, _) = cache.into_clean(&map, &Bitmap::full(6)).unwrap();
    let expected = [Some(1), Some(9), Some(3), Some(4), None, None];
    assert_eq!(contents(&kept[0], &map.tasks()[0]), (0..6).zip(expected).collect::<Vec<_>>());
}

#[test]
fn a_lane_that_misbehaves_ends_with_a_reason() {
    let named = areas(1, &[(510, 20)]).encode();
    let cut = &precopy(1, 1, 510, &[1])[..100];
    let other = what(1, 510, 1).frame(Kind::Pages, 1, PAGE_SIZE);
    for (frames, reason) in [
        (vec![], "closed the push lane"),
        (vec![&named[..], cut], "closed the push lane"),
        (vec![&precopy(1, 1, 510, &[1])], "lie in no area"),
        (vec![&named[..], &precopy(1, 1, 529, &[1, 2])], "lie in no area"),
        (vec![&named[..], &precopy(2, 1, 510, &[1])], "of round 2 in round 1"),
        (vec![&named[..], &precopy(1, 1, 510, &[1; 6])], "more than the 5 pages"),
        (vec![&named[..], &what(1, 510, 6).frame(Kind::PrecopyZero, 1, 0)], "more than the 5 pages"),
        (vec![&Round { number: 2, last: true }.encode()[..]], "of round 2 in round 1"),
        (vec![&named[..], &other], "frame kind on this lane"),
        (vec![&named[..], &packed(510, 3, &[1; 4])], "malformed"),
        (vec![&named[..], &packed(510, 5, &[1; 4])], "malformed"),
        (vec![&named[..], &packed(528, 4, &[1; 4])], "lie in no area"),
        (vec![&encode_frame(Kind::Areas, 0, &[0xff; 40])[..]], "malformed"),
        (vec![&[0xff; 64][..]], "malformed"),
    ] {
        let (lane, source, _) = lane(5);
        for frame in frames {
            source.send_all(frame, false).unwrap();
        }
        drop(source);
        let error = lane.run().unwrap_err().to_string();
        assert!(error.contains(reason), "{reason:?}: {error}");
    }
}
