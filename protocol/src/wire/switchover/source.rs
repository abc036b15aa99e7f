//! The source's decisions.

use crate::wire::control::Control;

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// From the accepted offer to `Prepared`.
    Preparing {
        /// A lane or the drain has failed; the destination's own reason may be on its way.
        failing: bool,
    },
    /// `Prepared` has come; nothing was promised yet.
    Checking,
    /// `Commit` was handed to the connection: the destination may run.
    Committed {
        /// As above.
        failing: bool,
    },
    /// The destination has given up behind `Commit`; whether it is clean is its next message.
    Refused,
    /// `Abort` was sent: the destination is cleaning up.
    CallingOff,
    /// The destination runs.
    Pushing(Progress),
    /// The connections are lost behind `Commit`: they are made anew. Without progress the destination has not said
    /// yet that it runs.
    Paused(Option<Progress>),
    /// Nothing changes it any more.
    Ended(Ending),
}

/// What a release needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Progress {
    /// The drain is over: the pages are in pipes, or stay in the stopped tasks.
    pub drained: bool,
    /// CRIU has ended, and the tasks are killed unless they are the store.
    pub let_go: bool,
    /// Every page was acknowledged.
    pub acknowledged: bool,
    /// The destination says that it is complete.
    pub complete: bool,
}

/// How a move ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The tasks run on here.
    LetRun,
    /// Nothing is resumed, nothing is freed.
    Hold,
    /// Everything is freed.
    Release,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// `Prepared` has come.
    Prepared,
    /// `Running` has come.
    Running,
    /// `Complete` has come.
    Complete,
    /// `Abort` has come.
    Abort,
    /// `RolledBack` has come, or is the answer to a new connection.
    RolledBack,
    /// A message that has no place anywhere here.
    OutOfOrder,
    /// Whether the tasks stand still.
    Fence {
        /// They do.
        stands: bool,
    },
    /// A lane, or sending `Commit` failed; the control connection can perhaps still be read.
    Failing,
    /// The control connection is lost.
    Lost,
    /// New connections stand, and what is settled at the destination has been told.
    Resumed,
    /// A time limit has passed, the destination does not know the session, or something here failed for good.
    Broken,
    /// The operator wants to stop.
    Interrupted,
    /// Every page is in the store.
    Drained,
    /// The drain has failed: pages stay in the stopped tasks.
    Undrained,
    /// [`Action::LetGo`] is done.
    HasLetGo,
    /// Every page was acknowledged.
    Acknowledged,
}

impl From<&Control> for Event {
    fn from(message: &Control) -> Self {
        match message {
            Control::Prepared => Self::Prepared,
            Control::Running => Self::Running,
            Control::Complete(_) => Self::Complete,
            Control::Abort(_) => Self::Abort,
            Control::RolledBack => Self::RolledBack,
            _ => Self::OutOfOrder,
        }
    }
}

/// What the source has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Wait for what comes next.
    Wait,
    /// Wait, but not for long: only for the destination's own reason.
    AwaitReason,
    /// Wait, but not for long: only for the destination's word that it is clean.
    AwaitRolledBack,
    /// Look whether the tasks stand still.
    CheckFence,
    /// Send `Commit`.
    SendCommit,
    /// Send `Abort` and wait until the destination is clean.
    CallOff,
    /// The destination runs: push.
    Push,
    /// Close what is left of the connections and make new ones.
    Resume,
    /// End CRIU, and kill the tasks if all of their pages are elsewhere.
    LetGo,
    /// End the move.
    End(Ending),
}

/// What follows from `event` in `state`.
#[must_use]
pub const fn decide(state: State, event: Event) -> (State, Action) {
    match (state, event) {
        (State::Ended(ending), _) => end(ending),

        (State::Preparing { failing: false }, Event::Prepared) => (State::Checking, Action::CheckFence),
        // CRIU's end may have unlocked the network: better back while there is a way.
        (State::Preparing { .. }, Event::Failing | Event::Undrained) => {
            (State::Preparing { failing: true }, Action::AwaitReason)
        }
        (State::Checking, Event::Fence { stands: true }) => {
            (State::Committed { failing: false }, Action::SendCommit)
        }
        // Nothing was promised: whatever else happens can be undone.
        (State::Preparing { .. } | State::Checking, _) => (State::CallingOff, Action::CallOff),

        // The destination never hears of a commit: the tasks may run whether it confirms or not.
        (State::CallingOff, Event::RolledBack | Event::Lost | Event::Broken) => end(Ending::LetRun),
        (State::CallingOff, _) => (state, Action::Wait),

        (State::Committed { failing: false }, Event::Running) => (State::Pushing(BEGUN), Action::Push),
        // It runs, but not all connections stand.
        (State::Committed { failing: true }, Event::Running) => pause(Some(BEGUN)),
        (State::Committed { .. }, Event::Lost) => pause(None),
        (State::Committed { .. }, Event::Failing) => {
            (State::Committed { failing: true }, Action::AwaitReason)
        }
        (State::Committed { .. }, Event::Abort) => (State::Refused, Action::AwaitRolledBack),
        // It had given up before it heard of the commit, and will never hear of it.
        (State::Refused, Event::RolledBack) => end(Ending::LetRun),
        (State::Refused, Event::Failing) => (state, Action::Wait),
        (State::Committed { .. } | State::Refused | State::Pushing(_), Event::Interrupted) => {
            (state, Action::Wait)
        }
        // The tasks have every page.
        (State::Committed { .. } | State::Refused | State::Paused(None), Event::Undrained) => {
            (state, Action::Wait)
        }
        // The destination may run: never back.
        (State::Committed { .. } | State::Refused, _) => end(Ending::Hold),

        (State::Pushing(progress), event) => push(progress, event),

        (State::Paused(None), Event::Resumed) => (State::Committed { failing: false }, Action::Wait),
        (State::Paused(Some(progress)), Event::Resumed) => (State::Pushing(progress), Action::Push),
        // What is left of the old connections has nothing to say any more.
        (State::Paused(_), Event::Lost | Event::Failing) => (state, Action::Wait),
        (State::Paused(Some(progress)), event) => match push(progress, event) {
            (State::Pushing(progress), action) => (State::Paused(Some(progress)), action),
            ended => ended,
        },
        // The commit never arrived.
        (State::Paused(None), Event::RolledBack) => end(Ending::LetRun),
        // Interrupted, or nobody answers.
        (State::Paused(None), _) => end(Ending::Hold),
    }
}

/// The destination has just begun to run.
const BEGUN: Progress = Progress { drained: false, let_go: false, acknowledged: false, complete: false };

const fn pause(progress: Option<Progress>) -> (State, Action) {
    (State::Paused(progress), Action::Resume)
}

const fn push(mut progress: Progress, event: Event) -> (State, Action) {
    match event {
        Event::Drained | Event::Undrained if !progress.drained => {
            progress.drained = true;
            return (State::Pushing(progress), Action::LetGo);
        }
        // Said again behind new connections.
        Event::Drained | Event::Undrained => {}
        Event::HasLetGo => progress.let_go = progress.drained,
        Event::Acknowledged => progress.acknowledged = true,
        Event::Complete => progress.complete = true,
        // Said again on new connections.
        Event::Running => {}
        // The destination closes its lanes once it is complete.
        Event::Failing if progress.complete || progress.acknowledged => {}
        Event::Failing | Event::Lost => return pause(Some(progress)),
        _ => return end(Ending::Hold),
    }
    if progress.complete && progress.acknowledged && progress.let_go {
        return end(Ending::Release);
    }
    (State::Pushing(progress), Action::Wait)
}

const fn end(ending: Ending) -> (State, Action) {
    (State::Ended(ending), Action::End(ending))
}

/// The source's part in one move.
#[derive(Debug)]
pub struct Switchover(State);

impl Default for Switchover {
    fn default() -> Self {
        Self(State::Preparing { failing: false })
    }
}

impl Switchover {
    /// Of a move whose program ended before its tasks were killed, and had promised to commit: new connections have to be
    /// made, and whether the destination runs is heard then.
    #[must_use]
    pub const fn promised() -> Self {
        Self(State::Paused(None))
    }

    /// Of a move whose program ended once its tasks were killed: new connections have to be made.
    #[must_use]
    pub const fn taken_over() -> Self {
        Self(State::Paused(Some(Progress {
            drained: true,
            let_go: true,
            acknowledged: false,
            complete: false,
        })))
    }

    /// What to do about `event`.
    pub fn step(&mut self, event: Event) -> Action {
        let (next, action) = decide(self.0, event);
        self.0 = next;
        action
    }
}
