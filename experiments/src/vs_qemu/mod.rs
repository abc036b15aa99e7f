//! `vs-qemu`: the post-copy migration of a virtual machine by QEMU with postcopy-preempt, and the same memory moved by
//! us, interleaved, in one run.
//!
//! The guest runs one program, this one, which fills its memory with stamped pages; it is migrated to a second QEMU
//! on this host over TCP loopback, in post-copy from the first moment on, and then reads every page once, in random
//! order, back to back, and measures each read with its own clock. Ours is the same program as a process.
//!
//! A guest's read of a page that has arrived and that its processor has not seen yet is an exit to the hypervisor:
//! some microseconds, more in a virtual machine inside another. Only reads that took at least [`GUEST_FLOOR_NS`]
//! count as faults.

mod cpio;
mod guest;
pub mod machine;
mod page;
mod qmp;

use std::fmt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

pub use guest::{MARK, Options, run as run_guest};
pub use page::page;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::moving::{self, Config, Mover, Ours, Programs};
use crate::report::Latency;
use crate::results::{Results, Row};
use crate::scenario::RunOptions;
use crate::workload::{field, touch_and_free};
use machine::{Guest, Machine, Parts, QEMU};

/// What it is called.
pub const NAME: &str = "vs-qemu";
/// A guest's read that took less found its page on the destination.
pub const GUEST_FLOOR_NS: u64 = 30_000;
/// Longer than the slowest migration here; a capped one takes 8 s per 512 MiB.
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
/// Until the switch to post-copy nothing should be sent: what is there before is no fault.
const PRECOPY_BYTES_S: u64 = 64 << 10;
const CAP_MIB_S: u64 = 64;

/// How fast the background is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Background {
    Unlimited,
    Capped,
}

impl Background {
    const fn bytes_per_second(self) -> u64 {
        match self {
            Self::Unlimited => 0,
            Self::Capped => CAP_MIB_S << 20,
        }
    }
}

impl fmt::Display for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::Capped => write!(f, "{CAP_MIB_S} MiB/s"),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    mover: &'static str,
    background: Background,
    mib: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mover, background, mib } = self;
        write!(f, "{mover} {mib} MiB, background {background}")
    }
}

/// Runs the scenario.
///
/// # Errors
/// If nothing works, or the results cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let kernel = match Parts::kernel() {
        Ok(kernel) => kernel,
        Err(reason) => {
            common.say(&format!("skipped: {reason}"));
            return Ok(ExitCode::SUCCESS);
        }
    };
    let programs = Programs::find(common)?;
    let dir = tempfile::Builder::new().prefix("postcopy-qemu-").tempdir_in("/dev/shm")?;
    let parts = Parts::new(kernel, dir.path(), &[("init", &std::env::current_exe()?)])?;
    let mib = options.mib.unwrap_or(if options.smoke { 64 } else { 512 });
    let backgrounds: &[Background] =
        if options.smoke { &[Background::Unlimited] } else { &[Background::Unlimited, Background::Capped] };
    let group = |background: &Background| {
        ["ours", "qemu"].map(|mover| Case { mover, background: *background, mib }).to_vec()
    };
    let groups: Vec<Vec<Case>> = backgrounds.iter().map(group).collect();
    let mut versions = programs.versions();
    versions.push(("qemu", version()?));
    versions.push(("accelerator", parts.accelerator.name().to_owned()));
    let mut campaign = Campaign::begin(NAME, options, common, &versions)?;
    campaign.measure(&groups, options.runs_or(5), |case, run, results| match case.mover {
        "qemu" => qemu(*case, run, &parts, results),
        _ => ours(*case, run, &programs, results),
    })?;
    campaign.end()
}

/// `QEMU emulator version 7.2.22 (Debian ...)`
fn version() -> anyhow::Result<String> {
    let output = Command::new(QEMU).arg("--version").output().context("running QEMU")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().unwrap_or_default().trim_start_matches("QEMU emulator version ").to_owned())
}

fn row(case: Case, run: usize, latency: &Latency, drain_ms: f64, blackout_ms: f64) -> Row {
    let case = vec![
        ("mover", case.mover.to_owned()),
        ("mib", case.mib.to_string()),
        ("background", case.background.to_string()),
    ];
    let mut row = Row::new(case, run);
    row.push_latency(latency);
    row.push("drain_ms", drain_ms);
    row.push("blackout_ms", blackout_ms);
    row
}

fn ours(case: Case, run: usize, programs: &Programs, results: &mut Results) -> anyhow::Result<String> {
    let push_rate = match case.background {
        Background::Unlimited => "unlimited".to_owned(),
        Background::Capped => format!("{CAP_MIB_S}M"),
    };
    let mover = Mover::Ours(Box::new(Ours { push_rate, ..Ours::default() }));
    let measured = moving::measure(programs, &Config::new(case.mib, mover))?;
    let row = row(case, run, &measured.latency(), measured.last_page_ms, measured.blackout_ms);
    results.histogram(&row.name(), &measured.histogram)?;
    results.add(&row)?;
    Ok(format!("{case} run {run}: {}", measured.in_words()))
}

fn qemu(case: Case, run: usize, parts: &Parts, results: &mut Results) -> anyhow::Result<String> {
    let dir = tempfile::Builder::new().prefix("postcopy-qemu-").tempdir_in("/dev/shm")?;
    let arguments = format!("workload guest --mib {}", case.mib);
    let guest = |is_incoming| Guest {
        mib: case.mib,
        processors: 1,
        // No huge pages: they would be split at the migration, and the measured reads are of 4 KiB pages.
        kernel_line: "transparent_hugepage=never",
        arguments: &arguments,
        is_incoming,
    };
    let mut source = Machine::start(parts, "source", guest(false), dir.path())?;
    let mut destination = Machine::start(parts, "destination", guest(true), dir.path())?;
    let ready = source.line()?;
    ensure!(ready.starts_with("READY"), "the guest said {ready:?}");
    for machine in [&mut source, &mut destination] {
        machine.qmp.enable(&["postcopy-ram", "postcopy-preempt"])?;
        let rates = json!({
            "max-bandwidth": PRECOPY_BYTES_S,
            "max-postcopy-bandwidth": case.background.bytes_per_second(),
        });
        machine.qmp.ask("migrate-set-parameters", rates)?;
    }
    touch_and_free(case.mib);
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    destination.qmp.ask("migrate-incoming", json!({ "uri": uri }))?;
    source.qmp.ask("migrate", json!({ "uri": uri }))?;
    source.qmp.wait_status("query-migrate", "active", MIGRATION_LIMIT)?;
    source.qmp.ask("migrate-start-postcopy", json!({}))?;
    destination.qmp.wait_status("query-status", "running", MIGRATION_LIMIT)?;
    let resumed = Instant::now();
    destination.type_line()?;
    let done = source.qmp.wait_status("query-migrate", "completed", MIGRATION_LIMIT)?;
    let drain_ms = resumed.elapsed().as_secs_f64() * 1e3;
    let number = |value: &Value, key: &str| value.get(key).and_then(Value::as_f64);
    let blackout_ms = number(&done, "downtime").context("QEMU says no downtime")?;

    let mut histogram = Histogram::<u64>::new(guest::DIGITS)?;
    loop {
        let line = destination.line()?;
        if let Some(recorded) = line.strip_prefix("H ") {
            let (value, count) = recorded.split_once(' ').context("a line of the histogram is cut")?;
            let value: u64 = value.parse()?;
            if value >= GUEST_FLOOR_NS {
                histogram.record_n(value, count.parse()?)?;
            }
            continue;
        }
        let wrong: u64 = field(&line, "wrong").with_context(|| format!("the guest said {line:?}"))?;
        ensure!(wrong == 0, "{wrong} pages are wrong");
        break;
    }
    let latency = Latency::of_ns(&histogram);
    let row = row(case, run, &latency, drain_ms, blackout_ms);
    results.histogram(&row.name(), &histogram)?;
    results.add(&row)?;
    Ok(format!("{case} run {run}: {latency}; last page {drain_ms:.0} ms, blackout {blackout_ms:.0} ms"))
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
