//! The rounds: a thread that scans the tree, reads what was written, and sends it on the push lane.
//!
//! It waits for the tree's processors, the lane and the pace, so it is not the thread that listens for an interrupt: that one ends
//! it by [`Shared::stop`] and by shutting the lane down.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::link::Stream;
use protocol::units::{PageRun, TaskId, pages_to_bytes};
use protocol::wire::codec::CodecError;
use protocol::wire::frame::{HEADER_LEN, Header, Kind};
use protocol::wire::limits::AREAS_MAX;
use protocol::wire::lz4::Compressor;
use protocol::wire::precopy::{Areas, ROUND_LEN, Round as RoundEnd};

use super::Copied;
use super::compression::{Choice, Compress};
use super::pages::Batch;
use super::policy::{Decision, Policy, Rounds};
use crate::lanes::{LaneError, Pace, Throttle};
use crate::limits;
use crate::process::{ProcessTree, has_ended};
use crate::track::{Method, Pass, Round, TaskRound, Tracker, pins};

/// Frames shorter than this are sent together with others.
const SMALL_FRAME: usize = 64 << 10;
/// Bytes of small frames that are sent together.
const OUT_BYTES: usize = 256 << 10;

/// What is to be copied, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Root of the tree.
    pub root: u32,
    /// How many rounds.
    pub rounds: Rounds,
    /// How fast.
    pub pace: Pace,
    /// Most pages that the destination keeps.
    pub most_pages: u64,
    /// Whether pages are compressed.
    pub compress: Compress,
}

/// Why the rounds ended before their time. The tree runs, and is disarmed.
#[derive(Debug, thiserror::Error)]
pub enum RoundsError {
    /// Told to stop.
    #[error("called off")]
    Stopped,
    /// The process has ended.
    #[error("process {0} ended before it was frozen")]
    Ended(u32),
    /// The tree cannot be listed.
    #[error("cannot list the processes below {pid}: {source}")]
    Tree {
        /// Its root.
        pid: u32,
        /// The cause.
        source: io::Error,
    },
    /// The lane broke.
    #[error(transparent)]
    Lane(#[from] LaneError),
    /// The destination confirms another round.
    #[error("the destination confirms round {got} where {expected} was sent")]
    OtherRound {
        /// What came.
        got: u32,
        /// What was due.
        expected: u32,
    },
}

/// How far the rounds are.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// The round, from 1.
    pub round: u32,
    /// Pages that its scan found.
    pub written: u64,
    /// How many of them were sent.
    pub sent: u64,
    /// How many of these went compressed.
    pub compressed: u64,
    /// When it began.
    pub began: Instant,
    /// Bytes sent in all rounds.
    pub bytes: u64,
}

impl Status {
    /// Bytes of pages per second in this round.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    pub fn rate(&self) -> u64 {
        (pages_to_bytes(self.sent) as f64 / self.began.elapsed().as_secs_f64().max(1e-3)) as u64
    }
}

/// What the rounds share with who waits for them.
#[derive(Debug)]
pub struct Shared {
    /// The move is called off.
    pub stop: AtomicBool,
    status: Mutex<Status>,
}

impl Default for Shared {
    fn default() -> Self {
        let status = Status { round: 0, written: 0, sent: 0, compressed: 0, began: Instant::now(), bytes: 0 };
        Self { stop: AtomicBool::new(false), status: Mutex::new(status) }
    }
}

impl Shared {
    /// How far they are.
    #[must_use]
    pub fn status(&self) -> Status {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Status> {
        // Each change is complete in itself.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes all rounds: returns when the destination has the last one. An error leaves the tree disarmed.
///
/// # Errors
/// [`RoundsError`].
pub fn run(
    plan: &Plan,
    tracker: Box<dyn Tracker>,
    tree: &ProcessTree,
    lane: &Stream,
    shared: &Shared,
) -> Result<Copied, RoundsError> {
    if let Err(error) = kernel::sched::set_niceness(limits::PRECOPY_NICENESS) {
        tracing::debug!("the copying thread keeps its priority: {error}");
    }
    let silence = |limit| lane.set_timeout(limit).map_err(LaneError::io("push"));
    silence(Some(limits::PRECOPY_SILENCE))?;
    let throttle = Throttle::new(plan.pace);
    let mut copier = Copier {
        plan,
        method: tracker.method(),
        copied: Copied::new(tracker, plan.most_pages),
        known: tree.tasks.iter().map(|task| task.pid).collect(),
        sender: Sender { lane, shared, throttle, out: Vec::with_capacity(OUT_BYTES) },
        batch: Batch::default(),
        choice: Choice::new(plan.compress),
        compressor: Compressor::default(),
        untracked: HashSet::new(),
    };
    copier.rounds()?;
    silence(None)?;
    Ok(copier.copied)
}

/// Scans, reads, sends.
struct Copier<'a> {
    plan: &'a Plan,
    copied: Copied,
    method: Method,
    /// Processes that were there at the round before. A younger one is left to post-copy: it may be gone soon.
    known: HashSet<u32>,
    sender: Sender<'a>,
    batch: Batch,
    choice: Choice,
    compressor: Compressor,
    /// Tasks of which it was said that they cannot be tracked.
    untracked: HashSet<TaskId>,
}

impl Copier<'_> {
    fn rounds(&mut self) -> Result<(), RoundsError> {
        let mut policy = Policy::new(self.plan.rounds);
        let first = Instant::now();
        for number in 1.. {
            let began = Instant::now();
            let round = self.scan()?;
            let scanned = began.elapsed();
            let written = round.tasks.iter().flat_map(|task| self.to_copy(task)).map(|run| run.pages).sum();
            self.sender.begin(number, written);
            self.tell_areas(&round)?;
            let decision = policy.decide(written, first.elapsed());
            if !matches!(decision, Decision::Freeze(_)) {
                for task in &round.tasks {
                    self.copy(number, task)?;
                }
            }
            let last = decision.last();
            self.end(RoundEnd { number, last: last.is_some() })?;
            self.copied.record.keep_tasks(|task| round.tasks.iter().any(|found| found.task == task));
            let Status { sent, compressed, .. } = self.sender.shared.status();
            policy.copied(sent, began.elapsed());
            let stood = round.stops.iter().map(|stop| stop.stood).max().unwrap_or_default();
            tracing::info!(
                round = number,
                written,
                sent,
                compressed,
                ms = began.elapsed().as_millis(),
                scan_ms = scanned.as_millis(),
                armed = round.stops.len(),
                longest_stop_us = stood.as_micros(),
                "pre-copy"
            );
            if let Some(why) = last {
                tracing::info!("pre-copy ends after round {number}: {why}");
                break;
            }
        }
        Ok(())
    }

    /// The scan of a round, of the tree as it is now.
    fn scan(&mut self) -> Result<Round, RoundsError> {
        let pid = self.plan.root;
        let mut tree = ProcessTree::of(pid).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => RoundsError::Ended(pid),
            _ => RoundsError::Tree { pid, source },
        })?;
        if has_ended(pid) {
            return Err(RoundsError::Ended(pid));
        }
        let now = tree.tasks.iter().map(|task| task.pid).collect();
        let before = std::mem::replace(&mut self.known, now);
        tree.tasks.retain(|task| task.pid == pid || before.contains(&task.pid));
        let mut round = self.copied.tracker().scan(&tree, Pass::Round);
        for task in &mut round.tasks {
            if let (Method::WriteProtect | Method::SoftDirty, Ok(Some(why))) =
                (self.method, pins::of(task.pid))
            {
                task.untracked = Some(format!("{why}, through which memory is written unseen"));
            }
            if let Some(why) = task.untracked.as_ref().filter(|_| self.untracked.insert(task.task)) {
                tracing::warn!("the memory of task {} is not copied ahead: {why}", task.task);
            }
        }
        Ok(round)
    }

    /// What is worth copying of a task: nothing if its next scan will find everything written again, and not the kernel's
    /// page of zeros, which CRIU does not dump.
    fn to_copy<'t>(&self, task: &'t TaskRound) -> impl Iterator<Item = PageRun> + use<'t> {
        let by_kernel = self.method == Method::WriteProtect;
        let tracked = task.untracked.is_none();
        task.runs.iter().filter(move |run| tracked && !(by_kernel && run.zero)).map(|run| run.pages)
    }

    /// Tells where each task has memory; what the destination keeps elsewhere, it drops.
    fn tell_areas(&mut self, round: &Round) -> Result<(), RoundsError> {
        for task in &round.tasks {
            let (id, starts_again) = (task.task, task.is_void());
            let areas = fewer(&task.areas, AREAS_MAX);
            self.copied.record.keep_within(id, starts_again, &areas);
            task.runs.iter().for_each(|run| self.copied.record.written(id, run.pages));
            self.sender.send(&Areas { task: id, starts_again, areas }.encode(), &[])?;
        }
        Ok(())
    }

    fn copy(&mut self, round: u32, task: &TaskRound) -> Result<(), RoundsError> {
        for run in self.to_copy(task) {
            let mut rest = Some(run);
            while let Some(run) = rest {
                rest = self.batch.take(run);
                if self.batch.is_full() {
                    self.send_batch(round, task)?;
                }
            }
        }
        self.send_batch(round, task)
    }

    fn send_batch(&mut self, round: u32, task: &TaskRound) -> Result<(), RoundsError> {
        let (copied, sender, compressor) = (&mut self.copied, &mut self.sender, &mut self.compressor);
        let compress = self.choice.compresses();
        let (mut pages, mut compressed) = (0, 0);
        let (mut bytes, mut took) = (0, Duration::ZERO);
        self.batch.read(task.pid, |piece| -> Result<(), RoundsError> {
            if !copied.record.has_room(task.task, piece.run) {
                return Ok(());
            }
            let begun = Instant::now();
            let packed = if compress { piece.packed(task.task, round, compressor) } else { None };
            compressed += packed.map_or(0, |_| piece.run.pages);
            let (head, data) = packed.unwrap_or_else(|| piece.frame(task.task, round));
            sender.send(&head, data)?;
            if !piece.zero {
                (bytes, took) = (bytes + piece.data.len() as u64, took + begun.elapsed());
            }
            copied.record.sent(task.task, piece.run);
            copied.tracker().copied(task.task, piece.run.start, piece.data);
            pages += piece.run.pages;
            Ok(())
        })?;
        self.choice.sent(compress, bytes, took);
        sender.sent(pages, compressed)
    }

    /// Ends the round: the destination has it when this returns.
    fn end(&mut self, round: RoundEnd) -> Result<(), RoundsError> {
        self.sender.send(&round.encode(), &[])?;
        self.sender.flush()?;
        let mut frame = [0; HEADER_LEN + ROUND_LEN];
        self.sender.lane.receive_all(&mut frame).map_err(LaneError::io("push"))?;
        let (head, body) = frame.split_at(HEADER_LEN);
        let header =
            Header::decode(head.first_chunk().unwrap_or(&[0; HEADER_LEN])).map_err(LaneError::from)?;
        if header.kind != Kind::Round || header.body_len != ROUND_LEN {
            let error = CodecError::Meaning { field: "frame kind on this lane", value: header.kind as u64 };
            return Err(LaneError::from(error).into());
        }
        let confirmed = RoundEnd::decode(body).map_err(LaneError::from)?;
        match confirmed == round {
            true => Ok(()),
            false => Err(RoundsError::OtherRound { got: confirmed.number, expected: round.number }),
        }
    }
}

/// The sending end of the lane.
struct Sender<'a> {
    lane: &'a Stream,
    shared: &'a Shared,
    throttle: Throttle,
    /// Small frames on their way to be sent together.
    out: Vec<u8>,
}

impl Sender<'_> {
    fn begin(&mut self, round: u32, written: u64) {
        self.throttle.restart();
        let mut status = self.shared.lock();
        *status = Status { round, written, sent: 0, compressed: 0, began: Instant::now(), ..*status };
    }

    fn send(&mut self, head: &[u8], data: &[u8]) -> Result<(), RoundsError> {
        // Before they are sent: the destination reports as soon as they have arrived.
        self.shared.lock().bytes += (head.len() + data.len()) as u64;
        if data.len() >= SMALL_FRAME {
            self.flush()?;
            return Ok(self.lane.send_both(head, data, false).map_err(LaneError::io("push"))?);
        }
        self.out.extend_from_slice(head);
        self.out.extend_from_slice(data);
        if self.out.len() >= OUT_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), RoundsError> {
        if !self.out.is_empty() {
            self.lane.send_all(&self.out, false).map_err(LaneError::io("push"))?;
            self.out.clear();
        }
        Ok(())
    }

    /// Counts pages and holds to the pace: a zero page costs the tree as much as any other.
    fn sent(&mut self, pages: u64, compressed: u64) -> Result<(), RoundsError> {
        let mut status = self.shared.lock();
        (status.sent, status.compressed) = (status.sent + pages, status.compressed + compressed);
        drop(status);
        self.throttle.spent(pages_to_bytes(pages), &self.shared.stop);
        if self.shared.stop.load(Ordering::Relaxed) { Err(RoundsError::Stopped) } else { Ok(()) }
    }
}

/// At most `most` areas that hold all of `areas`: neighbours become one.
fn fewer(areas: &[PageRun], most: usize) -> Vec<PageRun> {
    let together = areas.len().div_ceil(most.max(1)).max(1);
    let joined = areas.chunks(together).filter_map(|some| {
        let (first, last) = (some.first()?, some.last()?);
        PageRun::new(first.start, last.end().pages_since(first.start))
    });
    joined.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::units::ImageAddr;

    #[test]
    fn fewer_areas_hold_all_pages() {
        let area = |page: u64, pages| PageRun::new(ImageAddr::containing(page << 12), pages).unwrap();
        let areas: Vec<_> = (0..5).map(|number| area(number * 10, 3)).collect();
        assert_eq!(fewer(&areas, 5), areas);
        assert_eq!(fewer(&areas, 4), [area(0, 13), area(20, 13), area(40, 3)]);
        assert_eq!(fewer(&areas, 1), [area(0, 43)]);
        assert_eq!(fewer(&[], 1), []);
    }
}
