//! Listening, and the first words of who connects.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::quic::{QuicAccepted, QuicListener};
use super::tls::{TlsError, TlsStream};
use super::{Credentials, Endpoint, LinkError, SecureEndpoint, Stream, tcp};
use crate::wire::hello::{HELLO_LEN, Hello, HelloError, Refusal, encode_reply};
use crate::wire::limits;

/// How long a peer that was refused may take to close; until then it can read why.
const LINGER: Duration = Duration::from_millis(500);

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Unix.
    Unix(UnixListener),
    /// TLS over TCP.
    Tls(TcpListener, SecureEndpoint),
    /// QUIC.
    Quic(Box<QuicListener>, SecureEndpoint),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) | Self::Tls(listener, _) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
            Self::Quic(listener, _) => listener.as_fd(),
        }
    }
}

impl Listener {
    /// Listens at `endpoint`; port 0 lets the kernel choose, [`Listener::endpoint`] tells.
    ///
    /// # Errors
    /// [`LinkError::Io`].
    pub fn bind(endpoint: &Endpoint) -> Result<Self, LinkError> {
        let fail = |source| LinkError::Io { doing: "listen at", endpoint: endpoint.to_string(), source };
        match endpoint {
            Endpoint::Tcp(addr) => Ok(Self::Tcp(tcp::listen(*addr).map_err(fail)?)),
            Endpoint::Unix(path) => Ok(Self::Unix(bind_unix(path).map_err(fail)?)),
            Endpoint::Tls(at) => Ok(Self::Tls(tcp::listen(at.addr).map_err(fail)?, at.clone())),
            Endpoint::Quic(at) => {
                let listener = QuicListener::bind(at.addr, at.credentials.clone());
                Ok(Self::Quic(Box::new(listener.map_err(fail)?), at.clone()))
            }
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The errno of `getsockname(2)`.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            Self::Tcp(listener) => Ok(Endpoint::Tcp(listener.local_addr()?)),
            Self::Unix(listener) => {
                let addr = listener.local_addr()?;
                Ok(Endpoint::Unix(addr.as_pathname().map(Into::into).unwrap_or_default()))
            }
            Self::Tls(listener, at) => {
                Ok(Endpoint::Tls(SecureEndpoint { addr: listener.local_addr()?, ..at.clone() }))
            }
            Self::Quic(listener, at) => {
                Ok(Endpoint::Quic(SecureEndpoint { addr: listener.local_addr()?, ..at.clone() }))
            }
        }
    }

    /// Waits for a connection. Nothing of it has been judged yet, so nobody holds up others. With QUIC what makes the
    /// listener readable need not be one.
    ///
    /// # Errors
    /// The errno of `accept(2)`; `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Self::Tcp(listener) => Accepted::Plain(Stream::Tcp(listener.accept()?.0)),
            Self::Unix(listener) => Accepted::Plain(Stream::Unix(listener.accept()?.0)),
            Self::Tls(listener, at) => Accepted::Tls(listener.accept()?.0, at.credentials.clone()),
            Self::Quic(listener, _) => Accepted::Quic(Box::new(listener.accept()?)),
        })
    }

    /// Makes [`Listener::accept`] return at once.
    ///
    /// # Errors
    /// The errno of `fcntl(2)`.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        socket2::SockRef::from(self).set_nonblocking(on)
    }
}

/// Listens at a path, in the place of a listener that has ended and left its socket there.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // A socket refuses only if nobody listens; anything else at the path stays.
            let refused =
                UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if !refused || !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// A stranger that was not let in.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// It said nothing, or not in time.
    #[error("no hello: {0}")]
    Io(#[from] io::Error),
    /// It is no peer of ours.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// It did not prove who it is.
    #[error("not let in: {source}{}", remedy(source))]
    Tls {
        /// Why.
        source: TlsError,
    },
}

/// What an operator who knows better can do about a refused peer.
fn remedy(error: &TlsError) -> String {
    match error {
        TlsError::NotPinned(seen) => {
            format!("; if this is the peer you expect, start again with --peer {seen}")
        }
        TlsError::Plain => "; give both sides the same --link".into(),
        TlsError::Library(rustls::Error::NoCertificatesPresented) => {
            "; only peers with a key are let in: `source-server identity` makes one".into()
        }
        _ => String::new(),
    }
}

/// A connection whose peer has not said anything yet.
#[derive(Debug)]
pub enum Accepted {
    /// Plain.
    Plain(Stream),
    /// A handshake of TLS is due.
    Tls(TcpStream, Arc<Credentials>),
    /// A handshake of QUIC is due.
    Quic(Box<QuicAccepted>),
}

impl Accepted {
    /// The peer's address, for messages.
    #[must_use]
    pub fn peer(&self) -> String {
        match self {
            Self::Plain(stream) => stream.peer(),
            Self::Tls(socket, _) => socket.peer_addr().map_or_else(|_| "?".into(), |addr| addr.to_string()),
            Self::Quic(knocking) => knocking.peer().to_string(),
        }
    }

    /// The connection for a protocol without our hello, which then is none of a link that encrypts.
    ///
    /// # Errors
    /// `Unsupported` on a link that encrypts.
    pub fn into_plain(self) -> io::Result<Stream> {
        match self {
            Self::Plain(stream) => Ok(stream),
            Self::Tls(..) | Self::Quic(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Shakes hands if the link wants it, and reads the hello. The caller answers it with [`Stream::answer`]. Takes
    /// [`limits::HELLO_TIMEOUT`] at most for the handshake, and again for each part of the hello.
    ///
    /// # Errors
    /// [`GreetError`]; the peer has been told where it can understand it.
    pub fn greet(self) -> Result<(Stream, Hello), GreetError> {
        let deadline = Instant::now() + limits::HELLO_TIMEOUT;
        let stream = match self {
            Self::Plain(stream) => stream,
            Self::Tls(socket, credentials) => {
                // A second descriptor, to say why if it is refused.
                let plain = socket.try_clone()?;
                match TlsStream::accept(socket, &credentials, deadline) {
                    Ok(secured) => Stream::Tls(secured),
                    Err(source) => {
                        if matches!(source, TlsError::Plain) {
                            refuse_link(&plain);
                        }
                        linger(&plain);
                        return Err(GreetError::Tls { source });
                    }
                }
            }
            Self::Quic(knocking) => {
                Stream::Quic(knocking.establish(deadline).map_err(|source| GreetError::Tls { source })?)
            }
        };
        stream.set_timeout(Some(limits::HELLO_TIMEOUT))?;
        let mut bytes = [0; HELLO_LEN];
        stream.receive_all(&mut bytes)?;
        match (Hello::decode(&bytes), stream) {
            (Ok(hello), Stream::Quic(stream)) => Ok((Stream::Quic(stream.for_role(hello.role)?), hello)),
            (Ok(hello), stream) => Ok((stream, hello)),
            (Err(error), stream) => {
                if let (HelloError::Tls, Stream::Tcp(socket)) = (&error, &stream) {
                    refuse_link(socket);
                    linger(socket);
                }
                Err(error.into())
            }
        }
    }
}

/// Tells a peer with another kind of link: in clear, which is all that both understand, and tells nobody anything.
fn refuse_link(mut socket: &TcpStream) {
    // It may be gone.
    let _ = socket.write_all(&encode_reply(Err(Refusal::Link)));
}

/// Lets a peer read what it was told: closed with data unread, the connection would be reset under it.
fn linger(mut socket: &TcpStream) {
    let deadline = Instant::now() + LINGER;
    let mut bytes = [0; 4096];
    let _ = socket.shutdown(Shutdown::Write);
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        if socket.set_read_timeout(Some(left)).is_err() || !matches!(socket.read(&mut bytes), Ok(1..)) {
            return;
        }
    }
}
