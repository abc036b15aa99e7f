//! The fault lane of a session.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use protocol::link::Stream;
use protocol::units::{PAGE_SIZE, PageRun, TaskId};
use protocol::wire::frame::{Kind, RUN_HEADER_LEN, RunFrame, TaskRun};
use protocol::wire::limits;

use super::{Answer, AskId, Upstream, UpstreamError};
use crate::inflight::Purpose;

/// Room for several answers, at least for the largest.
const BUFFER: usize = 2 * (RUN_HEADER_LEN + limits::PAGES_PER_FRAME_MAX as usize * PAGE_SIZE);

/// The fault lane of a session, destination's side.
pub struct FaultLane {
    stream: Stream,
    unsent: Vec<u8>,
    due: Option<Instant>,
    buffer: Vec<u8>,
    filled: usize,
    received: Arc<AtomicU64>,
}

impl FaultLane {
    /// Over a stream whose hello is done; counts what it receives in `received`.
    #[must_use]
    pub fn new(stream: Stream, received: Arc<AtomicU64>) -> Self {
        let (unsent, buffer) = (Vec::with_capacity(4096), vec![0; BUFFER]);
        Self { stream, unsent, due: None, buffer, filled: 0, received }
    }
}

impl Upstream for FaultLane {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.stream.as_fd())
    }

    fn ask(&mut self, id: AskId, purpose: Purpose, task: TaskId, run: PageRun) -> Result<(), UpstreamError> {
        let kind = if purpose == Purpose::Demand { Kind::Demand } else { Kind::Prefetch };
        let frame = TaskRun { task, run }.frame(kind, id, 0);
        self.unsent.extend_from_slice(&frame);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), UpstreamError> {
        while !self.unsent.is_empty() {
            match self.stream.send_some(&self.unsent)? {
                0 => break,
                sent => drop(self.unsent.drain(..sent)),
            }
        }
        self.due = self.stream.tend()?;
        Ok(())
    }

    fn due(&self) -> Option<Instant> {
        self.due
    }

    fn wants_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn answers(&mut self, each: &mut dyn FnMut(Answer<'_>)) -> Result<(), UpstreamError> {
        loop {
            match self.stream.receive_some(&mut self.buffer[self.filled..])? {
                None => return Ok(()),
                Some(0) => return Err(UpstreamError::Closed),
                Some(got) => {
                    self.filled += got;
                    self.received.fetch_add(got as u64, Ordering::Relaxed);
                }
            }
            let used = take_frames(&self.buffer[..self.filled], each)?;
            let whole_buffer = self.filled == self.buffer.len();
            self.buffer.copy_within(used..self.filled, 0);
            self.filled -= used;
            if !whole_buffer {
                return Ok(());
            }
        }
    }

    fn background(&self) -> Option<(u64, u64)> {
        None
    }

    fn finish(&mut self) -> Result<(), UpstreamError> {
        Ok(())
    }
}

/// Hands over every whole frame at the start of `bytes`; returns how many bytes they took.
///
/// # Errors
/// [`UpstreamError::Protocol`]; answers before the error were handed over.
pub fn take_frames(bytes: &[u8], each: &mut dyn FnMut(Answer<'_>)) -> Result<usize, UpstreamError> {
    let mut used = 0;
    while let Some(head) = bytes[used..].first_chunk::<RUN_HEADER_LEN>() {
        let frame = RunFrame::decode(head).map_err(|error| UpstreamError::Protocol(error.to_string()))?;
        if !matches!(frame.kind, Kind::Pages | Kind::Settled | Kind::Declined) {
            return Err(UpstreamError::Protocol(format!("{:?} from the source is no answer", frame.kind)));
        }
        let start = used + RUN_HEADER_LEN;
        let Some(data) = bytes.get(start..start + frame.data_len) else { break };
        each(Answer { id: frame.id, data });
        used = start + frame.data_len;
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::units::ImageAddr;

    #[test]
    fn frames_are_taken_whole_and_in_order() {
        let run = |page: u64| TaskRun {
            task: TaskId(1),
            run: PageRun::new(ImageAddr::containing(page << 12), 1).unwrap(),
        };
        let mut bytes = run(1).frame(Kind::Pages, 7, PAGE_SIZE).to_vec();
        bytes.extend([5; PAGE_SIZE]);
        bytes.extend(run(2).frame(Kind::Settled, 8, 0));
        let whole = bytes.len();
        bytes.extend(&run(3).frame(Kind::Pages, 9, PAGE_SIZE)[..20]);
        let mut seen = Vec::new();
        let used = take_frames(&bytes, &mut |answer| seen.push((answer.id, answer.data.len()))).unwrap();
        assert_eq!((used, seen), (whole, vec![(7, PAGE_SIZE), (8, 0)]));
        for (kind, data) in
            [(Kind::Demand, 0), (Kind::Prefetch, 0), (Kind::Precopy, PAGE_SIZE), (Kind::PrecopyLz4, 7)]
        {
            let mut bytes = run(1).frame(kind, 1, data).to_vec();
            bytes.resize(bytes.len() + data, 0);
            assert!(take_frames(&bytes, &mut |_| panic!("{kind:?}")).is_err());
        }
    }
}
