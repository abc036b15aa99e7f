//! A program that is killed behind the switchover loses nothing: the tasks wait, another daemon takes over from the keeper and
//! the source dials it, or another source takes the pages out of the holder and dials; and the move is released. Or the operator gives the missing pages up, and no thread reads zeros.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use experiments::report::MoveReport;
use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::keys::Keys;
use tests::moves::{Move, Plan};
use tests::proxy::Proxy;
use tests::site::{Site, assert_ends};
use tests::stamps::{self, Stamp};
use tests::tool::Tool;
use tests::{MOVE, STEP, eventually, processes, programs};

fn busy(site: &Site) -> Options {
    Options { mib: 128, threads: 2, rate_us: 200, churn: true, fork: true, ..stamps::options(site, "busy") }
}

/// A move to a daemon with a state directory of its own, far from its end.
fn under_way(site: &Site, plan: Plan<'_>, stamp: &mut Stamp) -> (Move, PathBuf) {
    let state = site.path("state");
    let plan = plan.source(["--push-rate", "16M"]);
    let plan = plan.destination(["--state-dir".as_ref(), state.as_os_str()]);
    let under_way = plan.start(site, stamp.pid());
    under_way.wait_running();
    stamp.give_up();
    stamp.wait_ops(100);
    (under_way, state)
}

fn daemon(verb: &str, state: &Path) -> Command {
    let mut command = Command::new(programs::program("uffd-daemon"));
    command.arg(verb).arg("--state-dir").arg(state);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn status(state: &Path) -> String {
    let output = daemon("status", state).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

/// Kills the daemon; its tasks and its keeper stay.
fn kill_daemon(under_way: &mut Move, state: &Path) {
    assert!(status(state).contains("served by a daemon"), "{}", status(state));
    under_way.destination.tool.signal(Signal::SIGKILL);
    under_way.destination.tool.wait(STEP);
    under_way.source.tool.wait_line("paused: ", STEP);
    eventually("a keeper that knows that it is alone", STEP, || {
        let shown = status(state);
        (shown.contains("paused for") && shown.contains("pages not acknowledged")).then_some(())
    });
}

/// The move is released by whoever took over, and everything is right, unless an event was lost before.
fn assert_finished(
    site: &Site,
    mut stamp: Stamp,
    under_way: Move,
    mut follower: Tool,
    json: &Path,
    state: &Path,
    lost: bool,
) {
    let source = under_way.source.wait(MOVE);
    assert_eq!(source.status, 0, "{source:#?}\n{}", follower.last_lines());
    assert_eq!(follower.wait(STEP), 0, "{}", follower.last_lines());
    let reports = [source.report().clone(), MoveReport::read(json).unwrap()];
    for report in &reports {
        assert!(report.pages.adds_up() && report.outcome == "released", "{report}");
    }
    assert_eq!(reports[0].session, reports[1].session);
    stamp.mark_moved();
    assert!(status(state).contains("no moves"), "{}", status(state));
    if lost || follower.says_event_lost() {
        return;
    }
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
    println!("{}{}", reports[0], reports[1]);
}

#[test]
fn another_daemon_goes_on_with_the_move() {
    for (by, link, lanes) in
        [("takeover", "tcp", "1"), ("serve", "tcp", "1"), ("takeover", "tls", "1"), ("takeover", "tcp", "3")]
    {
        let Some(site) = Site::new() else { return };
        println!("{by}, {link}, {lanes} lanes");
        let mut stamp = Stamp::start(&busy(&site));
        let plan = if link == "tcp" { Plan::new() } else { Keys::new(&site).plan(link) };
        let plan = plan.lanes(lanes);
        let (mut under_way, state) = under_way(&site, plan, &mut stamp);
        kill_daemon(&mut under_way, &state);
        let json = site.path("follower.json");
        let mut command = daemon(by, &state);
        command.arg("--json").arg(&json);
        if by == "serve" {
            command.args(["--once", "--listen", &under_way.destination.address]);
        }
        let follower = Tool::start("follower", command);
        follower.wait_line("resumed after", STEP);
        assert_finished(&site, stamp, under_way, follower, &json, &state, false);
    }
}

#[test]
fn daemons_that_are_killed_one_after_the_other() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&busy(&site));
    let (mut under_way, state) = under_way(&site, Plan::new(), &mut stamp);
    kill_daemon(&mut under_way, &state);
    let json = site.path("follower.json");
    let mut lost = false;
    for times in 1..=3 {
        let mut command = daemon("takeover", &state);
        command.arg("--json").arg(&json);
        let mut follower = Tool::start("follower", command);
        under_way.source.tool.wait_lines("resumed after", times, STEP);
        stamp.wait_ops(20);
        if times == 3 {
            assert_finished(&site, stamp, under_way, follower, &json, &state, lost);
            return;
        }
        lost |= follower.says_event_lost();
        follower.signal(Signal::SIGKILL);
        follower.wait(STEP);
    }
}

#[test]
fn another_source_goes_on_with_the_pages() {
    for (link, lanes, store) in
        [("tcp", "1", "pipes"), ("tls", "1", "pipes"), ("tcp", "3", "pipes"), ("tcp", "1", "frozen")]
    {
        let Some(site) = Site::new() else { return };
        println!("{link}, {lanes} lanes, {store}");
        let mut stamp = Stamp::start(&busy(&site));
        let kept = site.path("kept");
        let plan = if link == "tcp" { Plan::new() } else { Keys::new(&site).plan(link) };
        let plan = plan.lanes(lanes).source(["--store", store]);
        let plan = plan.source(["--state-dir".as_ref(), kept.as_os_str()]);
        let (mut under_way, state) = under_way(&site, plan, &mut stamp);
        match store {
            "pipes" => assert_ends(stamp.pid(), STEP),
            _ => processes::assert_stops(stamp.pid()),
        }
        let again = Command::new(programs::program("source-server"))
            .args(["move", "--pid", &stamp.pid().to_string(), "--to", &under_way.destination.address])
            .args(["--insecure", "--state-dir"])
            .arg(&kept)
            .output()
            .unwrap();
        let refused = if store == "pipes" { "has ended" } else { "belongs to move" };
        assert!(again.status.code() == Some(2) && said(&again).contains(refused), "{}", said(&again));
        under_way.source.tool.signal(Signal::SIGKILL);
        under_way.source.tool.wait(STEP);
        let json = site.path("follower.json");
        for times in 1..=3 {
            under_way.destination.tool.wait_lines("paused: ", times, STEP);
            let mut command = Command::new(programs::program("source-server"));
            command.arg("resume").arg("--state-dir").arg(&kept).arg("--json").arg(&json);
            command.args((times < 3).then_some("--push-rate=4M"));
            let mut follower = Tool::start("follower", command);
            under_way.destination.tool.wait_lines("resumed after", times, STEP);
            stamp.wait_ops(20);
            if times < 3 {
                follower.signal(Signal::SIGKILL);
                follower.wait(STEP);
                continue;
            }
            assert_eq!(follower.wait(MOVE), 0, "{}", follower.last_lines());
        }
        let destination = under_way.destination.wait(MOVE);
        destination.assert(0, "released", &[]);
        let source = MoveReport::read(&json).unwrap();
        assert!(source.outcome == "released" && source.pages == destination.report().pages, "{source}");
        stamp.mark_moved();
        stamp.assert_unharmed();
        stamp.quit();
        assert!(status(&state).contains("no moves"));
        assert_eq!(std::fs::read_dir(&kept).unwrap().count(), 0);
        site.assert_clean(&[]);
    }
}

#[test]
fn pages_that_are_given_up_are_never_read_as_zeros() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&Options { fork: false, ..busy(&site) });
    let (mut under_way, state) = under_way(&site, Plan::new(), &mut stamp);
    kill_daemon(&mut under_way, &state);
    under_way.source.tool.signal(Signal::SIGKILL);
    under_way.source.tool.wait(STEP);
    let root = site.moved(stamp.pid()).expect("the moved root");
    let abandoned = daemon("abandon", &state).output().unwrap();
    assert!(abandoned.status.success(), "{}", said(&abandoned));
    assert!(
        said(&abandoned).contains("pages are lost") && said(&abandoned).contains("poisoned"),
        "{}",
        said(&abandoned)
    );
    // It touches a page that is lost, sooner or later.
    assert_ends(root, STEP);
    assert_eq!(stamp.wrong_lines(), Vec::<String>::new());
    assert!(status(&state).contains("no moves"));
    for left in site.processes() {
        processes::signal(left.pid, Signal::SIGKILL);
    }
}

#[test]
fn status_says_which_move_waits_for_its_link() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&busy(&site));
    let state = site.path("state");
    let plan = Plan::new().source(["--push-rate", "16M"]);
    let plan = plan.destination(["--state-dir".as_ref(), state.as_os_str()]);
    let destination = plan.serve(&site);
    let line = Proxy::to(&destination.address);
    let source = plan.source_to(&site, stamp.pid(), line.address());
    let under_way = Move { source, destination };
    under_way.wait_running();
    stamp.give_up();
    assert!(!status(&state).contains("paused"), "{}", status(&state));
    line.set_down(true);
    under_way.destination.tool.wait_line("paused: ", STEP);
    let shown = status(&state);
    assert!(shown.contains("its link is lost") && shown.contains("s more"), "{shown}");
    line.set_down(false);
    under_way.destination.tool.wait_line("resumed after", STEP);
    let shown = status(&state);
    let [source, destination] = [&under_way.source.tool, &under_way.destination.tool].map(Tool::last_lines);
    assert!(!shown.contains("paused"), "{shown}\n{source}\n{destination}");
    under_way.wait().assert_arrived(tests::accounts::Memory::Resumed);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

#[test]
fn a_daemon_that_lives_is_not_robbed() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&busy(&site));
    let (under_way, state) = under_way(&site, Plan::new(), &mut stamp);
    for verb in ["takeover", "abandon"] {
        let output = daemon(verb, &state).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        assert!(
            !said(&output).contains("lost") && !said(&output).contains("taken over"),
            "{}",
            said(&output)
        );
    }
    let ended = under_way.wait();
    ended.assert_released(tests::accounts::Memory::Changing);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}
