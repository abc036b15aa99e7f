//! What has come over the push lane: frames, taken apart as they arrive, and installed in slices. Whoever waits does that elsewhere.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::units::{PAGE_SIZE, pages_to_bytes};
use protocol::wire::codec::CodecError;
use protocol::wire::frame::{Kind, RUN_HEADER_LEN, RunFrame, TaskRun};
use protocol::wire::limits::RUNS_PER_ACK_MAX;

use crate::background::Piece;
use crate::limits;
use crate::pages::{Arrival, Family, Installer, Origin};
use crate::push::PushError;
use crate::tree::Tree;

/// Pages that have come and are not installed yet, and what is to be acknowledged of those that are.
#[derive(Debug)]
pub struct Intake<I> {
    tree: Arc<Tree<I>>,
    heads: Arc<AtomicU64>,
    /// What was received; `taken..filled` is still to be dealt with.
    buffer: Vec<u8>,
    taken: usize,
    filled: usize,
    /// The frame whose pages come next.
    frame: Option<Rest>,
    pieces: Vec<Received>,
    /// How many of them are installed.
    installed: usize,
    /// What is settled and was not acknowledged yet.
    pub acks: Vec<TaskRun>,
}

/// What is left of a frame: `pages` pages of a family from `first`.
#[derive(Clone, Copy, Debug)]
struct Rest {
    position: usize,
    first: u64,
    pages: u64,
}

/// Pages of a frame that are in the buffer, from its byte `at`.
#[derive(Clone, Copy, Debug)]
struct Received {
    first: u64,
    pages: u64,
    at: usize,
}

impl<I: Installer> Intake<I> {
    /// Of a lane that nothing has come over yet; counts the bytes of frames that are not their pages in `heads`.
    #[must_use]
    pub fn new(tree: Arc<Tree<I>>, heads: Arc<AtomicU64>) -> Self {
        Self {
            tree,
            heads,
            buffer: vec![0; limits::PUSH_BUFFER],
            taken: 0,
            filled: 0,
            frame: None,
            pieces: Vec::with_capacity(limits::INSTALL_SLICE_PAGES),
            installed: 0,
            acks: Vec::new(),
        }
    }

    /// Where what comes next is to be put. Not while pieces are being installed: they are moved.
    pub fn room(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.taken..self.filled, 0);
        self.filled -= self.taken;
        self.taken = 0;
        &mut self.buffer[self.filled..]
    }

    /// So many bytes were put there.
    pub const fn received(&mut self, bytes: usize) {
        self.filled += bytes;
    }

    /// The next pages that are in the buffer, as many as are installed at a time, of one family, whose position this is.
    /// Memory that was read here and there is pushed in frames of few pages.
    ///
    /// # Errors
    /// [`PushError::Malformed`], [`PushError::NotLazy`].
    pub fn take_pieces(&mut self) -> Result<Option<usize>, PushError> {
        self.pieces.clear();
        self.installed = 0;
        let mut room = limits::INSTALL_SLICE_PAGES as u64;
        let mut position = None;
        while room > 0 {
            let Some(mut frame) = self.take_head()? else { break };
            if *position.get_or_insert(frame.position) != frame.position {
                break;
            }
            let pages = frame
                .pages
                .min(room)
                .min(limits::PIECE_PAGES)
                .min(((self.filled - self.taken) / PAGE_SIZE) as u64);
            if pages == 0 {
                break;
            }
            self.pieces.push(Received { first: frame.first, pages, at: self.taken });
            self.taken += usize::try_from(pages_to_bytes(pages)).unwrap_or(0);
            room -= pages;
            frame.first += pages;
            frame.pages -= pages;
            self.frame = Some(frame).filter(|frame| frame.pages > 0);
        }
        Ok(position.filter(|_| !self.pieces.is_empty()))
    }

    /// The frame whose pages come next, if its head is there.
    fn take_head(&mut self) -> Result<Option<Rest>, PushError> {
        if self.frame.is_some() {
            return Ok(self.frame);
        }
        let Some(head) = self.buffer[self.taken..self.filled].first_chunk() else { return Ok(None) };
        let frame = RunFrame::decode(head)?;
        if frame.kind != Kind::Pages {
            return Err(
                CodecError::Meaning { field: "frame kind on this lane", value: frame.kind as u64 }.into()
            );
        }
        self.taken += RUN_HEADER_LEN;
        self.heads.fetch_add(RUN_HEADER_LEN as u64, Ordering::Relaxed);
        let (task, run) = (frame.what.task, frame.what.run);
        let place = self.tree.place(task, run);
        let not_lazy = PushError::NotLazy { task, start: run.start, pages: run.pages };
        let (position, first) = place.ok_or(not_lazy)?;
        self.frame = Some(Rest { position, first, pages: run.pages });
        Ok(self.frame)
    }

    /// Installs the next of the pieces that were taken, and notes what is to be acknowledged.
    ///
    /// # Errors
    /// An errno from the kernel that is no ordinary outcome.
    pub fn install(&mut self, family: &mut Family<I>) -> io::Result<Piece> {
        let Some(&Received { first, pages, at }) = self.pieces.get(self.installed) else {
            return Ok(Piece::Last);
        };
        let data = &self.buffer[at..][..usize::try_from(pages_to_bytes(pages)).unwrap_or(0)];
        let end = first + pages;
        if let Arrival::Blocked(why) = family.arrived(first, data, Origin::Push)? {
            return Ok(Piece::Blocked { why, first, end });
        }
        family.acknowledge(first, end, RUNS_PER_ACK_MAX, &mut self.acks);
        self.installed += 1;
        Ok(if self.installed < self.pieces.len() { Piece::More } else { Piece::Last })
    }

    /// Pages of the pieces that were taken.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.pages).sum()
    }
}
