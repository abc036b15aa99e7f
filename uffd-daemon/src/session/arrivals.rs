//! Connections that come to a session: the lanes it begins with, and all of them anew after a lost link.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use host::mailbox::{Mailbox, Post, mailbox};
use protocol::link::Stream;
use protocol::wire::hello::{Hello, Refusal, Role};

use crate::limits;

/// A connection whose hello named the session.
struct Arrival {
    hello: Hello,
    stream: Stream,
}

/// The session's name on the door: who knocks with its secret is let through here.
#[derive(Clone)]
pub struct Door {
    post: Post<Arrival>,
    state: Arc<DoorState>,
}

#[derive(Default)]
struct DoorState {
    /// `Commit` has come: lost connections may be replaced.
    resumable: AtomicBool,
    /// Connections that nobody has taken yet.
    waiting: AtomicUsize,
}

/// Where a session finds its connections.
pub struct Arrivals {
    mailbox: Mailbox<Arrival>,
    state: Arc<DoorState>,
    gathering: Gathering<Stream>,
}

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.as_fd()
    }
}

/// A session's door, from both sides.
///
/// # Errors
/// The errno of making a socket pair.
pub fn door() -> std::io::Result<(Door, Arrivals)> {
    let (post, mailbox) = mailbox()?;
    let state = Arc::new(DoorState::default());
    let door = Door { post, state: state.clone() };
    Ok((door, Arrivals { mailbox, state, gathering: Gathering::default() }))
}

impl Door {
    /// Whether a connection with this hello, which has the session's secret, may come in.
    ///
    /// # Errors
    /// [`Refusal::NotYet`], [`Refusal::Busy`], [`Refusal::Session`].
    pub fn admits(&self, hello: &Hello) -> Result<(), Refusal> {
        match (hello.resumes(), hello.role) {
            (false, Role::Control) => return Err(Refusal::Session),
            (true, _) if !self.state.resumable.load(Ordering::Acquire) => return Err(Refusal::NotYet),
            _ => {}
        }
        let waiting = self.state.waiting.load(Ordering::Relaxed);
        if waiting < limits::ARRIVALS_MAX { Ok(()) } else { Err(Refusal::Busy) }
    }

    /// Brings it in; the session may have ended meanwhile.
    pub fn bring(&self, hello: &Hello, stream: Stream) {
        self.state.waiting.fetch_add(1, Ordering::Relaxed);
        self.post.send(Arrival { hello: *hello, stream });
    }
}

impl Arrivals {
    /// From here on lost connections may be replaced.
    pub(super) fn allow_resume(&self) {
        self.state.resumable.store(true, Ordering::Release);
    }

    /// Takes what has come; what is complete now.
    pub(super) fn take(&mut self) -> Option<Gathered<Stream>> {
        let mut complete = None;
        for Arrival { hello, stream } in self.mailbox.empty() {
            self.state.waiting.fetch_sub(1, Ordering::Relaxed);
            complete = self.gathering.add(&hello, stream).or(complete);
        }
        complete
    }
}

/// The lanes of a session, each by its number.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lanes<S> {
    pub(super) faults: Vec<S>,
    pub(super) pushes: Vec<S>,
}

/// Connections that belong together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gathered<S> {
    /// There on all attempts but the one that opened the session, whose control connection was there before.
    pub(super) control: Option<S>,
    pub(super) lanes: Lanes<S>,
}

/// Connections of the latest attempt, until they are complete. Pure.
#[derive(Debug)]
struct Gathering<S> {
    attempt: u16,
    control: Option<S>,
    faults: Vec<Option<S>>,
    pushes: Vec<Option<S>>,
}

impl<S> Default for Gathering<S> {
    fn default() -> Self {
        Self { attempt: 0, control: None, faults: Vec::new(), pushes: Vec::new() }
    }
}

impl<S> Gathering<S> {
    /// Adds one: what is complete with it. One of an attempt before the latest is dropped.
    fn add(&mut self, hello: &Hello, stream: S) -> Option<Gathered<S>> {
        let attempt = hello.attempt;
        let ahead = attempt.wrapping_sub(self.attempt);
        // Behind the connections that the session began with any attempt is ahead.
        if self.attempt != 0 && ahead > u16::MAX / 2 {
            return None;
        }
        if ahead > 0 {
            *self = Self { attempt, ..Self::default() };
        }
        let lanes = match hello.role {
            Role::Control => {
                self.control = Some(stream);
                return self.whole();
            }
            Role::Fault => &mut self.faults,
            Role::Push => &mut self.pushes,
        };
        // Whoever says another number than before does not know how many there are.
        if lanes.is_empty() {
            lanes.resize_with(usize::from(hello.lanes), || None);
        }
        if lanes.len() == usize::from(hello.lanes) {
            lanes[usize::from(hello.lane)] = Some(stream);
        }
        self.whole()
    }

    fn whole(&mut self) -> Option<Gathered<S>> {
        let complete = |lanes: &[Option<S>]| !lanes.is_empty() && lanes.iter().all(Option::is_some);
        let lanes = complete(&self.faults) && complete(&self.pushes);
        if !lanes || self.attempt != 0 && self.control.is_none() {
            return None;
        }
        let all = |lanes: &mut Vec<Option<S>>| std::mem::take(lanes).into_iter().flatten().collect();
        let lanes = Lanes { faults: all(&mut self.faults), pushes: all(&mut self.pushes) };
        Some(Gathered { control: self.control.take(), lanes })
    }
}

#[cfg(test)]
mod tests {
    use protocol::wire::hello::{SessionId, SessionSecret};

    use super::*;

    fn hello(role: Role, attempt: u16) -> Hello {
        Hello { attempt, ..Hello::new(role, SessionId([0; 16]), SessionSecret([0; 16])) }
    }

    #[test]
    fn connections_of_different_attempts_are_never_mixed() {
        let mut gathering = Gathering::default();
        let mut add = |role, attempt, number| gathering.add(&hello(role, attempt), number);
        let lanes = |fault, push| Lanes { faults: vec![fault], pushes: vec![push] };
        assert_eq!(add(Role::Push, 0, 1), None);
        assert_eq!(add(Role::Fault, 0, 2), Some(Gathered { control: None, lanes: lanes(2, 1) }));
        assert_eq!(add(Role::Control, 1, 3), None);
        assert_eq!(add(Role::Fault, 1, 4), None);
        assert_eq!(add(Role::Push, 3, 5), None, "a later attempt");
        assert_eq!(add(Role::Push, 1, 6), None, "an earlier one");
        assert_eq!(add(Role::Push, 2, 7), None, "an earlier one");
        assert_eq!(add(Role::Control, 3, 8), None);
        let whole = Gathered { control: Some(8), lanes: lanes(9, 5) };
        assert_eq!(add(Role::Fault, 3, 9), Some(whole));
        assert_eq!(add(Role::Fault, 3, 10), None, "once");
    }

    #[test]
    fn all_lanes_of_both_kinds_are_waited_for() {
        let mut gathering = Gathering::default();
        let mut add = |role, lane, lanes, number| gathering.add(&hello(role, 1).of_lane(lane, lanes), number);
        assert_eq!(add(Role::Fault, 1, 2, 1), None);
        assert_eq!(add(Role::Push, 2, 3, 2), None);
        assert_eq!(add(Role::Push, 0, 3, 3), None);
        assert_eq!(add(Role::Control, 0, 1, 4), None);
        assert_eq!(add(Role::Push, 0, 1, 5), None, "of another number");
        assert_eq!(add(Role::Push, 1, 3, 6), None);
        assert_eq!(add(Role::Fault, 1, 2, 7), None, "in place of the first");
        let lanes = Lanes { faults: vec![8, 7], pushes: vec![3, 6, 2] };
        assert_eq!(add(Role::Fault, 0, 2, 8), Some(Gathered { control: Some(4), lanes }));
    }

    #[test]
    fn attempts_may_wrap() {
        let mut gathering = Gathering::default();
        for attempt in [30_000, 60_000, 1] {
            gathering.add(&hello(Role::Control, attempt), ());
            gathering.add(&hello(Role::Fault, attempt), ());
            assert!(gathering.add(&hello(Role::Push, attempt), ()).is_some(), "{attempt}");
        }
    }
}
