//! The probes, each on memory or a process of its own.

use std::hint::black_box;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, anyhow, ensure};
use hdrhistogram::Histogram;
use kernel::arena::Region;
use kernel::inject::userfaultfd_of;
use kernel::pagemap::{Categories, PageMap, Protect, Query, Regions};
use kernel::write_protect::{Registration, WriteTracker};
use protocol::link::Stream;
use protocol::wire::frame::{HEADER_LEN, Header, Kind};
use protocol::wire::precopy::Round;
use source_server::precopy::compression::Compress;
use source_server::precopy::most_pages;
use source_server::precopy::rounds::{self, Plan, Shared};
use source_server::process::ProcessTree;
use source_server::track::choice::choose;
use source_server::track::content::Content;
use source_server::track::{Pass, Tracker};

use super::Found;
use crate::stamp::{Beat, Handle, Options};
use crate::workload::Files;

const PAGE: usize = 4096;
const PAGES_PER_MIB: usize = 256;
/// A workload starts within this time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two scans of a process at work.
const ROUND: Duration = Duration::from_millis(100);

/// Memory of this process, every page present, and what tracks it.
struct Tracked {
    region: Region,
    tracker: WriteTracker,
    map: PageMap,
    room: Regions,
}

impl Tracked {
    fn new(mib: usize) -> anyhow::Result<Self> {
        let region = Region::anonymous(mib * PAGES_PER_MIB)?;
        write(&region, 1);
        let tracker = WriteTracker::of_self().context("this kernel cannot track writes")?;
        let registered = tracker.register(region.address() as u64, (region.pages() * PAGE) as u64)?;
        ensure!(registered == Registration::Done, "register memory: {registered:?}");
        Ok(Self { region, tracker, map: PageMap::open(std::process::id())?, room: Regions::default() })
    }

    /// Scans and protects; the pages found and the time.
    fn scan(&mut self) -> anyhow::Result<(usize, Duration)> {
        let start = self.region.address() as u64;
        let query = Query {
            all: Categories::WRITTEN,
            any: Categories::PRESENT_OR_SWAPPED,
            report: Categories::ZERO,
            protect: Protect::Matching,
        };
        let mut bytes = 0;
        let begun = Instant::now();
        self.map.scan(
            start..start + (self.region.pages() * PAGE) as u64,
            &query,
            &mut self.room,
            |found| {
                bytes += found.end - found.start;
            },
        )?;
        Ok((usize::try_from(bytes)? / PAGE, begun.elapsed()))
    }

    fn ms_per_gib(&self, took: Duration) -> f64 {
        ms_per_gib(took, self.region.pages())
    }
}

fn ms_per_gib(took: Duration, pages: usize) -> f64 {
    took.as_secs_f64() * 1e3 * (1 << 18) as f64 / pages as f64
}

fn write(region: &Region, every: usize) {
    (0..region.pages()).step_by(every).for_each(|page| {
        region.page(page)[0].fetch_add(1, Relaxed);
    });
}

/// A scan of memory of which one page in `every` was written since the scan before.
pub(super) fn scan(mib: usize, every: usize) -> anyhow::Result<Found> {
    let mut memory = Tracked::new(mib)?;
    memory.scan()?;
    let written = if every == 0 { 0 } else { memory.region.pages().div_ceil(every) };
    if every > 0 {
        write(&memory.region, every);
    }
    let (found, took) = memory.scan()?;
    ensure!(found == written, "{found} pages were reported and {written} written");
    Ok(Found { ms_per_gib: Some(memory.ms_per_gib(took)), ..Found::default() })
}

/// The first scan of memory.
pub(super) fn arm(mib: usize) -> anyhow::Result<Found> {
    let mut memory = Tracked::new(mib)?;
    let (found, took) = memory.scan()?;
    ensure!(found == memory.region.pages(), "{found} pages were reported of {}", memory.region.pages());
    Ok(Found { ms_per_gib: Some(memory.ms_per_gib(took)), ..Found::default() })
}

/// The first write to each protected page, less the one behind it.
pub(super) fn first_write(mib: usize) -> anyhow::Result<Found> {
    let mut memory = Tracked::new(mib)?;
    memory.scan()?;
    let timed = |memory: &Tracked| {
        let begun = Instant::now();
        write(black_box(&memory.region), 1);
        begun.elapsed().as_secs_f64() * 1e9 / memory.region.pages() as f64
    };
    let (first, next) = (timed(&memory), timed(&memory));
    Ok(Found { ns_per_page: Some(first - next), ..Found::default() })
}

/// What `Tracker::disarm` does to memory that is protected as a whole.
pub(super) fn disarm(mib: usize) -> anyhow::Result<Found> {
    let mut memory = Tracked::new(mib)?;
    memory.scan()?;
    let begun = Instant::now();
    let Tracked { region, tracker, .. } = memory;
    tracker.unprotect(region.address() as u64, (region.pages() * PAGE) as u64)?;
    drop(tracker);
    Ok(Found { ms_per_gib: Some(ms_per_gib(begun.elapsed(), region.pages())), ..Found::default() })
}

/// A scan by content of a process whose pages were all copied.
pub(super) fn compare(mib: usize) -> anyhow::Result<Found> {
    let workload = Workload::start(mib, 1, 1_000_000)?;
    let tree = ProcessTree::of(workload.handle.pid())?;
    let mut tracker = Content::default();
    let begun = Instant::now();
    let round = tracker.scan(&tree, Pass::Round);
    let took = begun.elapsed();
    let pages = usize::try_from(round.pages())?;
    ensure!(pages >= mib * PAGES_PER_MIB, "{pages} pages of a workload of {mib} MiB");
    Ok(Found { ms_per_gib: Some(ms_per_gib(took, pages)), ..Found::default() })
}

/// How long a process stands still that is armed again and again.
pub(super) fn stop(threads: usize, tries: usize) -> anyhow::Result<Found> {
    let workload = Workload::start(64, threads, 0)?;
    let (mut stops, mut waits) = (Histogram::new(3)?, Histogram::new(3)?);
    for _ in 0..tries {
        let taken = userfaultfd_of(workload.handle.pid())?;
        stops.record(u64::try_from(taken.stood.as_nanos())?)?;
        waits.record(u64::try_from(taken.waited.as_nanos())?)?;
    }
    Ok(Found { stops: Some(stops), waits: Some(waits), ..Found::default() })
}

/// Operations of writing threads with and without rounds of scans.
pub(super) fn rounds(mib: usize, threads: usize, smoke: bool) -> anyhow::Result<Found> {
    let mut workload = Workload::start(mib, threads, 0)?;
    let rounds = if smoke { 3 } else { 30 };
    let mut without = |_: usize| Ok(());
    let before = workload.operations_per_s(rounds, &mut without)?;
    let (mut tracker, refused) = choose();
    ensure!(refused.is_empty(), "write protection cannot be used: {refused:?}");
    let tree = ProcessTree::of(workload.handle.pid())?;
    let mut scan = |_: usize| match tracker.scan(&tree, Pass::Round).tasks.first() {
        Some(task) if task.untracked.is_none() => Ok(()),
        other => Err(anyhow!("not tracked: {:?}", other.and_then(|task| task.untracked.as_ref()))),
    };
    let during = workload.operations_per_s(rounds, &mut scan)?;
    tracker.disarm();
    Ok(Found { kept_percent: Some(during / before * 100.0), ..Found::default() })
}

/// Operations of writing threads with and without rounds of pre-copy at a pace.
pub(super) fn copy(mib: usize, threads: usize, rate: &str, smoke: bool) -> anyhow::Result<Found> {
    let mut workload = Workload::start(mib, threads, 0)?;
    let before = workload.operations_per_s(if smoke { 3 } else { 30 }, &mut |_| Ok(()))?;
    let (tracker, refused) = choose();
    ensure!(refused.is_empty(), "write protection cannot be used: {refused:?}");
    let tree = ProcessTree::of(workload.handle.pid())?;
    let plan = Plan {
        root: workload.handle.pid(),
        rounds: "3".parse().map_err(Error::msg)?,
        pace: rate.parse().map_err(Error::msg)?,
        most_pages: most_pages(tree.memory_bytes()),
        compress: Compress::default(),
    };
    let (ours, theirs) = UnixStream::pair()?;
    let (ours, theirs) = (Stream::Unix(ours), Stream::Unix(theirs));
    let first = workload.handle.wait_progress(1, PATIENCE)?;
    let round = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| throw_away(&theirs));
        let copied = rounds::run(&plan, tracker, &tree, &ours, &Shared::default());
        ours.shutdown();
        let round = receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
        copied.map(drop)?;
        round
    })?;
    let last = workload.handle.wait_progress(1, PATIENCE)?;
    let during = per_s(&first, &last);
    let ms = ms_per_gib(round, mib * PAGES_PER_MIB);
    Ok(Found { ms_per_gib: Some(ms), kept_percent: Some(during / before * 100.0), ..Found::default() })
}

/// Confirms rounds, and forgets everything else; the time to the end of the first.
fn throw_away(lane: &Stream) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let (mut first, mut body) = (None, Vec::new());
    loop {
        let mut head = [0; HEADER_LEN];
        lane.receive_all(&mut head)?;
        let header = Header::decode(&head)?;
        body.resize(header.body_len, 0);
        lane.receive_all(&mut body)?;
        if header.kind == Kind::Round {
            let round = Round::decode(&body)?;
            let took = *first.get_or_insert_with(|| begun.elapsed());
            lane.send_all(&round.encode(), false)?;
            if round.last {
                return Ok(took);
            }
        }
    }
}

/// A stamping workload and its files.
struct Workload {
    handle: Handle,
    _dir: tempfile::TempDir,
}

impl Workload {
    fn start(mib: usize, threads: usize, rate_us: u64) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let options = Options { mib, threads, rate_us, ..Options::new(Files::in_dir(dir.path(), "stamp")) };
        let handle = Handle::start(Command::new(std::env::current_exe()?), &options, PATIENCE)?;
        Ok(Self { handle, _dir: dir })
    }

    /// What the workload does while `each` is called so many times, a round apart.
    fn operations_per_s(
        &mut self,
        rounds: usize,
        each: &mut dyn FnMut(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<f64> {
        let first = self.handle.wait_progress(1, PATIENCE)?;
        for number in 0..rounds {
            let next = Instant::now() + ROUND;
            each(number)?;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        let last = self.handle.wait_progress(1, PATIENCE)?;
        Ok(per_s(&first, &last))
    }
}

fn per_s(first: &Beat, last: &Beat) -> f64 {
    (last.ops - first.ops) as f64 * 1e3 / last.t_ms.saturating_sub(first.t_ms).max(1) as f64
}
