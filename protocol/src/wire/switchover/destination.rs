//! The destination's decisions.

use crate::wire::control::Control;

/// Where the destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// From the accepted offer until everything is restored and held.
    Restoring,
    /// `Prepared` was handed to the connection; the tasks are held.
    Prepared,
    /// `Commit` has come; the tasks run, or are about to.
    Committed,
    /// The tasks run and pages come.
    Running,
    /// Every page is settled and acknowledged.
    Settled,
    /// `Complete` was handed to the connection.
    Completed,
    /// The connections are lost behind `Commit`: the source makes new ones.
    Paused {
        /// Every page is here; the source may not know it.
        whole: bool,
    },
    /// Nothing changes it any more.
    Ended(Ending),
}

/// How a move ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// Nothing of the tree is left; then the source is told.
    TearDown,
    /// The tasks wait for pages that have not come.
    Pause,
    /// The restore failed behind the switchover: the source is told, and all stays as it is.
    TellAndPause,
    /// The tasks have everything and are left to themselves.
    Release,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Everything is restored, held and checked.
    Held,
    /// `Commit` has come.
    Commit,
    /// The tasks run.
    Resumed,
    /// CRIU failed to let them run; some may have.
    RestoreFailed,
    /// It failed before any of them could.
    NeverRan,
    /// Every page is settled and acknowledged.
    Settled,
    /// `Complete` was sent.
    CompleteSent,
    /// `Released` has come.
    Released,
    /// A connection is lost.
    Lost,
    /// The source has made new connections.
    Attached,
    /// Any other message.
    OutOfOrder,
    /// A time limit has passed, the source or the operator calls it off, or something here failed.
    Broken,
}

impl From<&Control> for Event {
    fn from(message: &Control) -> Self {
        match message {
            Control::Commit => Self::Commit,
            Control::Released => Self::Released,
            Control::Abort(_) => Self::Broken,
            _ => Self::OutOfOrder,
        }
    }
}

/// What the destination has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send `Prepared` and wait for `Commit`.
    SendPrepared,
    /// Lift the barrier: the tasks run.
    LetRun,
    /// Send `Running`, and take what is pushed.
    SendRunning,
    /// Send `Complete`.
    SendComplete,
    /// Wait for `Released`, not for long.
    AwaitReleased,
    /// Close what is left of the connections; present pages work, faults wait for new ones.
    AwaitResume,
    /// Send the map of what is settled, and `Running` once more.
    Resume,
    /// Go on.
    Wait,
    /// End the move.
    End(Ending),
}

/// What follows from `event` in `state`.
#[must_use]
pub const fn decide(state: State, event: Event) -> (State, Action) {
    match (state, event) {
        (State::Ended(ending), _) => end(ending),

        (State::Restoring, Event::Held) => (State::Prepared, Action::SendPrepared),
        // Only this message lets them run.
        (State::Prepared, Event::Commit) => (State::Committed, Action::LetRun),
        (State::Restoring | State::Prepared, _) => end(Ending::TearDown),

        (State::Committed, Event::Resumed) => (State::Running, Action::SendRunning),
        (State::Committed, Event::RestoreFailed) => end(Ending::TellAndPause),
        // The source lets its tasks run only on the word that nothing is left here.
        (State::Committed, Event::NeverRan) => end(Ending::TearDown),
        (State::Running, Event::Settled) => (State::Settled, Action::SendComplete),
        (State::Settled, Event::CompleteSent) => (State::Completed, Action::AwaitReleased),
        // The barrier is being lifted, and nobody listens; what is lost shows when it is.
        (State::Committed, Event::Lost) => (state, Action::Wait),
        (State::Running, Event::Lost) => (State::Paused { whole: false }, Action::AwaitResume),
        // All is here, but the source must hear it before it can let go.
        (State::Settled | State::Completed, Event::Lost) => {
            (State::Paused { whole: true }, Action::AwaitResume)
        }
        (State::Paused { .. }, Event::Settled) => (State::Paused { whole: true }, Action::AwaitResume),
        (State::Paused { .. }, Event::Attached) => (State::Running, Action::Resume),
        (State::Paused { .. }, Event::Lost) => (state, Action::AwaitResume),
        (State::Paused { whole: false }, _) => end(Ending::Pause),

        // The source never runs again: what is here is all there is.
        (State::Committed | State::Running | State::Settled, _) => end(Ending::Pause),
        // Every page is here: a farewell that does not come changes nothing.
        (State::Completed | State::Paused { whole: true }, _) => end(Ending::Release),
    }
}

const fn end(ending: Ending) -> (State, Action) {
    (State::Ended(ending), Action::End(ending))
}

/// The destination's part in one move.
#[derive(Debug)]
pub struct Switchover(State);

impl Default for Switchover {
    fn default() -> Self {
        Self(State::Restoring)
    }
}

impl Switchover {
    /// Of a move whose program ended while the tasks ran: the source has to make new connections.
    #[must_use]
    pub const fn taken_over() -> Self {
        Self(State::Paused { whole: false })
    }

    /// What to do about `event`.
    pub fn step(&mut self, event: Event) -> Action {
        let (next, action) = decide(self.0, event);
        self.0 = next;
        action
    }
}
