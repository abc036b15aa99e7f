//! One run: start the workload, move it, measure.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};

use super::Load;
use crate::cli::Common;
use crate::clock::wall_ns;
use crate::report::{Latency, MoveReport};
use crate::touch::{Handle, Options};
use crate::workload::Files;

/// A read that took less found its page present.
const FAULT_FLOOR_NS: u64 = 3_000;
/// A gap of this length in the application's clock is the move.
const MOVED_GAP_MS: u64 = 8;
/// Nothing in a run takes longer.
const PATIENCE: Duration = Duration::from_secs(180);
/// A move that takes longer is cut: what was read until then counts, and the last page as at least this.
const MOVE_LIMIT: Duration = Duration::from_secs(60);

/// Who moves the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    /// `source-server` and `uffd-daemon`.
    Ours,
    /// `criu dump --lazy-pages`, `criu lazy-pages`, `criu restore --lazy-pages`.
    Criu,
}

impl Contender {
    pub(super) const ALL: [Self; 2] = [Self::Ours, Self::Criu];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Criu => "criu",
        }
    }
}

/// The programs.
pub(super) struct Setting {
    own: PathBuf,
    source_server: PathBuf,
    uffd_daemon: PathBuf,
    criu: PathBuf,
    pub(super) criu_version: String,
}

impl Setting {
    /// Finds them: ours beside this program, CRIU as our tools would.
    pub(super) fn find(common: &Common) -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let beside = |name: &str| {
            let path = own.with_file_name(name);
            ensure!(path.exists(), "{name} is not beside {own:?}: build it with `cargo build --release`");
            Ok(path)
        };
        let criu = host::criu::Criu::find(common.criu.as_deref())?;
        Ok(Self {
            source_server: beside("source-server")?,
            uffd_daemon: beside("uffd-daemon")?,
            own,
            criu: criu.path,
            criu_version: criu.version,
        })
    }
}

/// What one run showed.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) contender: Contender,
    pub(super) mib: usize,
    pub(super) load: Load,
    pub(super) run: usize,
    pub(super) latency: Latency,
    /// First instruction after the move until the mover has ended with every page installed.
    pub(super) last_page_ms: f64,
    /// As the application saw it.
    pub(super) blackout_ms: f64,
    pub(super) source_cpu_s_per_gib: f64,
    pub(super) destination_cpu_s_per_gib: f64,
    pub(super) source_peak_mib: f64,
    pub(super) destination_peak_mib: f64,
    /// Blackout of the tool less CRIU's dump and restore; ours only.
    pub(super) own_share_ms: Option<f64>,
    /// Whether it was cut before the last page; then processor time is not a number.
    pub(super) cut: bool,
}

pub(super) const CSV_HEADER: &str = "contender,mib,load,run,faults,mean_us,p50_us,p90_us,p99_us,p99_9_us,max_us,\
     last_page_ms,blackout_ms,source_cpu_s_per_gib,destination_cpu_s_per_gib,source_peak_mib,destination_peak_mib,cut";

impl Row {
    pub(super) fn csv(&self) -> String {
        let l = &self.latency;
        format!(
            "{},{},{},{},{},{:.1},{:.1},{:.1},{:.1},{:.1},{:.1},{:.1},{:.1},{:.3},{:.3},{:.1},{:.1},{}",
            self.contender.name(),
            self.mib,
            self.load.name(),
            self.run,
            l.count,
            l.mean,
            l.p50,
            l.p90,
            l.p99,
            l.p99_9,
            l.max,
            self.last_page_ms,
            self.blackout_ms,
            self.source_cpu_s_per_gib,
            self.destination_cpu_s_per_gib,
            self.source_peak_mib,
            self.destination_peak_mib,
            self.cut
        )
    }

    pub(super) fn in_words(&self) -> String {
        format!(
            "{:<4} {:>4} MiB {:<12} run {}: {}; last page {}{:.0} ms, blackout {:.0} ms",
            self.contender.name(),
            self.mib,
            self.load.name(),
            self.run,
            self.latency,
            if self.cut { "not before " } else { "" },
            self.last_page_ms,
            self.blackout_ms
        )
    }
}

/// A tool of a run. Dropping it kills it.
struct Tool {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

/// What a tool used: processor seconds of itself and the children it waited for, peak memory of itself.
struct Used {
    cpu_s: f64,
    peak_mib: f64,
    ended_ns: u64,
}

impl Tool {
    fn start(name: &'static str, command: &mut Command, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { name, child, log })
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for a line in its output that `pick` accepts.
    fn wait_line<T>(&mut self, pick: impl Fn(&str) -> Option<T>) -> anyhow::Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.said().lines().find_map(&pick) {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended ({status}): {}", self.name, self.said());
            }
            ensure!(Instant::now() < deadline, "{} never said it: {}", self.name, self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether it has ended, well, and what it used until then; `peak_kib` grows meanwhile.
    fn ended(&mut self, peak_kib: &mut u32) -> anyhow::Result<Option<Used>> {
        *peak_kib = peak_memory_kib(self.child.id()).unwrap_or(*peak_kib);
        let before = children_cpu()?;
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        let ended_ns = wall_ns();
        ensure!(status.success(), "{} failed ({status}): {}", self.name, self.said());
        let cpu_s = children_cpu()? - before;
        Ok(Some(Used { cpu_s, peak_mib: f64::from(*peak_kib) / 1024.0, ended_ns }))
    }
}

/// Waits for the good end of both; `true` if it did not come within [`MOVE_LIMIT`].
fn wait_both(source: &mut Tool, destination: &mut Tool) -> anyhow::Result<(Used, Used, bool)> {
    let deadline = Instant::now() + MOVE_LIMIT;
    let (mut peaks, mut used) = ([0, 0], [None, None]);
    loop {
        for (i, tool) in [&mut *source, &mut *destination].into_iter().enumerate() {
            if used[i].is_none() {
                used[i] = tool.ended(&mut peaks[i])?;
            }
        }
        match used {
            [Some(source), Some(destination)] => return Ok((source, destination, false)),
            waiting => used = waiting,
        }
        if Instant::now() >= deadline {
            let [source, destination] = peaks.map(|peak_kib| Used {
                cpu_s: f64::NAN,
                peak_mib: f64::from(peak_kib) / 1024.0,
                ended_ns: wall_ns(),
            });
            return Ok((source, destination, true));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn children_cpu() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(u64::try_from(time.tv_sec()).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec()).unwrap_or(0))
    };
    Ok((seconds(usage.user_time()) + seconds(usage.system_time())).as_secs_f64())
}

fn peak_memory_kib(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What a mover reports to the measurement.
struct Moved {
    source: Used,
    destination: Used,
    own_share_ms: Option<f64>,
    cut: bool,
    /// Kept as long as the workload must live.
    _kept: Vec<Tool>,
}

/// One run.
pub(super) fn measure(
    setting: &Setting,
    contender: Contender,
    mib: usize,
    load: Load,
    run: usize,
) -> anyhow::Result<Row> {
    let dir = tempfile::Builder::new().prefix("postcopy-vs-").tempdir_in("/dev/shm")?;
    let path = dir.path();
    let mut options = Options::new(Files::in_dir(path, "touch"), path.join("samples"));
    options.mib = mib;
    options.interval_us = if load == Load::Paced { 100 } else { 0 };
    options.start_after_gap_ms = if load == Load::Idle { 0 } else { MOVED_GAP_MS };
    let mut own = Command::new("setsid");
    own.arg(&setting.own);
    let mut workload = Handle::start(own, &options, PATIENCE)?;
    workload.mark_moved();
    let moved = match contender {
        Contender::Ours => ours(setting, &workload, path, mib)?,
        Contender::Criu => stock(setting, &workload, path, mib)?,
    };
    let summary = match load {
        Load::Idle if moved.cut => workload.quit(PATIENCE)?,
        // Reads every page, so that the data is checked.
        Load::Idle => {
            workload.go()?;
            workload.wait_done(PATIENCE)?
        }
        Load::Paced => workload.quit(PATIENCE)?,
        Load::BackToBack if moved.cut => workload.quit(PATIENCE)?,
        Load::BackToBack => workload.wait_done(PATIENCE)?,
    };
    ensure!(summary.wrong == 0, "{} of {} pages are wrong", summary.wrong, summary.pages);
    let samples = workload.samples()?;
    let floor = if load == Load::Idle { u64::MAX } else { FAULT_FLOOR_NS };
    #[allow(clippy::cast_precision_loss)] // sizes and times far below 2^53
    let (gib, last_page_ms, blackout_ms) = (
        mib as f64 / 1024.0,
        moved.destination.ended_ns.saturating_sub(samples.gap_to_ns) as f64 / 1e6,
        samples.gap_ns as f64 / 1e6,
    );
    Ok(Row {
        contender,
        mib,
        load,
        run,
        latency: Latency::of_ns(&samples.histogram(floor)?),
        last_page_ms,
        blackout_ms,
        source_cpu_s_per_gib: moved.source.cpu_s / gib,
        destination_cpu_s_per_gib: moved.destination.cpu_s / gib,
        source_peak_mib: moved.source.peak_mib,
        destination_peak_mib: moved.destination.peak_mib,
        own_share_ms: moved.own_share_ms,
        cut: moved.cut,
    })
}

fn ours(setting: &Setting, workload: &Handle, dir: &Path, mib: usize) -> anyhow::Result<Moved> {
    let (source_json, destination_json) = (dir.join("source.json"), dir.join("destination.json"));
    let mut serve = Command::new(&setting.uffd_daemon);
    serve.args(["serve", "--listen", "127.0.0.1:0", "--once", "--pidns", "new", "--criu"]).arg(&setting.criu);
    serve.arg("--json").arg(&destination_json);
    let mut destination = Tool::start("uffd-daemon", &mut serve, dir)?;
    let address = destination.wait_line(|line| line.strip_prefix("listening on ").map(str::to_owned))?;
    let mut start = Command::new(&setting.source_server);
    start.args(["move", "--pid", &workload.pid().to_string(), "--to", &address, "--criu"]);
    start.arg(&setting.criu).arg("--json").arg(&source_json);
    let mut source = Tool::start("source-server", &mut start, dir)?;
    let (used, its, cut) = wait_both(&mut source, &mut destination)?;
    ensure!(!cut, "not over after {MOVE_LIMIT:?}: {}{}", source.said(), destination.said());
    let report = MoveReport::read(&destination_json)?;
    ensure_lazy(report.pages.lazy * 4096, mib)?;
    let own_share_ms = Some(own_share(&MoveReport::read(&source_json)?, &report));
    Ok(Moved { source: used, destination: its, own_share_ms, cut, _kept: Vec::new() })
}

/// Blackout less the two phases in which CRIU works: its dump behind the freeze, and its restore.
fn own_share(source: &MoveReport, destination: &MoveReport) -> f64 {
    let phase = |report: &MoveReport, name: &str| {
        report.phases.iter().filter(|phase| phase.name == name).map(|phase| phase.ms).sum::<f64>()
    };
    source.blackout_ms - phase(source, "dump") - phase(destination, "restore")
}

fn stock(setting: &Setting, workload: &Handle, dir: &Path, mib: usize) -> anyhow::Result<Moved> {
    let images = dir.join("images");
    fs::create_dir(&images)?;
    let criu = |verb: &str, log: &str| {
        let mut command = Command::new(&setting.criu);
        command.arg(verb).arg("-D").arg(&images).args(["-o", log, "-v0"]);
        command
    };
    let port = free_port()?.to_string();
    let ready = dir.join("ready");
    fs::write(&ready, "")?;
    let mut dump = Command::new("sh");
    // The status descriptor is a file that is looked at: one zero byte when the page server listens.
    dump.args(["-c", "exec \"$@\" 3>\"$0\""]).arg(&ready).arg(&setting.criu);
    dump.args(["dump", "-t", &workload.pid().to_string(), "-D"]).arg(&images);
    dump.args(["-o", "dump.log", "-v0", "--lazy-pages", "--address", "127.0.0.1", "--port", &port]);
    dump.args(["--status-fd", "3"]);
    let mut source = Tool::start("criu-dump", &mut dump, dir)?;
    wait_until(&mut source, || fs::metadata(&ready).is_ok_and(|meta| meta.len() > 0))?;
    let mut lazy = criu("lazy-pages", "lazy.log");
    lazy.args(["--page-server", "--address", "127.0.0.1", "--port", &port]);
    let mut destination = Tool::start("criu-lazy-pages", &mut lazy, dir)?;
    wait_until(&mut destination, || images.join("lazy-pages.socket").exists())?;
    let mut restore = Command::new("unshare");
    restore.args(["--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]);
    restore.arg("\"$@\" || exit; while sleep 1; do :; done").arg("sh");
    restore.arg(&setting.criu).args(["restore", "-D"]).arg(&images);
    restore.args(["-o", "restore.log", "-v0", "--lazy-pages", "-d"]);
    let namespace = Tool::start("criu-restore", &mut restore, dir)?;
    let (used, its, cut) = wait_both(&mut source, &mut destination)?;
    let copied: u64 = fs::read_dir(&images)?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"))
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum();
    ensure_lazy(((mib as u64) << 20).saturating_sub(copied), mib)?;
    // A move that was cut needs its programs until the workload has ended.
    let kept = vec![namespace, destination, source];
    Ok(Moved { source: used, destination: its, own_share_ms: None, cut, _kept: kept })
}

/// A process with a page-aligned stack pointer is copied as a whole, by either: that measures nothing here.
fn ensure_lazy(bytes: u64, mib: usize) -> anyhow::Result<()> {
    ensure!(bytes >> 20 >= mib as u64 / 10 * 9, "only {} of {mib} MiB were lazy", bytes >> 20);
    Ok(())
}

fn wait_until(tool: &mut Tool, condition: impl Fn() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if let Some(status) = tool.child.try_wait()? {
            bail!("{} ended ({status}): {}", tool.name, tool.said());
        }
        ensure!(Instant::now() < deadline, "{} is not ready: {}", tool.name, tool.said());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
