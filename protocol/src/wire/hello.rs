//! How a connection begins: who it belongs to, what it is for, which version it speaks.
//!
//! ```text
//!  0  u32  magic 0x4d434c50 ("PLCM")          reply:  0  u32  magic
//!  4  u16  lowest version spoken                      4  u16  version chosen, 0 if refused
//!  6  u16  highest version spoken                     6  u16  0 accepted, else a refusal code
//!  8  u8   role: 1 control, 2 fault, 3 push           8  u64  0
//!  9  u8   low 4 bits: lane number within the role; high 4: how many lanes it has there, less one
//! 10  u16  0: opens a session; else resumes it, for the n-th time
//! 12  u32  page size in bytes
//! 16  16   session id
//! 32  16   session secret
//! ```
//!
//! The control connection opens the session with an id and a secret that its dialler made; lanes of the
//! same session repeat both. So nobody who has not seen the control connection's bytes can join a session. When a
//! connection is lost behind the switchover, the dialler makes all of them anew, with a higher attempt: connections
//! of different attempts are never mixed. A session has one control connection, and as many fault and push lanes as
//! its dialler makes; more than one of a role needs version 3.

use subtle::ConstantTimeEq;

use super::codec::{CodecError, Decoder, Encoder};
use super::limits;
use crate::units::PAGE_SIZE;

const MAGIC: u32 = 0x4d43_4c50;
/// Bytes in a hello.
pub const HELLO_LEN: usize = 48;
/// Bytes in the reply to a hello.
pub const HELLO_REPLY_LEN: usize = 16;

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Offer, images, switchover, release.
    Control,
    /// Demand requests and their answers.
    Fault,
    /// Pushed pages one way, acknowledgements the other.
    Push,
}

impl Role {
    const fn number(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Fault => 2,
            Self::Push => 3,
        }
    }

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Control),
            2 => Some(Self::Fault),
            3 => Some(Self::Push),
            _ => None,
        }
    }
}

/// Names a session; shown in logs and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Proves that a lane belongs to its session; never shown. Comparing two takes as long whatever they hold.
#[derive(Clone, Copy)]
pub struct SessionSecret(pub [u8; 16]);

impl PartialEq for SessionSecret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SessionSecret {}

impl std::fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionSecret(..)")
    }
}

/// The first bytes of a connection, from the side that dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub role: Role,
    /// Lane number within the role, from 0.
    pub lane: u8,
    /// How many lanes the session has in this role, from 1 to [`limits::LANES_MAX`].
    pub lanes: u8,
    /// 0 for the connections that a session begins with; all that replace them have another number.
    pub attempt: u16,
    /// The session it opens (control) or joins.
    pub session: SessionId,
    /// The session's secret.
    pub secret: SessionSecret,
    /// Lowest and highest version spoken.
    pub versions: (u16, u16),
    /// Page size of the dialler.
    pub page_size: u32,
}

/// Why a hello was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No version in common.
    #[error("peer speaks other protocol versions; install the same release on both hosts")]
    Version,
    /// Other page size.
    #[error("peer has another page size than 4096 bytes; a process cannot move between them")]
    PageSize,
    /// No such session, or a wrong secret: the peer is not told which.
    #[error("peer knows no such session")]
    Session,
    /// The peer has as many sessions as it takes.
    #[error("peer is busy with another move; try again when it is done")]
    Busy,
    /// The session cannot be resumed yet: the peer has not heard of the commit.
    #[error("peer cannot resume the session at this point")]
    NotYet,
    /// The session was rolled back: nothing of it is left at the peer.
    #[error("peer has rolled the move back, nothing of it is left there")]
    RolledBack,
    /// The peer has another kind of link.
    #[error("peer uses another kind of link; give both sides the same --link")]
    Link,
    /// A code from a later release.
    #[error("peer refused with code {0}")]
    Other(u16),
}

impl Refusal {
    const fn code(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::PageSize => 2,
            Self::Session => 3,
            Self::Busy => 4,
            Self::Link => 5,
            Self::NotYet => 6,
            Self::RolledBack => 7,
            Self::Other(code) => code,
        }
    }

    const fn from_code(code: u16) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::PageSize,
            3 => Self::Session,
            4 => Self::Busy,
            5 => Self::Link,
            6 => Self::NotYet,
            7 => Self::RolledBack,
            other => Self::Other(other),
        }
    }
}

/// A hello or reply that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Other magic: this is no peer of ours.
    #[error("not a move session (magic {0:#x}); is the port right?")]
    Magic(u32),
    /// TLS, where none is spoken.
    #[error("the peer speaks tls, this side does not; give both sides the same --link")]
    Tls,
    /// A field has no meaning.
    #[error("hello is malformed")]
    Malformed(#[from] CodecError),
    /// The peer said no.
    #[error("refused by the peer")]
    Refused(#[from] Refusal),
}

impl Hello {
    /// A hello of this build, for the only connection of its role.
    #[must_use]
    pub const fn new(role: Role, session: SessionId, secret: SessionSecret) -> Self {
        #[allow(clippy::cast_possible_truncation)]
        let page_size = PAGE_SIZE as u32;
        let versions = (limits::VERSION_MIN, limits::VERSION_MAX);
        Self { role, lane: 0, lanes: 1, attempt: 0, session, secret, versions, page_size }
    }

    /// The hello of lane `lane` of `lanes` of its role.
    #[must_use]
    pub const fn of_lane(self, lane: u8, lanes: u8) -> Self {
        // Before that, a second lane of a role took the place of the first.
        let lowest = if lanes > 1 { limits::VERSION_OF_LANES } else { self.versions.0 };
        Self { lane, lanes, versions: (lowest, self.versions.1), ..self }
    }

    /// Whether it replaces a connection that was lost.
    #[must_use]
    pub const fn resumes(&self) -> bool {
        self.attempt != 0
    }

    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut body = Encoder::default();
        body.u32(MAGIC)
            .u16(self.versions.0)
            .u16(self.versions.1)
            .u8(self.role.number())
            .u8(self.lane | self.lanes.wrapping_sub(1) << 4)
            .u16(self.attempt)
            .u32(self.page_size)
            .bytes(&self.session.0)
            .bytes(&self.secret.0);
        let mut out = [0; HELLO_LEN];
        out.copy_from_slice(&body.finish());
        out
    }

    /// Reads a hello.
    ///
    /// # Errors
    /// [`HelloError::Magic`], [`HelloError::Malformed`].
    pub fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Self, HelloError> {
        let mut fields = Decoder::new(bytes);
        let magic = fields.u32("magic")?;
        if magic != MAGIC {
            return Err(if is_tls(bytes) { HelloError::Tls } else { HelloError::Magic(magic) });
        }
        let versions = (fields.u16("version")?, fields.u16("version")?);
        let number = fields.u8("role")?;
        let role = Role::from_number(number)
            .ok_or(CodecError::Meaning { field: "role", value: u64::from(number) })?;
        let lanes = fields.u8("lane")?;
        let (lane, lanes) = (lanes & 15, (lanes >> 4) + 1);
        if lane >= lanes || lanes > limits::LANES_MAX || role == Role::Control && lanes > 1 {
            return Err(CodecError::Meaning { field: "lane", value: u64::from(lane) }.into());
        }
        let attempt = fields.u16("attempt")?;
        let page_size = fields.u32("page size")?;
        let session = SessionId(fields.array("session")?);
        let secret = SessionSecret(fields.array("secret")?);
        Ok(Self { role, lane, lanes, attempt, session, secret, versions, page_size })
    }

    /// The version both speak.
    ///
    /// # Errors
    /// [`Refusal::Version`], [`Refusal::PageSize`].
    pub fn negotiate(&self) -> Result<u16, Refusal> {
        let version = self.versions.1.min(limits::VERSION_MAX);
        if version < self.versions.0.max(limits::VERSION_MIN) {
            return Err(Refusal::Version);
        }
        if self.page_size as usize != PAGE_SIZE {
            return Err(Refusal::PageSize);
        }
        Ok(version)
    }
}

/// Whether a connection begins like one of ours that is not encrypted.
#[must_use]
pub fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC.to_le_bytes())
}

/// Whether a connection begins with a TLS handshake record.
fn is_tls(bytes: &[u8]) -> bool {
    bytes.starts_with(&[22, 3])
}

/// The bytes of a reply.
#[must_use]
pub fn encode_reply(verdict: Result<u16, Refusal>) -> [u8; HELLO_REPLY_LEN] {
    let (version, code) = match verdict {
        Ok(version) => (version, 0),
        Err(refusal) => (0, refusal.code()),
    };
    let mut body = Encoder::default();
    body.u32(MAGIC).u16(version).u16(code).u64(0);
    let mut out = [0; HELLO_REPLY_LEN];
    out.copy_from_slice(&body.finish());
    out
}

/// Reads a reply: the version chosen.
///
/// # Errors
/// [`HelloError`]; [`HelloError::Refused`] carries the peer's reason.
pub fn decode_reply(bytes: &[u8; HELLO_REPLY_LEN]) -> Result<u16, HelloError> {
    let mut fields = Decoder::new(bytes);
    let magic = fields.u32("magic")?;
    if magic != MAGIC {
        return Err(HelloError::Magic(magic));
    }
    let version = fields.u16("version")?;
    match fields.u16("refusal")? {
        0 if (limits::VERSION_MIN..=limits::VERSION_MAX).contains(&version) => Ok(version),
        0 => Err(Refusal::Version.into()),
        code => Err(Refusal::from_code(code).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello::new(Role::Push, SessionId([7; 16]), SessionSecret([9; 16])).of_lane(3, 4)
    }

    #[test]
    fn round_trip() {
        assert_eq!(Hello::decode(&hello().encode()).unwrap(), hello());
        let again = Hello { attempt: 7, ..hello() };
        assert_eq!(Hello::decode(&again.encode()).unwrap(), again);
        assert!(again.resumes() && !hello().resumes());
        assert_eq!(hello().negotiate(), Ok(limits::VERSION_MAX));
        let only = Hello::new(Role::Push, SessionId([7; 16]), SessionSecret([9; 16]));
        assert_eq!(
            (only.encode()[9], only.versions.0),
            (0, limits::VERSION_MIN),
            "as before there were several"
        );
        assert_eq!(decode_reply(&encode_reply(Ok(limits::VERSION_MAX))).unwrap(), limits::VERSION_MAX);
    }

    #[test]
    fn refuses_other_magic_role_version_and_page_size() {
        let mut bytes = hello().encode();
        bytes[0] ^= 1;
        assert!(matches!(Hello::decode(&bytes), Err(HelloError::Magic(_))));
        let mut bytes = hello().encode();
        bytes[8] = 9;
        assert!(matches!(Hello::decode(&bytes), Err(HelloError::Malformed(_))));
        for (role, lanes) in [(Role::Push, 0x34), (Role::Push, 0xf0), (Role::Control, 0x10)] {
            let mut bytes = hello().encode();
            (bytes[8], bytes[9]) = (role.number(), lanes);
            assert!(matches!(Hello::decode(&bytes), Err(HelloError::Malformed(_))), "{lanes:#x}");
        }
        let newer = Hello { versions: (limits::VERSION_MAX + 1, limits::VERSION_MAX + 1), ..hello() };
        assert_eq!(newer.negotiate(), Err(Refusal::Version));
        let large = Hello { page_size: 65536, ..hello() };
        assert_eq!(large.negotiate(), Err(Refusal::PageSize));
    }

    #[test]
    fn a_connection_that_begins_with_tls_is_told_apart() {
        let mut bytes = hello().encode();
        assert!(is_ours(&bytes) && is_ours(&encode_reply(Ok(1))));
        bytes[..5].copy_from_slice(&[22, 3, 1, 2, 0]);
        assert!(!is_ours(&bytes));
        assert_eq!(Hello::decode(&bytes), Err(HelloError::Tls));
    }

    #[test]
    fn a_refusal_reaches_the_dialler() {
        for code in 1..=6 {
            let refusal = Refusal::from_code(code);
            assert!(!matches!(refusal, Refusal::Other(_)) && refusal.code() == code);
            let reply = decode_reply(&encode_reply(Err(refusal)));
            assert_eq!(reply, Err(HelloError::Refused(refusal)));
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        assert!(!format!("{:?}", hello()).contains("secret: SessionSecret([9"));
    }
}
