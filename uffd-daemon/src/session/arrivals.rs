//! Connections that come to a session: the lanes it begins with, and all three anew after a lost link.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use host::mailbox::{Mailbox, Post, mailbox};
use protocol::link::Stream;
use protocol::wire::hello::{Hello, Refusal, Role};

use crate::limits;

/// A connection whose hello named the session.
struct Arrival {
    role: Role,
    attempt: u16,
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
        self.post.send(Arrival { role: hello.role, attempt: hello.attempt, stream });
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
        for Arrival { role, attempt, stream } in self.mailbox.empty() {
            self.state.waiting.fetch_sub(1, Ordering::Relaxed);
            complete = self.gathering.add(role, attempt, stream).or(complete);
        }
        complete
    }
}

/// Connections that belong together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gathered<S> {
    /// There on all attempts but the one that opened the session, whose control connection was there before.
    pub(super) control: Option<S>,
    pub(super) fault: S,
    pub(super) push: S,
}

/// Connections of the latest attempt, until they are complete. Pure.
#[derive(Debug)]
struct Gathering<S> {
    attempt: u16,
    control: Option<S>,
    fault: Option<S>,
    push: Option<S>,
}

impl<S> Default for Gathering<S> {
    fn default() -> Self {
        Self { attempt: 0, control: None, fault: None, push: None }
    }
}

impl<S> Gathering<S> {
    /// Adds one: what is complete with it. One of an attempt before the latest is dropped.
    fn add(&mut self, role: Role, attempt: u16, stream: S) -> Option<Gathered<S>> {
        let ahead = attempt.wrapping_sub(self.attempt);
        // Behind the connections that the session began with any attempt is ahead.
        if self.attempt != 0 && ahead > u16::MAX / 2 {
            return None;
        }
        if ahead > 0 {
            *self = Self { attempt, ..Self::default() };
        }
        match role {
            Role::Control => self.control = Some(stream),
            Role::Fault => self.fault = Some(stream),
            Role::Push => self.push = Some(stream),
        }
        let whole = self.fault.is_some() && self.push.is_some() && (attempt == 0 || self.control.is_some());
        if !whole {
            return None;
        }
        let control = self.control.take();
        self.fault.take().zip(self.push.take()).map(|(fault, push)| Gathered { control, fault, push })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_of_different_attempts_are_never_mixed() {
        let mut gathering = Gathering::default();
        assert_eq!(gathering.add(Role::Push, 0, 1), None);
        assert_eq!(gathering.add(Role::Fault, 0, 2), Some(Gathered { control: None, fault: 2, push: 1 }));
        assert_eq!(gathering.add(Role::Control, 1, 3), None);
        assert_eq!(gathering.add(Role::Fault, 1, 4), None);
        assert_eq!(gathering.add(Role::Push, 3, 5), None, "a later attempt");
        assert_eq!(gathering.add(Role::Push, 1, 6), None, "an earlier one");
        assert_eq!(gathering.add(Role::Push, 2, 7), None, "an earlier one");
        assert_eq!(gathering.add(Role::Control, 3, 8), None);
        let whole = Gathered { control: Some(8), fault: 9, push: 5 };
        assert_eq!(gathering.add(Role::Fault, 3, 9), Some(whole));
        assert_eq!(gathering.add(Role::Fault, 3, 10), None, "once");
    }

    #[test]
    fn attempts_may_wrap() {
        let mut gathering = Gathering::default();
        for attempt in [30_000, 60_000, 1] {
            gathering.add(Role::Control, attempt, ());
            gathering.add(Role::Fault, attempt, ());
            assert!(gathering.add(Role::Push, attempt, ()).is_some(), "{attempt}");
        }
    }
}
