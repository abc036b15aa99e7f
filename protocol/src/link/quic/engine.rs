//! One QUIC connection with one stream, over a socket of its own, driven by whoever calls.
//!
//! The library decides (it does no I/O and reads no clock); what is done here is carrying datagrams between it and the
//! socket, several in a system call both ways.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use quinn_proto::{
    Connection, ConnectionError, ConnectionHandle, DatagramEvent, Dir, EcnCodepoint, Endpoint, Event,
    ReadError, ReadableError, StreamEvent, StreamId, Transmit, VarInt, WriteError,
};
use quinn_udp::{RecvMeta, UdpSocketState};
use rustls::AlertDescription;

use crate::link::tls::PeerAlert;

/// Buffers that one receive fills, each with a train of datagrams that the kernel has joined.
const BUFFERS: usize = 4;
/// Most bytes in such a train.
const TRAIN: usize = 64 << 10;
/// Receives in a row before something is sent: acknowledgements must not wait for a peer that never stops.
const RECEIVES: usize = 4;
/// Trains sent in a row before something is received.
const SENDS: usize = 16;
/// Most bytes sent in one train: the kernel refuses more than fits into one IP packet.
const SENT_TRAIN: usize = 60_000;
/// Code of a connection that was closed in good order.
const FAREWELL: u32 = 0;

/// A connection and its socket.
pub(super) struct Engine {
    socket: UdpSocket,
    state: UdpSocketState,
    endpoint: Endpoint,
    handle: ConnectionHandle,
    connection: Connection,
    remote: SocketAddr,
    stream: Option<StreamId>,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// What is in `outgoing` and the socket has not taken.
    unsent: Option<Transmit>,
    connected: bool,
    lost: Option<ConnectionError>,
    /// The peer has sent all it will.
    ended: bool,
    /// The peer has everything we sent.
    delivered: bool,
    /// Something happened since the last time there was nothing to send.
    touched: bool,
}

impl AsFd for Engine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Engine {
    pub(super) fn new(
        socket: UdpSocket,
        endpoint: Endpoint,
        (handle, connection): (ConnectionHandle, Connection),
    ) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            remote: connection.remote_address(),
            socket,
            state,
            endpoint,
            handle,
            connection,
            stream: None,
            incoming: vec![0; BUFFERS * TRAIN],
            outgoing: Vec::with_capacity(TRAIN),
            unsent: None,
            connected: false,
            lost: None,
            ended: false,
            delivered: false,
            touched: true,
        })
    }

    pub(super) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Finishes the handshake until `deadline`; `dials` opens the stream.
    pub(super) fn establish(&mut self, dials: bool, deadline: Instant) -> Result<(), Unestablished> {
        while !self.connected {
            self.turn(Instant::now()).map_err(Unestablished::Io)?;
            if let Some(reason) = &self.lost {
                return Err(Unestablished::Refused(reason.clone()));
            }
            if !self.connected {
                if Instant::now() >= deadline {
                    return Err(Unestablished::Io(io::ErrorKind::TimedOut.into()));
                }
                let wake = self.timeout().map_or(deadline, |timeout| timeout.min(deadline));
                wait(self.socket.as_fd(), self.interest(), Some(wake)).map_err(Unestablished::Io)?;
            }
        }
        if dials {
            self.stream = self.connection.streams().open(Dir::Bi);
            if self.stream.is_none() {
                return Err(Unestablished::Io(io::Error::other("the peer allows no stream")));
            }
        }
        Ok(())
    }

    /// Receives what is there, lets timers expire, and sends what is due. Whether there may be more to do at once.
    pub(super) fn turn(&mut self, now: Instant) -> io::Result<bool> {
        let more = self.receive(now)?;
        Ok(self.flush(now)? || more)
    }

    /// Receives what is there and sends nothing: what there is to say about it travels with the next data, or with
    /// the next [`Engine::flush`]. Whether there may be more.
    pub(super) fn receive(&mut self, now: Instant) -> io::Result<bool> {
        let mut incoming = std::mem::take(&mut self.incoming);
        let result = self.receive_into(&mut incoming, now);
        self.incoming = incoming;
        self.take_events();
        result
    }

    /// Lets timers expire and sends what is due; what has come stays in the socket, which goes on to be readable.
    pub(super) fn flush(&mut self, now: Instant) -> io::Result<bool> {
        if self.connection.poll_timeout().is_some_and(|timeout| timeout <= now) {
            self.connection.handle_timeout(now);
            self.touched = true;
        }
        if !self.touched {
            return Ok(false);
        }
        self.take_events();
        let more = self.transmit(now)?;
        self.touched = more || self.unsent.is_some();
        Ok(more)
    }

    /// When [`Engine::turn`] is due although nothing came.
    pub(super) fn timeout(&mut self) -> Option<Instant> {
        self.connection.poll_timeout()
    }

    /// Lets less be on its way than [`super::WINDOW`], both what is sent and what is received.
    pub(super) fn narrow(&mut self, window: u32) {
        self.touched = true;
        self.connection.set_send_window(u64::from(window));
        self.connection.set_receive_window(VarInt::from_u32(window));
    }

    /// Round trip as measured so far.
    pub(super) fn round_trip(&self) -> Duration {
        self.connection.rtt()
    }

    /// What to wait for on the socket.
    pub(super) const fn interest(&self) -> PollFlags {
        if self.unsent.is_some() { PollFlags::POLLIN.union(PollFlags::POLLOUT) } else { PollFlags::POLLIN }
    }

    fn receive_into(&mut self, incoming: &mut [u8], now: Instant) -> io::Result<bool> {
        for _ in 0..RECEIVES {
            let mut metas = [RecvMeta::default(); BUFFERS];
            let mut buffers = incoming.chunks_exact_mut(TRAIN);
            let mut slices: [IoSliceMut<'_>; BUFFERS] =
                std::array::from_fn(|_| IoSliceMut::new(buffers.next().unwrap_or_default()));
            let got = match self.state.recv((&self.socket).into(), &mut slices, &mut metas) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Anybody can send the message that says so: it ends only what has not begun.
                Err(error) if self.connected && error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            };
            for (meta, train) in metas[..got].iter().zip(incoming.chunks_exact(TRAIN)) {
                // A socket that was shut down reads as empty.
                if meta.addr == self.remote && meta.stride > 0 {
                    train[..meta.len]
                        .chunks(meta.stride)
                        .for_each(|datagram| self.datagram(now, meta, datagram));
                }
            }
            if got < BUFFERS {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn datagram(&mut self, now: Instant, meta: &RecvMeta, datagram: &[u8]) {
        self.touched = true;
        let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
        let mut reply = Vec::new();
        match self.endpoint.handle(now, self.remote, None, ecn, BytesMut::from(datagram), &mut reply) {
            Some(DatagramEvent::ConnectionEvent(handle, event)) if handle == self.handle => {
                self.connection.handle_event(event);
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.endpoint.ignore(incoming),
            // Stateless answers are the listener's business.
            _ => {}
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(self.handle, event) {
                self.connection.handle_event(event);
            }
        }
        while let Some(event) = self.connection.poll() {
            match event {
                Event::Connected => self.connected = true,
                Event::ConnectionLost { reason } => self.lost = Some(reason),
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) if self.stream.is_none() => {
                    self.stream = self.connection.streams().accept(Dir::Bi);
                }
                Event::Stream(StreamEvent::Finished { .. }) => self.delivered = true,
                _ => {}
            }
        }
    }

    fn transmit(&mut self, now: Instant) -> io::Result<bool> {
        for _ in 0..SENDS {
            if self.unsent.is_none() {
                self.outgoing.clear();
                let train = SENT_TRAIN / usize::from(self.connection.current_mtu()).max(1);
                let train = train.clamp(1, self.state.max_gso_segments());
                self.unsent = self.connection.poll_transmit(now, train, &mut self.outgoing);
            }
            let Some(transmit) = &self.unsent else { return Ok(false) };
            let sent = self.state.try_send(
                (&self.socket).into(),
                &quinn_udp::Transmit {
                    destination: transmit.destination,
                    ecn: transmit.ecn.and_then(|ecn| quinn_udp::EcnCodepoint::from_bits(ecn as u8)),
                    contents: &self.outgoing[..transmit.size],
                    segment_size: transmit.segment_size,
                    src_ip: None,
                },
            );
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if !self.connected && error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Err(error);
                }
                // A datagram may get lost, in the kernel as well: a probe that is too large does.
                Ok(()) | Err(_) => self.unsent = None,
            }
        }
        Ok(true)
    }

    /// Queues what the windows allow: how much of `bytes`.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check_open()?;
        let Some(stream) = self.stream else { return Ok(0) };
        self.touched = true;
        match self.connection.send_stream(stream).write(bytes) {
            Ok(written) => Ok(written),
            Err(WriteError::Blocked) => Ok(0),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Takes what came, as far as `buffer` reaches: `None` if nothing, `Some(0)` at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let filled = self.read_stream(buffer)?;
        if filled > 0 || self.ended || buffer.is_empty() {
            return Ok(Some(filled));
        }
        match &self.lost {
            None => Ok(None),
            Some(ConnectionError::ApplicationClosed(close))
                if close.error_code == VarInt::from_u32(FAREWELL) =>
            {
                Ok(Some(0))
            }
            Some(reason) => Err(lost(reason)),
        }
    }

    fn read_stream(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(stream) = self.stream.filter(|_| !self.ended) else { return Ok(0) };
        self.touched = true;
        let mut stream = self.connection.recv_stream(stream);
        let mut chunks = match stream.read(true) {
            Ok(chunks) => chunks,
            Err(ReadableError::ClosedStream) => {
                self.ended = true;
                return Ok(0);
            }
            Err(ReadableError::IllegalOrderedRead) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let mut filled = 0;
        while filled < buffer.len() {
            match chunks.next(buffer.len() - filled) {
                Ok(Some(chunk)) => {
                    buffer[filled..filled + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
                    filled += chunk.bytes.len();
                }
                Ok(None) => {
                    self.ended = true;
                    break;
                }
                Err(ReadError::Blocked) => break,
                Err(ReadError::Reset(_)) => return Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
        // The next flush sends what there is to say about windows.
        let _ = chunks.finalize();
        Ok(filled)
    }

    /// Says that nothing more will be sent.
    pub(super) fn finish(&mut self) {
        self.touched = true;
        if let Some(stream) = self.stream {
            // An error means that it is over already.
            let _ = self.connection.send_stream(stream).finish();
        }
    }

    /// Whether the connection, or both its directions, are over.
    pub(super) const fn is_over(&self) -> bool {
        self.lost.is_some() || (self.delivered && self.ended)
    }

    /// Closes in good order, as far as one packet can.
    pub(super) fn close(&mut self) {
        let now = Instant::now();
        self.connection.close(now, VarInt::from_u32(FAREWELL), Bytes::new());
        let _ = self.transmit(now);
    }

    pub(super) fn check_open(&self) -> io::Result<()> {
        self.lost.as_ref().map_or(Ok(()), |reason| Err(lost(reason)))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

/// A connection that did not come about.
pub(super) enum Unestablished {
    /// The socket failed, or time ran out.
    Io(io::Error),
    /// One side does not want the other.
    Refused(ConnectionError),
}

/// The alert in an error code of QUIC, if there is one (RFC 9001, 4.8).
pub(super) fn alert(reason: &ConnectionError) -> Option<AlertDescription> {
    let ConnectionError::ConnectionClosed(close) = reason else { return None };
    let code = u64::from(close.error_code);
    (code >> 8 == 1).then(|| u8::try_from(code & 0xff).ok().map(AlertDescription::from)).flatten()
}

fn lost(reason: &ConnectionError) -> io::Error {
    match alert(reason) {
        Some(alert) => io::Error::new(io::ErrorKind::ConnectionAborted, PeerAlert(alert)),
        None => io::Error::new(io::ErrorKind::ConnectionAborted, reason.to_string()),
    }
}

/// Waits for a descriptor until `until`; for ever without.
pub(super) fn wait(fd: BorrowedFd<'_>, interest: PollFlags, until: Option<Instant>) -> io::Result<()> {
    poll_all(&mut [PollFd::new(fd, interest)], until)
}

/// Waits for several.
pub(super) fn poll_all(fds: &mut [PollFd<'_>], until: Option<Instant>) -> io::Result<()> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    // Timers are due at a time, and a wait that ends just before would be for nothing.
    let timeout = left.map(|left| TimeSpec::from_duration(left + Duration::from_nanos(1)));
    match ppoll(fds, timeout, None) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
