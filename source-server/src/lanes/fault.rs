//! Demand requests in, pages out. One thread that waits for nothing but the next request.

use std::sync::atomic::Ordering;

use host::placement::Processors;
use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, PageRun};
use protocol::wire::frame::{Kind, RUN_HEADER_LEN, RunFrame, TaskRun};

use super::{LaneError, Lanes};
use crate::ledger::index_of;
use crate::limits;
use crate::store::Scratch;

/// Requests that one receive may take.
const REQUESTS: usize = 64;

/// Serves the fault lane until it ends. Every request is answered, whatever was pushed before.
///
/// # Errors
/// [`LaneError`]; [`LaneError::Closed`] is how a lane ends.
pub fn serve_faults(lanes: &Lanes, lane: &Stream) -> Result<(), LaneError> {
    let ended = serve(lanes, lane);
    // The push must not wait for a fault of a lane that has ended.
    lanes.fault_served.store(false, Ordering::Relaxed);
    ended
}

fn serve(lanes: &Lanes, lane: &Stream) -> Result<(), LaneError> {
    let broken = LaneError::io("fault");
    if let Err(error) = kernel::sched::set_slice(limits::SLICE_NS) {
        tracing::debug!("no short time slice for the fault lane: {error}");
    }
    let mut scratch = Scratch::new(lanes.store.chunk_pages()).map_err(&broken)?;
    let mut buffer = vec![0; REQUESTS * RUN_HEADER_LEN];
    let mut page = vec![0; PAGE_SIZE];
    let mut filled = 0;
    let allowed = Processors::allowed().ok();
    let mut home = None;
    loop {
        let got = lane.receive(&mut buffer[filled..]).map_err(&broken)?;
        if got == 0 {
            return Err(LaneError::Closed("fault"));
        }
        filled += got;
        lanes.fault_served.store(true, Ordering::Relaxed);
        let mut used = 0;
        while let Some(head) = buffer[used..filled].first_chunk::<RUN_HEADER_LEN>() {
            let frame = RunFrame::decode(head)?;
            if !matches!(frame.kind, Kind::Demand | Kind::Prefetch) {
                return Err(unexpected(frame.kind).into());
            }
            // The first is what a thread waits for; those behind it, mostly asked for ahead, may travel together.
            let more = used > 0 && filled - used >= 2 * RUN_HEADER_LEN;
            answer(lanes, lane, &mut scratch, &mut page, &frame, more)?;
            used += RUN_HEADER_LEN;
        }
        lanes.fault_served.store(false, Ordering::Relaxed);
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

fn unexpected(kind: Kind) -> protocol::wire::codec::CodecError {
    protocol::wire::codec::CodecError::Meaning { field: "frame kind on this lane", value: kind as u64 }
}

/// Answers one request: a `Demand` whatever was sent before, a `Prefetch` up to the first page that was.
fn answer(
    lanes: &Lanes,
    lane: &Stream,
    scratch: &mut Scratch,
    page: &mut Vec<u8>,
    request: &RunFrame,
    more: bool,
) -> Result<(), LaneError> {
    let broken = LaneError::io("fault");
    let TaskRun { task, run } = request.what;
    let first = index_of(&lanes.map, &request.what)?;
    let ahead = request.kind == Kind::Prefetch;
    let wanted = if ahead { lanes.ledger().take_unsent_from(first, run.pages) } else { run.pages };
    let wanted = usize::try_from(wanted).unwrap_or(0);
    page.resize(wanted.max(1) * PAGE_SIZE, 0);
    let mut pages = 0;
    for (i, slot) in page.chunks_exact_mut(PAGE_SIZE).take(wanted).enumerate() {
        if !lanes.store.read(scratch, first + i as u64, slot)? {
            break;
        }
        pages += 1;
    }
    let Some(run) = PageRun::new(run.start, pages) else {
        // Acknowledged and freed, so the page is there and whoever waits only has to look again; or not worth
        // sending ahead.
        let kind = if ahead { Kind::Declined } else { Kind::Settled };
        let head = request.what.frame(kind, request.id, 0);
        lanes.fault_bytes.fetch_add(head.len() as u64, Ordering::Relaxed);
        lane.send_all(&head, more).map_err(broken)?;
        return Ok(());
    };
    let data = &page[..usize::try_from(pages).unwrap_or(0) * PAGE_SIZE];
    let head = TaskRun { task, run }.frame(Kind::Pages, request.id, data.len());
    // Before they are sent: the move may be over, and reported, as soon as they have arrived.
    lanes.fault_bytes.fetch_add((head.len() + data.len()) as u64, Ordering::Relaxed);
    lane.send_both(&head, data, more).map_err(broken)?;
    if ahead || lanes.ledger().sent(first, pages) {
        // A page that is on its way already says that the push is near.
        lanes.want(first + pages);
    }
    Ok(())
}
