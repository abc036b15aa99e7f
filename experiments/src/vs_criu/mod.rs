//! `vs-criu`: the same workload moved by us and by CRIU's own lazy pages, interleaved, in one run.
//!
//! Per run a process fills its memory, is moved on this host over TCP loopback into a PID namespace of its own,
//! and then reads its pages: not at all (idle), one per 100 us (paced), or back to back. The results folder is that
//! of [`results`](crate::results).

mod summary;

use std::fmt;
use std::process::ExitCode;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::moving::{Config, Mover, Programs, Reads, measure};
use crate::results::{Folder, Row};
use crate::scenario::RunOptions;

/// How the application uses its memory after the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// It reads nothing before every page has arrived.
    Idle,
    /// One random read per 100 us.
    Paced,
    /// Random reads back to back.
    BackToBack,
}

impl Load {
    const ALL: [Self; 3] = [Self::Idle, Self::Paced, Self::BackToBack];

    /// Its name in files and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Paced => "paced",
            Self::BackToBack => "back-to-back",
        }
    }
}

struct Case {
    mover: Mover,
    mib: usize,
    load: Load,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mover, mib, load } = self;
        write!(f, "{mover:<4} {mib:>4} MiB {:<12}", load.name())
    }
}

impl Case {
    fn config(&self) -> Config {
        let (reads, interval_us) = match self.load {
            Load::Idle => (Reads::Afterwards, 0),
            Load::Paced => (Reads::WhileMoving, 100),
            Load::BackToBack => (Reads::All, 0),
        };
        Config { reads, interval_us, ..Config::new(self.mib, self.mover.clone()) }
    }

    fn row(&self, run: usize) -> Row {
        let case = vec![
            ("contender", self.mover.to_string()),
            ("mib", self.mib.to_string()),
            ("load", self.load.name().to_owned()),
        ];
        Row::new(case, run)
    }
}

/// Runs the scenario.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(options: &RunOptions, common: &Common) -> anyhow::Result<ExitCode> {
    let sizes: &[usize] = if options.smoke { &[64] } else { &[512, 2048] };
    let sizes = options.mib.as_ref().map_or(sizes, std::slice::from_ref);
    let programs = Programs::find(common)?;
    let mut campaign = Campaign::begin("vs-criu", options, common, &programs.versions())?;
    let mut groups = Vec::new();
    for &mib in sizes {
        for load in Load::ALL {
            let movers = [Mover::Ours(Box::default()), Mover::Criu];
            groups.push(movers.into_iter().map(|mover| Case { mover, mib, load }).collect());
        }
    }
    campaign.measure(&groups, options.runs_or(5), |case, run, results| {
        let measured = measure(&programs, &case.config())?;
        let mut row = case.row(run);
        measured.add_to(&mut row);
        row.push("own_share_ms", measured.own_share_ms());
        measured.record(&row, results)?;
        Ok(format!("{case} run {run}: {}", measured.in_words()))
    })?;
    campaign.end()
}

/// Its page.
///
/// # Errors
/// If a plot cannot be drawn.
pub fn page(folder: &Folder) -> anyhow::Result<String> {
    summary::page(folder)
}
