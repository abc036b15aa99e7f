//! Pages that were copied ahead, over a userfaultfd of this process: the fault loop and the thread in the background install them,
//! nobody is asked for them, and they take memory once. And in a move whose source is lost.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use experiments::stamp::Options;
use host::mailbox::{Mailbox, mailbox};
use host::waiting::readable_within;
use kernel::arena::{Region, WORDS_PER_PAGE};
use kernel::uffd::{FEATURES_OF_CRIU, Uffd};
use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{ImageAddr, PageRun, TaskId};
use protocol::wire::frame::TaskRun;
use protocol::wire::precopy::Areas;
use tests::moves::{Ended, Plan};
use tests::proxy::Proxy;
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP};
use uffd_daemon::cache::{Installing, Milestone, PageCache, Unneeded};
use uffd_daemon::fault::{Command, FaultLoop, Notice, latency_histogram};
use uffd_daemon::inflight::Purpose;
use uffd_daemon::latency;
use uffd_daemon::tree::Tree;
use uffd_daemon::upstream::{Answer, Upstream, UpstreamError};

const TASK: TaskId = TaskId(7);

/// Which pages of 16 hold zeros, and which were written since they were copied.
const ZEROS: usize = 3;
const STALE: usize = 5;

/// Memory of this process whose pages are missing, and a tree that knows most of them.
///
/// The region comes last: while a userfaultfd is open nobody reads, unmapping waits.
struct Moved {
    tree: Arc<Tree>,
    unneeded: Unneeded,
    uffd: Uffd,
    region: Region,
    /// What was cut off it.
    behind: Option<Region>,
}

fn content(page: usize) -> u64 {
    let byte = u64::try_from(page % 250 + 1).unwrap();
    if page % 16 == ZEROS { 0 } else { byte * 0x0101_0101_0101_0101 }
}

impl Moved {
    fn new(pages: usize) -> Self {
        let region = Region::anonymous(pages).unwrap();
        let uffd = Uffd::create(FEATURES_OF_CRIU, false).unwrap();
        let (start, count) = (region.address() as u64, pages as u64);
        uffd.register_missing(start, count << 12).unwrap();
        let at =
            |page: u64, pages: u64| PageRun::new(ImageAddr::containing(start + (page << 12)), pages).unwrap();
        let map = LazyMap::new([(TASK, vec![at(0, count)])]).unwrap();
        let mut cache = PageCache::new(count);
        cache.areas(Areas { task: TASK, starts_again: false, areas: vec![at(0, count)] }).unwrap();
        let mut clean = Bitmap::full(count);
        for page in 0..pages {
            let what = TaskRun { task: TASK, run: at(page as u64, 1) };
            if page % 16 == ZEROS {
                cache.zero(what, 1).unwrap();
                continue;
            }
            let fill = |bytes: &mut [u8]| {
                bytes.fill(content(page).to_le_bytes()[0]);
                Ok(())
            };
            cache.fill(what, 1, fill).unwrap();
            if page % 16 == STALE {
                clean.unset(page as u64);
            }
        }
        let tree = Tree::new(&map);
        let (kept, unneeded) = cache.into_clean(&map, &clean).unwrap();
        tree.keep(kept);
        Self { tree, unneeded, uffd, region, behind: None }
    }

    /// Makes two areas of the kernel's one, as any `mprotect` or `madvise` does that is about some of its pages.
    fn cut(&mut self, at: usize) {
        let behind = self.region.split_off(at);
        behind.prefer_huge_pages().unwrap();
        self.behind = Some(behind);
    }

    #[track_caller]
    fn assert_right(&self, page: usize) {
        let first = page.checked_sub(self.behind.as_ref().map_or(usize::MAX, |behind| {
            (behind.address() - self.region.address()) / size_of::<[u64; WORDS_PER_PAGE]>()
        }));
        let words = match (&self.behind, first) {
            (Some(behind), Some(page)) => behind.page(page),
            _ => self.region.page(page),
        };
        let right = [0, 1, WORDS_PER_PAGE - 1].iter().all(|word| words[*word].load(Relaxed) == content(page));
        assert!(right, "page {page} is wrong");
    }
}

fn clean_pages(pages: usize) -> impl Iterator<Item = usize> {
    (0..pages).filter(|page| page % 16 != STALE)
}

/// The most memory that this process has had since the last call, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

#[track_caller]
fn wait_all(milestones: &Mailbox<Milestone>) {
    loop {
        assert!(readable_within(milestones.as_fd(), STEP).unwrap(), "it does not come to its end");
        match milestones.empty().pop() {
            Some(Milestone::All) => return,
            Some(Milestone::Broken(error)) => panic!("{error}"),
            Some(Milestone::Hot) | None => {}
        }
    }
}

#[test]
fn everything_clean_is_installed_and_takes_memory_once() {
    const PAGES: usize = 32 << 8;
    let Some(_site) = Site::new() else { return };
    let mut moved = Moved::new(PAGES);
    drop(std::mem::take(&mut moved.unneeded));
    peak_kib();
    let before = peak_kib();
    let uffd = Arc::new(moved.uffd.as_fd().try_clone_to_owned().unwrap().into());
    let installing = Installing::start(moved.tree.clone(), Unneeded::default(), true).unwrap();
    // Neither before it may, nor before there is somewhere to install.
    assert!(!readable_within(installing.milestones.as_fd(), std::time::Duration::from_millis(50)).unwrap());
    installing.begin();
    moved.tree.lock(0).restored(uffd);
    wait_all(&installing.milestones);
    let grown = peak_kib().saturating_sub(before) >> 10;
    assert!(grown < 4, "{grown} MiB more than what was kept");
    for page in clean_pages(PAGES) {
        moved.assert_right(page);
    }
    assert_eq!(moved.tree.kept_pages(), 0);
    assert_eq!(moved.tree.remote_pages(), PAGES as u64 / 16);
    let counts = moved.tree.counts();
    let (zero, precopied) = (PAGES as u64 / 16, PAGES as u64 / 16 * 14);
    assert_eq!((counts.zero, counts.precopied, counts.demand, counts.push), (zero, precopied, 0, 0));
    assert!(moved.tree.settled_at().is_none());
}

#[test]
fn an_area_that_was_cut_without_an_event_is_filled_across_the_cut() {
    const PAGES: usize = 64;
    let Some(_site) = Site::new() else { return };
    let mut moved = Moved::new(PAGES);
    // Between two pages that were kept together.
    moved.cut(11);
    let uffd = Arc::new(moved.uffd.as_fd().try_clone_to_owned().unwrap().into());
    let installing = Installing::start(moved.tree.clone(), Unneeded::default(), true).unwrap();
    moved.tree.lock(0).restored(uffd);
    installing.begin();
    wait_all(&installing.milestones);
    let counts = moved.tree.counts();
    assert_eq!(
        (counts.precopied, counts.zero),
        (PAGES as u64 / 16 * 14, PAGES as u64 / 16),
        "none was given up"
    );
    for page in clean_pages(PAGES) {
        moved.assert_right(page);
    }
}

#[test]
fn installing_ends_when_it_is_told_to() {
    let Some(_site) = Site::new() else { return };
    let moved = Moved::new(512);
    for begun in [false, true] {
        let installing = Installing::start(moved.tree.clone(), Unneeded::default(), true).unwrap();
        if begun {
            installing.begin();
        }
        // Nothing was handed over: there is nowhere to install.
        drop(installing);
        assert_eq!(moved.tree.kept_pages(), 512 / 16 * 15);
    }
}

/// A source that is never asked for anything that is here.
struct Source(Arc<Mutex<Vec<PageRun>>>);

impl Upstream for Source {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn ask(&mut self, _: u64, _: Purpose, _: TaskId, run: PageRun) -> Result<(), UpstreamError> {
        self.0.lock().unwrap().push(run);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), UpstreamError> {
        Ok(())
    }

    fn wants_write(&self) -> bool {
        false
    }

    fn answers(&mut self, _: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        Ok(())
    }

    fn background(&self) -> Option<(u64, u64)> {
        None
    }

    fn finish(&mut self) -> Result<(), UpstreamError> {
        Ok(())
    }
}

#[test]
fn faults_on_what_is_kept_are_resolved_without_the_source() {
    const PAGES: usize = 4096;
    let Some(_site) = Site::new() else { return };
    let moved = Moved::new(PAGES);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (commands, orders) = mailbox().unwrap();
    let (post, notices) = mailbox::<Notice>().unwrap();
    let latency = latency_histogram();
    let fault_loop =
        FaultLoop::new(moved.tree.clone(), Some(Source(asked.clone())), orders, post, None, latency.clone());
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| drop(fault_loop.run()));
        let uffd = Arc::new(Uffd::from(moved.uffd.as_fd().try_clone_to_owned().unwrap()));
        commands.send(Command::Serve { family: 0, uffd });
        // Readers that come from both sides, while everything is installed.
        let installing = Installing::start(moved.tree.clone(), Unneeded::default(), true).unwrap();
        installing.begin();
        let forth = scope.spawn(|| clean_pages(PAGES).for_each(|page| moved.assert_right(page)));
        let mut back: Vec<usize> = clean_pages(PAGES).collect();
        back.reverse();
        back.into_iter().for_each(|page| moved.assert_right(page));
        forth.join().unwrap();
        wait_all(&installing.milestones);
        commands.send(Command::Stop);
        serving.join().unwrap();
    });
    assert!(notices.empty().is_empty(), "something broke, or is settled");
    assert_eq!(*asked.lock().unwrap(), []);
    assert_eq!(latency::summary(&latency).count, 0);
    assert!(moved.tree.local_faults.load(Relaxed) > 0);
    let counts = moved.tree.counts();
    assert_eq!((counts.zero + counts.precopied, moved.tree.kept_pages()), (PAGES as u64 / 16 * 15, 0));
}

#[test]
fn what_is_kept_is_installed_although_the_source_is_lost() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&Options { rate_us: 500, ..stamps::small(&site, 128) });
    let plan = Plan::new().source(["--precopy-rounds", "1", "--push-rate", "off"]);
    let destination = plan.serve(&site);
    let line = Proxy::to(&destination.address);
    let source = plan.source_to(&site, stamp.pid(), line.address());
    for tool in [&source.tool, &destination.tool] {
        tool.wait_line("phase=\"push\"", STEP);
    }
    stamp.give_up();
    line.cut();
    let ended = Ended { source: source.wait(MOVE), destination: destination.wait(STEP) };
    ended.assert_paused();
    let said = ended.source.said();
    let clean = said.split_whitespace().find_map(|word| word.strip_prefix("clean=")).expect("a last scan");
    let clean: u64 = clean.parse().unwrap();
    let pages = ended.destination.report().pages;
    assert!(clean > 0, "{said}");
    assert_eq!(pages.precopied + pages.zero, clean, "{pages:?}");
    assert_eq!(stamp.wrong_lines(), Vec::<String>::new());
}
