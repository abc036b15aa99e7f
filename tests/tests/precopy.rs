//! The source's half of pre-copy without a move: rounds over a tree that works, received by the test. What the source
//! takes for clean in the end is what the tree has, page by page.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{ScopedJoinHandle, scope};

use experiments::stamp::Options;
use protocol::lazy_map::LazyMap;
use protocol::link::Stream;
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun};
use source_server::lanes::Pace;
use source_server::precopy::compression::Compress;
use source_server::precopy::policy::Rounds;
use source_server::precopy::rounds::{Plan, RoundsError, Shared, run};
use source_server::precopy::{Copied, LastScan, most_pages};
use source_server::process::{ProcessTree, Task};
use source_server::track::Tracker;
use source_server::track::content::Content;
use tests::receiver::Kept;
use tests::shadow::{go_on, pages_there, stop};
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::subject::{Appearance, Subject};
use tests::trackers::write_protect;
use tests::{STEP, eventually, processes};

fn plan(root: u32, rounds: &str) -> Plan {
    let tree = ProcessTree::of(root).unwrap();
    let most_pages = most_pages(tree.memory_bytes());
    Plan {
        root,
        rounds: rounds.parse().unwrap(),
        pace: Pace::Unlimited,
        most_pages,
        compress: Compress::Auto,
    }
}

/// Rounds, received by a thread that closes the lane after so many.
fn copy(
    plan: &Plan,
    tracker: Box<dyn Tracker>,
    shared: &Shared,
    rounds: usize,
) -> (Result<Copied, RoundsError>, anyhow::Result<Kept>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (ours, theirs) = (Stream::Unix(ours), Stream::Unix(theirs));
    let tree = ProcessTree::of(plan.root).unwrap();
    scope(|scope| {
        let receiver: ScopedJoinHandle<'_, _> = scope.spawn(|| {
            let kept = Kept::receive(&theirs, rounds);
            // What the source still sends goes nowhere, and it must not wait.
            theirs.shutdown();
            kept
        });
        let copied = run(plan, tracker, &tree, &ours, shared);
        ours.shutdown();
        (copied, receiver.join().unwrap())
    })
}

fn live(tree: &ProcessTree) -> impl Iterator<Item = &Task> {
    tree.tasks.iter().filter(|task| !processes::has_ended(task.pid))
}

/// The pages of a tree that are there, as if all of them were lazy.
fn lazy_map(tree: &ProcessTree) -> LazyMap {
    let runs = |pid| {
        let mut runs: Vec<PageRun> = Vec::new();
        for at in pages_there(pid) {
            match runs.last_mut() {
                Some(last) if last.end().get() == at => last.pages += 1,
                _ => runs.extend(PageRun::new(ImageAddr::containing(at), 1)),
            }
        }
        runs
    };
    LazyMap::new(live(tree).map(|task| (task.id, runs(task.pid)))).unwrap()
}

/// The last scan; every page that it calls clean is looked at.
#[track_caller]
fn check(copied: &mut Copied, kept: &Kept, tree: &ProcessTree) -> (LazyMap, LastScan) {
    let map = lazy_map(tree);
    let last = copied.last_scan(tree, &map);
    let mut wrong = Vec::new();
    for task in live(tree) {
        let memory = File::open(format!("/proc/{}/mem", task.pid)).unwrap();
        let lazy = map.task(task.id).unwrap();
        for index in (lazy.first..lazy.first + lazy.pages).filter(|index| last.clean.get(*index)) {
            let at = lazy.locate(index).unwrap().0;
            let mut page = [0; PAGE_SIZE];
            memory.read_exact_at(&mut page, at.get()).unwrap();
            match kept.pages.get(&task.id).and_then(|pages| pages.get(&at.get())) {
                Some(copy) if **copy == page => {}
                Some(_) => wrong.push(format!("{at} of {}: another content", task.id)),
                None => wrong.push(format!("{at} of {}: never came", task.id)),
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong: {:?}", wrong.len(), &wrong[..wrong.len().min(10)]);
    (map, last)
}

#[track_caller]
fn assert_untracked(pid: u32) {
    let now = Appearance::of(pid);
    assert!(!now.is_armed() && !now.is_traced() && !now.has_descriptor("userfaultfd"), "{now:?}");
}

fn busy(site: &Site, processes: u16) -> Options {
    Options {
        mib: 48,
        threads: 2,
        churn: true,
        fork: true,
        tree: processes,
        ..stamps::options(site, "stamp")
    }
}

/// Rounds over a workload that writes, maps, unmaps, moves, drops and forks all the time.
fn churn(tracker: Box<dyn Tracker>, processes: u16, rounds: &str) {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&busy(&site, processes));
    let plan = plan(stamp.pid(), rounds);
    let shared = Shared::default();
    let (copied, kept) = copy(&plan, tracker, &shared, usize::MAX);
    // If the rounds failed, this is why; the receiver only knows that its link has ended.
    let mut copied = copied.unwrap_or_else(|error| panic!("{error:?}: {:#?}", stamp.wrong_lines()));
    let kept = kept.unwrap();
    if let Rounds::Exactly(asked) = plan.rounds {
        assert_eq!(kept.rounds.len(), asked.get() as usize);
    }
    assert_eq!(shared.status().bytes, kept.bytes);
    assert!(kept.most as u64 <= plan.most_pages);
    let frozen = stop(stamp.pid());
    let (map, last) = check(&mut copied, &kept, &frozen);
    println!(
        "{rounds} rounds of {:?} pages; {} of {} clean, {} written",
        kept.rounds,
        last.clean.count(),
        map.pages(),
        last.written
    );
    assert!(last.clean.count() > 0, "everything was written: nothing was compared");
    assert!(last.clean.count() + last.written <= map.pages());
    go_on(&frozen);
    drop(copied);
    assert_untracked(stamp.pid());
    stamp.assert_unharmed();
    stamp.quit();
}

#[test]
fn clean_pages_are_what_the_tree_has() {
    let times = if tests::long() { 10 } else { 1 };
    for _ in 0..times {
        for (processes, rounds) in [(1, "1"), (1, "3"), (3, "2"), (1, "auto")] {
            let Some(tracker) = write_protect() else { return };
            churn(tracker, processes, rounds);
        }
    }
}

#[test]
fn clean_pages_are_what_the_tree_has_by_content() {
    if write_protect().is_some() {
        churn(Box::<Content>::default(), 2, "2");
    }
}

#[test]
fn of_an_idle_process_everything_is_clean_but_what_was_written() {
    let Some(tracker) = write_protect() else { return };
    let mut subject = Subject::start(&["memory"], None);
    let start = subject.order("map 4096");
    let every: Vec<String> = (0..4096).map(|page: u64| page.to_string()).collect();
    subject.order(&format!("write 0 {}", every.join(" ")));
    subject.wait_asleep("memory");
    let (copied, kept) = copy(&plan(subject.pid(), "auto"), tracker, &Shared::default(), usize::MAX);
    let (mut copied, kept) = (copied.unwrap(), kept.unwrap());
    assert_eq!(kept.rounds.len(), 2, "nothing is written: {:?}", kept.rounds);
    subject.order("write 0 7 8 1000");
    subject.wait_asleep("memory");
    let frozen = stop(subject.pid());
    let (map, last) = check(&mut copied, &kept, &frozen);
    let lazy = map.task(frozen.root().id).unwrap();
    let stale = (0..4096).filter(|page| {
        let at = ImageAddr::containing(start).add(*page);
        !last.clean.get(lazy.index_of(at).unwrap())
    });
    assert_eq!(stale.collect::<Vec<_>>(), [7, 8, 1000]);
    go_on(&frozen);
}

#[test]
fn the_destination_keeps_no_more_than_it_was_asked_to() {
    let Some(tracker) = write_protect() else { return };
    let mut subject = Subject::start(&["memory"], None);
    subject.order("map 4096");
    let every: Vec<String> = (0..4096).map(|page: u64| page.to_string()).collect();
    subject.order(&format!("write 0 {}", every.join(" ")));
    let plan = Plan { most_pages: 1000, ..plan(subject.pid(), "3") };
    let (copied, kept) = copy(&plan, tracker, &Shared::default(), usize::MAX);
    let (mut copied, kept) = (copied.unwrap(), kept.unwrap());
    assert!(kept.most <= 1000 && kept.most > 500, "{}", kept.most);
    let frozen = stop(subject.pid());
    let (_, last) = check(&mut copied, &kept, &frozen);
    assert!(last.clean.count() <= 1000);
    go_on(&frozen);
}

#[test]
fn called_off_in_the_middle_the_task_is_as_it_was() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&stamps::small(&site, 16));
    // At this pace the first round takes minutes.
    let slow = Plan { pace: Pace::BytesPerSecond(64 << 10), ..plan(stamp.pid(), "2") };
    let shared = Shared::default();
    scope(|scope| {
        let Some(tracker) = write_protect() else { return };
        let copying = scope.spawn(|| copy(&slow, tracker, &shared, usize::MAX).0);
        eventually("pages sent", STEP, || (shared.status().sent > 0).then_some(()));
        assert!(Appearance::of(slow.root).is_armed());
        shared.stop.store(true, Relaxed);
        assert!(matches!(copying.join().unwrap(), Err(RoundsError::Stopped)));
    });
    assert_untracked(stamp.pid());
    // A lane that ends.
    for rounds in [1, 2] {
        let Some(tracker) = write_protect() else { return };
        let (copied, kept) = copy(&plan(stamp.pid(), "5"), tracker, &Shared::default(), rounds);
        assert!(matches!(copied, Err(RoundsError::Lane(_))), "{copied:?}");
        assert_eq!(kept.unwrap().rounds.len(), rounds);
        assert_untracked(stamp.pid());
    }
    stamp.assert_unharmed();
    stamp.quit();
}

#[test]
fn a_process_that_ends_meanwhile() {
    let Some(tracker) = write_protect() else { return };
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let plan = Plan { pace: Pace::BytesPerSecond(256 << 10), ..plan(child.id(), "50") };
    let shared = Shared::default();
    let copied = scope(|scope| {
        let copying = scope.spawn(|| copy(&plan, tracker, &shared, usize::MAX).0);
        eventually("a round", STEP, || (shared.status().round > 0).then_some(()));
        child.kill().unwrap();
        copying.join().unwrap()
    });
    child.wait().unwrap();
    assert!(matches!(copied, Err(RoundsError::Ended(_))), "{copied:?}");
}
