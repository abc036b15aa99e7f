//! The messages of `lazy-pages.socket`: how `criu restore` hands its userfaultfds to the daemon. Pure.
//!
//! The stream has one direction; a daemon must never write to it. Per task, in any order:
//!
//! ```text
//!   live task    i32 pid       4 bytes, then separately   1 byte + SCM_RIGHTS with the userfaultfd
//!   zombie       i32 -pid      4 bytes, no fd
//!   at the end   u32 0x52535446 ("FTSR")                  restore is complete, the tasks run
//! ```
//!
//! Reading one byte too many takes the next message's bytes, and may lose its fd. So [`Handover`] says what
//! to read next, and is told what was read:
//!
//! ```text
//!             pid                     fd
//!   ┌──────► Word ────────────────► Fd ───► Event::Task ────┐
//!   │         │  -pid                                       │
//!   │         ├──────────────► Event::Zombie ───────────────┤
//!   │         │  finish word, all tasks seen                │
//!   │         └──────────────► Event::Finished ──► End      │
//!   └───────────────────────────────────────────────────────┘
//! ```
//!
//! Page faults come in between a task's fd and the finish word, and restore waits for them to be served; pages may
//! be pushed only after it, because until then VMAs move. An end of the stream before the finish word means that
//! restore failed.

use std::collections::BTreeMap;

use thiserror::Error;

use super::limits::{MAX_PID, MAX_TASKS};
use crate::units::TaskId;

/// The last word of the stream.
pub const FINISH_WORD: u32 = 0x5253_5446;
/// What the restorer sends with a userfaultfd.
pub const FD_BYTE: [u8; 1] = [0];

const WORD: usize = 4;

/// Why the stream of a hand-over was refused. Nothing that follows can be trusted: give up on the restore.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum HandoverError {
    /// A task to wait for that cannot be: no pid.
    #[error("expect task {0}: not a pid")]
    NotAPid(TaskId),
    /// A task to wait for twice.
    #[error("expect task {0}: it is listed twice")]
    ListedTwice(TaskId),
    /// More tasks than a checkpoint has.
    #[error("expect tasks: more than {MAX_TASKS}")]
    TooManyTasks,
    /// The caller read more than it was told to.
    #[error("read hand-over: {found} bytes were read where {wanted} were due")]
    OverRead {
        /// Bytes that were due.
        wanted: usize,
        /// Bytes that were read.
        found: usize,
    },
    /// File descriptors with a message that has none.
    #[error("read hand-over: {0} file descriptors came with a message that has none")]
    UnexpectedFds(usize),
    /// Not exactly one userfaultfd where one is due.
    #[error(
        "read hand-over of task {task}: {found} file descriptors came instead of one; does a security policy \
         forbid passing userfaultfds?"
    )]
    FdCount {
        /// The task.
        task: TaskId,
        /// How many came.
        found: usize,
    },
    /// A task that is not in the images.
    #[error(
        "read hand-over: task {0} is not in the images; do daemon and restore use the same image directory?"
    )]
    UnknownTask(i32),
    /// A task that was handed over before.
    #[error("read hand-over: task {0} was handed over already")]
    DuplicateTask(TaskId),
    /// The finish word before all tasks were handed over.
    #[error(
        "read hand-over: restore finished while {missing} tasks were not handed over (the first is {first}); \
         do daemon and restore use the same image directory?"
    )]
    EarlyFinish {
        /// How many tasks are missing.
        missing: usize,
        /// The one with the lowest pid.
        first: TaskId,
    },
    /// The stream ended before the finish word.
    #[error(
        "read hand-over: restore closed the socket before it was finished ({missing} tasks missing); its log says why"
    )]
    EarlyEnd {
        /// How many tasks were not handed over yet; 0 if only the finish word is missing.
        missing: usize,
    },
    /// Anything behind the finish word.
    #[error("read hand-over: {0} bytes came after restore had finished")]
    AfterFinish(usize),
}

/// What to read next, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// So many bytes, 1 to 4, without file descriptors.
    Word(usize),
    /// One byte, with room for one file descriptor.
    Fd,
    /// Nothing but the end of the stream.
    End,
}

impl Expect {
    /// Bytes to read at most. At the end one byte, to see that none comes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Word(bytes) => bytes,
            Self::Fd | Self::End => 1,
        }
    }
}

/// What was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A live task, with the userfaultfd that was just read.
    Task {
        /// Pid in the images.
        id: TaskId,
    },
    /// A zombie: there is nothing to do for it.
    Zombie {
        /// Pid in the images.
        id: TaskId,
    },
    /// Restore is complete and the tasks run: pages may be pushed.
    Finished,
}

/// The receiving side of a hand-over.
#[derive(Clone, Debug)]
pub struct Handover {
    /// Expected tasks, and whether each was handed over.
    seen: BTreeMap<TaskId, bool>,
    missing: usize,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Word { buf: [u8; WORD], filled: usize },
    Fd(TaskId),
    Finished,
}

const NO_WORD: State = State::Word { buf: [0; WORD], filled: 0 };

impl Handover {
    /// Waits for `tasks`, zombies included: all entries of `pstree.img`.
    ///
    /// # Errors
    /// [`HandoverError::NotAPid`], [`HandoverError::ListedTwice`] or [`HandoverError::TooManyTasks`].
    pub fn new(tasks: impl IntoIterator<Item = TaskId>) -> Result<Self, HandoverError> {
        let mut seen = BTreeMap::new();
        for task in tasks {
            if task.0 == 0 || task.0 > MAX_PID {
                return Err(HandoverError::NotAPid(task));
            }
            if seen.insert(task, false).is_some() {
                return Err(HandoverError::ListedTwice(task));
            }
            if seen.len() > MAX_TASKS {
                return Err(HandoverError::TooManyTasks);
            }
        }
        Ok(Self { missing: seen.len(), seen, state: NO_WORD })
    }

    /// What to read next.
    #[must_use]
    pub const fn expect(&self) -> Expect {
        match self.state {
            State::Word { filled, .. } => Expect::Word(WORD - filled),
            State::Fd(_) => Expect::Fd,
            State::Finished => Expect::End,
        }
    }

    /// Tasks that were not handed over yet.
    #[must_use]
    pub const fn missing(&self) -> usize {
        self.missing
    }

    /// Takes what one read gave: at most [`Expect::bytes`] bytes, and how many file descriptors came with them.
    /// For [`Event::Task`] the one descriptor is the task's userfaultfd.
    ///
    /// # Errors
    /// [`HandoverError`]. The state stays as it was; descriptors that came with the bytes are the caller's to close.
    pub fn feed(&mut self, bytes: &[u8], fds: usize) -> Result<Option<Event>, HandoverError> {
        let wanted = self.expect().bytes();
        if bytes.len() > wanted {
            return Err(HandoverError::OverRead { wanted, found: bytes.len() });
        }
        match self.state {
            State::Finished if bytes.is_empty() && fds == 0 => Ok(None),
            State::Finished => Err(HandoverError::AfterFinish(bytes.len())),
            State::Fd(_) if bytes.is_empty() && fds == 0 => Ok(None),
            State::Fd(task) if fds != 1 => Err(HandoverError::FdCount { task, found: fds }),
            State::Fd(id) => {
                self.state = NO_WORD;
                Ok(Some(self.hand_over(id, Event::Task { id })))
            }
            State::Word { .. } if fds != 0 => Err(HandoverError::UnexpectedFds(fds)),
            State::Word { buf, filled } => self.fill(buf, filled, bytes),
        }
    }

    /// Takes the end of the stream. After the finish word it is what a restore that went well leaves.
    ///
    /// # Errors
    /// [`HandoverError::EarlyEnd`] if the finish word has not come.
    pub const fn end(&self) -> Result<(), HandoverError> {
        match self.state {
            State::Finished => Ok(()),
            State::Word { .. } | State::Fd(_) => Err(HandoverError::EarlyEnd { missing: self.missing }),
        }
    }

    fn fill(
        &mut self,
        mut buf: [u8; WORD],
        filled: usize,
        bytes: &[u8],
    ) -> Result<Option<Event>, HandoverError> {
        for (slot, byte) in buf.iter_mut().skip(filled).zip(bytes) {
            *slot = *byte;
        }
        let filled = filled + bytes.len();
        if filled < WORD {
            self.state = State::Word { buf, filled };
            return Ok(None);
        }
        self.word(buf)
    }

    fn word(&mut self, word: [u8; WORD]) -> Result<Option<Event>, HandoverError> {
        // No pid is as large as the finish word, so the two cannot be confused.
        if u32::from_le_bytes(word) == FINISH_WORD {
            return self.finish().map(Some);
        }
        let pid = i32::from_le_bytes(word);
        let id = TaskId(pid.unsigned_abs());
        match self.seen.get(&id) {
            None => Err(HandoverError::UnknownTask(pid)),
            Some(true) => Err(HandoverError::DuplicateTask(id)),
            Some(false) if pid < 0 => {
                self.state = NO_WORD;
                Ok(Some(self.hand_over(id, Event::Zombie { id })))
            }
            Some(false) => {
                self.state = State::Fd(id);
                Ok(None)
            }
        }
    }

    fn hand_over(&mut self, id: TaskId, event: Event) -> Event {
        self.seen.insert(id, true);
        self.missing = self.missing.saturating_sub(1);
        event
    }

    fn finish(&mut self) -> Result<Event, HandoverError> {
        if let Some((&first, _)) = self.seen.iter().find(|(_, seen)| !**seen) {
            return Err(HandoverError::EarlyFinish { missing: self.missing, first });
        }
        self.state = State::Finished;
        Ok(Event::Finished)
    }
}

/// The sending side, for a restorer in tests.
pub mod send {
    use super::{FINISH_WORD, HandoverError, MAX_PID, TaskId};

    /// Announces a live task; [`super::FD_BYTE`] with its userfaultfd must follow in a message of its own.
    ///
    /// # Errors
    /// [`HandoverError::NotAPid`].
    pub fn task(id: TaskId) -> Result<[u8; 4], HandoverError> {
        pid(id).map(i32::to_le_bytes)
    }

    /// Announces a zombie.
    ///
    /// # Errors
    /// [`HandoverError::NotAPid`].
    pub fn zombie(id: TaskId) -> Result<[u8; 4], HandoverError> {
        pid(id).map(|pid| (-pid).to_le_bytes())
    }

    /// Ends the hand-over.
    #[must_use]
    pub const fn finish() -> [u8; 4] {
        FINISH_WORD.to_le_bytes()
    }

    fn pid(id: TaskId) -> Result<i32, HandoverError> {
        i32::try_from(id.0).ok().filter(|_| id.0 != 0 && id.0 <= MAX_PID).ok_or(HandoverError::NotAPid(id))
    }
}

#[cfg(test)]
mod tests;
