//! Moments of a move, from CRIU's dump to the release, at which a test stops it: something happens there and nowhere else.
//!
//! A moment is hit by what the move itself does: a hook of ours, CRIU's own action script, or a byte of a lane that the link
//! holds. Nothing sleeps until it might have come.

use nix::sys::signal::Signal;
use protocol::units::PAGE_BYTES;
use protocol::wire::frame::{HEADER_LEN, RUN_HEADER_LEN};
use protocol::wire::hello::{HELLO_LEN, HELLO_REPLY_LEN, Role};

use crate::gate::{Gate, action_script};
use crate::moves::{Daemon, Plan, Source};
use crate::processes::{self, Entry};
use crate::proxy::{Proxy, Towards};
use crate::site::Site;
use crate::tool::Tool;
use crate::{STEP, eventually, eventually_or_say};

/// Bytes of a message without a body.
const FRAME: u64 = HEADER_LEN as u64;
/// Bytes of a demand.
const DEMAND: u64 = FRAME + 16;
/// Bytes of a page on a lane.
const PAGE: u64 = RUN_HEADER_LEN as u64 + PAGE_BYTES;
/// Bytes in front of everything that the source sends on a connection.
const HELLO: u64 = HELLO_LEN as u64;
/// Bytes in front of everything that the destination sends on one.
const REPLY: u64 = HELLO_REPLY_LEN as u64;
/// Bytes of the body of `Complete`.
const COMPLETE: u64 = 17 * 8;

/// A side of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The one that the process leaves.
    Source,
    /// The one that it comes to.
    Destination,
}

/// How far a move has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum When {
    /// CRIU has frozen and dumped, and its page server is not ready yet.
    Dumping,
    /// The tasks are behind the fence.
    Dumped,
    /// Images are on their way.
    Shipping,
    /// All of them are there.
    Shipped,
    /// CRIU restores.
    Restoring,
    /// What it restores has touched a page that is at the source.
    Faulting,
    /// Everything is restored and held.
    Held,
    /// The destination has said so.
    Prepared,
    /// `Commit` is on its way.
    CommitSent,
    /// The destination has it; the tasks have not run.
    Committed,
    /// CRIU has restored what the tasks go on with; they have not run.
    Resuming,
    /// The tasks run; the destination has not said so.
    Runs,
    /// `Running` is on its way.
    RunningSent,
    /// The source has let go of its tasks, and pages travel.
    Pushing,
    /// `Complete` is on its way.
    Complete,
    /// `Released` is on its way.
    Released,
    /// The source is done, but for its hook.
    SourceDone,
    /// The destination is done, but for its hook.
    DestinationDone,
}

/// What stops the move.
#[derive(Clone, Copy, Debug)]
enum Barrier {
    /// A hook of ours.
    Hook(At, &'static str),
    /// CRIU's action script.
    Script(At, &'static str),
    /// CRIU itself is stopped once the barrier is lifted at the destination.
    Lifted,
    /// The link, behind so many bytes of a lane, counted from a moment before.
    Behind(From, Role, Towards, u64),
    /// The link, on the push lane, behind so many eighths of the memory.
    Eighths(u64),
}

/// From when on bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// The connections are made.
    Begin,
    /// `post-dump`: nothing is shipped.
    Dumped,
    /// `post-restore`: the next message is `Prepared`.
    Restored,
}

/// A moment of a move.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// What has just happened.
    pub name: &'static str,
    /// How far that is.
    pub when: When,
    barrier: Barrier,
}

const fn moment(when: When, name: &'static str, barrier: Barrier) -> Moment {
    Moment { name, when, barrier }
}

/// Every moment, in the order of a move.
pub const MOMENTS: [Moment; 35] = [
    moment(When::Dumping, "CRIU has frozen and dumped", Barrier::Script(At::Source, "post-dump")),
    moment(When::Dumped, "the fence stands", Barrier::Hook(At::Source, "post-dump")),
    moment(When::Shipping, "no image has passed", control(From::Dumped, Towards::Destination, 0)),
    moment(
        When::Shipping,
        "4 KiB of images have passed",
        control(From::Dumped, Towards::Destination, 4 << 10),
    ),
    moment(
        When::Shipping,
        "32 KiB of images have passed",
        control(From::Dumped, Towards::Destination, 32 << 10),
    ),
    moment(When::Shipped, "all images are there", Barrier::Hook(At::Destination, "pre-restore")),
    moment(When::Restoring, "CRIU begins to restore", Barrier::Script(At::Destination, "pre-restore")),
    moment(When::Faulting, "the restore waits for a page", lane(Role::Fault, Towards::Destination, HELLO)),
    moment(When::Held, "all is restored and held", Barrier::Hook(At::Destination, "post-restore")),
    moment(When::Prepared, "Prepared is on its way", control(From::Restored, Towards::Source, 0)),
    moment(
        When::Prepared,
        "half of Prepared has passed",
        control(From::Restored, Towards::Source, FRAME / 2),
    ),
    moment(When::CommitSent, "Commit is on its way", control(From::Restored, Towards::Destination, 0)),
    moment(When::Committed, "the barrier is lifted", Barrier::Lifted),
    moment(When::Resuming, "CRIU lets go of the tasks", Barrier::Script(At::Destination, "pre-resume")),
    moment(When::Runs, "the tasks run", Barrier::Script(At::Destination, "post-resume")),
    moment(When::RunningSent, "Running is on its way", control(From::Restored, Towards::Source, FRAME)),
    moment(When::Pushing, "nothing is pushed", lane(Role::Push, Towards::Destination, HELLO)),
    moment(When::Pushing, "1/8 is pushed", Barrier::Eighths(1)),
    moment(When::Pushing, "2/8 are pushed", Barrier::Eighths(2)),
    moment(When::Pushing, "3/8 are pushed", Barrier::Eighths(3)),
    moment(When::Pushing, "4/8 are pushed", Barrier::Eighths(4)),
    moment(When::Pushing, "5/8 are pushed", Barrier::Eighths(5)),
    moment(When::Pushing, "6/8 are pushed", Barrier::Eighths(6)),
    moment(When::Pushing, "7/8 are pushed", Barrier::Eighths(7)),
    moment(When::Pushing, "a demand is on its way", lane(Role::Fault, Towards::Source, REPLY + 20 * DEMAND)),
    moment(
        When::Pushing,
        "half of a demand has passed",
        lane(Role::Fault, Towards::Source, REPLY + 20 * DEMAND + DEMAND / 2),
    ),
    moment(
        When::Pushing,
        "an answer is on its way",
        lane(Role::Fault, Towards::Destination, HELLO + 10 * PAGE),
    ),
    moment(
        When::Pushing,
        "half of an answer has passed",
        lane(Role::Fault, Towards::Destination, HELLO + 10 * PAGE + PAGE / 2),
    ),
    moment(
        When::Pushing,
        "the first acknowledgement is on its way",
        lane(Role::Push, Towards::Source, REPLY),
    ),
    moment(
        When::Pushing,
        "half of an acknowledgement has passed",
        lane(Role::Push, Towards::Source, REPLY + FRAME + 10),
    ),
    moment(When::Complete, "Complete is on its way", control(From::Restored, Towards::Source, 2 * FRAME)),
    moment(
        When::Complete,
        "half of Complete has passed",
        control(From::Restored, Towards::Source, 3 * FRAME + COMPLETE / 2),
    ),
    moment(When::Released, "Released is on its way", control(From::Restored, Towards::Destination, FRAME)),
    moment(When::SourceDone, "the source is done", Barrier::Hook(At::Source, "released")),
    moment(When::DestinationDone, "the destination is done", Barrier::Hook(At::Destination, "released")),
];

const fn control(from: From, towards: Towards, bytes: u64) -> Barrier {
    Barrier::Behind(from, Role::Control, towards, bytes)
}

const fn lane(role: Role, towards: Towards, bytes: u64) -> Barrier {
    Barrier::Behind(From::Begin, role, towards, bytes)
}

/// A move that stands at a moment.
#[derive(Debug)]
pub struct Stopped {
    /// Its source.
    pub source: Source,
    /// Its destination.
    pub destination: Daemon,
    /// The link between them.
    pub line: Proxy,
    gate: Option<Gate>,
    /// CRIU, which a signal has stopped.
    stopped: Option<u32>,
}

/// The CRIU that restores. Tasks that are being restored have its name as well, and it for a parent.
#[must_use]
pub fn restorer(site: &Site) -> Option<u32> {
    let named = |entry: &Entry| entry.name == "criu";
    let by_criu = |entry: &Entry| Entry::of(entry.parent).is_some_and(|parent| named(&parent));
    let found = site.processes().into_iter().filter(|entry| named(entry) && !by_criu(entry));
    found.map(|entry| entry.pid).find(|pid| processes::is_told(*pid, "restore"))
}

/// Stops CRIU at the barrier and lifts that: its script, which has waited there, has ended.
fn lift(site: &Site, gate: &mut Gate, tools: [&Tool; 2]) -> u32 {
    let criu = restorer(site).expect("a restore that is held");
    processes::signal(criu, Signal::SIGSTOP);
    // Not before it stands still: on a busy machine it would still reap the script.
    eventually("that CRIU stands still", STEP, || processes::is_stopped(criu).then_some(()));
    gate.open(0);
    let ended = || {
        // By way of a shell, or not.
        let script = |entry: &Entry| entry.parent == criu && ["sh", "uffd-daemon"].contains(&&*entry.name);
        // One that has ended is not reaped by a CRIU that stands still.
        processes::all().iter().any(|entry| script(entry) && entry.has_ended()).then_some(())
    };
    let say = || {
        let below: Vec<_> = processes::below(criu).iter().map(ToString::to_string).collect();
        format!("{below:?}\n{}\n{}", tools[0].last_lines(), tools[1].last_lines())
    };
    eventually_or_say("the end of the script at the barrier", STEP, ended, say);
    criu
}

impl Stopped {
    /// Lets the move go on.
    pub fn go_on(&mut self) {
        if let Some(pid) = self.stopped.take().filter(|pid| !processes::has_ended(*pid)) {
            processes::signal(pid, Signal::SIGCONT);
        }
        if let Some(gate) = &mut self.gate {
            gate.open(0);
        }
        self.line.let_go();
    }
}

impl Moment {
    /// Moves the process `pid` with `mib` of memory as planned, up to this moment; nothing if chance has CRIU copy all of it, so
    /// that there is not much to move.
    ///
    /// # Panics
    /// If it does not come to the moment.
    #[track_caller]
    #[must_use]
    pub fn reach(&self, site: &Site, plan: &Plan<'_>, pid: u32, mib: usize) -> Option<Stopped> {
        let mut gate = self.has_gate().then(|| Gate::new(site, "moment"));
        let plan = match &gate {
            Some(gate) => self.with_gate(plan.clone(), site, &gate.command()),
            None => plan.clone(),
        };
        let plan = plan.source(["--push-rate", self.push_rate()]);
        let destination = plan.serve(site);
        let line = Proxy::to(&destination.address);
        let hold = self.hold(mib);
        if let Some((From::Begin, role, towards, bytes)) = hold {
            line.hold_behind(role, towards, bytes);
        }
        let source = plan.source_to(site, pid, line.address());
        if let Some(gate) = &mut gate {
            wait(self.name, [&source.tool, &destination.tool], || gate.is_reached())?;
        }
        if let Some((from, role, towards, bytes)) = hold {
            if from != From::Begin {
                line.hold_behind(role, towards, bytes);
            }
            // It was only there to count from.
            if let Some(mut gate) = gate.take() {
                gate.open(0);
            }
            wait(self.name, [&source.tool, &destination.tool], || line.is_holding())?;
        }
        let lifts = matches!(self.barrier, Barrier::Lifted);
        let stopped = lifts
            .then(|| gate.take())
            .flatten()
            .map(|mut gate| lift(site, &mut gate, [&source.tool, &destination.tool]));
        Some(Stopped { source, destination, line, gate, stopped })
    }

    fn hold(&self, mib: usize) -> Option<(From, Role, Towards, u64)> {
        match self.barrier {
            Barrier::Behind(from, role, towards, bytes) => Some((from, role, towards, bytes)),
            Barrier::Eighths(eighths) => {
                Some((From::Begin, Role::Push, Towards::Destination, HELLO + ((mib as u64) << 17) * eighths))
            }
            Barrier::Hook(..) | Barrier::Script(..) | Barrier::Lifted => None,
        }
    }

    fn has_gate(&self) -> bool {
        self.hold(0).is_none_or(|(from, ..)| from != From::Begin)
    }

    /// What the source is told to push at: slowly where pages are to be asked for.
    const fn push_rate(&self) -> &'static str {
        match self.barrier {
            Barrier::Behind(_, Role::Fault, ..) => "8M",
            _ => "unlimited",
        }
    }

    fn with_gate<'a>(&self, plan: Plan<'a>, site: &Site, command: &str) -> Plan<'a> {
        match self.barrier {
            Barrier::Hook(At::Source, phase) => plan.source_hook(phase, command),
            Barrier::Hook(At::Destination, phase) => plan.destination_hook(phase, command),
            Barrier::Behind(From::Dumped, ..) => plan.source_hook("post-dump", command),
            Barrier::Behind(From::Restored, ..) | Barrier::Lifted => {
                plan.destination_hook("post-restore", command)
            }
            Barrier::Behind(From::Begin, ..) | Barrier::Eighths(_) => plan,
            Barrier::Script(at, phase) => {
                let options =
                    ["--action-script".into(), action_script(site, phase, command).into_os_string()];
                if at == At::Source { plan.dump(options) } else { plan.restore(options) }
            }
        }
    }
}

/// Waits until a moment has come; nothing if CRIU copies all memory.
#[track_caller]
fn wait(name: &str, tools: [&Tool; 2], mut come: impl FnMut() -> bool) -> Option<()> {
    eventually(name, STEP, || {
        let copied = || tools[0].lines().iter().any(|line| line.contains("copies all memory"));
        match () {
            () if copied() => Some(None),
            () if come() => Some(Some(())),
            () if tools.iter().all(|tool| tool.has_ended()) => {
                panic!("{name}: never came: {}\n{}", tools[0].last_lines(), tools[1].last_lines())
            }
            () => None,
        }
    })
}
