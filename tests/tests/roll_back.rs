//! Before the switchover everything can be undone: whatever fails on either side, the source runs on unharmed, the
//! destination is clean, and the same process can be moved afterwards.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use nix::sys::signal::Signal;
use tests::accounts::Memory;
use tests::gate::Gate;
use tests::moves::{Ended, Plan};
use tests::proxy::Proxy;
use tests::site::Site;
use tests::stamps::{self, Stamp};
use tests::{MOVE, STEP, eventually, processes};

const MIB: usize = 64;
const STORES: [&str; 2] = ["pipes", "frozen"];

/// A process to move, and the judgement after each attempt.
struct Trial {
    // Dropped in this order: the place with all that is in it last.
    stamp: Stamp,
    site: Site,
}

impl Trial {
    fn new() -> Option<Self> {
        let site = Site::new()?;
        let stamp = Stamp::start(&stamps::small(&site, MIB));
        Some(Self { stamp, site })
    }

    /// The move was called off for a reason with `words` in it, and it is as if it had never been tried.
    fn assert_undone(&mut self, ended: &Ended, words: &[&str]) {
        ended.assert_rolled_back(words);
        self.assert_unharmed();
    }

    fn assert_unharmed(&mut self) {
        self.stamp.assert_unharmed();
        self.site.assert_clean(&[self.stamp.pid()]);
    }

    /// What was tried in vain before succeeds now.
    fn finish(mut self) {
        let ended = Plan::new().run(&self.site, self.stamp.pid());
        ended.assert_released(Memory::Steady);
        self.stamp.mark_moved();
        self.stamp.assert_unharmed();
        self.stamp.quit();
        self.site.assert_clean(&[]);
    }
}

#[test]
fn nobody_listens() {
    let Some(mut trial) = Trial::new() else { return };
    let source = Plan::new().source_to(&trial.site, trial.stamp.pid(), "127.0.0.1:1").wait(STEP);
    source.assert(2, "rolled_back", &["127.0.0.1:1", "refused", "start `uffd-daemon serve`"]);
    trial.assert_unharmed();
    trial.finish();
}

#[test]
fn the_destination_refuses() {
    let Some(mut trial) = Trial::new() else { return };
    // Its pids are in use: here, by itself.
    let ended = Plan::new().destination(["--pidns", "host"]).run(&trial.site, trial.stamp.pid());
    ended.source.assert(2, "rolled_back", &["destination: pid", "is in use", "--pidns auto"]);
    assert_eq!(ended.destination.status, 0, "refusing is no failure: {:#?}", ended.destination);
    trial.assert_unharmed();
    trial.finish();
}

#[test]
fn criu_does_not_dump() {
    let Some(mut trial) = Trial::new() else { return };
    for option in ["--no-such-option", "--tree=1"] {
        let ended = Plan::new().dump([option]).run(&trial.site, trial.stamp.pid());
        trial.assert_undone(&ended, &["criu dump failed"]);
    }
    trial.finish();
}

#[test]
fn criu_does_not_restore() {
    let Some(mut trial) = Trial::new() else { return };
    for store in STORES {
        let plan = Plan::new().source(["--store", store]).restore(["--no-such-option"]);
        let ended = plan.run(&trial.site, trial.stamp.pid());
        trial.assert_undone(&ended, &["destination: criu restore failed", "no-such-option"]);
    }
    trial.finish();
}

#[test]
fn images_are_damaged() {
    let Some(mut trial) = Trial::new() else { return };
    let work = trial.site.work_dir().display().to_string();
    for (image, how) in [
        ("core-*.img", "truncate --size 10"),
        ("mm-*.img", "rm"),
        ("pagemap-*.img", "truncate --size 20"),
        ("inventory.img", "truncate --size 0"),
        ("files.img", "truncate --size 30"),
    ] {
        let damage = format!("{how} {work}/postcopy-destination-*/images/{image}");
        let ended = Plan::new().destination_hook("pre-restore", &damage).run(&trial.site, trial.stamp.pid());
        trial.assert_undone(&ended, &["destination: "]);
    }
    trial.finish();
}

#[test]
fn hooks_fail() {
    let Some(mut trial) = Trial::new() else { return };
    let undone = trial.site.path("undone");
    let undo = format!("echo $POSTCOPY_ROLE $POSTCOPY_PHASE >> {}", undone.display());
    for store in STORES {
        for (role, phase) in [
            ("source", "pre-freeze"),
            ("source", "post-dump"),
            ("destination", "pre-restore"),
            ("destination", "post-restore"),
        ] {
            let plan = Plan::new().source(["--store", store]);
            let plan = plan.source_hook("rolled-back", &undo).destination_hook("rolled-back", &undo);
            let plan = match role {
                "source" => plan.source_hook(phase, "exit 7"),
                _ => plan.destination_hook(phase, "exit 7"),
            };
            let _ = std::fs::remove_file(&undone);
            let ended = plan.run(&trial.site, trial.stamp.pid());
            trial.assert_undone(&ended, &["hook", phase, "exit status: 7"]);
            let undone = std::fs::read_to_string(&undone).unwrap();
            // The destination first: it must have given back what the source takes again.
            assert_eq!(undone, "destination rolled-back\nsource rolled-back\n", "{role} {phase}");
        }
    }
    trial.finish();
}

#[test]
fn the_source_is_interrupted() {
    let Some(mut trial) = Trial::new() else { return };
    for (store, role, phase) in [
        ("pipes", "source", "pre-freeze"),
        ("pipes", "source", "post-dump"),
        ("frozen", "source", "post-dump"),
        ("pipes", "destination", "pre-restore"),
        ("pipes", "destination", "post-restore"),
        ("frozen", "destination", "post-restore"),
    ] {
        let ended = interrupt(&trial, store, role, phase, |under_way| &under_way.source.tool);
        trial.assert_undone(&ended, &["interrupted"]);
    }
    trial.finish();
}

#[test]
fn the_destination_is_interrupted() {
    let Some(mut trial) = Trial::new() else { return };
    for (store, role, phase) in [
        ("pipes", "source", "pre-freeze"),
        ("pipes", "source", "post-dump"),
        ("pipes", "destination", "pre-restore"),
        ("pipes", "destination", "post-restore"),
        ("frozen", "destination", "post-restore"),
    ] {
        let ended = interrupt(&trial, store, role, phase, |under_way| &under_way.destination.tool);
        trial.assert_undone(&ended, &["destination: interrupted"]);
    }
    trial.finish();
}

/// Has a move stop at a phase, sends INT to one of its programs, and lets it go on.
fn interrupt(
    trial: &Trial,
    store: &str,
    role: &str,
    phase: &str,
    whom: impl Fn(&tests::moves::Move) -> &tests::tool::Tool,
) -> Ended {
    let mut gate = Gate::new(&trial.site, &format!("{store}-{role}-{phase}"));
    let plan = Plan::new().source(["--store", store]);
    let plan = match role {
        "source" => plan.source_hook(phase, &gate.command()),
        _ => plan.destination_hook(phase, &gate.command()),
    };
    let under_way = plan.start(&trial.site, trial.stamp.pid());
    gate.wait_reached();
    let interrupted = whom(&under_way);
    interrupted.signal(Signal::SIGINT);
    // Behind an open gate the move is soon past its switchover: a busy host may deliver the signal after that.
    eventually("that it has the signal", STEP, || {
        (!processes::is_pending(interrupted.pid(), Signal::SIGINT)).then_some(())
    });
    gate.open(0);
    under_way.wait()
}

#[test]
fn the_source_is_interrupted_at_any_moment_of_the_dump() {
    let Some(mut trial) = Trial::new() else { return };
    let step_ms = if tests::long() { 2 } else { 15 };
    let mut undone = 0;
    for delay_ms in (0..150).step_by(step_ms) {
        let under_way = Plan::new().start(&trial.site, trial.stamp.pid());
        under_way.source.tool.wait_line("phase=\"freeze\"", STEP);
        // Not a synchronisation: the moments are to be different ones.
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        under_way.source.tool.signal(Signal::SIGINT);
        let ended = under_way.wait();
        if ended.source.status == 0 {
            // It was faster: later moments are behind the switchover as well.
            ended.assert_arrived(Memory::Steady);
            trial.stamp.mark_moved();
            trial.stamp.assert_unharmed();
            trial.stamp.quit();
            break;
        }
        trial.assert_undone(&ended, &["interrupted"]);
        undone += 1;
    }
    assert!(undone >= 2, "the dump was over before it could be interrupted");
}

#[test]
fn the_connection_breaks_while_images_are_shipped() {
    let Some(mut trial) = Trial::new() else { return };
    for (store, bytes) in [("pipes", 0), ("pipes", 1), ("pipes", 5000), ("frozen", 60_000)] {
        let mut gate = Gate::new(&trial.site, &format!("{store}-{bytes}"));
        let plan = Plan::new().source(["--store", store]).source_hook("post-dump", &gate.command());
        let destination = plan.serve(&trial.site);
        let link = Proxy::to(&destination.address);
        let source = plan.source_to(&trial.site, trial.stamp.pid(), link.address());
        gate.wait_reached();
        link.cut_control_after(bytes);
        gate.open(0);
        let (source, destination) = (source.wait(MOVE), destination.wait(STEP));
        source.assert(1, "rolled_back", &["lost the destination"]);
        destination.assert(1, "rolled_back", &["lost the source"]);
        trial.assert_unharmed();
    }
    trial.finish();
}

#[test]
fn the_connection_breaks_before_the_source_decides() {
    let Some(mut trial) = Trial::new() else { return };
    for store in STORES {
        let mut gate = Gate::new(&trial.site, store);
        let plan = Plan::new().source(["--store", store]).destination_hook("post-restore", &gate.command());
        let destination = plan.serve(&trial.site);
        let link = Proxy::to(&destination.address);
        let source = plan.source_to(&trial.site, trial.stamp.pid(), link.address());
        gate.wait_reached();
        link.cut();
        let source = source.wait(MOVE);
        // The destination may learn it later: the source does not wait for its hook.
        gate.open(0);
        source.assert(1, "rolled_back", &["did not confirm"]);
        destination.wait(STEP).assert(1, "rolled_back", &["lost the source"]);
        trial.assert_unharmed();
    }
    trial.finish();
}

#[test]
fn the_destination_dies() {
    let Some(mut trial) = Trial::new() else { return };
    for (role, phase) in
        [("source", "post-dump"), ("destination", "pre-restore"), ("destination", "post-restore")]
    {
        let mut gate = Gate::new(&trial.site, phase);
        let plan = match role {
            "source" => Plan::new().source_hook(phase, &gate.command()),
            _ => Plan::new().destination_hook(phase, &gate.command()),
        };
        let under_way = plan.start(&trial.site, trial.stamp.pid());
        gate.wait_reached();
        under_way.destination.tool.signal(Signal::SIGKILL);
        gate.open(0);
        let source = under_way.source.wait(MOVE);
        source.assert(1, "rolled_back", &["destination"]);
        trial.stamp.assert_unharmed();
        // Its directory stays, as nobody is there to remove it; its processes do not.
        trial.site.assert_only(&[trial.stamp.pid()]);
        for left in std::fs::read_dir(trial.site.work_dir()).unwrap() {
            std::fs::remove_dir_all(left.unwrap().path()).unwrap();
        }
    }
    trial.finish();
}

#[test]
fn the_source_dies() {
    let Some(mut trial) = Trial::new() else { return };
    for store in STORES {
        let mut gate = Gate::new(&trial.site, store);
        let plan = Plan::new().source(["--store", store]).destination_hook("post-restore", &gate.command());
        let under_way = plan.start(&trial.site, trial.stamp.pid());
        gate.wait_reached();
        under_way.source.tool.signal(Signal::SIGKILL);
        gate.open(0);
        under_way.destination.wait(MOVE).assert(1, "rolled_back", &["lost the source"]);
        // Nobody is left to let it run: the fence holds when CRIU ends.
        trial.site.assert_only(&[trial.stamp.pid()]);
        tests::processes::assert_stops(trial.stamp.pid());
        tests::processes::signal(trial.stamp.pid(), Signal::SIGCONT);
        trial.stamp.assert_unharmed();
        for left in std::fs::read_dir(trial.site.work_dir()).unwrap() {
            std::fs::remove_dir_all(left.unwrap().path()).unwrap();
        }
    }
    trial.finish();
}

#[test]
fn the_process_ends_before_it_is_frozen() {
    let Some(trial) = Trial::new() else { return };
    let Trial { mut stamp, site } = trial;
    stamp.give_up();
    let ended = Plan::new().source_hook("pre-freeze", "kill -KILL $POSTCOPY_PID").run(&site, stamp.pid());
    ended.assert_rolled_back(&["ended before it was frozen"]);
    site.assert_clean(&[]);
}

#[test]
fn a_stopped_process_stays_stopped() {
    let Some(mut trial) = Trial::new() else { return };
    tests::processes::signal(trial.stamp.pid(), Signal::SIGSTOP);
    let stopped = || tests::processes::is_stopped(trial.stamp.pid()).then_some(());
    tests::eventually("a stopped process", STEP, stopped);
    let ended = Plan::new().destination_hook("post-restore", "exit 7").run(&trial.site, trial.stamp.pid());
    ended.assert_rolled_back(&["exit status: 7"]);
    tests::eventually("the same state as before", STEP, stopped);
    tests::processes::signal(trial.stamp.pid(), Signal::SIGCONT);
    trial.assert_unharmed();
    trial.finish();
}
