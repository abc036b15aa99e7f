//! The port where QUIC peers knock.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use bytes::BytesMut;
use quinn_proto::{ConnectionError, DatagramEvent, Endpoint, ServerConfig};
use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::engine::Engine;
use super::{QuicStream, endpoint_config, enlarge, lock, server};
use crate::link::credentials::Credentials;
use crate::link::tls::TlsError;
use crate::wire::limits;

/// Largest datagram that opens a connection.
const FIRST_MAX: usize = 2048;
/// Most peers that are remembered as let in: more than may be without a hello at once.
const LET_IN_MAX: usize = 256;

/// A UDP socket at which peers knock. One that knocks for the first time is asked to do so again with a token, so
/// nobody gets a thread or a socket under an address that is not its own.
pub struct QuicListener {
    socket: UdpSocket,
    state: UdpSocketState,
    endpoint: Mutex<Endpoint>,
    config: Arc<ServerConfig>,
    credentials: Arc<Credentials>,
    let_in: Mutex<VecDeque<(SocketAddr, Instant)>>,
}

impl std::fmt::Debug for QuicListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("QuicListener").field(&self.socket).finish()
    }
}

impl AsFd for QuicListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl QuicListener {
    /// Listens at `addr`.
    ///
    /// # Errors
    /// The errno of `bind(2)`; credentials that QUIC cannot use.
    pub fn bind(addr: SocketAddr, credentials: Arc<Credentials>) -> io::Result<Self> {
        let socket = UdpSocket::bind(addr)?;
        // Only now: who listens at this port already must not be joined.
        SockRef::from(&socket).set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        let state = UdpSocketState::new((&socket).into())?;
        let config = Arc::new(server(&credentials, Arc::default()).map_err(io::Error::other)?);
        let endpoint = Endpoint::new(Arc::new(endpoint_config()), Some(config.clone()), false, None);
        let (endpoint, let_in) = (Mutex::new(endpoint), Mutex::default());
        Ok(Self { socket, state, endpoint, config, credentials, let_in })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The errno of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Takes a datagram: somebody who knocks and has shown that its address is its own.
    ///
    /// # Errors
    /// `WouldBlock` if there is nobody; the errno of the socket calls.
    pub fn accept(&self) -> io::Result<QuicAccepted> {
        let mut datagram = [0; FIRST_MAX];
        let mut meta = [RecvMeta::default()];
        self.state.recv((&self.socket).into(), &mut [IoSliceMut::new(&mut datagram)], &mut meta)?;
        let [meta] = meta;
        let datagram = BytesMut::from(&datagram[..meta.len.min(meta.stride)]);
        let (now, mut reply) = (Instant::now(), Vec::new());
        let mut endpoint = lock(&self.endpoint);
        let answer = match endpoint.handle(now, meta.addr, meta.dst_ip, None, datagram.clone(), &mut reply) {
            Some(DatagramEvent::NewConnection(incoming)) if incoming.remote_address_validated() => {
                endpoint.ignore(incoming);
                if !self.is_first(meta.addr, now) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                return Ok(QuicAccepted {
                    local: self.local(&meta)?,
                    peer: meta.addr,
                    datagram,
                    config: self.config.clone(),
                    credentials: self.credentials.clone(),
                });
            }
            Some(DatagramEvent::NewConnection(incoming)) => endpoint.retry(incoming, &mut reply).ok(),
            Some(DatagramEvent::Response(answer)) => Some(answer),
            _ => None,
        };
        if let Some(answer) = answer {
            // A lost answer is asked for again.
            let _ = self.socket.send_to(&reply[..answer.size], meta.addr);
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Whether a peer has not been let in of late. One that knocks again before its socket is there must not get a
    /// second: its datagrams would go to either.
    fn is_first(&self, peer: SocketAddr, now: Instant) -> bool {
        let mut let_in = lock(&self.let_in);
        let_in.retain(|(_, since)| now.duration_since(*since) < limits::HELLO_TIMEOUT);
        if let_in.iter().any(|(known, _)| *known == peer) {
            return false;
        }
        if let_in.len() >= LET_IN_MAX {
            let_in.pop_front();
        }
        let_in.push_back((peer, now));
        true
    }

    /// The address that the peer has knocked at.
    fn local(&self, meta: &RecvMeta) -> io::Result<SocketAddr> {
        let mut local = self.socket.local_addr()?;
        if let (true, Some(at)) = (local.ip().is_unspecified(), meta.dst_ip) {
            let at = match (local.ip(), at) {
                (IpAddr::V6(_), IpAddr::V4(v4)) => IpAddr::V6(v4.to_ipv6_mapped()),
                _ => at,
            };
            local.set_ip(at);
        }
        Ok(local)
    }
}

/// Somebody who has knocked; nothing has been done for it yet.
pub struct QuicAccepted {
    local: SocketAddr,
    peer: SocketAddr,
    datagram: BytesMut,
    config: Arc<ServerConfig>,
    credentials: Arc<Credentials>,
}

impl std::fmt::Debug for QuicAccepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("QuicAccepted").field(&self.peer).finish()
    }
}

impl QuicAccepted {
    /// Who knocks.
    #[must_use]
    pub const fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Gives it a socket of its own at the same port, and shakes hands until `deadline`.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn establish(self, deadline: Instant) -> Result<QuicStream, TlsError> {
        let socket =
            Socket::new(Domain::for_address(self.local), Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
        socket.set_reuse_port(true)?;
        socket.bind(&self.local.into())?;
        socket.connect(&self.peer.into())?;
        let socket = UdpSocket::from(socket);
        enlarge(&socket);
        let (now, seen, mut reply) = (Instant::now(), Arc::new(OnceLock::new()), Vec::new());
        let mut endpoint = Endpoint::new(Arc::new(endpoint_config()), Some(self.config.clone()), true, None);
        // The listener's tokens, and a verifier that tells whom it refused.
        let mut config = (*self.config).clone();
        config.crypto = server(&self.credentials, seen.clone())?.crypto;
        let first = endpoint.handle(now, self.peer, None, None, self.datagram, &mut reply);
        let Some(DatagramEvent::NewConnection(incoming)) = first else {
            return Err(io::Error::from(io::ErrorKind::InvalidData).into());
        };
        let connection =
            endpoint.accept(incoming, now, &mut reply, Some(Arc::new(config))).map_err(|refused| {
                if let Some(answer) = refused.response {
                    let _ = socket.send(&reply[..answer.size]);
                }
                match refused.cause {
                    ConnectionError::TransportError(error) => {
                        TlsError::Library(rustls::Error::General(error.to_string()))
                    }
                    other => TlsError::Io(io::Error::other(other)),
                }
            })?;
        QuicStream::establish(Engine::new(socket, endpoint, connection)?, false, &seen, deadline)
    }
}
