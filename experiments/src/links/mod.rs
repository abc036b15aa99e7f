//! `links`: what a fault costs and how fast the push is, by kind of link, over loopback, virtual cables, and links
//! with delay and loss.
//!
//! In each case a process fills its memory, is moved from host to host of a lab, and reads its pages back to back in
//! random order from its first instruction after the move on. A case whose memory has not arrived after some
//! seconds is not waited for any longer: its latencies and its rate count, and it has no drain time.

mod condition;
mod kinds;
mod page;
mod round_trip;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use host::criu::Criu;

pub use page::page;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::clock::wall_ns;
use crate::crossing::{Crossing, Moving};
use crate::lab::{Host, Lab};
use crate::report::Latency;
use crate::results::{Results, Row};
use crate::scenario::RunOptions;
use crate::touch::{self, Handle};
use crate::workload::{Files, touch_and_free};
use condition::Condition;

/// What it is called.
pub const NAME: &str = "links";
/// A read that took less found its page present.
const FAULT_FLOOR_NS: u64 = 3_000;
/// A gap of this length in the application's clock is the move: shorter than any blackout, longer than what the
/// processors of a busy machine keep a thread waiting.
const MOVED_GAP_MS: u64 = 25;
/// The port of the datagrams that measure the round trip.
const ECHO_PORT: u16 = 7301;
const MIB: usize = 256;
const SMOKE_MIB: usize = 32;
/// From the start of the move to the resume. On the slowest link (50 ms, 1 % lost) CRIU's images take some seconds.
const RESUME_LIMIT: Duration = Duration::from_secs(60);
/// From the resume on. With 20 conditions, three kinds and two runs a full matrix stays below half an hour.
const DRAIN_LIMIT: Duration = Duration::from_secs(8);
const WORKLOAD_LIMIT: Duration = Duration::from_secs(60);

/// A kind of link under a condition.
#[derive(Clone, Copy, Debug)]
struct Case {
    link: &'static str,
    condition: Condition,
    mib: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} over {}", self.link, self.condition)
    }
}

/// Runs the scenario.
///
/// # Errors
/// If nothing works, or the results cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let criu = Criu::find(common.criu.as_deref())?;
    common.sweep_labs();
    for (kind, reason) in kinds::missing() {
        common.say(&format!("skipped: {kind}: {reason}"));
    }
    let conditions = if options.smoke { vec![Condition::SMOKE] } else { Condition::all() };
    let mib = options.mib.unwrap_or(if options.smoke { SMOKE_MIB } else { MIB });
    let kinds = kinds::available();
    let kinds = if options.smoke { &kinds[..1] } else { &kinds };
    let cases = |condition| kinds.iter().map(|&link| Case { link, condition, mib }).collect();
    let groups: Vec<Vec<Case>> = conditions.into_iter().map(cases).collect();
    let mut campaign = Campaign::begin(NAME, options, common, &[("criu", criu.version.clone())])?;
    campaign.measure(&groups, options.runs_or(2), |case, run, results| {
        measure(*case, run, &criu.path, results)
    })?;
    campaign.end()
}

/// What came of a move within its limit.
struct Observed {
    /// From the resume to the last page, if it came.
    drain: Option<Duration>,
    /// Of the pages, over the time in which they came.
    push_mib_s: f64,
}

fn measure(case: Case, run: usize, criu: &Path, results: &mut Results) -> anyhow::Result<String> {
    let dir = tempfile::Builder::new().prefix("postcopy-links-").tempdir_in("/dev/shm")?;
    let lab =
        Lab::joined_by(case.condition.wire(run as u64)).context("making the hosts (this needs root)")?;
    let to = if case.condition == Condition::Loopback { Host::Source } else { Host::Destination };
    let address = if to == Host::Source { Ipv4Addr::LOCALHOST } else { lab.destination_address() };
    let round_trip = round_trip::measure(&lab, to, (IpAddr::from(address), ECHO_PORT).into())?;

    let mut options = touch::Options::new(Files::in_dir(dir.path(), "touch"), dir.path().join("samples"));
    (options.mib, options.start_after_gap_ms) = (case.mib, MOVED_GAP_MS);
    let mut own = lab.run_in(Host::Source, "setsid");
    own.arg(std::env::current_exe()?);
    let mut workload = Handle::start(own, &options, WORKLOAD_LIMIT)?;
    workload.mark_moved();
    touch_and_free(case.mib);
    let crossing = Crossing {
        lab: &lab,
        to,
        link: case.link,
        arguments: Default::default(),
        with_service: false,
        criu,
        dir: dir.path(),
    };
    let moving = crossing.start(workload.pid())?;
    let observed = observe(&lab, moving, &mut workload, case.mib)?;
    let samples = workload.samples()?;
    ensure!(samples.wrong() == 0, "{} pages are wrong", samples.wrong());
    let histogram = samples.histogram(FAULT_FLOOR_NS)?;
    let latency = Latency::of_ns(&histogram);

    let mut row = Row::new(
        vec![
            ("link", case.link.to_owned()),
            ("wire", case.condition.wire_name()),
            ("delay_ms", case.condition.delay_ms().to_string()),
            ("loss_percent", case.condition.loss_percent().to_string()),
            ("mib", case.mib.to_string()),
        ],
        run,
    );
    let round_trip_us = round_trip.as_secs_f64() * 1e6;
    row.push("round_trip_us", round_trip_us);
    row.push_latency(&latency);
    #[expect(clippy::cast_precision_loss, reason = "times below 2^53")]
    for (column, value) in [
        ("p50_round_trips", latency.p50 / round_trip_us),
        ("p99_round_trips", latency.p99 / round_trip_us),
        ("push_mib_s", observed.push_mib_s),
        ("blackout_ms", samples.gap_ns as f64 / 1e6),
    ] {
        row.push(column, value);
    }
    row.push("drain_ms", observed.drain.map(|drain| drain.as_secs_f64() * 1e3));
    results.histogram(&row.name(), &histogram)?;
    results.add(&row)?;
    let drain = observed.drain.map_or_else(
        || format!("not drained after {DRAIN_LIMIT:?}"),
        |drain| format!("drained in {:.0} ms", drain.as_secs_f64() * 1e3),
    );
    Ok(format!(
        "{case} run {run}: round trip {round_trip_us:.0} us; {latency}; push {:.0} MiB/s, {drain}",
        observed.push_mib_s
    ))
}

/// Waits for the resume, and then for the last page or the limit.
fn observe(lab: &Lab, mut moving: Moving, workload: &mut Handle, mib: usize) -> anyhow::Result<Observed> {
    let begun = Instant::now();
    while !workload.has_started()? {
        moving.check()?;
        let late = begun.elapsed() >= RESUME_LIMIT;
        ensure!(!late, "not resumed after {RESUME_LIMIT:?}\n{}", moving.last_lines());
        std::thread::sleep(Duration::from_millis(1));
    }
    let arrived = || lab.traffic().map_or(0, |[from_source, _]| from_source.bytes);
    let (resumed, before) = (Instant::now(), arrived());
    while !moving.has_ended()? && resumed.elapsed() < DRAIN_LIMIT {
        std::thread::sleep(Duration::from_millis(1));
    }
    if !moving.has_ended()? {
        #[expect(clippy::cast_precision_loss, reason = "bytes of some seconds")]
        let bytes = arrived().saturating_sub(before) as f64;
        let push_mib_s = bytes / f64::from(1 << 20) / resumed.elapsed().as_secs_f64();
        return Ok(Observed { drain: None, push_mib_s });
    }
    let moved = moving.wait(Duration::ZERO)?;
    let resumed_ns = workload.samples()?.gap_to_ns;
    let drain = Duration::from_nanos(moved.used.1.ended_ns.min(wall_ns()).saturating_sub(resumed_ns));
    workload.wait_done(WORKLOAD_LIMIT)?;
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
    let push_mib_s = mib as f64 / drain.as_secs_f64();
    Ok(Observed { drain: Some(drain), push_mib_s })
}
