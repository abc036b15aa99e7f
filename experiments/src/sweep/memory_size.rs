//! `memory-size`: what grows with the memory of the process, and what does not.

use std::process::ExitCode;

use anyhow::{Context, ensure};

use super::{COSTS, Case};
use crate::cli::Common;
use crate::moving::{Config, Mover, Reads};
use crate::page::{against_floors, by_case, latencies, medians};
use crate::plot::{Axis, Scale};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "memory-size";
const SIZES_MIB: [usize; 6] = [64, 256, 1024, 2048, 4096, 8192];
const SMOKE_SIZES_MIB: [usize; 2] = [16, 64];

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let free_mib = available_mib()?;
    let (cases, skipped) = cases(options, free_mib);
    for mib in skipped {
        let needed = needed_mib(mib);
        common.say(&format!(
            "{mib} MiB are skipped: they need {needed} MiB of memory, {free_mib} MiB are free"
        ));
    }
    ensure!(!cases.is_empty(), "no size fits into {free_mib} MiB of free memory");
    super::run(NAME, options, common, &cases, 5)
}

/// The cases that fit into memory, and the sizes that do not.
pub(super) fn cases(options: &RunOptions, free_mib: usize) -> (Vec<Vec<Case>>, Vec<usize>) {
    let sizes: &[usize] = if options.smoke { &SMOKE_SIZES_MIB } else { &SIZES_MIB };
    let sizes = options.mib.as_ref().map_or(sizes, std::slice::from_ref);
    let (fit, skipped): (Vec<usize>, Vec<usize>) =
        sizes.iter().partition(|&&mib| needed_mib(mib) <= free_mib);
    let case = |mib: usize| {
        let config = Config { reads: Reads::WhileMoving, ..Config::new(mib, Mover::Ours(Box::default())) };
        vec![Case::new([("mib", &mib)], config)]
    };
    (fit.into_iter().map(case).collect(), skipped)
}

/// Source and destination are on one host, each has all pages until they are acknowledged, and a sample of 32 bytes
/// is kept per page; a gibibyte is left for everybody else.
fn needed_mib(mib: usize) -> usize {
    mib.saturating_mul(2).saturating_add(mib / 128).saturating_add(1024)
}

fn available_mib() -> anyhow::Result<usize> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    available_in(&text).context("/proc/meminfo does not say how much memory is available")
}

fn available_in(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? >> 10)
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# memory-size: what grows with the memory\n\n\
         A process is moved over TCP loopback and reads its pages at random, back to back, until all have arrived.\n\n",
    );
    text += &medians(&folder.table, &COSTS);
    text += &against_floors(folder)?;
    let size = |group: &Group<'_>| group.value("mib").parse().ok();
    let mib = || Axis::new("memory in MiB", Scale::Log);
    let axes = (mib(), Axis::new("ms", Scale::Log));
    let lines =
        [("last_page_ms", "last page"), ("blackout_ms", "blackout"), ("own_share_ms", "our share of it")];
    text += &by_case(folder, "times", "times by memory", axes, size, &lines)?;
    let axes = (mib(), Axis::new("fault latency in us", Scale::Log));
    let lines = [("p50_us", "p50"), ("mean_us", "mean"), ("p99_us", "p99")];
    text += &by_case(folder, "fault-latency", "fault latency by memory", axes, size, &lines)?;
    let axes = (mib(), Axis::new("GiB per s", Scale::Linear));
    text += &by_case(
        folder,
        "throughput",
        "throughput by memory",
        axes,
        size,
        &[("gib_per_s", "to the last page")],
    )?;
    let axes = (mib(), Axis::new("peak resident MiB", Scale::Linear));
    let lines = [("source_peak_mib", "source"), ("destination_peak_mib", "destination")];
    text += &by_case(folder, "peak", "memory of the tools", axes, size, &lines)?;
    Ok(text + &latencies(folder, "latency", |_| true, |group| format!("{} MiB", group.value("mib")))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        let (cases, skipped) = cases(&RunOptions::default(), 6000);
        assert_eq!(skipped, [4096, 8192]);
        assert_eq!(cases.len(), SIZES_MIB.len() - 2);
        let asked = RunOptions { mib: Some(100), ..RunOptions::default() };
        let (cases, skipped) = super::cases(&asked, 100);
        assert!(cases.is_empty() && skipped == [100]);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(available_in(text), Some(2048));
        assert_eq!(available_in("MemFree: 1 kB\n"), None);
    }
}
