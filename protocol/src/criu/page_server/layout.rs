//! The two header layouts, and how to tell which one a peer uses.

use super::header::Command;
use crate::criu::version::{self, VersionError};

/// Bytes of the longest header.
pub const MAX_HEADER_LEN: usize = HeaderLayout::Wide.len();

/// Layout of the page-server header: CRIU's C struct, with its padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeaderLayout {
    /// 24 bytes, 32-bit page count: CRIU up to 4.1.1.
    Compact,
    /// 32 bytes, 64-bit page count: CRIU from 4.2 on.
    Wide,
}

#[expect(clippy::len_without_is_empty, reason = "a header is never empty")]
impl HeaderLayout {
    /// Length of a header in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        match self {
            Self::Compact => 24,
            Self::Wide => 32,
        }
    }

    /// The layout of the CRIU whose `criu --version` printed `output`.
    ///
    /// # Errors
    /// [`VersionError`] if the version is missing, or is a development build between the two layouts.
    pub fn from_criu_version(output: &str) -> Result<Self, VersionError> {
        version::header_layout(output)
    }

    /// For a server: the layout of a client, from the first eight bytes it sends.
    ///
    /// Bytes 4 to 8 are the page count in the compact layout and zero padding in the wide one. A count of zero is
    /// usual in headers that select an image or close the session, so those tell nothing (`None`), as does an
    /// unknown command.
    #[must_use]
    pub fn detect(first: &[u8; 8]) -> Option<Self> {
        let (command, second) = first.split_at(4);
        if second != [0; 4] {
            return Some(Self::Compact);
        }
        let command = u32::from_le_bytes(command.try_into().ok()?);
        match Command::split(command).ok()?.0 {
            Command::Add | Command::Hole | Command::AddF | Command::Get => Some(Self::Wide),
            Command::Open | Command::Open2 | Command::Parent | Command::Close | Command::ForceClose => None,
        }
    }
}

impl std::fmt::Display for HeaderLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Compact => "compact",
            Self::Wide => "wide",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_get_tells_the_layout() {
        assert_eq!(HeaderLayout::detect(&[7, 0, 0, 0, 1, 0, 0, 0]), Some(HeaderLayout::Compact));
        assert_eq!(HeaderLayout::detect(&[7, 0, 0, 0, 0, 0, 0, 0]), Some(HeaderLayout::Wide));
        assert_eq!(HeaderLayout::detect(&[6, 0, 4, 0, 0, 0, 0, 0]), Some(HeaderLayout::Wide));
    }

    #[test]
    fn a_first_close_or_open_tells_nothing() {
        for command in [3, 4, 5, 0x23, 0x24] {
            let second = if command > 7 { 0x10 } else { 0 };
            assert_eq!(HeaderLayout::detect(&[command, second, 0, 0, 0, 0, 0, 0]), None, "{command:#x}");
        }
        assert_eq!(HeaderLayout::detect(&[0x99, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
