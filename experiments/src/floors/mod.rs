//! `floors`: what this machine can do at best, so that results can be judged on it and compared between machines.
//!
//! Everything is one process with nothing but the steps themselves: a thread that touches pages, one that handles its
//! faults, one that serves pages out of memory, a pair that pushes; each where the placement says. Real tools cannot
//! be faster than this by more than the noise, and should not be slower by much.
//!
//! ```text
//! wake                   touch -> handler -> UFFDIO_COPY -> the touch goes on
//! round trip             24 bytes -> 4 KiB, over TCP loopback
//! end to end             touch -> handler -> link -> page in the server's memory -> link -> UFFDIO_COPY -> goes on
//! end to end with push   the same while another connection carries as much as it can, which is installed too
//! install                UFFDIO_COPY of 64 KiB at a time
//! splice                 pages in pipes -> TCP, received into a buffer
//! receive and install    TCP -> UFFDIO_COPY, 64 KiB at a time
//! ```

mod latency;
mod memory;
mod rates;

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use hdrhistogram::Histogram;
use host::placement::Processors;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::page::{latencies, medians};
use crate::report::Latency;
use crate::results::{Folder, Group, Row};
use crate::scenario::RunOptions;

/// Its name, and that of its results folder.
pub const NAME: &str = "floors";
/// A fault, resolved by a thread of the same process.
pub const WAKE: &str = "wake";
/// A request and its reply.
pub const ROUND_TRIP: &str = "round trip";
/// A fault, resolved over a link.
pub const END_TO_END: &str = "end to end";
/// The same while a second connection pushes.
pub const END_TO_END_WITH_PUSH: &str = "end to end with push";
/// Pages installed.
pub const INSTALL: &str = "install";
/// Pages sent out of pipes.
pub const SPLICE: &str = "splice";
/// Pages received and installed.
pub const RECEIVE_AND_INSTALL: &str = "receive and install";

/// Every thread on one core; with a push, that on another.
pub const TOGETHER: &str = "together";
/// Where the scheduler puts them.
pub const FREE: &str = "free";

/// How much is measured per case.
#[derive(Clone, Copy, Debug)]
struct Extent {
    /// Touches or requests.
    samples: usize,
    /// Bytes of a rate.
    bytes: usize,
}

const USUAL: Extent = Extent { samples: 4096, bytes: 512 << 20 };
const SMOKE: Extent = Extent { samples: 256, bytes: 16 << 20 };
/// A thread of a probe waits no longer than this for another.
const PATIENCE: Duration = Duration::from_secs(20);

/// The cores of the threads of a probe; `None` is where the scheduler puts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cores {
    faulter: Option<usize>,
    handler: Option<usize>,
    server: Option<usize>,
    push: Option<usize>,
}

/// One probe.
#[derive(Clone, Copy, Debug)]
enum Probe {
    Wake(Cores),
    RoundTrip(Cores),
    EndToEnd(Cores),
    EndToEndWithPush(Cores),
    Install(usize),
    Splice(usize),
    ReceiveAndInstall(usize),
}

struct Case {
    what: &'static str,
    placement: String,
    probe: Probe,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.what, self.placement)
    }
}

/// What a probe found.
#[derive(Debug, Default)]
struct Found {
    /// Nanoseconds.
    latencies: Option<Histogram<u64>>,
    gib_per_s: Option<f64>,
}

/// Runs the scenario.
///
/// # Errors
/// If userfaultfd cannot be used, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let extent = if options.smoke { SMOKE } else { USUAL };
    let cpus = Processors::allowed()?.list().collect::<Vec<_>>();
    ensure!(!cpus.is_empty(), "no processor is allowed");
    let mut campaign = Campaign::begin(NAME, options, common, &[])?;
    campaign.measure(&[cases(&cpus)], options.runs_or(5), |case, run, results| {
        let found = probe(case.probe, extent)?;
        let mut row =
            Row::new(vec![("what", case.what.to_owned()), ("placement", case.placement.clone())], run);
        let latency = found.latencies.as_ref().map(Latency::of_ns);
        row.push("mean_us", latency.map(|latency| latency.mean));
        row.push("p50_us", latency.map(|latency| latency.p50));
        row.push("p90_us", latency.map(|latency| latency.p90));
        row.push("p99_us", latency.map(|latency| latency.p99));
        row.push("max_us", latency.map(|latency| latency.max));
        row.push("gib_per_s", found.gib_per_s);
        if let Some(latencies) = &found.latencies {
            results.histogram(&row.name(), latencies)?;
        }
        results.add(&row)?;
        let latency = latency.map(|latency| latency.to_string()).unwrap_or_default();
        let rate = found.gib_per_s.map(|rate| format!("{rate:.2} GiB/s")).unwrap_or_default();
        Ok(format!("{case}, run {run}: {latency} {rate}"))
    })?;
    campaign.end()
}

/// What there is to measure on these processors: without a second one, only what needs none.
fn cases(cpus: &[usize]) -> Vec<Case> {
    let first = cpus.first().copied();
    let second = cpus.get(1).copied();
    let cores = |faulter, handler, server, push| Cores { faulter, handler, server, push };
    let free = cores(None, None, None, None);
    let mut cases = Vec::new();
    let mut add = |what, placement: &str, probe| {
        cases.push(Case { what, placement: placement.to_owned(), probe });
    };
    add(WAKE, TOGETHER, Probe::Wake(cores(first, first, None, None)));
    add(WAKE, FREE, Probe::Wake(free));
    add(ROUND_TRIP, TOGETHER, Probe::RoundTrip(cores(None, first, first, None)));
    add(ROUND_TRIP, FREE, Probe::RoundTrip(free));
    add(END_TO_END, TOGETHER, Probe::EndToEnd(cores(first, first, first, None)));
    add(END_TO_END, FREE, Probe::EndToEnd(free));
    add(END_TO_END_WITH_PUSH, FREE, Probe::EndToEndWithPush(free));
    for (threads, placement) in [(1, "1 thread"), (2, "2 threads")] {
        add(INSTALL, placement, Probe::Install(threads));
        add(SPLICE, placement, Probe::Splice(threads));
        add(RECEIVE_AND_INSTALL, placement, Probe::ReceiveAndInstall(threads));
    }
    if second.is_some() {
        add(WAKE, "handler apart", Probe::Wake(cores(first, second, None, None)));
        add(ROUND_TRIP, "server apart", Probe::RoundTrip(cores(None, first, second, None)));
        add(END_TO_END, "server apart", Probe::EndToEnd(cores(first, first, second, None)));
        add(END_TO_END, "faulter apart", Probe::EndToEnd(cores(first, second, second, None)));
        add(END_TO_END, "handler apart", Probe::EndToEnd(cores(first, second, first, None)));
        add(END_TO_END_WITH_PUSH, TOGETHER, Probe::EndToEndWithPush(cores(first, first, first, second)));
    }
    cases
}

fn probe(probe: Probe, extent: Extent) -> anyhow::Result<Found> {
    match probe {
        Probe::Wake(cores) => latency::wake(cores, extent),
        Probe::RoundTrip(cores) => latency::round_trip(cores, extent),
        Probe::EndToEnd(cores) => latency::end_to_end(cores, extent),
        Probe::EndToEndWithPush(cores) => latency::end_to_end_with_push(cores, extent),
        Probe::Install(threads) => rates::install(threads, extent),
        Probe::Splice(threads) => rates::splice_to_tcp(threads, extent),
        Probe::ReceiveAndInstall(threads) => rates::receive_and_install(threads, extent),
    }
}

/// Keeps the calling thread on a core.
fn keep_on(core: Option<usize>) -> anyhow::Result<()> {
    match core {
        Some(cpu) => Ok(Processors::allowed()?.just(Some(cpu)).keep(0)?),
        None => Ok(()),
    }
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# floors: what this machine can do at best\n\n\
         One process, TCP loopback, nothing but the steps themselves. *Together* is every thread on one core (a push \
         on another), *apart* is the named thread on a second core, *free* is where the scheduler puts them. The rate \
         of `end to end with push` is that of the push meanwhile.\n\n",
    );
    text += &medians(&folder.table, &[]);
    for what in [WAKE, ROUND_TRIP, END_TO_END, END_TO_END_WITH_PUSH] {
        let wanted = |group: &Group<'_>| group.value("what") == what;
        text += &latencies(folder, what, wanted, |group| group.value("placement").to_owned())?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_one_processor_has_floors_too() {
        let has = |cpus: &[usize], what, placement| {
            cases(cpus).iter().any(|case| case.what == what && case.placement == placement)
        };
        assert!(has(&[3], END_TO_END, TOGETHER) && !has(&[3], END_TO_END_WITH_PUSH, TOGETHER));
        assert!(has(&[0, 1], END_TO_END_WITH_PUSH, TOGETHER) && has(&[0, 1], WAKE, "handler apart"));
    }
}
