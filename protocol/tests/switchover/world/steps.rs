//! What can happen next in a world.

use protocol::wire::switchover::{destination, source};

use super::{Acks, Message, Rules, Store, Tasks, World};

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
        let undrained = self.fenced && self.store == Store::Pipes && !self.in_pipes;
        let kind = if self.dump_serves { Kind::Fault } else { Kind::Progress };
        self.step(steps, undrained, kind, "source: the drain fails", |world| {
            // The tasks themselves are what it serves from.
            world.store = Store::Frozen;
            world.source_event(rules, Event::Undrained);
        });
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
        if let State::Pushing(progress) | State::Paused(Some(progress)) = state {
            let stored = self.in_pipes || self.store == Store::Frozen;
            self.step(
                steps,
                stored && !progress.drained,
                Kind::Progress,
                "source: lets go of the tasks",
                on(Event::Drained),
            );
            let pushing = matches!(state, State::Pushing(_));
            self.step(
                steps,
                pushing && self.acks == Acks::OnTheirWay,
                Kind::Progress,
                "source: every page acknowledged",
                |world| {
                    world.acks = Acks::Arrived;
                    world.source_event(rules, Event::Acknowledged);
                },
            );
        }
        if let State::Paused(_) = state {
            self.resume_steps(rules, steps);
        } else {
            let ended = self.cut || self.destination_open().is_none();
            let lost = ended && self.to_source.is_empty();
            self.step(steps, lost, Kind::Progress, "source: the connection has ended", on(Event::Lost));
            self.step(
                steps,
                ended || self.lanes_cut,
                Kind::Progress,
                "source: a lane has ended",
                on(Event::Failing),
            );
        }
        let limited = match state {
            State::Preparing { .. } => self.dumped,
            State::Pushing(progress) => progress.complete,
            _ => true,
        };
        self.step(steps, limited, Kind::Limit, "source: a time limit", on(Event::Broken));
        self.step(steps, true, Kind::Fault, "source: a failure", on(Event::Broken));
        self.step(steps, true, Kind::Fault, "source: interrupted", on(Event::Interrupted));
    }

    /// The source dials again.
    fn resume_steps(&self, rules: Rules, steps: &mut Vec<Step>) {
        use destination::State;
        let knows = self.destination_open();
        // A program that has torn down says so as long as it is there, and the next one that finds word of it.
        let remembers = self.destination == Some(State::Ended(destination::Ending::TearDown)) || self.denies;
        let refused = !self.down && knows.is_none();
        self.step(
            steps,
            refused && remembers,
            Kind::Progress,
            "source: hears that all was rolled back",
            |world| world.source_event(rules, source::Event::RolledBack),
        );
        self.step(
            steps,
            refused && !remembers,
            Kind::Progress,
            "source: nobody there knows the session",
            |world| world.source_event(rules, source::Event::Broken),
        );
        // Before it has heard of Commit the destination says that it cannot yet; while it lifts the barrier the
        // connections wait.
        let runs =
            matches!(knows, Some(State::Running | State::Settled | State::Completed | State::Paused { .. }));
        self.step(steps, !self.down && runs, Kind::Progress, "new connections are made", |world| {
            if !matches!(knows, Some(State::Paused { .. })) {
                world.destination_event(rules, destination::Event::Lost);
            }
            world.to_source.clear();
            world.to_destination.clear();
            (world.cut, world.lanes_cut) = (false, false);
            world.destination_event(rules, destination::Event::Attached);
            world.source_event(rules, source::Event::Resumed);
        });
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
        self.step(
            steps,
            committed,
            Kind::Fault,
            "destination: criu fails before anything has run",
            on(Event::NeverRan),
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
            world.destination_event(rules, Event::Lost);
        });
        let paused = matches!(state, State::Paused { .. });
        let ended = self.cut || self.source_open().is_none();
        let lost = ended && self.to_destination.is_empty() && !paused;
        self.step(steps, lost, Kind::Progress, "destination: the connection has ended", on(Event::Lost));
        let fetching = state == State::Running && self.lanes_cut && !self.here;
        self.step(steps, fetching, Kind::Progress, "destination: a lane has ended", on(Event::Lost));
        let waits = state == State::Paused { whole: false };
        self.step(
            steps,
            waits && self.here,
            Kind::Progress,
            "destination: has every page",
            on(Event::Settled),
        );
        let limited = match state {
            State::Restoring => self.images_here,
            State::Prepared | State::Committed | State::Completed | State::Paused { .. } => true,
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
        self.step(steps, !self.down, Kind::Fault, "no way is left to make connections", |w| w.down = true);
        self.step(steps, self.down, Kind::Fault, "connections can be made again", |w| w.down = false);
        let lossy = self.lanes_cut && self.acks == Acks::OnTheirWay;
        self.step(steps, lossy, Kind::Fault, "acknowledgements are lost", |world| world.acks = Acks::None);
        self.step(
            steps,
            self.source_open().is_some(),
            Kind::Fault,
            "source-server is killed",
            Self::kill_source,
        );
        let resumable = self.source.is_none() && self.fenced && !self.freed;
        self.step(steps, resumable, Kind::Fault, "source-server resume", Self::resume_source);
        self.step(
            steps,
            self.destination_open().is_some(),
            Kind::Fault,
            "uffd-daemon is killed",
            Self::kill_destination,
        );
        let denies = self.destination.is_none() && self.never_ran && !self.denies;
        self.step(steps, denies, Kind::Fault, "uffd-daemon serve, again", |world| world.denies = true);
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
}
