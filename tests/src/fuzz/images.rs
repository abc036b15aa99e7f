//! CRIU's image files, one by one and as a directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use protocol::criu::checkpoint::{Checkpoint, ImageName};
use protocol::criu::handover::Handover;
use protocol::criu::images::{self, DecodeError, Stats};
use protocol::criu::limits::{MAX_LAZY_PAGES, MEMORY_PER_BYTE};
use protocol::criu::pages::PageReader;
use protocol::lazy_map::LazyMap;
use protocol::units::{PAGE_SIZE, TaskId};
use uffd_daemon::tree::Tree;

use super::bounded;

/// Decodes, and checks that what is encoded again is the same.
fn round_trip<T: PartialEq + std::fmt::Debug>(
    image: &[u8],
    read: fn(&[u8]) -> Result<T, DecodeError>,
    write: impl FnOnce(&T) -> Vec<u8>,
) -> Option<T> {
    let value = bounded(image.len(), MEMORY_PER_BYTE, || read(image)).ok()?;
    let again = read(&write(&value)).expect("our own image");
    assert_eq!(again, value);
    Some(value)
}

/// `inventory.img`.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_inventory(data: &[u8]) {
    let inventory = round_trip(data, images::read_inventory, images::write_inventory);
    if let Some(id) = inventory.and_then(|inventory| inventory.dump_criu_run_id) {
        assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{id}");
    }
}

/// `pstree.img`.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_pstree(data: &[u8]) {
    round_trip(data, images::read_pstree, |entries| images::write_pstree(entries));
}

/// `core-PID.img`.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_core(data: &[u8]) {
    if let Ok(task) = bounded(data.len(), MEMORY_PER_BYTE, || images::read_core(data)) {
        let mut again = images::read_core(&images::write_core(&task)).expect("our own image");
        if task.comm.contains('\u{fffd}') {
            // What is not UTF-8 is replaced by something longer, and cut when it is read again.
            again.comm.clone_from(&task.comm);
        }
        assert_eq!(again, task);
    }
}

/// `mm-PID.img`.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_mm(data: &[u8]) {
    let Some(mm) = round_trip(data, images::read_mm, images::write_mm) else { return };
    assert!(mm.vmas.iter().all(|vma| vma.start < vma.end && vma.run().pages > 0));
    assert!(mm.vmas.windows(2).all(|pair| pair[0].end <= pair[1].start));
}

/// `pagemap-PID.img`.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_pagemap(data: &[u8]) {
    let Some(pagemap) = round_trip(data, images::read_pagemap, images::write_pagemap) else { return };
    assert!(pagemap.entries.iter().all(|entry| entry.run.start < entry.run.end()));
    assert!(pagemap.entries.windows(2).all(|pair| pair[0].run.end() <= pair[1].run.start));
    let places =
        |entry: &images::PagemapEntry| entry.flags.parent != (entry.flags.lazy || entry.flags.present);
    assert!(pagemap.entries.iter().all(places));
}

/// `stats-dump` and `stats-restore`.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_stats(data: &[u8]) {
    let Ok(stats) = bounded(data.len(), MEMORY_PER_BYTE, || images::read_stats(data)) else { return };
    let written = images::write_stats(&stats);
    let again: Stats = images::read_stats(&written).expect("our own image");
    assert_eq!(again, stats);
}

/// Files of a checkpoint of up to two tasks, in an order that numbers them in the input.
pub(super) const FILES: [&str; 12] = [
    "inventory.img",
    "pstree.img",
    "core-1.img",
    "core-2.img",
    "mm-1.img",
    "mm-2.img",
    "pagemap-1.img",
    "pagemap-2.img",
    "pages-1.img",
    "pages-2.img",
    "old/pagemap-1.img",
    "old/pages-1.img",
];

/// Largest file: the pages of an input that is as long as any.
const FILE_MAX: usize = 64 << 10;

/// An image directory and its parent: files by number, u16 length, bytes. The number behind the last is a run of pages
/// instead: which file (u8) and how many (u8), so that whole pages need not be in the input. Built into a lazy map as
/// both sides of a move do, and read as `uffd-daemon lazy-pages` does.
///
/// # Panics
/// If something is wrong.
pub fn fuzz_checkpoint(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let top = dir.path().join("top");
    fs::create_dir_all(top.join("old")).expect("make directories");
    symlink("old", top.join("parent")).expect("link to the parent");
    let size = unpack(data, &top);

    // The paths of its errors take memory as well, but no more for more input.
    let Ok(checkpoint) = bounded(size, 2 * MEMORY_PER_BYTE, || Checkpoint::open(&top)) else { return };
    let again = dir.path().join("again");
    fs::create_dir(&again).expect("make a directory");
    checkpoint.write(&again).expect("write images");
    let same = Checkpoint::open(&again).expect("our own images");
    assert!(same == checkpoint || checkpoint.tasks.iter().any(|task| task.comm.contains('\u{fffd}')));
    let _ = checkpoint.header_layout();
    Handover::new(checkpoint.tasks.iter().map(|task| task.id)).expect("tasks of a checkpoint");

    let live = || checkpoint.tasks.iter().filter(|task| task.alive);
    let Ok(map) = LazyMap::new(live().map(|task| (task.id, task.lazy_runs()))) else { return };
    assert_eq!(map.pages(), checkpoint.lazy_pages());
    assert!(map.pages() <= MAX_LAZY_PAGES);
    check_map(&map);
    if map.pages() <= 1 << 16 {
        assert_eq!(<Tree>::new(&map).pages(), map.pages());
    }
    for task in live() {
        read_pages(&top, task.id, task.pagemap.iter().map(|entry| entry.run.start));
    }
}

/// Writes the files, and says how long they are together.
fn unpack(data: &[u8], top: &Path) -> usize {
    let (mut rest, mut size) = (data, 0);
    while let Some(([number, low, high], behind)) = rest.split_first_chunk::<3>() {
        let number = usize::from(*number) % (FILES.len() + 1);
        if let Some(name) = FILES.get(number) {
            let length = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
            fs::write(top.join(name), &behind[..length]).expect("write an image");
            size += length;
            rest = &behind[length..];
        } else {
            let name = FILES[usize::from(*low) % FILES.len()];
            let length = (usize::from(*high) * PAGE_SIZE).min(FILE_MAX);
            fs::write(top.join(name), vec![*low; length]).expect("write pages");
            size += length;
            rest = behind;
        }
    }
    size
}

/// Addresses and indices belong to each other, at the ends of every run.
fn check_map(map: &LazyMap) {
    for task in map.tasks() {
        for indexed in &task.runs {
            for offset in [0, indexed.run.pages - 1] {
                let (index, addr) = (indexed.first + offset, indexed.run.start.add(offset));
                assert_eq!(task.index_of(addr), Some(index));
                assert_eq!(map.locate(index), Some((task.id, addr, indexed.run.pages - offset)));
            }
        }
    }
    assert_eq!(map.locate(map.pages()), None);
}

fn read_pages(dir: &Path, task: TaskId, starts: impl Iterator<Item = protocol::units::ImageAddr>) {
    let Ok(reader) = PageReader::open(dir, task) else { return };
    let mut buffer = vec![0; 3 * PAGE_SIZE + 7];
    for addr in starts {
        if let Ok(pages) = reader.read(addr, &mut buffer) {
            assert!((1..=3).contains(&pages), "{pages} pages at {addr} of {}", ImageName::Pagemap(task));
        }
    }
}
