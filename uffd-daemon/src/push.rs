//! The push lane, destination's side: pages in, acknowledgements out.
//!
//! One thread receives what is there and installs it in slices, so that a fault never waits behind more than one
//! slice in the kernel or in a family's lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use host::{privileges, waiting};
use kernel::uffd::Uffd;
use protocol::link::Stream;
use protocol::units::pages_to_bytes;
use protocol::wire::codec::CodecError;
use protocol::wire::frame::encode_ack;
use protocol::wire::limits::RUNS_PER_ACK_MAX;

use crate::background::install_slice;
use crate::intake::Intake;
use crate::limits;
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
    intake: Intake<Arc<Uffd>>,
    swept: Instant,
    /// Installed, ever.
    pages: u64,
}

impl PushLane {
    /// Over a stream whose hello is done; counts the bytes of frames that are not their pages in `heads`.
    #[must_use]
    pub fn new(stream: Stream, tree: Arc<Tree>, heads: Arc<AtomicU64>) -> Self {
        Self { stream, intake: Intake::new(tree.clone(), heads), tree, swept: Instant::now(), pages: 0 }
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
                    tracing::debug!(pages = self.pages, "a push lane has ended");
                    return Ok(());
                }
            }
            if let Some(position) = self.intake.take_pieces()? {
                self.install(position)?;
            } else if waiting::link_within(&self.stream, limits::ACK_INTERVAL)? {
                self.receive()?;
            } else {
                self.tree.check_settled();
            }
        }
    }

    fn receive(&mut self) -> Result<(), PushError> {
        match self.stream.receive_some(self.intake.room()).map_err(closed)? {
            Some(0) => Err(PushError::Closed),
            got => {
                self.intake.received(got.unwrap_or(0));
                Ok(())
            }
        }
    }

    /// Installs and acknowledges the pieces.
    fn install(&mut self, position: usize) -> Result<(), PushError> {
        let Self { tree, intake, .. } = self;
        let mut complete = false;
        install_slice(tree, position, |family| {
            let piece = intake.install(family)?;
            complete = family.remote_pages() == 0;
            Ok(piece)
        })
        .map_err(PushError::Install)?;
        self.pages += intake.pages();
        tree.pushed_bytes.fetch_add(pages_to_bytes(intake.pages()), Ordering::Relaxed);
        if complete {
            tree.check_settled();
        }
        // What stays is sent with the next frames, or by the next sweep.
        if complete || self.intake.acks.len() >= limits::ACKED_TOGETHER { self.send_acks() } else { Ok(()) }
    }

    /// Acknowledges what was settled otherwise: by faults, or because the task dropped it.
    fn sweep(&mut self) -> Result<(), PushError> {
        self.swept = Instant::now();
        loop {
            self.tree.acknowledge(RUNS_PER_ACK_MAX, &mut self.intake.acks);
            // What faults settled meanwhile is for the next time.
            let all = self.intake.acks.len() < RUNS_PER_ACK_MAX;
            self.send_acks()?;
            if all {
                return Ok(());
            }
        }
    }

    fn send_acks(&mut self) -> Result<(), PushError> {
        let acks = &mut self.intake.acks;
        if !acks.is_empty() {
            // Once it is said, the source lets go.
            self.tree.record_acknowledged(acks);
            self.stream.send_all(&encode_ack(acks), false)?;
            acks.clear();
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
