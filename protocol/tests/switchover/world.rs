//! Everything that takes part in a switchover, as a value: both programs (their state is the real one, moved by the
//! real decisions), the tasks on both sides, what the kernel goes on doing without the programs, and the connections.
//!
//! What goes wrong may go wrong at any time and in any number: the model has more time limits, failures and
//! interrupts than the programs have. A cut keeps any prefix of what is on its way, in each direction.

mod steps;

use protocol::wire::switchover::{destination, source};

pub(crate) use steps::{Kind, Step};

/// The decisions under test, or mutants of them.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) source: fn(source::State, source::Event) -> (source::State, source::Action),
    pub(crate) destination:
        fn(destination::State, destination::Event) -> (destination::State, destination::Action),
}

pub(crate) const RULES: Rules = Rules { source: source::decide, destination: destination::decide };

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Store {
    Pipes,
    Frozen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Tasks {
    /// Not restored yet.
    Absent,
    /// Restored, held at the barrier.
    Held,
    Running,
    /// Behind the fence, all memory intact.
    Stopped,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    Dumped,
    Prepared,
    Commit,
    Running,
    Complete,
    Released,
    Abort,
    RolledBack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Acks {
    None,
    OnTheirWay,
    Arrived,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) store: Store,
    /// Nothing: the program was killed.
    pub(crate) source: Option<source::State>,
    pub(crate) destination: Option<destination::State>,
    pub(crate) source_tasks: Tasks,
    pub(crate) destination_tasks: Tasks,
    /// CRIU's dump is ready and the fence is up.
    pub(crate) fenced: bool,
    dumped: bool,
    images_here: bool,
    /// CRIU still serves pages at the source.
    dump_serves: bool,
    /// Every page is in pipes that somebody holds.
    pub(crate) in_pipes: bool,
    /// A holder has the pipes as well.
    held: bool,
    /// Every page is at the destination.
    pub(crate) here: bool,
    pub(crate) acks: Acks,
    pub(crate) to_source: Vec<Message>,
    pub(crate) to_destination: Vec<Message>,
    /// The control connection.
    pub(crate) cut: bool,
    pub(crate) lanes_cut: bool,
    /// No new connection can be made.
    pub(crate) down: bool,
    /// `Commit` was handed to the connection.
    pub(crate) promised: bool,
    /// The destination has said `RolledBack`.
    pub(crate) clean: bool,
    /// Word is left at the destination that the tasks have not run, and will not.
    never_ran: bool,
    /// Another daemon listens in the place of one that was killed, and has found that word.
    pub(crate) denies: bool,
    /// The source has freed what it had.
    pub(crate) freed: bool,
}

impl World {
    pub(crate) const fn new(store: Store) -> Self {
        Self {
            store,
            source: Some(source::State::Preparing { failing: false }),
            destination: Some(destination::State::Restoring),
            source_tasks: Tasks::Running,
            destination_tasks: Tasks::Absent,
            fenced: false,
            dumped: false,
            images_here: false,
            dump_serves: true,
            in_pipes: false,
            held: false,
            here: false,
            acks: Acks::None,
            to_source: Vec::new(),
            to_destination: Vec::new(),
            cut: false,
            lanes_cut: false,
            down: false,
            promised: false,
            clean: false,
            never_ran: false,
            denies: false,
            freed: false,
        }
    }

    /// The source's program, if it is there and has something to decide.
    pub(crate) fn source_open(&self) -> Option<source::State> {
        self.source.filter(|state| !matches!(state, source::State::Ended(_)))
    }

    pub(crate) fn destination_open(&self) -> Option<destination::State> {
        self.destination.filter(|state| !matches!(state, destination::State::Ended(_)))
    }

    pub(crate) fn kill_source(&mut self) {
        self.source = None;
        self.dump_serves = false;
        // Its pipes go with it, unless it has left a holder behind. The tasks stay behind the fence, or never were.
        self.in_pipes &= self.held;
    }

    /// Another process takes the place of one that was killed behind the freeze.
    pub(crate) fn resume_source(&mut self) {
        let drained = source::Progress { drained: true, let_go: true, acknowledged: false, complete: false };
        self.cut_everything();
        self.source = Some(match self.source_tasks {
            Tasks::Gone => source::State::Paused(Some(drained)),
            // What was not promised is rolled back.
            _ if !self.promised => {
                self.source_tasks = Tasks::Running;
                source::State::Ended(source::Ending::LetRun)
            }
            _ => {
                // The tasks themselves are what it serves from.
                self.store = Store::Frozen;
                source::State::Paused(None)
            }
        });
    }

    pub(crate) fn kill_destination(&mut self) {
        // The keeper goes on holding the userfaultfds of a tree that runs.
        self.destination = None;
    }

    pub(crate) fn cut_for_good(&mut self) {
        self.down = true;
        self.cut_everything();
    }

    pub(crate) fn cut_everything(&mut self) {
        self.cut = true;
        self.lanes_cut = true;
        self.to_destination.clear();
        self.to_source.clear();
        if self.acks == Acks::OnTheirWay {
            self.acks = Acks::None;
        }
    }

    /// Nobody reads what is sent to a program that has ended.
    fn forget_unread(&mut self) {
        if self.source_open().is_none() {
            self.to_source.clear();
        }
        if self.destination_open().is_none() {
            self.to_destination.clear();
        }
    }

    fn send_to_destination(&mut self, message: Message) {
        if !self.cut {
            self.to_destination.push(message);
        }
    }

    fn send_to_source(&mut self, message: Message) {
        if !self.cut {
            self.to_source.push(message);
        }
    }

    fn source_event(&mut self, rules: Rules, event: source::Event) {
        use source::{Action, Ending, Event};
        let Some(state) = self.source else { return };
        let (next, action) = (rules.source)(state, event);
        self.source = Some(next);
        match action {
            Action::Wait | Action::AwaitReason | Action::AwaitRolledBack | Action::Push => {}
            Action::Resume => {
                (self.cut, self.lanes_cut) = (true, true);
                self.to_source.clear();
            }
            Action::CheckFence => {
                let stands = self.source_tasks != Tasks::Running;
                self.source_event(rules, Event::Fence { stands });
            }
            Action::SendCommit => {
                self.promised = true;
                self.send_to_destination(Message::Commit);
            }
            Action::CallOff => self.send_to_destination(Message::Abort),
            Action::LetGo => {
                self.dump_serves = false;
                if self.store == Store::Pipes {
                    self.held = true;
                    self.source_tasks = Tasks::Gone;
                }
                self.source_event(rules, Event::HasLetGo);
            }
            Action::End(Ending::LetRun) => {
                if self.source_tasks == Tasks::Stopped {
                    self.source_tasks = Tasks::Running;
                }
                self.in_pipes = false;
            }
            // The holder keeps the pipes.
            Action::End(Ending::Hold) => (self.dump_serves, self.held) = (false, true),
            Action::End(Ending::Release) => {
                self.freed = true;
                self.in_pipes = false;
                self.source_tasks = Tasks::Gone;
                self.send_to_destination(Message::Released);
            }
        }
    }

    fn destination_event(&mut self, rules: Rules, event: destination::Event) {
        use destination::{Action, Ending};
        let Some(state) = self.destination else { return };
        let (next, action) = (rules.destination)(state, event);
        self.destination = Some(next);
        match action {
            Action::SendPrepared => {
                self.never_ran = true;
                self.send_to_source(Message::Prepared);
            }
            Action::LetRun => {
                self.never_ran = false;
                if self.destination_tasks == Tasks::Held {
                    self.destination_tasks = Tasks::Running;
                }
            }
            Action::SendRunning => self.send_to_source(Message::Running),
            Action::SendComplete => self.send_to_source(Message::Complete),
            Action::AwaitReleased | Action::Wait | Action::End(Ending::Pause | Ending::Release) => {}
            Action::AwaitResume => {
                (self.cut, self.lanes_cut) = (true, true);
                self.to_destination.clear();
            }
            Action::Resume => {
                self.send_to_source(Message::Running);
                // The map says what is here.
                if self.here && self.acks == Acks::None {
                    self.acks = Acks::OnTheirWay;
                }
            }
            Action::End(Ending::TellAndPause) => self.send_to_source(Message::Abort),
            Action::End(Ending::TearDown) => {
                self.destination_tasks = Tasks::Gone;
                self.clean = true;
                self.send_to_source(Message::Abort);
                self.send_to_source(Message::RolledBack);
            }
        }
    }
}
