//! One run of an experiment: a process fills its memory, is moved, reads or writes its pages, and is measured.
//!
//! What is measured is what the application sees: each access that had to wait for its page, and the time from its
//! first instruction after the move until the side that moves it has installed the last page and ended.

mod movers;
pub mod timeline;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use hdrhistogram::Histogram;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub use movers::{Mover, Ours, Programs, Route};

use crate::report::{Latency, MoveReport, PagesByOrigin};
use crate::results::{Results, Row};
use crate::tool::Used;
use crate::touch::{Access, Handle, Options, Pattern, Samples, Summary};
use crate::workload::{BusyCores, Files, touch_and_free};
use movers::{Moved, PATIENCE};

/// An access that took less found its page present.
pub const FAULT_FLOOR_NS: u64 = 3_000;
/// A gap of this length in the application's clock is taken for the move: dump and restore alone take longer, and a
/// thread that waits for its processor seldom does.
const MOVED_GAP_MS: u64 = 20;

/// How long a process may take to end after a move that failed.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// When the application uses its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// From the resume on, all of it.
    All,
    /// From the resume until every page has arrived.
    WhileMoving,
    /// Once every page has arrived: what is measured is the move alone, and that the pages are right.
    Afterwards,
}

/// What is moved, how it uses its memory, and who moves it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Memory of the workload.
    pub mib: usize,
    /// The order of its accesses.
    pub pattern: Pattern,
    /// What each is.
    pub access: Access,
    /// Threads that share them.
    pub threads: usize,
    /// From one access of a thread to its next; 0 back to back.
    pub interval_us: u64,
    /// When they are made.
    pub reads: Reads,
    /// The part of its memory that it rewrites right before the freeze, if it does.
    pub dirty_percent: Option<u8>,
    /// A task that wants all of a processor runs on each of them meanwhile.
    pub busy_cores: bool,
    /// Who moves it.
    pub mover: Mover,
}

impl Config {
    /// Random reads of one thread, back to back, of a process of `mib` MiB.
    #[must_use]
    pub const fn new(mib: usize, mover: Mover) -> Self {
        Self {
            mib,
            pattern: Pattern::Random,
            access: Access::Read,
            threads: 1,
            interval_us: 0,
            reads: Reads::All,
            dirty_percent: None,
            busy_cores: false,
            mover,
        }
    }
}

/// What one run showed.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Memory that was moved.
    pub mib: usize,
    /// Latencies of the accesses that waited for their page, in nanoseconds.
    pub histogram: Histogram<u64>,
    /// Every access.
    pub samples: Samples,
    /// First instruction after the move until the mover has ended with every page installed.
    pub last_page_ms: f64,
    /// Whether it was cut before the last page: that was later, and processor time is not known.
    pub cut: bool,
    /// As the application saw it.
    pub blackout_ms: f64,
    /// What the source's side used.
    pub source: Used,
    /// What the destination's side used.
    pub destination: Used,
    /// What our tools reported: source, destination.
    pub reports: Option<(MoveReport, MoveReport)>,
}

/// One run. Every page that is accessed is checked, and the process is ended whatever happens.
///
/// # Errors
/// If the move fails, or a page was wrong.
pub fn measure(programs: &Programs, config: &Config) -> anyhow::Result<Measured> {
    let dir = tempfile::Builder::new().prefix("postcopy-move-").tempdir_in("/dev/shm")?;
    let mut workload = start(programs, config, dir.path())?;
    workload.mark_moved();
    touch_and_free(config.mib);
    let _busy = if config.busy_cores { Some(BusyCores::start(&programs.own)?) } else { None };
    let ran = run(programs, config, &mut workload, dir.path());
    // It may still run, here or there: then it is told to end while somebody can tell it. If it waits for a page that
    // nobody brings any more, it cannot.
    if ran.is_err() && workload.quit(QUIT_LIMIT).is_err() {
        end_all_that_name(dir.path());
    }
    let (moved, summary) = ran?;
    ensure!(summary.wrong == 0, "{} of {} pages are wrong", summary.wrong, summary.pages);
    let samples = workload.samples()?;
    // A busy machine can keep a thread waiting that long: then what was measured is no move.
    ensure!(samples.started_ns >= samples.gap_to_ns, "the accesses began before the move");
    let floor = if config.reads == Reads::Afterwards { u64::MAX } else { FAULT_FLOOR_NS };
    Ok(Measured {
        mib: config.mib,
        histogram: samples.histogram(floor)?,
        last_page_ms: ms(moved.destination.ended_ns.saturating_sub(samples.gap_to_ns)),
        blackout_ms: ms(samples.gap_ns),
        cut: moved.cut,
        samples,
        source: moved.source,
        destination: moved.destination,
        reports: moved.reports,
    })
}

/// Kills the processes that have the directory of a run in their command line: those of the run, wherever they are.
fn end_all_that_name(dir: &Path) {
    let dir = dir.as_os_str().as_bytes();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
        if words.windows(dir.len()).any(|part| part == dir) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn start(programs: &Programs, config: &Config, dir: &Path) -> anyhow::Result<Handle> {
    let mut options = Options::new(Files::in_dir(dir, "touch"), dir.join("samples"));
    options.mib = config.mib;
    options.pattern = config.pattern;
    options.access = config.access;
    options.threads = config.threads;
    options.interval_us = config.interval_us;
    options.dirty_percent = config.dirty_percent.unwrap_or(0);
    options.start_after_gap_ms = if config.reads == Reads::Afterwards { 0 } else { MOVED_GAP_MS };
    // It leads a session of its own from the start: Ctrl-C is not for it.
    let prefix = [config.mover.prefix(), &["setsid".into()]].concat();
    Handle::start(movers::prefixed(&prefix, &programs.own), &options, PATIENCE)
}

fn run(
    programs: &Programs,
    config: &Config,
    workload: &mut Handle,
    dir: &Path,
) -> anyhow::Result<(Moved, Summary)> {
    let before_freeze = config.dirty_percent.map(|_| workload.dirty_command());
    let moved = config.mover.run(programs, workload.pid(), config.mib, before_freeze.as_deref(), dir)?;
    let summary = match config.reads {
        _ if moved.cut => workload.quit(PATIENCE)?,
        // Reads every page, so that the data is checked.
        Reads::Afterwards => {
            workload.go()?;
            workload.wait_done(PATIENCE)?
        }
        Reads::WhileMoving => workload.quit(PATIENCE)?,
        Reads::All => workload.wait_done(PATIENCE)?,
    };
    Ok((moved, summary))
}

#[expect(clippy::cast_precision_loss, reason = "times far below 2^53")]
fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

impl Measured {
    /// The latencies that waited for a page, in microseconds.
    #[must_use]
    pub fn latency(&self) -> Latency {
        Latency::of_ns(&self.histogram)
    }

    /// Memory that was moved, in GiB.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
    pub fn gib(&self) -> f64 {
        self.mib as f64 / 1024.0
    }

    /// How long CRIU works within the blackout, behind the freeze: its dump and its restore; of our tools only.
    #[must_use]
    pub fn criu_ms(&self) -> Option<(f64, f64)> {
        let (source, destination) = self.reports.as_ref()?;
        let phase = |report: &MoveReport, name: &str| {
            report.phases.iter().filter(|phase| phase.name == name).map(|phase| phase.ms).sum::<f64>()
        };
        Some((phase(source, "dump"), phase(destination, "restore")))
    }

    /// Blackout less the two phases in which CRIU works; of our tools only.
    #[must_use]
    pub fn own_share_ms(&self) -> Option<f64> {
        let ((source, _), (dump, restore)) = self.reports.as_ref().zip(self.criu_ms())?;
        Some(source.blackout_ms - dump - restore)
    }

    /// The columns that every mover has, in the order of the table.
    pub fn add_to(&self, row: &mut Row) {
        row.push_latency(&self.latency());
        row.push("last_page_ms", self.last_page_ms);
        row.push("blackout_ms", self.blackout_ms);
        row.push("source_cpu_s_per_gib", self.source.cpu_s / self.gib());
        row.push("destination_cpu_s_per_gib", self.destination.cpu_s / self.gib());
        row.push("source_peak_mib", self.source.peak_mib);
        row.push("destination_peak_mib", self.destination.peak_mib);
        row.push("own_share_ms", self.own_share_ms());
        row.push("cut", f64::from(u8::from(self.cut)));
        row.push("gib_per_s", self.gib() / self.last_page_ms * 1000.0);
        row.push("faults_per_s", self.faults_per_s());
        let pages = self.reports.as_ref().map(|(_, destination)| destination.pages);
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
        let count = |count: fn(&PagesByOrigin) -> u64| pages.as_ref().map(|pages| count(pages) as f64);
        let asked = self.reports.as_ref().map(|(_, destination)| destination.fault_latency_us.count);
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
        row.push("demand_faults", asked.map(|count| count as f64));
        row.push("demand_pages", count(|pages| pages.demand));
        row.push("push_pages", count(|pages| pages.push));
        row.push("gone_pages", count(|pages| pages.gone));
        row.push("redundant_pages", count(|pages| pages.redundant));
    }

    /// Accesses that waited for their page, per second from the first such access to the last.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    pub fn faults_per_s(&self) -> Option<f64> {
        let faults = || self.samples.samples.iter().filter(|sample| sample.latency_ns >= FAULT_FLOOR_NS);
        let ended = faults().map(|fault| fault.t_ns + fault.latency_ns).max()?;
        let begun = faults().map(|fault| fault.t_ns).min()?;
        (!self.histogram.is_empty())
            .then(|| self.histogram.len() as f64 / (ended - begun).max(1) as f64 * 1e9)
    }

    /// Adds the run to a results folder: its line, its histogram and its time line.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn record(&self, row: &Row, results: &mut Results) -> anyhow::Result<()> {
        let name = row.name();
        results.histogram(&name, &self.histogram)?;
        // A tenth more than the move took: how it is afterwards belongs to the picture.
        let moved_ns = self.destination.ended_ns.saturating_sub(self.samples.gap_to_ns);
        results.timeline(&name, &timeline::csv(&timeline::bins(&self.samples, moved_ns + moved_ns / 10)))?;
        results.add(row)
    }

    /// The run in a line.
    #[must_use]
    pub fn in_words(&self) -> String {
        format!(
            "{}; last page {}{:.0} ms, blackout {:.0} ms",
            self.latency(),
            if self.cut { "not before " } else { "" },
            self.last_page_ms,
            self.blackout_ms
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_run_is_found_by_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let sleeper = |dir: &Path| {
            let mut command = std::process::Command::new("sleep");
            // The name of a program is the first word of its command line.
            std::os::unix::process::CommandExt::arg0(&mut command, dir);
            let child = command.arg("30").spawn().unwrap();
            // A program is there a moment before its words are.
            let words = format!("/proc/{}/cmdline", child.id());
            while fs::read(&words).unwrap().is_empty() {
                std::thread::yield_now();
            }
            child
        };
        let (mut of_run, mut other) = (sleeper(dir.path()), sleeper(Path::new("other")));
        end_all_that_name(dir.path());
        assert!(!of_run.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
