//! Experiments that are lists of moves: each case a configuration and the columns that say which.
//!
//! - [`fault_latency`]: patterns, reads and writes, threads, with and without push
//! - [`push_interference`]: the push from off to unlimited
//! - [`lanes`]: several connections for faults and for the push
//! - [`stores`]: where the pages wait
//! - [`memory_size`]: from small to large
//! - [`hybrid`]: with and without copies ahead, by how much is written behind them
//! - [`prefill`]: how long the process is held for what was copied ahead
//! - [`protection`]: what it costs to leave word for who takes over

pub mod fault_latency;
pub mod hybrid;
pub mod lanes;
pub mod memory_size;
pub mod prefill;
pub mod protection;
pub mod push_interference;
pub mod stores;

use std::fmt;
use std::process::ExitCode;

use crate::campaign::Campaign;
use crate::cli::Common;
use crate::moving::{Config, Programs, measure};
use crate::results::Row;
use crate::scenario::RunOptions;

/// The columns that say what a move costs: its faults, its times, and what both sides spend.
const COSTS: [&str; 12] = [
    "mean_us",
    "p50_us",
    "p99_us",
    "max_us",
    "last_page_ms",
    "blackout_ms",
    "own_share_ms",
    "gib_per_s",
    "source_cpu_s_per_gib",
    "destination_cpu_s_per_gib",
    "source_peak_mib",
    "destination_peak_mib",
];

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    /// What distinguishes it from the others: column and value.
    pub columns: Vec<(&'static str, String)>,
    /// What is moved and measured.
    pub config: Config,
}

impl Case {
    /// A case.
    pub fn new<const N: usize>(columns: [(&'static str, &dyn fmt::Display); N], config: Config) -> Self {
        let text = |(column, value): (&'static str, &dyn fmt::Display)| (column, value.to_string());
        Self { columns: columns.into_iter().map(text).collect(), config }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> =
            self.columns.iter().map(|(column, value)| format!("{column} {value}")).collect();
        f.write_str(&words.join(", "))
    }
}

/// Measures every case as often as was asked for, or `usual` times.
///
/// # Errors
/// If nothing can be moved, or a file cannot be written.
pub fn run(
    scenario: &str,
    options: &RunOptions,
    common: &Common,
    groups: &[Vec<Case>],
    usual: usize,
) -> anyhow::Result<ExitCode> {
    let programs = Programs::find(common)?;
    let mut campaign = Campaign::begin(scenario, options, common, &programs.versions())?;
    campaign.measure(groups, options.runs_or(usual), |case, run, results| {
        let measured = measure(&programs, &case.config)?;
        let mut row = Row::new(case.columns.clone(), run);
        measured.add_to(&mut row);
        if [hybrid::NAME, prefill::NAME].contains(&scenario) {
            hybrid::add_to(&measured, &mut row);
        }
        measured.record(&row, results)?;
        Ok(format!("{case}, run {run}: {}", measured.in_words()))
    })?;
    campaign.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::RunName;

    /// Files are called after cases: no two may share a name.
    fn all_differ(groups: &[Vec<Case>]) {
        let name =
            |case: &Case| RunName::new(case.columns.iter().map(|(_, value)| value.as_str()), 1).to_string();
        let mut names: Vec<String> = groups.iter().flatten().map(name).collect();
        let columns = |case: &Case| case.columns.iter().map(|column| column.0).collect::<Vec<_>>();
        assert!(groups.iter().flatten().all(|case| columns(case) == columns(&groups[0][0])));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert!(count > 0 && names.len() == count, "{names:?}");
    }

    #[test]
    fn every_case_has_a_name_of_its_own() {
        for smoke in [true, false] {
            let options = RunOptions { smoke, ..RunOptions::default() };
            all_differ(&fault_latency::cases(&options));
            all_differ(&push_interference::cases(&options));
            all_differ(&lanes::cases(&options));
            all_differ(&stores::cases(&options));
            all_differ(&memory_size::cases(&options, usize::MAX).0);
            all_differ(&hybrid::cases(&options));
            all_differ(&prefill::cases(&options));
            all_differ(&protection::cases(&options));
        }
    }
}
