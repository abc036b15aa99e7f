//! `prefill`: what it costs the blackout, and saves behind it, to install what was copied ahead before the process runs.

use std::process::ExitCode;

use super::Case;
use crate::cli::Common;
use crate::moving::{Config, Mover, Ours, Reads};
use crate::page::{medians, show};
use crate::plot::{Axis, Chart, Mark, Scale};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "prefill";
/// What `serve` is told, and how long it may take at most.
const PREFILLS: [(&str, u32); 4] = [("none", 0), ("all", 50), ("all", 200), ("all", 2000)];
/// Rewritten between the last round and the freeze.
const DIRTY_PERCENT: u8 = 10;

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    super::run(NAME, options, common, &cases(options), 5)
}

pub(super) fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let mib = options.mib.unwrap_or(if options.smoke { 64 } else { 1024 });
    let case = |(prefill, budget_ms): (&str, u32)| {
        let budget = budget_ms.to_string();
        let destination_arguments = ["--prefill", prefill, "--prefill-ms", &budget].map(Into::into).to_vec();
        let source_arguments = ["--precopy-rounds", "1"].map(Into::into).to_vec();
        let mover =
            Mover::Ours(Box::new(Ours { source_arguments, destination_arguments, ..Ours::default() }));
        let config = Config {
            reads: Reads::WhileMoving,
            interval_us: 100,
            dirty_percent: Some(DIRTY_PERCENT),
            ..Config::new(mib, mover)
        };
        Case::new([("mib", &mib), ("prefill", &prefill), ("budget_ms", &budget_ms)], config)
    };
    vec![PREFILLS.into_iter().map(case).collect()]
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = format!(
        "# prefill: installing what was copied ahead before the process runs\n\n\
         A process is moved over TCP loopback with one round of copies, rewrites {DIRTY_PERCENT} % of its memory right before \
         the freeze, and reads its pages at random, one per 100 us. The destination holds it until all that is clean is \
         installed, but at most `budget_ms`. `faults` are the accesses that took longer than 3 us, `remote_faults` those \
         that needed the source.\n\n"
    );
    let told = [
        "blackout_ms",
        "last_page_ms",
        "total_ms",
        "faults",
        "remote_faults",
        "mean_us",
        "p99_us",
        "precopied_pages",
    ];
    text += &medians(&folder.table, &told);
    let x = Axis::new("time that the process may be held in ms", Scale::Linear);
    let mut chart =
        Chart::new("blackout and brownout, by the time for prefill", x, Axis::new("ms", Scale::Linear));
    let groups = folder.table.groups();
    for (colour, column) in ["blackout_ms", "last_page_ms"].into_iter().enumerate() {
        let point =
            |group: &Group<'_>| Some((group.value("budget_ms").parse().ok()?, group.spread(column)?.middle));
        let points: Vec<(f64, f64)> = groups.iter().filter_map(point).collect();
        if !points.is_empty() {
            chart.add(column, colour, Mark::LineAndDots, points);
        }
    }
    text += &show(folder, "prefill", &chart)?;
    Ok(text)
}
