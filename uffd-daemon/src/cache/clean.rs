//! Which lazy pages are clean, as the source tells it piece by piece.

use protocol::bitmap::Bitmap;
use protocol::criu::limits::MAX_LAZY_PAGES;
use protocol::wire::control::{Clean, Dumped};

/// Pieces that do not make up the clean pages.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CleanError {
    /// More pages than there can be.
    #[error("the source counts {clean} clean pages of {lazy}, which cannot be")]
    Count {
        /// Clean pages.
        clean: u64,
        /// Lazy pages.
        lazy: u64,
    },
    /// A piece that does not follow the one before.
    #[error("the source tells the clean pages from page {said} on, where page {due} was due")]
    Gap {
        /// Where the piece begins.
        said: u64,
        /// Where it should.
        due: u64,
    },
    /// A piece behind the last page.
    #[error("the source tells clean pages behind the last of {0} lazy pages")]
    Behind(u64),
    /// Another number than was said.
    #[error("the source tells {told} clean pages, and counts {counted}")]
    Sum {
        /// By the pieces.
        told: u64,
        /// As it said.
        counted: u64,
    },
}

/// Pieces of the clean pages, as they come.
#[derive(Debug)]
pub struct CleanPages {
    bits: Bitmap,
    /// The first page that no piece has told of.
    due: u64,
    told: u64,
    counted: u64,
}

impl CleanPages {
    /// Those that `dumped` announces.
    ///
    /// # Errors
    /// [`CleanError::Count`].
    pub fn announced(dumped: &Dumped) -> Result<Self, CleanError> {
        let Dumped { lazy_pages: lazy, clean_pages: clean, .. } = *dumped;
        if clean > lazy || lazy > MAX_LAZY_PAGES {
            return Err(CleanError::Count { clean, lazy });
        }
        Ok(Self { bits: Bitmap::clear(lazy), due: 0, told: 0, counted: clean })
    }

    /// Whether pieces are still missing. If no page is clean, there are none.
    #[must_use]
    pub const fn is_missing(&self) -> bool {
        self.counted > 0 && self.due < self.bits.len()
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// [`CleanError`].
    pub fn take(&mut self, piece: &Clean) -> Result<(), CleanError> {
        // An empty piece would leave everything as it is, again and again.
        if piece.first != self.due || piece.bits.is_empty() {
            return Err(CleanError::Gap { said: piece.first, due: self.due });
        }
        if !self.bits.set_bytes(piece.first, &piece.bits) {
            return Err(CleanError::Behind(self.bits.len()));
        }
        self.due += piece.bits.len() as u64 * 8;
        self.told += piece.bits.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        if self.told > self.counted || (!self.is_missing() && self.told < self.counted) {
            return Err(CleanError::Sum { told: self.told, counted: self.counted });
        }
        Ok(())
    }

    /// All of them, once no piece is missing.
    #[must_use]
    pub fn into_bits(self) -> Bitmap {
        self.bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announced(lazy_pages: u64, clean_pages: u64) -> Result<CleanPages, CleanError> {
        CleanPages::announced(&Dumped { images: 0, frozen_us: 0, lazy_pages, clean_pages })
    }

    fn piece(first: u64, bits: &[u8]) -> Clean {
        Clean { first, bits: bits.to_vec() }
    }

    #[test]
    fn pieces_make_a_whole() {
        let mut pages = announced(20, 5).unwrap();
        pages.take(&piece(0, &[0x81, 0])).unwrap();
        assert!(pages.is_missing());
        pages.take(&piece(16, &[0x0e])).unwrap();
        assert!(!pages.is_missing());
        let bits = pages.into_bits();
        assert_eq!((0..20).filter(|page| bits.get(*page)).collect::<Vec<_>>(), [0, 7, 17, 18, 19]);
        assert!(!announced(20, 0).unwrap().is_missing(), "no pieces for none");
    }

    #[test]
    fn pieces_that_do_not_fit_are_refused() {
        assert_eq!(announced(4, 5).unwrap_err(), CleanError::Count { clean: 5, lazy: 4 });
        assert!(announced(MAX_LAZY_PAGES + 1, 1).is_err());
        let after = |pieces: &[Clean]| {
            let mut pages = announced(20, 5).unwrap();
            pieces.iter().try_for_each(|piece| pages.take(piece)).unwrap_err()
        };
        assert_eq!(after(&[piece(8, &[1])]), CleanError::Gap { said: 8, due: 0 });
        assert_eq!(after(&[piece(0, &[1]), piece(0, &[1])]), CleanError::Gap { said: 0, due: 8 });
        assert_eq!(after(&[piece(0, &[1]), piece(16, &[1])]), CleanError::Gap { said: 16, due: 8 });
        assert_eq!(after(&[piece(0, &[])]), CleanError::Gap { said: 0, due: 0 });
        assert_eq!(after(&[piece(0, &[1, 0, 0x1f])]), CleanError::Behind(20), "a bit behind the last page");
        assert_eq!(after(&[piece(0, &[1, 0, 0, 0])]), CleanError::Behind(20), "a byte behind the last page");
        assert_eq!(after(&[piece(0, &[0x3f])]), CleanError::Sum { told: 6, counted: 5 });
        assert_eq!(after(&[piece(0, &[1, 0, 0])]), CleanError::Sum { told: 1, counted: 5 });
        let mut pages = announced(20, 1).unwrap();
        pages.take(&piece(0, &[1, 0, 0])).unwrap();
        assert!(pages.take(&piece(24, &[0])).is_err(), "one more");
    }
}
