//! The push lane, destination's side: pages in, acknowledgements out.
//!
//! One thread receives what is there and installs it in slices, so that a fault never waits behind more than one
//! slice in the kernel or in a family's lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use host::{privileges, waiting};
use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, pages_to_bytes};
use protocol::wire::codec::CodecError;
use protocol::wire::frame::{Kind, RUN_HEADER_LEN, RunFrame, encode_ack};
use protocol::wire::limits::RUNS_PER_ACK_MAX;

use crate::background::{Piece, install_slice};
use crate::limits;
use crate::pages::{Arrival, Origin};
use crate::tree::Tree;

/// Why the push ended before everything was settled.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The source closed the lane.
    #[error("the source closed the push lane")]
    Closed,
    /// The lane broke.
    #[error("the push lane broke: {0}")]
    Io(#[from] io::Error),
    /// The kernel refused an install.
    #[error("cannot install pushed pages: {0}")]
    Install(io::Error),
    /// A malformed frame.
    #[error("the source sent a malformed frame: {0}")]
    Malformed(#[from] CodecError),
    /// Pages that are not lazy.
    #[error("the source pushed {pages} pages at {start} of task {task}, which are no lazy run")]
    NotLazy {
        /// The task.
        task: protocol::units::TaskId,
        /// The first page.
        start: protocol::units::ImageAddr,
        /// How many.
        pages: u64,
    },
}

impl PushError {
    /// Whether the connection failed, and not who speaks over it or the kernel.
    #[must_use]
    pub const fn is_link(&self) -> bool {
        matches!(self, Self::Closed | Self::Io(_))
    }
}

/// A push lane.
pub struct PushLane {
    stream: Stream,
    tree: Arc<Tree>,
    heads: Arc<AtomicU64>,
    /// What was received; `taken..filled` is still to be dealt with.
    buffer: Vec<u8>,
    taken: usize,
    filled: usize,
    /// The frame whose pages come next.
    frame: Option<Rest>,
    pieces: Vec<Received>,
    acks: Vec<protocol::wire::frame::TaskRun>,
    swept: Instant,
}

/// What is left of a frame: `pages` pages of a family from `first`.
#[derive(Clone, Copy)]
struct Rest {
    position: usize,
    first: u64,
    pages: u64,
}

/// Pages of a frame that are in the buffer, from its byte `at`.
#[derive(Clone, Copy)]
struct Received {
    first: u64,
    pages: u64,
    at: usize,
}

impl PushLane {
    /// Over a stream whose hello is done; counts the bytes of frames that are not their pages in `heads`.
    #[must_use]
    pub fn new(stream: Stream, tree: Arc<Tree>, heads: Arc<AtomicU64>) -> Self {
        Self {
            stream,
            tree,
            heads,
            buffer: vec![0; limits::PUSH_BUFFER],
            taken: 0,
            filled: 0,
            frame: None,
            pieces: Vec::with_capacity(limits::INSTALL_SLICE_PAGES),
            acks: Vec::new(),
            swept: Instant::now(),
        }
    }

    /// Installs what comes until every page of the tree is settled and acknowledged.
    ///
    /// # Errors
    /// [`PushError`].
    pub fn run(mut self) -> Result<(), PushError> {
        if let Err(error) = kernel::sched::set_batch(limits::SLICE_NS) {
            tracing::debug!("no short time slice for the push: {error}");
        }
        privileges::renounce();
        let tree = self.tree.clone();
        let _steered = tree.push_thread.this_thread();
        let _pump = self.stream.pump_thread().map(|thread| tree.push_pump.thread(thread));
        loop {
            if self.swept.elapsed() >= limits::ACK_INTERVAL || self.tree.settled_at().is_some() {
                self.sweep()?;
                if self.tree.settled_at().is_some() && self.tree.all_acknowledged() {
                    return Ok(());
                }
            }
            if let Some(position) = self.take_pieces()? {
                self.install(position)?;
            } else if waiting::link_within(&self.stream, limits::ACK_INTERVAL)? {
                self.receive()?;
            } else {
                self.tree.check_settled();
            }
        }
    }

    fn receive(&mut self) -> Result<(), PushError> {
        self.buffer.copy_within(self.taken..self.filled, 0);
        self.filled -= self.taken;
        self.taken = 0;
        match self.stream.receive_some(&mut self.buffer[self.filled..]).map_err(closed)? {
            Some(0) => Err(PushError::Closed),
            got => {
                self.filled += got.unwrap_or(0);
                Ok(())
            }
        }
    }

    /// The next pages that are in the buffer, as many as are installed at a time, of one family, whose position this is.
    /// Memory that was read here and there is pushed in frames of few pages.
    fn take_pieces(&mut self) -> Result<Option<usize>, PushError> {
        self.pieces.clear();
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

    /// Installs and acknowledges the pieces.
    fn install(&mut self, position: usize) -> Result<(), PushError> {
        let Self { tree, buffer, pieces, acks, .. } = self;
        let mut complete = false;
        let mut left = pieces.iter();
        let mut piece = left.next();
        install_slice(tree, position, |family| {
            let Some(&Received { first, pages, at }) = piece else { return Ok(Piece::Last) };
            let data = &buffer[at..][..usize::try_from(pages_to_bytes(pages)).unwrap_or(0)];
            let end = first + pages;
            if let Arrival::Blocked(why) = family.arrived(first, data, Origin::Push)? {
                return Ok(Piece::Blocked { why, first, end });
            }
            family.acknowledge(first, end, RUNS_PER_ACK_MAX, acks);
            piece = left.next();
            complete = family.remote_pages() == 0;
            Ok(if piece.is_some() { Piece::More } else { Piece::Last })
        })
        .map_err(PushError::Install)?;
        let pages = pieces.iter().map(|piece| piece.pages).sum();
        self.tree.pushed_bytes.fetch_add(pages_to_bytes(pages), Ordering::Relaxed);
        if complete {
            self.tree.check_settled();
        }
        // What stays is sent with the next frames, or by the next sweep.
        if complete || self.acks.len() >= limits::ACKED_TOGETHER { self.send_acks() } else { Ok(()) }
    }

    /// Acknowledges what was settled otherwise: by faults, or because the task dropped it.
    fn sweep(&mut self) -> Result<(), PushError> {
        self.swept = Instant::now();
        loop {
            self.tree.acknowledge(RUNS_PER_ACK_MAX, &mut self.acks);
            // What faults settled meanwhile is for the next time.
            let all = self.acks.len() < RUNS_PER_ACK_MAX;
            self.send_acks()?;
            if all {
                return Ok(());
            }
        }
    }

    fn send_acks(&mut self) -> Result<(), PushError> {
        if !self.acks.is_empty() {
            // Once it is said, the source lets go.
            self.tree.record_acknowledged(&self.acks);
            self.stream.send_all(&encode_ack(&self.acks), false)?;
            self.acks.clear();
        }
        Ok(())
    }
}

fn closed(error: io::Error) -> PushError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => PushError::Closed,
        _ => PushError::Io(error),
    }
}
