//! Many moves at once into one daemon, and many threads that fault at once: each page is right, what it costs stays within
//! what is stated here, and a move that fails disturbs no other.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::scope;
use std::time::Duration;

use experiments::stamp::Options;
use tests::accounts::Memory;
use tests::moves::{Plan, Source};
use tests::site::Site;
use tests::stamps::{self, Stamp, move_once};
use tests::{MOVE, processes};

/// Descriptors of the daemon for each move: connections, mailboxes, userfaultfds, the restore, the keeper.
const DESCRIPTORS_OF_A_MOVE: usize = 48;
/// Descriptors of one that has nothing to do.
const DESCRIPTORS: usize = 32;
/// Memory of the daemon for each move: the buffers of its lanes, and bookkeeping.
const MIB_OF_A_MOVE: u64 = 4;
/// Memory of one that has nothing to do.
const MIB: u64 = 32;

/// Descriptors of either program for each process of a tree: its userfaultfd, and the pipes that its pages wait in.
const DESCRIPTORS_OF_A_TASK: usize = 8;
/// Memory of either program for each process of a tree.
const KIB_OF_A_TASK: u64 = 128;

/// The most that a process had at any time.
#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    descriptors: usize,
    rss_mib: u64,
}

impl Peak {
    /// Looks at a process until it is told to stop.
    fn watch(pid: u32, stop: &AtomicBool) -> Self {
        let mut peak = Self::default();
        while !stop.load(Relaxed) {
            let open = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
            peak.descriptors = peak.descriptors.max(open);
            // It may have ended.
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            peak.rss_mib = peak.rss_mib.max(kib.unwrap_or(0) >> 10);
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    }
}

#[test]
fn many_moves_at_once_into_one_daemon() {
    let count = if tests::long() { 64 } else { 8 };
    let Some(site) = Site::new() else { return };
    let plan = Plan { keep_serving: true, ..Plan::new() };
    let destination = plan.serve(&site);
    let mut crowd: Vec<Stamp> = (0..count)
        .map(|number| {
            let name = format!("crowd-{number}");
            let options = Options { mib: 8, threads: 1, rate_us: 5000, ..stamps::options(&site, &name) };
            Stamp::start(&options)
        })
        .collect();
    let failing = plan.clone().source_hook("post-dump", "exit 7");
    let (stop, daemon) = (AtomicBool::new(false), destination.tool.pid());
    let (sides, peak) = scope(|scope| {
        let watch = scope.spawn(|| Peak::watch(daemon, &stop));
        let start = |(number, stamp): (usize, &Stamp)| {
            let plan = if number == count / 2 { &failing } else { &plan };
            plan.source_to(&site, stamp.pid(), &destination.address)
        };
        let sources: Vec<Source> = crowd.iter().enumerate().map(start).collect();
        let sides: Vec<_> = sources.into_iter().map(|source| source.wait(MOVE)).collect();
        stop.store(true, Relaxed);
        (sides, watch.join().unwrap())
    });
    println!("{count} moves: {peak:?}");
    for (number, (side, stamp)) in sides.iter().zip(&mut crowd).enumerate() {
        if number == count / 2 {
            side.assert(1, "rolled_back", &["exit status: 7"]);
        } else {
            side.assert(0, "released", &[]);
            stamp.mark_moved();
        }
        stamp.assert_unharmed();
        assert_eq!(stamp.assert_ran_in_turn(), number != count / 2);
    }
    assert!(peak.descriptors <= DESCRIPTORS + count * DESCRIPTORS_OF_A_MOVE, "{peak:?}");
    assert!(peak.rss_mib <= MIB + count as u64 * MIB_OF_A_MOVE, "{peak:?}");
    // It gives back what it had for them.
    let left = || fs::read_dir(format!("/proc/{daemon}/fd")).map_or(0, Iterator::count);
    tests::eventually("descriptors that are given back", tests::STEP, || {
        (left() <= DESCRIPTORS).then_some(())
    });
    crowd.into_iter().for_each(Stamp::quit);
    processes::signal(daemon, nix::sys::signal::Signal::SIGTERM);
    assert_eq!(destination.wait(MOVE).status, 0);
    site.assert_clean(&[]);
}

#[test]
fn many_processes_in_one_tree() {
    let Some(site) = Site::new() else { return };
    let tree: u16 = if tests::long() { 256 } else { 32 };
    // Together they do as much, however many they are.
    let (count, rate_us) = (usize::from(tree), 625 * u64::from(tree));
    let options = Options { mib: 1, threads: 1, rate_us, tree, ..stamps::options(&site, "processes") };
    let mut stamp = Stamp::start(&options);
    let plan = Plan::new().source(["--push-rate", "64M"]);
    let destination = plan.serve(&site);
    let source = plan.source_to(&site, stamp.pid(), &destination.address);
    let (stop, daemon, server) = (AtomicBool::new(false), destination.tool.pid(), source.tool.pid());
    let (source, destination, peaks) = scope(|scope| {
        let watches = [daemon, server].map(|pid| {
            let stop = &stop;
            scope.spawn(move || Peak::watch(pid, stop))
        });
        let (source, destination) = (source.wait(MOVE), destination.wait(MOVE));
        stop.store(true, Relaxed);
        (source, destination, watches.map(|watch| watch.join().unwrap()))
    });
    println!("{count} processes: daemon {:?}, source {:?}", peaks[0], peaks[1]);
    source.assert(0, "released", &[]);
    destination.assert(0, "released", &[]);
    assert_eq!(source.report().tasks.len(), count);
    stamp.mark_moved();
    stamp.assert_unharmed();
    assert!(stamp.assert_ran_in_turn());
    stamp.quit();
    for peak in peaks {
        assert!(
            peak.descriptors <= DESCRIPTORS + DESCRIPTORS_OF_A_MOVE + count * DESCRIPTORS_OF_A_TASK,
            "{peak:?}"
        );
        assert!(peak.rss_mib <= MIB + MIB_OF_A_MOVE + count as u64 * KIB_OF_A_TASK / 1024, "{peak:?}");
    }
    site.assert_clean(&[]);
}

#[test]
fn hundreds_of_threads_that_fault_at_once() {
    let threads = if tests::long() { 500 } else { 100 };
    let Some(site) = Site::new() else { return };
    let options = Options { mib: 64, threads, rate_us: 10_000, ..stamps::options(&site, "threads") };
    let plan = Plan::new().source(["--push-rate", "32M"]);
    let ended = move_once(&site, &plan, &options, Memory::Steady);
    let faults = ended.destination.report().fault_latency_us.count;
    assert!(faults > threads as u64, "only {faults} faults");
}
