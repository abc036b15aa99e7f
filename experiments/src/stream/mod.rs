//! `tcp-stream`: an established bulk stream through a move of its server.
//!
//! ```text
//!   source                            destination                          client
//!   stream-server on 10.77.0.100  --- moved with its connection --->       one connection, read as fast as it goes
//!   sends its memory, round and round                                      every byte checked, bytes per 10 ms
//! ```
//!
//! What the server sends is its memory, so after the move each round of the stream needs pages that are still on the
//! source. The client's link has a rate: a stream as fast as the processors would measure who gets how much of them.

mod client;
mod content;
mod page;
mod server;

use std::fmt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use host::criu::Criu;

pub use page::page;
pub use server::{Options, run as serve};

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::crossing::{Crossing, service_obstacle};
use crate::lab::{Host, Lab, Rate, SERVICE};
use crate::results::{Results, Row};
use crate::scenario::RunOptions;
use crate::workload::{Files, Order, Process};
use client::{Arrival, Client};

/// What it is called.
pub const NAME: &str = "tcp-stream";
const PORT: u16 = 7400;
const LIMIT: Duration = Duration::from_secs(60);
/// The stream before the move and after it.
const BEFORE: Duration = Duration::from_millis(1500);
const AFTER: Duration = Duration::from_millis(2500);

/// A stream over a client's link of some rate.
#[derive(Clone, Copy, Debug)]
struct Case {
    mbit: u32,
    mib: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Mbit/s out of {} MiB", self.mbit, self.mib)
    }
}

/// Runs the scenario.
///
/// # Errors
/// If nothing works, or the results cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let criu = Criu::find(common.criu.as_deref())?;
    if let Some(reason) = service_obstacle(&criu) {
        common.say(&format!("skipped: {reason}"));
        return Ok(ExitCode::SUCCESS);
    }
    common.sweep_labs();
    let mib = options.mib.unwrap_or(if options.smoke { 64 } else { 512 });
    let rates: &[u32] = if options.smoke { &[1000] } else { &[1000, 4000] };
    let groups: Vec<Vec<Case>> = rates.iter().map(|&mbit| vec![Case { mbit, mib }]).collect();
    let mut campaign = Campaign::begin(NAME, options, common, &[("criu", criu.version.clone())])?;
    campaign.measure(&groups, options.runs_or(5), |case, run, results| {
        measure(*case, run, &criu.path, results)
    })?;
    campaign.end()
}

fn measure(case: Case, run: usize, criu: &Path, results: &mut Results) -> anyhow::Result<String> {
    let dir = tempfile::Builder::new().prefix("postcopy-stream-").tempdir_in("/dev/shm")?;
    let lab = Lab::new().context("making the hosts (this needs root)")?;
    lab.add_address(Host::Source, SERVICE)?;
    lab.shape(Host::Client, Some(Rate { mbit: case.mbit }))?;
    let address = (SERVICE, PORT).into();
    let files = Files::in_dir(dir.path(), "stream");
    let options = Options { addr: address, mib: case.mib, seconds: 600, files: files.clone() };
    let mut command = lab.run_in(Host::Source, "setsid");
    command.arg(std::env::current_exe()?);
    options.add_to(&mut command);
    let mut server = Process::start(command, &files)?;
    server.wait_line("READY", None, LIMIT).context("starting the server")?;
    let client = lab.inside(Host::Client, || Client::connect(address, case.mib, LIMIT))??;
    let client = client.start();

    client.wait_streaming(BEFORE, LIMIT)?;
    server.mark_moved();
    let crossing = Crossing {
        lab: &lab,
        to: Host::Destination,
        link: "tcp",
        arguments: Default::default(),
        with_service: true,
        criu,
        dir: dir.path(),
    };
    let moving = crossing.start(server.pid())?;
    let moved = moving.wait(LIMIT)?;
    let ended = Instant::now();
    client.wait_streaming(AFTER.saturating_sub(ended.elapsed()), LIMIT)?;
    let number = server.order(Order::Quit)?;
    let received = client.finish(LIMIT)?;
    server.wait_line("DONE", Some(number), LIMIT)?;
    ensure!(received.wrong == 0, "{} of {} bytes are wrong", received.wrong, received.bytes);

    let seen = page::Seen::of(&received.arrivals).context("nothing arrived")?;
    let mut row = Row::new(vec![("rate_mbit", case.mbit.to_string()), ("mib", case.mib.to_string())], run);
    #[expect(clippy::cast_precision_loss, reason = "bytes of some seconds")]
    for (column, value) in [
        ("steady_mbit_s", seen.steady_mbit_s),
        ("gap_ms", seen.gap_ms),
        ("first_second_mbit_s", seen.first_second_mbit_s),
        ("blackout_ms", moved.source.blackout_ms),
        ("brownout_ms", moved.destination.brownout_ms),
        ("received_mib", received.bytes as f64 / f64::from(1 << 20)),
    ] {
        row.push(column, value);
    }
    row.push("back_ms", seen.back_ms);
    results.timeline(&row.name(), &seen.csv())?;
    results.add(&row)?;
    Ok(format!(
        "{case} run {run}: {:.0} Mbit/s, gap {:.0} ms, back at 90 % after {}; {} MiB, all right",
        seen.steady_mbit_s,
        seen.gap_ms,
        seen.back_ms.map_or_else(|| "never".to_owned(), |ms| format!("{ms:.0} ms")),
        received.bytes >> 20
    ))
}
