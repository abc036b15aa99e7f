//! One client: requests in, pages out, in order.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use protocol::criu::page_server::{
    CLOSE_STATUS_LEN, Command, Header, HeaderBuf, HeaderError, HeaderLayout, MAX_HEADER_LEN,
};
use protocol::link::Stream;
use protocol::units::{ImageAddr, PAGE_SIZE, PageRun, TaskId};

use super::limits;
use super::pages::Pages;

/// A client.
pub(super) struct Connection<'a> {
    pages: &'a Pages,
    stream: &'a Stream,
    /// Readable when the server ends.
    stop: BorrowedFd<'a>,
    headers: HeaderBuf,
    /// Room for a header, then for the pages of one answer: both leave in one piece.
    reply: Vec<u8>,
    served: Served,
}

/// How a session ended that broke no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// With CLOSE or FORCE_CLOSE.
    Closed,
    /// Without: the client may come back.
    Left,
}

/// What a client got.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    pub(super) requests: u64,
    pub(super) pages: u64,
}

/// Why a client is cut off.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("{0}")]
    Header(#[from] HeaderError),
    #[error("the client left in the middle of a request, {0} bytes of it had come")]
    Truncated(usize),
    #[error("the client sent more behind its close")]
    BehindClose,
    #[error(
        "task {task} has no page at {addr} to give: {why}; are these the images the client restores from?"
    )]
    NoPage { task: TaskId, addr: ImageAddr, why: String },
    #[error("connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("the server ends")]
    Stopped,
}

/// Prepares a client's socket. Nothing here is worth refusing a client for.
pub(super) fn tune(stream: &Stream) {
    let _ = setsockopt(stream, sockopt::TcpNoDelay, &true);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(stream, sockopt::TcpKeepIdle, &limits::KEEPALIVE_IDLE_SECS);
    let _ = setsockopt(stream, sockopt::TcpKeepInterval, &limits::KEEPALIVE_INTERVAL_SECS);
    let _ = setsockopt(stream, sockopt::TcpKeepCount, &limits::KEEPALIVE_PROBES);
}

/// From now on, closing the last descriptor of the connection is an error at its other end.
pub(super) fn end_by_reset(stream: &Stream) {
    let _ = setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// From now on, closing the connection ends it in order.
pub(super) fn end_cleanly(stream: &Stream) {
    let _ = setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        pages: &'a Pages,
        stream: &'a Stream,
        stop: BorrowedFd<'a>,
        layout: Option<HeaderLayout>,
    ) -> Self {
        let headers = layout.map_or_else(HeaderBuf::detecting, HeaderBuf::new);
        Self { pages, stream, stop, headers, reply: Vec::new(), served: Served::default() }
    }

    /// What the client got so far.
    pub(super) const fn served(&self) -> Served {
        self.served
    }

    /// Serves the client until its session ends.
    pub(super) fn serve(&mut self) -> Result<Ending, ConnectionError> {
        let mut input = [0; limits::REQUEST_BUFFER];
        loop {
            let got = self.receive(&mut input)?;
            if got == 0 {
                return match self.headers.pending() {
                    0 => Ok(Ending::Left),
                    pending => Err(ConnectionError::Truncated(pending)),
                };
            }
            let mut rest = &input[..got];
            while let Some(header) = self.headers.push(&mut rest) {
                if self.obey(&header?)?.is_break() {
                    self.see_off(rest)?;
                    return Ok(Ending::Closed);
                }
            }
        }
    }

    /// Answers one request; `Break` after the last.
    fn obey(&mut self, header: &Header) -> Result<ControlFlow<()>, ConnectionError> {
        match header.command {
            Command::Close | Command::ForceClose => {
                self.send(&[0; CLOSE_STATUS_LEN])?;
                Ok(ControlFlow::Break(()))
            }
            _ => {
                let (task, run) = header.requested()?;
                self.answer(task, run)?;
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    fn answer(&mut self, task: TaskId, asked: PageRun) -> Result<(), ConnectionError> {
        let asked = PageRun { pages: asked.pages.min(limits::REPLY_PAGES_MAX), ..asked };
        let wanted = usize::try_from(asked.pages).unwrap_or(0) * PAGE_SIZE;
        let mut reply = std::mem::take(&mut self.reply);
        if reply.len() < MAX_HEADER_LEN + wanted {
            reply.resize(MAX_HEADER_LEN + wanted, 0);
        }
        let read = self.pages.read(task, asked, &mut reply[MAX_HEADER_LEN..]);
        let pages = read.map_err(|why| ConnectionError::NoPage { task, addr: asked.start, why })?;
        // The layout is known once a header has come.
        let layout = self.headers.layout().unwrap_or(HeaderLayout::Compact);
        let mut header = [0; MAX_HEADER_LEN];
        let len = Header::reply(task, PageRun { pages, ..asked }).encode(layout, &mut header)?;
        let start = MAX_HEADER_LEN - len;
        reply[start..MAX_HEADER_LEN].copy_from_slice(&header[..len]);
        let end = MAX_HEADER_LEN + usize::try_from(pages).unwrap_or(0) * PAGE_SIZE;
        self.send(&reply[start..end])?;
        self.reply = reply;
        self.served.requests += 1;
        self.served.pages += pages;
        Ok(())
    }

    /// Waits until the client, whose CLOSE was answered, is gone.
    fn see_off(&self, behind: &[u8]) -> Result<(), ConnectionError> {
        // A wide CLOSE as the very first header is taken for a compact one, its end follows.
        let mut padding = HeaderLayout::Wide.len() - HeaderLayout::Compact.len();
        let deadline = Instant::now() + limits::FAREWELL_TIMEOUT;
        let mut input = [0; MAX_HEADER_LEN];
        let mut behind = behind.to_vec();
        loop {
            if behind.iter().any(|byte| *byte != 0) || behind.len() > padding {
                return Err(ConnectionError::BehindClose);
            }
            padding -= behind.len();
            behind = match self.stream.receive_some(&mut input) {
                // With its answer read or not, it is gone.
                Ok(Some(0)) | Err(_) => return Ok(()),
                Ok(Some(got)) => input[..got].to_vec(),
                Ok(None) if self.wait(PollFlags::POLLIN, Some(deadline))? => Vec::new(),
                Ok(None) => {
                    tracing::warn!("client does not go away after its close");
                    return Ok(());
                }
            };
        }
    }

    /// Receives at least one byte; 0 is the end of the stream.
    fn receive(&self, buffer: &mut [u8]) -> Result<usize, ConnectionError> {
        loop {
            match self.stream.receive_some(buffer)? {
                Some(got) => return Ok(got),
                None => drop(self.wait(PollFlags::POLLIN, None)?),
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), ConnectionError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.stream.send_some(rest)? {
                0 => drop(self.wait(PollFlags::POLLOUT, None)?),
                sent => rest = &rest[sent..],
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready; false if `deadline` passed first.
    fn wait(&self, events: PollFlags, deadline: Option<Instant>) -> Result<bool, ConnectionError> {
        let mut fds = [PollFd::new(self.stop, PollFlags::POLLIN), PollFd::new(self.stream.as_fd(), events)];
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            // Rounded up: a poll that returns just before the deadline would spin.
            let ms = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
            PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(0) => Ok(deadline.is_none()),
            Ok(_) if fds[0].any().unwrap_or(true) => Err(ConnectionError::Stopped),
            Ok(_) | Err(nix::Error::EINTR) => Ok(true),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}
