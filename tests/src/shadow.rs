//! What a destination would have of a tree: copies of the pages that a tracker reports, checked against the tree itself,
//! which is stopped for it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use experiments::stamp::Options;
use experiments::workload::Files;
use nix::sys::signal::Signal;
use protocol::units::{ImageAddr, PAGE_BYTES, PAGE_SIZE, TaskId};
use source_server::process::{ProcessTree, Task, thread_state};
use source_server::track::{Pass, Round, Stop, Tracker, areas};

use crate::stamps::Stamp;
use crate::{STEP, eventually, processes};

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;
/// In an entry of the page map.
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

/// Copies, page by page.
#[derive(Debug, Default)]
pub struct Shadow {
    tasks: HashMap<TaskId, HashMap<u64, Box<[u8]>>>,
    /// What a look ahead has reported: nobody copies it, and the last scan need not report it.
    stale: HashMap<TaskId, HashSet<u64>>,
    room: Vec<u8>,
}

impl Shadow {
    /// One round: scans, and copies what is reported while the tree runs on.
    pub fn round(&mut self, tracker: &mut dyn Tracker, tree: &ProcessTree) -> Round {
        let round = tracker.scan(tree, Pass::Round);
        self.void(&round);
        self.room.resize(CHUNK, 0);
        for found in &round.tasks {
            let Ok(memory) = File::open(format!("/proc/{}/mem", found.pid)) else { continue };
            let copies = self.tasks.entry(found.task).or_default();
            for run in &found.runs {
                let mut done = 0;
                while done < run.pages.pages {
                    let start = run.pages.start.add(done);
                    let left = usize::try_from(run.pages.pages - done).expect("a count") * PAGE_SIZE;
                    let got = memory.read_at(&mut self.room[..left.min(CHUNK)], start.get()).unwrap_or(0);
                    let got = got - got % PAGE_SIZE;
                    tracker.copied(found.task, start, &self.room[..got]);
                    for (number, page) in (0..).zip(self.room[..got].chunks_exact(PAGE_SIZE)) {
                        copies.insert(start.add(number).get(), page.into());
                    }
                    if got == 0 {
                        copies.remove(&start.get());
                    }
                    done += ((got / PAGE_SIZE) as u64).max(1);
                }
            }
        }
        round
    }

    /// A look ahead, of a tree that runs on.
    pub fn look_ahead(&mut self, tracker: &mut dyn Tracker, tree: &ProcessTree) {
        let round = tracker.scan(tree, Pass::Ahead);
        self.void(&round);
        for found in &round.tasks {
            let pages =
                found.runs.iter().flat_map(|run| (0..run.pages.pages).map(|n| run.pages.start.add(n)));
            self.stale.entry(found.task).or_default().extend(pages.map(ImageAddr::get));
        }
    }

    /// The last scan of a tree that stands still. Every page that is there and was not reported must be what was copied;
    /// returns how many those are, and what the scan reported.
    ///
    /// # Panics
    /// If one is not.
    #[track_caller]
    pub fn check(&mut self, tracker: &mut dyn Tracker, tree: &ProcessTree) -> (u64, Round) {
        let last = tracker.scan(tree, Pass::Last);
        self.void(&last);
        let clean = tree.tasks.iter().map(|task| self.check_task(task, &last)).sum();
        (clean, last)
    }

    #[track_caller]
    fn check_task(&self, task: &Task, last: &Round) -> u64 {
        let Some(found) = last.tasks.iter().find(|found| found.pid == task.pid) else { return 0 };
        let memory = File::open(format!("/proc/{}/mem", task.pid)).expect("its memory");
        let (mut clean, mut wrong) = (0, Vec::new());
        let nothing = HashMap::new();
        let copies = self.tasks.get(&task.id).unwrap_or(&nothing);
        let is_stale = |page: u64| self.stale.get(&task.id).is_some_and(|stale| stale.contains(&page));
        for address in pages_there(task.pid) {
            let here = ImageAddr::containing(address);
            if found.runs.iter().any(|run| run.pages.contains(here)) || is_stale(address) {
                continue;
            }
            let mut page = [0; PAGE_SIZE];
            memory.read_exact_at(&mut page, address).expect("a page");
            clean += 1;
            match copies.get(&address) {
                Some(copy) if **copy == page => {}
                Some(_) => wrong.push(format!("{here}: another content")),
                None => wrong.push(format!("{here}: never copied")),
            }
        }
        assert!(
            wrong.is_empty(),
            "task {}: {} of {clean} clean pages are wrong: {:?}",
            task.pid,
            wrong.len(),
            &wrong[..wrong.len().min(10)]
        );
        clean
    }

    fn void(&mut self, round: &Round) {
        for task in round.tasks.iter().filter(|task| task.starts_again) {
            self.tasks.remove(&task.task);
        }
    }
}

/// Rounds over a workload of `mib` with its files in `dir`, which writes, maps, unmaps, moves, drops and forks all the time.
///
/// # Panics
/// If a page that was written is missing.
#[track_caller]
pub fn churn(dir: &Path, tracker: &mut dyn Tracker, mib: usize, processes: u16, rounds: u32) -> Vec<Stop> {
    let files = Files::in_dir(dir, "stamp");
    let options =
        Options { mib, threads: 3, churn: true, fork: true, tree: processes, ..Options::new(files) };
    let mut stamp = Stamp::start(&options);
    let mut shadow = Shadow::default();
    let mut stops = Vec::new();
    let mut pages = Vec::new();
    for _ in 0..rounds {
        let round = shadow.round(tracker, &ProcessTree::of(stamp.pid()).expect("a tree"));
        pages.push(round.pages());
        stops.extend(round.stops);
        stamp.wait_ops(1000);
    }
    shadow.look_ahead(tracker, &ProcessTree::of(stamp.pid()).expect("a tree"));
    let frozen = stop(stamp.pid());
    let (clean, last) = shadow.check(tracker, &frozen);
    println!("{}: rounds {pages:?}, last {} written, {clean} clean", tracker.method(), last.pages());
    assert!(clean > 0, "everything was written: nothing was compared");
    go_on(&frozen);
    stamp.assert_unharmed();
    stamp.quit();
    stops
}

/// The pages of one area that a round reports, by number.
#[must_use]
pub fn reported(round: &Round, start: u64, pages: u64) -> BTreeSet<u64> {
    let runs = round.tasks.iter().flat_map(|task| &task.runs);
    let found = runs.flat_map(|run| (0..run.pages.pages).map(|page| run.pages.start.add(page).get()));
    let area = start..start + pages * PAGE_BYTES;
    found.filter(|page| area.contains(page)).map(|page| (page - start) / PAGE_BYTES).collect()
}

/// The pages of a process that are there, in areas that can be lazy.
///
/// # Panics
/// If they cannot be listed.
#[must_use]
pub fn pages_there(pid: u32) -> Vec<u64> {
    let map = File::open(format!("/proc/{pid}/pagemap")).expect("a page map");
    let mut pages = Vec::new();
    for area in areas::of(pid).expect("areas") {
        let mut entries = vec![0; usize::try_from(area.pages).expect("an area") * 8];
        map.read_exact_at(&mut entries, area.start.get() / PAGE_BYTES * 8).expect("entries of the page map");
        let entries =
            entries.chunks_exact(8).map(|entry| u64::from_ne_bytes(entry.try_into().expect("8 bytes")));
        let there = (0..).zip(entries).filter(|(_, entry)| entry & PRESENT_OR_SWAPPED != 0);
        pages.extend(there.map(|(page, _)| area.start.add(page).get()));
    }
    pages
}

/// Stops a tree as a whole, with what it forks meanwhile.
///
/// # Panics
/// If it does not stop.
#[track_caller]
#[must_use]
pub fn stop(root: u32) -> ProcessTree {
    eventually("the tree stopped", STEP, || {
        let tree = ProcessTree::of(root).ok()?;
        for task in tree.tasks.iter().filter(|task| !processes::has_ended(task.pid)) {
            let _ = task.handle.signal(Signal::SIGSTOP as i32);
        }
        let stands = |pid: u32| {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let mut threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
            threads.all(|tid: u32| matches!(thread_state(pid, tid), Err(_) | Ok('T' | 'Z' | 'X')))
        };
        let all = tree.tasks.iter().all(|task| stands(task.pid));
        let pids = |tree: &ProcessTree| tree.tasks.iter().map(|task| task.pid).collect::<BTreeSet<_>>();
        let again = ProcessTree::of(root).ok()?;
        (all && pids(&tree) == pids(&again)).then_some(again)
    })
}

/// Lets a stopped tree go on.
pub fn go_on(tree: &ProcessTree) {
    for task in &tree.tasks {
        let _ = task.handle.signal(Signal::SIGCONT as i32);
    }
}
