//! The fault-latency workload: fills memory, waits, then reads or writes its pages and measures each access.
//!
//! Between the filling and the accesses the process is moved. One that finds its page present takes a fraction of a
//! microsecond, one that has to fetch it from the source takes as long as the application waits for it: what is in
//! the samples file is the latency as the application sees it, page by page. Every page that was accessed is checked.
//!
//! A second thread looks at the clock each millisecond and notes the longest gap: the blackout. After a resume its
//! first look needs no lazy page: code and vdso are files, and CRIU restores the page under a stack pointer itself.
//! From then on it also notes how much of the memory is there.
//!
//! ```text
//! READY id=0 pid=.. pages=..
//! DIRTIED 1 pages=..                       answer to `dirty 1`, before the start
//! STARTED t_ms=..
//! DONE 0 pages=.. wrong=.. gap_us=..       (or the number of the `quit`)
//! ```

mod handle;
mod pattern;
mod samples;

use std::fmt;
use std::os::unix::process::parent_id;
use std::path::PathBuf;
use std::process::{ExitCode, id};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Barrier, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use kernel::arena::Region;

pub use handle::{Handle, Summary};
pub use pattern::Pattern;
pub use samples::{Plan, Presence, Sample, Samples, State};

use crate::clock::{monotonic_ms, monotonic_ns, wall_ns};
use crate::random::Permutation;
use crate::stamp::page::{self, FREE_WORD, Part, Place};
use crate::workload::{self, ControlFile, Files, Order, Poll, StatusLog};
use pattern::Walk;
use samples::Recorder;

const FIRST: Place = Place { process: 0, part: Part::Writers, page: 0 };
const GENERATION: u32 = 1;
/// Set in a page's free word by a write; what was there before is still known.
const WRITTEN: u64 = 1 << 63;
/// A gap this long in the sampling thread's clock is taken for the move if the process has another parent behind it: a
/// busy host can keep a thread waiting as long.
const MOVED_GAP_NS: u64 = 20_000_000;
/// One this long is taken for the move in any case.
const SURE_GAP_NS: u64 = 150_000_000;
/// Between two looks at how much memory is there.
const PRESENCE_INTERVAL_NS: u64 = 5_000_000;
/// Period of the control thread while it waits for the start, and afterwards.
const WAITING_TICK: Duration = Duration::from_millis(1);
const READING_TICK: Duration = Duration::from_millis(20);
/// Pause of the sampling thread between two looks at the clock.
const LOOK: Duration = Duration::from_millis(1);
/// Intervals up to this are waited for on the CPU: a sleep wakes some 50 us late, which would be part of the load
/// pattern.
const SPIN_NS_MAX: u64 = 200_000;

/// What is done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Access {
    /// A word of it is read
    Read,
    /// A word of it is changed
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// What the fault-latency workload is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Memory to fill and read
    #[arg(long, default_value_t = 256)]
    pub mib: usize,
    /// Order of the accesses
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,
    /// What is done with each page
    #[arg(long, value_enum, default_value_t = Access::Read)]
    pub access: Access,
    /// Distance for --pattern stride
    #[arg(long, default_value_t = 16)]
    pub stride_pages: u64,
    /// Time from the start of one access of a thread to the start of the next; 0: back to back. One that takes
    /// longer delays the next ones. Up to 200 us are waited for by spinning
    #[arg(long, default_value_t = 0)]
    pub interval_us: u64,
    /// Threads that share the accesses
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Where the samples go; a path in /dev/shm records without any disk
    #[arg(long)]
    pub samples_file: PathBuf,
    /// Start by itself after a gap of so many milliseconds, that is, when it was moved; 0: only when told `go 1`
    #[arg(long, default_value_t = 0)]
    pub start_after_gap_ms: u64,
    /// Part of the pages that `dirty` rewrites
    #[arg(long, default_value_t = 0)]
    pub dirty_percent: u8,
    /// How long to live, not counting the time frozen
    #[arg(long, default_value_t = 600)]
    pub seconds: u64,
    /// Where it reports and is told what to do
    #[command(flatten)]
    pub files: Files,
}

impl Options {
    /// The defaults of the command line.
    #[must_use]
    pub const fn new(files: Files, samples_file: PathBuf) -> Self {
        Self {
            mib: 256,
            pattern: Pattern::Random,
            access: Access::Read,
            stride_pages: 16,
            interval_us: 0,
            threads: 1,
            samples_file,
            start_after_gap_ms: 0,
            dirty_percent: 0,
            seconds: 600,
            files,
        }
    }
}

/// What the threads share.
struct Shared {
    region: Region,
    recorder: Recorder,
    walk: Walk,
    access: Access,
    threads: u64,
    interval_ns: u64,
    started_ns: std::sync::atomic::AtomicU64,
    start: Barrier,
    readers_left: AtomicUsize,
    stop: AtomicBool,
}

/// Runs the workload in this process; the exit status is 0 if no page was wrong.
///
/// # Errors
/// If it cannot be set up.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    ensure!(
        options.mib > 0 && (1..=64).contains(&options.threads),
        "--mib of 1 or more, --threads of 1 to 64"
    );
    workload::detach()?;
    let files = options.files.absolute()?;
    let log = StatusLog::new(files.status);
    workload::end_on_panic(log.clone());
    let pages = options.mib << 8;
    let plan = Plan {
        pages: u64::try_from(pages)?,
        interval_ns: options.interval_us.saturating_mul(1000),
        threads: u64::try_from(options.threads)?,
    };
    let recorder = Recorder::create(&std::path::absolute(&options.samples_file)?, plan)?;
    let region = Region::anonymous(pages)?;
    let walk = Walk::new(options.pattern, plan.pages, options.stride_pages);
    for place in 0..plan.pages {
        // From first to last, but a chase in its own order: a page has to know its successor.
        let number = if options.pattern == Pattern::Chase { walk.at(place) } else { place };
        let page = usize::try_from(number)?;
        page::write_full(region.page(page), FIRST.offset(page), GENERATION, 0);
        let word = free_word(&walk, plan.threads, place, number);
        region.page(page)[FREE_WORD].store(word, Relaxed);
    }
    let shared = Arc::new(Shared {
        region,
        recorder,
        walk,
        access: options.access,
        threads: plan.threads,
        interval_ns: plan.interval_ns,
        started_ns: 0.into(),
        start: Barrier::new(options.threads + 1),
        readers_left: options.threads.into(),
        stop: false.into(),
    });
    // All threads are made before the move: making one afterwards would fault on more than the page to measure.
    let (begins, begun) = mpsc::channel();
    let sampler = spawn(&shared, move |shared| watch_clock(shared, &begins));
    let chase = options.pattern == Pattern::Chase;
    let readers: Vec<_> = (0..plan.threads)
        .map(|thread| {
            spawn(&shared, move |shared| {
                shared.start.wait();
                if chase {
                    chase_pages(shared, thread)
                } else {
                    visit_pages(shared)
                }
                shared.readers_left.fetch_sub(1, SeqCst);
            })
        })
        .collect();
    // Who is told that this is ready may move it at once: a gap before the first look would not be seen.
    begun.recv().context("the sampling thread has ended")?;
    shared.recorder.set_state(State::Waiting);
    log.line(&format!("READY id=0 pid={} pages={pages}", id()));
    let mut control = ControlFile::new(files.control);
    let asked = wait_start(&shared, options, &mut control, &log);
    shared.recorder.touch();
    log.line(&format!("STARTED t_ms={}", monotonic_ms()));
    if asked.is_some() {
        shared.stop.store(true, SeqCst);
    }
    let now = monotonic_ns();
    shared.started_ns.store(now, SeqCst);
    shared.recorder.start(wall_ns());
    shared.start.wait();
    let asked = asked.unwrap_or_else(|| wait_end(&shared, options, &mut control));
    shared.stop.store(true, SeqCst);
    for thread in readers {
        let _ = thread.join(); // a panic has ended the process already
    }
    let _ = sampler.join();
    shared.recorder.end(wall_ns());
    let (read, wrong, gap_us) =
        (shared.recorder.taken(), shared.recorder.wrong(), shared.recorder.gap_ns() / 1000);
    log.line(&format!("DONE {asked} pages={read} wrong={wrong} gap_us={gap_us}"));
    Ok(ExitCode::from(u8::from(wrong > 0)))
}

fn spawn(shared: &Arc<Shared>, body: impl FnOnce(&Shared) + Send + 'static) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || body(&shared))
}

/// Waits for the start. A number is that of an order to quit before it; 0 if it was forgotten.
fn wait_start(shared: &Shared, options: &Options, control: &mut ControlFile, log: &StatusLog) -> Option<u64> {
    let gap_ns = options.start_after_gap_ms.saturating_mul(1_000_000);
    for _ in 0..options.seconds.saturating_mul(1000) {
        match control.poll() {
            Poll::Command(command) if command.order == Order::Go => return None,
            Poll::Command(command) if command.order == Order::Quit => return Some(command.number),
            Poll::Command(command) if command.order == Order::Dirty => {
                let pages = rewrite(shared, options.dirty_percent);
                log.line(&format!("DIRTIED {} pages={pages}", command.number));
            }
            Poll::Abandoned => return Some(0),
            Poll::Command(_) | Poll::Nothing => {}
        }
        if gap_ns > 0 && shared.recorder.gap_ns() >= gap_ns {
            return None;
        }
        std::thread::sleep(WAITING_TICK);
    }
    Some(0)
}

/// Writes to a part of the pages, which stay what they are; how many those are.
fn rewrite(shared: &Shared, percent: u8) -> u64 {
    // Another order than that of the accesses, or they would all go to these pages first.
    let order = Permutation::new(shared.walk.pages(), 0x64_69_72_74);
    let pages = shared.walk.pages() * u64::from(percent.min(100)) / 100;
    for index in 0..pages {
        let page = usize::try_from(order.at(index)).unwrap_or(usize::MAX);
        let word = &shared.region.page(page)[FREE_WORD];
        // Not `fetch_or(0)`, which the compiler makes a read.
        word.store(word.load(SeqCst), SeqCst);
    }
    pages
}

/// Waits until every page was accessed or the order to quit came; its number, or 0.
fn wait_end(shared: &Shared, options: &Options, control: &mut ControlFile) -> u64 {
    for _ in 0..options.seconds.saturating_mul(50) {
        match control.poll() {
            Poll::Command(command) if command.order == Order::Quit => return command.number,
            Poll::Abandoned => return 0,
            Poll::Command(_) | Poll::Nothing => {}
        }
        if shared.readers_left.load(SeqCst) == 0 {
            return 0;
        }
        std::thread::sleep(READING_TICK);
    }
    0
}

/// The sampling thread.
fn watch_clock(shared: &Shared, begins: &mpsc::Sender<()>) {
    let mut last = wall_ns();
    let parent = parent_id();
    let _ = begins.send(()); // waited for
    let mut presence_at = None;
    while !shared.stop.load(Relaxed) {
        let now = wall_ns();
        let gap_ns = now.saturating_sub(last);
        let moved = gap_ns >= SURE_GAP_NS || gap_ns >= MOVED_GAP_NS && parent_id() != parent;
        if moved || gap_ns < MOVED_GAP_NS {
            shared.recorder.gap(last, now);
        }
        if moved {
            presence_at = Some(now);
        }
        last = now;
        // Not before the move: a file that is open while CRIU dumps would have to be there afterwards.
        if presence_at.is_some_and(|at| at <= now) {
            presence_at = Some(now + PRESENCE_INTERVAL_NS);
            if let Some(pages) = anonymous_pages() {
                shared.recorder.presence(Presence { wall_ns: now, pages });
            }
        }
        std::thread::sleep(LOOK);
    }
}

/// Anonymous pages of this process that are there: resident less shared and file pages.
fn anonymous_pages() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut fields = text.split_whitespace().skip(1);
    let resident: u64 = fields.next()?.parse().ok()?;
    Some(resident.saturating_sub(fields.next()?.parse().ok()?))
}

/// What the free word of page `number`, at `place` of the walk, holds: for a chase the page that the same thread
/// visits next, otherwise the number of the page.
fn free_word(walk: &Walk, threads: u64, place: u64, number: u64) -> u64 {
    match walk.pattern() {
        // The last one of a thread points at the first page: nobody goes there.
        Pattern::Chase => {
            Some(place + threads).filter(|next| *next < walk.pages()).map_or(0, |next| walk.at(next))
        }
        _ => number,
    }
}

/// A thread that takes the next place of the walk again and again, together with the others.
fn visit_pages(shared: &Shared) {
    let mut clock = AccessClock::new(shared);
    let next = || if shared.stop.load(Relaxed) { None } else { shared.recorder.take() };
    while let Some(place) = next() {
        let number = shared.walk.at(place);
        let expected = free_word(&shared.walk, shared.threads, place, number);
        let (mut sample, found) = clock.access(number);
        sample.wrong |= found != expected;
        shared.recorder.record(place, sample);
    }
}

/// A thread that goes where each page says, from the one at place `thread` of the walk: every `threads`-th place.
fn chase_pages(shared: &Shared, thread: u64) {
    let mut clock = AccessClock::new(shared);
    let mut place = thread;
    let mut number = if place < shared.walk.pages() { shared.walk.at(place) } else { 0 };
    while place < shared.walk.pages() && !shared.stop.load(Relaxed) {
        let Some(slot) = shared.recorder.take() else { return };
        let (mut sample, next) = clock.access(number);
        // A page that points elsewhere is wrong; the way goes on where it should have.
        let expected = free_word(&shared.walk, shared.threads, place, number);
        sample.wrong |= next != expected;
        shared.recorder.record(slot, sample);
        number = if next == expected { next } else { expected };
        place += shared.threads;
    }
}

/// Accesses pages at the pace of the plan, measures them and checks them.
struct AccessClock<'a> {
    shared: &'a Shared,
    started_ns: u64,
    last_begun: Option<u64>,
}

impl<'a> AccessClock<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, started_ns: shared.started_ns.load(SeqCst), last_begun: None }
    }

    /// Accesses page `number`; also returns what its free word held.
    fn access(&mut self, number: u64) -> (Sample, u64) {
        if let Some(last) = self.last_begun {
            wait_interval(last, self.shared.interval_ns);
        }
        let page = usize::try_from(number).unwrap_or(usize::MAX);
        let words = self.shared.region.page(page);
        let begun = monotonic_ns();
        let found = match self.shared.access {
            Access::Read => words[FREE_WORD].load(SeqCst),
            Access::Write => words[FREE_WORD].fetch_or(WRITTEN, SeqCst),
        };
        let ended = monotonic_ns();
        self.last_begun = Some(begun);
        let wrong = page::verify(words, FIRST.offset(page), GENERATION).is_some();
        let t_ns = begun.saturating_sub(self.started_ns);
        (Sample { t_ns, latency_ns: ended.saturating_sub(begun), page: number, wrong }, found & !WRITTEN)
    }
}

/// Waits until `interval_ns` after `last`; not at all if that is past.
fn wait_interval(last: u64, interval_ns: u64) {
    loop {
        // A clock that went back makes this 0, so the wait is one interval too long and not endless.
        let left = interval_ns.saturating_sub(monotonic_ns().saturating_sub(last));
        if left == 0 {
            return;
        }
        if interval_ns > SPIN_NS_MAX {
            std::thread::sleep(Duration::from_nanos(left));
            return;
        }
        std::hint::spin_loop();
    }
}
