//! `push-interference`: the push from off to unlimited. A faster push ends the brownout sooner and is in the way of
//! more faults until then; how much, is the question.

use std::process::ExitCode;

use super::Case;
use crate::cli::Common;
use crate::moving::{Config, Mover, Ours, Reads};
use crate::page::{against_floors, latencies, medians, show, timelines};
use crate::plot::{Axis, Chart, Mark, Scale};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "push-interference";
const OFF: &str = "off";
const RATES: [&str; 6] = [OFF, "64M", "256M", "512M", "1G", "unlimited"];
const SMOKE_RATES: [&str; 3] = [OFF, "256M", "unlimited"];
/// Name, and the time from one access to the next.
const LOADS: [(&str, u64); 2] = [("back-to-back", 0), ("paced", 100)];

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    super::run(NAME, options, common, &cases(options), 5)
}

pub(super) fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let mib = options.mib.unwrap_or(if options.smoke { 32 } else { 256 });
    let rates: &[&str] = if options.smoke { &SMOKE_RATES } else { &RATES };
    let case = |(load, interval_us): (&str, u64), rate: &str| {
        let ours = Ours { push_rate: rate.to_owned(), ..Ours::default() };
        // Without a push the move ends when the process has asked for everything and is gone.
        let reads = if rate == OFF { Reads::All } else { Reads::WhileMoving };
        let config = Config { reads, interval_us, ..Config::new(mib, Mover::Ours(Box::new(ours))) };
        Case::new([("mib", &mib), ("load", &load), ("push", &rate)], config)
    };
    LOADS.into_iter().map(|load| rates.iter().map(|rate| case(load, rate)).collect()).collect()
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# push-interference: brownout against tail\n\n\
         A process is moved over TCP loopback and reads its pages at random, back to back or one per 100 us, until \
         all have arrived. The brownout is the time from its resume to the last page.\n\n",
    );
    let told = ["faults", "mean_us", "p50_us", "p99_us", "p99_9_us", "max_us", "last_page_ms", "gib_per_s"];
    text += &medians(&folder.table, &told);
    text += &against_floors(folder)?;
    text += &trade(folder)?;
    for (load, _) in LOADS {
        let wanted = |group: &Group<'_>| group.value("load") == load;
        let named = |group: &Group<'_>| format!("push {}", group.value("push"));
        text += &format!("\n## {load}\n");
        text += &latencies(folder, load, wanted, named)?;
        text += &timelines(folder, load, wanted, named)?;
    }
    Ok(text)
}

/// A point per rate: what its brownout is, and what its tail.
fn trade(folder: &Folder) -> anyhow::Result<String> {
    let mut chart = Chart::new(
        "brownout against tail, from push off (right) to unlimited (left)",
        Axis::new("brownout in ms", Scale::Log),
        Axis::new("fault latency in us", Scale::Log),
    );
    let groups = folder.table.groups();
    let lines = LOADS.iter().flat_map(|(load, _)| [(load, "p50_us"), (load, "p99_us")]);
    for (colour, (load, column)) in lines.enumerate() {
        let of_load = groups.iter().filter(|group| group.value("load") == *load);
        let point =
            |group: &Group<'_>| Some((group.spread("last_page_ms")?.middle, group.spread(column)?.middle));
        let mut points: Vec<(f64, f64)> = of_load.filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let name = format!("{load}, {}", column.trim_end_matches("_us"));
        chart.add(name, colour, Mark::LineAndDots, points);
    }
    show(folder, "brownout-against-tail", &chart)
}
