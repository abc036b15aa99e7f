//! Everything that takes part in a switchover, as a value: both programs (their state is the real one, moved by the
//! real decisions), the tasks on both sides, what the kernel goes on doing without the programs, and the connections.
//!
//! What goes wrong may go wrong at any time and in any number: the model has more time limits, failures and
//! interrupts than the programs have. A cut keeps any prefix of what is on its way, in each direction.

use protocol::wire::switchover::{destination, source};

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
    /// Every page is at the destination.
    pub(crate) here: bool,
    pub(crate) acks: Acks,
    pub(crate) to_source: Vec<Message>,
    pub(crate) to_destination: Vec<Message>,
    /// The control connection.
    pub(crate) cut: bool,
    pub(crate) lanes_cut: bool,
    /// `Commit` was handed to the connection.
    pub(crate) promised: bool,
    /// The destination has said `RolledBack`.
    pub(crate) clean: bool,
    /// The source has freed what it had.
    pub(crate) freed: bool,
}

/// Why a step is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It happens by itself.
    Progress,
    /// A time limit that the programs have: it happens if nothing else does.
    Limit,
    /// Something goes wrong.
    Fault,
}

/// One step: why, what happened, and the world after it.
pub(crate) struct Step {
    pub(crate) kind: Kind,
    pub(crate) what: String,
    pub(crate) next: World,
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
            here: false,
            acks: Acks::None,
            to_source: Vec::new(),
            to_destination: Vec::new(),
            cut: false,
            lanes_cut: false,
            promised: false,
            clean: false,
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

    /// Everything that can happen next.
    pub(crate) fn steps(&self, rules: Rules) -> Vec<Step> {
        let mut steps = Vec::new();
        self.source_steps(rules, &mut steps);
        self.destination_steps(rules, &mut steps);
        self.kernel_steps(&mut steps);
        self.faults(&mut steps);
        steps
    }

    fn source_steps(&self, rules: Rules, steps: &mut Vec<Step>) {
        use source::{Event, State};
        let Some(state) = self.source_open() else { return };
        let on = |event| move |world: &mut Self| world.source_event(rules, event);
        let preparing = matches!(state, State::Preparing { .. });
        self.step(
            steps,
            preparing && !self.fenced,
            Kind::Progress,
            "source: frozen, dumped, fenced",
            |world| {
                world.fenced = true;
                world.source_tasks = Tasks::Stopped;
            },
        );
        let drains = self.fenced && self.dump_serves && self.store == Store::Pipes && !self.in_pipes;
        self.step(steps, drains, Kind::Progress, "source: drained", |world| world.in_pipes = true);
        self.step(
            steps,
            preparing && self.fenced && !self.dumped,
            Kind::Progress,
            "source: sends Dumped",
            |world| {
                world.dumped = true;
                world.send_to_destination(Message::Dumped);
            },
        );
        if let Some(&message) = self.to_source.first() {
            self.step(steps, true, Kind::Progress, &format!("source: receives {message:?}"), |world| {
                world.to_source.remove(0);
                world.source_event(
                    rules,
                    match message {
                        Message::Prepared => Event::Prepared,
                        Message::Running => Event::Running,
                        Message::Complete => Event::Complete,
                        Message::Abort => Event::Abort,
                        Message::RolledBack => Event::RolledBack,
                        _ => Event::OutOfOrder,
                    },
                );
            });
        }
        if let State::Pushing(progress) = state {
            let stored = self.in_pipes || self.store == Store::Frozen;
            self.step(
                steps,
                stored && !progress.drained,
                Kind::Progress,
                "source: lets go of the tasks",
                on(Event::Drained),
            );
            self.step(
                steps,
                self.acks == Acks::OnTheirWay,
                Kind::Progress,
                "source: every page acknowledged",
                |world| {
                    world.acks = Acks::Arrived;
                    world.source_event(rules, Event::Acknowledged);
                },
            );
        }
        let ended = self.cut || self.destination_open().is_none();
        let lost = ended && self.to_source.is_empty();
        self.step(steps, lost, Kind::Progress, "source: the connection has ended", on(Event::Broken));
        self.step(
            steps,
            ended || self.lanes_cut,
            Kind::Progress,
            "source: a lane has ended",
            on(Event::Failing),
        );
        let limited = match state {
            State::Preparing { .. } => self.dumped,
            State::Pushing(progress) => progress.complete,
            _ => true,
        };
        self.step(steps, limited, Kind::Limit, "source: a time limit", on(Event::Broken));
        self.step(steps, true, Kind::Fault, "source: a failure", on(Event::Broken));
        self.step(steps, true, Kind::Fault, "source: interrupted", on(Event::Interrupted));
    }

    fn destination_steps(&self, rules: Rules, steps: &mut Vec<Step>) {
        use destination::{Event, State};
        let Some(state) = self.destination_open() else { return };
        let on = |event| move |world: &mut Self| world.destination_event(rules, event);
        if let Some(&message) = self.to_destination.first() {
            self.step(steps, true, Kind::Progress, &format!("destination: receives {message:?}"), |world| {
                world.to_destination.remove(0);
                world.destination_event(
                    rules,
                    match message {
                        Message::Dumped if state == State::Restoring => {
                            world.images_here = true;
                            return;
                        }
                        Message::Commit => Event::Commit,
                        Message::Released => Event::Released,
                        Message::Abort => Event::Broken,
                        _ => Event::OutOfOrder,
                    },
                );
            });
        }
        let restoring = self.images_here && state == State::Restoring;
        self.step(
            steps,
            restoring && self.destination_tasks == Tasks::Absent,
            Kind::Progress,
            "destination: restored",
            |world| {
                world.destination_tasks = Tasks::Held;
            },
        );
        let held = restoring && self.destination_tasks == Tasks::Held;
        self.step(steps, held, Kind::Progress, "destination: hook done, sends Prepared", on(Event::Held));
        let committed = state == State::Committed;
        let running = self.destination_tasks == Tasks::Running;
        self.step(
            steps,
            committed && running,
            Kind::Progress,
            "destination: the tasks run",
            on(Event::Resumed),
        );
        self.step(
            steps,
            committed && !running,
            Kind::Progress,
            "destination: criu has failed",
            on(Event::RestoreFailed),
        );
        self.step(steps, committed && running, Kind::Fault, "destination: criu fails to resume", |world| {
            world.destination_tasks = Tasks::Gone;
            world.destination_event(rules, Event::RestoreFailed);
        });
        let pushing = matches!(self.source, Some(source::State::Pushing(_)));
        let flows = state == State::Running && pushing && !self.lanes_cut && !self.here;
        self.step(steps, flows, Kind::Progress, "pages arrive and are acknowledged", |world| {
            world.here = true;
            world.acks = Acks::OnTheirWay;
        });
        let settled = state == State::Running && self.here;
        self.step(steps, settled, Kind::Progress, "destination: sends Complete", |world| {
            world.destination_event(rules, Event::Settled);
            world.destination_event(rules, Event::CompleteSent);
        });
        // Whether it leaves or not.
        self.step(steps, settled, Kind::Fault, "destination: fails to send Complete", |world| {
            world.destination_event(rules, Event::Settled);
            world.destination_event(rules, Event::Broken);
        });
        let ended = self.cut || self.source_open().is_none();
        let lost = ended && self.to_destination.is_empty();
        self.step(steps, lost, Kind::Progress, "destination: the connection has ended", on(Event::Broken));
        let fetching = state == State::Running && self.lanes_cut && !self.here;
        self.step(steps, fetching, Kind::Progress, "destination: a lane has ended", on(Event::Broken));
        let limited = match state {
            State::Restoring => self.images_here,
            State::Prepared | State::Committed | State::Completed => true,
            _ => false,
        };
        self.step(steps, limited, Kind::Limit, "destination: a time limit", on(Event::Broken));
        self.step(steps, true, Kind::Fault, "destination: a failure or an interrupt", on(Event::Broken));
    }

    /// What goes on without a program.
    fn kernel_steps(&self, steps: &mut Vec<Step>) {
        // The barrier's script has lost its daemon: CRIU kills what it restored, now or as soon as it gets there.
        let unheld =
            self.destination.is_none() && matches!(self.destination_tasks, Tasks::Held | Tasks::Absent);
        self.step(steps, unheld, Kind::Progress, "the barrier fails, criu kills its tree", |world| {
            world.destination_tasks = Tasks::Gone;
        });
    }

    fn faults(&self, steps: &mut Vec<Step>) {
        for kept_out in 0..=self.to_destination.len() {
            for kept_back in 0..=self.to_source.len() {
                let (out, back) = (self.to_destination.len() - kept_out, self.to_source.len() - kept_back);
                let what = format!(
                    "the control connection is cut; {out} messages to the destination and {back} to the source are lost"
                );
                self.step(steps, !self.cut, Kind::Fault, &what, |world| {
                    world.cut = true;
                    world.to_destination.truncate(kept_out);
                    world.to_source.truncate(kept_back);
                });
            }
        }
        self.step(steps, !self.lanes_cut, Kind::Fault, "the lanes are cut", |world| world.lanes_cut = true);
        let lossy = self.lanes_cut && self.acks == Acks::OnTheirWay;
        self.step(steps, lossy, Kind::Fault, "acknowledgements are lost", |world| world.acks = Acks::None);
        self.step(
            steps,
            self.source_open().is_some(),
            Kind::Fault,
            "source-server is killed",
            Self::kill_source,
        );
        self.step(
            steps,
            self.destination_open().is_some(),
            Kind::Fault,
            "uffd-daemon is killed",
            Self::kill_destination,
        );
        self.step(steps, self.fenced && self.dump_serves, Kind::Fault, "criu dump is killed", |world| {
            // The SIGSTOP that was pending behind its ptrace takes effect: nothing runs.
            world.dump_serves = false;
        });
        let restores = matches!(self.destination_tasks, Tasks::Absent | Tasks::Held);
        self.step(steps, restores, Kind::Fault, "criu restore is killed", |world| {
            world.destination_tasks = Tasks::Gone
        });
        // Behind Commit nothing watches the fence: who continues the tasks by hand then is told not to.
        let breakable = self.fenced && !self.promised && self.source_tasks == Tasks::Stopped;
        self.step(steps, breakable, Kind::Fault, "somebody continues the source's tasks", |world| {
            world.source_tasks = Tasks::Running;
        });
    }

    pub(crate) fn kill_source(&mut self) {
        self.source = None;
        self.dump_serves = false;
        // Its pipes go with it. The tasks stay behind the fence, or never were.
        self.in_pipes = false;
    }

    pub(crate) fn kill_destination(&mut self) {
        // The keeper goes on holding the userfaultfds of a tree that runs.
        self.destination = None;
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

    fn step(
        &self,
        steps: &mut Vec<Step>,
        possible: bool,
        kind: Kind,
        what: &str,
        change: impl FnOnce(&mut Self),
    ) {
        if possible {
            let mut next = self.clone();
            change(&mut next);
            next.forget_unread();
            steps.push(Step { kind, what: what.to_owned(), next });
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
            Action::End(Ending::Hold) => self.dump_serves = false,
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
            Action::SendPrepared => self.send_to_source(Message::Prepared),
            Action::LetRun => {
                if self.destination_tasks == Tasks::Held {
                    self.destination_tasks = Tasks::Running;
                }
            }
            Action::SendRunning => self.send_to_source(Message::Running),
            Action::SendComplete => self.send_to_source(Message::Complete),
            Action::AwaitReleased | Action::End(Ending::Pause | Ending::Release) => {}
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
