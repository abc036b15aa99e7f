//! QUIC, with both sides authenticated as on TLS.
//!
//! Every lane has a connection, a socket and a congestion window of its own, so demand never queues behind the push
//! although all of them arrive at one port. On the listening side each connection gets a socket that is connected to its
//! peer and bound to the common port: the kernel sorts the datagrams, and no thread hands them on.
//!
//! ```text
//!   control, push   user ══ socket pair ══ pump thread ══ engine ══ UDP socket
//!   fault           user ═════════════════════════════════ engine ══ UDP socket    no hand-over
//! ```
//!
//! A fault lane is driven by the one thread that uses it, inside its calls. While nobody calls, nothing is due on it: it
//! has no idle timeout, and whether the peer is there is for the control connection to find out.

mod engine;
mod listener;
mod pump;

use std::fmt;
use std::io;
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use quinn_proto::congestion::CubicConfig;
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    AckFrequencyConfig, ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    ServerConfig, TransportConfig, VarInt,
};
use socket2::SockRef;

use self::engine::{Engine, Unestablished, alert, wait};
use self::pump::Pumped;
use super::SecureEndpoint;
use super::credentials::{Credentials, Fingerprint};
use super::stream::SHORT_LINK;
use super::tls::TlsError;
use crate::wire::hello::Role;
use crate::wire::limits;

pub(super) use self::listener::{QuicAccepted, QuicListener};

/// Largest datagram that is tried. Loopback and jumbo frames would take more; trains of larger ones pass 64 KiB and
/// fall to a tenth of the rate.
const MTU_MAX: u16 = 6500;
/// What may be on its way unacknowledged, and what a receiver takes unread: a 10 Gbit/s link with 6 ms delay.
const WINDOW: u32 = 8 << 20;
/// The same for a push lane on a short link ([`SHORT_LINK`]): more on its way would only fill caches and queues.
const SHORT_WINDOW: u32 = 1 << 20;
/// What may be sent at once to begin with: 64 KiB, as lanes are few and the first images are large.
const FIRST_WINDOW: u64 = 64 << 10;
/// Socket buffers: datagrams that come while their thread is busy.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long the peer may keep an acknowledgement back. The probe for a request or answer that was lost, with nothing behind it to
/// show that, waits so much longer than the round trip: with the 25 ms that are usual, it came after two and a half
/// round trips of a 20 ms link. The library takes no less than a millisecond, and thread switches need some.
const ACK_DELAY: Duration = Duration::from_millis(2);
/// How often a quiet connection shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// An established connection with its one stream. Clones are the same connection.
#[derive(Clone)]
pub struct QuicStream(Arc<Kind>);

enum Kind {
    Inline(Box<Inline>),
    Pumped(Pumped, SocketAddr),
}

impl fmt::Debug for QuicStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicStream").field(&self.peer()).finish()
    }
}

/// A connection that is driven by who uses it: one thread at a time, as another would take in what the first waits for.
struct Inline {
    engine: Mutex<Engine>,
    /// The engine's socket, to wait for without its lock.
    socket: UdpSocket,
    peer: SocketAddr,
    timeout: Mutex<Option<Duration>>,
    closed: AtomicBool,
}

/// Locks what stays whole when its holder panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsFd for QuicStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &*self.0 {
            Kind::Inline(inline) => inline.socket.as_fd(),
            Kind::Pumped(pumped, _) => pumped.pair.as_fd(),
        }
    }
}

impl QuicStream {
    /// Connects for `role`; the hello is next.
    ///
    /// # Errors
    /// [`TlsError`]. That the peer does not accept us shows at the first receive.
    pub fn dial(to: &SecureEndpoint, role: Role, deadline: Instant) -> Result<Self, TlsError> {
        let any: SocketAddr = match to.addr {
            SocketAddr::V4(_) => ([0; 4], 0).into(),
            SocketAddr::V6(_) => ([0; 16], 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to.addr)?;
        enlarge(&socket);
        let seen = Arc::new(OnceLock::new());
        let crypto = to.credentials.quic_client(seen.clone())?;
        let crypto = QuicClientConfig::try_from(crypto).map_err(io::Error::other)?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport(role != Role::Fault)));
        let mut endpoint = Endpoint::new(Arc::new(endpoint_config()), None, true, None);
        let name = to.name.to_str();
        let connection =
            endpoint.connect(Instant::now(), config, to.addr, &name).map_err(io::Error::other)?;
        Self::establish(Engine::new(socket, endpoint, connection)?, true, &seen, deadline)
    }

    fn establish(
        mut engine: Engine,
        dials: bool,
        seen: &OnceLock<Fingerprint>,
        deadline: Instant,
    ) -> Result<Self, TlsError> {
        if let Err(why) = engine.establish(dials, deadline) {
            // The peer is told why, as far as one packet can.
            let _ = engine.turn(Instant::now());
            return Err(match (why, seen.get()) {
                (Unestablished::Refused(_), Some(seen)) => TlsError::NotPinned(*seen),
                (Unestablished::Refused(reason), None) => match alert(&reason) {
                    Some(alert) => TlsError::from_alert(alert),
                    None => TlsError::Library(rustls::Error::General(reason.to_string())),
                },
                (Unestablished::Io(error), _) => TlsError::Io(error),
            });
        }
        let socket = engine.socket().try_clone()?;
        let peer = socket.peer_addr()?;
        let (engine, timeout, closed) = (Mutex::new(engine), Mutex::new(None), AtomicBool::new(false));
        Ok(Self(Arc::new(Kind::Inline(Box::new(Inline { engine, socket, peer, timeout, closed })))))
    }

    /// As `role` uses it: all but fault lanes get a pump. Before it is cloned.
    ///
    /// # Errors
    /// What starting a thread says.
    pub fn for_role(self, role: Role) -> io::Result<Self> {
        let name = match role {
            Role::Fault => return Ok(self),
            Role::Control => "quic-control",
            Role::Push => "quic-push",
        };
        match Arc::try_unwrap(self.0) {
            Ok(Kind::Inline(inline)) => {
                let mut engine = inline.engine.into_inner().unwrap_or_else(PoisonError::into_inner);
                if role == Role::Push && engine.round_trip() < SHORT_LINK {
                    engine.narrow(SHORT_WINDOW);
                }
                Ok(Self(Arc::new(Kind::Pumped(Pumped::start(engine, name)?, inline.peer))))
            }
            Ok(pumped) => Ok(Self(Arc::new(pumped))),
            Err(shared) => Ok(Self(shared)),
        }
    }

    /// The thread that carries the connection, if its user does not, while it runs.
    #[must_use]
    pub fn pump_thread(&self) -> Option<i32> {
        match &*self.0 {
            Kind::Inline(_) => None,
            Kind::Pumped(pumped, _) => pumped.thread_id(),
        }
    }

    /// Whether what is put into the descriptor reaches the peer.
    #[must_use]
    pub fn is_pumped(&self) -> bool {
        matches!(*self.0, Kind::Pumped(..))
    }

    /// The peer's address.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        match &*self.0 {
            Kind::Inline(inline) => inline.peer,
            Kind::Pumped(_, peer) => *peer,
        }
    }

    /// The UDP socket, if its user drives it.
    #[must_use]
    pub fn socket(&self) -> Option<&UdpSocket> {
        match &*self.0 {
            Kind::Inline(inline) => Some(&inline.socket),
            Kind::Pumped(..) => None,
        }
    }

    /// What reading nothing from the descriptor of a pumped connection means: its end, or why it was lost.
    ///
    /// # Errors
    /// `ConnectionAborted` if it was lost.
    pub fn ended(&self) -> io::Result<usize> {
        match &*self.0 {
            Kind::Inline(_) => Ok(0),
            Kind::Pumped(pumped, _) => pumped.ended(),
        }
    }

    /// Ends the connection; who waits on it wakes up.
    pub fn shutdown(&self) {
        match &*self.0 {
            Kind::Inline(inline) => inline.shutdown(),
            Kind::Pumped(pumped, _) => pumped.shutdown(),
        }
    }

    fn inline(&self) -> io::Result<&Inline> {
        match &*self.0 {
            Kind::Inline(inline) => Ok(inline),
            Kind::Pumped(..) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// How long one send or receive may wait; `None` is for ever.
    ///
    /// # Errors
    /// The errno of `setsockopt(2)`.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match &*self.0 {
            Kind::Inline(inline) => *lock(&inline.timeout) = timeout,
            Kind::Pumped(pumped, _) => {
                pumped.pair.set_read_timeout(timeout)?;
                pumped.pair.set_write_timeout(timeout)?;
            }
        }
        Ok(())
    }

    /// Sends all of `parts` on a connection that its user drives.
    ///
    /// # Errors
    /// `ConnectionAborted` if it was lost; `WouldBlock` if the timeout passed.
    pub fn send_all(&self, parts: &[&[u8]]) -> io::Result<()> {
        let inline = self.inline()?;
        let until = inline.until();
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                let written = lock(&inline.engine).write(rest)?;
                rest = &rest[written..];
                if written == 0 {
                    inline.wait(until)?;
                }
            }
        }
        let mut engine = lock(&inline.engine);
        while engine.flush(Instant::now())? {}
        Ok(())
    }

    /// Queues and sends what the windows allow. Takes nothing in: who polls would not see that it has come.
    ///
    /// # Errors
    /// As [`QuicStream::send_all`].
    pub fn send_some(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut engine = lock(&self.inline()?.engine);
        let written = engine.write(bytes)?;
        engine.flush(Instant::now())?;
        Ok(written)
    }

    /// Receives at least one byte, waiting for it; 0 is the end.
    ///
    /// # Errors
    /// As [`QuicStream::send_all`].
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let inline = self.inline()?;
        let until = inline.until();
        loop {
            if inline.closed.load(Ordering::Relaxed) {
                return Ok(0);
            }
            // What came is taken in behind the wait: no look at the socket is for nothing.
            if let Some(got) = lock(&inline.engine).read(buffer)? {
                return Ok(got);
            }
            inline.wait(until)?;
        }
    }

    /// Receives what is there: `None` if nothing is, `Some(0)` at the end. Unless `buffer` is filled, more comes only
    /// with the next datagram. Sends nothing: [`QuicStream::tend`] follows once what came has been seen to.
    ///
    /// # Errors
    /// As [`QuicStream::send_all`].
    pub fn receive_some(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let inline = self.inline()?;
        let mut engine = lock(&inline.engine);
        while engine.receive(Instant::now())? {}
        if inline.closed.load(Ordering::Relaxed) {
            return Ok(Some(0));
        }
        engine.read(buffer)
    }

    /// Lets the timers of a connection expire that its user drives, sends what there is to say about what came, and
    /// says when the next timer is due. Takes nothing in.
    ///
    /// # Errors
    /// What the socket says; `ConnectionAborted` if the connection was lost.
    pub fn tend(&self) -> io::Result<Option<Instant>> {
        let Kind::Inline(inline) = &*self.0 else { return Ok(None) };
        let mut engine = lock(&inline.engine);
        let expired = engine.timeout().is_some_and(|timeout| timeout <= Instant::now());
        while engine.flush(Instant::now())? {}
        // A connection that the peer has closed is for the next receive to find, behind what it sent before.
        if expired {
            engine.check_open()?;
        }
        Ok(engine.timeout())
    }
}

impl Inline {
    fn until(&self) -> Option<Instant> {
        lock(&self.timeout).map(|timeout| Instant::now() + timeout)
    }

    /// Sends what is due, waits for the socket or a timer, and takes in what came.
    fn wait(&self, until: Option<Instant>) -> io::Result<()> {
        if until.is_some_and(|until| until <= Instant::now()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let (timer, interest) = {
            let mut engine = lock(&self.engine);
            while engine.flush(Instant::now())? {}
            (engine.timeout(), engine.interest())
        };
        wait(self.socket.as_fd(), interest, timer.into_iter().chain(until).min())?;
        if self.closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        lock(&self.engine).receive(Instant::now()).map(drop)
    }

    fn shutdown(&self) {
        if !self.closed.swap(true, Ordering::Relaxed) {
            lock(&self.engine).close();
            // Wakes who waits for the socket.
            let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        }
    }
}

fn enlarge(socket: &UdpSocket) {
    let plain = SockRef::from(socket);
    // Beyond the limits of ordinary users where we may; refused values are clamped, not errors.
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        let _ = plain.set_recv_buffer_size(SOCKET_BUFFER);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        let _ = plain.set_send_buffer_size(SOCKET_BUFFER);
    }
}

fn endpoint_config() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // The constant is in the range that the library accepts.
    let _ = config.max_udp_payload_size(MTU_MAX);
    config
}

/// How connections travel; those that a thread tends find out by themselves that the peer is gone.
fn transport(tended: bool) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_MAX);
    let mut cubic = CubicConfig::default();
    cubic.initial_window(FIRST_WINDOW);
    let mut acknowledged = AckFrequencyConfig::default();
    acknowledged.max_ack_delay(Some(ACK_DELAY));
    let mut config = TransportConfig::default();
    config
        .ack_frequency_config(Some(acknowledged))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW))
        .initial_rtt(Duration::from_millis(50))
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(cubic))
        .max_idle_timeout(tended.then(|| IdleTimeout::try_from(limits::DEAD_LINK_AFTER).ok()).flatten())
        .keep_alive_interval(tended.then_some(KEEP_ALIVE));
    config
}

/// For the listening side; the dialler says how long a connection may be idle.
fn server(credentials: &Credentials, seen: Arc<OnceLock<Fingerprint>>) -> Result<ServerConfig, TlsError> {
    let crypto = QuicServerConfig::try_from(credentials.quic_server(seen)?).map_err(io::Error::other)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.migration(false).transport_config(Arc::new(transport(false)));
    Ok(config)
}

#[cfg(test)]
mod tests;
