//! Where the pids are free, the tree keeps them: it is restored into the destination's own PID namespace. On one host
//! that takes a source in a PID namespace of its own.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::process::Command;

use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::accounts::Memory;
use tests::gate::Gate;
use tests::moves::Plan;
use tests::processes::{self, Entry};
use tests::site::{Site, assert_ends};
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP, eventually, programs};

/// The last pid before those that the source gives out. They are free here, and far from where this host is just
/// now: pids are given out in turn.
fn last_pid() -> u32 {
    const ROOM: u32 = 64;
    let number = |file: &str| {
        let text = std::fs::read_to_string(file).unwrap();
        text.split_whitespace().last().unwrap().parse::<u32>().unwrap()
    };
    let (now, max) = (number("/proc/loadavg"), number("/proc/sys/kernel/pid_max"));
    let is_free = |pid: u32| !std::path::Path::new(&format!("/proc/{pid}")).exists();
    let from = (now + max / 2) % max;
    let candidates = (from..max - ROOM).chain(ROOM..from).step_by(ROOM as usize);
    candidates.into_iter().find(|from| (*from..from + ROOM).all(is_free)).expect("free pids")
}

/// The workload in a PID namespace, and the source beside it.
struct Trial {
    stamp: Stamp,
    /// Its pid in its namespace.
    inner: u32,
    /// Its pid here.
    outer: u32,
    /// The process that keeps its namespace.
    init: u32,
    site: Site,
}

impl Trial {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        let mut unshare = Command::new("unshare");
        let last = last_pid();
        // What was opened outside is of another mount namespace: what this process has inherited, too.
        let quiet = "exec </dev/null >/dev/null 2>&1; for fd in {3..255}; do eval \"exec $fd>&-\"; done";
        let script =
            format!("{quiet}; echo {last} > /proc/sys/kernel/ns_last_pid; \"$@\" & exec sleep 1000000");
        unshare.args(["--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", &script, "bash"]);
        unshare.arg(programs::program("experiments"));
        let options = Options { rate_us: 500, ..stamps::small(&site, 64) };
        let stamp = Stamp::start_as(unshare, &options);
        let is_workload = |entry: &Entry| entry.name == "experiments";
        let outer = site.processes().into_iter().find(is_workload).expect("the workload").pid;
        let inner = processes::innermost_pid(outer).unwrap();
        assert!(inner > last && inner < last + 8, "{inner}, not behind {last}");
        let init = Entry::of(outer).unwrap().parent;
        Some(Self { stamp, inner, outer, init, site })
    }

    /// The plan of a source that is started inside.
    fn plan(&self) -> Plan<'static> {
        let outer = self.outer.to_string();
        Plan {
            source_in: ["nsenter", "--target", &outer, "--pid", "--mount"].map(Into::into).to_vec(),
            ..Plan::new()
        }
    }

    fn assert_undone(&mut self) {
        self.stamp.assert_unharmed();
        assert!(processes::has_ended(self.inner), "its pid is free here");
        self.site.assert_clean(&self.source());
    }

    /// The processes that the source consists of.
    fn source(&self) -> Vec<u32> {
        vec![self.outer, self.init, self.stamp.pid()]
    }

    /// Ends the source's namespace, which has no workload any more.
    fn leave(mut self) -> (Stamp, Site) {
        self.stamp.give_up();
        processes::signal(self.init, Signal::SIGKILL);
        assert_ends(self.init, STEP);
        self.stamp.mark_moved();
        (self.stamp, self.site)
    }
}

#[test]
fn the_tree_keeps_its_pids() {
    for (store, pidns) in [("pipes", "auto"), ("frozen", "host")] {
        let Some(trial) = Trial::new() else { return };
        let plan = trial.plan().source(["--store", store]).destination(["--pidns", pidns]);
        plan.run(&trial.site, trial.inner).assert_released(Memory::Steady);
        assert!(processes::has_ended(trial.outer));
        let inner = trial.inner;
        let (mut stamp, site) = trial.leave();
        let moved = Entry::of(inner).expect("the same pid here");
        assert_eq!(moved.name, "experiments");
        stamp.assert_unharmed();
        site.assert_clean(&[inner]);
        stamp.quit();
        site.assert_clean(&[]);
    }
}

#[test]
fn a_tree_that_asks_for_a_namespace_gets_one() {
    let Some(trial) = Trial::new() else { return };
    let plan = trial.plan().destination(["--pidns", "new"]);
    plan.run(&trial.site, trial.inner).assert_released(Memory::Steady);
    let inner = trial.inner;
    let (mut stamp, site) = trial.leave();
    assert!(processes::has_ended(inner), "it has that pid in its own namespace only");
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

#[test]
fn a_failure_leaves_the_pids_free() {
    let Some(mut trial) = Trial::new() else { return };
    for phase in ["pre-restore", "post-restore"] {
        let plan = trial.plan().destination_hook(phase, "exit 7");
        plan.run(&trial.site, trial.inner).assert_rolled_back(&["exit status: 7"]);
        trial.assert_undone();
    }
    let plan = trial.plan().restore(["--no-such-option"]);
    plan.run(&trial.site, trial.inner).assert_rolled_back(&["no-such-option"]);
    trial.assert_undone();
    let mut gate = Gate::new(&trial.site, "killed");
    let under_way =
        trial.plan().destination_hook("post-restore", &gate.command()).start(&trial.site, trial.inner);
    gate.wait_reached();
    under_way.destination.tool.signal(Signal::SIGKILL);
    gate.open(0);
    under_way.source.wait(MOVE).assert(1, "rolled_back", &["destination"]);
    for left in std::fs::read_dir(trial.site.work_dir()).unwrap() {
        std::fs::remove_dir_all(left.unwrap().path()).unwrap();
    }
    eventually("the end of what was restored", STEP, || processes::has_ended(trial.inner).then_some(()));
    trial.assert_undone();
    trial.plan().run(&trial.site, trial.inner).assert_released(Memory::Steady);
    let (mut stamp, site) = trial.leave();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_clean(&[]);
}

#[test]
fn a_lost_source_leaves_the_tree_waiting() {
    let Some(trial) = Trial::new() else { return };
    let under_way = trial.plan().source(["--push-rate", "1M"]).start(&trial.site, trial.inner);
    under_way.wait_running();
    // nsenter has forked it.
    let is_source = |entry: &Entry| entry.name == "source-server";
    let source = trial.site.processes().into_iter().find(is_source).expect("the source").pid;
    processes::signal(source, Signal::SIGKILL);
    assert_eq!(under_way.source.wait(STEP).status, 137);
    let destination = under_way.destination.wait(MOVE);
    destination.assert(3, "paused", &["switchover was passed"]);
    assert!(!processes::has_ended(trial.inner));
    assert_eq!(trial.stamp.wrong_lines(), Vec::<String>::new());
    processes::signal(trial.inner, Signal::SIGKILL);
    let (_stamp, site) = trial.leave();
    // The directory of one that was killed stays; no process does.
    site.assert_only(&[]);
}

#[test]
fn a_tree_that_was_moved_moves_on() {
    for store in ["pipes", "frozen"] {
        let Some(site) = Site::new() else { return };
        let mut stamp = Stamp::start(&stamps::small(&site, 64));
        let pid = stamp.pid();
        let plan = Plan::new().destination(["--pidns", "new"]).source(["--store", store]);
        plan.run(&site, pid).assert_released(Memory::Steady);
        stamp.mark_moved();
        for _ in 0..2 {
            let here = site.moved(pid).expect("the moved root");
            // As preflight says: the source has to be where the tree has its pids.
            let refused = Plan::new().source_to(&site, here, "127.0.0.1:1").wait(STEP);
            refused.assert(2, "rolled_back", &["another PID namespace", "nsenter"]);
            let inside =
                ["nsenter", "--target", &here.to_string(), "--pid", "--mount"].map(Into::into).to_vec();
            let plan = Plan { source_in: inside, ..plan.clone() }.source(["--push-rate", "64M"]);
            plan.run(&site, pid).assert_released(Memory::Steady);
            assert_ends(here, STEP);
            stamp.assert_unharmed();
        }
        stamp.quit();
        site.assert_clean(&[]);
    }
}
