//! Both hosts, the way between them, what goes wrong, and what must never be.

use std::fmt::Write;

use protocol::wire::switchover::destination::{Ending as DestinationEnding, Event as DestinationEvent};
use protocol::wire::switchover::source::{Ending as SourceEnding, Event as SourceEvent};

use super::chance::{Chance, MS, SECOND, Us};
use super::destination::Destination;
use super::host::{Host, Word};
use super::net::{Door, Net};
use super::pages::Memory;
use super::source::{self, Source, Tasks};
use super::wire::Connections;
use super::{Defect, Outcome, Report};

/// Steps of a move at most: many times what the longest takes.
const STEPS_MAX: u64 = 2_000_000;
/// Longest pause of whoever has nothing to do.
const IDLE_MAX: Us = 20 * MS;
/// Threads of the tree at most that take steps.
const THREADS_MAX: usize = 24;
/// Lines of the log that a failure shows.
const LOG_MAX: usize = 60;

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Actor {
    Source,
    Answers,
    Push,
    Acknowledgements,
    Drain,
    Writers,
    Destination,
    FaultLoop,
    Intake,
    Install,
    Operator,
    Thread(usize),
}

const PROGRAMS: [Actor; 11] = [
    Actor::Source,
    Actor::Answers,
    Actor::Push,
    Actor::Acknowledgements,
    Actor::Drain,
    Actor::Writers,
    Actor::Destination,
    Actor::FaultLoop,
    Actor::Intake,
    Actor::Install,
    Actor::Operator,
];

#[derive(Clone, Copy, Debug)]
struct Turn {
    at: Us,
    idle: Us,
    /// Least time between two steps.
    pace: Us,
    /// Steps that are left to a thread, so that it does not go on for ever.
    left: u64,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Cut,
    CutLane(usize),
    LinkDown,
    KillDestination,
    KillSource,
    RestoreFails,
    ResumeFails,
    DumpFails,
    Interrupt,
}

const FAULTS: [Fault; 10] = [
    Fault::Cut,
    Fault::Cut,
    Fault::CutLane(1),
    Fault::CutLane(2),
    Fault::LinkDown,
    Fault::KillDestination,
    Fault::KillDestination,
    Fault::KillSource,
    Fault::RestoreFails,
    Fault::DumpFails,
];
/// Those that most moves would not survive, and so rarer.
const RARE_FAULTS: [Fault; 3] = [Fault::CutLane(0), Fault::ResumeFails, Fault::Interrupt];

/// One move.
pub struct World {
    chance: Chance,
    defect: Option<Defect>,
    net: Net,
    source_host: source::Host,
    source: Option<Source>,
    destination_host: Host,
    destination: Option<Destination>,
    turns: Vec<Turn>,
    steps: u64,
    faults_left: u64,
    /// Nothing goes wrong before the switchover.
    late: bool,
    /// One step in so many brings a fault.
    fault_every: u64,
    restarts: u32,
    /// When the operator looks again.
    operator_at: Us,
    paused: bool,
    /// Decisions are noted, too: it takes time.
    traced: bool,
    states: [Option<String>; 2],
    log: Vec<String>,
    complete: Option<protocol::wire::control::PageCounts>,
}

impl World {
    /// The move of a seed.
    #[must_use]
    pub fn new(seed: u64, defect: Option<Defect>) -> Self {
        let chance = Chance::new(seed);
        let memory = Memory::random(&chance);
        let (here, there) = Connections::make(&chance);
        let rounds = if chance.once_in(2) { 0 } else { u32::try_from(chance.between(1, 3)).unwrap_or(1) };
        let faults_left = if chance.once_in(8) { 0 } else { chance.between(1, 6) };
        let turn = |pace| Turn { at: chance.between(0, 50), idle: 0, pace, left: u64::MAX };
        let turn_of = |actor: &Actor| match actor {
            // For as long as pre-copy takes, but not through a lost link.
            Actor::Writers => Turn { left: chance.between(0, 400), ..turn(chance.between(10, 500)) },
            // On a busy host it is not over when the tasks run.
            Actor::Drain if chance.once_in(3) => turn(chance.between(MS, 30 * MS)),
            _ => turn(chance.between(1, 1 + chance.between(0, 200))),
        };
        let turns = PROGRAMS.iter().map(turn_of).collect();
        Self {
            defect,
            net: Net::new(),
            source: Some(Source::new(&chance, defect, here, rounds)),
            source_host: source::Host::new(memory),
            destination: Some(Destination::new(&chance, defect, there)),
            destination_host: Host::default(),
            turns,
            steps: 0,
            faults_left,
            late: !chance.once_in(3),
            fault_every: chance.between(20, 800),
            restarts: 0,
            operator_at: 0,
            paused: false,
            traced: false,
            states: [None, None],
            log: Vec::new(),
            complete: None,
            chance,
        }
    }

    /// Notes every decision of both sides.
    #[must_use]
    pub const fn traced(mut self) -> Self {
        self.traced = true;
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// What is wrong.
    pub fn run(mut self) -> Result<Report, String> {
        loop {
            if let Some(outcome) = self.outcome() {
                self.check_end(outcome).map_err(|wrong| self.with_log(&wrong))?;
                return Ok(Report {
                    outcome,
                    steps: self.steps,
                    us: self.chance.now(),
                    restarts: self.restarts,
                });
            }
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return Err(self.with_log("it does not end"));
            }
            self.step();
            self.trace();
            self.check().map_err(|wrong| self.with_log(&wrong))?;
        }
    }

    fn trace(&mut self) {
        if !self.traced {
            return;
        }
        let states =
            [self.source.as_ref().map(Source::state), self.destination.as_ref().map(Destination::state)];
        for (name, side) in ["source", "destination"].into_iter().zip(0..2) {
            if states[side] != self.states[side] {
                self.note(&format!("{name}: {}", states[side].as_deref().unwrap_or("no program")));
            }
        }
        self.states = states;
    }

    fn with_log(&self, wrong: &str) -> String {
        let mut text = format!("{wrong}\n  after {} steps and {} us", self.steps, self.chance.now());
        for line in self.log.iter().skip(self.log.len().saturating_sub(LOG_MAX)) {
            let _ = write!(text, "\n  {line}");
        }
        for program in
            [self.source.as_ref().map(Source::describe), self.destination.as_ref().map(Destination::describe)]
        {
            let _ = write!(text, "\n  {}", program.unwrap_or_else(|| "no program".into()));
        }
        text
    }

    fn note(&mut self, what: &str) {
        self.log.push(format!("{:>10} us  {what}", self.chance.now()));
    }

    fn actor(&self, number: usize) -> Actor {
        PROGRAMS.get(number).copied().unwrap_or_else(|| Actor::Thread(number - PROGRAMS.len()))
    }

    fn step(&mut self) {
        let threads = self.destination_host.tasks.threads.len().min(THREADS_MAX);
        while self.turns.len() < PROGRAMS.len() + threads {
            let (pace, left) = (self.chance.between(1, 300), self.chance.between(1, 300));
            self.turns.push(Turn { at: self.chance.now(), idle: 0, pace, left });
        }
        let next = (0..self.turns.len()).min_by_key(|number| self.turns[*number].at).unwrap_or(0);
        self.chance.set(self.turns[next].at.max(self.chance.now()));
        let did = self.act(self.actor(next));
        let now = self.chance.now();
        let turn = &mut self.turns[next];
        if did {
            turn.idle = 0;
            turn.at = now + self.chance.between(1, turn.pace);
            turn.left = turn.left.saturating_sub(1);
            // Somebody may have something to do because of it.
            for other in &mut self.turns {
                if other.idle > 100 {
                    other.idle = 20;
                    other.at = other.at.min(now + self.chance.between(1, 100));
                }
            }
        } else {
            turn.idle = (turn.idle * 2).clamp(10, IDLE_MAX);
            turn.at = now + turn.idle + self.chance.between(0, turn.pace);
        }
        let spared = self.late && !self.source_host.promised;
        if self.faults_left > 0 && !spared && self.chance.once_in(self.fault_every) {
            self.fail();
        }
    }

    fn act(&mut self, actor: Actor) -> bool {
        self.net.door = self.destination.as_ref().map_or(self.net.door, Destination::door);
        match actor {
            Actor::Source => {
                let Some(source) = &mut self.source else { return false };
                source.step(&mut self.source_host, &mut self.net)
            }
            Actor::Answers => self.source.as_mut().is_some_and(|source| source.answer(&mut self.source_host)),
            Actor::Push => self.source.as_mut().is_some_and(Source::push),
            Actor::Acknowledgements => {
                self.source.as_mut().is_some_and(|source| source.acknowledged(&mut self.source_host))
            }
            Actor::Drain => self.drain(),
            Actor::Writers => {
                let left = self.turns.iter().zip(PROGRAMS).any(|(turn, of)| of == actor && turn.left > 0);
                let writes =
                    left && self.source_host.tasks == Tasks::Running && self.source_host.map.is_none();
                if writes {
                    self.source_host.memory.write(&self.chance);
                }
                writes
            }
            Actor::Destination => {
                let Some(destination) = &mut self.destination else { return false };
                let map = self.source_host.map.as_ref();
                let (host, memory) = (&mut self.destination_host, &self.source_host.memory);
                let did = destination.step(host, &mut self.net, memory, map);
                self.complete = destination.summary.map(|summary| summary.pages).or(self.complete);
                did
            }
            Actor::FaultLoop => {
                self.destination.as_mut().is_some_and(|daemon| daemon.turn(&mut self.destination_host))
            }
            Actor::Intake => self.destination.as_mut().is_some_and(Destination::push),
            Actor::Install => self.destination.as_mut().is_some_and(Destination::install),
            Actor::Operator => self.operate(),
            Actor::Thread(number) => {
                let left = self.turns.get(PROGRAMS.len() + number).is_some_and(|turn| turn.left > 0);
                let tasks = &mut self.destination_host.tasks;
                tasks.running && tasks.step(number, &self.chance, &mut self.source_host.memory, left)
            }
        }
    }

    fn drain(&mut self) -> bool {
        let host = &mut self.source_host;
        let drains = self.source.is_some() && host.dump_lives && !host.drained;
        let Some(pages) = host.pages.as_ref().filter(|_| drains) else { return false };
        if pages.drain_one() {
            host.drained = true;
        }
        true
    }

    fn fail(&mut self) {
        self.faults_left -= 1;
        let fault = if self.chance.once_in(12) {
            RARE_FAULTS[self.chance.below(RARE_FAULTS.len())]
        } else {
            FAULTS[self.chance.below(FAULTS.len())]
        };
        self.note(&format!("{fault:?}"));
        match fault {
            Fault::Cut => self.cut_all(),
            Fault::CutLane(lane) => {
                if let Some(source) = &self.source {
                    source.connections().all()[lane].cut();
                }
            }
            Fault::LinkDown => {
                self.cut_all();
                self.net.down_until = self.chance.now() + self.chance.between(10 * MS, 30 * SECOND);
            }
            Fault::KillDestination => self.kill_destination(),
            Fault::KillSource => self.kill_source(),
            Fault::RestoreFails => {
                if let Some(daemon) = self.destination.as_mut().filter(|daemon| daemon.can_fail_to_restore())
                {
                    daemon.give_up(DestinationEvent::Broken, &mut self.destination_host);
                }
            }
            Fault::ResumeFails => {
                if let Some(daemon) = &mut self.destination {
                    daemon.fail_to_resume(&mut self.destination_host);
                }
            }
            Fault::DumpFails => {
                let host = &mut self.source_host;
                if host.dump_lives && !host.drained && host.pages.is_some() {
                    host.dump_lives = false;
                    if let Some(source) = self.source.as_mut().filter(|source| source.ending().is_none()) {
                        source.drain_fails(host);
                    }
                }
            }
            Fault::Interrupt => {
                if let Some(source) = self.source.as_mut().filter(|source| source.ending().is_none()) {
                    source.event(SourceEvent::Interrupted, &mut self.source_host);
                }
            }
        }
    }

    fn cut_all(&mut self) {
        if let Some(source) = &self.source {
            source.connections().all().into_iter().for_each(|socket| socket.cut());
        }
        // Those that nobody has taken yet are lost as well.
        if let Some(waiting) = &self.net.waiting {
            waiting.all().into_iter().for_each(|socket| socket.cut());
        }
    }

    fn kill_destination(&mut self) {
        let Some(daemon) = self.destination.take() else { return };
        let host = &mut self.destination_host;
        daemon
            .connections()
            .all()
            .into_iter()
            .for_each(|socket| if self.chance.once_in(2) { socket.cut() } else { socket.shutdown() });
        self.net.door = Door::Closed;
        self.operator_at = self.chance.now() + self.chance.between(MS, 5 * SECOND);
        host.program_is_killed(self.chance.once_in(2));
    }

    fn kill_source(&mut self) {
        let Some(source) = self.source.take() else { return };
        source
            .connections()
            .all()
            .into_iter()
            .for_each(|socket| if self.chance.once_in(2) { socket.cut() } else { socket.shutdown() });
        self.source_host.program_is_killed();
        self.operator_at = self.chance.now() + self.chance.between(MS, 5 * SECOND);
        // Before the freeze is over the tasks run on.
    }

    /// Starts programs again that have ended and left something behind.
    fn operate(&mut self) -> bool {
        if self.chance.now() < self.operator_at {
            return false;
        }
        if self.destination.is_none()
            && self.destination_host.word == Word::NeverRan
            && self.net.door == Door::Closed
        {
            self.operator_at = self.chance.now() + self.chance.between(MS, SECOND);
            self.net.door = Door::RolledBack;
            self.note("uffd-daemon serve");
            return true;
        }
        if self.daemon_can_be_followed() {
            self.operator_at = self.chance.now() + self.chance.between(MS, SECOND);
            let (_, there) = Connections::make(&self.chance);
            there.shutdown();
            let Some(map) = self.source_host.map.clone() else { return false };
            let host = &mut self.destination_host;
            self.destination = Destination::taken_over(&self.chance, self.defect, there, &map, host);
            (self.restarts, self.paused) = (self.restarts + 1, true);
            self.note("uffd-daemon takeover");
            return true;
        }
        let ended = self.source.as_ref().is_none_or(|source| source.ending() == Some(SourceEnding::Hold));
        if ended && self.source_can_be_followed() {
            self.operator_at = self.chance.now() + self.chance.between(MS, SECOND);
            let (here, _) = Connections::make(&self.chance);
            here.shutdown();
            self.source = Some(Source::taken_over(&self.chance, &mut self.source_host, here));
            (self.restarts, self.paused) = (self.restarts + 1, true);
            self.note("source-server resume");
            return true;
        }
        false
    }

    /// A keeper waits for a daemon.
    fn daemon_can_be_followed(&self) -> bool {
        let ended = self.destination.as_ref().is_none_or(|daemon| {
            matches!(daemon.ending(), Some(DestinationEnding::Pause | DestinationEnding::TellAndPause))
        });
        ended && self.destination_host.keeper.is_some() && self.destination_host.has_run
    }

    /// A holder or stopped tasks wait for a source, and there is something to do for it.
    fn source_can_be_followed(&self) -> bool {
        let host = &self.source_host;
        let wanted = self.destination_host.keeper.is_some();
        match host.tasks {
            _ if host.released => false,
            Tasks::Running => false,
            Tasks::Gone => host.held && wanted,
            // One that was killed has asked nobody yet; of others it makes sense while somebody there can answer.
            Tasks::Stopped => {
                let answers = wanted && self.destination_host.has_run;
                self.source.is_none() || answers || self.net.door == Door::RolledBack
            }
        }
    }

    fn check(&mut self) -> Result<(), String> {
        if self.source_host.tasks == Tasks::Running && self.destination_host.tasks.run() {
            return Err("two copies run".into());
        }
        if let Some(wrong) = self.destination_host.wrong.take() {
            return Err(wrong);
        }
        for mm in &self.destination_host.tasks.spaces {
            if let Some(wrong) = mm.state().wrong.take() {
                return Err(wrong);
            }
        }
        Ok(())
    }

    /// How it has ended, once nothing can happen any more.
    fn outcome(&self) -> Option<Outcome> {
        let source_over = self.source.as_ref().is_none_or(|source| source.ending().is_some());
        if !source_over || self.source_can_be_followed() {
            return None;
        }
        let host = &self.destination_host;
        let destination_over = self.destination.as_ref().is_none_or(|daemon| daemon.ending().is_some());
        if host.finished {
            return Some(if self.paused { Outcome::Completed } else { Outcome::Released });
        }
        if !host.has_run {
            let over = destination_over.then_some(());
            return over.map(|()| match self.source_host.tasks {
                Tasks::Running => Outcome::RolledBack,
                Tasks::Stopped | Tasks::Gone => Outcome::Stopped,
            });
        }
        // It waits for pages; does anybody take care of that?
        if self.daemon_can_be_followed() {
            return None;
        }
        let waits = destination_over || self.destination.as_ref().is_some_and(Destination::waits_for_pages);
        waits.then_some(Outcome::Waits)
    }

    fn check_end(&mut self, outcome: Outcome) -> Result<(), String> {
        let host = &self.destination_host;
        match outcome {
            Outcome::Released | Outcome::Completed => {
                host.tasks
                    .spaces
                    .iter()
                    .filter(|mm| !mm.state().is_gone())
                    .for_each(|mm| mm.state().check_whole());
                // One that could not tell the source any more has made no account.
                let Some(pages) = self.complete else { return self.check() };
                let lazy = self.source_host.map.as_ref().map_or(0, |map| map.pages());
                let came = pages.demand + pages.push + pages.precopied + pages.zero;
                if pages.lazy != lazy || came + pages.gone != lazy {
                    return Err(format!("the account does not add up: {pages:?} of {lazy} lazy pages"));
                }
            }
            Outcome::RolledBack | Outcome::Stopped => {
                if host.tasks.run() {
                    return Err("it runs at the destination, and was rolled back".into());
                }
                if self.source_host.tasks == Tasks::Gone {
                    return Err("it runs nowhere, and its tasks are killed".into());
                }
            }
            Outcome::Waits => {
                let has_pages = self.source_host.tasks == Tasks::Stopped || self.source_host.held;
                let ended = !host.tasks.run();
                if !has_pages && !ended && !self.source_is_lost() {
                    return Err("it waits for pages that were given up".into());
                }
                host.tasks
                    .spaces
                    .iter()
                    .filter(|mm| !mm.state().is_gone())
                    .for_each(|mm| mm.state().check_present());
            }
        }
        self.check()
    }

    /// The source's program was killed before it had left the pages to somebody.
    const fn source_is_lost(&self) -> bool {
        self.source.is_none() && !self.source_host.held
    }
}
