//! The memory of a task that CRIU makes lazy: private and anonymous.
//!
//! Shared memory, mapped files (with the pages of them that were copied on write) and what belongs to the kernel
//! travel in the images. Locked memory does, too, but is told apart in `smaps` only, which is slow; its
//! pages are reported here and never asked for.

use std::fs;
use std::io;

use protocol::units::{ImageAddr, PAGE_BYTES, PageRun, bytes_to_pages};

/// Private mappings without a file that belong to the kernel.
const OF_THE_KERNEL: [&str; 5] = ["[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"];

/// Where the memory of a process ends, on x86-64 with four levels; what is above belongs to the kernel, or is seldom used.
const TASK_END: u64 = 0x7fff_ffff_f000;

/// The areas of a process now, by ascending address.
///
/// A process that runs may change them while they are read; an area that moves meanwhile may be missing.
///
/// # Errors
/// `NotFound` if the process is gone.
pub fn of(pid: u32) -> io::Result<Vec<PageRun>> {
    Ok(in_order(fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().filter_map(lazy_area)))
}

/// An area and the unmapped room around it, into which it may have grown since the list was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roomy {
    /// The area.
    pub area: PageRun,
    /// The area and the room up to its neighbours, whatever those are.
    pub room: PageRun,
}

/// As [`of`], with the room around each area.
///
/// # Errors
/// `NotFound` if the process is gone.
pub fn with_room(pid: u32) -> io::Result<Vec<Roomy>> {
    Ok(roomy(&fs::read_to_string(format!("/proc/{pid}/maps"))?))
}

fn roomy(maps: &str) -> Vec<Roomy> {
    let bounds: Vec<(u64, u64)> = maps.lines().filter_map(bounds).collect();
    let around = |area: PageRun| {
        let (start, end) = (area.start.get(), area.end().get());
        let behind = bounds.partition_point(|(other, _)| *other < end);
        let before = bounds.partition_point(|(other, _)| *other < start);
        let from = before.checked_sub(1).map_or(start, |at| bounds[at].1.min(start));
        let to = bounds.get(behind).map_or(end, |next| next.0).clamp(end, end.max(TASK_END));
        let room = PageRun::new(ImageAddr::containing(from), bytes_to_pages(to - from));
        Roomy { area, room: room.unwrap_or(area) }
    };
    in_order(maps.lines().filter_map(lazy_area)).into_iter().map(around).collect()
}

/// Areas without overlap: the list is read in pieces, and one that has grown meanwhile may reach back into those before.
fn in_order(areas: impl Iterator<Item = PageRun>) -> Vec<PageRun> {
    let mut found: Vec<PageRun> = Vec::new();
    for area in areas {
        let start = found.last().map_or(area.start, |before| before.end().max(area.start));
        found.extend(PageRun::new(start, area.end().pages_since(start)));
    }
    found
}

/// The area in a line of `/proc/PID/maps`, if CRIU makes such a one lazy.
fn lazy_area(line: &str) -> Option<PageRun> {
    let (start, end) = bounds(line)?;
    let mut fields = line.split_ascii_whitespace().skip(1);
    let is_private = fields.next()?.as_bytes().get(3) == Some(&b'p');
    let inode = fields.nth(2)?;
    if !is_private || inode != "0" || fields.next().is_some_and(|name| OF_THE_KERNEL.contains(&name)) {
        return None;
    }
    PageRun::new(ImageAddr::containing(start), bytes_to_pages(end.checked_sub(start)?))
}

/// The addresses in a line of `/proc/PID/maps`.
fn bounds(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    let number = |hex| u64::from_str_radix(hex, 16).ok().filter(|address| address % PAGE_BYTES == 0);
    Some((number(start)?, number(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_anonymous_memory_and_nothing_else() {
        let area = |line| lazy_area(line).map(|area| (area.start.get(), area.pages));
        assert_eq!(area("7f0000000000-7f0000003000 rw-p 00000000 00:00 0 "), Some((0x7f00_0000_0000, 3)));
        assert_eq!(area("55c0f0000000-55c0f0021000 rw-p 00000000 00:00 0    [heap]").unwrap().1, 33);
        assert!(area("7ffc8a000000-7ffc8a021000 rw-p 00000000 00:00 0    [stack]").is_some());
        assert!(area("7f0000000000-7f0000001000 ---p 00000000 00:00 0    [anon:a name]").is_some());
        for other in [
            "7f0000000000-7f0000001000 rw-s 00000000 00:01 1041    /dev/zero (deleted)",
            "7f0000000000-7f0000001000 rw-p 00001000 fe:00 1234    /usr/lib/libc.so.6",
            "7ffc8a1f0000-7ffc8a1f4000 r--p 00000000 00:00 0    [vvar]",
            "7ffc8a1f4000-7ffc8a1f6000 r-xp 00000000 00:00 0    [vdso]",
            "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0    [vsyscall]",
            "nonsense",
        ] {
            assert_eq!(area(other), None, "{other}");
        }
    }

    #[test]
    fn room_goes_up_to_the_neighbours() {
        let maps = "10000-11000 r-xp 00000000 fe:00 1 /bin/x\n\
                    20000-24000 rw-p 00000000 00:00 0\n\
                    24000-25000 ---p 00000000 00:00 0\n\
                    30000-31000 rw-s 00000000 00:01 7 /dev/zero\n\
                    7ffffff00000-7ffffff21000 rw-p 00000000 00:00 0 [stack]\n\
                    ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";
        let found: Vec<_> = roomy(maps)
            .iter()
            .map(|it| (it.area.start.get(), it.room.start.get(), it.room.end().get()))
            .collect();
        assert_eq!(
            found,
            [
                (0x20000, 0x11000, 0x24000),
                (0x24000, 0x24000, 0x30000),
                (0x7fff_fff0_0000, 0x31000, 0x7fff_ffff_f000)
            ]
        );
    }

    #[test]
    fn areas_that_overlap_are_cut() {
        let area = |page: u64, pages| PageRun::new(ImageAddr::containing(page << 12), pages).unwrap();
        let read = [area(1, 4), area(5, 1), area(4, 4), area(2, 3), area(20, 1)];
        assert_eq!(in_order(read.into_iter()), [area(1, 4), area(5, 1), area(6, 2), area(20, 1)]);
    }

    #[test]
    fn knows_its_own_heap() {
        let here = Box::new(1_u8);
        let address = std::ptr::from_ref::<u8>(&here) as u64;
        let areas = of(std::process::id()).unwrap();
        assert!(areas.iter().any(|area| area.contains(ImageAddr::containing(address))));
        assert!(areas.is_sorted_by(|before, next| before.end() <= next.start));
    }
}
