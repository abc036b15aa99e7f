//! TLS 1.3 over TCP, with both sides authenticated.
//!
//! ```text
//!   handshake   the library, on the socket           [`handshake`]
//!   records     a Sealer and an Opener, one lock each [`record`]
//! ```
//!
//! After the handshake the directions share nothing but the socket: who receives never waits for who sends. A lock is
//! held across a system call only against others that go the same way, whose bytes have to wait their turn anyhow.
//!
//! Opened data may be waiting here while the socket has nothing to read. Who polls the descriptor asks
//! [`TlsStream::has_buffered`] first, or has drained the stream before: [`TlsStream::receive_some`] hands out
//! everything there is, as far as the buffer reaches.

pub mod fuzzing;
mod handshake;
mod record;

use std::fmt;
use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::sys::socket::{MsgFlags, SockaddrStorage, recv, sendmsg};
use rustls::AlertDescription;
use rustls::client::UnbufferedClientConnection;
use rustls::crypto::cipher::OutboundChunks;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use socket2::SockRef;

use self::handshake::{Done, Keys};
use self::record::{Opened, Opener, RECORD_MAX, RECORDS_PER_KEY, Sealer};
use super::credentials::{Credentials, Fingerprint};

pub(super) use self::record::PeerAlert;

/// Records that go to the kernel in one call: 256 KiB, a frame of the push.
const BATCH: usize = 16;
/// Bytes that one receive may take: seven whole records. More would leave the processor's second-level cache before
/// it was opened.
const INCOMING: usize = 128 << 10;

/// A TLS connection that does not come about, or that the peer ended.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// We do not know the peer.
    #[error("the peer's key has the fingerprint {0}, which is not pinned here")]
    NotPinned(Fingerprint),
    /// The peer does not know us.
    #[error("the peer does not accept the key of this side ({0:?})")]
    NotAccepted(AlertDescription),
    /// The peer speaks, but without TLS.
    #[error("the peer speaks plain tcp, this side tls")]
    Plain,
    /// The handshake failed otherwise.
    #[error("tls: {0}")]
    Library(rustls::Error),
    /// The connection broke, or the peer was too slow.
    #[error("tls handshake: {0}")]
    Io(#[from] io::Error),
}

impl TlsError {
    pub(super) fn from_alert(alert: AlertDescription) -> Self {
        match alert {
            AlertDescription::AccessDenied
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRequired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::UnsupportedCertificate => Self::NotAccepted(alert),
            _ => Self::Library(rustls::Error::AlertReceived(alert)),
        }
    }

    /// What an error of the established stream says of the handshake: a client learns only behind it that it was
    /// not accepted.
    pub(super) fn of_stream(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<PeerAlert>()) {
            Some(PeerAlert(alert)) => Self::from_alert(*alert),
            None => Self::Io(error),
        }
    }
}

/// An established connection. Clones are the same connection.
#[derive(Clone)]
pub struct TlsStream(Arc<Shared>);

struct Shared {
    socket: TcpStream,
    keys: Mutex<Box<dyn Keys>>,
    outgoing: Mutex<Outgoing>,
    incoming: Mutex<Incoming>,
    /// The peer has asked for a new key of ours.
    update_asked: AtomicBool,
    records_per_key: u64,
}

struct Outgoing {
    sealer: Sealer,
    batch: Vec<Vec<u8>>,
    /// A record that the kernel took in part, and how many bytes of the caller's it stands for.
    unsent: Vec<u8>,
    stands_for: usize,
    /// Part of a record went out and the rest did not: nothing can follow it.
    broken: bool,
}

struct Incoming {
    opener: Opener,
    buffer: Vec<u8>,
    /// Received and not opened yet: a place in `buffer`.
    start: usize,
    end: usize,
    /// Opened and not handed out.
    left: Vec<u8>,
    handed: usize,
    farewell: bool,
    /// What came was not the peer's: nothing behind it is believed.
    forged: bool,
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TlsStream").field(&self.0.socket).finish()
    }
}

/// Locks what stays whole when its holder panics: a stream that lost a record fails at the next one.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn library(error: rustls::Error) -> io::Error {
    io::Error::other(error)
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

impl TlsStream {
    /// Shakes hands with the peer that `socket` was connected to, which must be `name` if authorities vouch for it.
    ///
    /// # Errors
    /// [`TlsError`]. That the peer does not accept us shows at the first receive.
    pub fn dial(
        socket: TcpStream,
        name: ServerName<'static>,
        credentials: &Credentials,
        deadline: Instant,
    ) -> Result<Self, TlsError> {
        let connection = UnbufferedClientConnection::new(credentials.client.clone(), name)?;
        let done = handshake::shake(&socket, connection, deadline)?;
        Ok(Self::new(socket, done, RECORDS_PER_KEY)?)
    }

    /// Shakes hands with a peer that connected.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn accept(socket: TcpStream, credentials: &Credentials, deadline: Instant) -> Result<Self, TlsError> {
        let connection = UnbufferedServerConnection::new(credentials.server.clone())?;
        let done = handshake::shake(&socket, connection, deadline)?;
        Ok(Self::new(socket, done, RECORDS_PER_KEY)?)
    }

    fn new(socket: TcpStream, done: Done, records_per_key: u64) -> io::Result<Self> {
        let Done { suite, secrets, keys, early, sealed } = done;
        let algorithm = suite.aead_alg;
        let end = sealed.len();
        let mut buffer = sealed;
        buffer.resize(INCOMING.max(end), 0);
        let incoming = Incoming {
            opener: Opener::new(algorithm, secrets.rx)?,
            buffer,
            start: 0,
            end,
            left: early,
            handed: 0,
            farewell: false,
            forged: false,
        };
        let outgoing = Outgoing {
            sealer: Sealer::new(algorithm, secrets.tx)?,
            batch: Vec::with_capacity(BATCH),
            unsent: Vec::new(),
            stands_for: 0,
            broken: false,
        };
        Ok(Self(Arc::new(Shared {
            socket,
            keys: Mutex::new(keys),
            outgoing: Mutex::new(outgoing),
            incoming: Mutex::new(incoming),
            update_asked: AtomicBool::new(false),
            records_per_key,
        })))
    }

    /// The socket underneath, for its address.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        &self.0.socket
    }

    /// Says farewell where that does not wait, and ends the connection in both directions.
    pub fn shutdown(&self) {
        self.0.say_farewell();
        // An error means that it has ended already.
        let _ = SockRef::from(&self.0.socket).shutdown(std::net::Shutdown::Both);
    }

    /// Sends all of `parts`, one behind the other.
    ///
    /// # Errors
    /// The errno of `sendmsg(2)`; nothing can be sent after it.
    pub fn send_all(&self, parts: &[&[u8]]) -> io::Result<()> {
        let mut outgoing = lock(&self.0.outgoing);
        let outgoing = &mut *outgoing;
        outgoing.finish_unsent(&self.0.socket)?;
        let mut rest = OutboundChunks::new(parts);
        while !rest.is_empty() {
            self.0.renew_key(outgoing)?;
            while !rest.is_empty() && outgoing.batch.len() < BATCH {
                let (record, behind) = rest.split_at(RECORD_MAX);
                let sealed = outgoing.sealer.seal(record)?;
                outgoing.batch.push(sealed);
                rest = behind;
            }
            outgoing.send_batch(&self.0.socket)?;
        }
        Ok(())
    }

    /// Sends what the kernel takes at once: how many bytes of `bytes`, 0 if none. Who is answered less than all of
    /// it calls again with the rest: its beginning may be in a record that has begun to go out.
    ///
    /// # Errors
    /// The errno of `sendmsg(2)`, `EAGAIN` excepted.
    pub fn send_some(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut outgoing = lock(&self.0.outgoing);
        if outgoing.unsent.is_empty() {
            self.0.renew_key(&mut outgoing)?;
            let record = &bytes[..bytes.len().min(RECORD_MAX)];
            let sealed = outgoing.sealer.seal(OutboundChunks::Single(record))?;
            // What the key's renewal put there goes first.
            if outgoing.batch.is_empty() {
                outgoing.unsent = sealed;
            } else {
                outgoing.unsent = outgoing.batch.drain(..).chain([sealed]).flatten().collect();
            }
            outgoing.stands_for = record.len();
        }
        if outgoing.send_unsent(&self.0.socket, MsgFlags::MSG_DONTWAIT)? {
            Ok(std::mem::take(&mut outgoing.stands_for))
        } else {
            Ok(0)
        }
    }

    /// Receives at least one byte, waiting for it; 0 is the peer's farewell.
    ///
    /// # Errors
    /// `ConnectionAborted` if the connection ends without a farewell, or with an alert; `InvalidData` if it was
    /// tampered with; the errno of `recv(2)`.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut incoming = lock(&self.0.incoming);
        loop {
            let filled = self.0.hand_out(&mut incoming, buffer)?;
            if filled > 0 || incoming.farewell || buffer.is_empty() {
                return Ok(filled);
            }
            incoming.fill(&self.0.socket, MsgFlags::empty())?;
        }
    }

    /// Receives what is there without waiting: `None` if nothing is, `Some(0)` at the peer's farewell. Unless
    /// `buffer` is filled nothing is left here or in the socket.
    ///
    /// # Errors
    /// As [`TlsStream::receive`].
    pub fn receive_some(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut incoming = lock(&self.0.incoming);
        let mut filled = 0;
        let mut drained = false;
        loop {
            filled += self.0.hand_out(&mut incoming, &mut buffer[filled..])?;
            if filled == buffer.len() || incoming.farewell {
                return Ok(Some(filled));
            }
            if drained {
                return Ok((filled > 0).then_some(filled));
            }
            let room = incoming.make_room();
            let got = incoming.fill(&self.0.socket, MsgFlags::MSG_DONTWAIT);
            match got {
                // Less than there was room for: the socket is empty.
                Ok(got) => drained = got < room,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => drained = true,
                // What came before an abrupt end is handed out first; the end comes again.
                Err(_) if filled > 0 => return Ok(Some(filled)),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether data, or the peer's farewell, is here without the socket being readable.
    #[must_use]
    pub fn has_buffered(&self) -> bool {
        // Who holds the lock is receiving, and takes it.
        let Ok(incoming) = self.0.incoming.try_lock() else { return false };
        let sealed = &incoming.buffer[incoming.start..incoming.end];
        incoming.handed < incoming.left.len()
            || incoming.farewell
            // What is malformed is news as well.
            || !matches!(Opener::whole(sealed), Ok(None))
    }
}

impl Shared {
    /// Goes over to a new key where the old one is worn, or the peer asks for it. What tells the peer is put into
    /// the batch, in front of what is sealed next.
    fn renew_key(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        if outgoing.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if outgoing.sealer.is_worn(self.records_per_key) || self.update_asked.swap(false, Ordering::Relaxed) {
            let secrets = lock(&self.keys).next_to_send().map_err(library)?;
            let message = outgoing.sealer.update(secrets)?;
            outgoing.batch.push(message);
        }
        Ok(())
    }

    /// Fills `buffer` from what was received, as far as it goes.
    fn hand_out(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> io::Result<usize> {
        if incoming.forged {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer's records were tampered with"));
        }
        let handed = self.open_into(incoming, buffer);
        incoming.forged = handed.is_err();
        handed
    }

    fn open_into(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = incoming.hand_out_left(buffer);
        while filled < buffer.len() && !incoming.farewell {
            let Incoming { opener, buffer: sealed, start, end, left, .. } = &mut *incoming;
            let Some(len) = Opener::whole(&sealed[*start..*end])? else { break };
            let at = *start..*start + len;
            *start = at.end;
            match opener.open(sealed, at)? {
                Opened::Data(data) => {
                    let data = &sealed[data];
                    let fits = data.len().min(buffer.len() - filled);
                    buffer[filled..filled + fits].copy_from_slice(&data[..fits]);
                    filled += fits;
                    left.extend_from_slice(&data[fits..]);
                }
                Opened::KeyUpdate { requested } => {
                    opener.update(lock(&self.keys).next_to_receive().map_err(library)?)?;
                    if requested {
                        self.update_asked.store(true, Ordering::Relaxed);
                    }
                }
                Opened::Farewell => incoming.farewell = true,
            }
        }
        Ok(filled)
    }

    fn say_farewell(&self) {
        // Who holds the lock is in the middle of sending: the peer will see the end without a farewell.
        let Ok(mut outgoing) = self.outgoing.try_lock() else { return };
        if outgoing.broken {
            return;
        }
        if let Ok(true) = outgoing.send_unsent(&self.socket, MsgFlags::MSG_DONTWAIT) {
            if let Ok(farewell) = outgoing.sealer.farewell() {
                outgoing.unsent = farewell;
                let _ = outgoing.send_unsent(&self.socket, MsgFlags::MSG_DONTWAIT);
            }
        }
        outgoing.broken = true;
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.say_farewell();
    }
}

impl Outgoing {
    fn finish_unsent(&mut self, socket: &TcpStream) -> io::Result<()> {
        self.send_unsent(socket, MsgFlags::empty()).map(drop)
    }

    /// Sends what is left of a record; whether nothing is left.
    fn send_unsent(&mut self, socket: &TcpStream, flags: MsgFlags) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            match send(socket, &[IoSlice::new(&self.unsent)], flags) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if flags.contains(MsgFlags::MSG_DONTWAIT) && is_not_now(&error) => {
                    return Ok(false);
                }
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
        Ok(true)
    }

    /// Sends every record of the batch, and empties it.
    fn send_batch(&mut self, socket: &TcpStream) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); BATCH + 1];
        let mut done = (0, 0);
        while done.0 < self.batch.len() {
            let mut count = 0;
            for (slice, record) in slices.iter_mut().zip(&self.batch[done.0..]) {
                let from = if count == 0 { done.1 } else { 0 };
                *slice = IoSlice::new(&record[from..]);
                count += 1;
            }
            let mut sent = match send(socket, &slices[..count], MsgFlags::empty()) {
                Ok(sent) => sent,
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            };
            while let Some(left) = self.batch.get(done.0).map(|record| record.len() - done.1) {
                if sent < left {
                    done.1 += sent;
                    break;
                }
                sent -= left;
                done = (done.0 + 1, 0);
            }
        }
        self.batch.clear();
        Ok(())
    }
}

impl Incoming {
    fn hand_out_left(&mut self, buffer: &mut [u8]) -> usize {
        let left = &self.left[self.handed..];
        let fits = left.len().min(buffer.len());
        buffer[..fits].copy_from_slice(&left[..fits]);
        self.handed += fits;
        if self.handed == self.left.len() {
            self.left.clear();
            self.handed = 0;
        }
        fits
    }

    /// Moves what has not been opened to the front; the room behind it, which a record always has.
    fn make_room(&mut self) -> usize {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.buffer.len() - self.end
    }

    /// Receives behind what is there.
    fn fill(&mut self, socket: &TcpStream, flags: MsgFlags) -> io::Result<usize> {
        self.make_room();
        let got = loop {
            match recv(socket.as_raw_fd(), &mut self.buffer[self.end..], flags) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        if got == 0 {
            // Somebody on the way may have cut it: only a farewell is an end.
            let what = "the connection ended without the peer's farewell";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, what));
        }
        self.end += got;
        Ok(got)
    }
}

fn is_not_now(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn send(socket: &TcpStream, slices: &[IoSlice<'_>], flags: MsgFlags) -> io::Result<usize> {
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<SockaddrStorage>(socket.as_raw_fd(), slices, &[], flags, None) {
            Err(nix::Error::EINTR) => {}
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests;
