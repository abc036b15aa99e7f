//! The TLS handshake over a blocking socket, within a time limit.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use rustls::client::UnbufferedClientConnection;
use rustls::kernel::KernelConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets};

use super::TlsError;
use crate::link::credentials::{NotPinned, no_tls13};
use crate::wire::hello::is_ours;

/// Most bytes that a handshake may leave unread: flights with certificate chains have a few KiB, and what comes
/// right behind the last one is kept.
const INCOMING_MAX: usize = 64 << 10;

/// A connection of the library before its keys are taken out: both sides of it have the same calls, but no common
/// trait.
pub(super) trait Handshaking {
    type Data: Send + 'static;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn finish(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error>;
}

impl Handshaking for UnbufferedClientConnection {
    type Data = rustls::client::ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn finish(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error> {
        self.dangerous_into_kernel_connection()
    }
}

impl Handshaking for UnbufferedServerConnection {
    type Data = rustls::server::ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn finish(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error> {
        self.dangerous_into_kernel_connection()
    }
}

/// The keys of a connection, one after the other.
pub(super) trait Keys: Send {
    fn next_to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
    fn next_to_receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
}

impl<D: Send> Keys for KernelConnection<D> {
    fn next_to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_tx_secret()
    }

    fn next_to_receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_rx_secret()
    }
}

/// A handshake that is done.
pub(super) struct Done {
    pub(super) suite: &'static rustls::Tls13CipherSuite,
    pub(super) secrets: ExtractedSecrets,
    pub(super) keys: Box<dyn Keys>,
    /// Data of the peer that came with the end of the handshake.
    pub(super) early: Vec<u8>,
    /// Bytes of its records that are still sealed.
    pub(super) sealed: Vec<u8>,
}

/// Shakes hands until `deadline`.
pub(super) fn shake<H: Handshaking>(
    socket: &TcpStream,
    mut connection: H,
    deadline: Instant,
) -> Result<Done, TlsError> {
    let mut incoming: Vec<u8> = Vec::with_capacity(INCOMING_MAX);
    let mut outgoing = Vec::new();
    let mut early = Vec::new();
    let mut begun = false;
    loop {
        let UnbufferedStatus { discard, state } = connection.process(&mut incoming);
        let mut wants_more = false;
        match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, &mut outgoing)?,
            Ok(ConnectionState::TransmitTlsData(data)) => {
                send(socket, &outgoing, deadline)?;
                outgoing.clear();
                data.done();
            }
            Ok(ConnectionState::BlockedHandshake) => wants_more = true,
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    early.extend_from_slice(record?.payload);
                }
            }
            Ok(ConnectionState::WriteTraffic(_)) => {
                incoming.drain(..discard);
                let (secrets, keys) = connection.finish()?;
                let suite = keys.negotiated_cipher_suite().tls13().ok_or_else(no_tls13)?;
                return Ok(Done { suite, secrets, keys: Box::new(keys), early, sealed: incoming });
            }
            Ok(_) => return Err(TlsError::Io(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => {
                tell_why(socket, &mut connection, deadline);
                return Err(error.into());
            }
        }
        incoming.drain(..discard);
        if wants_more {
            receive(socket, &mut incoming, deadline)?;
            // Nothing of TLS begins like our hello or its reply.
            if !begun && is_ours(&incoming) {
                return Err(TlsError::Plain);
            }
            begun = true;
        }
    }
}

fn encode<D>(
    data: &mut rustls::unbuffered::EncodeTlsData<'_, D>,
    outgoing: &mut Vec<u8>,
) -> Result<(), TlsError> {
    let used = outgoing.len();
    match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(needed)) => {
            outgoing.resize(used + needed.required_size, 0);
            data.encode(&mut outgoing[used..]).map_err(|error| Error::General(error.to_string()))?;
            Ok(())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(Error::General(error.to_string()).into()),
    }
}

/// Sends the alert that goes with a failed handshake, so that the peer can say why, too.
fn tell_why<H: Handshaking>(socket: &TcpStream, connection: &mut H, deadline: Instant) {
    let mut outgoing = Vec::new();
    if let Ok(ConnectionState::EncodeTlsData(mut data)) = connection.process(&mut []).state {
        if encode(&mut data, &mut outgoing).is_ok() {
            let _ = send(socket, &outgoing, deadline);
        }
    }
}

fn left(deadline: Instant) -> io::Result<std::time::Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn send(mut socket: &TcpStream, bytes: &[u8], deadline: Instant) -> io::Result<()> {
    socket.set_write_timeout(Some(left(deadline)?))?;
    socket.write_all(bytes)
}

fn receive(mut socket: &TcpStream, incoming: &mut Vec<u8>, deadline: Instant) -> io::Result<()> {
    let filled = incoming.len();
    if filled >= INCOMING_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the handshake is too long"));
    }
    socket.set_read_timeout(Some(left(deadline)?))?;
    incoming.resize(INCOMING_MAX, 0);
    let got = loop {
        match socket.read(&mut incoming[filled..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                break Err(io::ErrorKind::TimedOut.into());
            }
            other => break other,
        }
    };
    incoming.truncate(filled + *got.as_ref().unwrap_or(&0));
    if got? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

impl From<Error> for TlsError {
    fn from(error: Error) -> Self {
        match &error {
            Error::AlertReceived(alert) => Self::from_alert(*alert),
            _ => match NotPinned::seen_in(&error) {
                Some(seen) => Self::NotPinned(seen),
                None => Self::Library(error),
            },
        }
    }
}

impl Debug for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Done").finish_non_exhaustive()
    }
}
