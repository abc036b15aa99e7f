//! Whoever is killed, and wherever in a move: the process goes on with the right bytes, once, or stands still and somebody says so.
//!
//! Each case stops a move at a moment, kills one of its processes there, does what docs/operations.md says, and judges every page.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use experiments::stamp::Options;
use nix::sys::signal::Signal;
use tests::moments::{MOMENTS, Moment, Stopped, When, restorer};
use tests::moves::{Move, Plan, Side};
use tests::processes::{self, Entry};
use tests::site::{Site, assert_ends};
use tests::stamps::{self, Stamp};
use tests::tool::Tool;
use tests::{MOVE, STEP, eventually, programs};

/// Memory of the process that is moved.
const MIB: usize = 32;
/// How often a process is begun anew whose memory CRIU copies as a whole.
const TRIES: usize = 5;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Daemon,
    /// One that leaves no word.
    SecretiveDaemon,
    Source,
    Dump,
    Restore,
    Keeper,
    Holder,
}

/// How a case ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As if nothing had been.
    Released,
    /// By itself: the process runs on at the source, nothing of it is left at the destination.
    RolledBack,
    /// The tasks stand still at the source and nowhere else. Another source knows that they may run.
    Undone,
    /// A daemon that listens there again says that nothing has run, and the source rolls back.
    Denied,
    /// The tasks stand still at the source and nowhere else; only the operator knows.
    LetRun,
    /// Another daemon goes on, and the move is released.
    TakenOver,
    /// Another source goes on, and the move is released.
    Resumed,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Released => "released",
            Self::RolledBack => "rolled back",
            Self::Undone => "stands still at the source, `resume` rolls back",
            Self::Denied => "rolled back as soon as a daemon listens again",
            Self::LetRun => "stands still at the source, `resume --destination-is-clean` rolls back",
            Self::TakenOver => "paused, `takeover`, released",
            Self::Resumed => "paused, `resume`, released",
        })
    }
}

impl Victim {
    /// How it may end; nothing where the victim is not there yet, or perhaps not any more.
    fn ends(self, when: When) -> &'static [End] {
        use When::{
            CommitSent, Committed, Complete, DestinationDone, Dumping, Faulting, Held, Prepared, Pushing,
            Restoring, Resuming, Runs, SourceDone,
        };
        match (self, when) {
            (Self::Daemon, SourceDone) | (Self::Source, DestinationDone) => &[],
            // Whether the source hears of the end first, or is told to commit: then the next daemon knows that nothing ran.
            (Self::Daemon, Prepared) => &[End::RolledBack, End::Denied],
            // CRIU finds nobody to hand over to, and kills what it was about to let run.
            (Self::Daemon, CommitSent | Committed) => &[End::Denied],
            (Self::SecretiveDaemon, Committed) => &[End::LetRun],
            (Self::SecretiveDaemon, _) => &[],
            (Self::Daemon, when) if when < CommitSent => &[End::RolledBack],
            (Self::Daemon, _) => &[End::TakenOver],

            // CRIU fails for want of somebody to tell that it is ready, and lets go of the tasks.
            (Self::Source, Dumping) => &[End::RolledBack],
            (Self::Source, when) if when < CommitSent => &[End::Undone],
            // The pages are in stopped tasks, and later in pipes.
            (Self::Source, when) if when <= Complete => &[End::Resumed],
            (Self::Source, _) => &[End::Released],

            (Self::Dump, Dumping) => &[End::RolledBack],
            // Without it a move is called off as long as its pages have not been drained.
            (Self::Dump, when) if when < CommitSent => &[End::RolledBack, End::Released],
            (Self::Dump, when) if when < Pushing => &[End::Released],
            (Self::Dump, _) => &[],

            (Self::Restore, when) if when < Restoring => &[],
            (Self::Restore, when) if when <= Committed => &[End::RolledBack],
            // The kernel lets go of tasks whose tracer dies.
            (Self::Restore, Resuming | Runs) => &[End::Released],
            (Self::Restore, _) => &[],

            // Dismissed when every page is there, which the source's hook does not wait for.
            (Self::Keeper, when) if when < Restoring || when == SourceDone => &[],
            // Behind the restore's start it is told what to say to others; without that a move is called off.
            (Self::Keeper, Restoring | Faulting) => &[End::RolledBack, End::Released],
            (Self::Keeper, when) if when >= Held => &[End::Released],

            (Self::Holder, Pushing | Complete) => &[End::Released],
            (Self::Keeper | Self::Holder, _) => &[],
        }
    }

    /// Its pid.
    fn find(self, site: &Site, stopped: &Stopped) -> Option<u32> {
        let (source, daemon) = (stopped.source.tool.pid(), stopped.destination.tool.pid());
        let find = |wanted: &dyn Fn(&Entry) -> bool| {
            site.processes().into_iter().find(wanted).map(|entry| entry.pid)
        };
        match self {
            Self::Daemon | Self::SecretiveDaemon => Some(daemon),
            Self::Source => Some(source),
            Self::Dump => find(&|entry| entry.parent == source && entry.name == "criu"),
            Self::Restore => restorer(site),
            Self::Keeper => find(&|entry| entry.parent == daemon && processes::is_told(entry.pid, "keeper")),
            Self::Holder => find(&|entry| entry.parent == source && entry.name == "postcopy-hold"),
        }
    }
}

/// A case: its place, and where its programs leave word.
struct Case {
    victim: Victim,
    moment: Moment,
    /// How long everything goes on behind the moment before the victim is killed.
    later: Duration,
    state: PathBuf,
    kept: PathBuf,
    stamp: Stamp,
    // Dropped last.
    site: Site,
}

/// Where the victim was there.
fn judge(victim: Victim, moment: Moment, later: Duration) -> Option<End> {
    for _ in 0..TRIES {
        let site = Site::new()?;
        let options = Options {
            mib: MIB,
            threads: 2,
            rate_us: 500,
            churn: true,
            fork: true,
            ..stamps::options(&site, "busy")
        };
        let stamp = Stamp::start(&options);
        let (state, kept) = (site.path("state"), site.path("kept"));
        let case = Case { victim, moment, later, state, kept, stamp, site };
        if let Some(end) = case.run() {
            return Some(end);
        }
    }
    panic!("CRIU copied all memory {TRIES} times in a row");
}

impl Case {
    fn run(mut self) -> Option<End> {
        let ends = match self.later {
            Duration::ZERO => self.victim.ends(self.moment.when),
            _ => &[End::RolledBack, End::LetRun, End::Released],
        };
        // Long enough for whoever follows, and not longer than it takes where nobody can.
        let follows = ends.iter().any(|end| matches!(end, End::TakenOver | End::Resumed | End::Denied));
        let patience = if follows { "30" } else { "2" };
        let plan =
            Plan::new().source(["--give-up-after", patience]).destination(["--give-up-after", patience]);
        let plan = plan.source(["--state-dir".as_ref(), self.kept.as_os_str()]);
        let word =
            if self.victim == Victim::SecretiveDaemon { "none".as_ref() } else { self.state.as_os_str() };
        let plan = plan.destination(["--state-dir".as_ref(), word]);
        let Some(mut stopped) = self.moment.reach(&self.site, &plan, self.stamp.pid(), MIB) else {
            self.stamp.give_up();
            processes::kill_below(std::process::id());
            return None;
        };
        let behind = self.moment.when > When::CommitSent;
        if behind {
            self.stamp.give_up();
        }
        if self.moment.when >= When::Pushing {
            // The pages are in pipes, and nowhere else.
            assert_ends(self.stamp.pid(), STEP);
        }
        let victim = eventually("the victim", STEP, || self.victim.find(&self.site, &stopped));
        if !self.later.is_zero() {
            stopped.go_on();
            std::thread::sleep(self.later);
            // It may have ended by itself.
            let _ = processes::try_signal(victim, Signal::SIGKILL);
        } else {
            processes::signal(victim, Signal::SIGKILL);
        }
        assert_ends(victim, STEP);
        let too_early = self.moment.when == When::Committed;
        if self.victim == Victim::Daemon && too_early {
            self.wait_orphaned();
        }
        let again = ends.contains(&End::Denied).then(|| self.serve_again(&stopped));
        if let Some(daemon) = again.as_ref().filter(|_| too_early) {
            // It must not take tasks for done that CRIU is about to kill, nor say so of any before they are.
            eventually("a keeper with another daemon", STEP, || {
                assert!(!daemon.has_ended(), "{}", daemon.last_lines());
                self.status().contains("served by a daemon").then_some(())
            });
            stopped.go_on();
            daemon.wait_line("its tasks never ran here", STEP);
            daemon.wait_line("listening on", STEP);
        } else if let Some(daemon) = &again {
            daemon.wait_line("listening on", STEP);
        }
        stopped.go_on();
        let end = match *ends {
            [end] => end,
            _ => self.which(&stopped),
        };
        assert!(ends.contains(&end), "{end:?}, not one of {ends:?}: {}", stopped.source.tool.last_lines());
        if let Some(mut daemon) = again {
            eventually("the source's end", MOVE, || stopped.source.tool.has_ended().then_some(()));
            daemon.signal(Signal::SIGTERM);
            assert_eq!(daemon.wait(STEP), 0, "{}", daemon.last_lines());
        }
        match end {
            End::Released => self.released(stopped),
            End::RolledBack => self.rolled_back(stopped),
            End::Denied => self.rolled_back(stopped),
            End::Undone => self.undone(stopped),
            End::LetRun => self.let_run(stopped),
            End::TakenOver => self.taken_over(stopped),
            End::Resumed => self.resumed(stopped),
        }
        Some(end)
    }

    /// Which of the ends it is, as the source says.
    fn which(&self, stopped: &Stopped) -> End {
        stopped.source.tool.wait_closed(MOVE);
        let said = |words| stopped.source.tool.lines().iter().any(|line| line.contains(words));
        match () {
            () if said("nothing of it is left there") => End::Denied,
            () if said("rolled back: the source runs on") => End::RolledBack,
            () if said("stay stopped with all their memory") => End::LetRun,
            () => End::Released,
        }
    }

    fn released(self, stopped: Stopped) {
        self.survivors_say(stopped, 0, "released");
        self.arrived();
    }

    /// Both programs end like this, except one that was killed.
    fn survivors_say(&self, stopped: Stopped, status: i32, outcome: &str) {
        let Stopped { source, destination, .. } = stopped;
        if self.victim != Victim::Source {
            source.wait(MOVE).assert(status, outcome, &[]);
        }
        if !matches!(self.victim, Victim::Daemon | Victim::SecretiveDaemon) {
            destination.wait(MOVE).assert(status, outcome, &[]);
        }
    }

    /// All of it runs at the destination, and has never run here meanwhile.
    fn arrived(mut self) {
        self.stamp.mark_moved();
        self.stamp.assert_unharmed();
        assert!(self.stamp.assert_ran_in_turn(), "it has not moved");
        self.assert_no_word();
        self.stamp.quit();
        self.site.assert_only(&[]);
    }

    /// Nothing is left for a successor of the source.
    fn assert_no_word(&self) {
        let left: Vec<_> = std::fs::read_dir(&self.kept).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn rolled_back(self, stopped: Stopped) {
        self.survivors_say(stopped, 1, "rolled_back");
        self.runs_here();
    }

    /// It runs at the source, and has run nowhere else; nothing else is left.
    fn runs_here(mut self) {
        self.stamp.assert_unharmed();
        assert!(!self.stamp.assert_ran_in_turn(), "it has run at the destination");
        let others = || {
            let tree: BTreeSet<u32> = self.tree().into_iter().collect();
            let mut others = self.site.processes();
            others.retain(|entry| !tree.contains(&entry.pid));
            others
        };
        eventually("that nothing else is left", STEP, || others().is_empty().then_some(()));
        self.assert_no_word();
        self.stamp.quit();
    }

    /// The tasks at the source.
    fn tree(&self) -> Vec<u32> {
        let pid = self.stamp.pid();
        processes::below(pid).into_iter().map(|entry| entry.pid).chain([pid]).collect()
    }

    fn undone(self, stopped: Stopped) {
        stopped.destination.wait(MOVE).assert(1, "rolled_back", &[]);
        self.resume_source(&[], 1, "ended before it committed");
        self.runs_here();
    }

    /// Another source takes the place of the first.
    fn resume_source(&self, more: &[&str], status: i32, word: &str) {
        let mut command = Command::new(programs::program("source-server"));
        command.arg("resume").arg("--state-dir").arg(&self.kept).args(more);
        let mut follower = Tool::start("resume", command);
        assert_eq!(follower.wait(MOVE), status, "{}", follower.last_lines());
        assert!(follower.lines().iter().any(|line| line.contains(word)), "{}", follower.last_lines());
    }

    /// Lets the tasks at the source run, as the source has told the operator to.
    fn continue_here(&self, source: &Side) {
        self.tree().into_iter().for_each(processes::assert_stops);
        let said = source.said();
        let (_, told) = said.split_once("source-server resume ").expect("what to do");
        let told: Vec<&str> = told.split(';').next().unwrap().split_whitespace().collect();
        assert!(told.contains(&"--destination-is-clean"), "{said}");
        self.resume_source(&told, 1, "its operator says so");
    }

    fn let_run(mut self, stopped: Stopped) {
        let source = stopped.source.wait(MOVE);
        source.assert(3, "paused", &["stay stopped with all their memory"]);
        let pid = self.stamp.pid();
        if let Some(moved) = self.site.moved(pid).filter(|_| !self.later.is_zero()) {
            // As an operator is told to: the copy there goes first.
            processes::signal(Entry::of(moved).unwrap().parent, Signal::SIGKILL);
        }
        eventually("that nothing is left at the destination", STEP, || {
            self.site.moved(pid).is_none().then_some(())
        });
        self.continue_here(&source);
        if self.later.is_zero() {
            return self.runs_here();
        }
        // A thread may have run before the death of another ended its task: that is undone, its memory is that of the freeze.
        let checked = self.stamp.handle().check(STEP).unwrap();
        assert!(checked.wrong == 0 && checked.pages > 0, "{checked:?}: {:#?}", self.stamp.wrong_lines());
    }

    /// A daemon in the place of the one that was killed, which takes over what can be.
    fn serve_again(&self, stopped: &Stopped) -> Tool {
        let mut command = Command::new(programs::program("uffd-daemon"));
        command.args(["serve", "--listen", &stopped.destination.address]).arg("--state-dir").arg(&self.state);
        Tool::start("serve-again", command)
    }

    fn taken_over(self, stopped: Stopped) {
        self.wait_orphaned();
        let mut follower = self.take_over();
        assert_eq!(follower.wait(MOVE), 0, "{}\n{}", follower.last_lines(), stopped.source.tool.last_lines());
        stopped.source.wait(MOVE).assert(0, "released", &[]);
        assert!(self.status().contains("no moves"), "{}", self.status());
        if follower.says_event_lost() {
            return;
        }
        self.arrived();
    }

    fn wait_orphaned(&self) {
        let orphaned = || self.status().contains("its daemon has ended").then_some(());
        eventually("a keeper that knows that it is alone", STEP, orphaned);
    }

    fn take_over(&self) -> Tool {
        let mut command = Command::new(programs::program("uffd-daemon"));
        command.arg("takeover").arg("--state-dir").arg(&self.state).args(["--give-up-after", "2"]);
        Tool::start("takeover", command)
    }

    fn status(&self) -> String {
        let mut command = Command::new(programs::program("uffd-daemon"));
        let output = command.arg("status").arg("--state-dir").arg(&self.state).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn resumed(self, stopped: Stopped) {
        stopped.destination.tool.wait_line("paused: ", STEP);
        self.resume_source(&[], 0, "released");
        stopped.destination.wait(MOVE).assert(0, "released", &[]);
        self.arrived();
    }
}

/// One row of the table, and what went wrong in it.
fn row(victim: Victim, moment: Moment, later: Duration) -> Result<(), String> {
    let begun = Instant::now();
    let ended = catch_unwind(AssertUnwindSafe(|| judge(victim, moment, later)));
    let took = begun.elapsed().as_secs_f64();
    let behind = if later.is_zero() { String::new() } else { format!(", {later:.1?} later") };
    let when = format!("{}{behind}", moment.name);
    match ended {
        Ok(Some(end)) => println!("| {victim:?} | {when} | {end} | {took:.1} |"),
        Ok(None) => {}
        Err(panic) => {
            println!("| {victim:?} | {when} | FAILED | {took:.1} |");
            return Err(format!("{victim:?}, {when}: {}", tests::panic_text(&*panic)));
        }
    }
    Ok(())
}

/// Kills `victim` at every moment that it is there for, or at some.
fn kill_at_moments(victim: Victim, some: &[&str]) {
    assert!(some.iter().all(|name| MOMENTS.iter().any(|moment| moment.name == *name)), "{some:?}");
    let chosen = |moment: &&Moment| tests::long() || some.contains(&moment.name);
    let there = |moment: &&Moment| !victim.ends(moment.when).is_empty();
    let moments = MOMENTS.iter().filter(there).filter(chosen);
    let failed: Vec<String> =
        moments.filter_map(|moment| row(victim, *moment, Duration::ZERO).err()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn the_daemon_is_killed() {
    let some = ["CRIU begins to restore", "Commit is on its way", "the barrier is lifted", "4/8 are pushed"];
    kill_at_moments(Victim::Daemon, &some);
}

#[test]
fn a_daemon_that_leaves_no_word_is_killed() {
    kill_at_moments(Victim::SecretiveDaemon, &["the barrier is lifted"]);
}

#[test]
fn the_source_is_killed() {
    let some = ["the fence stands", "Running is on its way", "4/8 are pushed", "Complete is on its way"];
    kill_at_moments(Victim::Source, &some);
}

#[test]
fn criu_is_killed_at_the_source() {
    kill_at_moments(Victim::Dump, &["CRIU has frozen and dumped", "Prepared is on its way", "the tasks run"]);
}

/// What CRIU has not handed out stays in the stopped tasks, and goes on from there.
fn undrained(kill_source: bool) -> Option<()> {
    let site = Site::new()?;
    let options = Options { mib: 256, rate_us: 500, fork: true, ..stamps::options(&site, "undrained") };
    let mut stamp = Stamp::start(&options);
    let kept = site.path("kept");
    let plan = Plan::new().source(["--push-rate", "64M", "--give-up-after", "2"]);
    let plan = plan.source(["--state-dir".as_ref(), kept.as_os_str()]);
    let Move { source, destination } = plan.start(&site, stamp.pid());
    let dump = |entry: &Entry| entry.parent == source.tool.pid() && entry.name == "criu";
    let find = || site.processes().into_iter().find(dump).map(|entry| entry.pid);
    let criu = eventually("CRIU", STEP, || find().filter(|pid| processes::is_told(*pid, "dump")));
    // It is left just before the drain begins.
    let is_word = |entry: std::fs::DirEntry| entry.path().extension().is_some_and(|kind| kind == "pages");
    let word = || std::fs::read_dir(&kept).ok()?.flatten().any(is_word).then_some(());
    eventually("word of the move", STEP, word);
    processes::signal(criu, Signal::SIGSTOP);
    destination.tool.wait_line("phase=\"push\"", STEP);
    stamp.give_up();
    processes::signal(criu, Signal::SIGKILL);
    let undrained =
        || source.tool.lines().iter().any(|line| line.contains("pages stay in the stopped tasks"));
    let known = || (undrained() || processes::has_ended(stamp.pid())).then(undrained);
    if !eventually("whether all was drained", STEP, known) {
        processes::kill_below(std::process::id());
        return None;
    }
    processes::assert_stops(stamp.pid());
    if kill_source {
        source.tool.signal(Signal::SIGKILL);
        source.tool.wait_closed(STEP);
        let mut command = Command::new(programs::program("source-server"));
        command.arg("resume").arg("--state-dir").arg(&kept);
        let mut follower = Tool::start("resume", command);
        assert_eq!(follower.wait(MOVE), 0, "{}", follower.last_lines());
    } else {
        source.wait(MOVE).assert(0, "released", &[]);
    }
    destination.wait(MOVE).assert(0, "released", &[]);
    assert_ends(stamp.pid(), STEP);
    stamp.mark_moved();
    stamp.assert_unharmed();
    stamp.quit();
    site.assert_only(&[]);
    Some(())
}

#[test]
fn criu_is_killed_while_its_pages_are_drained() {
    for kill_source in [false, true] {
        let done = (0..TRIES).find_map(|_| undrained(kill_source));
        assert!(done.is_some() || Site::new().is_none(), "all was drained too soon {TRIES} times in a row");
    }
}

#[test]
fn criu_is_killed_at_the_destination() {
    let some = ["CRIU begins to restore", "Commit is on its way", "the barrier is lifted", "the tasks run"];
    kill_at_moments(Victim::Restore, &some);
}

#[test]
fn the_keeper_is_killed() {
    kill_at_moments(Victim::Keeper, &["all is restored and held", "4/8 are pushed"]);
}

#[test]
fn the_holder_is_killed() {
    kill_at_moments(Victim::Holder, &["nothing is pushed", "Complete is on its way"]);
}

/// What it is about to change in a task ends with the task when CRIU is killed; then all stands still at the source.
#[test]
fn criu_is_killed_in_the_milliseconds_in_which_it_lets_go() {
    let moment = *MOMENTS.iter().find(|moment| moment.when == When::Committed).unwrap();
    let step = Duration::from_micros(if tests::long() { 100 } else { 800 });
    let ended = (1..=80).map(|number| step * number).take_while(|later| *later <= Duration::from_millis(8));
    let failed: Vec<String> = ended.filter_map(|later| row(Victim::Restore, moment, later).err()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}
