//! The push lane, destination's side: pages in, acknowledgements out.
//!
//! One thread receives and installs in slices, so that a fault never waits behind more than one
//! slice in the kernel or in a family's lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use host::waiting;
use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, pages_to_bytes};
use protocol::wire::codec::CodecError;
use protocol::wire::frame::{Kind, RUN_HEADER_LEN, RunFrame, encode_ack};
use protocol::wire::limits::RUNS_PER_ACK_MAX;

use crate::background::install_slice;
use crate::limits;
use crate::pages::Origin;
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
    slice: Vec<u8>,
    acks: Vec<protocol::wire::frame::TaskRun>,
    swept: Instant,
}

impl PushLane {
    /// Over a stream whose hello is done; counts the bytes of frames that are not their pages in `heads`.
    #[must_use]
    pub fn new(stream: Stream, tree: Arc<Tree>, heads: Arc<AtomicU64>) -> Self {
        Self {
            stream,
            tree,
            heads,
            slice: vec![0; limits::INSTALL_SLICE_PAGES * PAGE_SIZE],
            acks: Vec::new(),
            swept: Instant::now(),
        }
    }

    /// Installs what comes until every page of the tree is settled and acknowledged.
    ///
    /// # Errors
    /// [`PushError`].
    pub fn run(mut self) -> Result<(), PushError> {
        if let Err(error) = kernel::sched::set_slice(limits::SLICE_NS) {
            tracing::debug!("no short time slice for the push: {error}");
        }
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
            if !waiting::link_within(&self.stream, limits::ACK_INTERVAL)? {
                self.tree.check_settled();
                continue;
            }
            self.frame()?;
        }
    }

    /// Receives one frame and installs it slice by slice, each while it is still in the processor's cache.
    fn frame(&mut self) -> Result<(), PushError> {
        let mut head = [0; RUN_HEADER_LEN];
        self.stream.receive_all(&mut head).map_err(closed)?;
        let frame = RunFrame::decode(&head)?;
        if frame.kind != Kind::Pages {
            return Err(
                CodecError::Meaning { field: "frame kind on this lane", value: frame.kind as u64 }.into()
            );
        }
        let run = frame.what.run;
        let (position, first) = self.place(&frame)?;
        self.heads.fetch_add(RUN_HEADER_LEN as u64, Ordering::Relaxed);
        let slice_pages = limits::INSTALL_SLICE_PAGES as u64;
        let mut at = first;
        while at < first + run.pages {
            let pages = slice_pages.min(first + run.pages - at);
            let bytes = usize::try_from(pages_to_bytes(pages)).unwrap_or(0).min(self.slice.len());
            self.stream.receive_all(&mut self.slice[..bytes]).map_err(closed)?;
            let data = &self.slice[..bytes];
            install_slice(&self.tree, position, (at, at + pages), |family| {
                family.arrived(at, data, Origin::Push)
            })
            .map_err(PushError::Install)?;
            at += pages;
        }
        self.tree.pushed_bytes.fetch_add(frame.data_len as u64, Ordering::Relaxed);
        let mut family = self.tree.lock_last(position);
        family.acknowledge(first, first + run.pages, RUNS_PER_ACK_MAX, &mut self.acks);
        let complete = family.remote_pages() == 0;
        drop(family);
        if complete {
            self.tree.check_settled();
        }
        // What stays is sent with the next frames, or by the next sweep.
        if complete || self.acks.len() >= limits::ACKED_TOGETHER { self.send_acks() } else { Ok(()) }
    }

    /// Position of the frame's family, and the index of its first page there.
    fn place(&self, frame: &RunFrame) -> Result<(usize, u64), PushError> {
        let (task, run) = (frame.what.task, frame.what.run);
        let not_lazy = PushError::NotLazy { task, start: run.start, pages: run.pages };
        let Some(position) = self.tree.position(task) else { return Err(not_lazy) };
        let family = self.tree.lock_last(position);
        let map = family.map();
        let found = map.run_at(run.start).filter(|found| run.end() <= found.run.end());
        let Some(found) = found else { return Err(not_lazy) };
        let first = found.first - map.first + run.start.pages_since(found.run.start);
        Ok((position, first))
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
