use proptest::prelude::*;
use prost::Message;

use super::super::build::{frame, write_pagemap};
use super::*;

fn raw(vaddr: u64, pages: u64, flags: u32) -> messages::PagemapEntry {
    messages::PagemapEntry {
        vaddr: Some(vaddr),
        compat_nr_pages: Some(0),
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(pages),
    }
}

fn image(entries: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    frame(ImageKind::Pagemap, std::iter::once(vec![0x08, 7]).chain(entries))
}

fn read(entries: &[messages::PagemapEntry]) -> Result<Vec<PagemapEntry>, DecodeError> {
    Ok(read_pagemap(&image(entries.iter().map(Message::encode_to_vec)))?.entries)
}

fn one(entry: messages::PagemapEntry) -> Result<PagemapEntry, DecodeError> {
    read(&[entry]).map(|entries| entries[0])
}

#[test]
fn page_count_of_criu_4_1_is_field_2() {
    let entry = one(messages::PagemapEntry { compat_nr_pages: Some(3), nr_pages: None, ..raw(0x1000, 0, 2) });
    let entry = entry.unwrap();
    assert_eq!((entry.run.pages, entry.flags, entry.wide), (3, PageFlags::LAZY, false));
}

#[test]
fn page_count_of_criu_4_2_is_field_5() {
    let entry = one(raw(0x1000, 1 << 33, 6)).unwrap();
    assert_eq!((entry.run.pages, entry.flags, entry.wide), (1 << 33, PageFlags::LAZY_PRESENT, true));
}

#[test]
fn legacy_entries_get_flags() {
    let legacy = |in_parent| messages::PagemapEntry { flags: None, in_parent, ..raw(0x1000, 1, 0) };
    assert_eq!(one(legacy(None)).unwrap().flags, PageFlags::PRESENT);
    assert_eq!(one(legacy(Some(false))).unwrap().flags, PageFlags::PRESENT);
    assert_eq!(one(legacy(Some(true))).unwrap().flags, PageFlags::PARENT);
}

/// The first records of a pagemap that CRIU 4.1.1 wrote.
#[test]
fn image_of_criu_4_1_1_is_read() {
    let bytes = [
        &[0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 1][..],
        &[0x0c, 0, 0, 0, 0x08, 0x80, 0xc0, 0x82, 0x95, 0xd4, 0xc7, 0x15, 0x10, 1, 0x20, 4],
        &[0x0d, 0, 0, 0, 0x08, 0x80, 0xa0, 0xb4, 0xe2, 0xd6, 0xc7, 0x15, 0x10, 0x80, 2, 0x20, 6],
    ]
    .concat();
    let pagemap = read_pagemap(&bytes).unwrap();
    assert_eq!(pagemap.head.pages_id, 1);
    let [first, second] = pagemap.entries[..] else { panic!("two entries") };
    assert_eq!((first.run.start.get(), first.run.pages), (0x563d_42a0_a000, 1));
    assert_eq!(first.flags, PageFlags::PRESENT);
    assert_eq!((second.run.start.get(), second.run.pages), (0x563d_6c4d_1000, 256));
    assert_eq!(second.flags, PageFlags::LAZY_PRESENT);
    assert!(!first.wide && !second.wide);
}

/// The first records of a pagemap that CRIU 4.2.1 wrote.
#[test]
fn image_of_criu_4_2_1_is_read() {
    let bytes = [
        &[0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 1][..],
        &[0x0e, 0, 0, 0, 0x08, 0x80, 0xa0, 0xee, 0xb2, 0xf3, 0xbf, 0x15, 0x10, 0, 0x20, 4, 0x28, 1],
        &[0x0f, 0, 0, 0, 0x08, 0x80, 0xa0, 0x95, 0x91, 0xf5, 0xbf, 0x15, 0x10, 0, 0x20, 6, 0x28, 0x81, 3],
    ]
    .concat();
    let pagemap = read_pagemap(&bytes).unwrap();
    let pages: Vec<u64> = pagemap.entries.iter().map(|entry| entry.run.pages).collect();
    assert_eq!(pages, [1, 385]);
    assert!(pagemap.entries.iter().all(|entry| entry.wide));
}

#[test]
fn missing_head_is_refused() {
    let error = read_pagemap(&frame(ImageKind::Pagemap, [])).unwrap_err();
    assert!(matches!(error, DecodeError::RecordMissing { .. }));
}

#[test]
fn head_without_pages_id_is_refused() {
    let error = read_pagemap(&frame(ImageKind::Pagemap, [vec![]])).unwrap_err();
    assert!(matches!(error, DecodeError::FieldMissing { field: "pages_id", .. }));
}

#[test]
fn missing_address_is_refused() {
    let error = one(messages::PagemapEntry { vaddr: None, ..raw(0, 1, 4) }).unwrap_err();
    assert!(matches!(error, DecodeError::FieldMissing { field: "vaddr", .. }));
}

#[test]
fn unaligned_address_is_refused() {
    assert!(matches!(one(raw(0x1008, 1, 4)), Err(DecodeError::Unaligned { address: 0x1008, .. })));
}

#[test]
fn empty_entry_is_refused() {
    assert!(matches!(one(raw(0x1000, 0, 4)), Err(DecodeError::PageCount { pages: 0, .. })));
}

#[test]
fn entry_past_the_address_space_is_refused() {
    for (start, pages) in [(0x1000, u64::MAX), (0x1000, 1 << 52), (!0xfff, 1)] {
        assert!(matches!(one(raw(start, pages, 4)), Err(DecodeError::PageCount { .. })), "{start:#x}");
    }
}

#[test]
fn unsorted_entries_are_refused() {
    let error = read(&[raw(0x3000, 1, 4), raw(0x1000, 1, 4)]).unwrap_err();
    assert!(matches!(error, DecodeError::Unsorted { start: 0x1000, previous_end: 0x4000, .. }));
}

#[test]
fn overlapping_entries_are_refused() {
    let error = read(&[raw(0x1000, 3, 4), raw(0x3000, 1, 4)]).unwrap_err();
    assert!(matches!(error, DecodeError::Unsorted { start: 0x3000, previous_end: 0x4000, .. }));
}

#[test]
fn unknown_flag_is_refused() {
    assert!(matches!(one(raw(0x1000, 1, 8 | 4)), Err(DecodeError::PageFlags { flags: 12, .. })));
}

#[test]
fn flags_that_name_no_place_or_two_are_refused() {
    for flags in [0, 3, 5, 7] {
        assert!(matches!(one(raw(0x1000, 1, flags)), Err(DecodeError::PageFlags { .. })), "{flags}");
    }
    for flags in [1, 2, 4, 6] {
        assert!(one(raw(0x1000, 1, flags)).is_ok(), "{flags}");
    }
}

#[test]
fn unknown_field_is_refused_where_there_is_data() {
    let with_field_6 = |flags| [raw(0x1000, 1, flags).encode_to_vec(), vec![0x30, 9]].concat();
    let error = read_pagemap(&image([with_field_6(4)])).unwrap_err();
    assert!(matches!(error, DecodeError::FieldUnknown { tag: 6, .. }));
    assert!(read_pagemap(&image([with_field_6(2)])).is_ok());
}

#[test]
fn a_count_too_large_for_field_2_is_written_wide() {
    let run = PageRun::new(ImageAddr::default(), 1 << 33).unwrap();
    let entry = PagemapEntry { run, flags: PageFlags::LAZY, wide: false };
    assert_eq!(entry.message().nr_pages, Some(1 << 33));
}

prop_compose! {
    fn entries()(parts in proptest::collection::vec(
        (0_u64..4, 1_u64..5000, prop_oneof![Just(1), Just(2), Just(4), Just(6)], any::<bool>()), 0..50,
    )) -> Vec<PagemapEntry> {
        let mut page = 16;
        parts.into_iter().map(|(gap, pages, flags, wide)| {
            let start = ImageAddr::aligned((page + gap) * 4096).unwrap();
            page += gap + pages;
            let flags = PageFlags::from_bits(flags).unwrap();
            PagemapEntry { run: PageRun::new(start, pages).unwrap(), flags, wide }
        }).collect()
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(entries in entries(), pages_id in any::<u32>()) {
        let pagemap = Pagemap { head: PagemapHead { pages_id }, entries };
        prop_assert_eq!(read_pagemap(&write_pagemap(&pagemap)).unwrap(), pagemap);
    }
}
