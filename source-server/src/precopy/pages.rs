//! Pages of a process that runs: read many at a time, and put into frames.

use std::collections::VecDeque;
use std::io::IoSliceMut;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use protocol::units::{PAGE_BYTES, PAGE_SIZE, PageRun, TaskId, pages_to_bytes};
use protocol::wire::frame::{Kind, TaskRun};
use protocol::wire::lz4::Compressor;

use crate::limits::PRECOPY_BATCH_PAGES;

/// Runs of pages that are read in one call, and what was read of them.
#[derive(Debug)]
pub(super) struct Batch {
    wanted: VecDeque<PageRun>,
    pages: u64,
    room: Vec<u8>,
}

/// Pages that were read, all of them zero or none.
pub(super) struct Piece<'a> {
    pub(super) run: PageRun,
    pub(super) data: &'a [u8],
    pub(super) zero: bool,
}

impl Default for Batch {
    fn default() -> Self {
        Self { wanted: VecDeque::new(), pages: 0, room: vec![0; bytes(PRECOPY_BATCH_PAGES)] }
    }
}

impl Batch {
    /// Takes as many of these pages in as there is room for; the rest of them.
    pub(super) fn take(&mut self, run: PageRun) -> Option<PageRun> {
        let fit = run.pages.min(PRECOPY_BATCH_PAGES - self.pages);
        self.wanted.extend(PageRun::new(run.start, fit));
        self.pages += fit;
        PageRun::new(run.start.add(fit), run.pages - fit)
    }

    /// Whether nothing more can be taken in.
    pub(super) const fn is_full(&self) -> bool {
        self.pages == PRECOPY_BATCH_PAGES
    }

    /// Reads the pages and hands what is there to `each`; the batch is empty then.
    pub(super) fn read<E>(
        &mut self,
        pid: u32,
        mut each: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.pages = 0;
        while !self.wanted.is_empty() {
            let mut got = read(pid, self.wanted.make_contiguous(), &mut self.room);
            let mut at = 0;
            while let Some(run) = self.wanted.pop_front() {
                let here = run.pages.min(got);
                if let Some(read) = PageRun::new(run.start, here) {
                    pieces(read, &self.room[bytes(at)..bytes(at + here)], &mut each)?;
                }
                (at, got) = (at + here, got - here);
                if here < run.pages {
                    // The next page is gone, or cannot be read.
                    let rest = PageRun::new(run.start.add(here + 1), run.pages - here - 1);
                    rest.into_iter().for_each(|rest| self.wanted.push_front(rest));
                    break;
                }
            }
        }
        Ok(())
    }
}

fn bytes(pages: u64) -> usize {
    usize::try_from(pages_to_bytes(pages)).unwrap_or(usize::MAX)
}

/// How many pages could be read, up to the first that could not.
fn read(pid: u32, runs: &[PageRun], room: &mut [u8]) -> u64 {
    let Ok(pid) = i32::try_from(pid) else { return 0 };
    let there = |run: &PageRun| RemoteIoVec {
        base: usize::try_from(run.start.get()).unwrap_or(usize::MAX),
        len: bytes(run.pages),
    };
    let there: Vec<RemoteIoVec> = runs.iter().map(there).collect();
    let len = there.iter().map(|there| there.len).sum::<usize>().min(room.len());
    let got = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(&mut room[..len])], &there);
    got.unwrap_or(0) as u64 / PAGE_BYTES
}

/// Hands pages to `each`, cut where zero pages and others meet.
fn pieces<E>(run: PageRun, data: &[u8], each: &mut impl FnMut(Piece<'_>) -> Result<(), E>) -> Result<(), E> {
    let mut pages = data.chunks_exact(PAGE_SIZE).map(is_zero).enumerate().peekable();
    while let Some((first, zero)) = pages.next() {
        let mut behind = first + 1;
        while pages.next_if(|(_, next)| *next == zero).is_some() {
            behind += 1;
        }
        let Some(run) = PageRun::new(run.start.add(first as u64), (behind - first) as u64) else { break };
        each(Piece { run, data: &data[first * PAGE_SIZE..behind * PAGE_SIZE], zero })?;
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|line| line.iter().fold(0, |sum, byte| sum | byte) == 0)
}

impl Piece<'_> {
    /// As [`Piece::frame`], compressed, if that makes it smaller.
    pub(super) fn packed<'c>(
        &self,
        task: TaskId,
        round: u32,
        compressor: &'c mut Compressor,
    ) -> Option<([u8; 32], &'c [u8])> {
        let block = compressor.compress(self.data).filter(|_| !self.zero)?;
        let head = TaskRun { task, run: self.run }.frame(Kind::PrecopyLz4, u64::from(round), block.len());
        Some((head, block))
    }

    /// The frame's head, and its body behind that.
    pub(super) fn frame(&self, task: TaskId, round: u32) -> ([u8; 32], &[u8]) {
        let what = TaskRun { task, run: self.run };
        let (kind, data): (_, &[u8]) = match self.zero {
            true => (Kind::PrecopyZero, &[]),
            false => (Kind::Precopy, self.data),
        };
        (what.frame(kind, u64::from(round), data.len()), data)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use protocol::units::ImageAddr;

    use super::*;

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun::new(ImageAddr::containing(start), pages).unwrap()
    }

    #[test]
    fn reads_what_is_there_and_leaves_out_what_is_not() {
        let mut region = kernel::arena::Region::anonymous(300).unwrap();
        for page in 0..300 {
            let zero = page % 10 == 3;
            region.page(page)[5].store(u64::from(!zero) * page as u64, std::sync::atomic::Ordering::Relaxed);
        }
        let mut hole = region.split_off(40);
        let behind = hole.split_off(20);
        drop(hole);
        let start = region.address() as u64;
        let page = |number: u64| start + number * PAGE_BYTES;
        let mut batch = Batch::default();
        assert_eq!(batch.take(run(page(1), 4)), None);
        assert_eq!(batch.take(run(page(30), 40)), None);
        assert_eq!(batch.take(run(page(50), 1)), None);
        let rest = batch.take(run(page(70), 230)).unwrap();
        assert_eq!((rest, batch.is_full()), (run(page(281), 19), true));
        let mut seen = Vec::new();
        let read = batch.read::<Infallible>(std::process::id(), |piece| {
            let first = (piece.run.start.get() - start) / PAGE_BYTES;
            assert_eq!(piece.data.len(), bytes(piece.run.pages));
            for (number, data) in (first..).zip(piece.data.chunks_exact(PAGE_SIZE)) {
                let zero = number % 10 == 3 || number == 0;
                assert_eq!(piece.zero, zero);
                let word = u64::from_ne_bytes(data[40..48].try_into().unwrap());
                assert_eq!(word, if zero { 0 } else { number });
                seen.push(number);
            }
            Ok(())
        });
        read.unwrap();
        let wanted: Vec<u64> = (1..5).chain(30..40).chain(60..70).chain(70..281).collect();
        assert_eq!(seen, wanted);
        assert!(!batch.is_full());
        drop(behind);
    }
}
