//! `pagemap-PID.img`: which pages the dump knows of, and where each is.
//!
//! Two encodings exist: up to CRIU 4.1.1 field 2 holds the page count, from 4.2 on field 5 does (and field 2 is
//! zero, because proto2 requires it). The same release made the page-server header wider, so an entry also tells
//! which header the page server of its dump speaks.

use super::error::DecodeError;
use super::framing::{ImageKind, Records};
use super::{aligned, fields, messages, parse, required};
use crate::criu::limits::MAX_PAGEMAP_ENTRIES;
use crate::units::{ImageAddr, PageRun};

const HEAD: &str = "pagemap_head";
const ENTRY: &str = "pagemap_entry";

const PE_PARENT: u32 = 1;
const PE_LAZY: u32 = 2;
const PE_PRESENT: u32 = 4;

/// Where the pages of an entry are. In a decoded entry never empty, and never both in the parent and here.
///
/// | dump | lazy-capable page | other page | unchanged since the parent |
/// |---|---|---|---|
/// | plain | lazy, present | present | parent |
/// | `--lazy-pages` | lazy | present | parent |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageFlags {
    /// The parent images have the pages.
    pub parent: bool,
    /// Restore may leave the pages to the lazy-pages daemon.
    pub lazy: bool,
    /// The data is in the pages file.
    pub present: bool,
}

impl PageFlags {
    /// In the parent images.
    pub const PARENT: Self = Self { parent: true, lazy: false, present: false };
    /// Left on the source.
    pub const LAZY: Self = Self { parent: false, lazy: true, present: false };
    /// In the pages file.
    pub const PRESENT: Self = Self { parent: false, lazy: false, present: true };
    /// In the pages file, and restore may leave it to the daemon.
    pub const LAZY_PRESENT: Self = Self { parent: false, lazy: true, present: true };

    /// CRIU's `PE_*` bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        let parent = if self.parent { PE_PARENT } else { 0 };
        let lazy = if self.lazy { PE_LAZY } else { 0 };
        let present = if self.present { PE_PRESENT } else { 0 };
        parent | lazy | present
    }

    /// Flags from CRIU's `PE_*` bits; `None` if a bit is unknown, so that nothing is read past its meaning.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits & !(PE_PARENT | PE_LAZY | PE_PRESENT) != 0 {
            return None;
        }
        Some(Self {
            parent: bits & PE_PARENT != 0,
            lazy: bits & PE_LAZY != 0,
            present: bits & PE_PRESENT != 0,
        })
    }

    /// Whether the flags name one place: the parent alone, or not the parent.
    const fn name_a_place(self) -> bool {
        self.parent != (self.lazy || self.present)
    }
}

/// `pagemap_head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapHead {
    /// The data is in `pages-<pages_id>.img`.
    pub pages_id: u32,
}

/// `pagemap_entry`, the same from every CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapEntry {
    /// The pages. The largest run CRIU's page server gives at once is the rest of one entry.
    pub run: PageRun,
    /// Where they are.
    pub flags: PageFlags,
    /// Written by CRIU 4.2 or later.
    pub wide: bool,
}

impl PagemapEntry {
    fn message(&self) -> messages::PagemapEntry {
        let (compat_nr_pages, nr_pages) = match u32::try_from(self.run.pages) {
            Ok(pages) if !self.wide => (pages, None),
            _ => (0, Some(self.run.pages)),
        };
        messages::PagemapEntry {
            vaddr: Some(self.run.start.get()),
            compat_nr_pages: Some(compat_nr_pages),
            in_parent: None,
            flags: Some(self.flags.bits()),
            nr_pages,
        }
    }
}

/// All of `pagemap-PID.img`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// Which pages file the data is in.
    pub head: PagemapHead,
    /// Entries in ascending order, not overlapping.
    pub entries: Vec<PagemapEntry>,
}

impl Pagemap {
    pub(super) fn records(&self) -> impl Iterator<Item = Vec<u8>> {
        use prost::Message;
        let head = messages::PagemapHead { pages_id: Some(self.head.pages_id) }.encode_to_vec();
        std::iter::once(head).chain(self.entries.iter().map(|entry| entry.message().encode_to_vec()))
    }
}

/// Decodes `pagemap-PID.img`.
///
/// # Errors
/// [`DecodeError`].
pub fn read_pagemap(image: &[u8]) -> Result<Pagemap, DecodeError> {
    let kind = ImageKind::Pagemap;
    let mut records = Records::new(kind, image)?;
    let head: messages::PagemapHead =
        parse(HEAD, records.next().ok_or(DecodeError::RecordMissing { kind })??)?;
    let head = PagemapHead { pages_id: required(head.pages_id, HEAD, "pages_id")? };
    let mut entries = Vec::new();
    let mut previous_end = ImageAddr::default();
    for record in records {
        let entry = entry(record?)?;
        if entry.run.start < previous_end {
            let (start, previous_end) = (entry.run.start.get(), previous_end.get());
            return Err(DecodeError::Unsorted { message: ENTRY, start, previous_end });
        }
        if entries.len() == MAX_PAGEMAP_ENTRIES {
            return Err(DecodeError::TooMany { message: ENTRY, what: "entries", limit: MAX_PAGEMAP_ENTRIES });
        }
        previous_end = entry.run.end();
        entries.push(entry);
    }
    Ok(Pagemap { head, entries })
}

fn entry(record: &[u8]) -> Result<PagemapEntry, DecodeError> {
    let raw: messages::PagemapEntry = parse(ENTRY, record)?;
    let start = required(raw.vaddr, ENTRY, "vaddr")?;
    let compat = required(raw.compat_nr_pages, ENTRY, "compat_nr_pages")?;
    let pages = raw.nr_pages.unwrap_or(u64::from(compat));
    let run = PageRun::new(aligned(ENTRY, start)?, pages).ok_or(DecodeError::PageCount { start, pages })?;
    let flags = flags(&raw, start)?;
    if flags.present {
        refuse_unknown_fields(record)?;
    }
    Ok(PagemapEntry { run, flags, wide: raw.nr_pages.is_some() })
}

/// Flags of `raw`, also as CRIU wrote them before there was a field for them.
fn flags(raw: &messages::PagemapEntry, start: u64) -> Result<PageFlags, DecodeError> {
    let legacy_parent = raw.in_parent.unwrap_or(false);
    let bits = match raw.flags {
        Some(flags) if legacy_parent => flags | PE_PARENT,
        Some(flags) => flags,
        None if legacy_parent => PE_PARENT,
        None => PE_PRESENT,
    };
    PageFlags::from_bits(bits)
        .filter(|flags| flags.name_a_place())
        .ok_or(DecodeError::PageFlags { start, flags: bits })
}

/// Later CRIUs compress pages and say so in further fields. The pages file then has another layout, and reading
/// it as raw pages would give wrong data without an error.
fn refuse_unknown_fields(record: &[u8]) -> Result<(), DecodeError> {
    let mut last = 0;
    fields::visit(ENTRY, record, |number| last = last.max(number))?;
    if last > messages::PAGEMAP_ENTRY_LAST {
        return Err(DecodeError::FieldUnknown {
            message: ENTRY,
            tag: u32::try_from(last).unwrap_or(u32::MAX),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
