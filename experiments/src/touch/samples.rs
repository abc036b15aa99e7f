//! The samples file: one measured read per page, written through a shared file mapping.
//!
//! A shared file mapping is not lazy: CRIU opens the file again, so the memory is there the moment the process
//! resumes (on this host it is the very same page cache), and recording a fault does not cause one. On `/dev/shm`
//! it does not touch a disk either. Words are 64-bit, little-endian (as this host writes them).
//!
//! ```text
//! page 0, one word each   magic  version  capacity  count  state  wrong  started_ns  ended_ns
//!                         gap_ns  gap_from_ns  gap_to_ns  pages  interval_ns  threads  presences
//! page 1 to 16            per look at the memory: wall_ns  pages
//! page 17 ...             per sample: t_ns  latency_ns  page  wrong
//! ```
//!
//! `t_ns` counts from the start; it and the latencies are `CLOCK_MONOTONIC`. The other times, which are compared with
//! what happens outside, are `CLOCK_REALTIME`: a move changes the other clock. `count` is what was handed out
//! to the reading threads; after state `DONE` all of it is filled in.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use kernel::arena::{Region, WORDS_PER_PAGE};

const MAGIC: u64 = 0x544f_5543_4853_4d50;
const VERSION: u64 = 2;
const SAMPLE_WORDS: usize = 4;
const SAMPLES_PER_PAGE: usize = WORDS_PER_PAGE / SAMPLE_WORDS;
const PRESENCE_WORDS: usize = 2;
const PRESENCES_PER_PAGE: usize = WORDS_PER_PAGE / PRESENCE_WORDS;
/// Pages for looks at the memory: 4096 of them, 20 s at one per 5 ms. Later ones are left out.
const PRESENCE_PAGES: usize = 16;
const FIRST_SAMPLE_PAGE: usize = 1 + PRESENCE_PAGES;

/// A word of the header.
#[derive(Clone, Copy)]
enum Word {
    Magic,
    Version,
    Capacity,
    Count,
    State,
    Wrong,
    Started,
    Ended,
    Gap,
    GapFrom,
    GapTo,
    Pages,
    Interval,
    Threads,
    Presences,
}

const HEADER_WORDS: usize = Word::Presences as usize + 1;

/// How far the workload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The memory is being filled.
    Filling,
    /// It waits for the start.
    Waiting,
    /// It reads.
    Reading,
    /// It is done; every sample is filled in.
    Done,
}

impl State {
    const ALL: [Self; 4] = [Self::Filling, Self::Waiting, Self::Reading, Self::Done];
}

/// What is measured, for the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Pages to read.
    pub pages: u64,
    /// Time from one read to the next of a thread; 0 back to back.
    pub interval_ns: u64,
    /// Reading threads.
    pub threads: u64,
}

/// The file as the workload writes it.
pub(super) struct Recorder {
    region: Region,
    capacity: u64,
}

impl Recorder {
    /// Makes the file with room for one sample per page, and touches all of it.
    pub(super) fn create(path: &Path, plan: Plan) -> anyhow::Result<Self> {
        let capacity = plan.pages;
        let pages = FIRST_SAMPLE_PAGE + usize::try_from(capacity)?.div_ceil(SAMPLES_PER_PAGE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.with_context(|| format!("creating {path:?}"))?;
        file.set_len(protocol::units::pages_to_bytes(u64::try_from(pages)?))?;
        let recorder = Self { region: Region::shared_file(&file, pages)?, capacity };
        for page in 0..pages {
            recorder.region.page(page)[0].store(0, Relaxed);
        }
        for (word, value) in [
            (Word::Version, VERSION),
            (Word::Capacity, capacity),
            (Word::Pages, plan.pages),
            (Word::Interval, plan.interval_ns),
            (Word::Threads, plan.threads),
        ] {
            recorder.word(word).store(value, Relaxed);
        }
        recorder.word(Word::Magic).store(MAGIC, Release);
        Ok(recorder)
    }

    fn word(&self, word: Word) -> &AtomicU64 {
        &self.region.page(0)[word as usize]
    }

    /// Touches the mapping once more: after a move its page table is empty, and filling it belongs to no sample.
    pub(super) fn touch(&self) {
        for page in 0..self.region.pages() {
            std::hint::black_box(self.region.page(page)[0].load(Relaxed));
        }
    }

    pub(super) fn set_state(&self, state: State) {
        self.word(Word::State).store(state as u64, Release);
    }

    pub(super) fn start(&self, now_ns: u64) {
        self.word(Word::Started).store(now_ns, Relaxed);
        self.set_state(State::Reading);
    }

    pub(super) fn end(&self, now_ns: u64) {
        self.word(Word::Ended).store(now_ns, Relaxed);
        // What was taken but not measured is past the last page.
        self.word(Word::Count).fetch_min(self.capacity, Relaxed);
        self.set_state(State::Done);
    }

    /// Hands out the next sample to fill in, if there is one.
    pub(super) fn take(&self) -> Option<u64> {
        Some(self.word(Word::Count).fetch_add(1, Relaxed)).filter(|index| *index < self.capacity)
    }

    /// Fills in sample `index`.
    pub(super) fn record(&self, index: u64, sample: Sample) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let at = index % SAMPLES_PER_PAGE * SAMPLE_WORDS;
        let words = &self.region.page(FIRST_SAMPLE_PAGE + index / SAMPLES_PER_PAGE)[at..at + SAMPLE_WORDS];
        let values = [sample.t_ns, sample.latency_ns, sample.page, u64::from(sample.wrong)];
        for (word, value) in words.iter().zip(values) {
            word.store(value, Relaxed);
        }
        if sample.wrong {
            self.word(Word::Wrong).fetch_add(1, Relaxed);
        }
    }

    /// Notes a gap if it is the longest so far. Called by one thread only.
    pub(super) fn gap(&self, from_ns: u64, to_ns: u64) {
        let length = to_ns.saturating_sub(from_ns);
        if length > self.word(Word::Gap).load(Relaxed) {
            self.word(Word::GapFrom).store(from_ns, Relaxed);
            self.word(Word::GapTo).store(to_ns, Relaxed);
            self.word(Word::Gap).store(length, Relaxed);
        }
    }

    /// Notes how much memory is there. Called by one thread only.
    pub(super) fn presence(&self, presence: Presence) {
        let count = self.word(Word::Presences).load(Relaxed);
        let index = usize::try_from(count).unwrap_or(usize::MAX);
        if index >= PRESENCE_PAGES * PRESENCES_PER_PAGE {
            return;
        }
        let at = index % PRESENCES_PER_PAGE * PRESENCE_WORDS;
        let words = self.region.page(1 + index / PRESENCES_PER_PAGE);
        words[at].store(presence.wall_ns, Relaxed);
        words[at + 1].store(presence.pages, Relaxed);
        self.word(Word::Presences).store(count + 1, Release);
    }

    /// The longest gap so far.
    pub(super) fn gap_ns(&self) -> u64 {
        self.word(Word::Gap).load(Relaxed)
    }

    pub(super) fn wrong(&self) -> u64 {
        self.word(Word::Wrong).load(Acquire)
    }

    /// Samples handed out so far.
    pub(super) fn taken(&self) -> u64 {
        self.word(Word::Count).load(Relaxed).min(self.capacity)
    }
}

/// How much of the memory was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// When, as `CLOCK_REALTIME`.
    pub wall_ns: u64,
    /// Anonymous pages of the whole process that were resident.
    pub pages: u64,
}

/// One access to one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When it began, counted from the start.
    pub t_ns: u64,
    /// How long the access to one word took.
    pub latency_ns: u64,
    /// Which page.
    pub page: u64,
    /// Whether the page was not what it should be.
    pub wrong: bool,
}

/// The file as it is read afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Samples {
    /// How far the workload was.
    pub state: State,
    /// What it was told to measure.
    pub plan: Plan,
    /// `CLOCK_MONOTONIC` of the first read.
    pub started_ns: u64,
    /// `CLOCK_MONOTONIC` after the last read.
    pub ended_ns: u64,
    /// The longest time in which the sampling thread, which looks at the clock each millisecond, did not run: the
    /// blackout as the application sees it.
    pub gap_ns: u64,
    /// Its last look before the gap.
    pub gap_from_ns: u64,
    /// Its first look after the gap.
    pub gap_to_ns: u64,
    /// The accesses in the order they were begun.
    pub samples: Vec<Sample>,
    /// How much memory was there, every few milliseconds since the move.
    pub presences: Vec<Presence>,
}

impl Samples {
    /// Reads a samples file.
    ///
    /// # Errors
    /// If it is not one, or not whole.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {path:?}"))?;
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let words: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
        ensure!(
            words.len() >= WORDS_PER_PAGE && words[..2] == [MAGIC, VERSION],
            "{path:?} has no samples header"
        );
        let word = |word: Word| words[..HEADER_WORDS][word as usize];
        let count = usize::try_from(word(Word::Count).min(word(Word::Capacity)))?;
        let (looks, rows) = words[WORDS_PER_PAGE..]
            .split_at_checked(PRESENCE_PAGES * WORDS_PER_PAGE)
            .with_context(|| format!("{path:?} is too short"))?;
        let rows = rows.chunks_exact(SAMPLE_WORDS);
        ensure!(count <= rows.len(), "{path:?} ends before its last sample");
        let state = State::ALL.get(usize::try_from(word(Word::State))?).context("unknown state")?;
        let sample =
            |row: &[u64]| Sample { t_ns: row[0], latency_ns: row[1], page: row[2], wrong: row[3] != 0 };
        Ok(Self {
            state: *state,
            plan: Plan {
                pages: word(Word::Pages),
                interval_ns: word(Word::Interval),
                threads: word(Word::Threads),
            },
            started_ns: word(Word::Started),
            ended_ns: word(Word::Ended),
            gap_ns: word(Word::Gap),
            gap_from_ns: word(Word::GapFrom),
            gap_to_ns: word(Word::GapTo),
            samples: rows.take(count).map(sample).collect(),
            presences: looks
                .chunks_exact(PRESENCE_WORDS)
                .take(usize::try_from(word(Word::Presences))?)
                .map(|look| Presence { wall_ns: look[0], pages: look[1] })
                .collect(),
        })
    }

    /// Wrong pages.
    #[must_use]
    pub fn wrong(&self) -> usize {
        self.samples.iter().filter(|sample| sample.wrong).count()
    }

    /// Latencies in nanoseconds of the reads that took at least `floor_ns`: with a floor of a microsecond or so,
    /// those that waited for a page.
    ///
    /// # Errors
    /// None in practice: the bounds of the histogram hold every value.
    pub fn histogram(&self, floor_ns: u64) -> anyhow::Result<Histogram<u64>> {
        let mut histogram = Histogram::new(3)?;
        for sample in self.samples.iter().filter(|sample| sample.latency_ns >= floor_ns) {
            histogram.record(sample.latency_ns)?;
        }
        Ok(histogram)
    }

    /// Writes `t_ns,latency_ns,page,wrong`, one sample per line under a header line.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_csv(&self, path: &Path) -> anyhow::Result<()> {
        let mut file =
            std::io::BufWriter::new(File::create(path).with_context(|| format!("creating {path:?}"))?);
        writeln!(file, "t_ns,latency_ns,page,wrong")?;
        for Sample { t_ns, latency_ns, page, wrong } in &self.samples {
            writeln!(file, "{t_ns},{latency_ns},{page},{}", u8::from(*wrong))?;
        }
        Ok(file.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples");
        let plan = Plan { pages: 300, interval_ns: 5, threads: 2 };
        let recorder = Recorder::create(&path, plan).unwrap();
        assert_eq!(Samples::read(&path).unwrap().state, State::Filling);
        recorder.gap(10, 15);
        recorder.gap(20, 23);
        recorder.presence(Presence { wall_ns: 30, pages: 3 });
        recorder.start(1000);
        while let Some(index) = recorder.take() {
            let sample = Sample { t_ns: index, latency_ns: index * 10, page: 299 - index, wrong: index == 7 };
            recorder.record(index, sample);
        }
        assert!(recorder.take().is_none());
        recorder.end(2000);
        let read = Samples::read(&path).unwrap();
        assert_eq!((read.state, read.plan, read.samples.len(), read.wrong()), (State::Done, plan, 300, 1));
        assert_eq!((read.gap_ns, read.gap_from_ns, read.gap_to_ns), (5, 10, 15));
        assert_eq!(read.presences, [Presence { wall_ns: 30, pages: 3 }]);
        let sample = Sample { t_ns: 299, latency_ns: 2990, page: 0, wrong: false };
        assert_eq!(read.samples[299], sample);
        assert_eq!(read.histogram(1000).unwrap().len(), 200);
        let csv = dir.path().join("csv");
        read.write_csv(&csv).unwrap();
        assert_eq!(std::fs::read_to_string(csv).unwrap().lines().nth(8), Some("7,70,292,1"));
    }

    #[test]
    fn looks_at_the_memory_beyond_the_room_for_them_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples");
        let recorder = Recorder::create(&path, Plan { pages: 1, interval_ns: 0, threads: 1 }).unwrap();
        (0..5000).for_each(|at| recorder.presence(Presence { wall_ns: at, pages: at }));
        let read = Samples::read(&path).unwrap();
        assert_eq!(read.presences.len(), PRESENCE_PAGES * PRESENCES_PER_PAGE);
        assert_eq!(read.presences.last().map(|last| last.pages), Some(4095));
    }

    #[test]
    fn a_file_that_holds_no_samples_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples");
        for content in [Vec::new(), vec![0; 100], vec![0; 8192]] {
            std::fs::write(&path, content).unwrap();
            assert!(Samples::read(&path).is_err());
        }
    }
}
