use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::criu::images::build::anonymous_vma;
use crate::criu::images::{DecodeError, PageFlags, PagemapEntry, Stats};
use crate::criu::limits::{MAX_IMAGE_BYTES, MAX_PARENT_DEPTH};
use crate::units::{ImageAddr, PageRun};

fn run(start: u64, pages: u64) -> PageRun {
    PageRun::new(ImageAddr::aligned(start).unwrap(), pages).unwrap()
}

fn entry(start: u64, pages: u64, flags: PageFlags) -> PagemapEntry {
    PagemapEntry { run: run(start, pages), flags, wide: false }
}

fn live() -> TaskImages {
    TaskImages {
        id: TaskId(10),
        ppid: 0,
        pgid: 10,
        sid: 10,
        threads: vec![10, 11],
        comm: "server".to_owned(),
        alive: true,
        vmas: vec![
            anonymous_vma(0x1000, 0x5000),
            anonymous_vma(0x5000, 0x6000),
            anonymous_vma(0x9000, 0xf000),
        ],
        pagemap: vec![
            entry(0x1000, 1, PageFlags::PRESENT),
            entry(0x2000, 1, PageFlags::LAZY),
            entry(0x3000, 3, PageFlags::LAZY),
            entry(0x9000, 2, PageFlags::LAZY_PRESENT),
            entry(0xb000, 1, PageFlags::PARENT),
        ],
        pages_id: 1,
    }
}

fn zombie() -> TaskImages {
    TaskImages {
        id: TaskId(12),
        ppid: 10,
        threads: vec![],
        alive: false,
        vmas: vec![],
        pagemap: vec![],
        pages_id: 0,
        ..live()
    }
}

fn checkpoint(tasks: Vec<TaskImages>) -> Checkpoint {
    Checkpoint { inventory: Inventory::default(), tasks }
}

fn written(checkpoint: &Checkpoint) -> TempDir {
    let dir = TempDir::new().unwrap();
    checkpoint.write(dir.path()).unwrap();
    dir
}

fn reopen(task: TaskImages) -> Result<Checkpoint, ImageError> {
    Checkpoint::open(written(&checkpoint(vec![task])).path())
}

#[test]
fn what_is_written_is_opened() {
    let checkpoint = checkpoint(vec![live(), zombie(), TaskImages { id: TaskId(14), ..live() }]);
    assert_eq!(Checkpoint::open(written(&checkpoint).path()).unwrap(), checkpoint);
    assert_eq!(checkpoint.task(TaskId(12)), Some(&zombie()));
    assert_eq!(checkpoint.task(TaskId(99)), None);
}

#[test]
fn threads_of_a_zombie_are_dropped_unread() {
    let dir = written(&checkpoint(vec![TaskImages { threads: vec![0x62b6_b3c0], ..zombie() }]));
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tasks, [zombie()]);
}

#[test]
fn lazy_runs_are_cut_where_vmas_meet_and_keep_entries() {
    let expected = [run(0x2000, 1), run(0x3000, 2), run(0x5000, 1), run(0x9000, 2)];
    assert_eq!(live().lazy_runs(), expected);
    assert_eq!(live().lazy_pages(), 6);
    assert_eq!(checkpoint(vec![live(), zombie(), live()]).lazy_pages(), 12);
    assert!(zombie().lazy_runs().is_empty());
}

#[test]
fn header_layout_is_told_from_the_pagemap() {
    let mut checkpoint = checkpoint(vec![zombie(), live()]);
    assert_eq!(checkpoint.header_layout(), Some(HeaderLayout::Compact));
    checkpoint.tasks[1].pagemap.iter_mut().for_each(|entry| entry.wide = true);
    assert_eq!(checkpoint.header_layout(), Some(HeaderLayout::Wide));
    checkpoint.tasks[1].pagemap[0].wide = false;
    assert_eq!(checkpoint.header_layout(), None);
    checkpoint.tasks.truncate(1);
    assert_eq!(checkpoint.header_layout(), None);
}

#[test]
fn lazy_page_in_no_vma_is_refused() {
    // Below the first VMA, in a gap, running out of a VMA, above the last one.
    for (start, pages, addr) in [(0, 1, 0), (0x7000, 1, 0x7000), (0x5000, 2, 0x6000), (0xf000, 1, 0xf000)] {
        let error = reopen(TaskImages { pagemap: vec![entry(start, pages, PageFlags::LAZY)], ..live() });
        let found = match error {
            Err(ImageError::LazyOutsideVmas { addr, .. }) => addr.get(),
            other => panic!("{other:?}"),
        };
        assert_eq!(found, addr);
    }
}

#[test]
fn thread_of_a_live_task_that_is_no_pid_is_refused() {
    for thread in [0, 0x62b6_b3c0] {
        let error = reopen(TaskImages { threads: vec![10, thread], ..live() }).unwrap_err();
        assert!(matches!(error, ImageError::Thread { thread: found, .. } if found == thread));
    }
}

#[test]
fn each_missing_image_is_named() {
    for name in ["inventory.img", "pstree.img", "core-10.img", "mm-10.img", "pagemap-10.img"] {
        let dir = written(&checkpoint(vec![live()]));
        std::fs::remove_file(dir.path().join(name)).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(matches!(&error, ImageError::Missing { path } if path.ends_with(name)), "{error}");
    }
}

#[test]
fn each_damaged_image_is_named() {
    for name in ["inventory.img", "pstree.img", "core-10.img", "mm-10.img", "pagemap-10.img"] {
        let dir = written(&checkpoint(vec![live()]));
        std::fs::write(dir.path().join(name), b"").unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        let ImageError::Decode { path, source } = error else { panic!("{error}") };
        assert!(path.ends_with(name) && matches!(source, DecodeError::ShortMagic { found: 0, .. }));
    }
}

#[test]
fn unknown_task_state_is_refused() {
    let dir = written(&checkpoint(vec![live()]));
    let core = CoreTask { state: TaskState::Unknown(7), exit_code: 0, comm: String::new() };
    std::fs::write(dir.path().join("core-10.img"), images::write_core(&core)).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(ImageError::TaskState { state: 7, .. })));
}

#[test]
fn symlink_in_place_of_an_image_is_refused() {
    let (dir, outside) = (written(&checkpoint(vec![live()])), written(&checkpoint(vec![live()])));
    let name = dir.path().join("mm-10.img");
    std::fs::remove_file(&name).unwrap();
    symlink(outside.path().join("mm-10.img"), &name).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(ImageError::NotAFile { .. })));
}

#[test]
fn directory_or_fifo_in_place_of_an_image_is_refused() {
    let dir = written(&checkpoint(vec![live()]));
    let name = dir.path().join("mm-10.img");
    std::fs::remove_file(&name).unwrap();
    std::fs::create_dir(&name).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(ImageError::NotAFile { .. })));
    std::fs::remove_dir(&name).unwrap();
    nix::unistd::mkfifo(&name, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(ImageError::NotAFile { .. })));
}

#[test]
fn oversized_image_is_refused_unread() {
    let dir = written(&checkpoint(vec![live()]));
    let file = std::fs::File::create(dir.path().join("pagemap-10.img")).unwrap();
    file.set_len(MAX_IMAGE_BYTES + 1).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(ImageError::TooLarge { .. })));
}

#[test]
fn path_that_is_no_directory_is_refused() {
    let dir = written(&checkpoint(vec![live()]));
    let error = Checkpoint::open(&dir.path().join("pstree.img")).unwrap_err();
    assert!(matches!(error, ImageError::NotADirectory { .. }));
    let error = Checkpoint::open(&dir.path().join("nothing")).unwrap_err();
    assert!(matches!(error, ImageError::Io { action: "open", .. }));
}

#[test]
fn parents_are_followed_to_their_end() {
    let dir = TempDir::new().unwrap();
    let sub = |name: &str| dir.path().join(name);
    for (name, parent) in [("a", "../b"), ("b", "../c"), ("c", "../gone")] {
        std::fs::create_dir(sub(name)).unwrap();
        symlink(parent, sub(name).join("parent")).unwrap();
    }
    let chain = |name| ImageDir::open(&sub(name)).and_then(ImageDir::chain);
    assert_eq!(chain("a").unwrap().len(), 3);
    assert_eq!(chain("c").unwrap().len(), 1);
}

#[test]
fn parents_in_a_circle_are_refused() {
    let dir = TempDir::new().unwrap();
    symlink(".", dir.path().join("parent")).unwrap();
    let error = ImageDir::open(dir.path()).and_then(ImageDir::chain).unwrap_err();
    assert!(matches!(error, ImageError::ParentDepth { .. }), "{error}");
}

/// More links than the kernel follows in one path.
#[test]
fn the_longest_chain_of_parents_is_followed() {
    let dir = TempDir::new().unwrap();
    for level in 0..=MAX_PARENT_DEPTH {
        let sub = dir.path().join(level.to_string());
        std::fs::create_dir(&sub).unwrap();
        symlink(format!("../{}", level + 1), sub.join("parent")).unwrap();
    }
    let chain = ImageDir::open(&dir.path().join("0")).and_then(ImageDir::chain).unwrap();
    assert_eq!(chain.len(), MAX_PARENT_DEPTH + 1);
}

#[test]
fn statistics_are_read_by_their_name() {
    let dir = TempDir::new().unwrap();
    let dump = DumpStats { freezing_us: 7, ..DumpStats::default() };
    let image = images::write_stats(&Stats { dump: Some(dump), restore: None });
    std::fs::write(dir.path().join("stats-dump"), &image).unwrap();
    std::fs::write(dir.path().join("stats-restore"), &image).unwrap();
    assert_eq!(read_dump_stats(dir.path()).unwrap(), dump);
    assert!(matches!(read_restore_stats(dir.path()), Err(ImageError::NoStats { .. })));
}
