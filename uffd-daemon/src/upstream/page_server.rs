//! A CRIU page server: the one in a `criu dump --lazy-pages` that waits, or `source-server page-server`.
//!
//! ```text
//!   ask ─▶ unsent ─▶ GET GET GET ─▶            one connection, answers in the order of requests:
//!   answer ◀─ buffer ◀─ ADD_F data ◀─          a fault waits behind what the background has under way
//! ```
//!
//! CRIU kills its tasks when the connection ends, with or without a CLOSE, and lets them go on when it breaks.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, setsockopt, sockopt,
};
use protocol::criu::page_server::{
    CLOSE_STATUS_LEN, Command, Header, HeaderError, HeaderLayout, MAX_HEADER_LEN,
};
use protocol::link::{Stream, tcp};
use protocol::units::{PAGE_SIZE, PageRun, TaskId};

use super::{Answer, AskId, Upstream, UpstreamError};
use crate::inflight::Purpose;
use crate::limits;

/// How long a page server may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to answer a CLOSE, and to send what is due before that.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(10);
/// Pages of one request: CRIU gives no more at once, and it bounds the buffer (4 MiB).
const REQUEST_PAGES_MAX: u64 = 1024;
/// For this long after a fault another one is expected.
const FAULTS_FOLLOW: Duration = Duration::from_millis(5);
/// What the background has under way shrinks by this while faults follow each other: each of them waits until
/// that has passed. It is never stopped, or a task that faults steadily would never be whole. (CRIU's own daemon
/// falls back to one request of 64 KiB at each fault, so that a busy task gets 64 KiB for a round trip.)
const SHRINK_FOR_FAULTS: u64 = 4;

// A silent connection is probed after a minute, and is lost five minutes later. Not sooner: it cannot be made
// again (CRIU accepts once), and what it would have brought is lost with it.
const KEEPALIVE_IDLE_SECS: u32 = 60;
const KEEPALIVE_INTERVAL_SECS: u32 = 15;
const KEEPALIVE_PROBES: u32 = 20;

/// A connection to a CRIU page server.
#[derive(Debug)]
pub struct PageServer {
    /// Gone once the session has ended.
    stream: Option<Stream>,
    layout: HeaderLayout,
    farewell: Command,
    unsent: Vec<u8>,
    outstanding: VecDeque<(AskId, Header)>,
    /// Holds any answer that may come, whole.
    buffer: Vec<u8>,
    filled: usize,
    last_fault: Option<Instant>,
}

impl PageServer {
    /// Connects to the page server at `addr`.
    ///
    /// # Errors
    /// The errno of `connect(2)`.
    pub fn connect(addr: SocketAddr, layout: HeaderLayout) -> io::Result<Self> {
        let stream = tcp::connect(addr, CONNECT_TIMEOUT)?;
        Ok(Self::new(Stream::Tcp(stream), layout, Command::Close))
    }

    /// Uses a connected stream socket. `inherited`: from a parent that made it for both ends, so that the session
    /// ends as CRIU ends it then.
    ///
    /// # Errors
    /// `InvalidInput` if it is no stream socket; `ENOTSOCK`.
    pub fn over(socket: OwnedFd, layout: HeaderLayout, inherited: bool) -> io::Result<Self> {
        if getsockopt(&socket, sockopt::SockType)? != SockType::Stream {
            let text = "the page server's socket is not a stream socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let name: SockaddrStorage = getsockname(std::os::fd::AsRawFd::as_raw_fd(&socket))?;
        let stream = match name.family() {
            Some(AddressFamily::Unix) => Stream::Unix(UnixStream::from(socket)),
            _ => Stream::Tcp(TcpStream::from(socket)),
        };
        Ok(Self::new(stream, layout, if inherited { Command::ForceClose } else { Command::Close }))
    }

    fn new(stream: Stream, layout: HeaderLayout, farewell: Command) -> Self {
        tune(&stream);
        Self {
            stream: Some(stream),
            layout,
            farewell,
            unsent: Vec::with_capacity(4096),
            outstanding: VecDeque::new(),
            buffer: vec![0; answer_bytes(layout, limits::BACKGROUND_REQUEST_PAGES)],
            filled: 0,
            last_fault: None,
        }
    }

    fn queue(&mut self, header: &Header) -> Result<(), UpstreamError> {
        let mut bytes = [0; MAX_HEADER_LEN];
        let len = header.encode(self.layout, &mut bytes).map_err(|error| wrong(&error))?;
        self.unsent.extend_from_slice(&bytes[..len]);
        Ok(())
    }

    /// Hands over the answers that are whole, and moves what is left to the front of the buffer.
    fn take_answers(&mut self, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        let bytes = &self.buffer[..self.filled];
        let mut used = 0;
        while let Some((id, request)) = self.outstanding.front() {
            let start = used + self.layout.len();
            let Some(head) = bytes.get(used..start) else { break };
            let reply = Header::decode(self.layout, head).and_then(|header| header.check_reply_to(request));
            let pages = usize::try_from(reply.map_err(|error| wrong(&error))?.pages).unwrap_or(usize::MAX);
            let end = start.saturating_add(pages.saturating_mul(PAGE_SIZE));
            let Some(data) = bytes.get(start..end) else { break };
            each(Answer { id: *id, data });
            self.outstanding.pop_front();
            used = end;
        }
        if used > 0 {
            self.buffer.copy_within(used..self.filled, 0);
            self.filled -= used;
        }
        Ok(())
    }

    /// Sends the farewell, drops answers that nobody waits for any more, and receives the status.
    fn close(&mut self, stream: &Stream) -> Result<(), UpstreamError> {
        self.queue(&Header::close(self.farewell))?;
        // The other end may have made it non-blocking for both.
        stream.set_nonblocking(false)?;
        stream.set_timeout(Some(FAREWELL_TIMEOUT))?;
        stream.send_all(&self.unsent, false)?;
        self.unsent.clear();
        loop {
            self.take_answers(&mut |_| ())?;
            if self.outstanding.is_empty() && self.filled >= CLOSE_STATUS_LEN {
                break;
            }
            match stream.receive(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err(UpstreamError::Closed),
                Ok(got) => self.filled += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let text = format!("it did not end the session within {FAREWELL_TIMEOUT:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        match self.buffer[..self.filled] {
            [0, 0, 0, 0] => Ok(()),
            ref other => Err(UpstreamError::Protocol(format!("{other:?} instead of the end of the session"))),
        }
    }
}

/// Bytes of the largest answer to a request for `pages` pages.
fn answer_bytes(layout: HeaderLayout, pages: u64) -> usize {
    let pages = usize::try_from(pages.min(REQUEST_PAGES_MAX)).unwrap_or(0);
    layout.len() + pages * PAGE_SIZE
}

fn wrong(error: &HeaderError) -> UpstreamError {
    UpstreamError::Protocol(error.to_string())
}

/// Prepares a socket. None of it is worth a failure, and a unix socket takes none of it.
fn tune(stream: &Stream) {
    if let Stream::Tcp(stream) = stream {
        let _ = stream.set_nodelay(true);
        // Of one that was inherited; what it was made with stays in part.
        let _ = setsockopt(stream, sockopt::TcpCongestion, &"cubic".into());
        let _ = setsockopt(stream, sockopt::KeepAlive, &true);
        let _ = setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECS);
        let _ = setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_SECS);
        let _ = setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES);
    }
}

impl Upstream for PageServer {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    fn ask(&mut self, id: AskId, purpose: Purpose, task: TaskId, run: PageRun) -> Result<(), UpstreamError> {
        let request = Header::get(task, PageRun { pages: run.pages.min(REQUEST_PAGES_MAX), ..run });
        self.queue(&request)?;
        self.outstanding.push_back((id, request));
        let room = answer_bytes(self.layout, request.pages);
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        if purpose == Purpose::Demand {
            self.last_fault = Some(Instant::now());
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), UpstreamError> {
        let Some(stream) = &self.stream else { return Err(UpstreamError::Closed) };
        while !self.unsent.is_empty() {
            match stream.send_some(&self.unsent)? {
                0 => break,
                sent => drop(self.unsent.drain(..sent)),
            }
        }
        Ok(())
    }

    fn wants_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Receives once, so that the caller looks for faults again after what one buffer holds.
    fn answers(&mut self, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        let Some(stream) = &self.stream else { return Err(UpstreamError::Closed) };
        match stream.receive_some(&mut self.buffer[self.filled..])? {
            None => return Ok(()),
            Some(0) => return Err(UpstreamError::Closed),
            Some(got) => self.filled += got,
        }
        self.take_answers(each)?;
        match self.filled {
            left if left > 0 && self.outstanding.is_empty() => {
                Err(UpstreamError::Protocol(format!("{left} bytes that nobody asked for")))
            }
            _ => Ok(()),
        }
    }

    fn background(&self) -> Option<(u64, u64)> {
        let (request, window) = (limits::BACKGROUND_REQUEST_PAGES, limits::BACKGROUND_PAGES_IN_FLIGHT);
        Some(match self.last_fault {
            Some(fault) if fault.elapsed() < FAULTS_FOLLOW => {
                (request / SHRINK_FOR_FAULTS, window / SHRINK_FOR_FAULTS)
            }
            _ => (request, window),
        })
    }

    fn finish(&mut self) -> Result<(), UpstreamError> {
        let Some(stream) = self.stream.take() else { return Ok(()) };
        self.close(&stream)
    }

    fn reset(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        match &stream {
            // With the only descriptor, closing it is a reset.
            Stream::Tcp(stream) => {
                let _ = setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
            }
            // A unix socket has no reset, and its end is success to CRIU. A command that does not exist is not.
            Stream::Unix(_) => {
                let _ = stream.send_some(&[0xff; MAX_HEADER_LEN][..self.layout.len()]);
            }
            // CRIU does not speak it to us; its end is an error to whoever does.
            Stream::Tls(_) | Stream::Quic(_) => stream.shutdown(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use host::waiting::readable_within;
    use protocol::units::ImageAddr;

    use super::*;

    const TASK: TaskId = TaskId(5);
    const LAYOUTS: [HeaderLayout; 2] = [HeaderLayout::Compact, HeaderLayout::Wide];

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::aligned(start << 12).unwrap(), pages).unwrap()
    }

    fn bytes(header: &Header, layout: HeaderLayout) -> Vec<u8> {
        let mut bytes = [0; MAX_HEADER_LEN];
        let len = header.encode(layout, &mut bytes).unwrap();
        bytes[..len].to_vec()
    }

    /// An answer whose pages are full of `fill`.
    fn reply(run: PageRun, fill: u8, layout: HeaderLayout) -> Vec<u8> {
        let mut reply = bytes(&Header::reply(TASK, run), layout);
        reply.resize(reply.len() + usize::try_from(run.pages).unwrap() * PAGE_SIZE, fill);
        reply
    }

    fn pair(layout: HeaderLayout) -> (PageServer, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (PageServer::over(ours.into(), layout, true).unwrap(), theirs)
    }

    type Seen = Vec<(AskId, usize, u8)>;

    fn answers(server: &mut PageServer) -> Result<Seen, UpstreamError> {
        let mut seen = Vec::new();
        server.answers(&mut |a| seen.push((a.id, a.data.len() / PAGE_SIZE, a.data[0])))?;
        Ok(seen)
    }

    /// What comes until `count` answers are there.
    fn await_answers(server: &mut PageServer, count: usize) -> Seen {
        let mut seen = Vec::new();
        while seen.len() < count {
            assert!(readable_within(server.fd().unwrap(), Duration::from_secs(20)).unwrap());
            seen.extend(answers(server).unwrap());
        }
        seen
    }

    #[test]
    fn requests_leave_in_order_and_answers_split_anywhere_come_back() {
        for layout in LAYOUTS {
            let (mut server, mut peer) = pair(layout);
            server.ask(11, Purpose::Demand, TASK, run(16, 1)).unwrap();
            server.ask(12, Purpose::Background, TASK, run(20, 64)).unwrap();
            server.ask(13, Purpose::Demand, TASK, run(18, 1)).unwrap();
            assert!(server.wants_write());
            server.flush().unwrap();
            assert!(!server.wants_write());
            let mut requests = vec![0; 3 * layout.len()];
            peer.read_exact(&mut requests).unwrap();
            let expected: Vec<u8> = [run(16, 1), run(20, 64), run(18, 1)]
                .iter()
                .flat_map(|run| bytes(&Header::get(TASK, *run), layout))
                .collect();
            assert_eq!(requests, expected);

            let mut stream = reply(run(16, 1), 1, layout);
            stream.extend(reply(run(20, 40), 2, layout));
            stream.extend(reply(run(18, 1), 3, layout));
            let sender = thread::spawn(move || {
                for piece in stream.chunks(1777) {
                    peer.write_all(piece).unwrap();
                }
                peer
            });
            assert_eq!(await_answers(&mut server, 3), [(11, 1, 1), (12, 40, 2), (13, 1, 3)]);
            drop(sender.join().unwrap());
            assert!(matches!(answers(&mut server), Err(UpstreamError::Closed)));
        }
    }

    #[test]
    fn nothing_there_is_no_answer_and_does_not_wait() {
        let (mut server, _peer) = pair(HeaderLayout::Wide);
        server.ask(1, Purpose::Demand, TASK, run(16, 1)).unwrap();
        server.flush().unwrap();
        assert_eq!(answers(&mut server).unwrap(), []);
    }

    #[test]
    fn a_long_request_is_cut_and_its_answer_fits() {
        let (mut server, mut peer) = pair(HeaderLayout::Wide);
        server.ask(1, Purpose::Background, TASK, run(16, 1 << 30)).unwrap();
        server.flush().unwrap();
        let mut request = [0; 32];
        peer.read_exact(&mut request).unwrap();
        assert_eq!(request.to_vec(), bytes(&Header::get(TASK, run(16, 1024)), HeaderLayout::Wide));
        let sender = thread::spawn(move || peer.write_all(&reply(run(16, 1024), 9, HeaderLayout::Wide)));
        assert_eq!(await_answers(&mut server, 1), [(1, 1024, 9)]);
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn answers_to_no_question_are_refused() {
        let layout = HeaderLayout::Wide;
        let other_task = Header { dst: 6, ..Header::reply(TASK, run(16, 2)) };
        for (sent, what) in [
            (reply(run(17, 1), 1, layout), "another page"),
            (reply(run(16, 3), 1, layout), "more pages than asked for"),
            (bytes(&other_task, layout), "another task"),
            (bytes(&Header { pages: 0, ..Header::reply(TASK, run(16, 2)) }, layout), "no page"),
            (bytes(&Header::get(TASK, run(16, 2)), layout), "a question"),
            (vec![0x5a; 32], "rubbish"),
        ] {
            let (mut server, mut peer) = pair(layout);
            server.ask(1, Purpose::Background, TASK, run(16, 2)).unwrap();
            server.flush().unwrap();
            peer.write_all(&sent).unwrap();
            let error = answers(&mut server).unwrap_err();
            assert!(matches!(error, UpstreamError::Protocol(_)), "{what}: {error}");
        }
        let (mut server, mut peer) = pair(layout);
        peer.write_all(&[0]).unwrap();
        assert!(matches!(answers(&mut server), Err(UpstreamError::Protocol(_))), "nothing was asked");
    }

    #[test]
    fn the_background_makes_room_for_faults() {
        let (mut server, _peer) = pair(HeaderLayout::Wide);
        let full = (limits::BACKGROUND_REQUEST_PAGES, limits::BACKGROUND_PAGES_IN_FLIGHT);
        assert_eq!(server.background(), Some(full));
        server.ask(1, Purpose::Background, TASK, run(16, 64)).unwrap();
        assert_eq!(server.background(), Some(full));
        server.last_fault = Some(Instant::now() + Duration::from_secs(3600));
        assert_eq!(server.background(), Some((full.0 / 4, full.1 / 4)));
        server.last_fault = Instant::now().checked_sub(FAULTS_FOLLOW);
        assert_eq!(server.background(), Some(full));
    }

    #[test]
    fn the_session_is_closed_behind_late_answers() {
        for (inherited, command) in [(true, Command::ForceClose), (false, Command::Close)] {
            let layout = HeaderLayout::Compact;
            let (ours, mut peer) = UnixStream::pair().unwrap();
            let mut server = PageServer::over(ours.into(), layout, inherited).unwrap();
            server.ask(1, Purpose::Background, TASK, run(16, 2)).unwrap();
            let peer = thread::spawn(move || {
                let mut requests = vec![0; 2 * layout.len()];
                peer.read_exact(&mut requests).unwrap();
                assert_eq!(requests[layout.len()..], bytes(&Header::close(command), layout));
                peer.write_all(&reply(run(16, 2), 1, layout)).unwrap();
                peer.write_all(&[0; 4]).unwrap();
                assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the end of the stream");
            });
            server.finish().unwrap();
            peer.join().unwrap();
            assert!(server.fd().is_none());
            server.finish().unwrap();
        }
    }

    #[test]
    fn a_wrong_or_missing_status_is_told() {
        for (status, closed) in [(&[1, 0, 0, 0][..], false), (&[0; 8][..], false), (&[0; 3][..], true)] {
            let (mut server, mut peer) = pair(HeaderLayout::Wide);
            peer.write_all(status).unwrap();
            peer.shutdown(std::net::Shutdown::Write).unwrap();
            let error = server.finish().unwrap_err();
            assert_eq!(matches!(error, UpstreamError::Closed), closed, "{status:?}: {error}");
        }
    }

    #[test]
    fn a_reset_is_no_end_of_session() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut server = PageServer::connect(listener.local_addr().unwrap(), HeaderLayout::Wide).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        server.reset();
        assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(matches!(server.flush(), Err(UpstreamError::Closed)));

        let (mut server, mut peer) = pair(HeaderLayout::Wide);
        server.reset();
        let mut command = [0; 32];
        peer.read_exact(&mut command).unwrap();
        assert!(matches!(Header::decode(HeaderLayout::Wide, &command), Err(HeaderError::UnknownCommand(_))));
    }

    #[test]
    fn only_stream_sockets_are_taken() {
        let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let error = PageServer::over(datagram.into(), HeaderLayout::Wide, true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(PageServer::over(file.into(), HeaderLayout::Wide, true).is_err());
    }
}
