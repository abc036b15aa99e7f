//! The control connection: whole messages, in order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use super::{Link, Stream};
use crate::wire::codec::CodecError;
use crate::wire::control::Control;
use crate::wire::frame::{HEADER_LEN, Header, encode_frame};
use crate::wire::limits;

/// A control connection that broke, or a peer that does not keep to the protocol.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(io::Error),
    /// A frame that cannot be read.
    #[error("the peer sent a malformed message: {0}")]
    Malformed(#[from] CodecError),
    /// A message that has no place here.
    #[error("the peer sent {got} while {expected} was due")]
    OutOfOrder {
        /// What came.
        got: &'static str,
        /// What was due.
        expected: &'static str,
    },
}

impl From<io::Error> for ControlError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// Sends and receives [`Control`] messages; may be shared between threads (one receiver at a time).
#[derive(Debug)]
pub struct ControlChannel {
    stream: Stream,
    sent: Mutex<u64>,
}

impl AsFd for ControlChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Link for ControlChannel {
    fn has_buffered(&self) -> bool {
        self.stream.has_buffered()
    }
}

impl ControlChannel {
    /// A channel over a stream whose hello is done.
    ///
    /// # Errors
    /// The errno of `setsockopt(2)`.
    pub fn new(stream: Stream) -> io::Result<Self> {
        // A reader polls first, so this bounds only how long the rest of a begun frame may take.
        stream.set_timeout(Some(limits::FRAME_TIMEOUT))?;
        Ok(Self { stream, sent: Mutex::new(0) })
    }

    /// Sends one message and returns the bytes it took.
    ///
    /// # Errors
    /// [`ControlError::Io`].
    pub fn send(&self, message: &Control) -> Result<u64, ControlError> {
        let (kind, body) = message.encode();
        // A poisoned lock means that another sender panicked between two frames: the count is still good.
        let mut sent = self.sent.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let frame = encode_frame(kind, *sent, &body);
        self.stream.send_all(&frame, false)?;
        *sent += 1;
        Ok(frame.len() as u64)
    }

    /// Receives one message, waiting for it.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn receive(&self) -> Result<Control, ControlError> {
        let mut head = [0; HEADER_LEN];
        self.stream.receive_all(&mut head)?;
        let header = Header::decode(&head)?;
        let mut body = vec![0; header.body_len];
        self.stream.receive_all(&mut body)?;
        Ok(Control::decode(header.kind, &body)?)
    }

    /// Ends the connection; a receiver in another thread wakes up.
    pub fn shutdown(&self) {
        self.stream.shutdown();
    }

    /// The peer's address, for messages.
    #[must_use]
    pub fn peer(&self) -> String {
        self.stream.peer()
    }
}

impl Control {
    /// The message's name, for errors and logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "an offer",
            Self::Verdict(_) => "a verdict",
            Self::Image(_) => "an image",
            Self::Dumped(_) => "the end of the images",
            Self::Prepared => "prepared",
            Self::Commit => "commit",
            Self::Running => "running",
            Self::Complete(_) => "complete",
            Self::Released => "released",
            Self::Abort(_) => "abort",
            Self::RolledBack => "rolled back",
            Self::Clean(_) => "clean pages",
            Self::SettledMap(_) => "a map of what is settled",
            Self::Resumed => "resumed",
        }
    }

    /// An error for this message where `expected` was due.
    #[must_use]
    pub const fn out_of_order(&self, expected: &'static str) -> ControlError {
        ControlError::OutOfOrder { got: self.name(), expected }
    }
}
