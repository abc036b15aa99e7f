//! The destination's program. Its decisions, families, fault loop, journal, cache and intake of the push are the real ones; what is
//! here stands for the threads and waits around them: `session/mod.rs` (`reach_commit`), `session/settling.rs` (`follow`, `fetch`,
//! `farewell`, `wait_settled`, `await_resume`, `resume`, `conclude`), `session/brought_up.rs` (`start`, `adopt`, `run`, `detach`,
//! `attach`), the loop of `push.rs::run` with `background.rs::install_slice`, and `cache/install.rs::run`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};

use host::mailbox::{Mailbox, Post, mailbox};
use protocol::lazy_map::LazyMap;
use protocol::units::{PAGE_SIZE, TaskAddr, pages_to_bytes};
use protocol::wire::control::{Control, Summary};
use protocol::wire::frame::encode_ack;
use protocol::wire::limits::RUNS_PER_ACK_MAX;
use protocol::wire::settled_map;
use protocol::wire::switchover::destination::{Action, Ending, Event, Switchover};
use uffd_daemon::background::Piece;
use uffd_daemon::cache::CleanPages;
use uffd_daemon::fault::{Command, FaultLoop, Notice, Ready, latency_histogram};
use uffd_daemon::intake::Intake;
use uffd_daemon::journal::Journal;
use uffd_daemon::keeper::Owner;
use uffd_daemon::pages::{Arrival, Blocked, Installer};
use uffd_daemon::takeover::{rebuild, wake_all};
use uffd_daemon::tree::Tree;

use super::Defect;
use super::chance::{Chance, MS, SECOND, Us};
use super::host::{Host, Keeper, Word};
use super::kernel::Mm;
use super::lane::Lane;
use super::net::{Door, Net};
use super::pages::{Memory, fill};
use super::precopy::Receiving;
use super::wire::{Connections, ControlEnd, Ended, Socket};

/// What pushed pages are in the middle of.
#[derive(Debug, Default)]
struct Pushed {
    /// Family of the pieces that are being installed, and since when they are refused.
    installing: Option<(usize, Us)>,
    swept: Us,
}

/// What pre-copy brought, being installed.
#[derive(Debug)]
struct Installing {
    least: u8,
    position: usize,
    pages: Option<(Range<u64>, Us)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Pre-copy, images, clean pages.
    Receiving,
    /// CRIU restores until then.
    Restoring(Us),
    Held(Us),
    /// The barrier is lifted; the tasks run from then on.
    Lifting(Us),
    Fetching,
    AwaitReleased(Us),
    Paused {
        since: Us,
        detached: bool,
    },
    Over(Ending),
}

/// The program.
pub struct Destination {
    chance: Chance,
    defect: Option<Defect>,
    switchover: Switchover,
    phase: Phase,
    connections: Connections,
    control: ControlEnd,
    receiving: Option<Receiving>,
    clean: Option<CleanPages>,
    map: Option<Arc<LazyMap>>,
    tree: Option<Arc<Tree<Mm>>>,
    fault_loop: Option<FaultLoop<Lane, Mm>>,
    commands: Post<Command<Lane, Mm>>,
    orders: Option<Mailbox<Command<Lane, Mm>>>,
    post: Post<Notice>,
    notices: Mailbox<Notice>,
    intake: Option<Intake<Mm>>,
    pushed: Pushed,
    /// How the push lane has ended.
    push_ended: Option<Result<(), Ended>>,
    /// There is nothing new on the fault lane since the last turn.
    looked_at: bool,
    installing: Option<Installing>,
    settled: bool,
    acknowledged: bool,
    gathered: Option<Connections>,
    /// Its account, once it is complete.
    pub summary: Option<Summary>,
}

/// A restored tree has so many threads in each task.
const THREADS_MAX: u64 = 3;

impl Destination {
    fn with(
        chance: &Chance,
        defect: Option<Defect>,
        connections: Connections,
        switchover: Switchover,
    ) -> Self {
        let (commands, orders) = mailbox().expect("a socket pair");
        let (post, notices) = mailbox().expect("a socket pair");
        Self {
            chance: chance.clone(),
            defect,
            switchover,
            phase: Phase::Receiving,
            control: ControlEnd::new(connections.control.clone()),
            connections,
            receiving: Some(Receiving::default()),
            clean: None,
            map: None,
            tree: None,
            fault_loop: None,
            commands,
            orders: Some(orders),
            post,
            notices,
            intake: None,
            pushed: Pushed::default(),
            push_ended: None,
            looked_at: false,
            installing: None,
            settled: false,
            acknowledged: false,
            gathered: None,
            summary: None,
        }
    }

    /// Of a move that begins.
    #[must_use]
    pub fn new(chance: &Chance, defect: Option<Defect>, connections: Connections) -> Self {
        Self::with(chance, defect, connections, Switchover::default())
    }

    /// Of a move whose daemon has ended, if its tasks ran: everything is put together again from what the keeper has.
    #[must_use]
    pub fn taken_over(
        chance: &Chance,
        defect: Option<Defect>,
        connections: Connections,
        map: &Arc<LazyMap>,
        host: &mut Host,
    ) -> Option<Self> {
        let keeper = host.keeper.as_ref()?;
        let journal = Journal::open(&keeper.journal, map.pages()).expect("the journal of this move");
        if !journal.is_running() {
            return None;
        }
        let mut changes = journal.changes().expect("there is room for every change");
        if defect == Some(Defect::ForgetChanges) {
            changes.clear();
        }
        assert_eq!(journal.half_read(), [0; 0], "nobody is killed between an event and its record");
        host.generation += 1;
        let held = keeper.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let spaces: HashMap<_, _> = held
            .into_iter()
            .map(|(owner, mm)| {
                mm.state().generation = host.generation;
                ((owner.family as usize, owner.space), mm)
            })
            .collect();
        let tree = Tree::new(map);
        let served = rebuild(&tree, spaces, &changes, &journal);
        tree.keep_journal(journal);
        let mut this = Self::with(chance, defect, connections, Switchover::taken_over());
        (this.receiving, this.map) = (None, Some(map.clone()));
        this.start_fault_loop(&tree, None, host);
        for space in &served {
            this.commands.send(Command::Adopt(space.clone()));
        }
        this.commands.send(Command::Running);
        if defect != Some(Defect::ForgetWakes) {
            wake_all(&served);
        }
        this.tree = Some(tree);
        this.lose(Event::Lost, host);
        Some(this)
    }

    fn start_fault_loop(&mut self, tree: &Arc<Tree<Mm>>, lane: Option<Lane>, host: &Host) {
        let Some(orders) = self.orders.take() else { return };
        let held = host.keeper.as_ref().map(|keeper| keeper.held.clone());
        let generation = host.generation;
        let keep = held.map(|held| {
            let keep = move |owner, mm: &Mm| {
                mm.state().generation = generation;
                held.lock().unwrap_or_else(PoisonError::into_inner).push((owner, mm.clone()));
            };
            Box::new(keep) as uffd_daemon::fault::Keep<Mm>
        });
        let post = self.post.clone();
        self.fault_loop = Some(FaultLoop::new(tree.clone(), lane, orders, post, keep, latency_histogram()));
    }

    /// How it has ended, if it has.
    #[must_use]
    pub const fn ending(&self) -> Option<Ending> {
        match self.phase {
            Phase::Over(ending) => Some(ending),
            _ => None,
        }
    }

    /// It waits for new connections, and for pages.
    #[must_use]
    pub fn waits_for_pages(&self) -> bool {
        let missing = self.tree.as_ref().is_some_and(|tree| tree.remote_pages() > 0);
        missing && matches!(self.phase, Phase::Paused { .. })
    }

    /// Who answers at its door.
    #[must_use]
    pub const fn door(&self) -> Door {
        match self.phase {
            Phase::Receiving | Phase::Restoring(_) | Phase::Held(_) => Door::NotYet,
            Phase::Over(Ending::TearDown) => Door::RolledBack,
            Phase::Over(_) => Door::Unknown,
            _ => Door::Open,
        }
    }

    /// What it has decided, for messages.
    #[must_use]
    pub fn state(&self) -> String {
        format!("{:?}", self.switchover)
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let remote = self.tree.as_ref().map(|tree| tree.remote_pages());
        format!(
            "destination: {:?}, {:?}, {remote:?} pages missing, settled {}, acknowledged {}, push {:?} ended {:?}",
            self.switchover,
            self.phase,
            self.settled,
            self.acknowledged,
            self.intake.as_ref().map(|_| self.pushed.installing),
            self.push_ended
        )
    }

    /// Its connections, for who cuts them.
    #[must_use]
    pub const fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Whether it is before the switchover.
    #[must_use]
    pub const fn can_fail_to_restore(&self) -> bool {
        matches!(self.phase, Phase::Restoring(_) | Phase::Held(_))
    }

    /// The session's thread: false if there is nothing to do.
    pub fn step(
        &mut self,
        host: &mut Host,
        net: &mut Net,
        memory: &Memory,
        map: Option<&Arc<LazyMap>>,
    ) -> bool {
        let now = self.chance.now();
        if !matches!(self.phase, Phase::Over(_)) && self.gathered.is_none() {
            self.gathered = net.waiting.take();
        }
        match self.phase {
            Phase::Over(_) => false,
            Phase::Receiving => self.receive(host, memory, map),
            Phase::Restoring(until) if until <= now => {
                if self
                    .fault_loop
                    .as_ref()
                    .is_none_or(|serving| serving.served().len() < host.tasks.spaces.len())
                {
                    return false;
                }
                self.begin_installing();
                self.phase = Phase::Held(now + 60 * SECOND);
                host.word = Word::NeverRan;
                if self.switchover.step(Event::Held) == Action::SendPrepared {
                    self.control.send(&Control::Prepared);
                }
                if self.defect == Some(Defect::RunUncommitted) {
                    host.tasks.running = true;
                }
                true
            }
            Phase::Restoring(_) => self.hear_before_commit(host),
            Phase::Held(due) if due <= now => {
                self.give_up(Event::Broken, host);
                true
            }
            Phase::Held(_) => self.hear_before_commit(host),
            Phase::Lifting(until) if until <= now => {
                host.let_run();
                self.commands.send(Command::Running);
                if self.switchover.step(Event::Resumed) == Action::SendRunning {
                    self.control.send(&Control::Running);
                }
                self.start_push();
                self.phase = Phase::Fetching;
                true
            }
            Phase::Lifting(_) => false,
            Phase::Fetching => self.fetch(host),
            Phase::AwaitReleased(due) => self.farewell(due, host),
            Phase::Paused { since, detached } => self.await_resume(since, detached, host),
        }
    }

    fn receive(&mut self, host: &mut Host, memory: &Memory, map: Option<&Arc<LazyMap>>) -> bool {
        let copied = self.receiving.as_mut().map_or(Ok(false), |lane| lane.step(&self.connections.push));
        let Ok(copied) = copied else {
            self.give_up(Event::Lost, host);
            return true;
        };
        match self.control.receive() {
            Ok(None) => return copied,
            Ok(Some(Control::Dumped(dumped))) => {
                self.clean = Some(CleanPages::announced(&dumped).expect("fewer than there are"));
            }
            Ok(Some(Control::Clean(piece))) => {
                self.clean.as_mut().expect("announced").take(&piece).expect("the next piece");
            }
            Ok(Some(message)) => {
                self.give_up(Event::from(&message), host);
                return true;
            }
            Err(Ended) => {
                self.give_up(Event::Lost, host);
                return true;
            }
        }
        if self.clean.as_ref().is_some_and(|clean| !clean.is_missing()) {
            self.restore(host, memory, map.expect("the images are there"));
        }
        true
    }

    /// CRIU restores: the address spaces are there, and handed over.
    fn restore(&mut self, host: &mut Host, memory: &Memory, map: &Arc<LazyMap>) {
        let tree = Tree::new(map);
        let (clean, cache) = (self.clean.take(), self.receiving.take());
        if let (Some(clean), Some(receiving)) = (clean, cache) {
            let (kept, _) = receiving.into_cache().into_clean(map, &clean.into_bits()).expect("what is kept");
            tree.keep(kept);
        }
        let (journal, file) = Journal::create(map.pages()).expect("a journal");
        tree.keep_journal(journal);
        host.keeper = Some(Keeper { held: Arc::default(), journal: file });
        self.start_fault_loop(&tree, Some(Lane::new(self.connections.fault.clone())), host);
        for task in &memory.tasks {
            let mm =
                Mm::restored(&self.chance, format!("task {}", task.id), &task.areas, task.written.clone());
            mm.state().forgets_wakes = self.defect == Some(Defect::ForgetWakes);
            let family = tree.position(task.id).expect("a task of the map");
            if let Some(keeper) = &host.keeper {
                let mut held = keeper.held.lock().unwrap_or_else(PoisonError::into_inner);
                held.push((Owner::new(family, 0), mm.clone()));
            }
            self.commands.send(Command::Serve { family, uffd: mm.clone() });
            let threads = usize::try_from(self.chance.between(1, THREADS_MAX)).expect("few threads");
            host.tasks.add(mm, threads);
        }
        (self.tree, self.map) = (Some(tree), Some(map.clone()));
        self.phase = Phase::Restoring(self.chance.now() + self.chance.between(100, 20 * MS));
    }

    fn hear_before_commit(&mut self, host: &mut Host) -> bool {
        let event = match self.control.receive() {
            Ok(None) => return false,
            Ok(Some(message)) => Event::from(&message),
            Err(Ended) => Event::Lost,
        };
        if !matches!((event, self.phase), (Event::Commit, Phase::Held(_))) {
            self.give_up(event, host);
        } else if self.switchover.step(event) == Action::LetRun {
            if let Some(journal) = self.tree.as_ref().and_then(|tree| tree.journal()) {
                journal.set_running();
            }
            host.word = if self.defect == Some(Defect::DenyRunning) { Word::NeverRan } else { Word::Lifted };
            self.phase = Phase::Lifting(self.chance.now() + self.chance.between(10, 5 * MS));
        }
        true
    }

    /// Something has gone wrong that is no lost connection behind the switchover.
    pub fn give_up(&mut self, event: Event, host: &mut Host) {
        let Action::End(ending) = self.switchover.step(event) else { return };
        self.end(ending, host);
    }

    fn end(&mut self, ending: Ending, host: &mut Host) {
        match ending {
            Ending::TearDown => {
                host.tasks.kill();
                (host.keeper, host.word) = (None, Word::NeverRan);
                self.control.send(&Control::Abort("the simulation says so".into()));
                self.control.send(&Control::RolledBack);
            }
            Ending::Pause | Ending::TellAndPause => {
                if ending == Ending::TellAndPause {
                    self.control.send(&Control::Abort("criu failed".into()));
                }
                // What is here is installed as long as somebody can.
                let mut left = 10_000;
                while self.install() && left > 0 {
                    self.turn(host);
                    left -= 1;
                }
            }
            Ending::Release => {
                host.finished = true;
                host.keeper = None;
                host.tasks.spaces.iter().for_each(Mm::release);
            }
        }
        self.connections.shutdown();
        (self.fault_loop, self.intake) = (None, None);
        self.phase = Phase::Over(ending);
    }

    /// CRIU fails behind the switchover.
    pub fn fail_to_resume(&mut self, host: &mut Host) -> bool {
        let lifting = matches!(self.phase, Phase::Lifting(_));
        if lifting {
            host.tasks.kill();
            // One that fails says so; of one that is killed nobody knows how far it had come.
            let event = if self.chance.once_in(4) { Event::RestoreFailed } else { Event::NeverRan };
            self.give_up(event, host);
        }
        lifting
    }

    fn start_push(&mut self) {
        let Some(tree) = &self.tree else { return };
        self.intake = Some(Intake::new(tree.clone(), Arc::new(AtomicU64::new(0))));
        self.pushed = Pushed { installing: None, swept: self.chance.now() };
        self.push_ended = None;
    }

    /// Waits until every page is here and acknowledged.
    fn fetch(&mut self, host: &mut Host) -> bool {
        let Some(tree) = self.tree.clone() else { return false };
        if self.gathered.is_some() {
            self.lose(Event::Lost, host);
            return true;
        }
        match self.push_ended.take() {
            Some(Ok(())) => {
                // Its thread has ended.
                self.intake = None;
                self.acknowledged = true;
                self.commands.send(Command::Running);
            }
            Some(Err(Ended)) => {
                self.lose(Event::Lost, host);
                return true;
            }
            None => {}
        }
        for notice in self.notices.empty() {
            match notice {
                Notice::Settled => self.settled = true,
                Notice::UpstreamLost(_) if tree.check_settled() => self.settled = true,
                Notice::UpstreamLost(_) => {
                    self.lose(Event::Lost, host);
                    return true;
                }
                Notice::Broken(reason) => {
                    host.wrong.get_or_insert(format!("the fault loop is broken: {reason}"));
                    self.give_up(Event::Broken, host);
                    return true;
                }
                Notice::Detached => {}
            }
        }
        match self.control.receive() {
            Ok(None) => {}
            Ok(Some(_)) => {
                self.give_up(Event::Broken, host);
                return true;
            }
            Err(Ended) => {
                self.lose(Event::Lost, host);
                return true;
            }
        }
        if !(self.settled && self.acknowledged) {
            return false;
        }
        let summary = Summary { pages: tree.counts(), ..Summary::default() };
        self.summary = Some(summary);
        if self.switchover.step(Event::Settled) == Action::SendComplete {
            self.control.send(&Control::Complete(summary));
        }
        self.switchover.step(Event::CompleteSent);
        self.phase = Phase::AwaitReleased(self.chance.now() + 10 * SECOND);
        true
    }

    fn farewell(&mut self, due: Us, host: &mut Host) -> bool {
        if self.gathered.is_some() {
            self.lose(Event::Lost, host);
            return true;
        }
        match self.control.receive() {
            Ok(None) if due > self.chance.now() => return false,
            Ok(None) => self.give_up(Event::Broken, host),
            Ok(Some(message)) => self.give_up(Event::from(&message), host),
            Err(Ended) => self.lose(Event::Lost, host),
        }
        true
    }

    /// A connection is lost, or something that counts as that.
    fn lose(&mut self, event: Event, host: &mut Host) {
        match self.switchover.step(event) {
            Action::AwaitResume => {
                self.connections.shutdown();
                self.commands.send(Command::Detach);
                (self.intake, self.push_ended) = (None, None);
                self.phase = Phase::Paused { since: self.chance.now(), detached: false };
            }
            Action::End(ending) => self.end(ending, host),
            _ => {}
        }
    }

    fn await_resume(&mut self, since: Us, mut detached: bool, host: &mut Host) -> bool {
        let Some(tree) = self.tree.clone() else { return false };
        let mut news = false;
        for notice in self.notices.empty() {
            news = true;
            match notice {
                Notice::Detached => detached = true,
                Notice::Broken(reason) => {
                    host.wrong.get_or_insert(format!("the fault loop is broken: {reason}"));
                    self.give_up(Event::Broken, host);
                    return true;
                }
                Notice::Settled | Notice::UpstreamLost(_) => {}
            }
        }
        self.phase = Phase::Paused { since, detached };
        if detached && self.gathered.is_some() && self.switchover.step(Event::Attached) == Action::Resume {
            self.resume(&tree, host);
            return true;
        }
        if tree.check_settled() {
            self.switchover.step(Event::Settled);
            if self.chance.now() - since > 60 * SECOND {
                self.give_up(Event::Broken, host);
                return true;
            }
        }
        news
    }

    fn resume(&mut self, tree: &Arc<Tree<Mm>>, host: &Host) {
        let Some(connections) = self.gathered.take() else { return };
        self.control = ControlEnd::new(connections.control.clone());
        self.commands.send(Command::Attach(Lane::new(connections.fault.clone())));
        self.connections = connections;
        let settled = tree.report_settled();
        self.start_push();
        for piece in settled_map::pieces(&settled) {
            self.control.send(&Control::SettledMap(piece));
        }
        self.control.send(&Control::Resumed);
        self.control.send(&Control::Running);
        (self.settled, self.acknowledged) = (tree.settled_at().is_some(), false);
        self.phase = Phase::Fetching;
        for mm in host.tasks.spaces.iter().filter(|_| self.defect == Some(Defect::ReplayInstalled)) {
            let Some((page, stamp)) = mm.state().first_installed() else { continue };
            let mut data = vec![0; PAGE_SIZE];
            fill(stamp, &mut data);
            mm.copy(TaskAddr::containing(pages_to_bytes(page)), &data).expect("no errors in the model");
        }
    }

    /// The fault loop takes a turn: true if there was something to do.
    pub fn turn(&mut self, host: &mut Host) -> bool {
        let (Some(fault_loop), Some(tree)) = (&mut self.fault_loop, &self.tree) else { return false };
        let events: Vec<bool> =
            fault_loop.served().iter().map(|served| served.uffd.state().has_events()).collect();
        let readable = self.connections.fault.is_readable();
        let busy = events.contains(&true) || (readable && !self.looked_at);
        let ready = Ready { command: true, upstream: true, served: events.len() };
        fault_loop.turn(ready, |position| events[position], self.chance.instant());
        // Its end stays to be read.
        self.looked_at = readable && self.connections.fault.is_readable();
        for served in fault_loop.served() {
            let waiting = served.uffd.state().after_turn();
            let family = tree.lock(served.family);
            let Some(space) = family.space(served.space) else { continue };
            // Or may be, until changes under way are over.
            let missing = |page: &u64| {
                let at = TaskAddr::containing(pages_to_bytes(*page));
                space.remote_at(at).is_some() || family.is_in_doubt(served.space, at)
            };
            if let Some(page) = waiting.iter().find(|page| !missing(page)) {
                let name = served.uffd.state().name.clone();
                host.wrong
                    .get_or_insert(format!("a thread of {name} waits for page {page}, which is not missing"));
            }
        }
        busy
    }

    /// The thread of the push lane.
    pub fn push(&mut self) -> bool {
        let (Some(intake), Some(tree)) = (&mut self.intake, &self.tree) else { return false };
        if self.push_ended.is_some() {
            return false;
        }
        let (now, lane) = (self.chance.now(), &self.connections.push);
        if let Some((position, since)) = self.pushed.installing {
            let mut family = tree.lock_last(position);
            match intake.install(&mut family).expect("no errors in the model") {
                Piece::More => {}
                Piece::Last => {
                    self.pushed.installing = None;
                    let complete = family.remote_pages() == 0;
                    drop(family);
                    if complete {
                        tree.check_settled();
                    }
                    if complete || self.chance.once_in(3) {
                        send_acks(tree, intake, lane);
                    }
                }
                Piece::Blocked { why: Blocked::Unregistered, first, end } if now - since > 2 * SECOND => {
                    family.give_up(first, end);
                }
                Piece::Blocked { .. } => return false,
            }
            return true;
        }
        if now - self.pushed.swept >= 100 * MS || tree.settled_at().is_some() {
            self.pushed.swept = now;
            loop {
                tree.acknowledge(RUNS_PER_ACK_MAX, &mut intake.acks);
                let all = intake.acks.len() < RUNS_PER_ACK_MAX;
                send_acks(tree, intake, lane);
                if all {
                    break;
                }
            }
            if tree.settled_at().is_some() && tree.all_acknowledged() {
                self.push_ended = Some(Ok(()));
                return true;
            }
        }
        if let Some(position) = intake.take_pieces().expect("the source's own frames") {
            self.pushed.installing = Some((position, now));
            return true;
        }
        let room = intake.room();
        match lane.receive(room.len()) {
            Ok(bytes) => {
                room[..bytes.len()].copy_from_slice(&bytes);
                intake.received(bytes.len());
                if bytes.is_empty() {
                    tree.check_settled();
                }
                !bytes.is_empty()
            }
            Err(Ended) => {
                self.push_ended = Some(Err(Ended));
                true
            }
        }
    }

    fn begin_installing(&mut self) {
        let kept = self.tree.as_ref().is_some_and(|tree| tree.kept_pages() > 0);
        self.installing = kept.then_some(Installing { least: 2, position: 0, pages: None });
    }

    /// The thread that installs what pre-copy brought.
    pub fn install(&mut self) -> bool {
        let (Some(installing), Some(tree)) = (&mut self.installing, &self.tree) else { return false };
        if self.fault_loop.is_none() {
            return false;
        }
        let now = self.chance.now();
        if installing.position == tree.len() {
            if installing.least == 0 {
                tree.check_settled();
                self.installing = None;
                return true;
            }
            (installing.least, installing.position) = (0, 0);
        }
        let mut family = tree.lock_last(installing.position);
        let Some((pages, since)) = &installing.pages else {
            match family.next_kept(installing.least) {
                Some(pages) => installing.pages = Some((pages, now)),
                None => installing.position += 1,
            }
            return true;
        };
        match family.arrived_kept(pages.start, pages.end).expect("no errors in the model") {
            Arrival::Settled => installing.pages = None,
            Arrival::Blocked(Blocked::Unregistered) if now - since > 2 * SECOND => {
                let blocked = family.kept_in(pages.start, pages.end);
                blocked.into_iter().for_each(|(first, end)| family.give_up(first, end));
            }
            Arrival::Blocked(_) => return false,
        }
        true
    }
}

fn send_acks(tree: &Tree<Mm>, intake: &mut Intake<Mm>, lane: &Socket) {
    if !intake.acks.is_empty() {
        tree.record_acknowledged(&intake.acks);
        lane.send(&encode_ack(&intake.acks));
        intake.acks.clear();
    }
}
