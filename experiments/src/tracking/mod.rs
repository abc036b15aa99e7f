//! `tracking`: what it costs to know which pages a process writes.
//!
//! ```text
//! scan          one scan of memory of which a part was written since the one before, by write protection
//! compare       the same by content: every page is read and hashed
//! first write   the first write to each page after it was protected, beside the next one
//! stop          how long a busy process of so many threads stands still when it is armed
//! rounds        operations of busy threads while a scan is made ten times a second, beside without
//! copy ahead    the same while three rounds of pre-copy are made at a pace, to a receiver that throws everything away
//! disarm        from the end of tracking to the process as it was
//! ```

mod probes;

use std::fmt;
use std::process::ExitCode;

use hdrhistogram::Histogram;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::page::medians;
use crate::report::Latency;
use crate::results::{Folder, Row};
use crate::scenario::RunOptions;

/// Its name, and that of its results folder.
pub const NAME: &str = "tracking";

/// One probe.
#[derive(Clone, Copy, Debug)]
enum Probe {
    /// One page in so many was written; none if 0.
    Scan {
        every: usize,
    },
    /// The first scan of all.
    Arm,
    Compare,
    FirstWrite,
    Stop {
        threads: usize,
    },
    Rounds {
        threads: usize,
    },
    Copy {
        threads: usize,
        rate: &'static str,
    },
    Disarm,
}

struct Case {
    what: &'static str,
    how: String,
    probe: Probe,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.what, self.how)
    }
}

/// What a probe found.
#[derive(Debug, Default)]
struct Found {
    ms_per_gib: Option<f64>,
    ns_per_page: Option<f64>,
    /// Nanoseconds.
    stops: Option<Histogram<u64>>,
    /// Nanoseconds from the request to stop on.
    waits: Option<Histogram<u64>>,
    /// Of the operations without tracking.
    kept_percent: Option<f64>,
}

/// Runs the scenario.
///
/// # Errors
/// If this kernel cannot track writes, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let mib = options.mib.unwrap_or(if options.smoke { 32 } else { 1024 });
    let tries = if options.smoke { 5 } else { 100 };
    let mut campaign = Campaign::begin(NAME, options, common, &[])?;
    campaign.measure(&[cases()], options.runs_or(5), |case, run, results| {
        let found = match case.probe {
            Probe::Scan { every } => probes::scan(mib, every)?,
            Probe::Arm => probes::arm(mib)?,
            Probe::Compare => probes::compare(mib)?,
            Probe::FirstWrite => probes::first_write(mib)?,
            Probe::Stop { threads } => probes::stop(threads, tries)?,
            Probe::Rounds { threads } => probes::rounds(mib, threads, options.smoke)?,
            Probe::Copy { threads, rate } => probes::copy(mib, threads, rate, options.smoke)?,
            Probe::Disarm => probes::disarm(mib)?,
        };
        let mut row = Row::new(vec![("what", case.what.to_owned()), ("how", case.how.clone())], run);
        row.push("ms_per_gib", found.ms_per_gib);
        row.push("ns_per_page", found.ns_per_page);
        let stops = found.stops.as_ref().map(Latency::of_ns);
        row.push("stop_p50_us", stops.map(|stops| stops.p50));
        row.push("stop_p99_us", stops.map(|stops| stops.p99));
        row.push("stop_max_us", stops.map(|stops| stops.max));
        row.push("wait_p50_us", found.waits.as_ref().map(|waits| Latency::of_ns(waits).p50));
        row.push("kept_percent", found.kept_percent);
        if let Some(stops) = &found.stops {
            results.histogram(&row.name(), stops)?;
        }
        results.add(&row)?;
        let stops = stops.map(|stops| format!("stopped {stops}"));
        let number = |value: Option<f64>, unit: &str| value.map(|value| format!("{value:.2} {unit}"));
        let words = [
            number(found.ms_per_gib, "ms/GiB"),
            number(found.ns_per_page, "ns/page"),
            stops,
            number(found.kept_percent, "% kept"),
        ];
        let words: Vec<String> = words.into_iter().flatten().collect();
        Ok(format!("{case}, run {run}: {}", words.join(", ")))
    })?;
    campaign.end()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |what, how: &str, probe| cases.push(Case { what, how: how.to_owned(), probe });
    for (every, how) in [(0, "idle"), (100, "1 % written"), (10, "10 %"), (2, "half"), (1, "all")] {
        add("scan", how, Probe::Scan { every });
    }
    add("scan", "arming", Probe::Arm);
    add("compare", "all", Probe::Compare);
    add("first write", "4 KiB pages", Probe::FirstWrite);
    add("disarm", "all protected", Probe::Disarm);
    for threads in [1, 4, 16, 64] {
        add("stop", &format!("{threads} threads"), Probe::Stop { threads });
    }
    for threads in [1, 4] {
        add("rounds", &format!("{threads} threads"), Probe::Rounds { threads });
    }
    for threads in [1, 4] {
        for rate in ["128M", "192M", "256M", "512M", "unlimited"] {
            add("copy ahead", &format!("{threads} threads, {rate}"), Probe::Copy { threads, rate });
        }
    }
    cases
}

/// Its page.
///
/// # Errors
/// None today.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    Ok(String::from(
        "# tracking: what it costs to know which pages a process writes\n\n\
         `scan` and `disarm` are by write protection, `compare` is by content. `first write` is what the first write to \
         a protected page costs more than the next. `stop` is how long a process whose threads write all the time \
         stands still when it is armed, once for each address space; `wait` is how long it takes before until it does, in \
         which it runs or waits for a processor. `kept_percent` is the throughput of writing \
         threads: in `rounds` while their memory is scanned ten times a second and nothing is copied, in `copy ahead` during \
         three rounds of pre-copy at a pace, first writes, scans, reading and sending included; the receiver throws away \
         what comes. `ms_per_gib` is the time of the first round there.\n\n",
    ) + &medians(&folder.table, &[]))
}
