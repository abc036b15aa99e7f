//! From the moment the destination is told to run, the source never runs again, and no page that has not arrived
//! reads as zero: whatever breaks for good, threads wait where they touch one, and both sides say who holds what.
//! What breaks and comes back is in `recovery`.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use experiments::lab::{Host, Lab};
use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::gate::Gate;
use tests::moves::{Ended, Move, Plan, Side};
use tests::processes::{self, Entry};
use tests::proxy::{Proxy, Towards};
use tests::site::{Site, assert_ends};
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP};

const MIB: usize = 256;
const STORES: [&str; 2] = ["pipes", "frozen"];
/// How long a keeper may take to notice that nobody is left.
const NOTICE: Duration = Duration::from_secs(10);

/// A workload that does not bring all its pages over by touching them before the test has broken the link.
fn slow(site: &Site) -> Options {
    Options { mib: MIB, threads: 2, rate_us: 500, churn: true, ..stamps::options(site, "slow") }
}

/// A push that is far from its end when the link breaks for good; neither side waits long for the other.
fn plan(store: &str) -> Plan<'static> {
    let patience = ["--give-up-after", "2"];
    Plan::new().source(["--store", store, "--push-rate", "8M"]).source(patience).destination(patience)
}

/// Waits until the moved copy works at the destination, most of its memory still missing.
fn wait_working(under_way: &Move, stamp: &mut Stamp) {
    under_way.wait_running();
    stamp.give_up();
    stamp.wait_ops(200);
}

/// The number in front of `behind` and behind `before` in what a side said.
fn named(side: &Side, before: &str, behind: &str) -> u32 {
    let said = side.said();
    let found = said.split(before).skip(1).find_map(|rest| rest.split(behind).next()?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("no number behind {before:?}: {side:#?}"))
}

fn keeper(destination: &Side) -> u32 {
    named(destination, "process", "keeps them from reading zeros")
}

/// Who keeps the pages of tasks that are killed; tasks that stand still have them.
fn holder(source: &Side, pid: u32) -> Option<u32> {
    let holder = source.said().contains("kept by process").then(|| named(source, "kept by process", "("));
    assert_eq!(holder.is_some(), processes::has_ended(pid), "{source:#?}");
    assert_eq!(holder.is_none(), source.said().contains("stay stopped with all their memory"), "{source:#?}");
    holder
}

/// The tree at the destination waits: it is there, nothing it has read was wrong, and it does not get on.
fn assert_waits(site: &Site, stamp: &mut Stamp) -> u32 {
    let root = site.moved(stamp.pid()).expect("the moved root");
    // Whatever pages are here still work, until every thread has met one that is not.
    let threads = || std::fs::read_dir(format!("/proc/{root}/task")).unwrap();
    let waits = |tid: &std::ffi::OsStr| {
        let wchan = std::fs::read_to_string(format!("/proc/{root}/task/{}/wchan", tid.to_string_lossy()));
        wchan.is_ok_and(|wchan| wchan.contains("userfault"))
    };
    tests::eventually("a thread that waits for a page", STEP, || {
        threads().flatten().any(|entry| waits(&entry.file_name())).then_some(())
    });
    assert_eq!(stamp.wrong_lines(), Vec::<String>::new());
    stamp.assert_alone();
    root
}

/// What is left at the source does not run: it stands still, or is gone once its pages are in pipes.
fn assert_source_still(store: &str, pid: u32) {
    let gone = store == "pipes" && processes::has_ended(pid);
    if !gone {
        processes::assert_stops(pid);
    }
}

/// The test ends the tree, and what kept its pages ends by itself or as it was said to be ended.
fn assert_ends_with_the_tree(site: &Site, stamp: &Stamp, root: u32, keeper: u32, holder: Option<u32>) {
    let wrong = stamp.wrong_lines();
    assert!(wrong.is_empty(), "{wrong:#?}");
    processes::signal(root, Signal::SIGKILL);
    assert_ends(root, STEP);
    assert_ends(keeper, NOTICE);
    for pid in holder.into_iter().chain([stamp.pid()]) {
        if !processes::has_ended(pid) {
            processes::signal(pid, Signal::SIGKILL);
        }
    }
    site.assert_only(&[]);
}

fn assert_paused_for_good(site: &Site, stamp: &mut Stamp, store: &str, ended: &Ended) {
    ended.assert_paused();
    let (keeper, holder) = (keeper(&ended.destination), holder(&ended.source, stamp.pid()));
    assert_source_still(store, stamp.pid());
    let root = assert_waits(site, stamp);
    assert!(!processes::has_ended(keeper));
    assert!(processes::is_unprivileged(keeper, None) && processes::has_filter(keeper));
    if let Some(holder) = holder {
        assert!(!processes::has_ended(holder));
        assert_eq!(Entry::of(holder).unwrap().name, "postcopy-hold");
        assert!(processes::is_unprivileged(holder, None));
    }
    assert_source_still(store, stamp.pid());
    assert_ends_with_the_tree(site, stamp, root, keeper, holder);
    site.assert_clean(&[]);
}

#[test]
fn a_reset_connection_pauses_both_sides() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        let destination = plan(store).serve(&site);
        let link = Proxy::to(&destination.address);
        let source = plan(store).source_to(&site, stamp.pid(), link.address());
        let under_way = Move { source, destination };
        wait_working(&under_way, &mut stamp);
        for pid in [under_way.source.tool.pid(), under_way.destination.tool.pid()] {
            assert!(processes::is_unprivileged(pid, Some("fault")), "{:?}", Entry::of(pid));
        }
        link.cut();
        let ended = under_way.wait();
        assert_paused_for_good(&site, &mut stamp, store, &ended);
    }
}

#[test]
fn a_pulled_cable_pauses_both_sides() {
    let Some(site) = Site::new() else { return };
    let lab = match Lab::new() {
        Ok(lab) => lab,
        Err(error) => {
            tests::skip(format!("no network namespaces: {error:#}"));
            return;
        }
    };
    let options = slow(&site);
    let mut stamp =
        Stamp::start_as(lab.run_in(Host::Source, tests::programs::program("experiments")), &options);
    let plan = Plan { lab: Some(&lab), ..plan("pipes") };
    let under_way = plan.start(&site, stamp.pid());
    wait_working(&under_way, &mut stamp);
    lab.cut(Host::Source).unwrap();
    let ended = under_way.wait();
    assert_paused_for_good(&site, &mut stamp, "pipes", &ended);
}

#[test]
fn the_source_is_killed() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        let under_way = plan(store).start(&site, stamp.pid());
        wait_working(&under_way, &mut stamp);
        under_way.source.tool.signal(Signal::SIGKILL);
        let destination = under_way.destination.wait(MOVE);
        destination.assert(3, "paused", &["switchover was passed"]);
        let root = assert_waits(&site, &mut stamp);
        assert_source_still(store, stamp.pid());
        // Killed before its tasks were, it leaves their memory behind; after that, a holder with their pages.
        let holder =
            site.processes().into_iter().find(|entry| entry.name == "postcopy-hold").map(|entry| entry.pid);
        if holder.is_none() {
            processes::assert_stops(stamp.pid());
        }
        assert_ends_with_the_tree(&site, &stamp, root, keeper(&destination), holder);
    }
}

#[test]
fn the_destination_is_killed() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        let under_way = plan(store).start(&site, stamp.pid());
        wait_working(&under_way, &mut stamp);
        under_way.destination.tool.signal(Signal::SIGKILL);
        let source = under_way.source.wait(MOVE);
        source.assert(3, "paused", &["switchover was passed"]);
        assert_source_still(store, stamp.pid());
        let root = assert_waits(&site, &mut stamp);
        let init = Entry::of(root).unwrap().parent;
        let holder = holder(&source, stamp.pid());
        let known: Vec<u32> = holder.into_iter().chain([stamp.pid(), root, init]).collect();
        let keepers: Vec<u32> =
            site.processes().iter().map(|entry| entry.pid).filter(|p| !known.contains(p)).collect();
        let [keeper] = keepers[..] else { panic!("one keeper: {:?}", site.processes()) };
        assert_ends_with_the_tree(&site, &stamp, root, keeper, holder);
    }
}

#[test]
fn a_tree_that_ends_before_its_memory_has_arrived_ends_the_move_well() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        let under_way = plan(store).start(&site, stamp.pid());
        wait_working(&under_way, &mut stamp);
        let root = site.moved(stamp.pid()).expect("the moved root");
        processes::signal(root, Signal::SIGKILL);
        let ended = under_way.wait();
        ended.assert_released(tests::accounts::Memory::Changing);
        assert!(ended.destination.report().pages.gone > 0, "{ended:#?}");
        site.assert_clean(&[]);
    }
}

#[test]
fn an_interrupt_does_not_stop_what_cannot_be_undone() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&Options { mib: 64, ..slow(&site) });
    let under_way = plan("pipes").start(&site, stamp.pid());
    wait_working(&under_way, &mut stamp);
    for tool in [&under_way.source.tool, &under_way.destination.tool] {
        tool.signal(Signal::SIGINT);
    }
    let ended = under_way.wait();
    ended.assert_arrived(tests::accounts::Memory::Changing);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

/// The link breaks around the very message that is the switchover.
fn broken_commit(site: &Site, store: &str, stamp: &Stamp, bytes_passed: u64) -> Ended {
    let mut gate = Gate::new(site, &format!("{store}-{bytes_passed}"));
    let plan = plan(store).destination_hook("post-restore", &gate.command());
    let destination = plan.serve(site);
    let link = Proxy::to(&destination.address);
    let source = plan.source_to(site, stamp.pid(), link.address());
    gate.wait_reached();
    link.cut_control_after(bytes_passed);
    gate.open(0);
    Ended { source: source.wait(MOVE), destination: destination.wait(MOVE) }
}

#[test]
fn a_commit_that_never_arrives_leaves_the_source_stopped() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        let ended = broken_commit(&site, store, &stamp, 0);
        // The source cannot know; the destination never ran it.
        ended.source.assert(3, "paused", &["kill -CONT"]);
        ended.destination.assert(1, "rolled_back", &["lost the source"]);
        assert_eq!(holder(&ended.source, stamp.pid()), None);
        processes::assert_stops(stamp.pid());
        site.assert_clean(&[stamp.pid()]);
        // What it told the operator to do.
        processes::signal(stamp.pid(), Signal::SIGCONT);
        stamp.assert_unharmed();
        stamp.quit();
        site.assert_clean(&[]);
    }
}

/// A destination that is still there says that it has rolled back, and the source believes it.
#[test]
fn a_commit_that_never_arrives_is_undone_where_somebody_can_be_asked() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        let mut gate = Gate::new(&site, store);
        let plan = Plan { keep_serving: true, ..Plan::new() };
        let plan = plan.source(["--store", store]).destination_hook("post-restore", &gate.command());
        let destination = plan.serve(&site);
        let link = Proxy::to(&destination.address);
        let source = plan.source_to(&site, stamp.pid(), link.address());
        gate.wait_reached();
        link.reset_control_after(Towards::Destination, 0);
        gate.open(0);
        source.wait(MOVE).assert(1, "rolled_back", &["nothing of it is left there"]);
        stamp.assert_unharmed();
        stamp.quit();
        destination.tool.signal(Signal::SIGTERM);
        destination.wait(STEP).assert(0, "rolled_back", &["lost the source"]);
        site.assert_clean(&[]);
    }
}

#[test]
fn a_commit_without_an_answer_leaves_the_source_stopped() {
    for store in STORES {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&slow(&site));
        // A frame of 16 bytes.
        let ended = broken_commit(&site, store, &stamp, 16);
        stamp.give_up();
        ended.assert_paused();
        processes::assert_stops(stamp.pid());
        let root = assert_waits(&site, &mut stamp);
        let (keeper, holder) = (keeper(&ended.destination), holder(&ended.source, stamp.pid()));
        assert!(processes::is_stopped(stamp.pid()), "{:?}", Entry::of(stamp.pid()));
        assert_ends_with_the_tree(&site, &stamp, root, keeper, holder);
        site.assert_clean(&[]);
    }
}
