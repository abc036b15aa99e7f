//! Demand requests in, pages out. One thread that waits for nothing but the next request.
//!
//! What came in one receive is answered in one send, up to [`limits::ANSWERS_BYTES`]: many threads that fault share the
//! cost of the system call and of the wake-up at the other end. A single fault is never held back for another, and
//! what was only asked for ahead does not delay the fault in front of it.

use std::sync::atomic::Ordering;

use host::placement::Processors;
use host::privileges;
use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, PageRun, pages_to_bytes};
use protocol::wire::frame::{Kind, RUN_HEADER_LEN, RunFrame, TaskRun};

use super::{LaneError, Lanes};
use crate::ledger::index_of;
use crate::limits;
use crate::store::Scratch;

/// Requests that one receive may take.
const REQUESTS: usize = 64;
/// Largest answer: it is added to at most [`limits::ANSWERS_BYTES`].
const ANSWER_MAX: usize =
    limits::ANSWERS_BYTES + RUN_HEADER_LEN + protocol::wire::limits::PAGES_PER_FRAME_MAX as usize * PAGE_SIZE;

/// Serves the fault lane until it ends. Every request is answered, whatever was pushed before.
///
/// # Errors
/// [`LaneError`]; [`LaneError::Closed`] is how a lane ends.
pub fn serve_faults(lanes: &Lanes, lane: &Stream) -> Result<(), LaneError> {
    let broken = LaneError::io("fault");
    if let Err(error) = kernel::sched::set_slice(limits::SLICE_NS) {
        tracing::debug!("no short time slice for the fault lane: {error}");
    }
    let mut scratch = Scratch::new(lanes.store.chunk_pages()).map_err(&broken)?;
    // Behind the pipes of the scratch: those of a user without rights are small once he has many.
    privileges::renounce();
    let mut buffer = vec![0; REQUESTS * RUN_HEADER_LEN];
    let mut answers =
        Answers::new(lanes, |bytes| lane.send_all(bytes, false).map_err(LaneError::io("fault")));
    let mut filled = 0;
    let allowed = Processors::allowed().ok();
    let mut home = None;
    loop {
        let got = lane.receive(&mut buffer[filled..]).map_err(&broken)?;
        if got == 0 {
            return Err(LaneError::Closed("fault"));
        }
        filled += got;
        let served = Served::begin(lanes);
        let mut used = 0;
        while let Some(head) = buffer[used..filled].first_chunk::<RUN_HEADER_LEN>() {
            let frame = RunFrame::decode(head)?;
            if !matches!(frame.kind, Kind::Demand | Kind::Prefetch) {
                return Err(unexpected(frame.kind).into());
            }
            answers.add(&mut scratch, &frame)?;
            used += RUN_HEADER_LEN;
        }
        answers.send()?;
        drop(served);
        // Where the requests arrive: the next one need not wake another processor.
        if let (Some(allowed), Some(cpu)) = (allowed, lane.incoming_processor()) {
            lanes.note_served(cpu);
            if home != Some(cpu) {
                home = Some(cpu);
                // If it is refused, the thread runs wherever it did.
                let _ = allowed.just(home).keep(0);
            }
        }
        buffer.copy_within(used..filled, 0);
        filled -= used;
    }
}

/// Faults are being served, until it is dropped: the push must not wait for those of a lane that has ended.
struct Served<'a>(&'a Lanes);

impl<'a> Served<'a> {
    fn begin(lanes: &'a Lanes) -> Self {
        lanes.faults_served.fetch_add(1, Ordering::Relaxed);
        Self(lanes)
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.0.faults_served.fetch_sub(1, Ordering::Relaxed);
    }
}

fn unexpected(kind: Kind) -> protocol::wire::codec::CodecError {
    protocol::wire::codec::CodecError::Meaning { field: "frame kind on this lane", value: kind as u64 }
}

/// Answers that were not sent yet.
pub struct Answers<'a, S> {
    lanes: &'a Lanes,
    send: S,
    bytes: Vec<u8>,
    /// The last of them was asked for ahead.
    ahead: bool,
}

impl<'a, S: FnMut(&[u8]) -> Result<(), LaneError>> Answers<'a, S> {
    /// None yet; `send` puts them on the lane.
    #[must_use]
    pub fn new(lanes: &'a Lanes, send: S) -> Self {
        Self { lanes, send, bytes: Vec::with_capacity(ANSWER_MAX), ahead: false }
    }

    /// Adds the answer to one request: to a `Demand` whatever was sent before, to a `Prefetch` up to the first page
    /// that was.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn add(&mut self, scratch: &mut Scratch, request: &RunFrame) -> Result<(), LaneError> {
        let TaskRun { task, run } = request.what;
        let first = index_of(&self.lanes.map, &request.what)?;
        let ahead = request.kind == Kind::Prefetch;
        if ahead != self.ahead || self.bytes.len() >= limits::ANSWERS_BYTES {
            self.send()?;
        }
        self.ahead = ahead;
        let wanted = if ahead { self.lanes.ledger().take_unsent_from(first, run.pages) } else { run.pages };
        let at = self.bytes.len();
        let data = at + RUN_HEADER_LEN;
        let end_of = |pages: u64| data + usize::try_from(pages_to_bytes(pages)).unwrap_or(0);
        self.bytes.resize(end_of(wanted), 0);
        let mut pages = 0;
        while pages < wanted {
            match self.lanes.store.read(scratch, first + pages, &mut self.bytes[end_of(pages)..])? {
                0 => break,
                read => pages += read,
            }
        }
        let head = if let Some(run) = PageRun::new(run.start, pages) {
            self.bytes.truncate(end_of(pages));
            TaskRun { task, run }.frame(Kind::Pages, request.id, self.bytes.len() - data)
        } else {
            // Acknowledged and freed, so the page is there and whoever waits only has to look again; or not worth
            // sending ahead.
            self.bytes.truncate(data);
            request.what.frame(if ahead { Kind::Declined } else { Kind::Settled }, request.id, 0)
        };
        self.bytes[at..data].copy_from_slice(&head);
        if pages > 0 && (ahead || self.lanes.ledger().sent(first, pages)) {
            // A page that is on its way already says that the push is near.
            self.lanes.want(first + pages);
        }
        Ok(())
    }

    /// Sends those that were added.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn send(&mut self) -> Result<(), LaneError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        // Before they are sent: the move may be over, and reported, as soon as they have arrived.
        self.lanes.fault_bytes.fetch_add(self.bytes.len() as u64, Ordering::Relaxed);
        (self.send)(&self.bytes)?;
        self.bytes.clear();
        Ok(())
    }
}
