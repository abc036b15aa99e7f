//! Pre-copy: rounds of copies while the tasks still run. What is fresh is decided by the real `Record`, what comes is kept by the
//! real `PageCache`; what is here stands for `precopy/rounds.rs` of the source and `cache/lane.rs` of the destination.

use std::ops::Range;

use protocol::bitmap::Bitmap;
use protocol::lazy_map::LazyMap;
use protocol::units::{PAGE_SIZE, TaskId};
use protocol::wire::frame::{HEADER_LEN, Header, Kind, RUN_HEADER_LEN, RunFrame, TaskRun};
use protocol::wire::precopy::{Areas, Round};
use source_server::precopy::record::Record;
use uffd_daemon::cache::PageCache;

use super::chance::Chance;
use super::pages::{Memory, ZEROS, fill, run};
use super::wire::{Ended, Socket};

/// Pages that pre-copy may have the destination keep.
pub const MOST: u64 = 4096;

/// The source's rounds.
#[derive(Debug)]
pub struct Copying {
    rounds: u32,
    /// The one that runs, from 1.
    round: u32,
    /// What its scan has found and was not sent yet.
    left: Vec<(TaskId, Range<u64>)>,
    /// Its end was said.
    said: bool,
    answers: Vec<u8>,
    record: Record,
}

impl Copying {
    /// So many of them.
    #[must_use]
    pub fn new(rounds: u32) -> Self {
        Self {
            rounds,
            round: 0,
            left: Vec::new(),
            said: true,
            answers: Vec::new(),
            record: Record::new(MOST),
        }
    }

    /// The next piece of work; true when everything is sent and confirmed.
    ///
    /// # Errors
    /// [`Ended`].
    ///
    /// # Panics
    /// If the destination answers with something else than the round.
    pub fn step(&mut self, chance: &Chance, memory: &mut Memory, lane: &Socket) -> Result<bool, Ended> {
        if self.round == 0 {
            if self.rounds == 0 {
                return Ok(true);
            }
            self.scan(memory, lane);
            return Ok(false);
        }
        if let Some((task, pages)) = self.left.pop() {
            // What is read may have been written since the scan: then the next scan says so.
            self.copy(chance, memory, lane, task, &pages);
            return Ok(false);
        }
        let round = Round { number: self.round, last: self.round == self.rounds };
        if !self.said {
            self.said = true;
            lane.send(&round.encode());
            return Ok(false);
        }
        self.answers.extend(lane.receive(usize::MAX)?);
        let answer = round.encode();
        if self.answers.len() < answer.len() {
            return Ok(false);
        }
        assert_eq!(self.answers, answer);
        self.answers.clear();
        if round.last {
            return Ok(true);
        }
        self.scan(memory, lane);
        Ok(false)
    }

    fn scan(&mut self, memory: &mut Memory, lane: &Socket) {
        self.round += 1;
        self.said = false;
        for task in &mut memory.tasks {
            let areas: Vec<_> = task.areas.iter().map(run).collect();
            self.record.keep_within(task.id, false, &areas);
            lane.send(&Areas { task: task.id, starts_again: false, areas }.encode());
            let dirty = std::mem::take(&mut task.dirty);
            for page in dirty {
                self.record.written(task.id, run(&(page..page + 1)));
                match self.left.last_mut() {
                    Some((id, pages))
                        if *id == task.id
                            && pages.end == page
                            && !task.areas.iter().any(|area| area.start == page) =>
                    {
                        pages.end += 1;
                    }
                    _ => self.left.push((task.id, page..page + 1)),
                }
            }
        }
    }

    fn copy(&mut self, chance: &Chance, memory: &Memory, lane: &Socket, id: TaskId, pages: &Range<u64>) {
        let Some(task) = memory.tasks.iter().find(|task| task.id == id) else { return };
        let mut at = pages.start;
        while at < pages.end {
            let zeros = |page: u64| task.written.get(&page).copied().unwrap_or(ZEROS) == ZEROS;
            let same = (at..pages.end).take_while(|page| zeros(*page) == zeros(at)).count() as u64;
            let part = at..at + same.min(chance.between(1, 32));
            let what = TaskRun { task: id, run: run(&part) };
            let number = u64::from(self.round);
            if zeros(at) {
                lane.send(&what.frame(Kind::PrecopyZero, number, 0));
            } else {
                let mut data = Vec::new();
                for page in part.clone() {
                    let mut bytes = vec![0; PAGE_SIZE];
                    fill(task.written[&page], &mut bytes);
                    data.extend(bytes);
                }
                lane.send(&[&what.frame(Kind::Precopy, number, data.len())[..], &data].concat());
            }
            self.record.sent(id, run(&part));
            at = part.end;
        }
    }

    /// The tasks stand still: which lazy pages are clean, and which were written again and again. `stale_is_clean` leaves out
    /// what was written since the last round: a defect.
    pub fn last_scan(
        &mut self,
        memory: &mut Memory,
        map: &LazyMap,
        stale_is_clean: bool,
    ) -> (Bitmap, Bitmap) {
        for task in &mut memory.tasks {
            for page in std::mem::take(&mut task.dirty) {
                if !stale_is_clean {
                    self.record.written(task.id, run(&(page..page + 1)));
                }
            }
        }
        (self.record.clean(map), self.record.rewritten(map))
    }
}

/// The destination's end of the lane until the last round.
#[derive(Debug)]
pub struct Receiving {
    bytes: Vec<u8>,
    cache: PageCache,
}

impl Default for Receiving {
    fn default() -> Self {
        Self { bytes: Vec::new(), cache: PageCache::new(MOST) }
    }
}

impl Receiving {
    /// Takes what has come; true if something was there.
    ///
    /// # Errors
    /// [`Ended`].
    ///
    /// # Panics
    /// If the source's frames are not taken.
    pub fn step(&mut self, lane: &Socket) -> Result<bool, Ended> {
        let more = lane.receive(usize::MAX)?;
        let some = !more.is_empty();
        self.bytes.extend(more);
        while let Some(head) = self.bytes.first_chunk::<HEADER_LEN>() {
            let header = Header::decode(head).expect("the source's own frame");
            let whole = HEADER_LEN + header.body_len;
            let Some(frame) = self.bytes.get(..whole) else { break };
            match header.kind {
                Kind::Precopy | Kind::PrecopyZero => {
                    let head = frame.first_chunk::<RUN_HEADER_LEN>().expect("a run");
                    let RunFrame { kind, id, what, .. } =
                        RunFrame::decode(head).expect("the source's own frame");
                    let mut data = &frame[RUN_HEADER_LEN..];
                    let fill = |part: &mut [u8]| {
                        let (now, later) = data.split_at(part.len());
                        part.copy_from_slice(now);
                        data = later;
                        Ok(())
                    };
                    let kept = if kind == Kind::Precopy {
                        self.cache.fill(what, id, fill)
                    } else {
                        self.cache.zero(what, id)
                    };
                    kept.expect("it was offered");
                }
                Kind::Areas => {
                    self.cache.areas(Areas::decode(&frame[HEADER_LEN..]).expect("areas")).expect("few areas");
                }
                Kind::Round => {
                    let round = Round::decode(&frame[HEADER_LEN..]).expect("a round");
                    self.cache.end_round(round).expect("in order");
                    lane.send(&round.encode());
                }
                other => panic!("{other:?} before the freeze"),
            }
            self.bytes.drain(..whole);
        }
        Ok(some)
    }

    /// What was kept.
    #[must_use]
    pub fn into_cache(self) -> PageCache {
        self.cache
    }
}
