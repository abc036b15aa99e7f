//! `protection`: what it costs that another program can take over from either, beside moves of which no word is left.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::{COSTS, Case};
use crate::cli::Common;
use crate::moving::{Config, Mover, Ours, Reads};
use crate::page::{cell, find, latencies, medians, ratio};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "protection";
/// Name, what the push may, and when the process reads.
const LOADS: [(&str, &str, Reads); 3] = [
    ("idle", "unlimited", Reads::Afterwards),
    ("push off", "off", Reads::All),
    ("back to back", "unlimited", Reads::WhileMoving),
];
/// What is compared.
const WORDS: [&str; 2] = ["left", "none"];
/// The figure of each load that must not suffer.
const FIGURES: [(&str, &str); 3] =
    [("idle", "last_page_ms"), ("push off", "p50_us"), ("back to back", "p50_us")];

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    super::run(NAME, options, common, &cases(options), 9)
}

pub(super) fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let mib = options.mib.unwrap_or(if options.smoke { 32 } else { 512 });
    let case = |(load, push_rate, reads): (&str, &str, Reads), word: &str| {
        let arguments: &[&str] = if word == "none" { &["--state-dir", "none"] } else { &[] };
        let arguments: Vec<_> = arguments.iter().map(Into::into).collect();
        let ours = Ours {
            push_rate: push_rate.to_owned(),
            source_arguments: arguments.clone(),
            destination_arguments: arguments,
            ..Ours::default()
        };
        let config = Config { reads, ..Config::new(mib, Mover::Ours(Box::new(ours))) };
        Case::new([("mib", &mib), ("load", &load), ("word", &word)], config)
    };
    LOADS.into_iter().map(|load| WORDS.into_iter().map(|word| case(load, word)).collect()).collect()
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# protection: what it costs that another program can take over\n\n\
         A process is moved over TCP loopback. *left*: both sides leave word, the destination in a journal that has a bit for each page and \
         every change of an address space, the source when it freezes, commits and lets go. *none*: `--state-dir none` on both sides. \
         Sessions have an id and a secret in either case, which cost something when a connection is made and nothing behind \
         that; what `tls` and `quic` cost is in `links`.\n\n",
    );
    text += &medians(&folder.table, &COSTS);
    text += "\n| load | figure | left | none | left / none |\n|---|---|---|---|---|\n";
    let groups = folder.table.groups();
    for (load, figure) in FIGURES {
        let of =
            |word| find(&groups, &[("load", load), ("word", word)]).and_then(|group| group.spread(figure));
        let (left, none) = (of("left"), of("none"));
        let shown = |spread: Option<_>| {
            spread.map_or_else(String::new, |spread: crate::results::Spread| spread.to_string())
        };
        let _ = writeln!(
            text,
            "| {load} | {figure} | {} | {} | {} |",
            shown(left),
            shown(none),
            cell(ratio(left, none))
        );
    }
    text.push('\n');
    for (load, ..) in LOADS.iter().filter(|(.., reads)| *reads != Reads::Afterwards) {
        let wanted = |group: &Group<'_>| group.value("load") == *load;
        text += &latencies(folder, load, wanted, |group| format!("word {}", group.value("word")))?;
    }
    Ok(text)
}
