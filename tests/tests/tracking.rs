//! Dirty tracking: no written page is ever missing, and a task does not notice that it is tracked.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use experiments::stamp::Options;
use kernel::inject::userfaultfd_of;
use nix::sys::signal::Signal;
use source_server::process::ProcessTree;
use source_server::track::choice::{choose, of};
use source_server::track::content::Content;
use source_server::track::{Method, Pass};
use tests::shadow::{Shadow, churn, go_on, pages_there, reported, stop};
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::subject::{Appearance, CALLS, Subject};
use tests::trackers::write_protect;
use tests::{STEP, eventually, guest, processes, programs, skip, soft_dirty};

fn tree(pid: u32) -> ProcessTree {
    ProcessTree::of(pid).expect("a tree")
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

#[test]
fn a_call_that_is_interrupted_goes_on_and_nothing_is_left() {
    if write_protect().is_none() {
        return;
    }
    for (call, wanted) in CALLS {
        for user in [None, Some(65534)] {
            let subject = Subject::start(&[call], user);
            subject.wait_asleep(call);
            let before = Appearance::of(subject.pid());
            for _ in 0..10 {
                let taken = userfaultfd_of(subject.pid()).unwrap_or_else(|error| panic!("{call}: {error}"));
                assert!(taken.threads >= 1 && taken.stood > Duration::ZERO);
            }
            let after = Appearance::of(subject.pid());
            assert_eq!(before, after, "{call}");
            assert!(!after.is_armed() && !after.is_traced());
            let result = subject.release(call);
            if result == "Absent" {
                skip("the C library has no restartable sequences");
                continue;
            }
            assert_eq!(result, wanted, "{call} as {user:?}");
        }
    }
}

#[test]
fn a_stopped_task_stays_stopped_and_goes_on_when_it_is_told_to() {
    let Some(mut tracker) = write_protect() else { return };
    let mut subject = Subject::start(&["memory"], None);
    let start = subject.order("map 64");
    subject.order("write 0 1 2 3");
    subject.wait_asleep("memory");
    processes::signal(subject.pid(), Signal::SIGSTOP);
    let stopped = |pid| processes::Entry::of(pid).is_some_and(|entry| entry.state == 'T');
    eventually("the stop", STEP, || stopped(subject.pid()).then_some(()));
    let tree = tree(subject.pid());
    let round = tracker.scan(&tree, Pass::Round);
    assert_eq!(reported(&round, start, 64), set([1, 2, 3]));
    eventually("the task stopped again", STEP, || stopped(subject.pid()).then_some(()));
    tracker.disarm();
    assert!(stopped(subject.pid()));
    processes::signal(subject.pid(), Signal::SIGCONT);
    assert_eq!(subject.order("write 0 5"), start);
}

#[test]
fn exactly_what_was_written_is_reported() {
    let Some(mut tracker) = write_protect() else { return };
    let mut subject = Subject::start(&["memory"], None);
    let start = subject.order("map 4096");
    let huge = subject.order("huge 4096");
    let every: Vec<String> = (0..4096).map(|page: u64| page.to_string()).collect();
    subject.order(&format!("write 1 {}", every.join(" ")));
    subject.order("write 0 1 2 3 9");
    subject.order("read 0 20 21");
    let tree = tree(subject.pid());
    let before = Appearance::of(subject.pid());
    let round = tracker.scan(&tree, Pass::Round);
    assert_eq!(round.stops.len(), 1);
    assert_eq!(reported(&round, start, 4096), set([1, 2, 3, 9, 20, 21]), "first scan");
    assert_eq!(reported(&round, huge, 4096).len(), 4096, "first scan");
    assert!(Appearance::of(subject.pid()).is_armed());
    let mut next = |subject: &mut Subject, orders: &[&str], pass| {
        for order in orders {
            subject.order(order);
        }
        tracker.scan(&tree, pass)
    };
    let round = next(&mut subject, &["write 0 2 77", "write 1 0 1000", "read 0 5"], Pass::Round);
    assert_eq!(reported(&round, start, 4096), set([2, 5, 77]), "5 is the page of zeros, and new");
    assert_eq!(reported(&round, huge, 4096), set([0, 1000]));
    assert!(round.stops.is_empty(), "it was stopped once");
    let round = next(&mut subject, &[], Pass::Round);
    assert!(reported(&round, start, 4096).is_empty() && reported(&round, huge, 4096).is_empty());
    // Dropped pages are no pages; touched again they are new.
    let round = next(&mut subject, &["drop 0 0 4096", "write 0 3"], Pass::Round);
    assert_eq!(reported(&round, start, 4096), set([3]));
    // Moved memory is new as a whole at its new place.
    let moved = subject.order("move 0");
    let round = next(&mut subject, &["write 0 7"], Pass::Round);
    assert_eq!(reported(&round, moved, 4096), set([3, 7]));
    assert!(reported(&round, start, 4096).is_empty());
    let grown = subject.order("grow 0 5000");
    let round = next(&mut subject, &["write 0 4999"], Pass::Round);
    assert!(reported(&round, grown, 5000).is_superset(&set([4999])));
    // The same place, mapped anew.
    subject.order("unmap 0");
    let again = subject.order("map 5000");
    let round = next(&mut subject, &["write 1 8", "write 0 6"], Pass::Ahead);
    assert_eq!(reported(&round, huge, 4096), set([8]));
    assert!(reported(&round, again, 5000).is_empty(), "nothing is armed any more");
    let round = next(&mut subject, &["write 1 4095"], Pass::Last);
    assert_eq!(reported(&round, again, 5000), set([6]));
    assert_eq!(reported(&round, huge, 4096), set([4095]), "8 was reported before");
    tracker.disarm();
    let after = Appearance::of(subject.pid());
    assert!(!after.is_armed() && !after.is_traced());
    assert_ne!(before, after, "areas came and went");
}

/// Entries keep the mark of protection where `mremap` takes them: written or not, they look protected there, and again
/// where they are moved next or what comes to their old place.
#[test]
fn memory_that_is_moved_is_not_taken_for_protected() {
    if write_protect().is_none() {
        return;
    }
    let every: Vec<String> = (0..64).map(|page| page.to_string()).collect();
    let every = format!("write 0 {}", every.join(" "));
    for orders in [
        &["move 0", "write 0 3"][..],
        &["write 0 3", "move 0", "write 0 9"],
        &["move 0", "write 0 3", "move 0", "write 0 9"],
        // Something else comes to where it was.
        &["move 0", "map 64", "write 1 5 6", "write 0 3", "unmap 1"],
        &["move 0", "grow 0 96", "write 0 3 80", "move 0"],
        &["drop 0 8 16", "move 0", "read 0 9", "write 0 10"],
    ] {
        let mut tracker = write_protect().expect("as before");
        let mut subject = Subject::start(&["memory"], None);
        subject.order("map 64");
        subject.order(&every);
        let tree = tree(subject.pid());
        let mut shadow = Shadow::default();
        shadow.round(tracker.as_mut(), &tree);
        // With a round behind them, without one, and both.
        for with_round in [true, false, true, true] {
            for order in orders {
                subject.order(order);
            }
            if with_round {
                shadow.round(tracker.as_mut(), &tree);
                let idle = shadow.round(tracker.as_mut(), &tree);
                assert!(idle.pages() <= 4, "{orders:?}: {} pages of a process that waits", idle.pages());
            }
        }
        subject.order("write 0 1");
        let frozen = stop(subject.pid());
        let (clean, _) = shadow.check(tracker.as_mut(), &frozen);
        assert!(clean > 0);
        go_on(&frozen);
        for order in orders {
            subject.order(order);
        }
        let frozen = stop(subject.pid());
        shadow.check(tracker.as_mut(), &frozen);
        go_on(&frozen);
    }
}

#[test]
fn memory_that_the_task_tracks_itself_counts_as_written_and_is_left_alone() {
    let Some(mut tracker) = write_protect() else { return };
    let mut subject = Subject::start(&["memory"], None);
    let start = subject.order("map 16");
    subject.order("write 0 1 2");
    subject.order("claim 0");
    let tree = tree(subject.pid());
    for pass in [Pass::Round, Pass::Round, Pass::Last] {
        let round = tracker.scan(&tree, pass);
        assert_eq!(reported(&round, start, 16), set([1, 2]), "{pass:?}");
    }
    tracker.disarm();
    assert!(Appearance::of(subject.pid()).is_armed(), "by itself");
}

#[test]
fn a_disarmed_task_is_as_it_was() {
    let Some(mut tracker) = write_protect() else { return };
    let mut subject = Subject::start(&["memory"], Some(65534));
    subject.order("map 4096");
    subject.order("huge 4096");
    subject.order("write 1 5");
    subject.wait_asleep("memory");
    let before = Appearance::of(subject.pid());
    let tree = tree(subject.pid());
    let pages = pages_there(subject.pid());
    for _ in 0..3 {
        let round = tracker.scan(&tree, Pass::Round);
        assert_eq!(round.tasks[0].untracked, None);
    }
    assert_ne!(before, Appearance::of(subject.pid()));
    tracker.disarm();
    assert_eq!(before, Appearance::of(subject.pid()));
    assert_eq!(pages, pages_there(subject.pid()), "no page came or went");
}

#[test]
fn another_program_starts_again() {
    let Some(mut tracker) = write_protect() else { return };
    let mut child = Command::new("sh");
    child.args(["-c", "read go; exec sleep 600"]).stdin(Stdio::piped());
    let mut child = child.spawn().expect("a shell");
    let pid = child.id();
    let tree = tree(pid);
    let round = tracker.scan(&tree, Pass::Round);
    assert!(round.pages() > 0 && !round.tasks[0].starts_again);
    let idle = tracker.scan(&tree, Pass::Round);
    assert!(!idle.tasks[0].starts_again);
    drop(child.stdin.take());
    eventually("another program", STEP, || {
        processes::Entry::of(pid).filter(|entry| entry.name == "sleep" && entry.state == 'S')
    });
    let round = tracker.scan(&tree, Pass::Round);
    let task = &round.tasks[0];
    assert!(task.starts_again && task.untracked.is_none(), "{task:?}");
    assert_eq!(task.pages(), pages_there(pid).len() as u64);
    assert_eq!(round.stops.len(), 1);
    let round = tracker.scan(&tree, Pass::Round);
    assert!(!round.tasks[0].starts_again && round.pages() == 0);
    child.kill().expect("its end");
    child.wait().expect("its status");
    assert!(tracker.scan(&tree, Pass::Round).tasks.is_empty());
}

#[test]
fn no_written_page_is_missing_by_write_protection() {
    let Some(site) = Site::new() else { return };
    let Some(mut tracker) = write_protect() else { return };
    let rounds = if tests::long() { 100 } else { 8 };
    let mut stops = churn(&site.path(""), tracker.as_mut(), 48, 1, rounds);
    stops.extend(churn(&site.path(""), choose().0.as_mut(), 48, 3, rounds));
    stops.sort();
    println!("stops: {} of them, median {:?}, most {:?}", stops.len(), stops[stops.len() / 2], stops.last());
}

#[test]
fn no_written_page_is_missing_by_content() {
    let Some(site) = Site::new() else { return };
    churn(&site.path(""), &mut Content::default(), 48, 2, 4);
}

#[test]
fn no_written_page_is_missing_by_soft_dirty() {
    let Some(site) = Site::new() else { return };
    match of(Method::SoftDirty) {
        Ok(_) => soft_dirty::checks(&site.path(""), |done| println!("{done}")),
        Err(why) => skip(why),
    }
}

/// The kernel that `scripts/setup --qemu` fetches has what this host's may lack.
#[test]
fn no_written_page_is_missing_by_soft_dirty_in_a_guest() {
    guest::assert_passes("soft-dirty");
}

#[test]
fn a_child_that_is_forked_meanwhile_inherits_nothing() {
    let Some(site) = Site::new() else { return };
    if write_protect().is_none() {
        return;
    }
    let options = Options { fork: true, mib: 4, ..stamps::small(&site, 4) };
    let mut stamp = Stamp::start(&options);
    let (mut copies, mut children) = (0, 0);
    for _ in 0..if tests::long() { 20_000 } else { 1000 } {
        copies += userfaultfd_of(stamp.pid()).expect("a userfaultfd").copies;
        for child in processes::below(stamp.pid()) {
            let entries =
                std::fs::read_dir(format!("/proc/{}/fd", child.pid)).into_iter().flatten().flatten();
            let mut links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
            assert!(!links.any(|link| link.to_string_lossy().contains("userfaultfd")), "{child}");
            assert!(child.state != 't', "{child} is traced");
            children += 1;
        }
    }
    println!("{children} children looked at, {copies} copies closed in them");
    assert!(children > 0);
    stamp.assert_unharmed();
    stamp.quit();
}

#[test]
fn a_tracker_that_is_killed_leaves_nothing_behind() {
    let Some(site) = Site::new() else { return };
    if write_protect().is_none() {
        return;
    }
    let options = Options { churn: true, ..stamps::small(&site, 16) };
    let mut stamp = Stamp::start(&options);
    let pid = stamp.pid();
    let tries: u64 = if tests::long() { 500 } else { 60 };
    for number in 0..tries {
        let mut tracker = Subject::start(&["tracker", &pid.to_string()], None);
        // Somewhere in one of its rounds, each time elsewhere.
        let until = Instant::now() + Duration::from_micros(37 * number % 5000);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        tracker.kill();
    }
    eventually("no trace of a tracker", STEP, || {
        let now = Appearance::of(pid);
        (!now.is_armed() && !now.is_traced()).then_some(())
    });
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").flatten();
    let links = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    assert!(!links.into_iter().any(|link| link.to_string_lossy().contains("userfaultfd")));
    stamp.assert_unharmed();
    stamp.quit();
    let operators = processes::below(std::process::id());
    assert!(operators.iter().all(|entry| entry.name != "subject"), "{operators:?}");
    assert!(programs::program("subject").is_file());
}
