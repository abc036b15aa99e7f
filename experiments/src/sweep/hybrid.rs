//! `hybrid`: what copying ahead saves, by how much of the memory is written between the last round and the freeze.
//!
//! A hook that runs right before the freeze has the process rewrite a part of its memory, so the dirty set is known. The
//! same is done before a move without copies, and before CRIU dumps and restores everything.

use std::process::ExitCode;

use super::Case;
use crate::cli::Common;
use crate::moving::{Config, Measured, Mover, Ours, Reads};
use crate::page::{medians, show};
use crate::plot::{Axis, Chart, Mark, Scale};
use crate::report::{MoveReport, PagesByOrigin};
use crate::results::{Folder, Group, Row};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "hybrid";
const DIRTY_PERCENT: [u8; 6] = [0, 1, 10, 25, 50, 100];
const SMOKE_DIRTY_PERCENT: [u8; 2] = [0, 10];
const MOVES: [&str; 3] = ["post-copy", "hybrid", "stop-and-copy"];

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    super::run(NAME, options, common, &cases(options), 5)
}

pub(super) fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let mib = options.mib.unwrap_or(if options.smoke { 64 } else { 1024 });
    let parts: &[u8] = if options.smoke { &SMOKE_DIRTY_PERCENT } else { &DIRTY_PERCENT };
    let ours = |rounds: &str| {
        let source_arguments = ["--precopy-rounds".into(), rounds.into()].to_vec();
        Mover::Ours(Box::new(Ours { source_arguments, ..Ours::default() }))
    };
    let group = |&percent: &u8| {
        let movers = [ours("0"), ours("1"), Mover::StopAndCopy];
        let case = |(how, mover): (&str, Mover)| {
            let config = Config {
                reads: Reads::WhileMoving,
                interval_us: 100,
                dirty_percent: Some(percent),
                ..Config::new(mib, mover)
            };
            Case::new([("mib", &mib), ("dirty_percent", &percent), ("move", &how)], config)
        };
        MOVES.into_iter().zip(movers).map(case).collect()
    };
    parts.iter().map(group).collect()
}

/// The columns that only this scenario has.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
pub(super) fn add_to(measured: &Measured, row: &mut Row) {
    let source = measured.reports.as_ref().map(|(source, _)| source);
    let mib = |bytes: fn(&MoveReport) -> u64| source.map(|report| bytes(report) as f64 / f64::from(1 << 20));
    row.push("after_mib", mib(|report| report.bytes.fault_lane + report.bytes.push_lane));
    row.push("ahead_mib", mib(|report| report.bytes.precopy));
    row.push("dump_ms", measured.criu_ms().map(|(dump, _)| dump));
    row.push("restore_ms", measured.criu_ms().map(|(_, restore)| restore));
    row.push("total_ms", source.map(|report| report.total_ms));
    row.push("remote_faults", source.map(|report| report.fault_latency_us.count as f64));
    let pages = |count: fn(&PagesByOrigin) -> u64| source.map(|report| count(&report.pages) as f64);
    row.push("precopied_pages", pages(|pages| pages.precopied));
    row.push("zero_pages", pages(|pages| pages.zero));
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# hybrid: what copying ahead saves\n\n\
         A process is moved over TCP loopback and reads its pages at random, one per 100 us, until all have arrived. Right \
         before the freeze it rewrites a part of its memory. `hybrid` has copied all of it once before that, `post-copy` \
         nothing, and `stop-and-copy` is `criu dump` and `criu restore` through a memory file system. `after_mib` is what \
         crossed the link behind the switchover, `ahead_mib` before the freeze; `faults` are the accesses that took \
         longer than 3 us, `remote_faults` those of the whole process that needed the source.\n\n",
    );
    let told = [
        "blackout_ms",
        "dump_ms",
        "restore_ms",
        "own_share_ms",
        "last_page_ms",
        "total_ms",
        "after_mib",
        "ahead_mib",
        "remote_faults",
        "faults",
        "mean_us",
        "p99_us",
        "demand_pages",
        "push_pages",
        "precopied_pages",
        "zero_pages",
        "destination_peak_mib",
    ];
    text += &medians(&folder.table, &told);
    for (column, label) in [
        ("blackout_ms", "blackout in ms"),
        ("last_page_ms", "brownout in ms"),
        ("after_mib", "MiB behind the switchover"),
    ] {
        text += &by_dirty_part(folder, column, label)?;
    }
    Ok(text)
}

/// A column over the part that was written, a line per kind of move.
fn by_dirty_part(folder: &Folder, column: &str, label: &str) -> anyhow::Result<String> {
    let x = Axis::new("rewritten before the freeze in percent", Scale::Linear);
    let mut chart = Chart::new(format!("{label}, by what was rewritten"), x, Axis::new(label, Scale::Linear));
    let groups = folder.table.groups();
    for (colour, how) in MOVES.into_iter().enumerate() {
        let of_kind = groups.iter().filter(|group| group.value("move") == how);
        let point = |group: &Group<'_>| {
            Some((group.value("dirty_percent").parse().ok()?, group.spread(column)?.middle))
        };
        let points: Vec<(f64, f64)> = of_kind.filter_map(point).collect();
        if !points.is_empty() {
            chart.add(how, colour, Mark::LineAndDots, points);
        }
    }
    show(folder, column, &chart)
}
