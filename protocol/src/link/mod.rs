//! How frames travel.
//!
//! A session has one control connection, one fault lane and at least one push lane, all dialled by the
//! source. Each is a [`Stream`]; what differs between them is how the socket is tuned for its role.

mod control;
mod stream;

pub use control::{ControlChannel, ControlError};
pub use stream::{Listener, Stream};

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use crate::wire::hello::HelloError;

/// A kind of link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LinkKind {
    /// Plain TCP: zero-copy, for trusted networks.
    #[default]
    Tcp,
    /// A unix socket, for two daemons on one host.
    Unix,
}

impl FromStr for LinkKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "unix" => Ok(Self::Unix),
            "tls" | "quic" => Err(format!(
                "link {text} is not in this release; use --link tcp inside a trusted network or tunnel"
            )),
            _ => Err(format!("unknown link {text:?}; this release has tcp and unix")),
        }
    }
}

/// Where a peer listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Host and port, resolved.
    Tcp(SocketAddr),
    /// Path of a unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Endpoint {
    /// Reads `HOST:PORT` or a socket path, as `kind` wants it. Plain TCP off loopback needs `insecure`.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to do.
    pub fn parse(kind: LinkKind, text: &str, insecure: bool) -> Result<Self, String> {
        if kind == LinkKind::Unix {
            return Ok(Self::Unix(PathBuf::from(text.strip_prefix("unix:").unwrap_or(text))));
        }
        let addr = text
            .to_socket_addrs()
            .map_err(|error| format!("cannot resolve {text:?}: {error}; give HOST:PORT"))?
            .next()
            .ok_or_else(|| format!("{text:?} has no address; give HOST:PORT"))?;
        if !insecure && !addr.ip().is_loopback() {
            return Err(format!(
                "plain tcp to {addr} would carry memory unencrypted and unauthenticated; \
                 on a trusted network allow it with --insecure"
            ));
        }
        Ok(Self::Tcp(addr))
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
}
