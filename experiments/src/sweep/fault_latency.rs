//! `fault-latency`: what an access costs that has to fetch its page, by pattern, kind, threads, with and without push.

use std::fmt;
use std::process::ExitCode;

use super::Case;
use crate::cli::Common;
use crate::moving::{Config, Mover, Ours};
use crate::page::{against_floors, latencies, medians, timelines};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;
use crate::touch::{Access, Pattern};

/// Its name.
pub const NAME: &str = "fault-latency";
const PUSHES: [&str; 2] = ["off", "unlimited"];
const THREADS: [usize; 5] = [1, 2, 4, 8, 16];

/// The columns of its table that a reader needs first.
const TOLD: [&str; 10] = [
    "faults",
    "mean_us",
    "p50_us",
    "p99_us",
    "max_us",
    "faults_per_s",
    "gib_per_s",
    "demand_faults",
    "demand_pages",
    "redundant_pages",
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
    let mut groups = Vec::new();
    let mut add = |pattern: Pattern, access: Access, threads: usize, pushes: &[&str]| {
        let case = |push: &&str| {
            let ours = Ours { push_rate: (*push).to_owned(), ..Ours::default() };
            let config = Config { pattern, access, threads, ..Config::new(mib, Mover::Ours(Box::new(ours))) };
            let columns: [(_, &dyn fmt::Display); 5] = [
                ("mib", &mib),
                ("pattern", &pattern),
                ("access", &access),
                ("threads", &threads),
                ("push", push),
            ];
            Case::new(columns, config)
        };
        groups.push(pushes.iter().map(case).collect());
    };
    if options.smoke {
        Pattern::ALL.into_iter().for_each(|pattern| add(pattern, Access::Read, 1, &PUSHES[1..]));
        add(Pattern::Random, Access::Write, 16, &PUSHES[..1]);
        return groups;
    }
    for pattern in Pattern::ALL {
        add(pattern, Access::Read, 1, &PUSHES);
        add(pattern, Access::Write, 1, &PUSHES);
    }
    THREADS.into_iter().skip(1).for_each(|threads| add(Pattern::Random, Access::Read, threads, &PUSHES));
    groups
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# fault-latency: what an access costs that has to fetch its page\n\n\
         A process is moved over TCP loopback through a real restore and accesses its pages back to back, as its \
         resume begins. An access that took at least 3 us waited for its page.\n\n",
    );
    text += &medians(&folder.table, &TOLD);
    text += &against_floors(folder)?;
    for push in PUSHES {
        let reads = |group: &Group<'_>| group.value("push") == push && group.value("access") == "read";
        text += &format!("\n## Push {push}\n");
        let pattern = |group: &Group<'_>| reads(group) && group.value("threads") == "1";
        text += &latencies(folder, &format!("patterns, push {push}"), pattern, |group| {
            group.value("pattern").to_owned()
        })?;
        text += &timelines(folder, &format!("patterns, push {push}"), pattern, |group| {
            group.value("pattern").to_owned()
        })?;
        let threads = |group: &Group<'_>| reads(group) && group.value("pattern") == "random";
        text += &latencies(folder, &format!("threads, push {push}"), threads, |group| {
            format!("{} threads", group.value("threads"))
        })?;
    }
    Ok(text)
}
