//! Magic words and records: what all image files have in common.
//!
//! ```text
//!   u32 common magic │ u32 magic of the kind │ { u32 length │ protobuf message } ...
//! ```
//!
//! Integers are little-endian. The inventory has no common magic; statistics have the service magic instead.
//! Pages files have no frame at all.

use std::fmt;

use super::error::DecodeError;
use crate::criu::limits::MAX_RECORD_BYTES;

/// First word of every image but the inventory and the service files.
pub const COMMON_MAGIC: u32 = 0x5456_4319;
/// First word of service files (statistics).
pub const SERVICE_MAGIC: u32 = 0x5510_5940;

const WORD: usize = 4;

/// The kinds of image files this project reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// `inventory.img`: one `inventory_entry`.
    Inventory,
    /// `pstree.img`: one `pstree_entry` per task.
    Pstree,
    /// `core-TID.img`: one `core_entry`.
    Core,
    /// `mm-PID.img`: one `mm_entry`.
    Mm,
    /// `pagemap-PID.img`: a `pagemap_head`, then `pagemap_entry`s.
    Pagemap,
    /// `stats-dump` and `stats-restore`: one `stats_entry`.
    Stats,
}

impl ImageKind {
    /// The magic word of this kind.
    #[must_use]
    pub const fn magic(self) -> u32 {
        match self {
            Self::Inventory => 0x5831_3116,
            Self::Pstree => 0x5027_3030,
            Self::Core => 0x5505_3847,
            Self::Mm => 0x5749_2820,
            Self::Pagemap => 0x5608_4025,
            Self::Stats => 0x5709_3306,
        }
    }

    /// The word in front of [`ImageKind::magic`], if this kind has one.
    #[must_use]
    pub const fn leading_magic(self) -> Option<u32> {
        match self {
            Self::Inventory => None,
            Self::Stats => Some(SERVICE_MAGIC),
            Self::Pstree | Self::Core | Self::Mm | Self::Pagemap => Some(COMMON_MAGIC),
        }
    }
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inventory => "inventory",
            Self::Pstree => "pstree",
            Self::Core => "core",
            Self::Mm => "mm",
            Self::Pagemap => "pagemap",
            Self::Stats => "stats",
        })
    }
}

/// The records of an image, as slices of it. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    kind: ImageKind,
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Records<'a> {
    /// Checks the magic words of `image`.
    ///
    /// # Errors
    /// [`DecodeError::ShortMagic`], [`DecodeError::Magic`], or [`DecodeError::VersionOne`] for an image without
    /// the common magic.
    pub fn new(kind: ImageKind, image: &'a [u8]) -> Result<Self, DecodeError> {
        let mut records = Self { kind, rest: image, offset: 0 };
        let short = DecodeError::ShortMagic { kind, found: image.len() };
        let mut found = records.word().ok_or(short)?;
        if let Some(expected) = kind.leading_magic() {
            if found == kind.magic() && expected == COMMON_MAGIC {
                return Err(DecodeError::VersionOne { kind });
            }
            if found != expected {
                return Err(DecodeError::Magic { kind, expected, found });
            }
            found = records.word().ok_or(DecodeError::ShortMagic { kind, found: image.len() })?;
        }
        if found != kind.magic() {
            return Err(DecodeError::Magic { kind, expected: kind.magic(), found });
        }
        Ok(records)
    }

    /// The only record of an image that holds one.
    ///
    /// # Errors
    /// [`DecodeError::RecordMissing`] or [`DecodeError::RecordUnexpected`] if it holds none or more, and what
    /// [`Records::new`] and iteration give.
    pub fn only(kind: ImageKind, image: &'a [u8]) -> Result<&'a [u8], DecodeError> {
        let mut records = Self::new(kind, image)?;
        let record = records.next().ok_or(DecodeError::RecordMissing { kind })??;
        if !records.rest.is_empty() {
            return Err(DecodeError::RecordUnexpected { kind, offset: records.offset });
        }
        Ok(record)
    }

    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.rest.split_first_chunk::<WORD>()?;
        self.rest = rest;
        self.offset += WORD;
        Some(u32::from_le_bytes(*word))
    }

    fn record(&mut self) -> Result<&'a [u8], DecodeError> {
        let (kind, offset) = (self.kind, self.offset);
        let found = self.rest.len();
        let len = self.word().ok_or(DecodeError::RecordTruncated { kind, offset, needed: WORD, found })?;
        let needed = usize::try_from(len)
            .ok()
            .filter(|&needed| needed <= MAX_RECORD_BYTES)
            .ok_or(DecodeError::RecordTooLarge { kind, offset, len })?;
        let found = self.rest.len();
        let (record, rest) = self.rest.split_at_checked(needed).ok_or(DecodeError::RecordTruncated {
            kind,
            offset,
            needed,
            found,
        })?;
        self.rest = rest;
        self.offset += needed;
        Ok(record)
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<&'a [u8], DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.rest = &[];
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(words: &[u32], records: &[&[u8]]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for record in records {
            bytes.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
            bytes.extend(*record);
        }
        bytes
    }

    fn pstree(records: &[&[u8]]) -> Vec<u8> {
        image(&[COMMON_MAGIC, ImageKind::Pstree.magic()], records)
    }

    fn collect(bytes: &[u8]) -> Result<Vec<&[u8]>, DecodeError> {
        Records::new(ImageKind::Pstree, bytes)?.collect()
    }

    #[test]
    fn records_are_slices_of_the_image() {
        assert_eq!(collect(&pstree(&[b"ab", b"", b"c"])).unwrap(), [&b"ab"[..], b"", b"c"]);
        assert!(collect(&pstree(&[])).unwrap().is_empty());
    }

    #[test]
    fn inventory_has_no_common_magic_and_stats_has_its_own() {
        assert!(Records::only(ImageKind::Inventory, &image(&[0x5831_3116], &[b"x"])).is_ok());
        assert!(Records::only(ImageKind::Stats, &image(&[SERVICE_MAGIC, 0x5709_3306], &[b"x"])).is_ok());
    }

    #[test]
    fn short_magic_is_refused() {
        for len in 0..8 {
            let error = collect(&pstree(&[])[..len]).unwrap_err();
            assert!(matches!(error, DecodeError::ShortMagic { found, .. } if found == len));
        }
    }

    #[test]
    fn other_magic_is_refused() {
        let error = collect(&image(&[COMMON_MAGIC, ImageKind::Mm.magic()], &[])).unwrap_err();
        assert!(matches!(error, DecodeError::Magic { found: 0x5749_2820, expected: 0x5027_3030, .. }));
        let error = collect(&image(&[SERVICE_MAGIC, ImageKind::Pstree.magic()], &[])).unwrap_err();
        assert!(matches!(error, DecodeError::Magic { expected: COMMON_MAGIC, .. }));
    }

    #[test]
    fn image_without_common_magic_is_named_as_version_one() {
        let error = collect(&image(&[ImageKind::Pstree.magic()], &[b"ab"])).unwrap_err();
        assert!(matches!(error, DecodeError::VersionOne { kind: ImageKind::Pstree }));
    }

    #[test]
    fn truncated_length_word_is_refused() {
        let mut bytes = pstree(&[b"ab"]);
        bytes.extend([1, 0, 0]);
        let error = collect(&bytes).unwrap_err();
        assert!(matches!(error, DecodeError::RecordTruncated { offset: 14, needed: 4, found: 3, .. }));
    }

    #[test]
    fn truncated_record_is_refused_and_ends_the_iteration() {
        let mut bytes = pstree(&[b"abcd"]);
        bytes.pop();
        let mut records = Records::new(ImageKind::Pstree, &bytes).unwrap();
        let error = records.next().unwrap().unwrap_err();
        assert!(matches!(error, DecodeError::RecordTruncated { offset: 8, needed: 4, found: 3, .. }));
        assert!(records.next().is_none());
    }

    #[test]
    fn oversized_record_is_refused_before_the_length_is_used() {
        let mut bytes = pstree(&[]);
        bytes.extend(u32::MAX.to_le_bytes());
        assert!(matches!(collect(&bytes).unwrap_err(), DecodeError::RecordTooLarge { len: u32::MAX, .. }));
    }

    #[test]
    fn only_refuses_none_and_two() {
        let none = Records::only(ImageKind::Pstree, &pstree(&[])).map(<[u8]>::len);
        assert!(matches!(none, Err(DecodeError::RecordMissing { .. })));
        let two = Records::only(ImageKind::Pstree, &pstree(&[b"a", b"b"])).map(<[u8]>::len);
        assert!(matches!(two, Err(DecodeError::RecordUnexpected { offset: 13, .. })));
    }
}
