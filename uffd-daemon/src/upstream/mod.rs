//! Where a fault's page comes from.
//!
//! The fault loop asks and is answered; whether a session's fault lane, a CRIU page server or a directory
//! of images stands behind it does not matter to it.

mod images;
mod page_server;
mod session;

pub use images::Images;
pub use page_server::PageServer;
pub use session::{FaultLane, take_frames};

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use protocol::units::{PageRun, TaskId};

use crate::inflight::Purpose;

/// A question that was asked, by the number it was asked with.
pub type AskId = u64;

/// An answer.
#[derive(Debug)]
pub struct Answer<'a> {
    /// Which question.
    pub id: AskId,
    /// The pages from the start of the run asked for: all of it or its beginning; none if the peer holds
    /// them as settled, or will not send them ahead.
    pub data: &'a [u8],
}

/// A source of pages that cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The connection ended.
    #[error("the page source closed the connection")]
    Closed,
    /// The connection broke, or a file could not be read.
    #[error("the page source cannot be read: {0}")]
    Io(#[from] io::Error),
    /// An answer that fits no question.
    #[error("the page source sent an answer that fits no question: {0}")]
    Protocol(String),
}

/// A source of pages.
pub trait Upstream: Send {
    /// What to wait on for answers; `None` if they are there at once.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Asks for pages. Does not wait: what cannot be sent now is sent by [`Upstream::flush`].
    ///
    /// # Errors
    /// [`UpstreamError`].
    fn ask(&mut self, id: AskId, purpose: Purpose, task: TaskId, run: PageRun) -> Result<(), UpstreamError>;

    /// Sends what is queued as far as the link takes it.
    ///
    /// # Errors
    /// [`UpstreamError`].
    fn flush(&mut self) -> Result<(), UpstreamError>;

    /// Whether something is queued, so that [`Upstream::flush`] should follow when the link is writable.
    fn wants_write(&self) -> bool;

    /// When [`Upstream::flush`] is due although nothing was asked and nothing came: a link may have timers.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// Hands each complete answer that is there to `each`.
    ///
    /// # Errors
    /// [`UpstreamError`]; answers before the error were handed over.
    fn answers(&mut self, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError>;

    /// Largest run for one question, and how many pages the background may have under way; `None` if
    /// somebody else pushes.
    fn background(&self) -> Option<(u64, u64)>;

    /// Tells the source that everything arrived.
    ///
    /// # Errors
    /// [`UpstreamError`].
    fn finish(&mut self) -> Result<(), UpstreamError>;

    /// Ends the session so that the source takes it for a failure: a `criu dump` that waits resumes its
    /// tasks. Only before the restored tasks have run.
    fn reset(&mut self) {}
}
