//! Hybrid moves: memory is copied ahead, round by round, and only what was written since is fetched behind the switchover.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use experiments::lab::{Host, Lab, Rate};
use experiments::stamp::Options;
use nix::sys::signal::Signal;
use protocol::units::pages_to_bytes;
use tests::accounts::Memory;
use tests::moves::{Ended, Move, Plan};
use tests::site::Site;
use tests::stamps::{self, Stamp, move_once};
use tests::subject::Appearance;
use tests::{MOVE, STEP, eventually, long, processes, programs, skip};

/// What the source says about its last scan.
#[derive(Debug)]
struct LastScan {
    lazy: u64,
    clean: u64,
}

impl LastScan {
    #[track_caller]
    fn of(ended: &Ended) -> Self {
        let line = ended.source.lines.iter().find(|line| line.contains("last scan"));
        let line = line.unwrap_or_else(|| panic!("no last scan: {:#?}", ended.source));
        Self { lazy: number(line, "lazy="), clean: number(line, "clean=") }
    }
}

/// The number behind `key` in a line that the source has said.
#[track_caller]
fn number(line: &str, key: &str) -> u64 {
    let value = line.split_whitespace().find_map(|word| word.strip_prefix(key));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key}: {line}"))
}

fn hybrid(rounds: &str) -> Plan<'static> {
    Plan::new().source(["--precopy-rounds", rounds])
}

/// What was fetched behind the switchover is what the last scan found stale.
#[track_caller]
fn assert_fetched(ended: &Ended, memory: Memory) {
    let scan = LastScan::of(ended);
    let pages = ended.destination.report().pages;
    let stale = scan.lazy - scan.clean;
    let (fetched, local) = (pages.demand + pages.push, pages.precopied + pages.zero);
    assert_eq!(pages.lazy, scan.lazy);
    match memory {
        Memory::Steady => assert_eq!((fetched, local), (stale, scan.clean), "{scan:?}: {:#?}", ended.source),
        // The task dropped some of them before they came.
        Memory::Changing => assert!(
            fetched <= stale && local <= scan.clean && fetched + local + pages.gone == pages.lazy,
            "{scan:?}: {pages:?}"
        ),
        // What is not acknowledged is pushed again, clean or not.
        Memory::Resumed => assert_eq!(fetched + local + pages.gone, pages.lazy, "{scan:?}: {pages:?}"),
    }
    assert!(scan.clean > 0, "nothing was won by copying ahead: {:#?}", ended.source);
    assert!(ended.source.report().bytes.precopy >= scan.clean / 2, "{:#?}", ended.source);
}

fn moves(rounds: &[&str], options: impl Fn(&Site) -> Options, memory: Memory) {
    let mut times = 0;
    for rounds in rounds {
        let Some(site) = Site::new() else { return };
        let ended = move_once(&site, &hybrid(rounds), &options(&site), memory);
        assert_fetched(&ended, memory);
        times += 1;
    }
    assert_eq!(times, rounds.len());
}

/// Writes all the time, but not all of it within a round.
fn steady(site: &Site) -> Options {
    Options { mib: 128, threads: 2, rate_us: 100, ..stamps::options(site, "steady") }
}

fn changing(site: &Site) -> Options {
    Options { churn: true, fork: true, ..steady(site) }
}

#[test]
fn a_process_that_writes() {
    moves(&["1", "3", "auto"], steady, Memory::Steady);
}

#[test]
fn a_process_that_writes_everything_all_the_time() {
    let Some(site) = Site::new() else { return };
    let options = Options { mib: 64, threads: 4, ..stamps::options(&site, "busy") };
    let ended = move_once(&site, &hybrid("auto"), &options, Memory::Steady);
    let scan = LastScan::of(&ended);
    let pages = ended.destination.report().pages;
    assert_eq!(pages.demand + pages.push, scan.lazy - scan.clean);
}

#[test]
fn a_process_that_changes_its_mappings_and_forks() {
    moves(&["1", "3", "auto"], changing, Memory::Changing);
}

#[test]
fn a_tree_of_processes() {
    let tree = |site: &Site| Options { mib: 48, tree: 3, ..steady(site) };
    moves(&["2"], tree, Memory::Steady);
    moves(&["2"], |site| Options { churn: true, fork: true, ..tree(site) }, Memory::Changing);
}

#[test]
fn out_of_the_frozen_original() {
    let Some(site) = Site::new() else { return };
    let plan = hybrid("2").source(["--store", "frozen"]);
    let ended = move_once(&site, &plan, &changing(&site), Memory::Changing);
    assert_fetched(&ended, Memory::Changing);
}

#[test]
fn with_the_other_criu() {
    let Some(criu) = programs::next_criu() else {
        tests::skip("there is no second CRIU: scripts/setup --criu-next makes one");
        return;
    };
    let Some(site) = Site::new() else { return };
    let plan = hybrid("3").source(["--criu".as_ref(), criu.as_os_str()]);
    let plan = plan.destination(["--criu".as_ref(), criu.as_os_str()]);
    let ended = move_once(&site, &plan, &changing(&site), Memory::Changing);
    assert_fetched(&ended, Memory::Changing);
}

#[test]
fn of_an_idle_process_hardly_a_page_is_fetched() {
    let Some(site) = Site::new() else { return };
    let options = Options { mib: 64, threads: 1, rate_us: 300_000, ..stamps::options(&site, "idle") };
    let ended = move_once(&site, &hybrid("auto"), &options, Memory::Steady);
    assert_fetched(&ended, Memory::Steady);
    let pages = ended.destination.report().pages;
    assert!(pages.demand + pages.push < 64, "{pages:?}");
}

/// When it does not pay is shown by `precopy::compression`, on links whose speed does not depend on who else uses this host.
#[test]
fn copies_are_compressed_on_a_slow_link() {
    let Some(site) = Site::new() else { return };
    let lab = Lab::new().map_err(|error| format!("no network namespaces: {error:#}"));
    let slow = lab.and_then(|lab| {
        let shaped = lab.shape(Host::Destination, Some(Rate { mbit: 100 }));
        shaped.map(|()| lab).map_err(|error| format!("links cannot be slowed down: {error:#}"))
    });
    let lab = match slow {
        Ok(lab) => lab,
        Err(why) => return skip(why),
    };
    let mut took = Vec::new();
    for compress in ["off", "auto"] {
        // Four seconds as it is.
        let options = Options { mib: 48, threads: 1, rate_us: 10_000, ..stamps::options(&site, compress) };
        let mut stamp = Stamp::start_as(lab.run_in(Host::Source, programs::program("experiments")), &options);
        let plan = Plan { lab: Some(&lab), ..hybrid("1").source(["--compress", compress]) };
        let ended = plan.run(&site, stamp.pid());
        ended.assert_arrived(Memory::Steady);
        assert!(LastScan::of(&ended).clean > 0);
        let line = ended.source.lines.iter().find(|line| line.contains("compressed=")).expect("a round");
        let (sent, compressed, ms) =
            (number(line, "sent="), number(line, "compressed="), number(line, "ms="));
        let bytes = ended.source.report().bytes.precopy;
        println!("{compress}: {compressed} of {sent} pages compressed, {bytes} bytes in {ms} ms");
        match compress {
            "off" => assert!(compressed == 0 && bytes > pages_to_bytes(sent) / 2, "{line}"),
            _ => assert!(compressed > sent / 2 && bytes < pages_to_bytes(sent) / 2, "{line}"),
        }
        took.push(ms);
        stamp.mark_moved();
        stamp.assert_unharmed();
        stamp.quit();
    }
    assert!(took[1] < took[0] / 2, "in milliseconds, without and with: {took:?}");
}

/// It is frozen again and again, and runs in between, armed; in the end CRIU copies all of it, and nothing is lazy.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_thread_whose_stack_pointer_stays_page_aligned() {
    let Some(site) = Site::new() else { return };
    let options = Options { aligned_stack: true, ..stamps::small(&site, 32) };
    let mut stamp = Stamp::start(&options);
    let ended = hybrid("2").run(&site, stamp.pid());
    ended.assert_arrived(Memory::Steady);
    let scan = LastScan::of(&ended);
    assert_eq!((scan.lazy, scan.clean), (0, 0));
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

/// 20 moves with 1 to 5 rounds.
#[test]
fn many_moves() {
    let (times, mib) = if long() { (20, 1024) } else { (1, 128) };
    for number in 0..times {
        let rounds = (number % 5 + 1).to_string();
        let options = |site: &Site| Options { mib, threads: 4, ..changing(site) };
        moves(&[&rounds], options, Memory::Changing);
    }
}

/// A process to move, and the judgement after each attempt.
struct Trial {
    // Dropped in this order: the place with all that is in it last.
    stamp: Stamp,
    site: Site,
}

impl Trial {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        let options = Options { mib: 64, churn: true, fork: true, ..stamps::small(&site, 64) };
        let stamp = Stamp::start(&options);
        Some(Self { stamp, site })
    }

    /// The process is as it was, and runs.
    #[track_caller]
    fn assert_untouched(&mut self) {
        let now = Appearance::of(self.stamp.pid());
        assert!(!now.is_armed() && !now.is_traced() && !now.has_descriptor("userfaultfd"), "{now:?}");
        assert!(!processes::is_stopped(self.stamp.pid()));
        self.stamp.assert_unharmed();
        self.site.assert_clean(&[self.stamp.pid()]);
    }

    /// Those of a program that was killed.
    fn remove_directories(&self) {
        for left in std::fs::read_dir(self.site.work_dir()).unwrap() {
            std::fs::remove_dir_all(left.unwrap().path()).unwrap();
        }
    }

    /// What was tried in vain before succeeds now.
    fn finish(mut self) {
        let ended = hybrid("2").run(&self.site, self.stamp.pid());
        ended.assert_arrived(Memory::Changing);
        self.stamp.mark_moved();
        self.stamp.assert_unharmed();
        self.stamp.quit();
        self.site.assert_clean(&[]);
    }
}

/// A move that is in its first or second round, and stays there for long: the first round is copied at a pace of its own.
#[track_caller]
fn in_round(trial: &Trial, round: u32) -> Move {
    let rate = if round == 1 { "1M" } else { "24M" };
    let plan = hybrid("100").source(["--precopy-rate", rate]);
    let under_way = plan.start(&trial.site, trial.stamp.pid());
    if round == 1 {
        under_way.source.tool.wait_line("phase=\"precopy\"", STEP);
        let pid = trial.stamp.pid();
        eventually("an armed process", STEP, || Appearance::of(pid).is_armed().then_some(()));
    } else {
        under_way.source.tool.wait_line(&format!("round={}", round - 1), MOVE);
    }
    under_way
}

#[test]
fn the_source_is_interrupted_in_a_round() {
    let Some(mut trial) = Trial::new() else { return };
    for round in [1, 2, 3] {
        let under_way = in_round(&trial, round);
        under_way.source.tool.signal(Signal::SIGINT);
        under_way.wait().assert_rolled_back(&["interrupted"]);
        trial.assert_untouched();
    }
    trial.finish();
}

#[test]
fn the_destination_is_interrupted_in_a_round() {
    let Some(mut trial) = Trial::new() else { return };
    for round in [1, 2] {
        let under_way = in_round(&trial, round);
        under_way.destination.tool.signal(Signal::SIGINT);
        under_way.wait().assert_rolled_back(&["destination: interrupted"]);
        trial.assert_untouched();
    }
    trial.finish();
}

#[test]
fn the_destination_dies_in_a_round() {
    let Some(mut trial) = Trial::new() else { return };
    for round in [1, 2] {
        let under_way = in_round(&trial, round);
        under_way.destination.tool.signal(Signal::SIGKILL);
        under_way.source.wait(MOVE).assert(1, "rolled_back", &["destination"]);
        // Nobody is left to remove its directory.
        trial.remove_directories();
        trial.assert_untouched();
    }
    trial.finish();
}

#[test]
fn the_source_dies_in_a_round() {
    let Some(mut trial) = Trial::new() else { return };
    let under_way = in_round(&trial, 2);
    under_way.source.tool.signal(Signal::SIGKILL);
    under_way.destination.wait(STEP).assert(1, "rolled_back", &["the source"]);
    let pid = trial.stamp.pid();
    eventually("no trace of the tracker", STEP, || (!Appearance::of(pid).is_armed()).then_some(()));
    trial.remove_directories();
    trial.assert_untouched();
    trial.finish();
}

#[test]
fn a_daemon_that_serves_on_gives_the_memory_back() {
    let Some(mut trial) = Trial::new() else { return };
    let mut plan = hybrid("100").source(["--precopy-rate", "24M"]);
    plan.keep_serving = true;
    let under_way = plan.start(&trial.site, trial.stamp.pid());
    under_way.source.tool.wait_line("round=1", MOVE);
    let daemon = under_way.destination.tool.pid();
    let kept = processes::resident(daemon);
    assert!(kept > 32 << 20, "the daemon keeps {kept} bytes");
    under_way.source.tool.signal(Signal::SIGINT);
    under_way.source.wait(MOVE).assert(1, "rolled_back", &["interrupted"]);
    eventually("memory given back", STEP, || (processes::resident(daemon) < 16 << 20).then_some(()));
    under_way.destination.tool.signal(Signal::SIGTERM);
    let _ = under_way.destination.wait(STEP);
    trial.assert_untouched();
    trial.finish();
}

#[test]
fn the_move_fails_behind_the_last_scan() {
    let Some(mut trial) = Trial::new() else { return };
    for (role, phase) in [
        ("source", "pre-freeze"),
        ("source", "post-dump"),
        ("destination", "pre-restore"),
        ("destination", "post-restore"),
    ] {
        let plan = match role {
            "source" => hybrid("2").source_hook(phase, "exit 7"),
            _ => hybrid("2").destination_hook(phase, "exit 7"),
        };
        let ended = plan.run(&trial.site, trial.stamp.pid());
        ended.assert_rolled_back(&["hook", phase, "exit status: 7"]);
        trial.assert_untouched();
    }
    let ended = hybrid("2").restore(["--no-such-option"]).run(&trial.site, trial.stamp.pid());
    ended.assert_rolled_back(&["destination: criu restore failed"]);
    trial.assert_untouched();
    trial.finish();
}

#[test]
fn the_process_ends_in_a_round() {
    let Some(trial) = Trial::new() else { return };
    let under_way = in_round(&trial, 1);
    let Trial { mut stamp, site } = trial;
    stamp.give_up();
    processes::signal(stamp.pid(), Signal::SIGKILL);
    under_way.wait().assert_rolled_back(&["ended before it was frozen"]);
    site.assert_clean(&[]);
}
