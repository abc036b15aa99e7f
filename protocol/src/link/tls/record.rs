//! TLS 1.3 records behind the handshake, one direction each.
//!
//! The library makes the keys and seals and opens every record; what is done here is finding where a record begins
//! and ends and counting it. So each direction has a state of its own: a thread that sends and one that receives
//! never wait for each other, records are opened where they were received, and nothing is queued twice.

use std::io;
use std::ops::Range;

use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
    Tls13AeadAlgorithm,
};
use rustls::{AlertDescription, ConnectionTrafficSecrets, ContentType, ProtocolVersion};

/// Bytes of a record header: type, version, length.
const HEADER_LEN: usize = 5;
/// Most plaintext in one record (RFC 8446, 5.1).
pub(super) const RECORD_MAX: usize = 1 << 14;
/// Most bytes behind a record header (RFC 8446, 5.2).
const SEALED_MAX: usize = RECORD_MAX + 256;
/// A handshake message: the sender's next record has its next key.
const KEY_UPDATE: u8 = 24;
/// Records that one key seals at most: RFC 8446, 5.5 allows AES-GCM 2^24.5 full ones.
pub(super) const RECORDS_PER_KEY: u64 = 1 << 24;

/// An alert that ended the connection, other than the peer's farewell.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the peer ended the connection: {0:?}")]
pub(in crate::link) struct PeerAlert(pub(in crate::link) AlertDescription);

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn library(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn keys(
    secrets: ConnectionTrafficSecrets,
) -> io::Result<(rustls::crypto::cipher::AeadKey, rustls::crypto::cipher::Iv)> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(invalid("a cipher of another kind")),
    }
}

/// The sending direction.
pub(super) struct Sealer {
    algorithm: &'static dyn Tls13AeadAlgorithm,
    encrypter: Box<dyn MessageEncrypter>,
    sequence: u64,
}

impl Sealer {
    pub(super) fn new(
        algorithm: &'static dyn Tls13AeadAlgorithm,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> io::Result<Self> {
        let (key, iv) = keys(secrets)?;
        Ok(Self { algorithm, encrypter: algorithm.encrypter(key, iv), sequence })
    }

    /// Whether this key has sealed its share.
    pub(super) const fn is_worn(&self, records: u64) -> bool {
        self.sequence >= records
    }

    /// The bytes of a record with `data`, at most [`RECORD_MAX`] of it.
    pub(super) fn seal(&mut self, data: OutboundChunks<'_>) -> io::Result<Vec<u8>> {
        self.seal_as(ContentType::ApplicationData, data)
    }

    /// The bytes of the farewell.
    pub(super) fn farewell(&mut self) -> io::Result<Vec<u8>> {
        const WARNING: u8 = 1;
        let alert = [WARNING, AlertDescription::CloseNotify.into()];
        self.seal_as(ContentType::Alert, OutboundChunks::Single(&alert))
    }

    /// Tells the peer of the next key, and goes over to it; the bytes to send.
    pub(super) fn update(&mut self, secrets: (u64, ConnectionTrafficSecrets)) -> io::Result<Vec<u8>> {
        const NOT_REQUESTED: u8 = 0;
        let message = [KEY_UPDATE, 0, 0, 1, NOT_REQUESTED];
        let bytes = self.seal_as(ContentType::Handshake, OutboundChunks::Single(&message))?;
        *self = Self::new(self.algorithm, secrets)?;
        Ok(bytes)
    }

    /// The bytes of a record of this type.
    pub(super) fn seal_as(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> io::Result<Vec<u8>> {
        let plain = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        let sealed = self.encrypter.encrypt(plain, self.sequence).map_err(library)?;
        self.sequence += 1;
        Ok(sealed.encode())
    }
}

/// What a record was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Data, at this place of the buffer.
    Data(Range<usize>),
    /// The peer has a new key; it may want one of us.
    KeyUpdate {
        /// The peer asks for a new key of ours.
        requested: bool,
    },
    /// The peer's farewell.
    Farewell,
}

/// The receiving direction.
pub(super) struct Opener {
    algorithm: &'static dyn Tls13AeadAlgorithm,
    decrypter: Box<dyn MessageDecrypter>,
    sequence: u64,
}

impl Opener {
    pub(super) fn new(
        algorithm: &'static dyn Tls13AeadAlgorithm,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> io::Result<Self> {
        let (key, iv) = keys(secrets)?;
        Ok(Self { algorithm, decrypter: algorithm.decrypter(key, iv), sequence })
    }

    /// Goes over to the peer's next key.
    pub(super) fn update(&mut self, secrets: (u64, ConnectionTrafficSecrets)) -> io::Result<()> {
        *self = Self::new(self.algorithm, secrets)?;
        Ok(())
    }

    /// Length of the record at the start of `bytes`, header included, if it is whole.
    ///
    /// # Errors
    /// `InvalidData` for what is no record.
    pub(super) fn whole(bytes: &[u8]) -> io::Result<Option<usize>> {
        let Some(head) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([head[3], head[4]]));
        if head[0] != u8::from(ContentType::ApplicationData) || head[1] != 3 || len > SEALED_MAX {
            return Err(invalid("what came is no TLS record"));
        }
        Ok((bytes.len() >= HEADER_LEN + len).then_some(HEADER_LEN + len))
    }

    /// Opens the record `at` in `buffer`, in place.
    ///
    /// # Errors
    /// `InvalidData` for a record that was changed on its way or has no place here; [`PeerAlert`] for an alert.
    pub(super) fn open(&mut self, buffer: &mut [u8], at: Range<usize>) -> io::Result<Opened> {
        let start = at.start + HEADER_LEN;
        let sealed = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            &mut buffer[start..at.end],
        );
        let record = self.decrypter.decrypt(sealed, self.sequence).map_err(library)?;
        self.sequence += 1;
        match (record.typ, record.payload) {
            (ContentType::ApplicationData, data) => Ok(Opened::Data(start..start + data.len())),
            (ContentType::Alert, [_, description]) => match AlertDescription::from(*description) {
                AlertDescription::CloseNotify => Ok(Opened::Farewell),
                other => Err(io::Error::new(io::ErrorKind::ConnectionAborted, PeerAlert(other))),
            },
            (ContentType::Handshake, [KEY_UPDATE, 0, 0, 1, requested @ (0 | 1)]) => {
                Ok(Opened::KeyUpdate { requested: *requested == 1 })
            }
            _ => Err(invalid("the peer sent a TLS message that has no place here")),
        }
    }
}
