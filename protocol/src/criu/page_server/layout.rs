//! The two header layouts, and how to tell which one a peer uses.

use super::header::Command;
use crate::criu::version::{self, VersionError};
use crate::units::PAGE_BYTES;

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
    /// How many bytes it takes to [`detect`](Self::detect) it; every header is longer.
    pub const DETECT_LEN: usize = 16;

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

    /// For a server: the layout of a client, from the first [`HeaderLayout::DETECT_LEN`] bytes it sends.
    ///
    /// Bytes 8 to 16 are the address of a page in the compact layout and a page count in the wide one, and no client
    /// asks for as many pages as a page has bytes (CRIU: 1024 at most). Bytes 4 to 8 tell nothing: they are padding
    /// in the wide layout, and what a compiler leaves there need not be zero. Headers that select an image or close
    /// the session have neither address nor count (`None`), and an unknown command tells nothing either.
    #[must_use]
    pub fn detect(first: &[u8]) -> Option<Self> {
        let (command, rest) = first.split_first_chunk()?;
        let (_padding_or_count, rest) = rest.split_first_chunk::<4>()?;
        match Command::split(u32::from_le_bytes(*command)).ok()?.0 {
            Command::Add | Command::Hole | Command::AddF | Command::Get => {}
            Command::Open | Command::Open2 | Command::Parent | Command::Close | Command::ForceClose => {
                return None;
            }
        }
        match u64::from_le_bytes(*rest.first_chunk()?) {
            0 => None,
            address if address % PAGE_BYTES == 0 => Some(Self::Compact),
            _count => Some(Self::Wide),
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

    fn first(words: [u32; 4]) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (slot, word) in bytes.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_first_get_tells_the_layout() {
        assert_eq!(HeaderLayout::detect(&first([7, 1, 0x3f38_b000, 0x7fba])), Some(HeaderLayout::Compact));
        assert_eq!(HeaderLayout::detect(&first([7, 16, 0x40_0000, 0])), Some(HeaderLayout::Compact));
        for padding in [0, 1, 0x5555] {
            assert_eq!(HeaderLayout::detect(&first([7, padding, 1, 0])), Some(HeaderLayout::Wide));
            assert_eq!(HeaderLayout::detect(&first([0x4_0006, padding, 1024, 0])), Some(HeaderLayout::Wide));
        }
    }

    #[test]
    fn a_first_close_or_open_tells_nothing() {
        for command in [3, 4, 5, 0x1023, 0x1024, 0x99] {
            for padding in [0, 0x5555] {
                assert_eq!(HeaderLayout::detect(&first([command, padding, 0, 0])), None, "{command:#x}");
            }
        }
        assert_eq!(HeaderLayout::detect(&first([7, 0, 0, 0])), None);
    }
}
