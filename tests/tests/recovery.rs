//! A link that is lost behind the switchover and comes back costs nothing but time: the session is resumed, requests in
//! flight are asked again, what was not acknowledged is pushed again, every page is right, and the move is released.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::{Duration, Instant};

use experiments::lab::{Host, Lab};
use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::accounts::Memory;
use tests::gate::Gate;
use tests::keys::Keys;
use tests::moves::{Ended, Move, Plan};
use tests::processes;
use tests::proxy::{Proxy, Towards};
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP};

const STORES: [&str; 2] = ["pipes", "frozen"];
/// Bytes of a message without a body.
const FRAME: u64 = protocol::wire::frame::HEADER_LEN as u64;

/// A workload whose memory changes, forks included, and is far from all here when the link breaks.
fn busy(site: &Site) -> Options {
    Options { mib: 128, threads: 2, rate_us: 200, churn: true, fork: true, ..stamps::options(site, "busy") }
}

fn slow_push(plan: Plan<'_>) -> Plan<'_> {
    plan.source(["--push-rate", "16M"])
}

fn wait_working(under_way: &Move, stamp: &mut Stamp) {
    under_way.wait_running();
    stamp.give_up();
    stamp.wait_ops(100);
}

fn times_resumed(lines: &[String]) -> usize {
    lines.iter().filter(|line| line.contains("resumed after")).count()
}

/// The move ended as if nothing had been, and the process is as it should be.
fn assert_done(site: &Site, mut stamp: Stamp, ended: &Ended) {
    ended.assert_arrived(Memory::Resumed);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
    println!("{}{}", ended.source.report(), ended.destination.report());
}

/// Both sides over a proxy, which carries what is TCP.
fn over_proxy(site: &Site, plan: &Plan<'_>, stamp: &Stamp) -> (Move, Proxy) {
    let destination = plan.serve(site);
    let line = Proxy::to(&destination.address);
    let source = plan.source_to(site, stamp.pid(), line.address());
    (Move { source, destination }, line)
}

#[test]
fn connections_that_are_reset_again_and_again() {
    for (link, store, lanes) in
        [("tcp", "pipes", "1"), ("tcp", "frozen", "1"), ("tls", "pipes", "1"), ("tcp", "pipes", "3")]
    {
        let Some(site) = Site::new() else { return };
        println!("{link}, {store}, {lanes} lanes");
        let mut stamp = Stamp::start(&busy(&site));
        let plan = if link == "tcp" { Plan::new() } else { Keys::new(&site).plan(link) };
        let plan = slow_push(plan).source(["--store", store]).lanes(lanes);
        let (under_way, line) = over_proxy(&site, &plan, &stamp);
        wait_working(&under_way, &mut stamp);
        for times in 1..=4 {
            line.reset();
            under_way.source.tool.wait_lines("resumed after", times, STEP);
            stamp.wait_ops(20);
        }
        let ended = under_way.wait();
        assert!(times_resumed(&ended.destination.lines) >= 4, "{:#?}", ended.destination);
        assert_done(&site, stamp, &ended);
    }
}

#[test]
fn a_link_that_is_down_for_a_while() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&busy(&site));
    let (under_way, line) = over_proxy(&site, &slow_push(Plan::new()), &stamp);
    wait_working(&under_way, &mut stamp);
    line.set_down(true);
    for tool in [&under_way.source.tool, &under_way.destination.tool] {
        tool.wait_line("paused: ", STEP);
    }
    // Not a synchronisation: the pauses between attempts are to have grown.
    std::thread::sleep(Duration::from_secs(2));
    line.set_down(false);
    let up = Instant::now();
    under_way.destination.tool.wait_line("resumed after", STEP);
    stamp.wait_ops(1);
    println!("up to the first operation: {:?}", up.elapsed());
    let ended = under_way.wait();
    assert_done(&site, stamp, &ended);
}

/// The connections are reset behind so many bytes of a control connection, from the moment that the source is about
/// to be told that all is restored.
#[test]
fn connections_that_are_reset_around_each_message_behind_the_switchover() {
    let complete = FRAME + 17 * 8;
    for (what, towards, bytes) in [
        ("Commit has passed", Towards::Destination, FRAME),
        ("Prepared has passed, Running has not", Towards::Source, FRAME + 1),
        ("Running has passed", Towards::Source, 2 * FRAME),
        ("half of Complete has passed", Towards::Source, 2 * FRAME + complete / 2),
        ("Complete has passed", Towards::Source, 2 * FRAME + complete),
        ("half of Released has passed", Towards::Destination, FRAME + FRAME / 2),
    ] {
        for store in STORES {
            let Some(site) = Site::new() else { return };
            println!("{what}, {store}");
            let mut stamp = Stamp::start(&busy(&site));
            let mut gate = Gate::new(&site, "reset");
            let plan =
                Plan::new().source(["--store", store]).destination_hook("post-restore", &gate.command());
            // A source whose farewell is lost has ended: nobody dials.
            let plan = plan.destination(["--give-up-after", "5"]);
            let (under_way, line) = over_proxy(&site, &plan, &stamp);
            gate.wait_reached();
            stamp.give_up();
            line.reset_control_after(towards, bytes);
            gate.open(0);
            let ended = under_way.wait();
            assert_done(&site, stamp, &ended);
        }
    }
}

/// Hosts with a cable between them, and a move over it that is under way.
fn over_cable<'a>(lab: &'a Lab, site: &Site, link: &str, options: &Options) -> (Move, Stamp, Plan<'a>) {
    let mut stamp =
        Stamp::start_as(lab.run_in(Host::Source, tests::programs::program("experiments")), options);
    let keys = if link == "tcp" { Plan::new() } else { Keys::new(site).plan(link) };
    let plan = Plan { lab: Some(lab), ..slow_push(Plan { lab: None, ..keys }) };
    let under_way = plan.start(site, stamp.pid());
    wait_working(&under_way, &mut stamp);
    (under_way, stamp, plan)
}

fn lab() -> Option<Lab> {
    Lab::new().map_err(|error| tests::skip(format!("no network namespaces: {error:#}"))).ok()
}

#[test]
fn a_cable_that_is_out_for_a_second() {
    for link in ["tcp", "tls", "quic"] {
        let (Some(site), Some(lab)) = (Site::new(), lab()) else { return };
        println!("{link}");
        let (under_way, stamp, _) = over_cable(&lab, &site, link, &busy(&site));
        lab.cut(Host::Source).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        lab.restore(Host::Source).unwrap();
        let ended = under_way.wait();
        assert_done(&site, stamp, &ended);
    }
}

#[test]
fn a_cable_that_is_out_until_both_sides_have_noticed() {
    for link in ["tcp", "tls", "quic"] {
        let (Some(site), Some(lab)) = (Site::new(), lab()) else { return };
        println!("{link}");
        let (under_way, mut stamp, _) = over_cable(&lab, &site, link, &busy(&site));
        let cut = Instant::now();
        lab.cut(Host::Source).unwrap();
        for tool in [&under_way.source.tool, &under_way.destination.tool] {
            tool.wait_line("paused: ", STEP);
        }
        println!("noticed after {:?}", cut.elapsed());
        lab.restore(Host::Source).unwrap();
        let up = Instant::now();
        under_way.destination.tool.wait_line("resumed after", STEP);
        stamp.wait_ops(1);
        println!("up to the first operation: {:?}", up.elapsed());
        let ended = under_way.wait();
        assert_done(&site, stamp, &ended);
    }
}

/// While paused, what needs no page from the source goes on: events are read, so nothing waits in madvise, munmap or
/// fork.
#[test]
fn what_is_here_works_while_the_link_is_down() {
    let Some(site) = Site::new() else { return };
    let options = Options { rate_us: 0, ..busy(&site) };
    let mut stamp = Stamp::start(&options);
    let (under_way, line) = over_proxy(&site, &Plan::new().source(["--push-rate", "64M"]), &stamp);
    wait_working(&under_way, &mut stamp);
    line.set_down(true);
    under_way.destination.tool.wait_line("paused: ", STEP);
    let root = site.moved(stamp.pid()).expect("the moved root");
    // A thread that waits for its event sleeps there, and not in a fault.
    let stuck = || {
        let threads = std::fs::read_dir(format!("/proc/{root}/task")).unwrap().flatten();
        threads
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("wchan")).ok())
            .filter(|wchan| wchan.contains("userfaultfd_event_wait"))
            .count()
    };
    // Time for every thread to get as far as it can without new pages; an event takes microseconds.
    std::thread::sleep(Duration::from_secs(1));
    tests::eventually("no thread that waits for its event to be read", STEP, || (stuck() == 0).then_some(()));
    line.set_down(false);
    let ended = under_way.wait();
    assert_done(&site, stamp, &ended);
}

#[test]
fn an_interrupt_ends_a_pause_and_what_is_kept_stays() {
    for first in ["source", "destination"] {
        let Some(site) = Site::new() else { return };
        println!("the {first} first");
        let mut stamp = Stamp::start(&busy(&site));
        let (under_way, line) = over_proxy(&site, &slow_push(Plan::new()), &stamp);
        wait_working(&under_way, &mut stamp);
        // Until then the source's tasks keep the pages.
        tests::site::assert_ends(stamp.pid(), STEP);
        line.set_down(true);
        let tools = [&under_way.source.tool, &under_way.destination.tool];
        tools.iter().for_each(|tool| drop(tool.wait_line("paused: ", STEP)));
        let order = if first == "source" { tools } else { [tools[1], tools[0]] };
        order.iter().for_each(|tool| tool.signal(Signal::SIGINT));
        let ended =
            Ended { source: under_way.source.wait(STEP), destination: under_way.destination.wait(STEP) };
        ended.assert_paused();
        assert_eq!(stamp.wrong_lines(), Vec::<String>::new());
        let kept = |name: &str| site.processes().iter().any(|entry| entry.name.contains(name));
        assert!(kept("postcopy-hold"), "{:?}", site.processes());
        let root = site.moved(stamp.pid()).expect("the moved root");
        processes::signal(root, Signal::SIGKILL);
        tests::site::assert_ends(root, STEP);
    }
}

/// Only one side is told that a connection has ended.
#[test]
fn a_destination_that_has_let_go_ends_the_dialling_soon() {
    let Some(site) = Site::new() else { return };
    let mut stamp = Stamp::start(&busy(&site));
    let plan = Plan { keep_serving: true, ..slow_push(Plan::new()).destination(["--give-up-after", "0"]) };
    let (under_way, line) = over_proxy(&site, &plan, &stamp);
    wait_working(&under_way, &mut stamp);
    let begun = Instant::now();
    line.reset();
    let source = under_way.source.wait(MOVE);
    source.assert(3, "paused", &["switchover was passed", "no such session"]);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(stamp.wrong_lines(), Vec::<String>::new());
}
