//! `vs-criu`: the same workload moved by us and by CRIU's own lazy pages, interleaved, in one run.
//!
//! Per run a process fills its memory, is moved on this host over TCP loopback into a PID namespace of its own,
//! and then reads its pages: not at all (idle), one per 100 us (paced), or back to back, on idle and on busy
//! processors. The results folder is that of [`results`](crate::results).

mod summary;

use std::process::ExitCode;

use crate::cli::Common;
use crate::moving::{Config, Mover, Reads};
use crate::results::Folder;
use crate::scenario::RunOptions;
use crate::sweep::{self, Case};

/// How the application uses its memory after the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// It reads nothing before every page has arrived.
    Idle,
    /// One random read per 100 us.
    Paced,
    /// Random reads back to back.
    BackToBack,
    /// The same while another task wants all of each processor.
    BusyCores,
}

impl Load {
    const ALL: [Self; 4] = [Self::Idle, Self::Paced, Self::BackToBack, Self::BusyCores];

    /// Its name in files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Paced => "paced",
            Self::BackToBack => "back-to-back",
            Self::BusyCores => "busy-cores",
        }
    }

    /// When it reads, and how long from one read to the next.
    const fn reads(self) -> (Reads, u64) {
        match self {
            Self::Idle => (Reads::Afterwards, 0),
            Self::Paced => (Reads::WhileMoving, 100),
            Self::BackToBack | Self::BusyCores => (Reads::All, 0),
        }
    }
}

/// Its name.
pub const NAME: &str = "vs-criu";

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    sweep::run(NAME, options, common, &cases(options), 5)
}

fn cases(options: &RunOptions) -> Vec<Vec<Case>> {
    let sizes: &[usize] = if options.smoke { &[64] } else { &[512, 2048] };
    let sizes = options.mib.as_ref().map_or(sizes, std::slice::from_ref);
    let both = |mib: usize, load: Load| {
        let case = |mover: Mover| {
            let contender = mover.to_string();
            let (reads, interval_us) = load.reads();
            let busy_cores = load == Load::BusyCores;
            let config = Config { reads, interval_us, busy_cores, ..Config::new(mib, mover) };
            Case::new([("contender", &contender), ("mib", &mib), ("load", &load.name())], config)
        };
        [Mover::Ours(Box::default()), Mover::Criu].map(case).to_vec()
    };
    let mut groups: Vec<_> = sizes
        .iter()
        .flat_map(|&mib| [Load::Idle, Load::Paced, Load::BackToBack].map(|load| both(mib, load)))
        .collect();
    // On busy processors CRIU needs minutes for the larger size.
    groups.extend(sizes.first().map(|&mib| both(mib, Load::BusyCores)));
    groups
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    summary::page(folder)
}
