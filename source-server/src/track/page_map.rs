//! `/proc/PID/pagemap`: what the kernel says about each page, 64 bits for one. Works with every kernel.
//!
//! Source: `Documentation/admin-guide/mm/pagemap.rst`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use protocol::units::{ImageAddr, PAGE_BYTES, PageRun};

/// Entries that are read at a time.
const ENTRIES: usize = 8192;

const FRAME: u64 = (1 << 55) - 1;
const WRITTEN: u64 = 1 << 55;
const EXCLUSIVE: u64 = 1 << 56;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

/// What the kernel says about a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    /// It is in memory, or on swap.
    pub(super) const fn is_there(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0
    }

    /// Written since its bit was cleared, or in an area that is younger than that (`soft-dirty`).
    pub(super) const fn is_written(self) -> bool {
        self.0 & WRITTEN != 0
    }

    /// The frame that it is in, if this address space alone has that frame: never that of zeros, nor one that is shared with a
    /// child. Zero where the kernel does not tell frames (without `CAP_SYS_ADMIN`).
    pub(super) const fn own_frame(self) -> Option<u64> {
        match self.0 & (PRESENT | EXCLUSIVE) == PRESENT | EXCLUSIVE {
            true => Some(self.0 & FRAME),
            false => None,
        }
    }
}

/// The page map of a process.
#[derive(Debug)]
pub(super) struct PageMap {
    file: File,
    room: Vec<u8>,
}

impl PageMap {
    /// # Errors
    /// `NotFound` if the process is gone.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { file, room: vec![0; ENTRIES * size_of::<u64>()] })
    }

    /// Puts each page of an area into a class, or leaves it out, and hands each run of pages of one class to `each`.
    pub(super) fn runs<C: Copy + PartialEq>(
        &mut self,
        area: PageRun,
        mut class: impl FnMut(ImageAddr, Entry) -> Option<C>,
        mut each: impl FnMut(PageRun, C),
    ) -> io::Result<()> {
        let mut open: Option<(PageRun, C)> = None;
        let mut next = area.start;
        while next < area.end() {
            let left = usize::try_from(area.end().pages_since(next)).unwrap_or(ENTRIES);
            let wanted = &mut self.room[..left.min(ENTRIES) * size_of::<u64>()];
            let got = self.file.read_at(wanted, next.get() / PAGE_BYTES * 8)? / size_of::<u64>();
            if got == 0 {
                break;
            }
            for entry in self.room.chunks_exact(size_of::<u64>()).take(got) {
                let entry = Entry(entry.try_into().map_or(0, u64::from_ne_bytes));
                match (&mut open, class(next, entry)) {
                    (Some((run, of)), Some(class)) if *of == class => run.pages += 1,
                    (before, class) => {
                        before.take().into_iter().for_each(|(run, class)| each(run, class));
                        open = PageRun::new(next, 1).zip(class);
                    }
                }
                next = next.add(1);
            }
        }
        open.into_iter().for_each(|(run, class)| each(run, class));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernel::arena::Region;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn runs_are_of_one_class_and_none_is_left_out() {
        let region = Region::anonymous(64).unwrap();
        for page in [1, 2, 3, 9, 63] {
            region.page(page)[0].store(1, Relaxed);
        }
        let area = PageRun::new(ImageAddr::containing(region.address() as u64), 64).unwrap();
        let mut map = PageMap::open(std::process::id()).unwrap();
        let mut found = Vec::new();
        let class = |at: ImageAddr, entry: Entry| entry.is_there().then(|| at.pages_since(area.start) == 2);
        map.runs(area, class, |run, second| {
            found.push((run.start.pages_since(area.start), run.pages, second))
        })
        .unwrap();
        assert_eq!(found, [(1, 1, false), (2, 1, true), (3, 1, false), (9, 1, false), (63, 1, false)]);
    }

    #[test]
    fn a_frame_is_ones_own_if_nobody_shares_it() {
        let region = Region::anonymous(2).unwrap();
        region.page(0)[0].store(1, Relaxed);
        std::hint::black_box(region.page(1)[0].load(Relaxed));
        let area = PageRun::new(ImageAddr::containing(region.address() as u64), 2).unwrap();
        let mut own = Vec::new();
        let mut map = PageMap::open(std::process::id()).unwrap();
        let class = |_, entry: Entry| {
            own.push(entry.own_frame().is_some());
            None::<()>
        };
        map.runs(area, class, |_, ()| {}).unwrap();
        assert_eq!(own, [true, false], "the second is the page of zeros");
    }
}
