//! The destination's end of a fault lane: what `upstream/session.rs` is over a socket, over a connection of the world.

use std::os::fd::BorrowedFd;

use protocol::units::{PageRun, TaskId};
use protocol::wire::frame::{Kind, TaskRun};
use uffd_daemon::inflight::Purpose;
use uffd_daemon::upstream::{Answer, AskId, Upstream, UpstreamError, take_frames};

use super::wire::{Ended, Socket};

/// A fault lane.
#[derive(Debug)]
pub struct Lane {
    socket: Socket,
    unsent: Vec<u8>,
    bytes: Vec<u8>,
}

impl Lane {
    /// Over a connection.
    #[must_use]
    pub const fn new(socket: Socket) -> Self {
        Self { socket, unsent: Vec::new(), bytes: Vec::new() }
    }
}

impl Upstream for Lane {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn ask(&mut self, id: AskId, purpose: Purpose, task: TaskId, run: PageRun) -> Result<(), UpstreamError> {
        let kind = if purpose == Purpose::Demand { Kind::Demand } else { Kind::Prefetch };
        self.unsent.extend_from_slice(&TaskRun { task, run }.frame(kind, id, 0));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), UpstreamError> {
        if !self.unsent.is_empty() {
            self.socket.send(&self.unsent);
            self.unsent.clear();
        }
        Ok(())
    }

    fn wants_write(&self) -> bool {
        false
    }

    fn answers(&mut self, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        self.bytes.extend(self.socket.receive(usize::MAX).map_err(|Ended| UpstreamError::Closed)?);
        let used = take_frames(&self.bytes, each)?;
        self.bytes.drain(..used);
        Ok(())
    }

    fn background(&self) -> Option<(u64, u64)> {
        None
    }

    fn finish(&mut self) -> Result<(), UpstreamError> {
        Ok(())
    }
}
