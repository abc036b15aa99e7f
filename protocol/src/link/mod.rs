//! How frames travel.
//!
//! A session has one control connection, one fault lane and at least one push lane, all dialled by the
//! source. Each is a [`Stream`]; what differs between them is how the socket is tuned for its
//! [`Role`](crate::wire::hello::Role).
//!
//! - [`Endpoint`]: where a peer listens, over which link, and for whom
//! - [`Stream`], [`ControlChannel`]: a connection; [`Listener`]: who connects
//! - [`Credentials`]: who this side is and whom it talks to, where the link authenticates
//! - [`tcp`]: plain sockets, and what they are before they connect
//! - [`tls`]: TLS 1.3 with a state of its own for each direction; `quic`: QUIC with a connection for each lane

mod control;
mod credentials;
mod listener;
mod quic;
mod stream;
pub mod tcp;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod tls;

pub use control::{ControlChannel, ControlError};
pub use credentials::{Credentials, CredentialsError, Fingerprint, Trust};
pub use listener::{Accepted, GreetError, Listener};
pub use stream::Stream;

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use rustls::pki_types::ServerName;

use self::tls::TlsError;
use crate::wire::hello::HelloError;

/// What can be waited for by its descriptor, and may have data without it.
pub trait Link: AsFd {
    /// Whether data is here although the descriptor is not readable.
    fn has_buffered(&self) -> bool;
}

/// A kind of link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LinkKind {
    /// Plain TCP: zero-copy, for trusted networks.
    #[default]
    Tcp,
    /// TCP with TLS 1.3, both sides authenticated.
    Tls,
    /// QUIC, both sides authenticated.
    Quic,
    /// A unix socket, for two daemons on one host.
    Unix,
}

impl LinkKind {
    /// Whether both sides prove who they are.
    #[must_use]
    pub const fn authenticates(self) -> bool {
        matches!(self, Self::Tls | Self::Quic)
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Quic => "quic",
            Self::Unix => "unix",
        })
    }
}

impl FromStr for LinkKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "tls" => Ok(Self::Tls),
            "unix" => Ok(Self::Unix),
            "quic" => Ok(Self::Quic),
            _ => Err(format!("unknown link {text:?}; there are tcp, tls, quic and unix")),
        }
    }
}

/// What keeps others out of a link over the network.
#[derive(Clone, Debug)]
pub enum Protection {
    /// Nothing: plain TCP stays on this host.
    Loopback,
    /// Nothing, and the operator trusts the network.
    Insecure,
    /// Both sides prove who they are.
    Authenticated(Arc<Credentials>),
}

/// Where a peer listens.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// Host and port, resolved.
    Tcp(SocketAddr),
    /// Path of a unix socket.
    Unix(PathBuf),
    /// Host and port, over TLS.
    Tls(SecureEndpoint),
    /// Host and port, over QUIC.
    Quic(SecureEndpoint),
}

/// Where a peer listens that is authenticated.
#[derive(Clone, Debug)]
pub struct SecureEndpoint {
    /// Host and port, resolved.
    pub addr: SocketAddr,
    /// As it was named; a certificate from an authority must be for this.
    pub name: ServerName<'static>,
    /// Who this side is, and whom it talks to.
    pub credentials: Arc<Credentials>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
            Self::Tls(secure) | Self::Quic(secure) => secure.addr.fmt(f),
        }
    }
}

impl Endpoint {
    /// Reads `HOST:PORT` or a socket path, as `kind` wants it.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to do.
    pub fn parse(kind: LinkKind, text: &str, protection: &Protection) -> Result<Self, String> {
        if kind == LinkKind::Unix {
            return Ok(Self::Unix(PathBuf::from(text.strip_prefix("unix:").unwrap_or(text))));
        }
        let addr = text
            .to_socket_addrs()
            .map_err(|error| format!("cannot resolve {text:?}: {error}; give HOST:PORT"))?
            .next()
            .ok_or_else(|| format!("{text:?} has no address; give HOST:PORT"))?;
        match (kind, protection) {
            (LinkKind::Tls | LinkKind::Quic, Protection::Authenticated(credentials)) => {
                let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
                let name = ServerName::try_from(host.to_owned()).unwrap_or(ServerName::from(addr.ip()));
                let secure = SecureEndpoint { addr, name, credentials: credentials.clone() };
                Ok(if kind == LinkKind::Tls { Self::Tls(secure) } else { Self::Quic(secure) })
            }
            (LinkKind::Tls | LinkKind::Quic, _) => {
                Err(format!("link {kind} needs to know who this side is and who the peer is"))
            }
            (_, Protection::Loopback) if !addr.ip().is_loopback() => Err(format!(
                "plain tcp to {addr} would carry memory unencrypted and unauthenticated; use --link tls, or on a \
                 trusted network allow it with --insecure"
            )),
            _ => Ok(Self::Tcp(addr)),
        }
    }
}

/// A connection that could not be made or that broke.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answered, or the connection broke.
    #[error("{doing} {endpoint}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With whom.
        endpoint: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The other side is no peer, or refused.
    #[error("handshake with {endpoint}: {source}")]
    Hello {
        /// With whom.
        endpoint: String,
        /// The cause.
        source: HelloError,
    },
    /// One side does not accept the other, or they do not understand each other.
    #[error("handshake with {endpoint}: {source}")]
    Tls {
        /// With whom.
        endpoint: String,
        /// This side's key.
        own: Fingerprint,
        /// The cause.
        source: TlsError,
    },
}

impl LinkError {
    fn tls(secure: &SecureEndpoint, source: TlsError) -> Self {
        Self::Tls { endpoint: secure.addr.to_string(), own: secure.credentials.fingerprint(), source }
    }
}
