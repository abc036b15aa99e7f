//! `lanes`: one fault lane or several for many threads, one push lane or several for an idle process.

use std::process::ExitCode;

use super::{COSTS, Case};
use crate::cli::Common;
use crate::moving::{Config, Mover, Ours, Reads};
use crate::page::{against_floors, latencies, medians};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "lanes";
/// Fault lanes and push lanes.
const COUNTS: [(u8, u8); 4] = [(1, 1), (2, 1), (1, 2), (2, 2)];
const SMOKE_COUNTS: [(u8, u8); 2] = [(1, 1), (2, 2)];
/// Name, threads, whether anything is pushed, and when the process reads.
const LOADS: [(&str, usize, bool, Reads); 4] = [
    ("idle", 1, true, Reads::Afterwards),
    ("one thread", 1, true, Reads::WhileMoving),
    ("16 threads", 16, true, Reads::All),
    ("16 threads push off", 16, false, Reads::All),
];

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    super::run(NAME, options, common, &cases(options), 5)
}

pub(super) fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let mib = options.mib.unwrap_or(if options.smoke { 32 } else { 512 });
    let counts: &[(u8, u8)] = if options.smoke { &SMOKE_COUNTS } else { &COUNTS };
    let case = |(load, threads, push, reads): (&str, usize, bool, Reads), (fault, pushed): (u8, u8)| {
        let push_rate = if push { "unlimited" } else { "off" }.to_owned();
        let counts = [("--fault-lanes", fault), ("--push-lanes", pushed)];
        let source_arguments =
            counts.iter().flat_map(|(option, count)| [(*option).into(), count.to_string().into()]).collect();
        let ours = Ours { push_rate, source_arguments, ..Ours::default() };
        let config = Config { threads, reads, ..Config::new(mib, Mover::Ours(Box::new(ours))) };
        Case::new([("mib", &mib), ("load", &load), ("fault_lanes", &fault), ("push_lanes", &pushed)], config)
    };
    LOADS.into_iter().map(|load| counts.iter().map(|count| case(load, *count)).collect()).collect()
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# lanes: several connections for faults and for the push\n\n\
         A process is moved over TCP loopback; it reads its pages at random, back to back, or waits until all are there. \
         Each lane is a connection with threads of its own at both ends. Source, destination and the process share \
         the processors of one machine, so more lanes pay here only where they leave some of them idle.\n\n",
    );
    text += &medians(&folder.table, &[&["faults", "faults_per_s"][..], &COSTS].concat());
    text += &against_floors(folder)?;
    for (load, ..) in LOADS.iter().filter(|(.., reads)| *reads != Reads::Afterwards) {
        let wanted = |group: &Group<'_>| group.value("load") == *load;
        let named = |group: &Group<'_>| {
            format!("{} fault, {} push", group.value("fault_lanes"), group.value("push_lanes"))
        };
        text += &latencies(folder, load, wanted, named)?;
    }
    Ok(text)
}
