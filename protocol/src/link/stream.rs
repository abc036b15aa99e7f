//! Stream sockets, tuned by role.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, SockaddrStorage, recv, send, sendmsg};
use socket2::{SockRef, TcpKeepalive};

use super::quic::QuicStream;
use super::tls::{TlsError, TlsStream};
use super::{Endpoint, Link, LinkError, tcp};
use crate::wire::hello::{HELLO_REPLY_LEN, Hello, Refusal, Role, decode_reply, encode_reply};
use crate::wire::limits;

/// Receive buffer of a push lane on a short link. What waits there is on its way for a thread that needs it: it is
/// asked for again. The kernel's own tuning stops far below on loopback, and is right for a long link.
const PUSH_BUFFER: usize = 1 << 20;
/// Round trip up to which a link is short: 1 MiB is what 10 Gbit/s carry meanwhile.
pub(super) const SHORT_LINK: Duration = Duration::from_micros(800);

/// A connected stream of one role.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
    /// TLS over TCP.
    Tls(TlsStream),
    /// QUIC.
    Quic(QuicStream),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.as_fd(),
            Self::Quic(stream) => stream.as_fd(),
        }
    }
}

impl Stream {
    /// Dials `endpoint` and opens or joins the session in `hello`.
    ///
    /// # Errors
    /// [`LinkError`]: nobody there, no peer of ours, or refused.
    pub fn dial(endpoint: &Endpoint, hello: &Hello) -> Result<Self, LinkError> {
        Self::dial_within(endpoint, hello, limits::HELLO_TIMEOUT)
    }

    /// As [`Stream::dial`]; says which version the peer has chosen as well.
    ///
    /// # Errors
    /// As [`Stream::dial`].
    pub fn dial_versioned(endpoint: &Endpoint, hello: &Hello) -> Result<(Self, u16), LinkError> {
        Self::open(endpoint, hello, limits::HELLO_TIMEOUT)
    }

    /// As [`Stream::dial`], with at most `limit` for the connection to be made, for the handshake, and for each part
    /// of the hello: who dials again and again need not wait for a packet that was lost.
    ///
    /// # Errors
    /// As [`Stream::dial`].
    pub fn dial_within(endpoint: &Endpoint, hello: &Hello, limit: Duration) -> Result<Self, LinkError> {
        Self::open(endpoint, hello, limit).map(|(stream, _)| stream)
    }

    fn open(endpoint: &Endpoint, hello: &Hello, limit: Duration) -> Result<(Self, u16), LinkError> {
        let fail = |source| LinkError::Io { doing: "connect to", endpoint: endpoint.to_string(), source };
        let deadline = Instant::now() + limit;
        let connect = |addr: &SocketAddr| tcp::connect(*addr, limit);
        let stream = match endpoint {
            Endpoint::Tcp(addr) => Self::Tcp(connect(addr).map_err(fail)?),
            Endpoint::Unix(path) => Self::Unix(UnixStream::connect(path).map_err(fail)?),
            Endpoint::Tls(to) => {
                let socket = connect(&to.addr).map_err(fail)?;
                let secured = TlsStream::dial(socket, to.name.clone(), &to.credentials, deadline);
                Self::Tls(secured.map_err(|source| LinkError::tls(to, source))?)
            }
            Endpoint::Quic(to) => {
                let secured = QuicStream::dial(to, hello.role, deadline);
                Self::Quic(secured.map_err(|source| LinkError::tls(to, source))?)
            }
        };
        stream.tune(hello.role).map_err(fail)?;
        stream.set_timeout(Some(limit)).map_err(fail)?;
        stream.send_all(&hello.encode(), false).map_err(fail)?;
        let mut reply = [0; HELLO_REPLY_LEN];
        stream.receive_all(&mut reply).map_err(|error| match endpoint {
            // A client learns behind its handshake only whether it was accepted.
            Endpoint::Tls(to) | Endpoint::Quic(to) => LinkError::tls(to, TlsError::of_stream(error)),
            _ => fail(error),
        })?;
        let version = decode_reply(&reply)
            .map_err(|source| LinkError::Hello { endpoint: endpoint.to_string(), source })?;
        stream.set_timeout(None).map_err(fail)?;
        let stream = match stream {
            Self::Quic(stream) => Self::Quic(stream.for_role(hello.role).map_err(fail)?),
            stream => stream,
        };
        Ok((stream, version))
    }

    /// Answers a hello, and tunes the socket for `role` if it was accepted.
    ///
    /// # Errors
    /// The errno of the socket calls.
    pub fn answer(&self, role: Role, verdict: Result<u16, Refusal>) -> io::Result<()> {
        self.send_all(&encode_reply(verdict), false)?;
        self.tune(role)?;
        self.set_timeout(None)
    }

    /// The peer's address, for messages.
    #[must_use]
    pub fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or_else(|_| "?".into(), |addr| addr.to_string()),
            Self::Unix(_) => "unix peer".into(),
            Self::Quic(stream) => stream.peer().to_string(),
            Self::Tls(stream) => {
                stream.socket().peer_addr().map_or_else(|_| "?".into(), |addr| addr.to_string())
            }
        }
    }

    /// Whether bytes may be put into its descriptor past these calls, as splice does.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        match self {
            Self::Tcp(_) | Self::Unix(_) => true,
            Self::Tls(_) => false,
            Self::Quic(stream) => stream.is_pumped(),
        }
    }

    /// The same connection for a second thread, where the kernel keeps it under a second descriptor.
    ///
    /// # Errors
    /// The errno of `dup(2)`.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tls(stream) => Self::Tls(stream.clone()),
            Self::Quic(stream) => Self::Quic(stream.clone()),
        })
    }

    /// The processor that received the last packet (`SO_INCOMING_CPU`), where the kernel knows it.
    #[must_use]
    pub fn incoming_processor(&self) -> Option<usize> {
        match self {
            // -1, as an unsigned number, before the first.
            Self::Tcp(_) | Self::Tls(_) => {
                SockRef::from(self).cpu_affinity().ok().filter(|cpu| *cpu < 1 << 16)
            }
            Self::Quic(stream) => {
                let socket = stream.socket()?;
                SockRef::from(socket).cpu_affinity().ok().filter(|cpu| *cpu < 1 << 16)
            }
            Self::Unix(_) => None,
        }
    }

    /// The thread of this process that carries the connection beside the one that uses it (a push or control
    /// connection on QUIC has one), while it runs.
    #[must_use]
    pub fn pump_thread(&self) -> Option<i32> {
        if let Self::Quic(stream) = self { stream.pump_thread() } else { None }
    }

    /// How long one send or receive may wait; `None` is for ever.
    ///
    /// # Errors
    /// The errno of `setsockopt(2)`.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        if let Self::Quic(stream) = self {
            return stream.set_timeout(timeout);
        }
        let socket = SockRef::from(self);
        socket.set_read_timeout(timeout)?;
        socket.set_write_timeout(timeout)
    }

    /// Makes sends and receives return at once.
    ///
    /// # Errors
    /// The errno of `fcntl(2)`.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        SockRef::from(self).set_nonblocking(on)
    }

    /// Ends the connection in both directions; who waits on it wakes up.
    pub fn shutdown(&self) {
        match self {
            Self::Tls(stream) => return stream.shutdown(),
            Self::Quic(stream) => return stream.shutdown(),
            Self::Tcp(_) | Self::Unix(_) => {}
        }
        // An error means that it has ended already.
        let _ = SockRef::from(self).shutdown(std::net::Shutdown::Both);
    }

    /// Sends all of `bytes`; with `more`, the kernel may wait for what follows before it sends.
    ///
    /// # Errors
    /// The errno of `send(2)`.
    pub fn send_all(&self, bytes: &[u8], more: bool) -> io::Result<()> {
        match self {
            Self::Tls(stream) => return stream.send_all(&[bytes]),
            Self::Quic(stream) if !stream.is_pumped() => return stream.send_all(&[bytes]),
            _ => {}
        }
        let flags = sending(more);
        let mut rest = bytes;
        while !rest.is_empty() {
            match send(self.as_fd().as_raw_fd(), rest, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => rest = &rest[sent..],
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends `head` and then `body` in one call where the kernel takes both; with `more`, it may wait for what
    /// follows.
    ///
    /// # Errors
    /// The errno of `sendmsg(2)`.
    pub fn send_both(&self, head: &[u8], body: &[u8], more: bool) -> io::Result<()> {
        match self {
            Self::Tls(stream) => return stream.send_all(&[head, body]),
            Self::Quic(stream) if !stream.is_pumped() => return stream.send_all(&[head, body]),
            _ => {}
        }
        let flags = sending(more);
        let slices = [IoSlice::new(head), IoSlice::new(body)];
        let sent = loop {
            let fd = self.as_fd().as_raw_fd();
            match sendmsg::<SockaddrStorage>(fd, &slices, &[], flags, None) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        match sent.checked_sub(head.len()) {
            Some(of_body) => self.send_all(&body[of_body..], more),
            None => {
                self.send_all(&head[sent..], true)?;
                self.send_all(body, more)
            }
        }
    }

    /// Sends what the kernel takes at once: the number of bytes, 0 if none. The next call goes on with the rest, as
    /// an encrypting link may have begun to send it.
    ///
    /// # Errors
    /// The errno of `send(2)`, `EAGAIN` excepted.
    pub fn send_some(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tls(stream) => return stream.send_some(bytes),
            Self::Quic(stream) if !stream.is_pumped() => return stream.send_some(bytes),
            _ => {}
        }
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match send(self.as_fd().as_raw_fd(), bytes, flags) {
            Ok(sent) => Ok(sent),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives what is there without waiting: `None` if nothing is, `Some(0)` at the end of the stream. Unless
    /// `buffer` is filled, more comes only once the descriptor is readable.
    ///
    /// # Errors
    /// The errno of `recv(2)`, `EAGAIN` excepted.
    pub fn receive_some(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self {
            Self::Tls(stream) => return stream.receive_some(buffer),
            Self::Quic(stream) if !stream.is_pumped() => return stream.receive_some(buffer),
            _ => {}
        }
        let fd = self.as_fd().as_raw_fd();
        match recv(fd, buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.ended().map(Some),
            Ok(received) => Ok(Some(received)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives at least one byte, waiting for it; 0 is the end of the stream.
    ///
    /// # Errors
    /// The errno of `recv(2)`.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).read(buffer),
            Self::Unix(stream) => (&mut &*stream).read(buffer),
            Self::Tls(stream) => stream.receive(buffer),
            Self::Quic(stream) if !stream.is_pumped() => stream.receive(buffer),
            Self::Quic(stream) => match recv(stream.as_fd().as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(0) => stream.ended(),
                other => Ok(other?),
            },
        }
    }

    /// What it means that nothing more comes: the end, or a connection that was lost.
    fn ended(&self) -> io::Result<usize> {
        if let Self::Quic(stream) = self { stream.ended() } else { Ok(0) }
    }

    /// Sees to the timers of a connection that its user drives (a fault lane on QUIC), and says when the next is due.
    ///
    /// # Errors
    /// What its socket says.
    pub fn tend(&self) -> io::Result<Option<Instant>> {
        if let Self::Quic(stream) = self { stream.tend() } else { Ok(None) }
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// The errno of `recv(2)`; `UnexpectedEof` if the peer closed.
    pub fn receive_all(&self, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).read_exact(buffer),
            Self::Unix(stream) => (&mut &*stream).read_exact(buffer),
            Self::Tls(_) | Self::Quic(_) => {
                let mut filled = 0;
                while filled < buffer.len() {
                    match self.receive(&mut buffer[filled..])? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        got => filled += got,
                    }
                }
                Ok(())
            }
        }
    }

    fn tune(&self, role: Role) -> io::Result<()> {
        if let Self::Quic(_) = self {
            return Ok(());
        }
        let socket = SockRef::from(self);
        let path = kernel::tcp::path(self.as_fd()).ok().flatten();
        if role == Role::Push && path.is_none_or(|path| path.min_rtt < SHORT_LINK) {
            // Refused values are clamped by the kernel, not errors.
            socket.set_send_buffer_size(PUSH_BUFFER)?;
            socket.set_recv_buffer_size(PUSH_BUFFER)?;
        }
        if !matches!(self, Self::Unix(_)) {
            socket.set_tcp_nodelay(true)?;
            if role != Role::Push {
                // On a push lane it would also end the connection to a live peer that is too busy to read: the
                // kernel counts a window that stays shut as a timeout.
                socket.set_tcp_user_timeout(Some(limits::DEAD_LINK_AFTER))?;
            }
            let probe = Duration::from_secs(2);
            socket.set_tcp_keepalive(
                &TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(4),
            )?;
        }
        Ok(())
    }
}

fn sending(more: bool) -> MsgFlags {
    let more = if more { MsgFlags::from_bits_retain(nix::libc::MSG_MORE) } else { MsgFlags::empty() };
    MsgFlags::MSG_NOSIGNAL | more
}

impl Link for Stream {
    fn has_buffered(&self) -> bool {
        match self {
            Self::Tcp(_) | Self::Unix(_) => false,
            Self::Tls(stream) => stream.has_buffered(),
            // Whatever a datagram brought was taken with it.
            Self::Quic(_) => false,
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send_all(bytes, false)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
