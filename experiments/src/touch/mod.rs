//! The fault-latency workload: fills memory, waits, then reads every page once and measures each read.
//!
//! Between the filling and the reads the process is moved. A read that finds its page present takes a fraction of a
//! microsecond, one that has to fetch it from the source takes as long as the application waits for it: what is in
//! the samples file is the latency as the application sees it, page by page.
//!
//! A second thread looks at the clock each millisecond and notes the longest gap: the blackout. After a resume its
//! first look needs no lazy page: code and vdso are files, and CRIU restores the page under a stack pointer itself.
//!
//! ```text
//! READY id=0 pid=.. pages=..
//! STARTED t_ms=..
//! DONE 0 pages=.. wrong=.. gap_us=..       (or the number of the `quit`)
//! ```

mod handle;
mod pattern;
mod samples;

use std::path::PathBuf;
use std::process::{ExitCode, id};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use kernel::arena::Region;

pub use handle::{Handle, Summary};
pub use pattern::Pattern;
pub use samples::{Plan, Sample, Samples, State};

use crate::clock::{monotonic_ms, monotonic_ns, wall_ns};
use crate::stamp::page::{self, Part, Place};
use crate::workload::{self, ControlFile, Files, Order, Poll, StatusLog};
use pattern::Walk;
use samples::Recorder;

const FIRST: Place = Place { process: 0, part: Part::Writers, page: 0 };
const GENERATION: u32 = 1;
/// Period of the control thread while it waits for the start, and afterwards.
const WAITING_TICK: Duration = Duration::from_millis(1);
const READING_TICK: Duration = Duration::from_millis(20);
/// Pause of the sampling thread between two looks at the clock.
const LOOK: Duration = Duration::from_millis(1);
/// Intervals up to this are waited for on the CPU: a sleep wakes some 50 us late, which would be part of the load
/// pattern.
const SPIN_NS_MAX: u64 = 200_000;

/// What the fault-latency workload is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Memory to fill and read
    #[arg(long, default_value_t = 256)]
    pub mib: usize,
    /// Order of the reads
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,
    /// Distance for --pattern stride
    #[arg(long, default_value_t = 16)]
    pub stride_pages: u64,
    /// Time from the start of one read of a thread to the start of the next; 0: back to back. A read that takes
    /// longer delays the next ones. Up to 200 us are waited for by spinning
    #[arg(long, default_value_t = 0)]
    pub interval_us: u64,
    /// Threads that share the reads
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Where the samples go; a path in /dev/shm records without any disk
    #[arg(long)]
    pub samples_file: PathBuf,
    /// Start by itself after a gap of so many milliseconds, that is, when it was moved; 0: only when told `go 1`
    #[arg(long, default_value_t = 0)]
    pub start_after_gap_ms: u64,
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
            stride_pages: 16,
            interval_us: 0,
            threads: 1,
            samples_file,
            start_after_gap_ms: 0,
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
    for page in 0..pages {
        page::write_full(region.page(page), FIRST.offset(page), GENERATION, 0);
    }
    let shared = Arc::new(Shared {
        region,
        recorder,
        walk: Walk::new(options.pattern, plan.pages, options.stride_pages),
        interval_ns: plan.interval_ns,
        started_ns: 0.into(),
        start: Barrier::new(options.threads + 1),
        readers_left: options.threads.into(),
        stop: false.into(),
    });
    // All threads are made before the move: making one afterwards would fault on more than the page to measure.
    let sampler = spawn(&shared, watch_clock);
    let readers: Vec<_> = (0..options.threads).map(|_| spawn(&shared, read_pages)).collect();
    shared.recorder.set_state(State::Waiting);
    log.line(&format!("READY id=0 pid={} pages={pages}", id()));
    let mut control = ControlFile::new(files.control);
    let asked = wait_start(&shared, options, &mut control);
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

fn spawn(shared: &Arc<Shared>, body: fn(&Shared)) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || body(&shared))
}

/// Waits for the start. A number is that of an order to quit before it; 0 if it was forgotten.
fn wait_start(shared: &Shared, options: &Options, control: &mut ControlFile) -> Option<u64> {
    let gap_ns = options.start_after_gap_ms.saturating_mul(1_000_000);
    for _ in 0..options.seconds.saturating_mul(1000) {
        match control.poll() {
            Poll::Command(command) if command.order == Order::Go => return None,
            Poll::Command(command) if command.order == Order::Quit => return Some(command.number),
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

/// Waits until every page was read or the order to quit came; its number, or 0.
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
fn watch_clock(shared: &Shared) {
    let mut last = wall_ns();
    while !shared.stop.load(Relaxed) {
        let now = wall_ns();
        shared.recorder.gap(last, now);
        last = now;
        std::thread::sleep(LOOK);
    }
}

/// A reading thread.
fn read_pages(shared: &Shared) {
    shared.start.wait();
    let started = shared.started_ns.load(SeqCst);
    let mut last_begun = None;
    let next = || if shared.stop.load(Relaxed) { None } else { shared.recorder.take() };
    while let Some(index) = next() {
        if let Some(last) = last_begun {
            wait_interval(last, shared.interval_ns);
        }
        let number = shared.walk.at(index);
        let page = usize::try_from(number).unwrap_or(usize::MAX);
        let words = shared.region.page(page);
        let begun = monotonic_ns();
        std::hint::black_box(words[0].load(SeqCst));
        let ended = monotonic_ns();
        last_begun = Some(begun);
        let wrong = page::verify(words, FIRST.offset(page), GENERATION).is_some();
        let sample = Sample {
            t_ns: begun.saturating_sub(started),
            latency_ns: ended.saturating_sub(begun),
            page: number,
            wrong,
        };
        shared.recorder.record(index, sample);
    }
    shared.readers_left.fetch_sub(1, SeqCst);
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
