//! A thread that carries a connection between its engine and a socket pair.
//!
//! Control and push connections have one: their users wait, splice and clone as they do with a socket, and timers,
//! acknowledgements and windows are looked after while they are busy elsewhere.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::unistd::gettid;

use super::engine::{Engine, poll_all};

/// Bytes that wait in each direction between pair and stream.
const BUFFER: usize = 256 << 10;
/// What the kernel keeps between a user and the pump, each way: what is there of the push is on its way as well.
const PAIR_BUFFER: usize = 256 << 10;
/// How long the peer may take to acknowledge what was sent before the end.
const LINGER: Duration = Duration::from_secs(2);

/// The user's end of a pumped connection. Dropping it waits until the peer has what was sent, within a bound.
#[derive(Debug)]
pub(super) struct Pumped {
    pub(super) pair: UnixStream,
    why: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
    /// Zero while it does not run.
    id: Arc<AtomicI32>,
}

impl Pumped {
    /// Starts a pump for an engine whose handshake is done.
    pub(super) fn start(engine: Engine, name: &str) -> io::Result<Self> {
        let (pair, far) = UnixStream::pair()?;
        for end in [&pair, &far] {
            // Refused values are clamped by the kernel, not errors.
            let _ = socket2::SockRef::from(end).set_send_buffer_size(PAIR_BUFFER);
        }
        far.set_nonblocking(true)?;
        let why = Arc::new(Mutex::new(None));
        let pump = Pump::new(engine, far, why.clone());
        let id = Arc::new(AtomicI32::new(0));
        let own = id.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            own.store(gettid().as_raw(), Ordering::Relaxed);
            pump.run();
            own.store(0, Ordering::Relaxed);
        })?;
        Ok(Self { pair, why, thread: Some(thread), id })
    }

    /// The pump's thread, while it runs.
    pub(super) fn thread_id(&self) -> Option<i32> {
        Some(self.id.load(Ordering::Relaxed)).filter(|id| *id != 0)
    }

    /// Tells an end of the stream from a connection that was lost.
    pub(super) fn ended(&self) -> io::Result<usize> {
        let why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        why.as_ref().map_or(Ok(0), |why| Err(io::Error::new(io::ErrorKind::ConnectionAborted, why.clone())))
    }

    pub(super) fn shutdown(&self) {
        // An error means that it has ended already.
        let _ = self.pair.shutdown(Shutdown::Both);
    }
}

impl Drop for Pumped {
    fn drop(&mut self) {
        let _ = self.pair.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Bytes on their way, in a buffer that is filled once it is empty.
struct Bytes {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Bytes {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER], start: 0, end: 0 }
    }

    const fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

struct Pump {
    engine: Engine,
    pair: UnixStream,
    why: Arc<Mutex<Option<String>>>,
    out: Bytes,
    back: Bytes,
    /// Since when the user sends nothing more.
    finished: Option<Instant>,
    /// The user was told that nothing more comes, or does not listen.
    ended: bool,
}

impl Pump {
    fn new(engine: Engine, pair: UnixStream, why: Arc<Mutex<Option<String>>>) -> Self {
        Self { engine, pair, why, out: Bytes::new(), back: Bytes::new(), finished: None, ended: false }
    }

    fn run(mut self) {
        if let Err(error) = self.carry() {
            *self.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        }
        let _ = self.pair.shutdown(Shutdown::Both);
    }

    fn carry(&mut self) -> io::Result<()> {
        loop {
            let mut more = self.engine.turn(Instant::now())?;
            more |= self.carry_back()?;
            more |= self.carry_out()?;
            let linger = self.finished.map(|since| since + LINGER);
            if self.finished.is_some() && self.engine.is_over()
                || linger.is_some_and(|until| Instant::now() >= until)
            {
                return Ok(());
            }
            // What was lost is told behind the data that still came, when there is somebody to tell.
            if self.ended && self.engine.check_open().is_err() {
                return Ok(());
            }
            self.wait(more, linger)?;
        }
    }

    fn wait(&mut self, more: bool, linger: Option<Instant>) -> io::Result<()> {
        let mut pair = PollFlags::empty();
        if self.out.is_empty() && self.finished.is_none() {
            pair |= PollFlags::POLLIN;
        }
        if !self.back.is_empty() {
            pair |= PollFlags::POLLOUT;
        }
        let timer = self.engine.timeout();
        let until = if more { Some(Instant::now()) } else { timer.into_iter().chain(linger).min() };
        let mut fds = vec![PollFd::new(self.engine.as_fd(), self.engine.interest())];
        // A pair whose user is gone is always ready.
        if !pair.is_empty() {
            fds.push(PollFd::new(self.pair.as_fd(), pair));
        }
        poll_all(&mut fds, until)
    }

    /// From the user to the stream. Whether more could be.
    fn carry_out(&mut self) -> io::Result<bool> {
        if self.out.is_empty() && self.finished.is_none() {
            match (&self.pair).read(&mut self.out.buffer) {
                Ok(0) => {
                    self.finished = Some(Instant::now());
                    self.engine.finish();
                    return Ok(true);
                }
                Ok(got) => (self.out.start, self.out.end) = (0, got),
                Err(error) if is_not_now(&error) => return Ok(false),
                // Closed with data unread.
                Err(_) => {
                    self.finished = Some(Instant::now());
                    self.engine.finish();
                    return Ok(true);
                }
            }
        }
        if self.out.is_empty() || self.engine.check_open().is_err() {
            return Ok(false);
        }
        let written = self.engine.write(&self.out.buffer[self.out.start..self.out.end])?;
        self.out.start += written;
        Ok(written > 0)
    }

    /// From the stream to the user. Whether more could be.
    fn carry_back(&mut self) -> io::Result<bool> {
        if self.ended {
            // Nobody wants it; but the peer's end stands behind it.
            while let Ok(Some(1..)) = self.engine.read(&mut self.back.buffer) {}
            return Ok(false);
        }
        if self.back.is_empty() {
            match self.engine.read(&mut self.back.buffer)? {
                None => return Ok(false),
                Some(0) => {
                    self.ended = true;
                    let _ = self.pair.shutdown(Shutdown::Write);
                    return Ok(true);
                }
                Some(got) => (self.back.start, self.back.end) = (0, got),
            }
        }
        match (&self.pair).write(&self.back.buffer[self.back.start..self.back.end]) {
            Ok(written) => {
                self.back.start += written;
                Ok(true)
            }
            Err(error) if is_not_now(&error) => Ok(false),
            Err(_) => {
                // The user has left.
                self.ended = true;
                self.back.start = self.back.end;
                Ok(true)
            }
        }
    }
}

fn is_not_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
