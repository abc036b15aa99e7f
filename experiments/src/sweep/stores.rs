//! `stores`: where the pages wait. In pipes of the source's, in the frozen task, or in the images of a checkpoint.

use std::process::ExitCode;

use super::{COSTS, Case};
use crate::cli::Common;
use crate::moving::{Config, Mover, Ours, Reads};
use crate::page::{against_floors, latencies, medians};
use crate::results::{Folder, Group};
use crate::scenario::RunOptions;

/// Its name.
pub const NAME: &str = "stores";
const LOADS: [(&str, u64, Reads); 2] = [("paced", 100, Reads::WhileMoving), ("back-to-back", 0, Reads::All)];

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    super::run(NAME, options, common, &cases(options), 5)
}

pub(super) fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let mib = options.mib.unwrap_or(if options.smoke { 32 } else { 512 });
    let ours = |store: &str| Mover::Ours(Box::new(Ours { store: store.to_owned(), ..Ours::default() }));
    let group = |(load, interval_us, reads): (&str, u64, Reads)| {
        let movers = [("pipes", ours("pipes")), ("frozen", ours("frozen")), ("images", Mover::Images)];
        let case = |(store, mover): (&str, Mover)| {
            let config = Config { reads, interval_us, ..Config::new(mib, mover) };
            Case::new([("mib", &mib), ("load", &load), ("store", &store)], config)
        };
        movers.into_iter().map(case).collect()
    };
    LOADS.into_iter().map(group).collect()
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    let mut text = String::from(
        "# stores: where the pages wait\n\n\
         `pipes` and `frozen` are moves over TCP loopback; with `images` the process is dumped as a whole into a \
         memory file system and restored from there by `uffd-daemon lazy-pages`, without any network: its blackout \
         includes writing the images, and its source is `criu dump`.\n\n",
    );
    text += &medians(&folder.table, &COSTS);
    text += &against_floors(folder)?;
    for (load, ..) in LOADS {
        let wanted = |group: &Group<'_>| group.value("load") == load;
        text += &latencies(folder, load, wanted, |group| group.value("store").to_owned())?;
    }
    Ok(text)
}
