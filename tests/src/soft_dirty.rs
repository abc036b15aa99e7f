//! What the tracker by soft-dirty bits has to show, on a host that has them or in a guest.

use std::path::Path;

use source_server::process::ProcessTree;
use source_server::track::choice::of;
use source_server::track::{Method, Tracker};

use crate::shadow::{Shadow, churn, go_on, reported, stop};
use crate::subject::{Appearance, Subject};

const PAGES: u64 = 1024;
/// Of each process: little, as a guest may be translated.
const MIB: usize = 12;

/// All of it; says what was done.
///
/// # Panics
/// If anything is not as it should be, or there are no soft-dirty bits.
#[track_caller]
pub fn checks(dir: &Path, mut done: impl FnMut(&str)) {
    exactly_what_was_written();
    done("exact");
    dropped_and_moved_memory();
    done("dropped and moved");
    // A translated guest takes ten times as long for a tree.
    for (processes, rounds) in [(1, 6), (2, 2)] {
        let stops = churn(dir, tracker().as_mut(), MIB, processes, rounds);
        assert!(stops.is_empty(), "no task is ever stopped");
        done(&format!("churn of {processes}"));
    }
}

#[track_caller]
fn tracker() -> Box<dyn Tracker> {
    of(Method::SoftDirty).unwrap_or_else(|why| panic!("{why}"))
}

/// A subject with `PAGES` written pages, which lie at the address.
fn written(order: &str) -> (Subject, u64) {
    let mut subject = Subject::start(&["memory"], None);
    let start = subject.order(&format!("{order} {PAGES}"));
    let every: Vec<String> = (0..PAGES).map(|page| page.to_string()).collect();
    subject.order(&format!("write 0 {}", every.join(" ")));
    (subject, start)
}

fn exactly_what_was_written() {
    let mut tracker = tracker();
    let (mut subject, start) = written("map");
    let tree = ProcessTree::of(subject.pid()).expect("a tree");
    let mut shadow = Shadow::default();
    assert_eq!(reported(&shadow.round(tracker.as_mut(), &tree), start, PAGES).len() as u64, PAGES);
    subject.order("write 0 2 77");
    let round = shadow.round(tracker.as_mut(), &tree);
    assert_eq!(reported(&round, start, PAGES), [2, 77].into());
    assert!(!round.tasks[0].is_void());
    // Written in the round before, and not since.
    assert!(reported(&shadow.round(tracker.as_mut(), &tree), start, PAGES).is_empty());
    subject.order("write 0 5 1000");
    let frozen = stop(subject.pid());
    let (clean, last) = shadow.check(tracker.as_mut(), &frozen);
    assert_eq!(reported(&last, start, PAGES), [5, 1000].into());
    assert!(clean >= PAGES - 2);
    go_on(&frozen);
    tracker.disarm();
    let after = Appearance::of(subject.pid());
    assert!(!after.is_armed() && !after.is_traced());
}

/// Bits that do not say what happened: of zeros that came for what was dropped, huge ones among them, and of entries that moved.
fn dropped_and_moved_memory() {
    for order in ["map", "huge"] {
        let mut tracker = tracker();
        let (mut subject, start) = written(order);
        // Another region with other content, to be moved to where the first one is.
        let other = subject.order(&format!("{order} {PAGES}"));
        let every: Vec<String> = (0..PAGES).map(|page| page.to_string()).collect();
        subject.order(&format!("write 1 {0} {0}", every.join(" ")));
        let tree = ProcessTree::of(subject.pid()).expect("a tree");
        let mut shadow = Shadow::default();
        shadow.round(tracker.as_mut(), &tree);
        assert!(reported(&shadow.round(tracker.as_mut(), &tree), start, PAGES).is_empty());
        subject.order(&format!("drop 0 0 {PAGES}"));
        subject.order(&format!("read 0 {}", every.join(" ")));
        let moved = subject.order("move 1");
        assert_ne!(moved, other);
        let frozen = stop(subject.pid());
        let (_, last) = shadow.check(tracker.as_mut(), &frozen);
        assert_eq!(reported(&last, start, PAGES).len() as u64, PAGES, "all were dropped");
        assert_eq!(reported(&last, moved, PAGES).len() as u64, PAGES, "none was copied from here");
        go_on(&frozen);
    }
}
