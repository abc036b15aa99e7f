//! The source's program. Its decisions, ledger, order, answers and acknowledgements are the real ones; what is here stands for
//! the threads and waits around them: `mover/frozen.rs` (`reach_commit`, `wait`), `mover/committed.rs` (`push` to `look_after`),
//! `mover/session.rs` (`resume`, `call_off`), `lanes/push.rs` (the loop of `push`, the head of `acknowledgements`) and the receiving
//! end of `lanes/fault.rs::serve`.

use std::sync::Arc;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::PAGE_SIZE;
use protocol::wire::control::{Clean, Control, Dumped, Summary};
use protocol::wire::frame::{HEADER_LEN, Header, Kind, RUN_HEADER_LEN, RunFrame};
use protocol::wire::settled_map::Assembly;
use protocol::wire::switchover::source::{Action, Ending, Event, Switchover};
use source_server::lanes::{Answers, Lanes, Order, take_acknowledgement};
use source_server::ledger::IndexedTaskRun;
use source_server::store::Scratch;

use super::Defect;
use super::chance::{Chance, SECOND, Us};
use super::net::{Answer, Net};
use super::pages::Memory;
use super::precopy::Copying;
use super::store::{Pages, Store};
use super::wire::{Connections, ControlEnd, Ended};

/// The tasks at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tasks {
    /// They run.
    Running,
    /// They stand still, with all their memory.
    Stopped,
    /// They are killed.
    Gone,
}

/// What is left at the source's host when its program is killed.
#[derive(Debug)]
pub struct Host {
    /// The tree.
    pub memory: Memory,
    /// How it is.
    pub tasks: Tasks,
    /// What stayed behind, once it is frozen.
    pub map: Option<Arc<LazyMap>>,
    /// Where that waits.
    pub pages: Option<Arc<Pages>>,
    /// All of it is in pipes.
    pub drained: bool,
    /// The tasks themselves are what is served from.
    pub frozen: bool,
    /// CRIU serves pages.
    pub dump_lives: bool,
    /// A holder has the pipes, and word was left whom they are for.
    pub held: bool,
    /// `Commit` was handed to the connection.
    pub promised: bool,
    /// Everything was freed because the destination has it.
    pub released: bool,
}

impl Host {
    /// A tree that runs.
    #[must_use]
    pub const fn new(memory: Memory) -> Self {
        Self {
            memory,
            tasks: Tasks::Running,
            map: None,
            pages: None,
            drained: false,
            frozen: false,
            dump_lives: false,
            held: false,
            promised: false,
            released: false,
        }
    }

    /// From here on the tasks are the store: all of it is at hand.
    fn serve_frozen(&mut self) {
        (self.frozen, self.drained) = (true, true);
        if let Some(pages) = &self.pages {
            while !pages.drain_one() {}
        }
    }

    /// The program is killed: what nobody else holds is gone with it.
    pub const fn program_is_killed(&mut self) {
        self.dump_lives = false;
        self.drained &= self.held;
    }
}

#[derive(Debug)]
enum Phase {
    Copying(Box<Copying>),
    /// Frozen, and CRIU dumps until then.
    Dumping(Us),
    /// From the end of the images on.
    Serving,
    Over(Ending),
}

#[derive(Debug)]
struct Pause {
    since: Us,
    dial_at: Us,
    /// The same answer since when.
    answer: (Answer, Us),
    /// New connections, what they have told of the map, and by when there must be more.
    made: Option<(Assembly, Us)>,
}

/// Chunks in the order in which they are pushed, and what is about to be sent.
struct Push {
    order: Order,
    runs: Vec<IndexedTaskRun>,
    id: u64,
}

/// The program.
pub struct Source {
    chance: Chance,
    defect: Option<Defect>,
    switchover: Switchover,
    phase: Phase,
    connections: Connections,
    control: ControlEnd,
    lanes: Option<Arc<Lanes>>,
    scratch: Option<Scratch>,
    requests: Option<Vec<u8>>,
    acks: Option<Vec<u8>>,
    push: Option<Push>,
    pause: Option<Pause>,
    chunk_pages: u64,
    frame_pages: u64,
    /// The destination has said that it runs.
    runs: bool,
    told_drained: bool,
    /// What pre-copy brought and nobody has written since, until it was told.
    clean: Option<Bitmap>,
    due: Option<Us>,
    /// What the destination says of itself at the end.
    pub summary: Option<Summary>,
    /// How often it has gone on over new connections.
    pub resumed: u32,
}

impl Source {
    /// Of a move that begins; with so many rounds of pre-copy.
    #[must_use]
    pub fn new(chance: &Chance, defect: Option<Defect>, connections: Connections, rounds: u32) -> Self {
        let phase = Phase::Copying(Box::new(Copying::new(rounds)));
        Self {
            chance: chance.clone(),
            defect,
            switchover: Switchover::default(),
            phase,
            control: ControlEnd::new(connections.control.clone()),
            connections,
            lanes: None,
            scratch: None,
            requests: None,
            acks: None,
            push: None,
            pause: None,
            chunk_pages: chance.between(2, 16),
            frame_pages: chance.between(1, 24),
            runs: false,
            told_drained: false,
            clean: None,
            due: None,
            summary: None,
            resumed: 0,
        }
    }

    /// Of a move whose program was killed behind the freeze.
    #[must_use]
    pub fn taken_over(chance: &Chance, host: &mut Host, connections: Connections) -> Self {
        let mut this = Self::new(chance, None, connections, 0);
        this.phase = Phase::Serving;
        if let (Some(map), Some(pages)) = (&host.map, &host.pages) {
            this.open_store(map, pages);
        }
        if host.tasks == Tasks::Gone {
            this.switchover = Switchover::taken_over();
            (this.runs, this.told_drained) = (true, true);
        } else if host.promised {
            this.switchover = Switchover::promised();
            host.serve_frozen();
        } else {
            this.end(Ending::LetRun, host);
            return this;
        }
        this.begin_pause();
        this
    }

    fn open_store(&mut self, map: &Arc<LazyMap>, pages: &Arc<Pages>) {
        self.lanes = Some(Lanes::new(map.clone(), Arc::new(Store(pages.clone()))));
        self.scratch = Some(Scratch::new(1).expect("a pipe"));
    }

    /// How it has ended, if it has.
    #[must_use]
    pub const fn ending(&self) -> Option<Ending> {
        match self.phase {
            Phase::Over(ending) => Some(ending),
            _ => None,
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
        let missing = self.lanes.as_ref().map(|lanes| lanes.ledger().missing());
        format!(
            "source: {:?}, paused {}, {missing:?} pages missing, answers {}, pushes {}, is acknowledged {}",
            self.switchover,
            self.pause.is_some(),
            self.requests.is_some(),
            self.push.is_some(),
            self.acks.is_some()
        )
    }

    /// Its connections, for who cuts them.
    #[must_use]
    pub const fn connections(&self) -> &Connections {
        &self.connections
    }

    /// The main thread: false if there is nothing to do.
    pub fn step(&mut self, host: &mut Host, net: &mut Net) -> bool {
        match &mut self.phase {
            Phase::Over(_) => false,
            Phase::Copying(copying) => {
                let done = copying.step(&self.chance, &mut host.memory, &self.connections.push);
                match done {
                    Ok(false) => self.listen(host),
                    Ok(true) => {
                        self.freeze(host);
                        true
                    }
                    Err(Ended) => {
                        self.event(Event::Failing, host);
                        self.event(Event::Broken, host);
                        true
                    }
                }
            }
            Phase::Dumping(until) if *until <= self.chance.now() => {
                self.ship(host);
                true
            }
            Phase::Dumping(_) => self.listen(host),
            Phase::Serving => self.serve(host, net),
        }
    }

    /// The tasks stand still; what is clean is found.
    fn freeze(&mut self, host: &mut Host) {
        (host.tasks, host.dump_lives) = (Tasks::Stopped, true);
        let map = Arc::new(host.memory.lazy_map());
        let pages = Pages::new(host.memory.contents(&map), self.chunk_pages);
        self.open_store(&map, &pages);
        (host.map, host.pages) = (Some(map.clone()), Some(pages));
        if let (Phase::Copying(copying), Some(lanes)) = (&mut self.phase, &self.lanes) {
            let stale_is_clean = self.defect == Some(Defect::SkipStale);
            let (clean, hot) = copying.last_scan(&mut host.memory, &map, stale_is_clean);
            lanes.copied_ahead(&clean, &hot);
            self.clean = Some(clean);
        }
        self.phase = Phase::Dumping(self.chance.now() + self.chance.between(10, 3000));
    }

    /// The images are there, and then everything that is clean.
    fn ship(&mut self, host: &mut Host) {
        let Some(map) = &host.map else { return };
        let clean = self.clean.take().unwrap_or_else(|| Bitmap::clear(map.pages()));
        let (lazy_pages, clean_pages) = (map.pages(), clean.count());
        self.control.send(&Control::Dumped(Dumped { images: 0, frozen_us: 0, lazy_pages, clean_pages }));
        let mut first = 0;
        while clean_pages > 0 && first < clean.len() {
            let bits = clean.bytes_from(first, 4);
            let pages = bits.len() as u64 * 8;
            self.control.send(&Control::Clean(Clean { first, bits }));
            first += pages;
        }
        self.phase = Phase::Serving;
        self.requests = Some(Vec::new());
        self.due = Some(self.chance.now() + 300 * SECOND);
    }

    fn serve(&mut self, host: &mut Host, net: &mut Net) -> bool {
        if host.drained && self.runs && !self.told_drained {
            self.told_drained = true;
            self.event(Event::Drained, host);
            return true;
        }
        if self.due.is_some_and(|due| due <= self.chance.now()) && self.pause.is_none() {
            self.due = None;
            self.event(Event::Broken, host);
            return true;
        }
        if self.pause.is_some() { self.go_on(host, net) } else { self.listen(host) }
    }

    /// CRIU has ended before everything was in pipes.
    pub fn drain_fails(&mut self, host: &mut Host) {
        host.serve_frozen();
        self.event(Event::Undrained, host);
    }

    fn listen(&mut self, host: &mut Host) -> bool {
        match self.control.receive() {
            Ok(None) => false,
            Ok(Some(message)) => {
                let event = Event::from(&message);
                if let Control::Complete(summary) = message {
                    self.summary = Some(summary);
                    self.due = Some(self.chance.now() + 30 * SECOND);
                }
                self.event(event, host);
                true
            }
            Err(Ended) => {
                self.event(Event::Lost, host);
                true
            }
        }
    }

    /// Whatever the operator or CRIU does.
    pub fn event(&mut self, event: Event, host: &mut Host) {
        let now = self.chance.now();
        let soon = |due: Option<Us>, within: Us| Some(due.map_or(now + within, |due| due.min(now + within)));
        match self.switchover.step(event) {
            Action::Wait => {}
            Action::AwaitReason => {
                self.due = soon(self.due, if host.promised { 20 * SECOND } else { 3 * SECOND });
            }
            Action::AwaitRolledBack => self.due = soon(self.due, 3 * SECOND),
            Action::CheckFence => {
                self.event(Event::Fence { stands: host.tasks == Tasks::Stopped }, host);
            }
            Action::SendCommit => {
                host.promised = true;
                self.control.send(&Control::Commit);
                self.due = Some(now + 60 * SECOND);
            }
            Action::CallOff => {
                self.control.send(&Control::Abort("the simulation says so".into()));
                if !matches!(self.phase, Phase::Over(_)) {
                    // Nobody serves lanes any more.
                    (self.phase, self.requests) = (Phase::Serving, None);
                }
                self.due = Some(now + 20 * SECOND);
            }
            Action::Push => {
                (self.due, self.runs) = (None, true);
                self.start_push();
            }
            Action::Resume => self.begin_pause(),
            Action::LetGo => {
                host.dump_lives = false;
                if !host.frozen {
                    // The holder first, then the tasks.
                    (host.held, host.tasks) = (true, Tasks::Gone);
                }
                self.event(Event::HasLetGo, host);
            }
            Action::End(ending) => self.end(ending, host),
        }
    }

    fn end(&mut self, ending: Ending, host: &mut Host) {
        host.dump_lives = false;
        match ending {
            Ending::LetRun => host.tasks = Tasks::Running,
            Ending::Hold => self.control.send(&Control::Abort("the source holds".into())),
            Ending::Release => {
                (host.tasks, host.held, host.released) = (Tasks::Gone, false, true);
                self.control.send(&Control::Released);
            }
        }
        self.end_lanes();
        self.connections.shutdown();
        self.phase = Phase::Over(ending);
    }

    fn end_lanes(&mut self) {
        (self.requests, self.acks, self.push) = (None, None, None);
    }

    fn begin_pause(&mut self) {
        self.connections.shutdown();
        self.end_lanes();
        let now = self.chance.now();
        self.pause = Some(Pause { since: now, dial_at: now, answer: (Answer::Silent, now), made: None });
    }

    /// Paused: dials, and takes the map of what is settled.
    fn go_on(&mut self, host: &mut Host, net: &mut Net) -> bool {
        let now = self.chance.now();
        let Some(pause) = &mut self.pause else { return false };
        let Some((assembly, due)) = &mut pause.made else {
            if pause.dial_at > now {
                return false;
            }
            return self.dial(host, net);
        };
        match self.control.receive() {
            Ok(None) if *due > now => return false,
            Ok(Some(Control::SettledMap(piece))) => {
                assembly.add(&piece).expect("the pieces of a map");
                *due = now + 10 * SECOND;
            }
            Ok(Some(Control::Resumed)) => {
                let settled = pause.made.take().and_then(|(assembly, _)| assembly.finish().ok());
                self.pause = None;
                self.resume(&settled.expect("a whole map"), host);
            }
            Ok(None | Some(_)) | Err(Ended) => {
                pause.made = None;
                pause.dial_at = now + self.chance.between(25, 250) * 1000;
                self.connections.shutdown();
            }
        }
        true
    }

    fn dial(&mut self, host: &mut Host, net: &mut Net) -> bool {
        let now = self.chance.now();
        let pages = host.map.as_ref().map_or(0, |map| map.pages());
        let Some(pause) = &mut self.pause else { return false };
        match net.dial(&self.chance) {
            Ok(connections) => {
                self.control = ControlEnd::new(connections.control.clone());
                self.connections = connections;
                pause.made = Some((Assembly::new(pages), now + 10 * SECOND));
            }
            Err(Answer::RolledBack) => {
                self.pause = None;
                self.event(Event::RolledBack, host);
            }
            Err(answer) => {
                if answer != pause.answer.0 {
                    pause.answer = (answer, now);
                }
                let patience = match answer {
                    Answer::Silent => 45 * SECOND,
                    Answer::Refused => 30 * SECOND,
                    Answer::Unknown | Answer::RolledBack => 3 * SECOND,
                };
                pause.dial_at = now + self.chance.between(25, 250) * 1000;
                if now - pause.answer.1 > patience || now - pause.since > 45 * SECOND {
                    self.event(Event::Broken, host);
                }
            }
        }
        true
    }

    fn resume(&mut self, settled: &Bitmap, host: &mut Host) {
        self.resumed += 1;
        if let Some(lanes) = &self.lanes {
            let complete = lanes.ledger().resume(settled);
            complete.into_iter().for_each(|chunk| lanes.store.free(chunk));
        }
        self.requests = Some(Vec::new());
        self.due = (!self.runs).then(|| self.chance.now() + 60 * SECOND);
        self.event(Event::Resumed, host);
    }

    fn start_push(&mut self) {
        let Some(lanes) = &self.lanes else { return };
        let order = Order::hot_first(lanes.ledger().chunks(), lanes.take_hot());
        self.push = Some(Push { order, runs: Vec::new(), id: 0 });
        self.acks = Some(Vec::new());
    }

    /// The thread of the fault lane.
    pub fn answer(&mut self, host: &mut Host) -> bool {
        let (Some(bytes), Some(lanes), Some(scratch)) = (&mut self.requests, &self.lanes, &mut self.scratch)
        else {
            return false;
        };
        match self.connections.fault.receive(64 * RUN_HEADER_LEN) {
            Ok(more) => bytes.extend(more),
            Err(Ended) => {
                self.requests = None;
                self.event(Event::Failing, host);
                return true;
            }
        }
        let fault = &self.connections.fault;
        let mut answers = Answers::new(lanes, |bytes| {
            fault.send(bytes);
            Ok(())
        });
        let mut used = 0;
        while let Some(head) = bytes[used..].first_chunk::<RUN_HEADER_LEN>() {
            let request = RunFrame::decode(head).expect("the destination's own frame");
            answers.add(scratch, &request).expect("lazy pages");
            used += RUN_HEADER_LEN;
        }
        answers.send().expect("a model takes everything");
        bytes.drain(..used);
        used > 0
    }

    /// The thread that pushes.
    pub fn push(&mut self) -> bool {
        const WINDOW: usize = 256 << 10;
        let (Some(push), Some(lanes), Some(scratch)) = (&mut self.push, &self.lanes, &mut self.scratch)
        else {
            return false;
        };
        let lane = &self.connections.push;
        if lane.unsent() > WINDOW {
            return false;
        }
        let store = &lanes.store;
        if push.runs.is_empty() {
            // Ahead of a fault by more than there is here: within the move all the same.
            let chunks = lanes.ledger().chunks();
            let wanted = lanes.take_wanted().map(|chunk| chunk % chunks.max(1));
            let Some(chunk) = push.order.next(wanted, store.chunks_at_hand()) else {
                self.push = None;
                return false;
            };
            lanes.ledger().take_unsent(&lanes.map, chunk, self.frame_pages, &mut push.runs);
        }
        let Some(first) = push.runs.first() else { return true };
        let chunk = first.first / store.chunk_pages();
        if chunk >= store.chunks_at_hand() {
            return false;
        }
        for run in push.runs.drain(..) {
            let bytes = usize::try_from(run.what.run.pages).expect("few pages") * PAGE_SIZE;
            let mut frame = run.what.frame(Kind::Pages, push.id, bytes).to_vec();
            frame.resize(RUN_HEADER_LEN + bytes, 0);
            // Runs of a chunk end with it. One that was freed is not sent.
            let read = store.read(scratch, run.first, &mut frame[RUN_HEADER_LEN..]);
            if read.expect("a model reads everything") == run.what.run.pages {
                lane.send(&frame);
            }
            push.id += 1;
        }
        if self.defect == Some(Defect::FreeUnacknowledged) {
            store.free(chunk);
        }
        true
    }

    /// The thread that takes acknowledgements in.
    pub fn acknowledged(&mut self, host: &mut Host) -> bool {
        let (Some(bytes), Some(lanes)) = (&mut self.acks, &self.lanes) else { return false };
        if lanes.ledger().missing() == 0 {
            self.acks = None;
            self.event(Event::Acknowledged, host);
            return true;
        }
        match self.connections.push.receive(usize::MAX) {
            Ok(more) if more.is_empty() => return false,
            Ok(more) => bytes.extend(more),
            Err(Ended) => {
                self.acks = None;
                self.event(Event::Failing, host);
                return true;
            }
        }
        while let Some(head) = bytes.first_chunk::<HEADER_LEN>() {
            let header = Header::decode(head).expect("the destination's own frame");
            let Some(body) = bytes.get(HEADER_LEN..HEADER_LEN + header.body_len) else { break };
            assert_eq!(header.kind, Kind::Ack);
            take_acknowledgement(lanes, body).expect("lazy pages");
            bytes.drain(..HEADER_LEN + header.body_len);
        }
        true
    }
}
