//! A link that fails for a while, in every way that one can, at every stage of a move, on every kind of link: the move goes
//! on when it is back, or it has rolled back. How long a thread that waits for a page waits for it from then on is shown.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use experiments::lab::{Host, Lab, Outage};
use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::gate::{Gate, action_script};
use tests::keys::Keys;
use tests::moves::{Move, Plan};
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP, eventually, programs};

/// Memory of the process that is moved.
const MIB: usize = 48;
/// What a page may take from the moment that the link is back: the source's pause between two attempts, or that of TCP.
const FIRST_PAGE: Duration = Duration::from_secs(1);
/// The same after half a minute: the kernel asks for the next hop's address again, once a second. And wherever the short tests run:
/// a host with other work on it is no place for a bound in time.
const FIRST_PAGE_FORGOTTEN: Duration = Duration::from_secs(2);

/// How long the kernel knows the next hop's address at least.
const FORGETS: Duration = Duration::from_secs(10);

/// When the link fails.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// So many parts in a hundred of the memory have come.
    Percent(u64),
    /// The source has said this.
    Said(&'static str),
    /// In a hook of the source's.
    Source(&'static str),
    /// In a hook of the destination's.
    Destination(&'static str),
    /// In an action script of CRIU's at the destination.
    Restore(&'static str),
}

/// Its name, when it is, the options of the source, and whether the tasks run at the destination by then.
type Point = (&'static str, Stage, &'static [&'static str], bool);

const POINTS: [Point; 10] = [
    ("pre-copy, first round", Stage::Percent(30), &["--precopy-rounds=2", "--precopy-rate=32M"], false),
    ("pre-copy, second round", Stage::Said("pre-copy round=1"), &["--precopy-rounds=2"], false),
    ("dumped", Stage::Source("post-dump"), &[], false),
    ("shipped", Stage::Destination("pre-restore"), &[], false),
    ("restored", Stage::Destination("post-restore"), &[], false),
    ("committed", Stage::Restore("pre-resume"), &["--push-rate=16M"], false),
    ("running", Stage::Restore("post-resume"), &["--push-rate=16M"], true),
    ("faults", Stage::Percent(20), &["--push-rate=6M"], true),
    ("push", Stage::Percent(50), &["--push-rate=24M"], true),
    ("release", Stage::Percent(90), &["--push-rate=24M"], true),
];

struct Case {
    link: &'static str,
    outage: Outage,
    lasts: Duration,
    point: Point,
}

impl Case {
    /// How it ended, and how long the first page took.
    fn run(&self) -> Option<(&'static str, Option<Duration>)> {
        let (Some(site), Some(lab)) = (Site::new(), lab()) else { return None };
        let (_, stage, options, runs) = self.point;
        let workload = Options { mib: MIB, threads: 2, rate_us: 200, ..stamps::options(&site, "cut") };
        let program = lab.run_in(Host::Source, programs::program("experiments"));
        let mut stamp = Stamp::start_as(program, &workload);
        let keys = if self.link == "tcp" { Plan::new() } else { Keys::new(&site).plan(self.link) };
        // Who has lost the commit asks a daemon that is still there.
        let plan = Plan { lab: Some(&lab), keep_serving: true, ..keys }.source(options.iter().copied());
        let states = ["source-state", "destination-state"].map(|name| site.path(name));
        let plan = plan.source(["--state-dir".as_ref(), states[0].as_os_str()]);
        let plan = plan.destination(["--state-dir".as_ref(), states[1].as_os_str()]);
        let mut gate = Gate::new(&site, "cut");
        let plan = match stage {
            Stage::Source(phase) => plan.source_hook(phase, &gate.command()),
            Stage::Destination(phase) => plan.destination_hook(phase, &gate.command()),
            Stage::Restore(phase) => {
                let script: PathBuf = action_script(&site, phase, &gate.command());
                plan.restore(["--action-script".into(), script.into_os_string()])
            }
            Stage::Percent(_) | Stage::Said(_) => plan,
        };
        let under_way = plan.start(&site, stamp.pid());
        match stage {
            Stage::Percent(percent) => {
                let bytes = (MIB as u64) * percent * (1 << 20) / 100;
                let come = || (lab.bytes_received(Host::Destination).unwrap() >= bytes).then_some(());
                eventually("so many bytes", STEP, come);
            }
            Stage::Said(words) => drop(under_way.source.tool.wait_line(words, STEP)),
            Stage::Source(_) | Stage::Destination(_) | Stage::Restore(_) => gate.wait_reached(),
        }
        lab.begin(self.outage).unwrap();
        gate.open(0);
        // Not a synchronisation: so long the link is down.
        std::thread::sleep(self.lasts);
        let waiting = site.moved(stamp.pid()).filter(|_| runs).map(waiting_threads).unwrap_or_default();
        lab.end(self.outage).unwrap();
        let up = Instant::now();
        if runs {
            stamp.give_up();
        }
        let first_page = first_that_goes_on(&waiting).map(|at| at.saturating_duration_since(up));
        Some((self.judge(&site, stamp, under_way), first_page))
    }

    fn judge(&self, site: &Site, mut stamp: Stamp, under_way: Move) -> &'static str {
        let runs = self.point.3;
        let source = under_way.source.wait(MOVE);
        // It is over there, or ends soon: what has switched over is finished first.
        under_way.destination.tool.signal(Signal::SIGTERM);
        let destination = under_way.destination.wait(MOVE);
        let word = match (source.status, destination.report().outcome.as_str()) {
            (0, "released") => "released",
            (1, "rolled_back") if !runs => "rolled back",
            _ => panic!("{source:#?}\n{destination:#?}"),
        };
        if word == "released" {
            stamp.mark_moved();
        }
        stamp.assert_unharmed();
        assert_eq!(stamp.assert_ran_in_turn(), word == "released");
        stamp.quit();
        site.assert_clean(&[]);
        word
    }

    /// A row of the table; what went wrong, if something did.
    fn row(&self) -> Option<String> {
        let (link, outage, lasts, point) = (self.link, self.outage, self.lasts, self.point.0);
        let begun = Instant::now();
        let ended = catch_unwind(AssertUnwindSafe(|| self.run()));
        let took = begun.elapsed().as_secs_f64();
        let row = |word: &str, page: &str| {
            println!(
                "| {link} | {outage:?} | {} s | {point} | {word} | {page} | {took:.1} |",
                lasts.as_secs()
            );
        };
        match ended {
            Ok(None) => None,
            Ok(Some((word, first))) => {
                row(word, &first.map_or("-".to_owned(), |first| format!("{} ms", first.as_millis())));
                let limit = if lasts > FORGETS || !tests::long() { FIRST_PAGE_FORGOTTEN } else { FIRST_PAGE };
                let late = first.is_some_and(|first| first > limit);
                late.then(|| format!("{link}, {outage:?}, {point}: the first page came after {first:?}"))
            }
            Err(panic) => {
                row("FAILED", "-");
                Some(format!("{link}, {outage:?}, {lasts:?}, {point}: {}", tests::panic_text(&*panic)))
            }
        }
    }
}

fn lab() -> Option<Lab> {
    Lab::new().map_err(|error| tests::skip(format!("no network namespaces: {error:#}"))).ok()
}

/// The threads of a process that wait for a page.
fn waiting_threads(root: u32) -> Vec<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{root}/task")).into_iter().flatten().flatten();
    threads.map(|thread| thread.path()).filter(|thread| waits(thread)).collect()
}

fn waits(thread: &std::path::Path) -> bool {
    fs::read_to_string(thread.join("wchan")).is_ok_and(|wchan| wchan.contains("handle_userfault"))
}

/// When the first of these threads goes on; nothing if there is none.
fn first_that_goes_on(waiting: &[PathBuf]) -> Option<Instant> {
    if waiting.is_empty() {
        return None;
    }
    eventually("a thread that goes on", STEP, || waiting.iter().any(|thread| !waits(thread)).then_some(()));
    Some(Instant::now())
}

/// The link fails for a second, at every point in the long tests and at one otherwise.
fn for_a_second(link: &'static str, outage: Outage, usually: &str) {
    run(link, outage, Duration::from_secs(1), |name| tests::long() || name == usually);
}

/// For so long that both sides have noticed; only in the long tests.
fn for_half_a_minute(link: &'static str, outage: Outage) {
    let points = ["pre-copy, first round", "faults", "push"];
    run(link, outage, Duration::from_secs(30), |name| tests::long() && points.contains(&name));
}

fn run(link: &'static str, outage: Outage, lasts: Duration, chosen: impl Fn(&str) -> bool) {
    let points = POINTS.iter().filter(|point| chosen(point.0));
    let failed: Vec<String> =
        points.filter_map(|point| Case { link, outage, lasts, point: *point }.row()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

macro_rules! outages {
    ($($second:ident, $half_a_minute:ident: $link:literal, $outage:ident, $usually:literal;)*) => { $(
        #[test]
        fn $second() {
            for_a_second($link, Outage::$outage, $usually);
        }

        #[test]
        fn $half_a_minute() {
            for_half_a_minute($link, Outage::$outage);
        }
    )* };
}

outages! {
    tcp_silent, tcp_silent_for_long: "tcp", Silence, "pre-copy, first round";
    tcp_down, tcp_down_for_long: "tcp", Down, "faults";
    tcp_rejected, tcp_rejected_for_long: "tcp", Reject, "committed";
    tls_silent, tls_silent_for_long: "tls", Silence, "push";
    tls_down, tls_down_for_long: "tls", Down, "running";
    tls_rejected, tls_rejected_for_long: "tls", Reject, "restored";
    quic_silent, quic_silent_for_long: "quic", Silence, "release";
    quic_down, quic_down_for_long: "quic", Down, "push";
    quic_rejected, quic_rejected_for_long: "quic", Reject, "faults";
}
