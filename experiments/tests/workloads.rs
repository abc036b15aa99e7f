//! The workloads as processes that are not moved: they must find nothing wrong with themselves, and what is done to
//! them from outside they must find.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use experiments::workload::Files;
use experiments::{stamp, touch, workload};
use source_server::process::thread_state;

const LONG: Duration = Duration::from_secs(60);

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_experiments"))
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").arg(name).arg(pid.to_string()).status().unwrap().success());
}

/// Waits until every thread stands still: on a busy host one may run for a while before it finds that it is to stop.
fn wait_stopped(pid: u32) {
    let deadline = Instant::now() + LONG;
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let tid = |thread: fs::DirEntry| thread.file_name().to_str().unwrap().parse().unwrap();
    while !threads().all(|thread| thread_state(pid, tid(thread)).is_ok_and(|state| state == 'T')) {
        assert!(Instant::now() < deadline, "{pid} does not stop");
        std::thread::yield_now();
    }
}

#[test]
fn a_tree_with_churn_and_forks_finds_nothing_wrong_with_itself() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_dir(dir.path(), "stamp");
    let options = stamp::Options {
        mib: 16,
        threads: 2,
        churn: true,
        fork: true,
        tree: 3,
        rate_us: 20,
        ..stamp::Options::new(files)
    };
    let mut stamp = stamp::Handle::start(program(), &options, LONG).unwrap();
    let first = stamp.check(LONG).unwrap();
    assert!(first.pages > 3 * 4096 / 2 && first.wrong == 0, "{first:?} {:?}", stamp.wrong_lines());
    let beat =
        stamp.wait_beat(LONG, |beat| beat.forks > 10 && beat.churn > 300 && beat.ops > 10_000).unwrap();
    assert!(beat.gap_us > 0);
    let last = stamp.quit(LONG).unwrap();
    assert_eq!(last.wrong, 0, "{:?}", stamp.wrong_lines());
    assert!(stamp.wait_gone(LONG).unwrap().success());
}

#[test]
fn damage_to_shared_memory_is_found_from_outside() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_dir(dir.path(), "stamp");
    let options = stamp::Options { mib: 4, threads: 1, tree: 2, rate_us: 100, ..stamp::Options::new(files) };
    let mut stamp = stamp::Handle::start(program(), &options, LONG).unwrap();
    assert_eq!(stamp.check(LONG).unwrap().wrong, 0);
    let shared = stamp.shared_file().unwrap().clone();
    let file = fs::OpenOptions::new().write(true).open(shared).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, &[0; 4096], 5 * 4096).unwrap(); // a fixed page: both see it
    let checked = stamp.check(LONG).unwrap();
    assert!(checked.wrong >= 2, "{checked:?}");
    let line = stamp.wrong_lines()[0];
    assert!(line.contains("page=0/SharedFile/5") && line.contains("kind=zero"), "{line}");
    let last = stamp.quit(LONG).unwrap();
    assert!(last.wrong >= checked.wrong);
    assert_eq!(stamp.wait_gone(LONG).unwrap().code(), Some(1));
}

#[test]
fn a_lost_process_of_a_tree_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_dir(dir.path(), "stamp");
    let options = stamp::Options { mib: 4, threads: 1, tree: 3, rate_us: 100, ..stamp::Options::new(files) };
    let mut stamp = stamp::Handle::start(program(), &options, LONG).unwrap();
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", stamp.pid())).unwrap();
    let child: u32 = children.split_whitespace().next().unwrap().parse().unwrap();
    signal(child, "-KILL");
    stamp.wait_beat(LONG, |beat| beat.wrong == 1).unwrap();
    assert!(stamp.wrong_lines()[0].contains("operation=tree-child"));
    assert!(stamp.check(LONG).unwrap().wrong == 1 && stamp.quit(LONG).unwrap().wrong == 1);
}

#[test]
fn a_frozen_workload_sees_the_gap_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_dir(dir.path(), "stamp");
    let options = stamp::Options { mib: 4, threads: 1, rate_us: 100, ..stamp::Options::new(files) };
    let mut stamp = stamp::Handle::start(program(), &options, LONG).unwrap();
    stamp.wait_progress(10, LONG).unwrap(); // a thread that has not begun sees no gap
    signal(stamp.pid(), "-STOP");
    std::thread::sleep(Duration::from_millis(250)); // the length of the gap, not a synchronisation
    signal(stamp.pid(), "-CONT");
    stamp.wait_beat(LONG, |beat| beat.gap_us >= 200_000).unwrap();
    stamp.wait_progress(500, LONG).unwrap();
    assert_eq!(stamp.quit(LONG).unwrap().wrong, 0);
}

#[test]
fn busy_tasks_run_on_every_processor_and_end_with_their_owner() {
    let busy = workload::BusyCores::start(std::path::Path::new(env!("CARGO_BIN_EXE_experiments"))).unwrap();
    assert!(busy.count() > 0);
    let of_this = format!("/proc/self/task/{}/children", nix::unistd::gettid());
    let children = || fs::read_to_string(&of_this).unwrap().split_whitespace().count();
    assert_eq!(children(), busy.count());
    drop(busy);
    assert_eq!(children(), 0);
}

fn touch_options(dir: &std::path::Path) -> touch::Options {
    touch::Options { mib: 8, ..touch::Options::new(Files::in_dir(dir, "touch"), dir.join("samples")) }
}

#[test]
fn every_page_is_read_once_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let options = touch::Options { threads: 2, ..touch_options(dir.path()) };
    let mut touch = touch::Handle::start(program(), &options, LONG).unwrap();
    assert_eq!(touch.samples().unwrap().state, touch::State::Waiting);
    touch.go().unwrap();
    let summary = touch.wait_done(LONG).unwrap();
    assert_eq!((summary.pages, summary.wrong), (2048, 0));
    let samples = touch.samples().unwrap();
    let mut pages: Vec<u64> = samples.samples.iter().map(|sample| sample.page).collect();
    pages.sort_unstable();
    assert_eq!(pages, (0..2048).collect::<Vec<_>>());
    assert!(samples.state == touch::State::Done && samples.ended_ns > samples.started_ns);
    assert!(touch.wait_gone(LONG).unwrap().success());
}

#[test]
fn every_pattern_finds_its_pages_whether_it_reads_or_writes() {
    for pattern in touch::Pattern::ALL {
        for (access, threads) in [(touch::Access::Read, 3), (touch::Access::Write, 2)] {
            let dir = tempfile::tempdir().unwrap();
            let options = touch::Options { pattern, access, threads, ..touch_options(dir.path()) };
            let mut touch = touch::Handle::start(program(), &options, LONG).unwrap();
            touch.go().unwrap();
            let summary = touch.wait_done(LONG).unwrap();
            assert_eq!((summary.pages, summary.wrong), (2048, 0), "{pattern} {access}");
            let mut pages: Vec<u64> =
                touch.samples().unwrap().samples.iter().map(|sample| sample.page).collect();
            pages.sort_unstable();
            pages.dedup();
            assert_eq!(pages.len() == 2048, pattern.is_complete(), "{pattern}: {} pages", pages.len());
        }
    }
}

#[test]
fn a_gap_starts_the_reads_and_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let options = touch::Options {
        start_after_gap_ms: 200,
        interval_us: 100,
        pattern: touch::Pattern::Stride,
        ..touch_options(dir.path())
    };
    let mut touch = touch::Handle::start(program(), &options, LONG).unwrap();
    signal(touch.pid(), "-STOP");
    wait_stopped(touch.pid());
    std::thread::sleep(Duration::from_millis(250)); // the length of the gap, not a synchronisation
    signal(touch.pid(), "-CONT");
    let summary = touch.wait_done(LONG).unwrap();
    assert!(summary.gap_us >= 200_000 && summary.wrong == 0, "{summary:?}");
    let samples = touch.samples().unwrap();
    assert!(samples.started_ns >= samples.gap_to_ns && samples.gap_to_ns > samples.gap_from_ns);
    assert!(samples.ended_ns - samples.started_ns >= 2047 * 100_000, "one read per 100 us");
    let presence = samples.presences.last().unwrap();
    assert!(presence.wall_ns >= samples.gap_to_ns && presence.pages >= 2048, "{presence:?}");
}

#[test]
fn a_reader_that_is_told_to_quit_ends_before_all_pages() {
    let dir = tempfile::tempdir().unwrap();
    let options = touch::Options { interval_us: 20_000, ..touch_options(dir.path()) };
    let mut touch = touch::Handle::start(program(), &options, LONG).unwrap();
    touch.go().unwrap();
    let summary = touch.quit(LONG).unwrap();
    assert!(summary.pages < 2048, "{summary:?}");
    assert_eq!(touch.samples().unwrap().samples.len(), usize::try_from(summary.pages).unwrap());
}

#[test]
fn a_hook_has_a_part_of_the_pages_rewritten_which_stay_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let options = touch::Options { dirty_percent: 25, ..touch_options(dir.path()) };
    let mut touch = touch::Handle::start(program(), &options, LONG).unwrap();
    let hook = touch.dirty_command();
    assert!(Command::new("sh").args(["-c", &hook]).status().unwrap().success());
    let said = fs::read_to_string(dir.path().join("touch.status")).unwrap();
    assert!(said.contains("DIRTIED 1 pages=512"), "{said}");
    assert!(!touch.has_started().unwrap());
    touch.go().unwrap();
    let summary = touch.wait_done(LONG).unwrap();
    assert_eq!((summary.pages, summary.wrong), (2048, 0));
}
